//! The blob's blocks, written in order: contents while the tar passes, metadata after that.
//!
//! Blocks of zeros are left out of the file, so that the blob is as sparse as what it holds.
//! The ends of files that share a block with their inode wait in a temporary file.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use tempfile::SpooledTempFile;

use crate::error::Error;
use crate::format::BLOCK;
use crate::tar::{Reader, Sparse};

/// How much is written at once, bytes.
const BUFFER: usize = 1 << 20;

/// Longest end of a file that is kept with its inode, bytes. Longer ones would leave more room
/// unused before them than a block of their own does after it.
pub(crate) const MAX_TAIL: u64 = BLOCK / 2;

/// How much of the ends of files is kept in memory before a file is made of it, bytes.
const TAILS_IN_MEMORY: usize = 4 << 20;

/// Most chunks of one file; larger files have larger chunks.
const MAX_CHUNKS: u64 = 1 << 16;

/// Largest sparse file, bytes: what ext4 can hold.
const MAX_SPARSE: u64 = 16 << 40;

/// Where the contents of a file are.
#[derive(Debug)]
pub(crate) enum Data {
    /// In blocks in a row, from `block` on, but for the end of `size`, if there is a `tail`: its
    /// place among the tails.
    Flat {
        size: u64,
        block: u32,
        tail: Option<u64>,
    },
    /// In chunks of `BLOCK << bits` bytes: which one, and its first block. Others are zeros.
    Chunks {
        size: u64,
        bits: u8,
        map: Vec<(u32, u32)>,
    },
}

impl Data {
    /// Size of the file, bytes.
    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::Flat { size, .. } | Self::Chunks { size, .. } => *size,
        }
    }

    /// Bytes of it that are with the inode.
    pub(crate) fn tail_size(&self) -> u64 {
        match self {
            Self::Flat {
                size,
                tail: Some(_),
                ..
            } => size % BLOCK,
            _ => 0,
        }
    }
}

/// The blob, and the tails that are not in it yet.
#[derive(Debug)]
pub(crate) struct Blocks<'a> {
    blob: &'a File,
    /// Where `buffer` begins in the blob, a multiple of [`BLOCK`].
    start: u64,
    buffer: Vec<u8>,
    tails: SpooledTempFile,
    tails_end: u64,
}

impl<'a> Blocks<'a> {
    /// Begins at `start` of an empty blob.
    pub(crate) fn new(blob: &'a File, start: u64) -> Self {
        Self {
            blob,
            start,
            buffer: Vec::with_capacity(BUFFER),
            tails: SpooledTempFile::new(TAILS_IN_MEMORY),
            tails_end: 0,
        }
    }

    /// Stores a file of `size` bytes.
    pub(crate) fn store(
        &mut self,
        tar: &mut Reader<'_, impl Read>,
        size: u64,
    ) -> Result<Data, Error> {
        let block = self.block()?;
        let tail = size % BLOCK;
        if tail == 0 || tail > MAX_TAIL {
            self.copy(tar, size)?;
            self.align()?;
            return Ok(Data::Flat {
                size,
                block,
                tail: None,
            });
        }
        self.copy(tar, size - tail)?;
        let mut end = [0; MAX_TAIL as usize];
        let end = &mut end[..tail as usize];
        tar.read_content(end)?;
        let tail = Some(self.keep_tail(end)?);
        Ok(Data::Flat { size, block, tail })
    }

    /// Stores a sparse file of which the tar has `stored` bytes.
    pub(crate) fn store_sparse(
        &mut self,
        tar: &mut Reader<'_, impl Read>,
        sparse: &Sparse,
        stored: u64,
        path: &[u8],
    ) -> Result<Data, Error> {
        if !sparse.is_sound(stored) {
            return Err(Error::bad_entry(path, "its map of sparse parts is wrong"));
        }
        let size = sparse.size;
        if size > MAX_SPARSE {
            return Err(Error::bad_entry(path, "it is larger than 16 TiB"));
        }
        let mut bits = 0;
        while size.div_ceil(BLOCK << bits) > MAX_CHUNKS {
            bits += 1;
        }
        let chunk = BLOCK << bits;
        let mut map: Vec<(u32, u32)> = Vec::new();
        // where the current chunk is in the file and in the blob
        let mut file_at = 0;
        let mut blob_at = 0;
        for part in &sparse.parts {
            let mut at = part.offset;
            let end = part.offset + part.length;
            while at < end {
                let index = (at / chunk) as u32;
                if map.last().is_none_or(|(last, _)| *last != index) {
                    self.finish_chunk(file_at, blob_at, chunk, size)?;
                    file_at = u64::from(index) * chunk;
                    blob_at = self.position();
                    map.push((index, self.block()?));
                }
                self.skip_to(blob_at + (at - file_at))?;
                let count = end.min(file_at + chunk) - at;
                self.copy(tar, count)?;
                at += count;
            }
        }
        self.finish_chunk(file_at, blob_at, chunk, size)?;
        Ok(Data::Chunks { size, bits, map })
    }

    /// Fills the chunk that was begun last, the last of a file only as far as the file goes.
    fn finish_chunk(
        &mut self,
        file_at: u64,
        blob_at: u64,
        chunk: u64,
        size: u64,
    ) -> Result<(), Error> {
        if blob_at == 0 {
            return Ok(());
        }
        let length = chunk.min(size - file_at).next_multiple_of(BLOCK);
        self.skip_to(blob_at + length)
    }

    fn copy(&mut self, tar: &mut Reader<'_, impl Read>, mut count: u64) -> Result<(), Error> {
        while count > 0 {
            let used = self.buffer.len();
            let now = count.min((BUFFER - used) as u64) as usize;
            self.buffer.resize(used + now, 0);
            let at = self.start + used as u64;
            tar.read_stored(&mut self.buffer[used..], at)?;
            count -= now as u64;
            self.flush_if_full()?;
        }
        Ok(())
    }

    /// Appends bytes.
    pub(crate) fn put(&mut self, mut bytes: &[u8]) -> Result<(), Error> {
        while !bytes.is_empty() {
            let (now, rest) = bytes.split_at(bytes.len().min(BUFFER - self.buffer.len()));
            self.buffer.extend_from_slice(now);
            bytes = rest;
            self.flush_if_full()?;
        }
        Ok(())
    }

    /// Goes on at `position` of the blob, with zeros up to there.
    pub(crate) fn skip_to(&mut self, position: u64) -> Result<(), Error> {
        let within = position - self.start;
        if within < BUFFER as u64 {
            self.buffer.resize(within as usize, 0);
            return Ok(());
        }
        self.buffer
            .resize(self.buffer.len().next_multiple_of(BLOCK as usize), 0);
        self.flush()?;
        self.start = position / BLOCK * BLOCK;
        self.buffer.resize((position % BLOCK) as usize, 0);
        Ok(())
    }

    /// Goes on at the next block.
    pub(crate) fn align(&mut self) -> Result<(), Error> {
        self.skip_to(self.position().next_multiple_of(BLOCK))
    }

    /// Where the next byte goes in the blob.
    pub(crate) fn position(&self) -> u64 {
        self.start + self.buffer.len() as u64
    }

    /// The block that begins here.
    pub(crate) fn block(&self) -> Result<u32, Error> {
        debug_assert_eq!(self.position() % BLOCK, 0);
        u32::try_from(self.position() / BLOCK).map_err(|_| Error::TooLarge("16 TiB"))
    }

    fn keep_tail(&mut self, bytes: &[u8]) -> Result<u64, Error> {
        let at = self.tails_end;
        self.tails.write_all(bytes).map_err(Error::Write)?;
        self.tails_end += bytes.len() as u64;
        Ok(at)
    }

    /// Appends the tail that is kept at `at`.
    pub(crate) fn put_tail(&mut self, at: u64, size: u64) -> Result<(), Error> {
        let mut tail = [0; BLOCK as usize];
        let tail = &mut tail[..size as usize];
        // in the order of the tar for the most part
        if self.tails.stream_position().map_err(Error::Write)? != at {
            self.tails.seek(SeekFrom::Start(at)).map_err(Error::Write)?;
        }
        self.tails.read_exact(tail).map_err(Error::Write)?;
        self.put(tail)
    }

    /// Writes what is left, and gives the blob its size. Gives that size.
    pub(crate) fn finish(mut self, first: (u64, &[u8])) -> Result<u64, Error> {
        self.align()?;
        self.flush()?;
        self.blob.set_len(self.start).map_err(Error::Write)?;
        self.blob
            .write_all_at(first.1, first.0)
            .map_err(Error::Write)?;
        Ok(self.start)
    }

    fn flush_if_full(&mut self) -> Result<(), Error> {
        if self.buffer.len() == BUFFER {
            self.flush()?;
        }
        Ok(())
    }

    /// Writes the buffer, which is whole blocks.
    fn flush(&mut self) -> Result<(), Error> {
        for (offset, bytes) in runs(&self.buffer) {
            self.blob
                .write_all_at(bytes, self.start + offset)
                .map_err(Error::Write)?;
        }
        self.start += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}

/// Runs of blocks that are not all zeros, with where they are.
fn runs(buffer: &[u8]) -> Vec<(u64, &[u8])> {
    let block = BLOCK as usize;
    let is_zero = |at: usize| buffer[at..at + block].iter().all(|byte| *byte == 0);
    let mut runs = Vec::new();
    let mut at = 0;
    while at < buffer.len() {
        if is_zero(at) {
            at += block;
            continue;
        }
        let begin = at;
        while at < buffer.len() && !is_zero(at) {
            at += block;
        }
        runs.push((begin as u64, &buffer[begin..at]));
    }
    runs
}
