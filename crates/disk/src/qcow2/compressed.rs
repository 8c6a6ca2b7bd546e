//! Compressed clusters: read a whole at a time, written one after the other.

use std::borrow::Cow;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};
use zstd::zstd_safe;

use super::Qcow2;
use super::header::Compression;
use super::layout::{CompressedData, Entry};
use crate::copy::{Copied, is_zero};
use crate::error::{Error, Result, damaged};
use crate::pieces::{Crew, Piece, each_piece};
use crate::{Buffers, Disk, ExtentKind};

/// What is kept between reads of compressed clusters.
#[derive(Debug, Default)]
pub(super) struct Inflated {
    /// The cluster of which a part was read last: its host offset and what is in it.
    last: Mutex<Option<(u64, Arc<[u8]>)>>,
    /// Nobody uses them at present: as many as there were reads at once.
    idle: Mutex<Vec<Unpacker>>,
}

impl Inflated {
    fn last(&self) -> MutexGuard<'_, Option<(u64, Arc<[u8]>)>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Unpacker>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Qcow2 {
    /// Reads bytes of one compressed cluster.
    pub(super) fn read_compressed(
        &self,
        data: CompressedData,
        offset: u64,
        buffers: &Buffers,
    ) -> Result<()> {
        let size = self.layout.cluster_size();
        let inside = (offset % size) as usize;
        let wanted = inside..inside + buffers.len() as usize;
        let last = self.inflated.last().clone();
        if let Some((_, cluster)) = last.filter(|last| last.0 == data.offset) {
            buffers.fill_from(&cluster[wanted]);
            return Ok(());
        }
        let idle = self.inflated.idle().pop();
        let mut unpacker = match idle {
            Some(unpacker) => unpacker,
            None => Unpacker::new(self.compression)?,
        };
        let packed = unpacker.room(data.length as usize);
        self.data().read_bytes(data.offset, packed)?;
        let Some(cluster) = unpacker.unpack(data.length as usize, size as usize) else {
            let at = data.offset;
            return Err(damaged(format!("compressed data at byte {at:#x}")));
        };
        buffers.fill_from(&cluster[wanted]);
        if buffers.len() < size {
            *self.inflated.last() = Some((data.offset, cluster.into()));
        }
        self.inflated.idle().push(unpacker);
        Ok(())
    }

    /// Forgets what was decompressed: its room may be used for something else.
    pub(super) fn forget_inflated(&self) {
        *self.inflated.last() = None;
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

/// What decompresses clusters, one after the other.
struct Unpacker {
    kind: Unpacking,
    packed: Vec<u8>,
    cluster: Vec<u8>,
}

enum Unpacking {
    Zlib(Decompress),
    Zstd(zstd::bulk::Decompressor<'static>),
}

impl fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unpacker").finish_non_exhaustive()
    }
}

impl Unpacker {
    fn new(compression: Compression) -> Result<Self> {
        let kind = match compression {
            Compression::Zlib => Unpacking::Zlib(Decompress::new(false)),
            Compression::Zstd => Unpacking::Zstd(zstd::bulk::Decompressor::new()?),
        };
        Ok(Self {
            kind,
            packed: Vec::new(),
            cluster: Vec::new(),
        })
    }

    /// Room for so many compressed bytes.
    fn room(&mut self, length: usize) -> &mut [u8] {
        if self.packed.len() < length {
            self.packed.resize(length, 0);
        }
        &mut self.packed[..length]
    }

    /// The cluster of `size` bytes that begins in the first `length` bytes of the room, which something
    /// else may follow. None, unless it is whole and no longer.
    fn unpack(&mut self, length: usize, size: usize) -> Option<&[u8]> {
        let packed = self.packed.get(..length)?;
        self.cluster.resize(size, 0);
        let unpacked = match &mut self.kind {
            Unpacking::Zlib(state) => {
                state.reset(false);
                let done = state.decompress(packed, &mut self.cluster, FlushDecompress::Finish);
                done.ok()?;
                state.total_out() as usize
            }
            Unpacking::Zstd(state) => {
                // In one step, the cluster is the window as well: what the frame says of its sizes
                // takes no memory.
                let frame = zstd_safe::find_frame_compressed_size(packed).ok()?;
                let frame = packed.get(..frame)?;
                state
                    .decompress_to_buffer(frame, &mut self.cluster[..])
                    .ok()?
            }
        };
        (unpacked == size).then_some(&self.cluster)
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 64 << 10;

    /// Text that differs from line to line.
    fn cluster() -> Vec<u8> {
        let lines = (0..).flat_map(|n: u32| format!("{} of a text\n", n * n % 9973).into_bytes());
        lines.take(SIZE).collect()
    }

    fn unpack(unpacker: &mut Unpacker, packed: &[u8]) -> Option<Vec<u8>> {
        unpacker.room(packed.len()).copy_from_slice(packed);
        unpacker.unpack(packed.len(), SIZE).map(<[u8]>::to_vec)
    }

    fn each(test: impl Fn(&mut Packer, &mut Unpacker)) {
        for compression in [Compression::Zlib, Compression::Zstd] {
            let mut packer = Packer::new(compression).unwrap();
            test(&mut packer, &mut Unpacker::new(compression).unwrap());
        }
    }

    #[test]
    fn what_follows_a_compressed_cluster_is_ignored() {
        each(|packer, unpacker| {
            let one = packer.pack(&cluster()).unwrap().to_vec();
            for after in [&[][..], &[0; 500], &[0xee; 500], &one] {
                let packed = [&one, after].concat();
                assert_eq!(unpack(unpacker, &packed), Some(cluster()));
            }
        });
    }

    #[test]
    fn what_is_shorter_or_longer_than_a_cluster_is_refused() {
        each(|packer, unpacker| {
            for length in [1, SIZE - 1, SIZE + 1, 100 * SIZE] {
                let data = cluster().repeat(100)[..length].to_vec();
                let Some(packed) = packer.pack(&data).map(<[u8]>::to_vec) else {
                    assert_eq!(length, 1);
                    continue;
                };
                let found = unpack(unpacker, &packed);
                // raw deflate data says nowhere how long it is
                let cut = matches!(unpacker.kind, Unpacking::Zlib(_)) && length > SIZE;
                assert_eq!(found, cut.then(cluster), "{length}");
            }
            let whole = packer.pack(&cluster()).unwrap();
            assert_eq!(unpack(unpacker, &whole[..whole.len() / 2]), None);
            assert_eq!(unpack(unpacker, &[]), None);
        });
    }

    #[test]
    fn damaged_clusters_are_refused_or_of_the_right_length_and_the_next_is_whole() {
        each(|packer, unpacker| {
            let good = packer.pack(&cluster()).unwrap().to_vec();
            let mut seed = 1_u64;
            let mut random = |end: usize| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (seed >> 33) as usize % end
            };
            for _ in 0..2000 {
                let mut bad = good.clone();
                for _ in 0..=random(4) {
                    let near = if random(2) == 0 { 32 } else { bad.len() };
                    bad[random(near)] = random(256) as u8;
                }
                bad.truncate(bad.len() - random(3) * random(200));
                if let Some(found) = unpack(unpacker, &bad) {
                    assert_eq!(found.len(), SIZE);
                }
            }
            assert_eq!(unpack(unpacker, &good), Some(cluster()));
        });
    }

    #[test]
    fn a_zstd_frame_may_claim_a_window_of_2_gib_and_no_more() {
        // no size, a window of 2^(10 + n) bytes (RFC 8878 §3.1.1.1), one block of repeated bytes
        let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 0];
        let block = (SIZE as u32) << 3 | 1 << 1 | 1;
        frame.extend(&block.to_le_bytes()[..3]);
        frame.push(7);
        let mut unpacker = Unpacker::new(Compression::Zstd).unwrap();

        let found = [6, 21, 22, 31].map(|n: u8| {
            frame[5] = n << 3;
            unpack(&mut unpacker, &frame).is_some_and(|found| found == vec![7; SIZE])
        });

        assert_eq!(found, [true, true, false, false]);
    }
}
