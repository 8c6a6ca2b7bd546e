//! Snapshots inside an image: other L1 tables, with names. QEMU's docs/interop/qcow2.rst, section
//! "Snapshots". A change writes new tables, lets the header lead to them, and has all references
//! counted anew.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::header::{Header, Incompatible, MAX_L1};
use super::refcounts::{numbers, read_numbers};
use super::{Qcow2, check::Repair};
use crate::HostFile;
use crate::error::{Error, Result, damaged};

/// Snapshots in an image, at most, and bytes of their table, as in QEMU.
const MAX_SNAPSHOTS: u32 = 65_536;
const MAX_TABLE: usize = 16 << 20;
/// Bytes of an entry before its variable parts, and of the extra data that this writes.
const FIXED: usize = 40;
const EXTRA: usize = 16;

/// What was on the disk at some time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// A number, mostly, that tells it from others.
    pub id: String,
    /// What it was called.
    pub name: String,
    /// When it was made.
    pub time: SystemTime,
    /// Bytes of the disk at that time.
    pub size: u64,
    /// Bytes of the state of a running machine that are kept with it.
    pub machine_state: u64,
    pub(super) l1_offset: u64,
    pub(super) l1_entries: u32,
    /// How long the guest had run, in nanoseconds, and what else is kept.
    clock: u64,
    extra: Vec<u8>,
}

/// All snapshots of an image.
pub(super) fn read(file: &HostFile, header: &Header) -> Result<Vec<Snapshot>> {
    if header.snapshots > MAX_SNAPSHOTS {
        return Err(damaged(format!("{} snapshots", header.snapshots)));
    }
    let mut at = header.snapshots_offset;
    let end = at + MAX_TABLE as u64;
    let mut all = Vec::new();
    for _ in 0..header.snapshots {
        let mut fixed = [0; FIXED];
        file.read_bytes(at, &mut fixed)?;
        let number = |at: usize, length: usize| {
            let bytes = &fixed[at..at + length];
            bytes
                .iter()
                .fold(0, |all, byte| all << 8 | u64::from(*byte))
        };
        let lengths = [number(36, 4), number(12, 2), number(14, 2)].map(|n| n as usize);
        let length = lengths.iter().sum::<usize>();
        at += FIXED as u64;
        if at + length as u64 > end {
            return Err(damaged("the snapshot table is too long"));
        }
        let mut bytes = vec![0; length];
        file.read_bytes(at, &mut bytes)?;
        let (extra, rest) = bytes.split_at(lengths[0]);
        let (id, name) = rest.split_at(lengths[1]);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let extra_number = |at: usize| {
            let bytes = extra.get(at..at + 8)?;
            Some(
                bytes
                    .iter()
                    .fold(0, |all, byte| all << 8 | u64::from(*byte)),
            )
        };
        let seconds = Duration::new(number(16, 4), number(20, 4).min(999_999_999) as u32);
        all.push(Snapshot {
            id: text(id),
            name: text(name),
            time: UNIX_EPOCH + seconds,
            size: extra_number(8).unwrap_or(header.size),
            machine_state: extra_number(0).unwrap_or(number(32, 4)),
            l1_offset: number(0, 8),
            l1_entries: number(8, 4) as u32,
            clock: number(24, 8),
            extra: extra.to_vec(),
        });
        at = (at + length as u64).next_multiple_of(8);
    }
    for snapshot in &all {
        let aligned = snapshot.l1_offset.is_multiple_of(1 << header.cluster_bits);
        if !aligned || u64::from(snapshot.l1_entries) * 8 > MAX_L1 {
            return Err(damaged(format!("the L1 table of snapshot {}", snapshot.id)));
        }
    }
    Ok(all)
}

/// Bytes of the table of these.
pub(super) fn table_length(snapshots: &[Snapshot]) -> u64 {
    let entries = snapshots.iter().map(|snapshot| {
        let rest = snapshot.extra.len() + snapshot.id.len() + snapshot.name.len();
        (FIXED + rest).next_multiple_of(8)
    });
    entries.sum::<usize>() as u64
}

fn encode(snapshots: &[Snapshot]) -> Vec<u8> {
    let mut table = Vec::new();
    for snapshot in snapshots {
        let since = snapshot.time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut extra = snapshot.extra.clone();
        extra.resize(extra.len().max(EXTRA), 0);
        extra[..8].copy_from_slice(&snapshot.machine_state.to_be_bytes());
        extra[8..16].copy_from_slice(&snapshot.size.to_be_bytes());
        table.extend(snapshot.l1_offset.to_be_bytes());
        table.extend(snapshot.l1_entries.to_be_bytes());
        table.extend((snapshot.id.len() as u16).to_be_bytes());
        table.extend((snapshot.name.len() as u16).to_be_bytes());
        table.extend((since.as_secs() as u32).to_be_bytes());
        table.extend(since.subsec_nanos().to_be_bytes());
        table.extend(snapshot.clock.to_be_bytes());
        table.extend((snapshot.machine_state as u32).to_be_bytes());
        table.extend((extra.len() as u32).to_be_bytes());
        table.extend(extra);
        table.extend(snapshot.id.as_bytes());
        table.extend(snapshot.name.as_bytes());
        table.resize(table.len().next_multiple_of(8), 0);
    }
    table
}

impl Qcow2 {
    /// The snapshots inside.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>> {
        read(&self.file, &self.tables().header)
    }

    /// The one with this ID, or else with this name.
    fn snapshot(&self, which: &str) -> Result<(usize, Vec<Snapshot>)> {
        let all = self.snapshots()?;
        let by_id = all.iter().position(|snapshot| snapshot.id == which);
        let found = by_id.or_else(|| all.iter().position(|snapshot| snapshot.name == which));
        match found {
            Some(number) => Ok((number, all)),
            None => Err(Error::Invalid(format!("there is no snapshot {which:?}"))),
        }
    }

    /// Makes the disk what it was at the snapshot with this ID or name.
    pub fn apply_snapshot(&mut self, which: &str) -> Result<()> {
        self.check_internal()?;
        let (number, all) = self.snapshot(which)?;
        let snapshot = &all[number];
        let l1 = read_numbers(&self.file, snapshot.l1_offset, snapshot.l1_entries.into())?;
        self.change_header(|header, place| {
            header.size = snapshot.size;
            header.l1_entries = snapshot.l1_entries;
            header.l1_offset = place(&numbers(&l1))?;
            Ok(())
        })
    }

    /// Keeps what is on the disk now as a snapshot.
    pub fn create_snapshot(&mut self, name: &str) -> Result<()> {
        self.check_internal()?;
        let mut all = self.snapshots()?;
        if name.is_empty() || name.len() > 255 || all.iter().any(|s| s.name == name) {
            let what = format!("a snapshot cannot be called {name:?}, or there is one already");
            return Err(Error::Invalid(what));
        }
        let most = self.tables().refcounts.max();
        if all.len() as u64 + 2 > most {
            let what = format!("a refcount that goes to {most} does for no further snapshot");
            return Err(Error::Invalid(what));
        }
        self.commit()?;
        let l1 = self.tables().l1.clone();
        let highest = all.iter().filter_map(|s| s.id.parse::<u64>().ok()).max();
        let size = self.size;
        self.change_header(|header, place| {
            all.push(Snapshot {
                id: (highest.unwrap_or(0) + 1).to_string(),
                name: name.to_owned(),
                time: SystemTime::now(),
                size,
                machine_state: 0,
                l1_offset: place(&numbers(&l1))?,
                l1_entries: l1.len() as u32,
                clock: 0,
                extra: Vec::new(),
            });
            header.snapshots = all.len() as u32;
            header.snapshots_offset = place(&encode(&all))?;
            Ok(())
        })
    }

    /// Forgets the snapshot with this ID or name.
    pub fn delete_snapshot(&mut self, which: &str) -> Result<()> {
        self.check_internal()?;
        let (number, mut all) = self.snapshot(which)?;
        all.remove(number);
        self.change_header(|header, place| {
            header.snapshots = all.len() as u32;
            header.snapshots_offset = if all.is_empty() {
                0
            } else {
                place(&encode(&all))?
            };
            Ok(())
        })
    }

    /// Snapshots share clusters, which data in a file of its own has none of.
    fn check_internal(&self) -> Result<()> {
        self.check_change(0, 0)?;
        if self.layout.external {
            let what = "images with a data file have no snapshots".to_owned();
            return Err(Error::Unsupported(what));
        }
        Ok(())
    }

    /// Changes what the header leads to. `place` puts bytes where there is room and returns their
    /// host offset. References are counted anew.
    pub(super) fn change_header(
        &mut self,
        change: impl FnOnce(&mut Header, &mut dyn FnMut(&[u8]) -> Result<u64>) -> Result<()>,
    ) -> Result<()> {
        self.commit()?;
        let mut guard = self.tables();
        let tables = &mut *guard;
        let mut header = tables.header.clone();
        let refcounts = &mut tables.refcounts;
        let mut place = |bytes: &[u8]| refcounts.place(&self.file, bytes);
        change(&mut header, &mut place)?;
        refcounts.tell(&mut header);
        if header.version >= 3 {
            header.incompatible |= Incompatible::DIRTY;
        }
        drop(guard);
        // what was placed, and its refcounts, before the header leads there
        self.commit()?;
        self.file.sync()?;
        self.file.write_bytes(0, &header.encode()?)?;
        self.file.sync()?;
        self.reopen()?;
        self.check(Repair::References)?;
        self.close()
    }
}
