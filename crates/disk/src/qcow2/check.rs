//! Checking an image: everything that its tables refer to is counted, and the counts compared with
//! the refcounts.

use std::collections::HashSet;
use std::ops::Range;

use super::header::Encryption;
use super::layout::{COMPRESSED, COPIED, Entry, Layout, OFFSET};
use super::refcounts::read_numbers;
use super::tables::Tables;
use super::{Qcow2, bitmaps, snapshots};
use crate::HostFile;
use crate::error::{Error, Result};

/// Findings that are told one by one, at most.
const MAX_FINDINGS: usize = 100;

/// Clusters that are counted, at most: 128 TiB of the usual size.
const MAX_CLUSTERS: u64 = 1 << 31;

/// What to mend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Nothing.
    Nothing,
    /// Clusters that nothing refers to become free.
    Leaks,
    /// All refcounts become what they should be, and what says that clusters are not shared.
    References,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Clusters that nothing refers to, and that are not free.
    pub leaks: u64,
    /// What may lose data.
    pub damages: u64,
    /// What of these was mended.
    pub repaired: u64,
    /// Clusters of the disk that are in the image, compressed or not.
    pub allocated: u64,
    /// Those that are compressed.
    pub compressed: u64,
    /// Clusters of the disk.
    pub clusters: u64,
    /// Bytes of the file up to the last cluster in use.
    pub end: u64,
    /// The first findings, in words.
    pub findings: Vec<String>,
}

impl Report {
    /// Whether nothing is wrong, or all of it was mended.
    pub fn is_clean(&self) -> bool {
        self.leaks + self.damages == self.repaired
    }

    fn damage(&mut self, what: String) {
        self.damages += 1;
        self.say(what);
    }

    fn say(&mut self, what: String) {
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(what);
        }
    }
}

/// References to each cluster of the file.
struct Census<'a> {
    file: &'a HostFile,
    layout: Layout,
    /// Clusters of the file; what refers to others is damaged.
    clusters: u64,
    counts: Vec<u32>,
    report: Report,
    /// L2 tables whose entries were looked at for what they are, not only for what they refer to.
    seen: HashSet<u64>,
}

impl Census<'_> {
    /// Counts clusters, if they are in the file.
    fn add(&mut self, clusters: Range<u64>, what: impl Fn() -> String) -> bool {
        if clusters.end > self.clusters {
            self.report
                .damage(format!("{} is beyond the end of the file", what()));
            return false;
        }
        for cluster in clusters {
            let count = &mut self.counts[cluster as usize];
            *count = count.saturating_add(1);
        }
        true
    }

    /// Counts bytes of the file.
    fn add_bytes(&mut self, offset: u64, length: u64, what: &str) -> bool {
        let size = self.layout.cluster_size();
        let end = offset.saturating_add(length).div_ceil(size);
        self.add(offset / size..end, || what.to_owned())
    }

    /// Counts what an L1 table refers to. The disk's own is `active`.
    fn add_l1(&mut self, l1: &[u64], active: bool) -> Result<()> {
        let size = self.layout.cluster_size();
        for (number, value) in l1.iter().enumerate() {
            let table = value & OFFSET;
            if table == 0 {
                continue;
            }
            let what = || format!("the L2 table of entry {number}");
            if !table.is_multiple_of(size) {
                self.report
                    .damage(format!("{} is at byte {table:#x}", what()));
                continue;
            }
            let cluster = table / size;
            if self.add(cluster..cluster + 1, what) {
                self.add_l2(table, number as u64, active)?;
            }
        }
        Ok(())
    }

    fn add_l2(&mut self, table: u64, number: u64, active: bool) -> Result<()> {
        let size = self.layout.cluster_size();
        let words = self.layout.entry_size() as usize / 8;
        let first = self.seen.insert(table);
        for (index, entry) in read_numbers(self.file, table, size / 8)?
            .chunks_exact(words)
            .enumerate()
        {
            let entry = Entry {
                value: entry[0],
                bitmap: entry.get(1).copied().unwrap_or(0),
            };
            let offset = number * self.layout.l2_reach() + index as u64 * size;
            let what = || format!("the data of byte {offset:#x}");
            let is_compressed = entry.value & COMPRESSED != 0;
            let host = entry.value & OFFSET;
            if !is_compressed && !host.is_multiple_of(size) {
                if first {
                    self.report
                        .damage(format!("{} is at byte {host:#x}", what()));
                }
                continue;
            }
            let (from, count) = self.layout.clusters(entry);
            if count > 0 && self.add(from..from + count, what) && active {
                self.report.allocated += 1;
                self.report.compressed += u64::from(is_compressed);
            }
        }
        Ok(())
    }
}

impl Qcow2 {
    /// Counts all references and compares them with the refcounts. Nobody else uses the image
    /// meanwhile.
    pub fn check(&mut self, repair: Repair) -> Result<Report> {
        if self.writable {
            self.commit()?;
        }
        let mut guard = self.tables();
        let tables = &mut *guard;
        let mut census = self.census(tables)?;
        let wrong = census.compare(tables)?;
        let unshared = census.compare_copied(tables)?;
        let mut report = census.report;
        if repair == Repair::Nothing {
            return Ok(report);
        }
        for (cluster, stored, counted) in wrong {
            if stored > counted || repair == Repair::References {
                tables.refcounts.set(&self.file, cluster, counted)?;
                report.repaired += 1;
            }
        }
        if repair == Repair::References {
            for (at, value) in unshared {
                match at {
                    Flag::L1(number) => {
                        tables.l1[number] = value;
                        tables.l1_changed = true;
                    }
                    Flag::L2(at) => tables.l2.set_number(&self.file, at, value)?,
                }
                report.repaired += 1;
            }
        }
        drop(guard);
        self.commit()?;
        Ok(report)
    }

    fn census<'a>(&'a self, tables: &Tables) -> Result<Census<'a>> {
        let header = &tables.header;
        let size = self.layout.cluster_size();
        let clusters = self.file.size()?.div_ceil(size).max(tables.refcounts.end());
        if clusters > MAX_CLUSTERS {
            let what = "a file of so many clusters".to_owned();
            return Err(Error::Unsupported(what));
        }
        let mut census = Census {
            file: &self.file,
            layout: self.layout,
            clusters,
            counts: vec![0; clusters as usize],
            report: Report {
                clusters: self.size.div_ceil(size),
                ..Report::default()
            },
            seen: HashSet::new(),
        };
        census.add(0..1, || "the header".to_owned());
        let table = u64::from(header.refcount_table_clusters) * size;
        census.add_bytes(header.refcount_table_offset, table, "the refcount table");
        for block in tables.refcounts.blocks() {
            census.add_bytes(block, size, "a refcount block");
        }
        if let Some(Encryption::Luks(offset, length)) = header.encryption {
            census.add_bytes(offset, length, "the LUKS header");
        }
        for clusters in bitmaps::clusters(&self.file, header)? {
            census.add(clusters, || "a bitmap".to_owned());
        }
        let l1 = tables.l1.len() as u64 * 8;
        census.add_bytes(header.l1_offset, l1, "the L1 table");
        census.add_l1(&tables.l1, true)?;
        let all = snapshots::read(&self.file, header)?;
        census.add_bytes(
            header.snapshots_offset,
            snapshots::table_length(&all),
            "the snapshot table",
        );
        for snapshot in &all {
            let entries = u64::from(snapshot.l1_entries);
            if census.add_bytes(snapshot.l1_offset, entries * 8, "a snapshot's L1 table") {
                let l1 = read_numbers(&self.file, snapshot.l1_offset, entries)?;
                census.add_l1(&l1, false)?;
            }
        }
        Ok(census)
    }
}

/// Where an entry is that says whether a cluster is shared.
enum Flag {
    /// In the L1 table: its number.
    L1(usize),
    /// In an L2 table: host offset.
    L2(u64),
}

impl Census<'_> {
    /// Clusters whose refcount is not what was counted: which, what it is, what it should be.
    fn compare(&mut self, tables: &mut Tables) -> Result<Vec<(u64, u64, u64)>> {
        let mut wrong = Vec::new();
        for cluster in 0..self.clusters.max(tables.refcounts.counted()) {
            let counted = self
                .counts
                .get(cluster as usize)
                .copied()
                .map_or(0, u64::from);
            let stored = tables.refcounts.get(self.file, cluster)?;
            if counted > 0 {
                self.report.end = (cluster + 1) * self.layout.cluster_size();
            }
            if stored == counted {
                continue;
            }
            wrong.push((cluster, stored, counted));
            let what =
                format!("cluster {cluster:#x} has refcount {stored}, and {counted} references");
            if stored > counted {
                self.report.leaks += 1;
                self.report.say(format!("leak: {what}"));
            } else {
                self.report.damage(what);
            }
        }
        Ok(wrong)
    }

    /// Entries of the disk's tables that say wrongly whether a cluster is shared.
    fn compare_copied(&mut self, tables: &mut Tables) -> Result<Vec<(Flag, u64)>> {
        let size = self.layout.cluster_size();
        let mut wrong = Vec::new();
        for (number, value) in tables.l1.clone().into_iter().enumerate() {
            let table = value & OFFSET;
            let is_table = table != 0 && table.is_multiple_of(size) && table / size < self.clusters;
            if !is_table {
                continue;
            }
            if let Some(value) = self.copied(table, value) {
                self.report
                    .damage(format!("L1 entry {number} says wrongly what is shared"));
                wrong.push((Flag::L1(number), value));
            }
            for index in 0..self.layout.l2_entries() {
                let at = table + index * self.layout.entry_size();
                let value = tables.l2.number(self.file, at)?;
                let host = value & OFFSET;
                let is_data = value & COMPRESSED == 0
                    && host != 0
                    && host.is_multiple_of(size)
                    && host / size < self.clusters;
                if !is_data || self.layout.external {
                    continue;
                }
                if let Some(value) = self.copied(host, value) {
                    let what = format!("the entry at byte {at:#x} says wrongly what is shared");
                    self.report.damage(what);
                    wrong.push((Flag::L2(at), value));
                }
            }
        }
        Ok(wrong)
    }

    /// What an entry should be that leads to a cluster, if it is not.
    fn copied(&self, host: u64, value: u64) -> Option<u64> {
        let alone = self.counts[(host / self.layout.cluster_size()) as usize] == 1;
        let right = if alone {
            value | COPIED
        } else {
            value & !COPIED
        };
        (right != value).then_some(right)
    }
}
