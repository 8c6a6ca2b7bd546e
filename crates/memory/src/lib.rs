//! Guest physical memory.
//!
//! ```text
//!   devices (virtqueues) ──► Ram (vm-memory, memfd) ──mark_dirty──► CodeMap ──► CodeWriteListener
//!   software CPU ─host_ptr─► the same pages, ───is_code/mark_code──► CodeMap
//! ```
//!
//! One [`GuestMemory`] is one machine's RAM. Device models reach it through the
//! [`vm_memory::GuestMemory`] trait of [`GuestMemory::ram`]; the software CPU through
//! [`GuestMemory::host_ptr`]. Both kinds of write are checked against the [`CodeMap`],
//! which knows which 64-byte granules hold translated instructions.
//!
//! This crate knows nothing of CPUs or devices.

mod code;
mod heap;
mod program;
mod stretch;

use std::fs::File;
use std::os::fd::FromRawFd;
use std::sync::Arc;

pub use code::{CodeMap, CodeTracker, CodeWriteListener, CpuSet, GRANULE_SIZE, MAX_CPUS};
pub use heap::give_back_large_blocks;
pub use program::give_back_program;
pub use stretch::Stretch;
use vm_memory::mmap::MmapRegionBuilder;
pub use vm_memory::{self, Address, Bytes, GuestAddress};
use vm_memory::{
    FileOffset, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

/// The guest memory type that virtqueue code works on.
pub type Ram = GuestMemoryMmap<CodeTracker>;

/// Size of a page, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// Where the hole for MMIO below 4 GiB begins: PCI windows, IOAPIC, LAPIC live above it.
pub const MMIO_HOLE_START: u64 = 0xC000_0000;
/// Where RAM continues above the hole.
pub const MMIO_HOLE_END: u64 = 0x1_0000_0000;

/// Why guest memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The size is zero or not a multiple of the page size.
    #[error("guest memory size {0:#x} is not a positive multiple of 4 KiB")]
    Size(u64),
    /// The memfd could not be created or sized.
    #[error("cannot create a memfd of {size} bytes for guest memory")]
    Memfd {
        /// Bytes asked for.
        size: u64,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The memfd could not be mapped.
    #[error("cannot map {size} bytes of guest memory: {reason}")]
    Map {
        /// Bytes asked for.
        size: u64,
        /// What the mapping layer said.
        reason: String,
    },
}

/// A machine's RAM. Cheap to clone; all clones are the same memory.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    ram: Ram,
    regions: Arc<[Region]>,
    code: Arc<CodeMap>,
    stretched: stretch::Stretched,
    size: u64,
}

#[derive(Clone, Copy, Debug)]
struct Region {
    start: u64,
    size: u64,
    host: usize,
}

impl GuestMemory {
    /// Makes `size` bytes of zeroed RAM, from guest physical address 0, with the part
    /// that does not fit below [`MMIO_HOLE_START`] continuing at [`MMIO_HOLE_END`].
    pub fn new(size: u64) -> Result<Self, Error> {
        if size == 0 || !size.is_multiple_of(PAGE_SIZE) {
            return Err(Error::Size(size));
        }
        let file = Arc::new(memfd(size)?);
        let low = size.min(MMIO_HOLE_START);
        let mut layout = vec![(0, low, 0)];
        if size > low {
            layout.push((MMIO_HOLE_END, size - low, low));
        }
        let code = Arc::new(CodeMap::new(
            &layout.iter().map(|l| (l.0, l.1)).collect::<Vec<_>>(),
        ));
        let map_error = |e: &dyn std::fmt::Display| Error::Map {
            size,
            reason: e.to_string(),
        };
        let mut mapped = Vec::new();
        for &(start, length, offset) in &layout {
            let tracker = CodeTracker::new(Arc::clone(&code), start);
            let region = MmapRegionBuilder::new_with_bitmap(length as usize, tracker)
                .with_file_offset(FileOffset::from_arc(Arc::clone(&file), offset))
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
                .build()
                .map_err(|e| map_error(&e))?;
            let region = GuestRegionMmap::new(region, GuestAddress(start))
                .ok_or_else(|| map_error(&"the address range overflows"))?;
            mapped.push(region);
        }
        let ram = Ram::from_regions(mapped).map_err(|e| map_error(&e))?;
        let regions = ram
            .iter()
            .map(|r| Region {
                start: r.start_addr().0,
                size: r.len(),
                host: r.as_ptr() as usize,
            })
            .collect();
        Ok(Self {
            ram,
            regions,
            code,
            stretched: Arc::default(),
            size,
        })
    }

    /// The view that device models and virtqueues work on.
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// Which granules hold translated code.
    pub fn code(&self) -> &Arc<CodeMap> {
        &self.code
    }

    /// Bytes of RAM in all.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The guest physical ranges that are RAM, as `(start, size)` in bytes, ascending.
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        self.regions.iter().map(|r| (r.start, r.size)).collect()
    }

    /// The host address of guest physical `address`, if all of `length` bytes from it lie
    /// in one region of RAM. The memory stays mapped as long as any clone of `self` lives.
    #[inline]
    pub fn host_ptr(&self, address: u64, length: u64) -> Option<*mut u8> {
        self.regions.iter().find_map(|r| {
            let offset = address.checked_sub(r.start)?;
            (offset < r.size && length <= r.size - offset)
                .then(|| (r.host + offset as usize) as *mut u8)
        })
    }

    /// The guest physical address of what a host pointer into RAM points at: the inverse of
    /// [`GuestMemory::host_ptr`].
    #[inline]
    pub fn address_of(&self, host: *const u8) -> Option<u64> {
        self.regions.iter().find_map(|r| {
            let offset = (host as u64).checked_sub(r.host as u64)?;
            (offset < r.size).then_some(r.start + offset)
        })
    }
}

fn memfd(size: u64) -> Result<File, Error> {
    let error = |source| Error::Memfd { size, source };
    // SAFETY: the name is a NUL-terminated literal; the call has no other preconditions.
    let fd = unsafe { libc::memfd_create(c"strata-guest-memory".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(error(std::io::Error::last_os_error()));
    }
    // SAFETY: `fd` was just returned by memfd_create and is owned by nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size).map_err(error)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_above_three_gib_continues_above_four() {
        let memory = GuestMemory::new(MMIO_HOLE_START + 0x2000).unwrap();

        assert_eq!(
            memory.ranges(),
            [(0, MMIO_HOLE_START), (MMIO_HOLE_END, 0x2000)]
        );
        assert!(memory.host_ptr(MMIO_HOLE_START, 1).is_none());
        assert!(memory.host_ptr(MMIO_HOLE_END + 0x1fff, 1).is_some());
        assert!(memory.host_ptr(MMIO_HOLE_END + 0x1fff, 2).is_none());
        let last = memory.host_ptr(MMIO_HOLE_END + 0x1fff, 1).unwrap();
        assert_eq!(memory.address_of(last), Some(MMIO_HOLE_END + 0x1fff));
        assert_eq!(memory.address_of(std::ptr::null()), None);
    }

    #[test]
    fn device_writes_and_host_pointers_see_the_same_bytes() {
        let memory = GuestMemory::new(0x10000).unwrap();

        memory
            .ram()
            .write_obj(0x1122_3344_u32, GuestAddress(0x8000))
            .unwrap();

        let ptr = memory.host_ptr(0x8000, 4).unwrap().cast::<u32>();
        // SAFETY: `ptr` points at four mapped, aligned bytes of `memory`, which is alive.
        assert_eq!(unsafe { ptr.read_volatile() }, 0x1122_3344);
    }

    #[test]
    fn a_size_that_is_no_multiple_of_a_page_is_refused() {
        assert!(matches!(GuestMemory::new(0x1001), Err(Error::Size(0x1001))));
    }
}
