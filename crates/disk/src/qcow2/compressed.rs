//! Compressed clusters: read a whole at a time, written one after the other.

use std::io::Read;
use std::sync::{Arc, PoisonError};

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};

use super::Qcow2;
use super::header::Compression;
use super::layout::{CompressedData, Entry};
use crate::error::{Error, Result, damaged};
use crate::{Buffers, Disk};

/// A cluster that was decompressed last: its host offset and what is in it.
pub(super) type Inflated = Option<(u64, Arc<[u8]>)>;

impl Qcow2 {
    /// Reads bytes of one compressed cluster.
    pub(super) fn read_compressed(
        &self,
        data: CompressedData,
        offset: u64,
        buffers: &Buffers,
    ) -> Result<()> {
        let cluster = self.inflate(data)?;
        let inside = (offset % self.layout.cluster_size()) as usize;
        buffers.fill_from(&cluster[inside..][..buffers.len() as usize]);
        Ok(())
    }

    fn inflate(&self, data: CompressedData) -> Result<Arc<[u8]>> {
        let lock = || self.inflated.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, cluster)) = lock().as_ref().filter(|last| last.0 == data.offset) {
            return Ok(Arc::clone(cluster));
        }
        let mut bytes = vec![0; data.length as usize];
        self.data().read_bytes(data.offset, &mut bytes)?;
        let mut cluster = vec![0; self.layout.cluster_size() as usize];
        let whole = match self.compression {
            Compression::Zlib => unzip(&bytes, &mut cluster),
            Compression::Zstd => unzstd(&bytes, &mut cluster),
        };
        if !whole {
            let at = data.offset;
            return Err(damaged(format!("compressed data at byte {at:#x}")));
        }
        let cluster: Arc<[u8]> = cluster.into();
        *lock() = Some((data.offset, Arc::clone(&cluster)));
        Ok(cluster)
    }

    /// Forgets what was decompressed: its room may be used for something else.
    pub(super) fn forget_inflated(&self) {
        *self.inflated.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Fills this image, which is blank, with what is on another disk, compressed. `progress` is told
    /// how many bytes are done.
    pub fn copy_compressed(&self, from: &dyn Disk, progress: &dyn Fn(u64)) -> Result<()> {
        let size = self.layout.cluster_size();
        let mut cluster = vec![0; size as usize];
        let mut at = 0;
        while at < from.size() {
            let extent = from.extent(at, from.size() - at)?;
            let skip = extent.length / size * size;
            if extent.kind.is_zero() && skip > 0 {
                at += skip;
            } else {
                let length = size.min(from.size() - at);
                let data = &mut cluster[..length as usize];
                from.read(at, Buffers::from(&mut *data))?;
                if data.iter().any(|byte| *byte != 0) {
                    self.write_compressed(at, data)?;
                }
                at += length;
            }
            progress(at);
        }
        Ok(())
    }

    /// Writes a whole cluster compressed, if that saves room. It must be one that was never written.
    /// The last of the disk may be shorter.
    pub fn write_compressed(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        let size = self.layout.cluster_size();
        self.check_change(offset, data.len() as u64)?;
        let ends = offset + data.len() as u64 == self.size;
        if !offset.is_multiple_of(size)
            || data.len() as u64 > size
            || !ends && (data.len() as u64) < size
        {
            return Err(Error::Invalid(
                "only whole clusters are compressed".to_owned(),
            ));
        }
        let mut cluster = data.to_vec();
        cluster.resize(size as usize, 0);
        let packed = match self.compression {
            Compression::Zlib => zip(&cluster),
            Compression::Zstd => Some(zstd(&cluster)),
        };
        let packed = packed.filter(|packed| (packed.len() as u64) < size);
        let Some(packed) = packed.filter(|_| !self.layout.external && !self.layout.extended) else {
            return self.write_all(offset, Buffers::from(data));
        };
        let mut tables = self.tables();
        let host = tables
            .refcounts
            .allocate_bytes(&self.file, packed.len() as u64)?;
        let value = self.layout.compressed_entry(host, packed.len() as u64);
        let Some(value) = value else {
            let what = "the image is too large to be compressed".to_owned();
            return Err(Error::Invalid(what));
        };
        self.file.write_bytes(host, &packed)?;
        let old = tables.entry(&self.file, offset)?;
        let new = Entry { value, bitmap: 0 };
        tables.set_entry(&self.file, offset, new)?;
        tables.leave(old);
        drop(tables);
        self.commit_if_full()
    }
}

/// Fills `cluster` from raw deflate data, which may be followed by something else.
fn unzip(bytes: &[u8], cluster: &mut [u8]) -> bool {
    let mut state = Decompress::new(false);
    let done = state.decompress(bytes, cluster, FlushDecompress::Finish);
    done.is_ok_and(|_| state.total_out() == cluster.len() as u64)
}

/// The same from a Zstandard frame.
fn unzstd(bytes: &[u8], cluster: &mut [u8]) -> bool {
    let decoder = ruzstd::decoding::StreamingDecoder::new(bytes);
    decoder.is_ok_and(|mut decoder| decoder.read_exact(cluster).is_ok())
}

fn zip(cluster: &[u8]) -> Option<Vec<u8>> {
    // other readers have a window of 4 KiB
    const WINDOW: u8 = 12;
    let level = flate2::Compression::default();
    let mut state = Compress::new_with_window_bits(level, false, WINDOW);
    let mut packed = vec![0; cluster.len()];
    match state.compress(cluster, &mut packed, FlushCompress::Finish) {
        Ok(Status::StreamEnd) => {
            packed.truncate(state.total_out() as usize);
            Some(packed)
        }
        _ => None,
    }
}

fn zstd(cluster: &[u8]) -> Vec<u8> {
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};
    compress_to_vec(cluster, CompressionLevel::Fastest)
}
