//! The tar stream: headers with all their extensions as plain entries, and contents.
//!
//! `tar-core` parses; here are the buffer that it works on, the bounds, and what it leaves to
//! its callers: times to the nanosecond, and which entries have contents. Called by `Layer`.

use std::collections::BTreeMap;
use std::io::{self, Read};

use tar_core::EntryType;
use tar_core::PaxExtensions;
use tar_core::SparseEntry;
use tar_core::parse::{Limits, ParseEvent, ParsedEntry, Parser};

use crate::error::Error;
use crate::format::{Xattr, xattr_name};
use crate::record::Recorder;

/// Size of headers, and what contents are padded to, bytes.
const RECORD: usize = 512;

/// Most that headers of one entry may take, bytes: names, attributes, maps of sparse files.
const MAX_HEADERS: usize = 8 << 20;

/// Headers longer than this are read in steps that grow, bytes.
const LONG: usize = 16 << 10;

const LIMITS: Limits = Limits {
    max_metadata_size: 2 << 20,
    max_path_len: Some(4096),
    max_pending_entries: 16,
    max_sparse_entries: 100_000,
};

/// Seconds since 1970 and nanoseconds in the second.
pub(crate) type Time = (i64, u32);

/// One entry of the tar.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) kind: EntryType,
    pub(crate) path: Vec<u8>,
    /// Target of a link.
    pub(crate) link: Option<Vec<u8>>,
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) time: Time,
    /// Major and minor number.
    pub(crate) device: (u32, u32),
    pub(crate) xattrs: Vec<Xattr>,
    pub(crate) sparse: Option<Sparse>,
    size: u64,
}

impl Entry {
    /// Size of its contents in the tar, bytes. As in Go's reader, which made most layers, the
    /// size of an entry that can have none counts for nothing.
    pub(crate) fn content_size(&self) -> u64 {
        match self.kind {
            EntryType::Link
            | EntryType::Symlink
            | EntryType::Char
            | EntryType::Block
            | EntryType::Directory
            | EntryType::Fifo => 0,
            _ => self.size,
        }
    }
}

/// A sparse file.
#[derive(Debug)]
pub(crate) struct Sparse {
    /// Size of the whole file, bytes.
    pub(crate) size: u64,
    /// The parts that the tar has contents of; all else is zeros.
    pub(crate) parts: Vec<SparseEntry>,
}

impl Sparse {
    /// Whether the parts are in order, inside the file, and as long as what the tar has.
    pub(crate) fn is_sound(&self, stored: u64) -> bool {
        let mut end = 0;
        let mut total = 0_u64;
        for part in &self.parts {
            let Some(part_end) = part.offset.checked_add(part.length) else {
                return false;
            };
            if part.offset < end || part_end > self.size {
                return false;
            }
            end = part_end;
            total += part.length;
        }
        total == stored
    }
}

/// Reads entries and, after each, its contents.
pub(crate) struct Reader<'a, R> {
    input: R,
    record: Recorder<'a>,
    parser: Parser,
    /// What was read of the input, used up to `used`.
    buffer: Vec<u8>,
    used: usize,
}

impl<'a, R: Read> Reader<'a, R> {
    pub(crate) fn new(input: R, record: Recorder<'a>) -> Self {
        let mut parser = Parser::new(LIMITS);
        // Times before 1970 are errors to it; the numbers that matter are checked here.
        parser.set_ignore_pax_errors(true);
        Self {
            input,
            record,
            parser,
            buffer: Vec::new(),
            used: 0,
        }
    }

    /// The next entry, or `None` at the end. The contents of the one before must have been read.
    pub(crate) fn next_entry(&mut self) -> Result<Option<Entry>, Error> {
        loop {
            let wanted = match self
                .parser
                .parse(&self.buffer[self.used..])
                .map_err(malformed)?
            {
                ParseEvent::NeedData { min_bytes } => min_bytes.max(self.rest().len() + 1),
                ParseEvent::Entry { consumed, entry } => {
                    let entry = owned(&entry, None)?;
                    self.consume(consumed)?;
                    return Ok(Some(entry));
                }
                ParseEvent::SparseEntry {
                    consumed,
                    entry,
                    sparse_map,
                    real_size,
                } => {
                    let sparse = Sparse {
                        size: real_size,
                        parts: sparse_map,
                    };
                    let entry = owned(&entry, Some(sparse))?;
                    self.consume(consumed)?;
                    return Ok(Some(entry));
                }
                // Defaults for all entries; no tool that makes layers relies on them.
                ParseEvent::GlobalExtensions { consumed, .. } => {
                    self.consume(consumed)?;
                    continue;
                }
                ParseEvent::End { .. } => return Ok(None),
            };
            if !self.fill(wanted)? {
                // Some writers leave out the end marker, or half of it.
                let rest = self.rest();
                if rest.is_empty() || *rest == [0; RECORD] {
                    return Ok(None);
                }
                return Err(Error::Malformed("it ends within a header".to_owned()));
            }
        }
    }

    /// Reads until the buffer holds `wanted` bytes; `false` where the input ends before.
    fn fill(&mut self, wanted: usize) -> Result<bool, Error> {
        let wanted = wanted.next_multiple_of(RECORD);
        if wanted > MAX_HEADERS {
            return Err(Error::Malformed("an entry's headers do not end".to_owned()));
        }
        self.buffer.drain(..self.used);
        self.used = 0;
        // Long headers are read in growing steps, as each step parses them from their beginning.
        // What is too much is read as contents later.
        let goal = if wanted > LONG { 2 * wanted } else { wanted };
        let missing = (goal - self.buffer.len()) as u64;
        (&mut self.input)
            .take(missing)
            .read_to_end(&mut self.buffer)
            .map_err(Error::Read)?;
        Ok(self.buffer.len() >= wanted)
    }

    /// Uses `count` bytes of the buffer.
    fn consume(&mut self, count: usize) -> Result<(), Error> {
        let end = self.used + count;
        self.record.bytes(&self.buffer[self.used..end])?;
        self.used = end;
        Ok(())
    }

    /// Reads what is after the end marker, which belongs to the tar as well.
    pub(crate) fn finish(&mut self) -> Result<(), Error> {
        self.consume(self.buffer.len() - self.used)?;
        let mut padding = [0; 1 << 13];
        loop {
            match self.input.read(&mut padding).map_err(Error::Read)? {
                0 => return Ok(()),
                count => self.record.bytes(&padding[..count])?,
            }
        }
    }

    /// What was read and not used.
    fn rest(&self) -> &[u8] {
        &self.buffer[self.used..]
    }

    /// Fills `out` with contents of the current entry.
    pub(crate) fn read_content(&mut self, out: &mut [u8]) -> Result<(), Error> {
        self.read_next(out)?;
        self.record.bytes(out)
    }

    /// Fills `out` with contents of the current entry, which go to `at` in the blob.
    pub(crate) fn read_stored(&mut self, out: &mut [u8], at: u64) -> Result<(), Error> {
        self.read_next(out)?;
        self.record.stored(at, out.len() as u64)
    }

    fn read_next(&mut self, out: &mut [u8]) -> Result<(), Error> {
        let buffered = out.len().min(self.rest().len());
        let (first, rest) = out.split_at_mut(buffered);
        first.copy_from_slice(&self.rest()[..buffered]);
        self.used += buffered;
        self.input.read_exact(rest).map_err(|error| {
            if error.kind() == io::ErrorKind::UnexpectedEof {
                Error::Malformed("it ends within a file".to_owned())
            } else {
                Error::Read(error)
            }
        })
    }

    /// Skips the padding after contents of `size` bytes.
    pub(crate) fn end_content(&mut self, size: u64) -> Result<(), Error> {
        let padding = size.wrapping_neg() % RECORD as u64;
        self.read_content(&mut [0; RECORD][..padding as usize])
    }

    /// Skips contents of `size` bytes and their padding.
    pub(crate) fn skip_content(&mut self, size: u64) -> Result<(), Error> {
        let mut left = size;
        let mut waste = [0; 1 << 13];
        while left > 0 {
            let now = left.min(waste.len() as u64) as usize;
            self.read_content(&mut waste[..now])?;
            left -= now as u64;
        }
        self.end_content(size)
    }
}

fn malformed(error: impl std::fmt::Display) -> Error {
    Error::Malformed(error.to_string())
}

fn owned(entry: &ParsedEntry<'_>, sparse: Option<Sparse>) -> Result<Entry, Error> {
    let bad = |reason| Error::bad_entry(&entry.path, reason);
    let id = |id: u64| u32::try_from(id).map_err(|_| bad("its owner has no 32-bit number"));
    let mut time = (entry.mtime as i64, 0);
    for pair in PaxExtensions::new(entry.pax.unwrap_or_default()) {
        let pair = pair.map_err(malformed)?;
        match pair.key_bytes() {
            b"mtime" => {
                time = parse_time(pair.value_bytes()).ok_or_else(|| bad("its time is no time"))?;
            }
            b"size" | b"uid" | b"gid" => {
                let is_number = |text: &str| text.parse::<u64>().is_ok();
                if !pair.value().is_ok_and(is_number) {
                    return Err(bad("its size or owner is no number"));
                }
            }
            _ => {}
        }
    }
    // Before there were types for them, a slash at the end told directories.
    let is_old_directory = entry.entry_type == EntryType::Regular && entry.path.ends_with(b"/");
    Ok(Entry {
        kind: match entry.entry_type {
            _ if is_old_directory => EntryType::Directory,
            kind => kind,
        },
        path: entry.path.to_vec(),
        link: entry.link_target.as_deref().map(<[u8]>::to_vec),
        mode: entry.mode as u16,
        uid: id(entry.uid)?,
        gid: id(entry.gid)?,
        time,
        device: (entry.dev_major.unwrap_or(0), entry.dev_minor.unwrap_or(0)),
        xattrs: xattrs(entry).map_err(bad)?,
        sparse,
        size: entry.size,
    })
}

/// The attributes that EROFS can hold and a layer may set: those of overlayfs are ours.
fn xattrs(entry: &ParsedEntry<'_>) -> Result<Vec<Xattr>, &'static str> {
    let mut kept = BTreeMap::new();
    for (name, value) in &entry.xattrs {
        if xattr_name(name).is_none()
            || name.starts_with(b"trusted.overlay.")
            || name.starts_with(b"user.overlay.")
        {
            continue;
        }
        if value.len() > usize::from(u16::MAX) {
            return Err("an extended attribute is larger than 64 KiB");
        }
        // of several with one name the last counts
        kept.insert(Box::from(&**name), Box::from(&**value));
    }
    Ok(kept.into_iter().collect())
}

/// Reads a time as pax(1) writes it: seconds since 1970, with a sign and a fraction or without.
fn parse_time(text: &[u8]) -> Option<Time> {
    let text = str::from_utf8(text).ok()?;
    let (negative, text) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let are_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if !are_digits(whole) || !are_digits(fraction) {
        return None;
    }
    let seconds: i64 = whole.parse().ok()?;
    let digits = &fraction[..fraction.len().min(9)];
    let nanoseconds: u32 = format!("{digits:0<9}").parse().ok()?;
    Some(match (negative, nanoseconds) {
        (false, _) => (seconds, nanoseconds),
        (true, 0) => (-seconds, 0),
        (true, _) => (-seconds - 1, 1_000_000_000 - nanoseconds),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_signs_and_fractions() {
        assert_eq!(parse_time(b"1700000000"), Some((1_700_000_000, 0)));
        assert_eq!(parse_time(b"12.5"), Some((12, 500_000_000)));
        assert_eq!(parse_time(b"12.0000000019"), Some((12, 1)));
        assert_eq!(parse_time(b"-1.25"), Some((-2, 750_000_000)));
        assert_eq!(parse_time(b"-3"), Some((-3, 0)));
        for text in [&b""[..], b"x", b"1.x", b"--1", b"+1", b"1.-5", b"\xff"] {
            assert_eq!(parse_time(text), None);
        }
    }

    #[test]
    fn parts_of_a_sparse_file_are_in_order_and_inside_it() {
        let sparse = |parts: &[(u64, u64)]| Sparse {
            size: 100,
            parts: parts
                .iter()
                .map(|(offset, length)| SparseEntry {
                    offset: *offset,
                    length: *length,
                })
                .collect(),
        };
        assert!(sparse(&[(0, 10), (50, 50), (100, 0)]).is_sound(60));
        assert!(!sparse(&[(0, 10)]).is_sound(11));
        assert!(!sparse(&[(20, 10), (0, 10)]).is_sound(20));
        assert!(!sparse(&[(0, 10), (5, 10)]).is_sound(20));
        assert!(!sparse(&[(95, 10)]).is_sound(10));
        assert!(!sparse(&[(u64::MAX, 10)]).is_sound(10));
    }
}
