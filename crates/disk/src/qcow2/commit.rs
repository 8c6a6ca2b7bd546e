//! Making changes durable, in an order that leaves a whole image behind at any moment.

use std::sync::PoisonError;

use super::header::{Autoclear, Incompatible};
use super::refcounts::numbers;
use super::slices::Change;
use super::tables::Tables;
use super::{Qcow2, bitmaps};
use crate::HostFile;
use crate::error::Result;

/// What is to be written of the tables.
struct Changes {
    blocks: Vec<Change>,
    table: Option<Change>,
    l2: Vec<Change>,
    l1: Option<Change>,
    /// The header's first cluster, if it changed.
    header: Option<Vec<u8>>,
    /// Clusters that nothing in the file leads to afterwards.
    kept: Vec<u64>,
}

impl Qcow2 {
    /// Makes everything durable that was done before.
    pub(super) fn commit(&self) -> Result<()> {
        let _order = self.commit.lock().unwrap_or_else(PoisonError::into_inner);
        // data first: what the tables are going to lead to
        let changes = self.take_changes()?;
        self.data().sync()?;
        let Some(changes) = changes else {
            return Ok(());
        };
        let written = self.write_tables(&changes);
        let mut tables = self.tables();
        let ok = written.is_ok();
        let table = changes.table.is_some();
        tables.refcounts.settle(&changes.blocks, table, ok);
        tables.l2.settle(&changes.l2, ok);
        tables.l1_changed |= changes.l1.is_some() && !ok;
        written?;
        if self.layout.version == 2 {
            self.drop_late(&mut tables)?;
        }
        drop(tables);
        self.release(&changes.kept)
    }

    pub(super) fn commit_if_full(&self) -> Result<()> {
        if self.tables().is_full() {
            self.commit()?;
        }
        Ok(())
    }

    /// What changed. The image is marked dirty in the file before the first change is.
    fn take_changes(&self) -> Result<Option<Changes>> {
        let mut tables = self.tables();
        let tables = &mut *tables;
        if !tables.is_changed() {
            return Ok(None);
        }
        if !tables.marked {
            let header = &mut tables.header;
            for clusters in bitmaps::clusters(&self.file, header)? {
                tables.refcounts.leave(clusters);
            }
            header.forget_bitmaps();
            header.autoclear &= Autoclear::RAW_DATA;
            if header.version >= 3 {
                header.incompatible |= Incompatible::DIRTY;
            }
            self.file.write_bytes(0, &header.encode()?)?;
            self.file.sync()?;
            tables.marked = true;
        }
        if self.layout.version >= 3 {
            tables.refcounts.drop_left(&self.file)?;
        }
        let moved = tables.refcounts.tell(&mut tables.header);
        let header = if moved {
            Some(tables.header.encode()?)
        } else {
            None
        };
        let (blocks, table) = tables.refcounts.take_changes();
        let l1 = std::mem::take(&mut tables.l1_changed)
            .then(|| (tables.header.l1_offset, numbers(&tables.l1)));
        Ok(Some(Changes {
            blocks,
            table,
            l2: tables.l2.take_changes(),
            l1,
            header,
            kept: tables.refcounts.kept(),
        }))
    }

    fn write_tables(&self, changes: &Changes) -> Result<()> {
        write(&self.file, &changes.blocks)?;
        write(&self.file, changes.table.as_slice())?;
        if let Some(header) = &changes.header {
            // what the new table says, before anybody looks there
            self.file.sync()?;
            self.file.write_bytes(0, header)?;
        }
        if self.layout.version == 2 {
            // there is no mark: a cluster that is in use must never be free
            self.file.sync()?;
        }
        write(&self.file, &changes.l2)?;
        write(&self.file, changes.l1.as_slice())?;
        self.file.sync()?;
        Ok(())
    }

    /// Without a mark, references are taken off clusters only when the file says nowhere that they
    /// are used. That is written at once, so that whoever ends this process leaves no leaks behind.
    fn drop_late(&self, tables: &mut Tables) -> Result<()> {
        let refcounts = &mut tables.refcounts;
        refcounts.drop_left(&self.file)?;
        let (blocks, table) = refcounts.take_changes();
        let written = write(&self.file, &blocks).and_then(|()| write(&self.file, table.as_slice()));
        refcounts.settle(&blocks, table.is_some(), written.is_ok());
        written
    }

    /// Gives clusters back that nothing leads to, when no request uses them either.
    fn release(&self, clusters: &[u64]) -> Result<()> {
        if clusters.is_empty() {
            return Ok(());
        }
        let alone = self.requests.write();
        let _alone = alone.unwrap_or_else(PoisonError::into_inner);
        self.forget_inflated();
        let mut tables = self.tables();
        let size = self.layout.cluster_size();
        for cluster in clusters {
            tables.l2.forget(cluster * size, size);
            self.file.punch(cluster * size, size)?;
            tables.refcounts.release(*cluster);
        }
        Ok(())
    }

    /// Makes all durable, and says in the file that it was closed.
    pub fn close(&self) -> Result<()> {
        // what was freed by the first changes tables once more
        while self.tables().is_changed() {
            self.commit()?;
        }
        let mut tables = self.tables();
        if std::mem::take(&mut tables.marked) {
            tables.header.incompatible.remove(Incompatible::DIRTY);
            self.file.write_bytes(0, &tables.header.encode()?)?;
            self.file.sync()?;
        }
        Ok(())
    }
}

fn write(file: &HostFile, changes: &[Change]) -> Result<()> {
    for (offset, bytes) in changes {
        file.write_bytes(*offset, bytes)?;
    }
    Ok(())
}
