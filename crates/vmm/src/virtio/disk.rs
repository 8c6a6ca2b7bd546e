//! A disk's file on the host: opening it, with errors that say what to do, and carrying
//! out what a virtio-blk request asks. Called by the block workers, several at once.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use strata_devices::virtio::{Action, SECTOR_SIZE, SectorRange, Segment, Status};
use strata_memory::vm_memory::bitmap::BitmapSlice;
use strata_memory::vm_memory::{GuestMemory as _, GuestMemoryError, Permissions, VolatileSlice};
use strata_memory::{GuestAddress, Ram};

use super::sys;

/// Failed requests are logged this many times for each disk, then no more.
const MAX_COMPLAINTS: u32 = 8;
/// Zeroes are written in pieces of this many bytes where the host cannot make them.
const ZERO_PIECE: u64 = 256 << 10;

/// Why a file cannot be a disk. The text names the file and says what to do.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// There is no such file.
    #[error(
        "disk {0} does not exist; check the path, or make it: truncate -s 1G {0}",
        path.display()
    )]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// It is a directory, socket, pipe or terminal.
    #[error("disk {} is {what}; a disk is a raw image file or a block device", path.display())]
    NotADisk {
        /// The file.
        path: PathBuf,
        /// What it is, with its article.
        what: &'static str,
    },
    /// The file may not be read.
    #[error("disk {} may not be read by this user; change its permissions or owner", path.display())]
    NotReadable {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file may be read but not written.
    #[error(
        "disk {} may not be written by this user; change its permissions, or attach it read-only",
        path.display()
    )]
    NotWritable {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Another process, or this machine already, uses it.
    #[error(
        "disk {} is in use by another machine or process (or attached twice); stop that one, \
         or attach the disk read-only in all of them",
        path.display()
    )]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The file is empty.
    #[error("disk {} is empty; give it a size: truncate -s 1G {0}", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// The size is no multiple of a sector.
    #[error(
        "disk {} is {size} bytes long, which is not a multiple of 512; is it a raw image? \
         To pad it: truncate -s %512 {0}",
        path.display()
    )]
    OddSize {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// Anything else.
    #[error("disk {} cannot be opened", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// An open, locked disk.
#[derive(Debug)]
pub struct Disk {
    file: File,
    read_only: bool,
    path: PathBuf,
    size: u64,
    complaints: AtomicU32,
}

impl Disk {
    /// Opens and locks a raw image or block device: for this machine alone, or if
    /// `read_only`, together with others that only read.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, DiskError> {
        let path = path.to_path_buf();
        // A block device that is mounted refuses to be opened exclusively.
        let exclusive = check_kind(&path)? == Kind::BlockDevice && !read_only;
        let mut file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(if exclusive { libc::O_EXCL } else { 0 })
            .open(&path)
            .map_err(|source| open_error(&path, read_only, source))?;
        let lock = if read_only {
            file.try_lock_shared()
        } else {
            file.try_lock()
        };
        match lock {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(DiskError::InUse { path }),
            // Some network file systems have no locks.
            Err(TryLockError::Error(error)) => {
                tracing::warn!(disk = %path.display(), %error, "the disk cannot be locked");
            }
        }
        // The end, not the metadata: block devices have no length there.
        let size = match file.seek(SeekFrom::End(0)) {
            Ok(size) => size,
            Err(source) => return Err(DiskError::Io { path, source }),
        };
        if size == 0 {
            return Err(DiskError::Empty { path });
        }
        if !size.is_multiple_of(SECTOR_SIZE) {
            return Err(DiskError::OddSize { path, size });
        }
        Ok(Self {
            file,
            read_only,
            path,
            size,
            complaints: AtomicU32::new(0),
        })
    }

    /// Whether it is only read.
    pub(super) fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Size in sectors of 512 bytes.
    pub(super) fn sectors(&self) -> u64 {
        self.size / SECTOR_SIZE
    }

    /// Carries out a request and returns how it ended.
    pub(super) fn perform(&self, memory: &Ram, action: &Action) -> Status {
        let result = match action {
            Action::Answer(status) => return *status,
            Action::Read { offset, buffers } => self.read(memory, *offset, buffers),
            Action::Write {
                offset,
                buffers,
                durable,
            } => self
                .write(memory, *offset, buffers)
                .and_then(|()| self.sync_if(*durable)),
            Action::Flush => self.file.sync_data(),
            Action::Discard(ranges) => ranges.iter().try_for_each(|r| self.discard(r)),
            Action::WriteZeroes { ranges, durable } => ranges
                .iter()
                .try_for_each(|r| self.write_zeroes(r))
                .and_then(|()| self.sync_if(*durable)),
        };
        match result {
            Ok(()) => Status::Ok,
            Err(error) => {
                if self.complaints.fetch_add(1, Ordering::Relaxed) < MAX_COMPLAINTS {
                    let disk = self.path.display();
                    tracing::warn!(%disk, %error, "the guest's disk request failed");
                }
                Status::IoError
            }
        }
    }

    fn sync_if(&self, durable: bool) -> io::Result<()> {
        if durable {
            self.file.sync_data()
        } else {
            Ok(())
        }
    }

    fn read(&self, memory: &Ram, offset: u64, buffers: &[Segment]) -> io::Result<()> {
        let slices = slices(memory, buffers.iter().copied(), Permissions::Write)?;
        transfer(slices, offset, |slices, at| {
            sys::read_at(&self.file, slices, at)
        })
    }

    fn write(&self, memory: &Ram, offset: u64, buffers: &[Segment]) -> io::Result<()> {
        let slices = slices(memory, buffers.iter().copied(), Permissions::Read)?;
        transfer(slices, offset, |slices, at| {
            sys::write_at(&self.file, slices, at)
        })
    }

    /// Whether the host could do it; `false` if it cannot do such a thing at all.
    fn allocate(&self, flags: FallocateFlags, range: &SectorRange) -> io::Result<bool> {
        loop {
            let keep = flags | FallocateFlags::KEEP_SIZE;
            match fallocate(&self.file, keep, range.offset, range.length) {
                Ok(()) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn discard(&self, range: &SectorRange) -> io::Result<()> {
        if range.length > 0 {
            // Only a hint: a host that cannot keeps the blocks.
            self.allocate(FallocateFlags::PUNCH_HOLE, range)?;
        }
        Ok(())
    }

    fn write_zeroes(&self, range: &SectorRange) -> io::Result<()> {
        if range.length == 0
            || range.may_unmap && self.allocate(FallocateFlags::PUNCH_HOLE, range)?
            || self.allocate(FallocateFlags::ZERO_RANGE, range)?
        {
            return Ok(());
        }
        let zeroes = vec![0; ZERO_PIECE.min(range.length) as usize];
        let mut done = 0;
        while done < range.length {
            let length = ZERO_PIECE.min(range.length - done);
            self.file
                .write_all_at(&zeroes[..length as usize], range.offset + done)?;
            done += length;
        }
        Ok(())
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    File,
    BlockDevice,
}

fn check_kind(path: &Path) -> Result<Kind, DiskError> {
    let path = path.to_path_buf();
    let kind = match fs::metadata(&path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Err(DiskError::Missing { path });
        }
        Err(source) if source.kind() == ErrorKind::PermissionDenied => {
            return Err(DiskError::NotReadable { path, source });
        }
        Err(source) => return Err(DiskError::Io { path, source }),
    };
    let what = match kind {
        _ if kind.is_file() => return Ok(Kind::File),
        _ if kind.is_block_device() => return Ok(Kind::BlockDevice),
        _ if kind.is_dir() => "a directory",
        _ if kind.is_char_device() => "a character device",
        _ if kind.is_fifo() => "a pipe",
        _ => "a socket",
    };
    Err(DiskError::NotADisk { path, what })
}

fn open_error(path: &Path, read_only: bool, source: io::Error) -> DiskError {
    let path = path.to_path_buf();
    match source.kind() {
        ErrorKind::NotFound => DiskError::Missing { path },
        ErrorKind::ReadOnlyFilesystem => DiskError::NotWritable { path, source },
        ErrorKind::PermissionDenied if !read_only && File::open(&path).is_ok() => {
            DiskError::NotWritable { path, source }
        }
        ErrorKind::PermissionDenied => DiskError::NotReadable { path, source },
        // A block device that is mounted, or a program that runs.
        ErrorKind::ResourceBusy | ErrorKind::ExecutableFileBusy => DiskError::InUse { path },
        _ => DiskError::Io { path, source },
    }
}

pub(super) type Slices<'a> = Vec<VolatileSlice<'a, strata_memory::CodeTracker>>;

/// The host's view of `buffers`.
pub(super) fn slices(
    memory: &Ram,
    buffers: impl IntoIterator<Item = Segment>,
    access: Permissions,
) -> io::Result<Slices<'_>> {
    let invalid = |e: GuestMemoryError| io::Error::new(ErrorKind::InvalidInput, e);
    let mut slices = Vec::new();
    for buffer in buffers {
        let start = GuestAddress(buffer.address);
        let parts = memory
            .get_slices(start, buffer.length as usize, access)
            .map_err(invalid)?;
        for part in parts {
            slices.push(part.map_err(invalid)?);
        }
    }
    Ok(slices)
}

/// Repeats `step` until all of `slices` are done.
fn transfer<'a, B: BitmapSlice>(
    mut slices: Vec<VolatileSlice<'a, B>>,
    mut offset: u64,
    mut step: impl FnMut(&[VolatileSlice<'a, B>], u64) -> io::Result<usize>,
) -> io::Result<()> {
    let mut first = 0;
    while first < slices.len() {
        let mut done = match step(&slices[first..], offset) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(done) => done,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        offset += done as u64;
        while let Some(slice) = slices.get_mut(first).filter(|_| done > 0) {
            let taken = slice.len().min(done);
            done -= taken;
            if taken == slice.len() {
                first += 1;
            } else {
                *slice = slice.offset(taken).map_err(io::Error::other)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
