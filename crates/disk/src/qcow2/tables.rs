//! The tables of an open image: which cluster of the disk is where. All that is kept under its lock.

use std::ops::Range;

use super::header::Header;
use super::layout::{COPIED, Entry, Layout, OFFSET, Place};
use super::refcounts::{Refcounts, read_numbers};
use super::slices::Slices;
use crate::error::{Error, Result, damaged};
use crate::host::HostFile;

/// See the module.
#[derive(Debug)]
pub(super) struct Tables {
    pub(super) header: Header,
    pub(super) layout: Layout,
    pub(super) l1: Vec<u64>,
    pub(super) l1_changed: bool,
    pub(super) l2: Slices,
    pub(super) refcounts: Refcounts,
    /// Clusters of the disk, as bytes, that a request is moving: others keep off them.
    pub(super) busy: Vec<Range<u64>>,
    /// The header in the file says that refcounts may be wrong.
    pub(super) marked: bool,
}

/// Bytes of the disk, from some offset on, that are of one kind.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    pub(super) place: Place,
    pub(super) length: u64,
}

impl Tables {
    pub(super) fn open(file: &HostFile, header: Header) -> Result<Self> {
        let layout = Layout::new(&header);
        if u64::from(header.l1_entries) < layout.l1_entries(header.size) {
            return Err(damaged("the L1 table is too short for the disk"));
        }
        let l1 = read_numbers(file, header.l1_offset, header.l1_entries.into())?;
        let refcounts = Refcounts::open(file, &header)?;
        Ok(Self {
            layout,
            l1,
            l1_changed: false,
            l2: Slices::new(layout.cluster_size()),
            refcounts,
            busy: Vec::new(),
            marked: false,
            header,
        })
    }

    /// Whether a request moves one of the clusters that the bytes are in.
    pub(super) fn is_busy(&self, offset: u64, length: u64) -> bool {
        let end = offset + length;
        self.busy
            .iter()
            .any(|busy| offset < busy.end && busy.start < end)
    }

    /// The L2 table that an offset is looked up in: host offset, and whether it may be changed.
    fn l2_table(&self, l1_index: usize) -> Result<Option<(u64, bool)>> {
        let value = self.l1.get(l1_index).copied();
        let value = value.ok_or_else(|| damaged("the L1 table is too short for the disk"))?;
        let table = value & OFFSET;
        if !table.is_multiple_of(self.layout.cluster_size()) {
            return Err(damaged(format!("an L2 table is at byte {table:#x}")));
        }
        Ok((table != 0).then_some((table, value & COPIED != 0)))
    }

    /// The entry for the cluster that `offset` is in.
    pub(super) fn entry(&mut self, file: &HostFile, offset: u64) -> Result<Entry> {
        let (l1_index, index) = self.layout.indexes(offset);
        let Some((table, _)) = self.l2_table(l1_index)? else {
            return Ok(Entry::default());
        };
        let at = table + index * self.layout.entry_size();
        let value = self.l2.number(file, at)?;
        let bitmap = if self.layout.extended {
            self.l2.number(file, at + 8)?
        } else {
            0
        };
        Ok(Entry { value, bitmap })
    }

    /// Sets it, in an L2 table that is this image's alone, made if there is none.
    pub(super) fn set_entry(&mut self, file: &HostFile, offset: u64, entry: Entry) -> Result<()> {
        let (l1_index, index) = self.layout.indexes(offset);
        let table = self.own_l2_table(file, l1_index)?;
        let at = table + index * self.layout.entry_size();
        self.l2.set_number(file, at, entry.value)?;
        if self.layout.extended {
            self.l2.set_number(file, at + 8, entry.bitmap)?;
        }
        Ok(())
    }

    /// The L2 table of an L1 entry, which nothing else refers to.
    pub(super) fn own_l2_table(&mut self, file: &HostFile, l1_index: usize) -> Result<u64> {
        let old = match self.l2_table(l1_index)? {
            Some((table, true)) => return Ok(table),
            other => other.map(|(table, _)| table),
        };
        let size = self.layout.cluster_size();
        let mut bytes = vec![0; size as usize];
        if let Some(old) = old {
            for at in (0..size).step_by(8) {
                let number = self.l2.number(file, old + at)?;
                bytes[at as usize..][..8].copy_from_slice(&number.to_be_bytes());
            }
        }
        let run = self.refcounts.allocate(file, 1)?;
        let table = run.first << self.layout.cluster_bits;
        self.l2.forget(table, size);
        file.write_bytes(table, &bytes)?;
        self.l1[l1_index] = table | COPIED;
        self.l1_changed = true;
        if let Some(old) = old {
            // what both tables refer to has one reference more since the snapshot was taken
            let first = old >> self.layout.cluster_bits;
            self.refcounts.leave(first..first + 1);
        }
        Ok(table)
    }

    /// What the bytes from `offset` on are, and how far they go on the same, up to `length`.
    pub(super) fn find(&mut self, file: &HostFile, offset: u64, length: u64) -> Result<Found> {
        let end = offset + length;
        let unit = self.layout.unit();
        let cluster = self.layout.cluster_size();
        let entry = self.entry(file, offset)?;
        let place = self.checked(entry, offset)?;
        let mut current = entry;
        let mut at = (offset / unit + 1) * unit;
        while at < end {
            if place == Place::Backing && at.is_multiple_of(cluster) {
                // as far as there is no L2 table, at once
                let (l1_index, _) = self.layout.indexes(at);
                if self.l2_table(l1_index)?.is_none() {
                    at = (l1_index as u64 + 1) * self.layout.l2_reach();
                    continue;
                }
            }
            if at.is_multiple_of(cluster) {
                if matches!(place, Place::Compressed(_)) {
                    break;
                }
                current = self.entry(file, at)?;
            }
            let next = self.checked(current, at)?;
            let goes_on = match (place, next) {
                (Place::Data(a, own), Place::Data(b, next_own)) => {
                    b == a + (at - offset) && own == next_own
                }
                (Place::Compressed(_), Place::Compressed(_)) => true,
                (a, b) => a == b,
            };
            if !goes_on {
                break;
            }
            at += unit;
        }
        Ok(Found {
            place,
            length: at.min(end) - offset,
        })
    }

    /// The place of `offset`, if it is one where something can be.
    fn checked(&self, entry: Entry, offset: u64) -> Result<Place> {
        let place = self.layout.place(entry, offset);
        if let Place::Data(host, _) = place {
            let inside = offset % self.layout.cluster_size();
            let start = host - inside;
            if start == 0 && !self.layout.external
                || !start.is_multiple_of(self.layout.cluster_size())
            {
                return Err(damaged(format!(
                    "the data of byte {offset:#x} is at byte {host:#x}"
                )));
            }
        }
        Ok(place)
    }

    /// What `entry` referred to has one reference less.
    pub(super) fn leave(&mut self, entry: Entry) {
        let (first, count) = self.layout.clusters(entry);
        self.refcounts.leave(first..first + count);
    }

    /// Whether something is to be written.
    pub(super) fn is_changed(&self) -> bool {
        self.l1_changed || self.l2.is_changed() || self.refcounts.is_changed()
    }

    /// Whether so much is to be written that it should be.
    pub(super) fn is_full(&self) -> bool {
        self.l2.is_full() || self.refcounts.is_full()
    }

    /// Refuses to change an image whose tables are known to be wrong.
    pub(super) fn check_writable(&self) -> Result<()> {
        use super::header::Incompatible;
        if self.header.incompatible.contains(Incompatible::CORRUPT) {
            return Err(Error::Damaged("it was marked so".to_owned()));
        }
        Ok(())
    }
}
