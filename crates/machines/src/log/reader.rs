//! The end of a log that others have.

use std::collections::VecDeque;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::bell::Bell;
use super::format::{self, HEADER, Header, Line, RECORD, Stream};
use crate::error::{Error, Result};

/// Reads the log of a machine, which may be written meanwhile by another process.
///
/// ```text
///   open ──► since(time) ──► tail(lines) ──► next ... None: all that is there ──► follow ...
/// ```
#[derive(Debug)]
pub struct LogReader {
    directory: PathBuf,
    /// The segment that is read; `None` before the first.
    segment: Option<(Header, File)>,
    /// Where the next record is, bytes.
    offset: u64,
    /// How much was printed before that, bytes.
    printed: u64,
    /// Bytes of the next record that are not wanted.
    skip: usize,
    /// Records before it are not wanted: ns since 1970.
    since: u64,
    buffer: Vec<u8>,
    bell: Bell,
}

/// What was printed at once, and kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Where.
    pub stream: Stream,
    /// When, in ns since 1970.
    pub time: u64,
    /// What; not empty, and not always a whole line.
    pub bytes: Vec<u8>,
}

/// What comes next in a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// Something that was printed.
    Record(Record),
    /// So many bytes that were printed next are not there any more: they have been overwritten
    /// before they were read, or a power failure took them.
    Lost(u64),
}

/// Where a record is, for [`LogReader::tail`].
struct Mark {
    segment: Header,
    offset: u64,
    printed: u64,
    /// Ends of lines in it.
    ends: usize,
}

impl LogReader {
    /// Reads the log in this directory from its beginning. It need not be there yet.
    pub fn open(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
            segment: None,
            offset: HEADER,
            printed: 0,
            skip: 0,
            since: 0,
            buffer: Vec::new(),
            bell: Bell::default(),
        }
    }

    /// Leaves out what was printed before `time`.
    pub fn since(&mut self, time: SystemTime) {
        let time = time.duration_since(UNIX_EPOCH);
        self.since = time.map_or(0, |time| time.as_nanos() as u64);
    }

    /// Goes to where the last `lines` lines begin of all that is there. They are counted in the
    /// order in which they were printed, whichever stream that was; a last one without its end
    /// counts.
    pub fn tail(&mut self, lines: usize) -> Result<()> {
        let mut marks: VecDeque<Mark> = VecDeque::new();
        let (mut ends, mut is_ended) = (0, true);
        while let Some(entry) = self.read()? {
            let (Entry::Record(record), Some((segment, _))) = (entry, &self.segment) else {
                continue;
            };
            let length = record.bytes.len();
            marks.push_back(Mark {
                segment: *segment,
                offset: self.offset - (RECORD + length) as u64,
                printed: self.printed.saturating_sub(length as u64),
                ends: count_ends(&record.bytes),
            });
            ends += count_ends(&record.bytes);
            is_ended = record.bytes.ends_with(b"\n");
            // The first line that is wanted begins behind the end of another.
            while let Some(first) = marks.front()
                && ends - first.ends > lines
            {
                ends -= first.ends;
                marks.pop_front();
            }
        }
        if lines == 0 {
            return Ok(());
        }
        let mut left_out = (ends + usize::from(!is_ended)).saturating_sub(lines);
        for mark in marks {
            if left_out <= mark.ends {
                return self.go_to(&mark, left_out);
            }
            left_out -= mark.ends;
        }
        Ok(())
    }

    /// What comes next; `None` if that has not been written yet, so it may come later.
    pub fn read(&mut self) -> Result<Option<Entry>> {
        loop {
            if let Some(record) = self.record()? {
                if self.is_wanted(&record) {
                    return Ok(Some(Entry::Record(record)));
                }
                continue;
            }
            let Some(next) = self.next_segment()? else {
                return Ok(None);
            };
            // Now this segment is complete, which it may not have been above.
            if let Some(record) = self.record()? {
                if self.is_wanted(&record) {
                    return Ok(Some(Entry::Record(record)));
                }
                continue;
            }
            let lost = match self.segment {
                Some(_) => next.0.before.saturating_sub(self.printed),
                None => 0,
            };
            self.printed = next.0.before;
            self.offset = HEADER;
            self.skip = 0;
            self.segment = Some(next);
            if lost > 0 {
                return Ok(Some(Entry::Lost(lost)));
            }
        }
    }

    /// The same, but waits until something is written, no longer than `timeout`.
    pub fn follow(&mut self, timeout: Duration) -> Result<Option<Entry>> {
        let begin = Instant::now();
        loop {
            if let Some(entry) = self.read()? {
                return Ok(Some(entry));
            }
            let left = timeout.saturating_sub(begin.elapsed());
            if left.is_zero() {
                return Ok(None);
            }
            self.bell.wait(&self.directory, left);
        }
    }

    /// The oldest segment after this one.
    fn next_segment(&self) -> Result<Option<(Header, File)>> {
        let number = self.segment.as_ref().map(|(header, _)| header.number);
        let after = number.unwrap_or(0);
        let look = || -> Result<_> {
            let mut segments = format::segments(&self.directory)?.into_iter();
            Ok(segments.find(|(header, _)| header.number > after))
        };
        let next = look()?;
        let is_gap = |(header, _): &(Header, File)| header.number - after > 1;
        if number.is_some() && next.as_ref().is_some_and(is_gap) {
            // One between may have been begun after its file was looked at.
            return look();
        }
        Ok(next)
    }

    /// The record that is next in this segment.
    fn record(&mut self) -> Result<Option<Record>> {
        let Some((header, file)) = &self.segment else {
            return Ok(None);
        };
        let line = Line::read_at(file, self.offset, header.salt, &mut self.buffer)
            .map_err(Error::io("read the log in", &self.directory))?;
        let Some(Line { stream, time }) = line else {
            return Ok(None);
        };
        let bytes = &self.buffer[RECORD..];
        self.offset += self.buffer.len() as u64;
        self.printed = self.printed.saturating_add(bytes.len() as u64);
        let skip = std::mem::take(&mut self.skip);
        let bytes = bytes.get(skip..).unwrap_or_default().to_vec();
        Ok(Some(Record {
            stream,
            time,
            bytes,
        }))
    }

    fn is_wanted(&self, record: &Record) -> bool {
        record.time >= self.since && !record.bytes.is_empty()
    }

    /// Goes into the marked record, behind so many ends of lines. If it has been overwritten
    /// meanwhile, reading on will tell.
    fn go_to(&mut self, mark: &Mark, ends: usize) -> Result<()> {
        let segments = format::segments(&self.directory)?;
        let found = segments.into_iter().find(|(it, _)| *it == mark.segment);
        match (&mut self.segment, found) {
            (current, Some(found)) => *current = Some(found),
            (Some((header, _)), None) => *header = mark.segment,
            (None, None) => {}
        }
        (self.offset, self.printed) = (mark.offset, mark.printed);
        let record = self.record()?;
        (self.offset, self.printed) = (mark.offset, mark.printed);
        if let Some(record) = record
            && let Some(last) = ends.checked_sub(1)
        {
            let bytes = record.bytes.iter().enumerate();
            let mut ends = bytes.filter(|(_, byte)| **byte == b'\n');
            self.skip = ends.nth(last).map_or(0, |(at, _)| at + 1);
        }
        Ok(())
    }
}

fn count_ends(bytes: &[u8]) -> usize {
    bytes.split(|byte| *byte == b'\n').count() - 1
}
