//! Runs of guest RAM mapped a second time, side by side in an order of their own. The software CPU
//! maps pages as a guest program has them, to reach all of an array by one distance.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::{GuestMemory, PAGE_SIZE};

/// Runs that are mapped at once in a machine, at most. Linux lets a process have 65,530 mappings, of
/// which the rest of it needs few (`vm.max_map_count`).
const MOST_RUNS: usize = 32_768;

/// Host addresses set aside for runs of guest RAM. They are given back when this is dropped; until
/// then nothing but guest RAM is ever there.
#[derive(Debug)]
pub struct Stretch {
    start: NonNull<u8>,
    capacity: usize,
    runs: usize,
    memory: GuestMemory,
}

// SAFETY: the mapping is owned by this value alone and moves with it.
unsafe impl Send for Stretch {}

impl Stretch {
    /// Room for so many bytes: a multiple of the page size and not none; else, fails with
    /// `InvalidInput`.
    pub fn new(memory: &GuestMemory, capacity: usize) -> io::Result<Self> {
        if capacity == 0 || !(capacity as u64).is_multiple_of(PAGE_SIZE) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(Self {
            start: set_aside(std::ptr::null_mut(), capacity, 0)?,
            capacity,
            runs: 0,
            memory: memory.clone(),
        })
    }

    /// Where the first run is.
    pub fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Maps these ranges of guest physical addresses, in this order, instead of what was there.
    /// Fails with `InvalidInput` if they do not fit, or one of them is not whole pages of RAM, and
    /// with `OutOfMemory` if the machine has too many runs mapped; then nothing is there.
    pub fn map(&mut self, runs: &[Range<u64>]) -> io::Result<()> {
        self.unmap()?;
        let mapped = self.map_into_nothing(runs);
        if mapped.is_err() {
            self.unmap()?;
        }
        mapped
    }

    fn map_into_nothing(&mut self, runs: &[Range<u64>]) -> io::Result<()> {
        let count = &self.memory.stretched;
        self.runs = runs.len();
        if count.fetch_add(self.runs, Ordering::Relaxed) + self.runs > MOST_RUNS {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let mut at = 0;
        for run in runs {
            let (file, offset) = self.in_file(run).ok_or(io::ErrorKind::InvalidInput)?;
            let size = (run.end - run.start) as usize;
            if size > self.capacity - at {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            // SAFETY: within what was set aside; memory of the guest's replaces nothing, and nobody
            // holds Rust references to it.
            let mapped = unsafe {
                libc::mmap(
                    self.start().add(at).cast(),
                    size,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE,
                    file.as_raw_fd(),
                    offset as libc::off_t,
                )
            };
            if mapped == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            at += size;
        }
        Ok(())
    }

    /// Maps nothing.
    fn unmap(&mut self) -> io::Result<()> {
        if self.runs > 0 {
            set_aside(self.start(), self.capacity, libc::MAP_FIXED)?;
            self.memory
                .stretched
                .fetch_sub(std::mem::take(&mut self.runs), Ordering::Relaxed);
        }
        Ok(())
    }

    /// Where a run is in the file that holds guest RAM.
    fn in_file(&self, run: &Range<u64>) -> Option<(&File, u64)> {
        let size = run.end.checked_sub(run.start).filter(|size| *size > 0)?;
        self.memory.host_ptr(run.start, size)?;
        let is_pages = run.start.is_multiple_of(PAGE_SIZE) && size.is_multiple_of(PAGE_SIZE);
        let region = self.memory.ram.find_region(GuestAddress(run.start))?;
        let file = region.file_offset().filter(|_| is_pages)?;
        let offset = file.start() + (run.start - region.start_addr().0);
        Some((file.file(), offset))
    }
}

/// Makes host addresses lead nowhere: at a place of the kernel's choice, or with `MAP_FIXED` at
/// `start`.
fn set_aside(start: *mut u8, size: usize, flags: libc::c_int) -> io::Result<NonNull<u8>> {
    // SAFETY: new memory, or what replaces a mapping of the only caller that gives one, which owns it.
    let start = unsafe {
        libc::mmap(
            start.cast(),
            size,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | flags,
            -1,
            0,
        )
    };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory.into())
}

impl Drop for Stretch {
    fn drop(&mut self) {
        self.memory
            .stretched
            .fetch_sub(self.runs, Ordering::Relaxed);
        // SAFETY: the mapping is of this size, and whoever had pointers into it kept the value.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.capacity) };
    }
}

/// How many runs are mapped of a machine's RAM, in all stretches.
pub(crate) type Stretched = std::sync::Arc<AtomicUsize>;

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;
    use crate::MMIO_HOLE_END;

    #[test]
    fn runs_lie_side_by_side_in_the_order_asked_for() {
        // Past the hole, RAM is a second region.
        let memory = GuestMemory::new(0xC000_0000 + 0x4000).unwrap();
        let high = MMIO_HOLE_END + 0x2000;
        for (value, address) in [(1, 0), (5, 0x5008), (6, 0x6008), (9, high)] {
            memory
                .ram
                .write_obj(value as u8, GuestAddress(address))
                .unwrap();
        }

        let mut stretch = Stretch::new(&memory, 0x4000).unwrap();
        stretch.map(&[0x1000..0x2000, 0..0x3000]).unwrap();
        stretch
            .map(&[high..high + 0x1000, 0..0x1000, 0x5000..0x7000])
            .unwrap();

        // SAFETY: four pages that are mapped.
        let values = [0, 0x1000, 0x2008, 0x3008].map(|at| unsafe { *stretch.start().add(at) });
        assert_eq!(values, [9, 1, 5, 6]);
        // SAFETY: as above.
        unsafe { *stretch.start().add(0x1007) = 3 };
        let stored: u8 = memory.ram.read_obj(GuestAddress(7)).unwrap();
        assert_eq!(stored, 3);
    }

    #[test]
    fn runs_that_are_not_ram_or_do_not_fit_are_refused() {
        let memory = GuestMemory::new(0x4000).unwrap();
        let mut stretch = Stretch::new(&memory, 0x3000).unwrap();
        for runs in [
            &[(0x3000, 0x5000)][..],
            &[(0, 0x1000), (0x4000, 0x5000)],
            &[(0x800, 0x1800)],
            &[(0, 0x800)],
            &[(0x1000, 0x1000)],
            &[(0x2000, 0x1000)],
            &[(0, 0x2000), (0, 0x2000)],
        ] {
            let runs: Vec<_> = runs.iter().map(|&(start, end)| start..end).collect();
            let error = stretch.map(&runs).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{runs:x?}");
        }
        for capacity in [0, 0x800] {
            assert!(Stretch::new(&memory, capacity).is_err());
        }
    }

    #[test]
    fn a_machine_has_so_many_runs_mapped_and_no_more() {
        let memory = GuestMemory::new(0x1000).unwrap();
        let half = vec![0..0x1000; MOST_RUNS / 2];
        let mut stretches = [(); 3].map(|()| Stretch::new(&memory, half.len() * 0x1000).unwrap());

        for stretch in &mut stretches[..2] {
            stretch.map(&half).unwrap();
        }
        let error = stretches[2].map(&half[..1]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::OutOfMemory);

        stretches[0].map(&half[10..]).unwrap();
        stretches[2].map(&half[..10]).unwrap();
        drop(stretches);
        assert_eq!(memory.stretched.load(Ordering::Relaxed), 0);
    }
}
