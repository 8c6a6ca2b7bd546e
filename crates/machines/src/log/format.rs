//! The files of a log. All numbers are little-endian.
//!
//! ```text
//! header                                     record
//!  0  magic, 8 bytes "stratalg"               0  checksum, 32 bits
//!  8  version, 32 bits: 1                     4  length of the bytes, 32 bits, not 0
//! 12  zero, 32 bits                           8  time, 64 bits: ns since 1970
//! 16  number of the segment, 64 bits, from 1 16  stream, 8 bits
//! 24  bytes printed before it, 64 bits       17  zero, 24 bits
//! 32  salt, 64 bits                          20  the bytes
//! 40  checksum of the above, 32 bits
//! 44  zero, 32 bits
//! ```
//!
//! Checksums are CRC-32C: a header's over what is before it, a record's over the salt of its
//! segment and what is behind it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crc::{CRC_32_ISCSI, Crc, Table};

use crate::error::{Error, Result};

const CRC: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC_32_ISCSI);

const MAGIC: [u8; 8] = *b"stratalg";
const VERSION: u32 = 1;

/// Size of a segment's header, bytes.
pub(super) const HEADER: u64 = 48;
/// Size of a record without what was printed, bytes.
pub(super) const RECORD: usize = 20;
/// Most that is printed in one record, bytes.
pub(super) const MAX_BYTES: usize = 64 << 10;

/// Segments that a log may have, at most.
pub(super) const MAX_SEGMENTS: usize = 64;

/// Where something was printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// The command's standard output.
    Stdout,
    /// The command's standard error.
    Stderr,
    /// The machine's console.
    Console,
}

impl Stream {
    fn code(self) -> u8 {
        match self {
            Self::Stdout => 1,
            Self::Stderr => 2,
            Self::Console => 3,
        }
    }

    fn of_code(code: u8) -> Option<Self> {
        let all = [Self::Stdout, Self::Stderr, Self::Console];
        all.into_iter().find(|stream| stream.code() == code)
    }
}

/// The beginning of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    /// Which segment of the log it is; the first is 1.
    pub(super) number: u64,
    /// How much was printed before it, bytes.
    pub(super) before: u64,
    /// Makes the checksums of its records differ from all others.
    pub(super) salt: u64,
}

impl Header {
    pub(super) fn to_bytes(self) -> [u8; HEADER as usize] {
        let mut bytes = [0; HEADER as usize];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.number.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.before.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.salt.to_le_bytes());
        let checksum = CRC.checksum(&bytes[..40]);
        bytes[40..44].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// The header of a file that is called `path`; `None` where none was written, or not wholly.
    pub(super) fn read(path: &Path, file: &File) -> Result<Option<Self>> {
        let mut bytes = [0; HEADER as usize];
        let is_whole = read_at(file, &mut bytes, 0).map_err(Error::io("read the file", path))?;
        if !is_whole || bytes[..8] != MAGIC || u32_at(&bytes, 40) != CRC.checksum(&bytes[..40]) {
            return Ok(None);
        }
        let version = u32_at(&bytes, 8);
        if version > VERSION {
            return Err(Error::Newer {
                path: path.to_owned(),
                version: version.into(),
            });
        }
        Ok(Some(Self {
            number: u64_at(&bytes, 16),
            before: u64_at(&bytes, 24),
            salt: u64_at(&bytes, 32),
        }))
    }
}

/// A record without its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Line {
    /// Where it was printed.
    pub(super) stream: Stream,
    /// When, ns since 1970.
    pub(super) time: u64,
}

impl Line {
    /// Puts the record into `buffer`. There are 1 to [`MAX_BYTES`] `bytes`.
    pub(super) fn encode(self, salt: u64, bytes: &[u8], buffer: &mut Vec<u8>) {
        buffer.clear();
        buffer.extend_from_slice(&[0; 4]);
        buffer.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        buffer.extend_from_slice(&self.time.to_le_bytes());
        buffer.extend_from_slice(&[self.stream.code(), 0, 0, 0]);
        buffer.extend_from_slice(bytes);
        let checksum = checksum(salt, &buffer[4..]);
        buffer[..4].copy_from_slice(&checksum.to_le_bytes());
    }

    /// Reads the record at `offset`, and its bytes into `buffer` behind the record's head; `None`
    /// where there is none of this salt.
    pub(super) fn read_at(
        file: &File,
        offset: u64,
        salt: u64,
        buffer: &mut Vec<u8>,
    ) -> io::Result<Option<Self>> {
        buffer.resize(RECORD, 0);
        if !read_at(file, buffer, offset)? {
            return Ok(None);
        }
        let length = u32_at(buffer, 4) as usize;
        let Some(stream) = Stream::of_code(buffer[16]) else {
            return Ok(None);
        };
        if length == 0 || length > MAX_BYTES {
            return Ok(None);
        }
        buffer.resize(RECORD + length, 0);
        let is_whole = read_at(file, &mut buffer[RECORD..], offset + RECORD as u64)?;
        if !is_whole || u32_at(buffer, 0) != checksum(salt, &buffer[4..]) {
            return Ok(None);
        }
        Ok(Some(Self {
            stream,
            time: u64_at(buffer, 8),
        }))
    }
}

fn checksum(salt: u64, rest: &[u8]) -> u32 {
    let mut digest = CRC.digest();
    digest.update(&salt.to_le_bytes());
    digest.update(rest);
    digest.finalize()
}

/// Fills the buffer; false if the file ends before.
fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<bool> {
    match file.read_exact_at(buffer, offset) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(number)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(number)
}

/// What the file of the segments `index`, `index` + the number of segments, and so on is called.
pub(super) fn path(directory: &Path, index: usize) -> PathBuf {
    directory.join(format!("log.{index}"))
}

/// The files of a log that have a header, in the order of their numbers.
pub(super) fn segments(directory: &Path) -> Result<Vec<(Header, File)>> {
    let mut segments = Vec::new();
    for index in 0..MAX_SEGMENTS {
        let path = path(directory, index);
        match File::open(&path) {
            Ok(file) => segments.extend(Header::read(&path, &file)?.map(|header| (header, file))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            Err(error) => return Err(Error::io("open the file", &path)(error)),
        }
    }
    segments.sort_by_key(|(header, _)| header.number);
    Ok(segments)
}

/// Leaves a log no more than `count` files, those of the highest numbers.
pub(super) fn shrink(directory: &Path, count: usize) -> Result<()> {
    let number = |index: usize| -> Result<Option<u64>> {
        let path = path(directory, index);
        match File::open(&path) {
            Ok(file) => Ok(Some(
                Header::read(&path, &file)?.map_or(0, |header| header.number),
            )),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("open the file", &path)(error)),
        }
    };
    // From the last on, so that there is no gap at any time.
    for index in (count..MAX_SEGMENTS).rev() {
        let Some(surplus) = number(index)? else {
            continue;
        };
        let mut oldest = (surplus, index);
        for index in 0..count {
            oldest = oldest.min((number(index)?.unwrap_or(0), index));
        }
        // The oldest of all is removed; another file takes its place.
        let (from, to) = (path(directory, index), path(directory, oldest.1));
        let removed = if oldest.1 == index {
            fs::remove_file(&from)
        } else {
            fs::rename(&from, &to)
        };
        removed.map_err(Error::io("remove the file", &from))?;
    }
    Ok(())
}
