//! VHDX images that were not closed: the changes in their logs are seen, as `qemu-img` sees them when
//! it has written them to their places.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{file, new_file};
use crc::{CRC_32_ISCSI, Crc};
use strata_disk::{Buffers, Format, Raw, export, open};
use tempfile::TempDir;

const MEBI: usize = 1 << 20;
const SECTOR: usize = 4096;
const GUID: [u8; 16] = *b"the log's number";
/// Where this crate puts the log, the block table and the first block.
const LOG: usize = MEBI;
const TABLE: usize = 3 * MEBI;
const BLOCK: usize = 4 * MEBI;
/// Bytes of the first block that are zeroes on the disk.
const ZEROES: std::ops::Range<usize> = 0x8_0000..0x9_0000;

fn seal(bytes: &mut [u8]) {
    bytes[4..8].fill(0);
    let sum = Crc::<u32>::new(&CRC_32_ISCSI).checksum(bytes);
    bytes[4..8].copy_from_slice(&sum.to_le_bytes());
}

/// A log entry, [MS-VHDX] 2.3.1: zeroes at these places of the file, and these sectors at others.
fn entry(
    sequence: u64,
    tail: usize,
    zeroes: &[(usize, usize)],
    sectors: &[(usize, &[u8])],
) -> Vec<u8> {
    let mut bytes = vec![0; SECTOR * (1 + sectors.len())];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, b"loge");
    put(8, &((SECTOR * (1 + sectors.len())) as u32).to_le_bytes());
    put(12, &(tail as u32).to_le_bytes());
    put(16, &sequence.to_le_bytes());
    put(24, &((zeroes.len() + sectors.len()) as u32).to_le_bytes());
    put(32, &GUID);
    put(48, &(BLOCK as u64).to_le_bytes());
    put(56, &(BLOCK as u64).to_le_bytes());
    let mut at = 64;
    for (offset, length) in zeroes {
        put(at, b"zero");
        put(at + 8, &(*length as u64).to_le_bytes());
        put(at + 16, &(*offset as u64).to_le_bytes());
        put(at + 24, &sequence.to_le_bytes());
        at += 32;
    }
    for (number, (offset, data)) in sectors.iter().enumerate() {
        put(at, b"desc");
        put(at + 4, &data[SECTOR - 4..]);
        put(at + 8, &data[..8]);
        put(at + 16, &(*offset as u64).to_le_bytes());
        put(at + 24, &sequence.to_le_bytes());
        at += 32;
        let place = SECTOR * (1 + number);
        put(place, data);
        put(place, b"data");
        put(place + 4, &((sequence >> 32) as u32).to_le_bytes());
        put(place + SECTOR - 4, &(sequence as u32).to_le_bytes());
    }
    seal(&mut bytes);
    bytes
}

/// An image of a disk, as it is when all changes are in their places.
struct Image {
    folder: TempDir,
    disk: Vec<u8>,
    whole: Vec<u8>,
}

impl Image {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let mut disk: Vec<u8> = (0..2 * MEBI).map(|at| (at / 1000) as u8 | 1).collect();
        disk[ZEROES].fill(0);
        let raw = folder.path().join("disk.raw");
        fs::write(&raw, &disk).unwrap();
        let raw = Raw::open(file(&raw, false), false).unwrap();
        let path = folder.path().join("whole.vhdx");
        export(&raw, &new_file(&path), Format::Vhdx, &|_| {}).unwrap();
        let whole = fs::read(path).unwrap();
        Self {
            folder,
            disk,
            whole,
        }
    }

    fn table(&self) -> &[u8] {
        &self.whole[TABLE..TABLE + SECTOR]
    }

    /// The image as it is when none of the changes has come to its place, with log entries at these
    /// places of the log.
    fn unclosed(&self, entries: &[(usize, Vec<u8>)]) -> PathBuf {
        let mut bytes = self.whole.clone();
        bytes[TABLE..TABLE + SECTOR].fill(0);
        bytes[BLOCK..][ZEROES].fill(0xee);
        for (at, entry) in entries {
            for (number, byte) in entry.iter().enumerate() {
                bytes[LOG + (at + number) % MEBI] = *byte;
            }
        }
        let header = &mut bytes[128 << 10..][..SECTOR];
        header[48..64].copy_from_slice(&GUID);
        seal(header);
        let path = self.folder.path().join("unclosed.vhdx");
        fs::write(&path, bytes).unwrap();
        path
    }

    /// The disk is as it should be.
    fn see(&self, path: &Path) {
        let disk = open(path, None, false).unwrap();
        let mut bytes = vec![0x55; self.disk.len()];
        disk.read(0, Buffers::from(&mut bytes[..])).unwrap();
        assert!(bytes == self.disk);
    }

    /// And also after QEMU has replayed the log.
    fn check(&self, path: &Path) {
        self.see(path);
        let qemu = |arguments: &[&str]| {
            let output = Command::new("qemu-img").args(arguments).output().unwrap();
            assert!(output.status.success(), "{arguments:?}: {output:?}");
        };
        let raw = self.folder.path().join("disk.raw");
        let [path, raw] = [path, &raw].map(|path| path.to_str().unwrap());
        qemu(&["check", "-q", "-r", "all", path]);
        qemu(&["compare", "-q", "-f", "vhdx", "-F", "raw", path, raw]);
    }
}

const ZEROED: (usize, usize) = (BLOCK + ZEROES.start, ZEROES.end - ZEROES.start);

#[test]
fn changes_in_the_log_are_seen() {
    let image = Image::new();
    let entry = entry(7, 0, &[ZEROED], &[(TABLE, image.table())]);
    image.check(&image.unclosed(&[(0, entry)]));
}

#[test]
fn entries_are_replayed_in_order_and_older_ones_are_not() {
    let image = Image::new();
    let wrong = [0xff; SECTOR];
    let first = entry(41, 0, &[ZEROED], &[(TABLE, &wrong)]);
    let second = entry(42, 0, &[], &[(TABLE, image.table())]);
    let old = entry(3, 0x8000, &[], &[(TABLE, &wrong)]);
    let entries = [(0, first), (2 * SECTOR, second), (0x8000, old)];
    image.check(&image.unclosed(&entries));
}

#[test]
fn entries_go_on_at_the_logs_begin() {
    let image = Image::new();
    let start = MEBI - SECTOR;
    let first = entry(41, start, &[ZEROED], &[(TABLE, &[0xff; SECTOR])]);
    let second = entry(42, start, &[], &[(TABLE, image.table())]);
    // QEMU 7.2 follows an entry over the end, but not to the one behind it
    image.see(&image.unclosed(&[(start, first), (SECTOR, second)]));

    let alone = entry(41, start, &[ZEROED], &[(TABLE, image.table())]);
    image.check(&image.unclosed(&[(start, alone)]));
}

#[test]
fn an_entry_that_was_not_written_to_its_end_does_not_count() {
    let image = Image::new();
    let first = entry(1, 0, &[ZEROED], &[(TABLE, image.table())]);
    let mut second = entry(2, 0, &[], &[(TABLE, &[0xff; SECTOR])]);
    second[SECTOR + 100] ^= 1;
    let path = image.unclosed(&[(0, first), (2 * SECTOR, second)]);
    image.check(&path);
}

#[test]
fn a_log_without_a_whole_entry_is_refused_and_nothing_panics() {
    let image = Image::new();
    let whole = entry(7, 0, &[ZEROED], &[(TABLE, image.table())]);
    let refused = |entry: Vec<u8>| {
        let path = image.unclosed(&[(0, entry)]);
        assert!(open(&path, None, false).is_err());
    };
    refused(Vec::new());
    let mut torn = whole.clone();
    torn[SECTOR + 9] ^= 1;
    refused(torn);
    // tail, descriptors, a descriptor's number and place, a sector's number
    for (at, value) in [
        (13, 0x10),
        (25, 0xff),
        (64 + 24, 1),
        (64 + 17, 1),
        (SECTOR + 4, 1),
    ] {
        let mut wrong = whole.clone();
        wrong[at] ^= value;
        seal(&mut wrong);
        refused(wrong);
    }
    // a disk that is cut off
    let mut long = whole;
    long[48..56].copy_from_slice(&(1_u64 << 40).to_le_bytes());
    seal(&mut long);
    refused(long);
}
