//! Compressed clusters: read a whole at a time, written one after the other.

use std::borrow::Cow;
use std::io::Read;
use std::sync::{Arc, PoisonError};

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};

use super::Qcow2;
use super::header::Compression;
use super::layout::{CompressedData, Entry};
use crate::copy::{Copied, is_zero};
use crate::error::{Error, Result, damaged};
use crate::pieces::{Crew, Piece, each_piece};
use crate::{Buffers, Disk, ExtentKind};

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
    pub fn copy_compressed(
        &self,
        from: &dyn Disk,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<Copied> {
        let size = self.layout.cluster_size();
        let copy = |piece: &Piece, bytes: &mut [u8]| {
            let length = piece.range.end - piece.range.start;
            let mut copied = Copied::default();
            if piece.kind.is_some_and(ExtentKind::is_zero) {
                copied.zeroes = length;
                return Ok(copied);
            }
            let bytes = &mut bytes[..length as usize];
            from.read(piece.range.start, Buffers::from(&mut *bytes))?;
            let mut packer = Packer::new(self.compression)?;
            let starts = (piece.range.start..).step_by(size as usize);
            for (at, data) in starts.zip(bytes.chunks_mut(size as usize)) {
                if is_zero(data) {
                    copied.zeroes += data.len() as u64;
                } else {
                    copied.data += data.len() as u64;
                    self.pack(at, data, &mut packer)?;
                }
            }
            Ok(copied)
        };
        each_piece(from, 0..from.size(), size, Crew::All, progress, &copy)
    }

    /// Writes a whole cluster compressed, if that saves room. It must be one that was never written.
    /// The last of the disk may be shorter.
    pub fn write_compressed(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        self.pack(offset, data, &mut Packer::new(self.compression)?)
    }

    fn pack(&self, offset: u64, data: &mut [u8], packer: &mut Packer) -> Result<()> {
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
        {
            let _request = self.requests.read().unwrap_or_else(PoisonError::into_inner);
            self.pack_cluster(offset, data, packer)?;
        }
        self.commit_if_full()
    }

    fn pack_cluster(&self, offset: u64, data: &mut [u8], packer: &mut Packer) -> Result<()> {
        let size = self.layout.cluster_size();
        let possible = !self.layout.external && !self.layout.extended && !self.is_encrypted();
        let whole = possible.then(|| {
            let mut whole = Cow::from(&*data);
            if (data.len() as u64) < size {
                whole.to_mut().resize(size as usize, 0);
            }
            packer.pack(&whole)
        });
        let Some(packed) = whole.flatten() else {
            return self.write_all(offset, Buffers::from(data));
        };
        let mut tables = self.tables();
        let host = tables
            .refcounts
            .allocate_bytes(&self.file, packed.len() as u64)?;
        drop(tables);
        let new = self.layout.compressed_entry(host, packed.len() as u64);
        let Some(value) = new else {
            let what = "the image is too large to be compressed".to_owned();
            return Err(Error::Invalid(what));
        };
        let new = Entry { value, bitmap: 0 };
        let written = self.file.write_bytes(host, packed);
        let mut tables = self.tables();
        if let Err(error) = written {
            tables.leave(new);
            return Err(error.into());
        }
        let old = tables.entry(&self.file, offset)?;
        tables.set_entry(&self.file, offset, new)?;
        tables.leave(old);
        Ok(())
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

/// What compresses clusters, one after the other.
struct Packer {
    kind: Packing,
    packed: Vec<u8>,
}

enum Packing {
    Zlib(Box<Compress>),
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Packer {
    fn new(compression: Compression) -> Result<Self> {
        // other readers have a window of 4 KiB
        const WINDOW: u8 = 12;
        let kind = match compression {
            Compression::Zlib => {
                let level = flate2::Compression::default();
                let state = Compress::new_with_window_bits(level, false, WINDOW);
                Packing::Zlib(Box::new(state))
            }
            Compression::Zstd => {
                let level = zstd::DEFAULT_COMPRESSION_LEVEL;
                Packing::Zstd(zstd::bulk::Compressor::new(level)?)
            }
        };
        Ok(Self {
            kind,
            packed: Vec::new(),
        })
    }

    /// The cluster compressed, if that makes it smaller.
    fn pack(&mut self, cluster: &[u8]) -> Option<&[u8]> {
        // room for less than the cluster
        self.packed.resize(cluster.len() - 1, 0);
        let length = match &mut self.kind {
            Packing::Zlib(state) => {
                state.reset();
                let done = state.compress(cluster, &mut self.packed, FlushCompress::Finish);
                let ended = matches!(done, Ok(Status::StreamEnd));
                ended.then(|| state.total_out() as usize)
            }
            Packing::Zstd(state) => state.compress_to_buffer(cluster, &mut self.packed[..]).ok(),
        };
        length.map(|length| &self.packed[..length])
    }
}
