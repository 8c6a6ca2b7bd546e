//! How often each host cluster is referred to, and where free ones are. QEMU's
//! docs/interop/qcow2.rst, section "Host cluster management". Used with the image's lock held.

use std::collections::HashSet;

use super::header::{Header, MAX_REFCOUNT_TABLE};
use super::slices::{Change, Slices};
use crate::error::{Error, Result, damaged};
use crate::host::HostFile;

/// See the module. Clusters are told by their number in the file.
#[derive(Debug)]
pub(super) struct Refcounts {
    cluster_bits: u32,
    order: u32,
    /// Where the table is, and what it says: host offsets of blocks.
    table_offset: u64,
    table: Vec<u64>,
    table_changed: bool,
    /// The header is to be told of the table.
    moved: bool,
    blocks: Slices,
    /// No cluster below is free.
    first_free: u64,
    /// Clusters from here on were never used: they are zeroes.
    unused: u64,
    /// Clusters that one reference less leads to, which the file may still say does.
    leaving: Vec<u64>,
    /// Clusters without references that must not be used yet: the file may still lead there, or a
    /// request.
    kept: HashSet<u64>,
    /// Where compressed data goes on: host offset.
    packed: u64,
}

/// Clusters that follow each other in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) first: u64,
    pub(super) count: u64,
    /// They are known to be zeroes.
    pub(super) fresh: bool,
}

impl Refcounts {
    pub(super) fn open(file: &HostFile, header: &Header) -> Result<Self> {
        let bytes = u64::from(header.refcount_table_clusters) << header.cluster_bits;
        let table = read_numbers(file, header.refcount_table_offset, bytes / 8)?;
        let cluster = 1_u64 << header.cluster_bits;
        if let Some(entry) = table.iter().find(|entry| !entry.is_multiple_of(cluster)) {
            return Err(damaged(format!("a refcount block is at byte {entry:#x}")));
        }
        Ok(Self {
            cluster_bits: header.cluster_bits,
            order: header.refcount_order,
            table_offset: header.refcount_table_offset,
            table,
            table_changed: false,
            moved: false,
            blocks: Slices::new(cluster),
            first_free: 0,
            unused: file.size()?.div_ceil(cluster),
            leaving: Vec::new(),
            kept: HashSet::new(),
            packed: 0,
        })
    }

    /// Clusters that a refcount block is for, as log2.
    fn block_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.order
    }

    /// The largest refcount there can be.
    pub(super) fn max(&self) -> u64 {
        u64::MAX >> (64 - (1_u32 << self.order))
    }

    /// The block that a cluster's refcount is in, if there is one: host offset.
    fn block(&self, cluster: u64) -> Option<u64> {
        let number = usize::try_from(cluster >> self.block_bits()).ok()?;
        self.table.get(number).copied().filter(|block| *block != 0)
    }

    /// Where in the file a refcount is: the byte, and the first bit of it.
    fn position(&self, block: u64, cluster: u64) -> (u64, u32) {
        let bit = (cluster & ((1 << self.block_bits()) - 1)) << self.order;
        (block + bit / 8, (bit % 8) as u32)
    }

    pub(super) fn get(&mut self, file: &HostFile, cluster: u64) -> Result<u64> {
        let Some(block) = self.block(cluster) else {
            return Ok(0);
        };
        let (at, bit) = self.position(block, cluster);
        let bytes = self.blocks.read(file, at)?;
        let width = 1_u32 << self.order;
        Ok(if width < 8 {
            u64::from(bytes[0]) >> bit & self.max()
        } else {
            let bytes = &bytes[..width as usize / 8];
            bytes
                .iter()
                .fold(0, |all, byte| all << 8 | u64::from(*byte))
        })
    }

    pub(super) fn set(&mut self, file: &HostFile, cluster: u64, value: u64) -> Result<()> {
        if value > self.max() {
            let what = format!("a cluster is shared more than {} times", self.max());
            return Err(Error::Unsupported(what));
        }
        let block = self.block(cluster);
        let block = block.ok_or_else(|| damaged("a cluster in use has no refcount block"))?;
        let (at, bit) = self.position(block, cluster);
        let mask = self.max();
        let width = 1_u32 << self.order;
        let bytes = self.blocks.write(file, at)?;
        if width < 8 {
            bytes[0] = bytes[0] & !((mask << bit) as u8) | (value << bit) as u8;
        } else {
            let value = value.to_be_bytes();
            let size = width as usize / 8;
            bytes[..size].copy_from_slice(&value[8 - size..]);
        }
        if value == 0 && !self.kept.contains(&cluster) {
            self.first_free = self.first_free.min(cluster);
        }
        Ok(())
    }

    /// One reference more.
    pub(super) fn add(&mut self, file: &HostFile, cluster: u64) -> Result<()> {
        let count = self.get(file, cluster)?;
        if count == 0 {
            return Err(damaged(format!("cluster {cluster:#x} is in use and free")));
        }
        self.set(file, cluster, count + 1)
    }

    /// One reference less, when the file says so.
    pub(super) fn leave(&mut self, clusters: std::ops::Range<u64>) {
        self.leaving.extend(clusters);
    }

    /// Takes the references off clusters that were left. Those that have none then are not used
    /// until they are released.
    pub(super) fn drop_left(&mut self, file: &HostFile) -> Result<()> {
        for cluster in std::mem::take(&mut self.leaving) {
            let count = self.get(file, cluster)?;
            let left = count.checked_sub(1);
            let left =
                left.ok_or_else(|| damaged(format!("cluster {cluster:#x} is freed twice")))?;
            if left == 0 {
                self.kept.insert(cluster);
            }
            self.set(file, cluster, left)?;
        }
        Ok(())
    }

    /// The clusters that are to be released.
    pub(super) fn kept(&self) -> Vec<u64> {
        self.kept.iter().copied().collect()
    }

    /// The cluster may be used again.
    pub(super) fn release(&mut self, cluster: u64) {
        self.kept.remove(&cluster);
        self.first_free = self.first_free.min(cluster);
    }

    fn is_free(&mut self, file: &HostFile, cluster: u64) -> Result<bool> {
        Ok(self.get(file, cluster)? == 0 && !self.kept.contains(&cluster))
    }

    /// Takes free clusters that follow each other: `wanted` or fewer, at least one.
    pub(super) fn allocate(&mut self, file: &HostFile, wanted: u64) -> Result<Run> {
        let first = self.find(file)?;
        let mut count = 0;
        while count < wanted
            && self.block(first + count).is_some()
            && self.is_free(file, first + count)?
            && (first + count >= self.unused) == (first >= self.unused)
        {
            self.set(file, first + count, 1)?;
            count += 1;
        }
        let fresh = first >= self.unused;
        self.first_free = first + count;
        self.unused = self.unused.max(first + count);
        Ok(Run {
            first,
            count,
            fresh,
        })
    }

    /// Takes room for `length` bytes, at most a cluster, that may share clusters with such room taken
    /// before: host offset.
    pub(super) fn allocate_bytes(&mut self, file: &HostFile, length: u64) -> Result<u64> {
        let size = 1_u64 << self.cluster_bits;
        let begun = self.packed % size;
        let room = if begun == 0 { 0 } else { size - begun };
        if room >= length {
            self.add(file, self.packed >> self.cluster_bits)?;
            self.packed += length;
            return Ok(self.packed - length);
        }
        let run = self.allocate(file, 1)?;
        let start = run.first << self.cluster_bits;
        let at = if room > 0 && self.packed + room == start {
            // it goes over into the next one
            self.add(file, self.packed >> self.cluster_bits)?;
            self.packed
        } else {
            start
        };
        self.packed = at + length;
        Ok(at)
    }

    /// Writes bytes where there is room for them in one piece: host offset.
    pub(super) fn place(&mut self, file: &HostFile, bytes: &[u8]) -> Result<u64> {
        let wanted = (bytes.len() as u64).div_ceil(1 << self.cluster_bits).max(1);
        loop {
            let run = self.allocate(file, wanted)?;
            let offset = run.first << self.cluster_bits;
            if run.count == wanted {
                self.blocks.forget(offset, wanted << self.cluster_bits);
                file.write_bytes(offset, bytes)?;
                return Ok(offset);
            }
            self.leave(run.first..run.first + run.count);
        }
    }

    /// Host offsets of the blocks.
    pub(super) fn blocks(&self) -> Vec<u64> {
        self.table
            .iter()
            .copied()
            .filter(|block| *block != 0)
            .collect()
    }

    /// The first cluster that was never used, nor was any behind it.
    pub(super) fn end(&self) -> u64 {
        self.unused
    }

    /// The first cluster that no block is for, nor for any behind it.
    pub(super) fn counted(&self) -> u64 {
        let last = self.table.iter().rposition(|block| *block != 0);
        last.map_or(0, |last| (last as u64 + 1) << self.block_bits())
    }

    /// The first free cluster, which has a refcount block then.
    fn find(&mut self, file: &HostFile) -> Result<u64> {
        let mut cluster = self.first_free;
        loop {
            if self.block(cluster).is_none() {
                if cluster >> self.block_bits() >= self.table.len() as u64 {
                    self.grow(file, cluster)?;
                } else {
                    // the block itself is the first that it counts
                    self.add_block(file, cluster, cluster)?;
                    self.set(file, cluster, 1)?;
                    self.unused = self.unused.max(cluster + 1);
                }
            } else if self.is_free(file, cluster)? {
                return Ok(cluster);
            } else {
                cluster += 1;
            }
        }
    }

    /// Makes the free cluster `at` the block for `cluster`.
    fn add_block(&mut self, file: &HostFile, cluster: u64, at: u64) -> Result<()> {
        let size = 1 << self.cluster_bits;
        let offset = at << self.cluster_bits;
        self.blocks.forget(offset, size);
        file.write_bytes(offset, &vec![0; size as usize])?;
        let number = (cluster >> self.block_bits()) as usize;
        self.table[number] = offset;
        self.table_changed = true;
        Ok(())
    }

    /// Makes the table longer, in free clusters behind all that are in use.
    fn grow(&mut self, file: &HostFile, cluster: u64) -> Result<()> {
        let bits = self.block_bits();
        let start = self.unused.max(cluster).next_multiple_of(1 << bits);
        let old = self.old_table();
        let per_cluster = (1_u64 << self.cluster_bits) / 8;
        let mut clusters = (self.table.len() as u64 / per_cluster).max(1);
        loop {
            clusters *= 2;
            // behind the table come the blocks that count it and themselves
            let blocks = (clusters >> (bits - 1)) + 2;
            if clusters << self.cluster_bits > MAX_REFCOUNT_TABLE {
                let what = "the image is as large as its cluster size allows".to_owned();
                return Err(Error::Invalid(what));
            }
            if (start + clusters + blocks) >> bits < clusters * per_cluster {
                break;
            }
        }
        self.table.resize((clusters * per_cluster) as usize, 0);
        self.table_offset = start << self.cluster_bits;
        let mut used = start + clusters;
        let mut counted = start;
        while counted < used {
            self.add_block(file, counted, used)?;
            used += 1;
            counted += 1 << bits;
        }
        for cluster in start..used {
            self.set(file, cluster, 1)?;
        }
        self.unused = self.unused.max(used);
        self.table_changed = true;
        self.moved = true;
        self.leaving.extend(old);
        Ok(())
    }

    fn old_table(&self) -> std::ops::Range<u64> {
        let first = self.table_offset >> self.cluster_bits;
        first..first + ((self.table.len() as u64 * 8) >> self.cluster_bits)
    }

    /// Whether something is to be written.
    pub(super) fn is_changed(&self) -> bool {
        self.table_changed || self.blocks.is_changed() || !self.leaving.is_empty()
    }

    /// Whether so much is to be written that it should be.
    pub(super) fn is_full(&self) -> bool {
        self.blocks.is_full()
    }

    /// What is to be written: parts of blocks, and the table.
    pub(super) fn take_changes(&mut self) -> (Vec<Change>, Option<Change>) {
        let table = std::mem::take(&mut self.table_changed)
            .then(|| (self.table_offset, numbers(&self.table)));
        (self.blocks.take_changes(), table)
    }

    /// As [`Slices::settle`].
    pub(super) fn settle(&mut self, changes: &[Change], table: bool, written: bool) {
        self.blocks.settle(changes, written);
        self.table_changed |= table && !written;
    }

    /// Tells the header where the table is, if it is elsewhere now.
    pub(super) fn tell(&mut self, header: &mut Header) -> bool {
        header.refcount_table_offset = self.table_offset;
        header.refcount_table_clusters =
            ((self.table.len() as u64 * 8) >> self.cluster_bits) as u32;
        std::mem::take(&mut self.moved)
    }
}

/// Big-endian numbers of the file.
pub(super) fn read_numbers(file: &HostFile, offset: u64, count: u64) -> Result<Vec<u64>> {
    let mut bytes = vec![0; count as usize * 8];
    file.read_bytes(offset, &mut bytes)?;
    let number = |chunk: &[u8]| {
        chunk
            .iter()
            .fold(0, |all, byte| all << 8 | u64::from(*byte))
    };
    Ok(bytes.chunks_exact(8).map(number).collect())
}

/// As they are in the file.
pub(super) fn numbers(values: &[u64]) -> Box<[u8]> {
    values
        .iter()
        .flat_map(|value| value.to_be_bytes())
        .collect()
}
