//! The ring against a model: what was printed, in segments that are vectors.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, UNIX_EPOCH};

use tempfile::TempDir;

use super::format::{self, HEADER, Header, Line, RECORD};
use super::{Entry, LogReader, LogSize, LogWriter, Record, Stream};
use crate::error::Error;

const STREAMS: [Stream; 3] = [Stream::Stdout, Stream::Stderr, Stream::Console];

/// Numbers that look random and are the same in every run (xorshift64).
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % end as u64) as usize
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        let length = self.below(most + 1);
        (0..length).map(|_| self.below(4) as u8 + b'\n').collect()
    }
}

/// What a log holds.
struct Model {
    size: LogSize,
    segments: Vec<Vec<Record>>,
}

impl Model {
    fn write(&mut self, record: Record) {
        let used = self.segments.last().map(|it| Self::bytes(it));
        let needed = (RECORD + record.bytes.len()) as u64;
        if used.is_none_or(|used| used + needed > self.size.bytes) {
            self.segments.push(Vec::new());
            if self.segments.len() > self.size.segments {
                self.segments.remove(0);
            }
        }
        self.segments.last_mut().unwrap().push(record);
    }

    fn bytes(segment: &[Record]) -> u64 {
        let records = segment.iter().map(|it| (RECORD + it.bytes.len()) as u64);
        HEADER + records.sum::<u64>()
    }

    /// Takes away what the last segment has from this byte on.
    fn cut(&mut self, at: u64) {
        let last = self.segments.last_mut().unwrap();
        while Self::bytes(last) > at {
            if last.pop().is_none() {
                self.segments.pop();
                return;
            }
        }
    }

    fn records(&self) -> Vec<Record> {
        self.segments.concat()
    }

    fn text(&self) -> Vec<u8> {
        let records = self.records().into_iter();
        records.flat_map(|record| record.bytes).collect()
    }
}

fn log(segments: usize, bytes: u64) -> (TempDir, LogSize, LogWriter) {
    let directory = TempDir::new().unwrap();
    let size = LogSize { segments, bytes };
    let writer = LogWriter::open_sized(directory.path(), size).unwrap();
    (directory, size, writer)
}

fn record(text: &str) -> Record {
    Record {
        stream: Stream::Stdout,
        time: 0,
        bytes: text.into(),
    }
}

fn write(writer: &mut LogWriter, text: &str) {
    writer.write_at(Stream::Stdout, 0, text.as_bytes()).unwrap();
}

/// Reads to the end. A log that nobody writes has no losses.
fn rest(reader: &mut LogReader) -> Vec<Record> {
    let mut records = Vec::new();
    while let Some(entry) = reader.read().unwrap() {
        match entry {
            Entry::Record(record) => records.push(record),
            Entry::Lost(bytes) => panic!("{bytes} bytes are lost"),
        }
    }
    records
}

fn text_of(reader: &mut LogReader) -> String {
    let records = rest(reader).into_iter();
    let bytes: Vec<u8> = records.flat_map(|record| record.bytes).collect();
    String::from_utf8(bytes).unwrap()
}

/// The file that is written, by the numbers in the headers.
fn newest(directory: &TempDir, size: LogSize) -> PathBuf {
    let paths = (0..size.segments).map(|index| format::path(directory.path(), index));
    let number = |path: &PathBuf| {
        let file = fs::File::open(path).unwrap();
        Header::read(path, &file).unwrap().map(|it| it.number)
    };
    paths.max_by_key(number).unwrap()
}

#[test]
fn a_log_holds_what_its_model_holds_whatever_is_done_to_it() {
    for seed in 1..60 {
        let mut random = Random(seed);
        let (segments, bytes) = (2 + random.below(3), 256 + random.below(600) as u64);
        let (directory, size, mut writer) = log(segments, bytes);
        let mut model = Model {
            size,
            segments: vec![Vec::new()],
        };
        let mut follower = Follower::new(&directory);
        for step in 0..400 {
            match random.below(40) {
                0 => writer = LogWriter::open_sized(directory.path(), size).unwrap(),
                1 => {
                    let path = newest(&directory, size);
                    let file = OpenOptions::new().write(true).open(&path).unwrap();
                    let end = Model::bytes(model.segments.last().unwrap());
                    let at = random.below(end as usize) as u64;
                    if random.below(2) == 0 {
                        file.set_len(at).unwrap();
                        model.cut(at);
                    } else {
                        // the last bytes of a header mean nothing
                        let at = if (44..48).contains(&at) { 43 } else { at };
                        let old = fs::read(&path).unwrap()[at as usize];
                        file.write_all_at(&[old ^ 0x40], at).unwrap();
                        model.cut(at);
                    }
                    writer = LogWriter::open_sized(directory.path(), size).unwrap();
                    if model.segments.is_empty() {
                        model.segments.push(Vec::new());
                    }
                    follower = Follower::new(&directory);
                }
                2 => follower.catch_up(&model),
                _ => {
                    let record = Record {
                        stream: STREAMS[random.below(3)],
                        time: step,
                        bytes: random.bytes(100),
                    };
                    writer
                        .write_at(record.stream, record.time, &record.bytes)
                        .unwrap();
                    if !record.bytes.is_empty() {
                        follower.write(record.clone());
                        model.write(record);
                    }
                }
            }
            if step % 16 == 0 {
                let records = rest(&mut LogReader::open(directory.path()));
                assert_eq!(records, model.records(), "seed {seed}, step {step}");
            }
        }
        for path in fs::read_dir(directory.path()).unwrap() {
            assert!(path.unwrap().metadata().unwrap().len() <= bytes);
        }
    }
}

/// A reader that goes on while the log is written, and what has been written since it began.
struct Follower {
    reader: LogReader,
    /// Each with how much was printed before it, bytes.
    history: Vec<(u64, Record)>,
    /// How much was printed, and how much of that it has read or missed, bytes.
    printed: u64,
    seen: u64,
}

impl Follower {
    fn new(directory: &TempDir) -> Self {
        let mut reader = LogReader::open(directory.path());
        rest(&mut reader);
        Self {
            reader,
            history: Vec::new(),
            printed: 0,
            seen: 0,
        }
    }

    fn write(&mut self, record: Record) {
        let before = self.printed;
        self.printed += record.bytes.len() as u64;
        self.history.push((before, record));
    }

    /// Reads to the end: records in order, each once, and at most one loss, behind which comes
    /// all that the log still holds. Old records may come before it that are not overwritten yet.
    fn catch_up(&mut self, model: &Model) {
        let mut losses = 0;
        while let Some(entry) = self.reader.read().unwrap() {
            match entry {
                Entry::Record(record) => {
                    let find = self.history.binary_search_by_key(&self.seen, |it| it.0);
                    assert_eq!(record, self.history[find.unwrap()].1);
                    self.seen += record.bytes.len() as u64;
                }
                Entry::Lost(bytes) => {
                    losses += 1;
                    self.seen += bytes;
                    assert_eq!(self.printed - self.seen, model.text().len() as u64);
                }
            }
        }
        assert!(losses <= 1);
        assert_eq!(self.seen, self.printed);
    }
}

#[test]
fn the_tail_is_the_last_lines_of_the_text() {
    for seed in 1..40 {
        let mut random = Random(seed);
        let (directory, size, mut writer) = log(3, 512);
        let mut model = Model {
            size,
            segments: vec![Vec::new()],
        };
        for _ in 0..random.below(60) {
            let bytes = random.bytes(40);
            writer.write_at(Stream::Console, 0, &bytes).unwrap();
            if !bytes.is_empty() {
                let stream = Stream::Console;
                model.write(Record {
                    stream,
                    time: 0,
                    bytes,
                });
            }
        }
        let text = model.text();
        let lines: Vec<&[u8]> = text.split_inclusive(|byte| *byte == b'\n').collect();
        for wanted in 0..lines.len() + 3 {
            let mut reader = LogReader::open(directory.path());
            reader.tail(wanted).unwrap();
            let expected = lines[lines.len().saturating_sub(wanted)..].concat();
            let read = rest(&mut reader).into_iter();
            let read: Vec<u8> = read.flat_map(|record| record.bytes).collect();
            assert_eq!(read, expected, "seed {seed}, {wanted} lines");
            writer.write_at(Stream::Stdout, 0, b"").unwrap();
        }
    }
}

#[test]
fn after_the_tail_comes_what_is_written_next() {
    for lines in [0, 1, 5] {
        let (directory, _, mut writer) = log(2, 4096);
        write(&mut writer, "one\ntwo\nthr");
        let mut reader = LogReader::open(directory.path());

        reader.tail(lines).unwrap();
        let before = text_of(&mut reader);
        write(&mut writer, "ee\n");

        assert_eq!(
            before,
            ["", "thr", "one\ntwo\nthr"][if lines > 1 { 2 } else { lines }]
        );
        assert_eq!(text_of(&mut reader), "ee\n");
    }
}

#[test]
fn a_tail_that_is_overwritten_before_it_is_read_counts_as_lost() {
    let (directory, _, mut writer) = log(2, 256);
    write(&mut writer, "one\ntwo\n");
    let mut reader = LogReader::open(directory.path());
    reader.tail(1).unwrap();

    for _ in 0..3 {
        write(&mut writer, &"x".repeat(150));
    }

    // the whole record counts, though half of it was not asked for
    assert_eq!(reader.read().unwrap(), Some(Entry::Lost(8 + 150)));
    assert_eq!(text_of(&mut reader), "x".repeat(300));
}

#[test]
fn what_was_printed_before_a_time_is_left_out_of_the_log_and_of_its_tail() {
    let (directory, _, mut writer) = log(2, 4096);
    for (time, text) in [(5, "a\n"), (10, "b\n"), (7, "c\n"), (12, "d\n")] {
        writer
            .write_at(Stream::Stderr, time, text.as_bytes())
            .unwrap();
    }
    let since = |time| {
        let mut reader = LogReader::open(directory.path());
        reader.since(UNIX_EPOCH + Duration::from_nanos(time));
        reader
    };

    assert_eq!(text_of(&mut since(0)), "a\nb\nc\nd\n");
    assert_eq!(text_of(&mut since(8)), "b\nd\n");
    assert_eq!(text_of(&mut since(13)), "");
    let mut reader = since(8);
    reader.tail(5).unwrap();
    assert_eq!(text_of(&mut reader), "b\nd\n");
}

#[test]
fn much_that_is_printed_at_once_becomes_several_records() {
    let (directory, _, mut writer) = log(2, 1 << 20);
    let text: String = "0123456789abcde\n".repeat(10_000);

    write(&mut writer, &text);

    let records = rest(&mut LogReader::open(directory.path()));
    assert_eq!(records.len(), 3);
    let lengths = records.iter().map(|record| record.bytes.len());
    assert!(lengths.max().unwrap() <= 64 << 10);
    assert_eq!(text_of(&mut LogReader::open(directory.path())), text);
}

#[test]
fn a_record_is_never_larger_than_a_segment() {
    let (directory, _, mut writer) = log(2, 256);

    write(&mut writer, &"x".repeat(370));

    let text = text_of(&mut LogReader::open(directory.path()));
    assert_eq!(text, "x".repeat(370));
}

#[test]
fn a_log_that_is_not_there_yet_can_be_followed() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("log");
    let mut reader = LogReader::open(&path);
    assert_eq!(reader.follow(Duration::from_millis(1)).unwrap(), None);

    let mut writer = LogWriter::open(&path).unwrap();
    write(&mut writer, "first");

    let entry = reader.follow(Duration::from_secs(10)).unwrap();
    assert_eq!(entry, Some(Entry::Record(record("first"))));
}

#[test]
fn bytes_of_an_old_segment_are_no_records_even_if_they_look_like_some() {
    for is_known in [false, true] {
        let (directory, _, mut writer) = log(2, 512);
        let first = format::segments(directory.path()).unwrap()[0].0;
        // A guest prints what would be a record right behind one of 20 bytes.
        let mut printed = Vec::new();
        let line = Line {
            stream: Stream::Stdout,
            time: 0,
        };
        let salt = if is_known { first.salt } else { 0 };
        line.encode(salt, b"forged", &mut printed);
        printed.splice(0..0, [b'x'; 20]);
        writer.write_at(Stream::Stdout, 0, &printed).unwrap();
        write(&mut writer, &"x".repeat(420));

        write(&mut writer, &"y".repeat(20));

        let mut reader = LogReader::open(directory.path());
        let lengths: Vec<usize> = rest(&mut reader).iter().map(|it| it.bytes.len()).collect();
        assert_eq!(lengths, [420, 20]);
        drop(writer);
        LogWriter::open(directory.path()).unwrap();
        assert_eq!(rest(&mut LogReader::open(directory.path())).len(), 2);
    }
}

#[test]
fn a_record_behind_the_one_that_was_cut_does_not_come_back() {
    let (directory, size, mut writer) = log(2, 4096);
    for text in ["one", "two", "six"] {
        write(&mut writer, text);
    }
    let file = OpenOptions::new()
        .write(true)
        .open(newest(&directory, size))
        .unwrap();
    let second = HEADER + RECORD as u64 + 3;
    file.write_all_at(&[0; RECORD], second).unwrap();

    let mut writer = LogWriter::open_sized(directory.path(), size).unwrap();
    write(&mut writer, "new");

    assert_eq!(text_of(&mut LogReader::open(directory.path())), "onenew");
}

#[test]
fn a_damaged_segment_that_was_complete_is_lost_from_the_damage_on() {
    let (directory, _, mut writer) = log(2, 256);
    let damaged = format::path(directory.path(), 0);
    for _ in 0..4 {
        write(&mut writer, &"x".repeat(80));
    }
    let file = OpenOptions::new().write(true).open(damaged).unwrap();
    file.write_all_at(b"y", HEADER + (RECORD + 80 + RECORD) as u64)
        .unwrap();

    let mut reader = LogReader::open(directory.path());
    let entries: Vec<Entry> = std::iter::from_fn(|| reader.read().unwrap()).collect();

    assert_eq!(entries[1], Entry::Lost(80));
    assert_eq!(entries.len(), 4);
}

#[test]
fn a_log_may_be_opened_with_another_size() {
    let (directory, _, mut writer) = log(3, 256);
    for text in ["1", "2", "3", "4"] {
        write(&mut writer, &text.repeat(150));
    }
    drop(writer);

    for (segments, bytes, text) in [(5, 512, "a"), (2, 300, "b"), (0, 0, "c"), (3, 4096, "d")] {
        let size = LogSize { segments, bytes };
        let mut writer = LogWriter::open_sized(directory.path(), size).unwrap();
        write(&mut writer, text);
        let mut reader = LogReader::open(directory.path());
        let mut read = String::new();
        while let Some(entry) = reader.read().unwrap() {
            if let Entry::Record(record) = entry {
                read.push_str(str::from_utf8(&record.bytes).unwrap());
            }
        }
        assert!(read.ends_with(text), "{read}");
        let files = fs::read_dir(directory.path()).unwrap().count();
        assert_eq!(files, segments.max(2));
    }
}

#[test]
fn a_log_with_fewer_segments_keeps_the_newest() {
    let long = |number: i32| format!("{number:0>150} ");
    for written in 1..12 {
        let (directory, _, mut writer) = log(5, 256);
        for number in 0..written {
            write(&mut writer, &long(number));
        }
        let mut follower = LogReader::open(directory.path());
        while follower.read().unwrap().is_some() {}
        let size = LogSize {
            segments: 2,
            bytes: 256,
        };

        let mut writer = LogWriter::open_sized(directory.path(), size).unwrap();

        let text = text_of(&mut LogReader::open(directory.path()));
        let kept: Vec<String> = (0.max(written - 2)..written).map(long).collect();
        assert_eq!(text, kept.concat());
        write(&mut writer, "next");
        assert_eq!(text_of(&mut follower), "next");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
    }
}

#[test]
fn a_log_of_a_newer_version_is_an_error() {
    let (directory, size, writer) = log(2, 256);
    drop(writer);
    let path = format::path(directory.path(), 0);
    let mut header = Header {
        number: 1,
        before: 0,
        salt: 0,
    }
    .to_bytes();
    header[8] = 2;
    let checksum = crc::Crc::<u32>::new(&crc::CRC_32_ISCSI).checksum(&header[..40]);
    header[40..44].copy_from_slice(&checksum.to_le_bytes());
    fs::write(&path, header).unwrap();

    let read = LogReader::open(directory.path()).read();
    let written = LogWriter::open_sized(directory.path(), size);

    assert!(matches!(read, Err(Error::Newer { version: 2, .. })));
    assert!(matches!(written, Err(Error::Newer { version: 2, .. })));
}

#[test]
fn files_that_are_anything_at_all_are_read_to_an_end() {
    for seed in 1..200 {
        let mut random = Random(seed);
        let (directory, size, mut writer) = log(2, 512);
        let header = Header {
            number: [1, 7, u64::MAX][random.below(3)],
            before: [0, 99, u64::MAX][random.below(3)],
            salt: 5,
        };
        let mut content = header.to_bytes().to_vec();
        let mut buffer = Vec::new();
        for _ in 0..random.below(10) {
            let line = Line {
                stream: Stream::Stderr,
                time: u64::MAX,
            };
            line.encode(5, &[b'\n'; 8], &mut buffer);
            if random.below(4) == 0 {
                let at = random.below(buffer.len());
                buffer[at] = [0, 0xff, 0x80][random.below(3)];
            }
            content.extend_from_slice(&buffer);
        }
        fs::write(format::path(directory.path(), random.below(2)), content).unwrap();
        write(&mut writer, "of a writer that did not look");

        let mut reader = LogReader::open(directory.path());
        let entries = std::iter::from_fn(|| reader.read().unwrap());
        assert!(entries.count() <= 20);
        LogReader::open(directory.path()).tail(3).unwrap();
        let mut writer = LogWriter::open_sized(directory.path(), size).unwrap();
        for _ in 0..20 {
            write(&mut writer, "and of one that did, some more lines of text");
        }
    }
}

#[test]
fn a_log_that_cannot_be_written_is_an_error_with_its_path() {
    let directory = TempDir::new().unwrap();
    fs::create_dir(format::path(directory.path(), 1)).unwrap();

    let error = LogWriter::open(directory.path()).unwrap_err();

    assert!(error.to_string().contains("log.1"), "{error}");
}
