//! The qcow2 format, versions 2 and 3, as QEMU's docs/interop/qcow2.rst has it.
//!
//! ```text
//!   requests ──► transfer ──► tables (L1, L2) ──► slices ──┐
//!                   │            └── refcounts ──► slices ──┤ commit: data, then tables
//!                   └─ data ───────────────────────────────┴──► HostFile
//! ```
//!
//! One lock is around the tables; data moves without it. A cluster that is being moved, to where
//! it may be written, is *busy*: who wants it too waits. A cluster that is no longer used is free
//! again when the file says so and every request that began before is done.
//!
//! Changed tables stay in memory until a flush. It makes data durable before the tables that lead
//! to it. While it has changed tables, a version 3 image is marked dirty: after a crash its refcounts
//! are made anew from its tables when it is opened.

mod bitmaps;
mod chain;
mod check;
mod commit;
mod compressed;
mod create;
mod encryption;
mod header;
mod layout;
mod refcounts;
mod slices;
mod snapshots;
mod tables;
mod transfer;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};

pub use check::{Repair, Report};
use compressed::Inflated;
pub use create::{Options, Secret, create};
use encryption::Secrecy;
pub use header::Compression;
use header::{Compatible, Header, Incompatible};
use layout::{Layout, Place};
pub use snapshots::Snapshot;
use tables::Tables;

use crate::error::{Error, Result};
use crate::{Buffers, Disk, Extent, ExtentKind, HostFile};

/// An open image.
#[derive(Debug)]
pub struct Qcow2 {
    file: HostFile,
    /// Where data is, if not in the same file.
    data_file: Option<HostFile>,
    backing: Option<Arc<dyn Disk>>,
    writable: bool,
    size: u64,
    layout: Layout,
    compression: Compression,
    secrecy: Secrecy,
    tables: Mutex<Tables>,
    inflated: Inflated,
    /// A cluster is no longer busy.
    settled: Condvar,
    /// Requests hold it to read; who frees clusters, to write.
    requests: RwLock<()>,
    /// Held by who makes changes durable.
    commit: Mutex<()>,
}

/// What an image's header says that has to be opened along with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct References {
    /// The image that this one is based on, as it is written there: relative to this one, if it is
    /// no absolute path.
    pub backing: Option<String>,
    /// Its format, if that is said.
    pub backing_format: Option<String>,
    /// The file that data is in, if not in this one.
    pub data_file: Option<String>,
}

/// The references of the image in a file.
pub fn references(file: &HostFile) -> Result<References> {
    let header = read_header(file)?;
    let external = header.incompatible.contains(Incompatible::DATA_FILE);
    Ok(References {
        backing: header.backing_name,
        backing_format: header.backing_format,
        data_file: header.data_file.filter(|_| external),
    })
}

/// What an image is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Version of the format.
    pub version: u32,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of a cluster.
    pub cluster_size: u64,
    /// How clusters are compressed, if any are.
    pub compression: Compression,
    /// Whether parts of clusters have states of their own.
    pub extended_l2: bool,
    /// Whether refcounts may be written late.
    pub lazy_refcounts: bool,
    /// Bits of a refcount.
    pub refcount_bits: u32,
    /// Whether it was not closed: opening it for writing mends its refcounts.
    pub dirty: bool,
    /// How data is encrypted, if it is.
    pub encryption: Option<String>,
    /// Whether it is known to be damaged.
    pub corrupt: bool,
    /// How many snapshots are in it.
    pub snapshots: u32,
}

/// What the image in a file is like.
pub fn facts(file: &HostFile) -> Result<Facts> {
    let header = read_header(file)?;
    Ok(Facts {
        version: header.version,
        size: header.size,
        cluster_size: 1 << header.cluster_bits,
        compression: header.compression,
        extended_l2: header.has_subclusters(),
        lazy_refcounts: header.compatible.contains(Compatible::LAZY_REFCOUNTS),
        refcount_bits: 1 << header.refcount_order,
        dirty: header.incompatible.contains(Incompatible::DIRTY),
        corrupt: header.incompatible.contains(Incompatible::CORRUPT),
        snapshots: header.snapshots,
        encryption: encryption::describe(file, &header)?,
    })
}

fn read_header(file: &HostFile) -> Result<Header> {
    let mut first = vec![0; 512];
    file.read_bytes(0, &mut first)?;
    first.resize(Header::extent(&first)?, 0);
    file.read_bytes(0, &mut first)?;
    Header::parse(&first)
}

impl Qcow2 {
    /// Opens the image in `file`, which was opened for writing if it is to be `writable`. `backing`
    /// and `data_file` are what its [`References`] say.
    pub fn open(
        file: HostFile,
        backing: Option<Arc<dyn Disk>>,
        data_file: Option<HostFile>,
        writable: bool,
    ) -> Result<Self> {
        let header = read_header(&file)?;
        let external = header.incompatible.contains(Incompatible::DATA_FILE);
        if external != data_file.is_some() {
            return Err(Error::Invalid("the image needs its data file".to_owned()));
        }
        Self::with_header(file, header, backing, data_file, writable)
    }

    /// Opens an image for its tables alone: data of its own or of what it is based on is not to be
    /// had.
    pub fn open_tables(file: HostFile, writable: bool) -> Result<Self> {
        let header = read_header(&file)?;
        Self::with_header(file, header, None, None, writable)
    }

    fn with_header(
        file: HostFile,
        header: Header,
        backing: Option<Arc<dyn Disk>>,
        data_file: Option<HostFile>,
        writable: bool,
    ) -> Result<Self> {
        let size = header.size;
        let tables = Tables::open(&file, header)?;
        if writable {
            tables.check_writable()?;
        }
        let dirty = tables.header.incompatible.contains(Incompatible::DIRTY);
        let mut image = Self {
            file,
            data_file,
            backing,
            writable,
            size,
            layout: tables.layout,
            compression: tables.header.compression,
            secrecy: match tables.header.encryption {
                None => Secrecy::Open,
                Some(_) => Secrecy::Locked,
            },
            tables: Mutex::new(tables),
            inflated: Inflated::default(),
            settled: Condvar::new(),
            requests: RwLock::new(()),
            commit: Mutex::new(()),
        };
        if writable && dirty {
            image.recover()?;
        }
        Ok(image)
    }

    /// Makes refcounts what they should be, after a crash.
    fn recover(&mut self) -> Result<()> {
        self.tables().marked = true;
        let report = self.check(Repair::References)?;
        if report.damages + report.leaks > 0 {
            tracing::info!(
                repaired = report.repaired,
                "refcounts were mended after a crash"
            );
        }
        if !report.is_clean() {
            return Err(Error::Damaged(report.findings.join("; ")));
        }
        self.close()
    }

    /// Reads the header and the tables again.
    fn reopen(&mut self) -> Result<()> {
        let header = read_header(&self.file)?;
        self.size = header.size;
        let mut tables = Tables::open(&self.file, header)?;
        tables.marked = true;
        self.layout = tables.layout;
        self.tables = Mutex::new(tables);
        self.forget_inflated();
        Ok(())
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        // whoever panicked did so before or behind a change, not within
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where data is.
    fn data(&self) -> &HostFile {
        self.data_file.as_ref().unwrap_or(&self.file)
    }

    fn check_range(&self, offset: u64, length: u64) -> Result<()> {
        self.check_sectors(offset, length)?;
        let end = offset.checked_add(length).filter(|end| *end <= self.size);
        match end {
            Some(_) => Ok(()),
            None => Err(Error::Invalid("beyond the end of the disk".to_owned())),
        }
    }

    fn check_change(&self, offset: u64, length: u64) -> Result<()> {
        if !self.writable {
            return Err(Error::ReadOnly);
        }
        self.check_range(offset, length)
    }
}

impl Disk for Qcow2 {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, buffers: Buffers) -> Result<()> {
        self.check_range(offset, buffers.len())?;
        let _request = self.requests.read().unwrap_or_else(PoisonError::into_inner);
        self.read_all(offset, buffers)
    }

    fn write(&self, offset: u64, buffers: Buffers) -> Result<()> {
        self.check_change(offset, buffers.len())?;
        {
            let _request = self.requests.read().unwrap_or_else(PoisonError::into_inner);
            self.write_all(offset, buffers)?;
        }
        self.commit_if_full()
    }

    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> Result<()> {
        self.check_change(offset, length)?;
        {
            let _request = self.requests.read().unwrap_or_else(PoisonError::into_inner);
            self.zero_all(offset, length, unmap)?;
        }
        self.commit_if_full()
    }

    fn discard(&self, offset: u64, length: u64) -> Result<()> {
        self.check_change(offset, length)?;
        {
            let _request = self.requests.read().unwrap_or_else(PoisonError::into_inner);
            self.discard_all(offset, length)?;
        }
        self.commit_if_full()
    }

    fn flush(&self) -> Result<()> {
        if self.writable { self.commit() } else { Ok(()) }
    }

    fn unit(&self) -> u64 {
        self.layout.cluster_size()
    }

    fn extent(&self, offset: u64, length: u64) -> Result<Extent> {
        self.check_range(offset, length)?;
        let found = self.tables().find(&self.file, offset, length)?;
        let here = |kind| Extent {
            length: found.length,
            kind,
            depth: 0,
        };
        Ok(match found.place {
            Place::Data(host, _) => here(ExtentKind::Data(host)),
            Place::Zero => here(ExtentKind::Zero),
            Place::Compressed(_) => here(ExtentKind::Compressed),
            Place::Backing => {
                let below = self.backing.as_ref().map(|disk| (disk, disk.size()));
                match below.filter(|(_, size)| offset < *size) {
                    None => here(ExtentKind::Absent),
                    Some((disk, size)) => {
                        let extent = disk.extent(offset, found.length.min(size - offset))?;
                        Extent {
                            depth: extent.depth + 1,
                            ..extent
                        }
                    }
                }
            }
        })
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        if self.writable
            && let Err(error) = self.close()
        {
            tracing::warn!(%error, "an image could not be closed cleanly");
        }
    }
}
