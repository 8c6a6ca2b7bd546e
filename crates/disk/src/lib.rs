//! Disk images: what a guest's disk is kept in on the host.
//!
//! ```text
//!   virtio-blk, `strata disk` ──► Disk ──┬── Raw ────────────────────────────► HostFile
//!                                        ├── Qcow2 ── tables, refcounts ─────► HostFile
//!                                        │     └───── backing image ─────────► Disk
//!                                        └── ReadOnlyDisk
//!                                              ├── VHD, VHDX, VMDK ──────────► HostFile
//!                                              └── Partitions, of several ───► Disk
//! ```
//!
//! A [`Disk`] is a row of bytes that several threads read and write at once. What a flush said is
//! durable survives the end of the process and of the host, at any moment.
//!
//! This crate knows nothing of guests or of how disks are attached to them.

mod blocks;
mod buffers;
mod copy;
mod crypt;
mod error;
mod gpt;
mod host;
mod open;
mod overlay;
mod pieces;
pub mod qcow2;
mod raw;
mod read_only;
mod resume;
mod vhd;
mod vhdx;
mod vmdk;

use std::fmt::Debug;

pub use buffers::Buffers;
pub use copy::{Copied, copy};
pub use crypt::{Cipher, Hash, Passphrase};
pub use error::{Error, Result};
pub use gpt::Partitions;
pub use host::HostFile;
pub use open::{Format, Key, OpenError, Opened, export, open, open_file, open_with};
pub use qcow2::Qcow2;
pub use raw::Raw;
pub use read_only::ReadOnlyDisk;
pub use resume::{Journal, copy_on, first_difference, journal_path};

/// Bytes in a sector, in which guests count.
pub const SECTOR_SIZE: u64 = 512;

/// A row of bytes on the host. Requests may come from several threads at once; those that overlap
/// are done in some order, as on any disk.
pub trait Disk: Send + Sync + Debug {
    /// Bytes of the disk, as a guest sees it.
    fn size(&self) -> u64;

    /// Fills `buffers` from byte `offset` on. All is within the size.
    fn read(&self, offset: u64, buffers: Buffers) -> Result<()>;

    /// Writes `buffers` from byte `offset` on. All is within the size.
    fn write(&self, offset: u64, buffers: Buffers) -> Result<()>;

    /// Makes bytes zeroes. With `unmap`, the host may give up the space that holds them.
    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> Result<()>;

    /// The bytes are no longer of use: afterwards they are what they were or zeroes.
    fn discard(&self, offset: u64, length: u64) -> Result<()>;

    /// Makes everything durable that was written before.
    fn flush(&self) -> Result<()>;

    /// Bytes that are best changed together, such as a cluster: a power of two.
    fn unit(&self) -> u64 {
        4096
    }

    /// What there is at `offset`, and how far it goes on, up to `length` bytes; `length` is not 0.
    fn extent(&self, offset: u64, length: u64) -> Result<Extent>;
}

/// Bytes of a disk that are of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// How many.
    pub length: u64,
    /// What they are.
    pub kind: ExtentKind,
    /// Which image they are in: 0 is this one, 1 the one it is based on, and so forth.
    pub depth: u32,
}

/// Where the bytes of an extent are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// In the image's file, one after the other, from this byte on.
    Data(u64),
    /// In the image's file, compressed.
    Compressed,
    /// Nowhere: the image says that they are zeroes.
    Zero,
    /// Nowhere: no image says anything of them, so they are zeroes.
    Absent,
}

impl ExtentKind {
    /// Whether the bytes are zeroes, and need not be read.
    pub fn is_zero(self) -> bool {
        matches!(self, Self::Zero | Self::Absent)
    }
}
