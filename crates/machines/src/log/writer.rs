//! The end of a log that a machine's process has.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::format::{self, HEADER, Header, Line, MAX_BYTES, MAX_SEGMENTS, RECORD, Stream};
use crate::error::{Error, Result};
use crate::{files, name};

/// Fewest segments: one to write, one that is complete.
const MIN_SEGMENTS: usize = 2;
/// Smallest segment, bytes: a few short lines.
const MIN_BYTES: u64 = 256;

/// How much a log keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogSize {
    /// Files that are used in turn, 2 to 64. All but one are always kept.
    pub segments: usize,
    /// Size of each, bytes, at least 256.
    pub bytes: u64,
}

impl Default for LogSize {
    /// Two of 8 MiB.
    fn default() -> Self {
        Self {
            segments: 2,
            bytes: 8 << 20,
        }
    }
}

/// Writes the log of a machine. There is to be one at a time: whoever holds the machine's claim.
#[derive(Debug)]
pub struct LogWriter {
    segments: Vec<Segment>,
    size: LogSize,
    /// Index of the segment that is written.
    current: usize,
    header: Header,
    /// Where the next record goes, bytes.
    offset: u64,
    /// How much was printed so far, bytes.
    printed: u64,
    buffer: Vec<u8>,
}

#[derive(Debug)]
struct Segment {
    path: PathBuf,
    file: File,
    /// Number of the segment in the file, 0 if there is none.
    number: u64,
}

impl LogWriter {
    /// Opens the log in this directory, or begins one, of the default size.
    pub fn open(directory: &Path) -> Result<Self> {
        Self::open_sized(directory, LogSize::default())
    }

    /// The same of another size; one that is out of range is taken as the nearest that is not.
    ///
    /// A record that was being written when the host went down is cut off, and all after it.
    /// After this, no file is opened, renamed, removed or truncated.
    pub fn open_sized(directory: &Path, size: LogSize) -> Result<Self> {
        let size = LogSize {
            segments: size.segments.clamp(MIN_SEGMENTS, MAX_SEGMENTS),
            bytes: size.bytes.max(MIN_BYTES),
        };
        files::create_directory(directory)?;
        format::shrink(directory, size.segments)?;
        let mut segments = Vec::new();
        let mut newest: Option<(usize, Header)> = None;
        for index in 0..size.segments {
            let path = format::path(directory, index);
            let file = files::open_or_create(&path)?;
            let header = Header::read(&path, &file)?;
            if let Some(header) = header
                && newest.is_none_or(|(_, newest)| newest.number < header.number)
            {
                newest = Some((index, header));
            }
            segments.push(Segment {
                path,
                file,
                number: header.map_or(0, |header| header.number),
            });
        }
        let (current, header) = newest.unwrap_or((
            0,
            Header {
                number: 0,
                before: 0,
                salt: 0,
            },
        ));
        let mut writer = Self {
            segments,
            size,
            current,
            header,
            offset: HEADER,
            printed: 0,
            buffer: Vec::new(),
        };
        match newest {
            Some(_) => writer.recover()?,
            None => writer.rotate()?,
        }
        Ok(writer)
    }

    /// Keeps what was printed, with the time of now. It is there for readers when this returns,
    /// and on the disk when the kernel thinks fit. More than 64 KiB become several records. After
    /// an error, such as a full disk, the rest of `bytes` is lost and the log is as it was.
    pub fn write(&mut self, stream: Stream, bytes: &[u8]) -> Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |time| time.as_nanos() as u64);
        self.write_at(stream, now, bytes)
    }

    pub(super) fn write_at(&mut self, stream: Stream, time: u64, bytes: &[u8]) -> Result<()> {
        let room = self.size.bytes - HEADER - RECORD as u64;
        let most = MAX_BYTES.min(usize::try_from(room).unwrap_or(MAX_BYTES));
        for bytes in bytes.chunks(most) {
            if self.offset + (RECORD + bytes.len()) as u64 > self.size.bytes {
                self.rotate()?;
            }
            Line { stream, time }.encode(self.header.salt, bytes, &mut self.buffer);
            let Segment { path, file, .. } = &self.segments[self.current];
            file.write_all_at(&self.buffer, self.offset)
                .map_err(Error::io("write the file", path))?;
            self.offset += self.buffer.len() as u64;
            self.printed = self.printed.saturating_add(bytes.len() as u64);
        }
        Ok(())
    }

    /// Finds the end of the segment that was written last, and cuts off what is behind it.
    fn recover(&mut self) -> Result<()> {
        let Segment { path, file, .. } = &self.segments[self.current];
        let salt = self.header.salt;
        self.printed = self.header.before;
        while let Some(_line) = Line::read_at(file, self.offset, salt, &mut self.buffer)
            .map_err(Error::io("read the file", path))?
        {
            self.offset += self.buffer.len() as u64;
            let bytes = self.buffer.len() - RECORD;
            self.printed = self.printed.saturating_add(bytes as u64);
        }
        // A record behind the end that is whole would count again once the gap is filled.
        file.set_len(self.offset)
            .map_err(Error::io("truncate the file", path))
    }

    /// Begins the next segment, in the place of the oldest.
    fn rotate(&mut self) -> Result<()> {
        let oldest = (0..self.segments.len()).min_by_key(|index| self.segments[*index].number);
        self.current = oldest.unwrap_or(0);
        self.header = Header {
            number: self.header.number.saturating_add(1),
            before: self.printed,
            salt: u64::from_le_bytes(name::random()),
        };
        let segment = &mut self.segments[self.current];
        segment
            .file
            .write_all_at(&self.header.to_bytes(), 0)
            .map_err(Error::io("write the file", &segment.path))?;
        segment.number = self.header.number;
        self.offset = HEADER;
        Ok(())
    }
}
