//! A disk of a machine: carrying out what a virtio-blk request asks. Called by the block workers,
//! several at once.

use std::io::{self, ErrorKind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use strata_devices::virtio::{Action, SECTOR_SIZE, Segment, Status};
use strata_disk::{Buffers, OpenError, Partitions};
use strata_memory::vm_memory::bitmap::Bitmap;
use strata_memory::vm_memory::{GuestMemory as _, GuestMemoryError, Permissions, VolatileSlice};
use strata_memory::{GuestAddress, Ram};

use crate::config::{DiskConfig, DiskContent, DiskImage};

/// Failed requests are logged this many times for each disk, then no more.
const MAX_COMPLAINTS: u32 = 8;

/// An open, locked disk.
#[derive(Debug)]
pub struct Disk {
    image: Arc<dyn strata_disk::Disk>,
    read_only: bool,
    /// What messages call it.
    name: String,
    complaints: AtomicU32,
}

impl Disk {
    /// Opens and locks what is on a disk: for this machine alone, or if it is only read, together with
    /// others that only read.
    pub fn open(config: &DiskConfig) -> Result<Self, OpenError> {
        match &config.content {
            DiskContent::Image(image) => Self::of_image(image, config.read_only),
            DiskContent::Partitions(images) => Self::of_partitions(images),
        }
    }

    fn of_image(image: &DiskImage, read_only: bool) -> Result<Self, OpenError> {
        let name = image.path.display().to_string();
        let key = image.passphrase.as_ref().into();
        let image = strata_disk::open_with(&image.path, image.format, !read_only, key)?;
        Ok(Self::new(image, read_only, name))
    }

    fn of_partitions(images: &[(String, DiskImage)]) -> Result<Self, OpenError> {
        let open = |(name, image): &(String, DiskImage)| {
            let key = image.passphrase.as_ref().into();
            let disk = strata_disk::open_with(&image.path, image.format, false, key)?;
            Ok((name.clone(), disk))
        };
        let disks = images.iter().map(open).collect::<Result<_, OpenError>>()?;
        let disk = Partitions::new(disks).map_err(|source| OpenError::Image {
            path: images
                .first()
                .map_or_else(PathBuf::new, |(_, i)| i.path.clone()),
            source,
        })?;
        Ok(Self::new(Arc::new(disk), true, "of partitions".to_owned()))
    }

    fn new(image: Arc<dyn strata_disk::Disk>, read_only: bool, name: String) -> Self {
        Self {
            image,
            read_only,
            name,
            complaints: AtomicU32::new(0),
        }
    }

    /// Whether it is only read.
    pub(super) fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Size in sectors of 512 bytes.
    pub(super) fn sectors(&self) -> u64 {
        self.image.size() / SECTOR_SIZE
    }

    /// Carries out a request and returns how it ended.
    pub(super) fn perform(&self, memory: &Ram, action: &Action) -> Status {
        match self.try_perform(memory, action) {
            Ok(status) => status,
            Err(error) => {
                if self.complaints.fetch_add(1, Ordering::Relaxed) < MAX_COMPLAINTS {
                    tracing::warn!(disk = %self.name, %error, "the guest's disk request failed");
                }
                Status::IoError
            }
        }
    }

    fn try_perform(&self, memory: &Ram, action: &Action) -> Result<Status, strata_disk::Error> {
        let image = &self.image;
        let mut durable = false;
        match action {
            Action::Answer(status) => return Ok(*status),
            Action::Read { offset, buffers } => self.read(memory, *offset, buffers)?,
            Action::Write {
                offset,
                buffers,
                durable: and_durable,
            } => {
                let slices = slices(memory, buffers.iter().copied(), Permissions::Read)?;
                image.write(*offset, Buffers::of_guest(&slices))?;
                durable = *and_durable;
            }
            Action::Flush => durable = true,
            Action::Discard(ranges) => {
                for range in ranges {
                    image.discard(range.offset, range.length)?;
                }
            }
            Action::WriteZeroes {
                ranges,
                durable: and_durable,
            } => {
                for range in ranges {
                    image.write_zeroes(range.offset, range.length, range.may_unmap)?;
                }
                durable = *and_durable;
            }
        }
        if durable {
            image.flush()?;
        }
        Ok(Status::Ok)
    }

    fn read(
        &self,
        memory: &Ram,
        offset: u64,
        buffers: &[Segment],
    ) -> Result<(), strata_disk::Error> {
        let slices = slices(memory, buffers.iter().copied(), Permissions::Write)?;
        let result = self.image.read(offset, Buffers::of_guest(&slices));
        // also what was read before something failed
        for slice in &slices {
            slice.bitmap().mark_dirty(0, slice.len());
        }
        result
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

#[cfg(test)]
mod tests;
