//! Dirty bitmaps inside an image, which other programs keep there. Strata does not keep them up: who
//! changes the image removes them. QEMU's docs/interop/qcow2.rst, section "Bitmaps extension".

use std::ops::Range;

use super::header::{Autoclear, Header};
use super::layout::OFFSET;
use super::refcounts::read_numbers;
use crate::HostFile;
use crate::error::{Result, damaged};

/// Bytes of all entries, and entries of a table, at most, as in QEMU.
const MAX_DIRECTORY: u64 = 64 << 20;
const MAX_TABLE: u64 = 16 << 20;
/// Bytes of an entry before its variable parts.
const FIXED: usize = 24;

/// The host clusters that the bitmaps of an image are in, if they are as the disk is.
pub(super) fn clusters(file: &HostFile, header: &Header) -> Result<Vec<Range<u64>>> {
    let Some(extension) = header.bitmaps() else {
        return Ok(Vec::new());
    };
    if !header.autoclear.contains(Autoclear::BITMAPS) {
        return Ok(Vec::new());
    }
    let number = |bytes: &[u8], at: usize, length: usize| {
        let bytes = bytes.get(at..at + length).unwrap_or_default();
        bytes
            .iter()
            .fold(0, |all, byte| all << 8 | u64::from(*byte))
    };
    let (size, offset) = (number(extension, 8, 8), number(extension, 16, 8));
    if extension.len() < FIXED || size > MAX_DIRECTORY {
        return Err(damaged("the directory of bitmaps"));
    }
    let bits = header.cluster_bits;
    let range = |offset: u64, length: u64| {
        let end = offset.saturating_add(length).div_ceil(1 << bits);
        offset >> bits..end
    };
    let mut directory = vec![0; size as usize];
    file.read_bytes(offset, &mut directory)?;
    let mut all = vec![range(offset, size)];
    let mut at = 0;
    for _ in 0..number(extension, 0, 4) {
        let entry = directory.get(at..at + FIXED);
        let entry = entry.ok_or_else(|| damaged("the directory of bitmaps"))?;
        let (table, entries) = (number(entry, 0, 8), number(entry, 8, 4));
        if entries > MAX_TABLE || !table.is_multiple_of(1 << bits) {
            return Err(damaged("the table of a bitmap"));
        }
        all.push(range(table, entries * 8));
        for value in read_numbers(file, table, entries)? {
            if value & OFFSET != 0 {
                all.push(range(value & OFFSET, 1 << bits));
            }
        }
        let rest = number(entry, 18, 2) + number(entry, 20, 4);
        at += (FIXED + rest as usize).next_multiple_of(8);
    }
    Ok(all)
}
