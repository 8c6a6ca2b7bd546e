//! What the tests of images have in common: files, programs, and what is on a disk.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use strata_disk::{Buffers, Disk, HostFile};

/// A file to read, or also to `write`, which is made if there is none.
pub(crate) fn file(path: &Path, write: bool) -> HostFile {
    let mut options = File::options();
    let options = options.read(true).write(write).create(write);
    HostFile::new(options.truncate(false).open(path).unwrap())
}

/// A file that was not there.
pub(crate) fn new_file(path: &Path) -> HostFile {
    let mut options = File::options();
    let options = options.read(true).write(true).create_new(true);
    HostFile::new(options.open(path).unwrap())
}

/// Runs `qemu-img`, which succeeds; what it printed.
pub(crate) fn qemu_img(arguments: &[&str]) -> String {
    let output = Command::new("qemu-img").args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "qemu-img {arguments:?}: {text}{errors}"
    );
    text
}

/// Whether `qemu-img check` finds neither damage nor leaks, and what it says.
pub(crate) fn verdict(path: &Path) -> (bool, String) {
    let output = Command::new("qemu-img").arg("check").arg(path).output();
    let output = output.unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    (text.contains("No errors were found"), text + &errors)
}

/// `qemu-img check` finds neither damage nor leaks.
pub(crate) fn check(path: &Path) {
    let (is_clean, text) = verdict(path);
    assert!(is_clean, "{text}");
}

/// What `qemu-img` says is on the disk.
pub(crate) fn content(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("raw");
    let (from, to) = (path.to_str().unwrap(), raw.to_str().unwrap());
    qemu_img(&["convert", "-O", "raw", from, to]);
    fs::read(raw).unwrap()
}

/// All that is on a disk, by one request.
pub(crate) fn read_all(disk: &dyn Disk) -> Vec<u8> {
    read_in_pieces(disk, disk.size() as usize)
}

/// The same by requests of so many bytes.
pub(crate) fn read_in_pieces(disk: &dyn Disk, piece: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; disk.size() as usize];
    for (start, part) in (0..).step_by(piece).zip(bytes.chunks_mut(piece)) {
        disk.read(start, Buffers::from(part)).unwrap();
    }
    bytes
}

/// Writes so many bytes of one value.
pub(crate) fn write(disk: &dyn Disk, offset: u64, value: u8, length: u64) {
    let mut data = vec![value; length as usize];
    disk.write(offset, Buffers::from(&mut data[..])).unwrap();
}

/// What SplitMix64 adds for each number.
pub(crate) const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// What SplitMix64 makes of its state.
pub(crate) fn scramble(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Numbers that look random and are the same each time (SplitMix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(STEP);
        scramble(self.0) % end
    }

    /// Changes some bytes, up to `most`, of the first `within`.
    pub(crate) fn spoil(&mut self, bytes: &mut [u8], most: u64, within: usize) {
        let within = within.min(bytes.len()) as u64;
        for _ in 0..=self.below(most) {
            bytes[self.below(within) as usize] = self.below(256) as u8;
        }
    }
}
