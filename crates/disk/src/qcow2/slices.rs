//! Parts of tables in memory: what was read of them, and what is to be written. Used by `tables`
//! and `refcounts`.

use std::collections::{BTreeSet, HashMap};

use crate::error::Result;
use crate::host::HostFile;

/// Bytes of a part, at most: what changes together is mostly together.
const SIZE: u64 = 4096;
/// Parts kept in memory, about.
const KEPT: usize = 2048;
/// Changed parts, at most, before they should be written.
const CHANGED: usize = 1024;

/// Big-endian numbers in the file, in parts of one size.
#[derive(Debug)]
pub(super) struct Slices {
    size: u64,
    parts: HashMap<u64, Part>,
    changed: BTreeSet<u64>,
}

#[derive(Debug)]
struct Part {
    bytes: Box<[u8]>,
    /// It was used since parts were last thrown away.
    used: bool,
    /// It is being written: its bytes in the file are not to be relied on.
    writing: bool,
}

/// A changed part, as it is to be written.
pub(super) type Change = (u64, Box<[u8]>);

impl Slices {
    pub(super) fn new(cluster_size: u64) -> Self {
        Self {
            size: cluster_size.min(SIZE),
            parts: HashMap::new(),
            changed: BTreeSet::new(),
        }
    }

    /// The bytes from `at` on, to the end of the part that has them.
    pub(super) fn read(&mut self, file: &HostFile, at: u64) -> Result<&[u8]> {
        let size = self.size;
        let part = self.part(file, at)?;
        Ok(&part.bytes[(at % size) as usize..])
    }

    /// The same, to be changed.
    pub(super) fn write(&mut self, file: &HostFile, at: u64) -> Result<&mut [u8]> {
        let size = self.size;
        self.changed.insert(at - at % size);
        let part = self.part(file, at)?;
        Ok(&mut part.bytes[(at % size) as usize..])
    }

    /// The number at `at`.
    pub(super) fn number(&mut self, file: &HostFile, at: u64) -> Result<u64> {
        let bytes = self.read(file, at)?;
        Ok(bytes[..8]
            .iter()
            .fold(0, |all, byte| all << 8 | u64::from(*byte)))
    }

    /// Changes it.
    pub(super) fn set_number(&mut self, file: &HostFile, at: u64, value: u64) -> Result<()> {
        self.write(file, at)?[..8].copy_from_slice(&value.to_be_bytes());
        Ok(())
    }

    fn part(&mut self, file: &HostFile, at: u64) -> Result<&mut Part> {
        let start = at - at % self.size;
        if !self.parts.contains_key(&start) {
            self.make_room();
            let mut bytes = vec![0; self.size as usize].into_boxed_slice();
            file.read_bytes(start, &mut bytes)?;
            let part = Part {
                bytes,
                used: true,
                writing: false,
            };
            self.parts.insert(start, part);
        }
        let part = self.parts.get_mut(&start).expect("it was just put there");
        part.used = true;
        Ok(part)
    }

    /// Throws away what is as in the file and was not used of late.
    fn make_room(&mut self) {
        if self.parts.len() < KEPT {
            return;
        }
        let changed = &self.changed;
        self.parts
            .retain(|start, part| part.used || part.writing || changed.contains(start));
        for part in self.parts.values_mut() {
            part.used = false;
        }
    }

    /// Forgets a cluster, which is something else now.
    pub(super) fn forget(&mut self, start: u64, length: u64) {
        for at in (start..start + length).step_by(self.size as usize) {
            self.parts.remove(&at);
            self.changed.remove(&at);
        }
    }

    /// Whether something is to be written.
    pub(super) fn is_changed(&self) -> bool {
        !self.changed.is_empty()
    }

    /// Whether so much is to be written that it should be.
    pub(super) fn is_full(&self) -> bool {
        self.changed.len() >= CHANGED
    }

    /// What changed, which is from now on taken for written.
    pub(super) fn take_changes(&mut self) -> Vec<Change> {
        let changed = std::mem::take(&mut self.changed);
        let parts = &mut self.parts;
        let copies = changed.into_iter().filter_map(|start| {
            let part = parts.get_mut(&start)?;
            part.writing = true;
            Some((start, part.bytes.clone()))
        });
        copies.collect()
    }

    /// The changes were written, or not: then they are changes again.
    pub(super) fn settle(&mut self, changes: &[Change], written: bool) {
        for (start, _) in changes {
            if let Some(part) = self.parts.get_mut(start) {
                part.writing = false;
                if !written {
                    self.changed.insert(*start);
                }
            }
        }
    }
}
