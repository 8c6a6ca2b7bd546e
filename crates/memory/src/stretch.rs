//! Pieces of guest RAM mapped a second time, side by side in an order of their own. The software
//! CPU maps large pages as a guest program has them, to reach all of an array by one distance.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::{GuestMemory, PAGE_SIZE, Ram};

/// See the module. It is unmapped when dropped.
#[derive(Debug)]
pub struct Stretch {
    start: NonNull<u8>,
    size: usize,
    /// What the pieces are of.
    _ram: Ram,
}

// SAFETY: the mapping is owned by this value alone and moves with it.
unsafe impl Send for Stretch {}

impl Stretch {
    /// Where the first piece is.
    pub fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Maps the page-aligned pieces of `size` bytes that begin at guest physical addresses
    /// `pieces`, in this order. Fails with `InvalidInput` if one of them is not all RAM.
    pub fn new(memory: &GuestMemory, pieces: &[u64], size: u64) -> io::Result<Self> {
        let whole = pieces.len() * size as usize;
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        if whole == 0 || !size.is_multiple_of(PAGE_SIZE) {
            return Err(invalid());
        }
        // SAFETY: new memory at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                whole,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let stretch = Self {
            start: NonNull::new(start.cast()).ok_or_else(invalid)?,
            size: whole,
            _ram: memory.ram.clone(),
        };
        for (number, piece) in pieces.iter().enumerate() {
            let inside = |r: &&_| {
                let region: &vm_memory::GuestRegionMmap<_> = r;
                let offset = piece.checked_sub(region.start_addr().0);
                offset.is_some_and(|o| o < region.len() && size <= region.len() - o)
            };
            let region = memory.ram.iter().find(inside).ok_or_else(invalid)?;
            let file = region.file_offset().ok_or_else(invalid)?;
            let offset = file.start() + (piece - region.start_addr().0);
            if !offset.is_multiple_of(PAGE_SIZE) {
                return Err(invalid());
            }
            // SAFETY: replaces a part of the mapping that was just made, which nobody uses yet,
            // by memory of the guest's, to which nobody holds Rust references.
            let mapped = unsafe {
                libc::mmap(
                    stretch.start.as_ptr().add(number * size as usize).cast(),
                    size as usize,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE,
                    file.file().as_raw_fd(),
                    offset as libc::off_t,
                )
            };
            if mapped == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(stretch)
    }
}

impl Drop for Stretch {
    fn drop(&mut self) {
        // SAFETY: the mapping is of this size, and whoever had pointers into it kept the value.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.size) };
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

        let pieces = [MMIO_HOLE_END + 0x2000, 0, 0x5000];
        let stretch = Stretch::new(&memory, &pieces, 0x1000).unwrap();

        // SAFETY: three pages that are mapped.
        let values = [0, 1, 2].map(|page| unsafe { *stretch.start().add(page * 0x1000) });
        assert_eq!(values, [2, 3, 1]);
        // SAFETY: as above.
        unsafe { stretch.start().add(0x2001).write(7) };
        let seen: u8 = memory.ram().read_obj(GuestAddress(0x5001)).unwrap();
        assert_eq!(seen, 7);
    }

    #[test]
    fn a_piece_that_is_not_all_ram_is_refused() {
        let memory = GuestMemory::new(0x4000).unwrap();
        for pieces in [&[0x3000_u64][..], &[0, 0x4000], &[]] {
            assert!(Stretch::new(&memory, pieces, 0x2000).is_err());
        }
    }
}
