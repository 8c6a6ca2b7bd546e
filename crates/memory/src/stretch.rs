//! Pieces of guest RAM mapped a second time, side by side in an order of their own. The software
//! CPU maps large pages as a guest program has them, to reach all of an array by one distance.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::{GuestMemory, PAGE_SIZE};

/// Host addresses set aside for pieces of one size. They are given back when this is dropped; until
/// then nothing but guest RAM is ever there.
#[derive(Debug)]
pub struct Stretch {
    start: NonNull<u8>,
    capacity: usize,
    piece: u64,
    memory: GuestMemory,
}

// SAFETY: the mapping is owned by this value alone and moves with it.
unsafe impl Send for Stretch {}

impl Stretch {
    /// Room for `capacity` pieces of `piece` bytes each, both more than none and `piece` a multiple of
    /// the page size; else, fails with `InvalidInput`.
    pub fn new(memory: &GuestMemory, piece: u64, capacity: usize) -> io::Result<Self> {
        let bytes = usize::try_from(piece).ok();
        let size = bytes.and_then(|bytes| bytes.checked_mul(capacity));
        let size = size.filter(|size| *size > 0 && piece.is_multiple_of(PAGE_SIZE));
        let size = size.ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: new memory at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            start: NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?,
            capacity,
            piece,
            memory: memory.clone(),
        })
    }

    /// Where the first piece is.
    pub fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Maps the pieces that begin at these guest physical addresses, in this order, instead of as many
    /// that were there. Fails with `InvalidInput` if there are too many, or one of them is not
    /// page-aligned or not all RAM; some may have been mapped then.
    pub fn map(&mut self, pieces: &[u64]) -> io::Result<()> {
        if pieces.len() > self.capacity {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        for (number, piece) in pieces.iter().enumerate() {
            let (file, offset) = self.in_file(*piece).ok_or(io::ErrorKind::InvalidInput)?;
            // SAFETY: within what was set aside; memory of the guest's replaces memory of the
            // guest's or nothing, and nobody holds Rust references to either.
            let mapped = unsafe {
                libc::mmap(
                    self.start().add(number * self.piece as usize).cast(),
                    self.piece as usize,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE,
                    file.as_raw_fd(),
                    offset as libc::off_t,
                )
            };
            if mapped == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }

    /// Where a piece is in the file that holds guest RAM.
    fn in_file(&self, piece: u64) -> Option<(&File, u64)> {
        let host = self.memory.host_ptr(piece, self.piece);
        host.filter(|_| piece.is_multiple_of(PAGE_SIZE))?;
        let region = self.memory.ram.find_region(GuestAddress(piece))?;
        let file = region.file_offset()?;
        Some((file.file(), file.start() + (piece - region.start_addr().0)))
    }
}

impl Drop for Stretch {
    fn drop(&mut self) {
        // SAFETY: the mapping is of this size, and whoever had pointers into it kept the value.
        unsafe {
            libc::munmap(
                self.start.as_ptr().cast(),
                self.capacity * self.piece as usize,
            )
        };
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::{MMIO_HOLE_END, MMIO_HOLE_START};

    #[test]
    fn pieces_lie_side_by_side_in_the_order_asked_for() {
        let memory = GuestMemory::new(MMIO_HOLE_START + 0x4000).unwrap();
        for (value, address) in [(1_u8, 0x5000), (2, MMIO_HOLE_END + 0x2000), (3, 0)] {
            memory
                .ram()
                .write_obj(value, GuestAddress(address))
                .unwrap();
        }

        let mut stretch = Stretch::new(&memory, 0x1000, 3).unwrap();
        stretch.map(&[0x1000, 0x2000, 0x3000]).unwrap();
        stretch.map(&[MMIO_HOLE_END + 0x2000, 0, 0x5000]).unwrap();

        // SAFETY: three pages that are mapped.
        let values = [0, 1, 2].map(|page| unsafe { *stretch.start().add(page * 0x1000) });
        assert_eq!(values, [2, 3, 1]);
        // SAFETY: as above.
        unsafe { stretch.start().add(0x2001).write(7) };
        let seen: u8 = memory.ram().read_obj(GuestAddress(0x5001)).unwrap();
        assert_eq!(seen, 7);
    }

    #[test]
    fn pieces_that_are_not_ram_or_do_not_fit_are_refused() {
        let memory = GuestMemory::new(0x4000).unwrap();
        let mut stretch = Stretch::new(&memory, 0x2000, 2).unwrap();
        for pieces in [&[0x3000][..], &[0, 0x4000], &[0x800], &[0, 0, 0]] {
            let error = stretch.map(pieces).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{pieces:x?}");
        }
        for (piece, capacity) in [(0x800, 1), (0, 1), (0x1000, 0), (1 << 63, 2)] {
            assert!(Stretch::new(&memory, piece, capacity).is_err());
        }
    }
}
