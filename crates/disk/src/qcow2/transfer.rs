//! Moving data: reads, writes, zeroes and discards of any bytes of the disk.

use std::sync::{MutexGuard, PoisonError};

use super::Qcow2;
use super::layout::{COMPRESSED, COPIED, Entry, OFFSET, Place, SUBCLUSTERS, ZERO};
use super::tables::Tables;
use crate::Buffers;
use crate::error::Result;

/// Bytes of zeroes written at once.
const ZEROES: u64 = 64 << 10;
/// Bitmap of a cluster all of whose subclusters are allocated, or zeroes.
const ALL_DATA: u64 = 0xffff_ffff;
const ALL_ZERO: u64 = ALL_DATA << SUBCLUSTERS;

/// Clusters of the disk that have no room of their own yet, and get some.
struct Move {
    /// Byte of the disk that the first begins at, and how many there are.
    start: u64,
    clusters: u64,
    /// Bytes from the request's offset on that are within them.
    length: u64,
    /// Where they go: host offset.
    host: u64,
    /// The room is known to be zeroes.
    fresh: bool,
    /// They have the room already, but nothing in it.
    in_place: bool,
    /// Bytes that have to be filled together.
    unit: u64,
}

impl Qcow2 {
    pub(super) fn read_all(&self, mut offset: u64, mut buffers: Buffers) -> Result<()> {
        while !buffers.is_empty() {
            let found = self.tables().find(&self.file, offset, buffers.len())?;
            let part = buffers.take(found.length);
            match found.place {
                Place::Data(host, _) => self.read_data(host, offset, part)?,
                Place::Zero => part.clear(),
                Place::Backing => self.read_backing(offset, part)?,
                Place::Compressed(data) => self.read_compressed(data, offset, &part)?,
            }
            offset += found.length;
        }
        Ok(())
    }

    fn read_backing(&self, offset: u64, mut buffers: Buffers) -> Result<()> {
        let size = self.backing.as_ref().map_or(0, |backing| backing.size());
        let inside = size.saturating_sub(offset).min(buffers.len());
        let part = buffers.take(inside);
        if let Some(backing) = self.backing.as_ref().filter(|_| inside > 0) {
            backing.read(offset, part)?;
        }
        buffers.clear();
        Ok(())
    }

    /// The tables, once no request moves a cluster of these bytes.
    fn calm_tables(&self, offset: u64, length: u64) -> MutexGuard<'_, Tables> {
        let mut tables = self.tables();
        while tables.is_busy(offset, length) {
            let again = self.settled.wait(tables);
            tables = again.unwrap_or_else(PoisonError::into_inner);
        }
        tables
    }

    pub(super) fn write_all(&self, mut offset: u64, mut buffers: Buffers) -> Result<()> {
        while !buffers.is_empty() {
            let mut tables = self.calm_tables(offset, buffers.len());
            let found = tables.find(&self.file, offset, buffers.len())?;
            if let Place::Data(host, true) = found.place {
                drop(tables);
                self.write_data(host, offset, buffers.take(found.length))?;
                offset += found.length;
                continue;
            }
            let plan = self.plan(&mut tables, offset, buffers.len(), found.length)?;
            drop(tables);
            let filled = self.fill(&plan, offset, buffers.take(plan.length));
            self.settle(&plan, offset, filled)?;
            offset += plan.length;
        }
        Ok(())
    }

    /// Finds room for the clusters at `offset`, up to `length` bytes, of which the first `alike` are
    /// in the same place, and makes them busy.
    fn plan(&self, tables: &mut Tables, offset: u64, length: u64, alike: u64) -> Result<Move> {
        let size = self.layout.cluster_size();
        let start = offset - offset % size;
        let entry = tables.entry(&self.file, offset)?;
        let mut plan = Move {
            start,
            clusters: 1,
            length: alike.min(start + size - offset),
            host: entry.value & OFFSET,
            fresh: false,
            in_place: true,
            unit: self.layout.unit(),
        };
        if !self.layout.is_own(entry) {
            plan.in_place = false;
            let refers = self.layout.clusters(entry).1 > 0;
            let last = offset + length - 1;
            let mut wanted = 1;
            if self.layout.extended && refers {
                plan.unit = size;
            } else {
                while start + wanted * size <= last {
                    let next = tables.entry(&self.file, start + wanted * size)?;
                    let subclusters = self.layout.extended && self.layout.clusters(next).1 > 0;
                    if self.layout.is_own(next) || subclusters {
                        break;
                    }
                    wanted += 1;
                }
            }
            if self.layout.external {
                plan.host = start;
                plan.clusters = wanted;
            } else {
                let run = tables.refcounts.allocate(&self.file, wanted)?;
                plan.host = run.first << self.layout.cluster_bits;
                plan.clusters = run.count;
                plan.fresh = run.fresh;
            }
            plan.length = length.min(start + plan.clusters * size - offset);
        }
        tables.busy.push(start..start + plan.clusters * size);
        Ok(plan)
    }

    /// Writes `buffers` for `offset` to the room, and beside them what was there before.
    fn fill(&self, plan: &Move, offset: u64, buffers: Buffers) -> Result<()> {
        let end = offset + plan.length;
        let front = offset - offset % plan.unit;
        let back = end.next_multiple_of(plan.unit);
        self.keep(plan, front, offset)?;
        self.keep(plan, end, back)?;
        self.write_data(plan.host + (offset - plan.start), offset, buffers)
    }

    /// Copies what is on the disk from `start` to `end` to the room.
    fn keep(&self, plan: &Move, start: u64, end: u64) -> Result<()> {
        if start == end {
            return Ok(());
        }
        let mut bytes = vec![0; (end - start) as usize];
        let inside = self.size.clamp(start, end) - start;
        self.read_all(start, Buffers::from(&mut bytes[..inside as usize]))?;
        // zeroes are something else when they are encrypted
        let as_it_is = plan.fresh && !self.is_encrypted();
        if as_it_is && bytes.iter().all(|byte| *byte == 0) {
            return Ok(());
        }
        let host = plan.host + (start - plan.start);
        self.write_data(host, start, Buffers::from(&mut bytes[..]))
    }

    /// Lets the tables lead to the room, if it was filled, or else gives it back.
    fn settle(&self, plan: &Move, offset: u64, filled: Result<()>) -> Result<()> {
        let mut tables = self.tables();
        let end = plan.start + plan.clusters * self.layout.cluster_size();
        let result = filled.and_then(|()| self.lead(&mut tables, plan, offset));
        if result.is_err() && !plan.in_place && !self.layout.external {
            let first = plan.host >> self.layout.cluster_bits;
            tables.refcounts.leave(first..first + plan.clusters);
        }
        tables.busy.retain(|busy| *busy != (plan.start..end));
        drop(tables);
        self.settled.notify_all();
        result
    }

    fn lead(&self, tables: &mut Tables, plan: &Move, offset: u64) -> Result<()> {
        let size = self.layout.cluster_size();
        for number in 0..plan.clusters {
            let at = plan.start + number * size;
            let old = tables.entry(&self.file, at)?;
            let mut new = Entry {
                value: (plan.host + number * size) | COPIED,
                bitmap: 0,
            };
            if self.layout.extended {
                let from = offset.saturating_sub(at);
                let to = (offset + plan.length - at).min(size);
                let filled = if plan.unit == size {
                    ALL_DATA
                } else {
                    bits(from / plan.unit, to.div_ceil(plan.unit))
                };
                new.bitmap = (old.bitmap | filled) & !(filled << SUBCLUSTERS);
            }
            tables.set_entry(&self.file, at, new)?;
            if !plan.in_place {
                tables.leave(old);
            }
        }
        Ok(())
    }

    pub(super) fn zero_all(&self, offset: u64, length: u64, unmap: bool) -> Result<()> {
        // without the flag, or where data is to be read without tables: the slow way
        let flag = self.layout.version >= 3 && !self.layout.external;
        self.change_clusters(offset, length, |tables, at| {
            if !flag {
                return Ok(false);
            }
            let old = tables.entry(&self.file, at)?;
            let keep = !unmap && self.layout.is_own(old);
            let value = if keep { old.value & !ZERO } else { 0 };
            let new = if self.layout.extended {
                Entry {
                    value,
                    bitmap: ALL_ZERO,
                }
            } else {
                Entry {
                    value: value | ZERO,
                    bitmap: 0,
                }
            };
            if new != old {
                tables.set_entry(&self.file, at, new)?;
                if !keep {
                    tables.leave(old);
                }
            }
            Ok(true)
        })
    }

    pub(super) fn discard_all(&self, offset: u64, length: u64) -> Result<()> {
        if self.backing.is_some() {
            // what is below must not show
            let flag = self.layout.version >= 3 && !self.layout.external;
            return if flag {
                let size = self.layout.cluster_size();
                let start = offset.next_multiple_of(size);
                let end = self.whole_end(offset + length);
                self.zero_all(start, end.saturating_sub(start), true)
            } else {
                Ok(())
            };
        }
        if self.layout.external {
            return Ok(());
        }
        let size = self.layout.cluster_size();
        let start = offset.next_multiple_of(size);
        let end = self.whole_end(offset + length);
        self.change_clusters(start, end.saturating_sub(start), |tables, at| {
            let old = tables.entry(&self.file, at)?;
            if old != Entry::default() {
                tables.set_entry(&self.file, at, Entry::default())?;
                tables.leave(old);
            }
            Ok(true)
        })
    }

    /// Where the last whole cluster before `end` ends: at the end of the disk, a part is one.
    fn whole_end(&self, end: u64) -> u64 {
        if end == self.size {
            end
        } else {
            end - end % self.layout.cluster_size()
        }
    }

    /// Makes bytes zeroes: whole clusters by `change`, which says whether it could, and the rest, and
    /// those, by writing zeroes.
    fn change_clusters(
        &self,
        offset: u64,
        length: u64,
        change: impl Fn(&mut Tables, u64) -> Result<bool>,
    ) -> Result<()> {
        let size = self.layout.cluster_size();
        let end = offset + length;
        let mut at = offset;
        while at < end {
            let next = (at - at % size + size).min(end);
            let mut tables = self.calm_tables(at, next - at);
            let found = tables.find(&self.file, at, end - at)?;
            let is_zero = match found.place {
                Place::Zero => true,
                Place::Backing => self.backing.is_none(),
                _ => false,
            };
            if is_zero {
                at += found.length;
                continue;
            }
            let whole = at.is_multiple_of(size) && self.whole_end(next) == next;
            if whole && change(&mut tables, at)? {
                at = next;
                continue;
            }
            drop(tables);
            self.write_zero_bytes(at, next - at)?;
            at = next;
        }
        Ok(())
    }

    fn write_zero_bytes(&self, offset: u64, length: u64) -> Result<()> {
        let mut zeroes = vec![0; ZEROES.min(length) as usize];
        let mut done = 0;
        while done < length {
            let here = ZEROES.min(length - done);
            let part = Buffers::from(&mut zeroes[..here as usize]);
            self.write_all(offset + done, part)?;
            done += here;
        }
        Ok(())
    }
}

/// Bits `from` to `to`, the last not among them.
fn bits(from: u64, to: u64) -> u64 {
    (1_u64 << to) - (1_u64 << from)
}

impl super::layout::Layout {
    /// Whether an entry has a cluster that nothing else refers to, and that may be written to.
    fn is_own(&self, entry: Entry) -> bool {
        let own = entry.value & (COPIED | COMPRESSED) == COPIED;
        own && (self.external || entry.value & OFFSET != 0)
    }
}
