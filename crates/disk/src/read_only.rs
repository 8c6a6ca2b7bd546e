//! Disks that are only read: what they are not asked to do is refused in one place.

use crate::error::{Error, Result};
use crate::{Buffers, Disk, Extent};

/// A [`Disk`] that nobody writes to: an image of a format that is only read, or a view of others.
pub trait ReadOnlyDisk: Send + Sync + std::fmt::Debug {
    /// See [`Disk::size`].
    fn size(&self) -> u64;

    /// See [`Disk::read`].
    fn read(&self, offset: u64, buffers: Buffers) -> Result<()>;

    /// See [`Disk::extent`].
    fn extent(&self, offset: u64, length: u64) -> Result<Extent>;
}

impl<T: ReadOnlyDisk> Disk for T {
    fn size(&self) -> u64 {
        ReadOnlyDisk::size(self)
    }

    fn read(&self, offset: u64, buffers: Buffers) -> Result<()> {
        ReadOnlyDisk::read(self, offset, buffers)
    }

    fn write(&self, _: u64, _: Buffers) -> Result<()> {
        Err(Error::ReadOnly)
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<()> {
        Err(Error::ReadOnly)
    }

    fn discard(&self, _: u64, _: u64) -> Result<()> {
        Err(Error::ReadOnly)
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn extent(&self, offset: u64, length: u64) -> Result<Extent> {
        ReadOnlyDisk::extent(self, offset, length)
    }
}
