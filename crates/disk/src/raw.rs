//! Raw images and block devices: the bytes of the disk, one after the other.

use crate::error::{Error, Result};
use crate::{Buffers, Disk, Extent, ExtentKind, HostFile};

/// See the module.
#[derive(Debug)]
pub struct Raw {
    file: HostFile,
    size: u64,
    writable: bool,
}

impl Raw {
    /// The disk that `file` is, which was opened for writing if it is to be `writable`.
    pub fn open(file: HostFile, writable: bool) -> Result<Self> {
        let size = file.size()?;
        Ok(Self {
            file,
            size,
            writable,
        })
    }

    fn check(&self, offset: u64, length: u64, change: bool) -> Result<()> {
        if change && !self.writable {
            return Err(Error::ReadOnly);
        }
        match offset.checked_add(length).filter(|end| *end <= self.size) {
            Some(_) => Ok(()),
            None => Err(Error::Invalid("beyond the end of the disk".to_owned())),
        }
    }
}

impl Disk for Raw {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, buffers: Buffers) -> Result<()> {
        self.check(offset, buffers.len(), false)?;
        // a file that became shorter is no disk of zeroes
        Ok(self.file.read_exact(offset, buffers)?)
    }

    fn write(&self, offset: u64, buffers: Buffers) -> Result<()> {
        self.check(offset, buffers.len(), true)?;
        Ok(self.file.write(offset, buffers)?)
    }

    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> Result<()> {
        self.check(offset, length, true)?;
        if !(unmap && self.file.punch(offset, length)?) {
            self.file.write_zeroes(offset, length)?;
        }
        Ok(())
    }

    fn discard(&self, offset: u64, length: u64) -> Result<()> {
        self.check(offset, length, true)?;
        // only a hint: a host that cannot keeps the blocks
        self.file.punch(offset, length)?;
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(self.file.sync()?)
    }

    fn extent(&self, offset: u64, length: u64) -> Result<Extent> {
        self.check(offset, length, false)?;
        let data = self.file.next_data(offset)?;
        let (end, kind) = if data.start <= offset && !data.is_empty() {
            (data.end, ExtentKind::Data(offset))
        } else {
            (data.start.max(offset), ExtentKind::Zero)
        };
        let end = if end == offset { offset + length } else { end };
        Ok(Extent {
            length: length.min(end - offset),
            kind,
            depth: 0,
        })
    }
}
