//! Memory for the address spaces of one vCPU: taken at once, so that the process can be locked
//! up afterwards, and touched only where it is used. Called by `mmu` and `flush`.

use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use super::space::AddressSpace;
use crate::memfd::memfd;

/// Address spaces kept; Linux uses six PCIDs and two for flushes.
const SPACES: usize = 10;
/// Bytes of all of them.
const SIZE: usize = SPACES * size_of::<AddressSpace>();

/// The address spaces that were used so far.
pub(super) struct Spaces {
    start: NonNull<AddressSpace>,
    count: usize,
}

// SAFETY: the mapping is owned by this value alone and moves with it.
unsafe impl Send for Spaces {}

impl Spaces {
    /// None yet.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            start: map()?,
            count: 0,
        })
    }

    /// One more, unless there are as many as are kept; its index.
    pub(super) fn add(&mut self) -> Option<usize> {
        if self.count == SPACES {
            return None;
        }
        let new = self.count;
        // SAFETY: within the mapping, which was zeroes and is not used from `count` on.
        unsafe { AddressSpace::init(self.start.add(new).as_ptr()) };
        self.count += 1;
        Some(new)
    }
}

fn map() -> io::Result<NonNull<AddressSpace>> {
    let file = memfd(c"strata-tlb", SIZE)?;
    // SAFETY: a fresh mapping of a file that nobody else has; no address is given.
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            SIZE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(start.cast()).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

impl Deref for Spaces {
    type Target = [AddressSpace];

    fn deref(&self) -> &[AddressSpace] {
        // SAFETY: the first `count` were initialised; translated code, which reads them too,
        // does not run meanwhile.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.count) }
    }
}

impl DerefMut for Spaces {
    fn deref_mut(&mut self) -> &mut [AddressSpace] {
        // SAFETY: as above, with the exclusive borrow of `self`.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.count) }
    }
}

impl Drop for Spaces {
    fn drop(&mut self) {
        // SAFETY: the first `count` were initialised and nothing refers to them any more; the
        // mapping is of this size.
        unsafe {
            std::ptr::drop_in_place(&raw mut **self);
            libc::munmap(self.start.as_ptr().cast(), SIZE);
        }
    }
}
