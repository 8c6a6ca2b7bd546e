//! Which parts of guest memory hold translated code, in granules of 64 bytes.
//!
//! The software CPU marks what it has translated and asks on its slow store path. Device
//! writes arrive through vm-memory's [`Bitmap`] hook. Nobody here knows what a listener
//! does; it is told the range and must not write guest memory itself.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

use crate::PAGE_SIZE;

/// Bytes that one bit of the map stands for.
pub const GRANULE_SIZE: u64 = 64;

/// Told when a device has written into translated code.
pub trait CodeWriteListener: Send + Sync {
    /// Bytes `address..address + length` (guest physical, within one page) were written.
    fn code_written(&self, address: u64, length: u64);
}

/// One bit for each 64-byte granule of RAM that holds translated code: a word a page.
pub struct CodeMap {
    regions: Vec<(u64, Vec<AtomicU64>)>,
    listener: OnceLock<Box<dyn CodeWriteListener>>,
}

impl std::fmt::Debug for CodeMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CodeMap").finish_non_exhaustive()
    }
}

/// The bits of a page's word that `length` bytes from `address` touch.
fn granules(address: u64, length: u64) -> u64 {
    debug_assert!(length > 0 && address % PAGE_SIZE + length <= PAGE_SIZE);
    let first = address % PAGE_SIZE / GRANULE_SIZE;
    let last = (address % PAGE_SIZE + length - 1) / GRANULE_SIZE;
    (u64::MAX >> (63 - (last - first))) << first
}

impl CodeMap {
    pub(crate) fn new(ranges: &[(u64, u64)]) -> Self {
        let words = |size: u64| (0..size / PAGE_SIZE).map(|_| AtomicU64::new(0)).collect();
        Self {
            regions: ranges
                .iter()
                .map(|&(start, size)| (start, words(size)))
                .collect(),
            listener: OnceLock::new(),
        }
    }

    fn word(&self, address: u64) -> Option<&AtomicU64> {
        self.regions.iter().find_map(|(start, words)| {
            words.get((address.checked_sub(*start)? / PAGE_SIZE) as usize)
        })
    }

    /// Sets who is told of device writes into code. The first caller wins; returns
    /// whether that was this one.
    pub fn set_listener(&self, listener: Box<dyn CodeWriteListener>) -> bool {
        self.listener.set(listener).is_ok()
    }

    /// Notes that `length` bytes at `address`, within one page, hold translated code.
    /// Returns true when the page held none before.
    pub fn mark(&self, address: u64, length: u64) -> bool {
        self.word(address)
            .is_some_and(|w| w.fetch_or(granules(address, length), Ordering::SeqCst) == 0)
    }

    /// Whether any of `length` bytes at `address`, within one page, hold translated code.
    #[inline]
    pub fn overlaps(&self, address: u64, length: u64) -> bool {
        self.word(address)
            .is_some_and(|w| w.load(Ordering::SeqCst) & granules(address, length) != 0)
    }

    /// Whether the page of `address` holds any translated code.
    #[inline]
    pub fn page_has_code(&self, address: u64) -> bool {
        self.word(address)
            .is_some_and(|w| w.load(Ordering::SeqCst) != 0)
    }

    /// Forgets all code in the page of `address`.
    pub fn clear_page(&self, address: u64) {
        if let Some(word) = self.word(address) {
            word.store(0, Ordering::SeqCst);
        }
    }

    /// Forgets everything.
    pub fn clear(&self) {
        for word in self.regions.iter().flat_map(|(_, words)| words) {
            word.store(0, Ordering::SeqCst);
        }
    }

    fn device_wrote(&self, mut address: u64, length: u64) {
        let end = address.saturating_add(length);
        while address < end {
            let in_page = (end - address).min(PAGE_SIZE - address % PAGE_SIZE);
            if self.overlaps(address, in_page)
                && let Some(listener) = self.listener.get()
            {
                listener.code_written(address, in_page);
            }
            address += in_page;
        }
    }
}

/// vm-memory's dirty-bitmap hook, leading to the [`CodeMap`].
#[derive(Clone, Debug)]
pub struct CodeTracker {
    code: Arc<CodeMap>,
    start: u64,
}

impl CodeTracker {
    pub(crate) fn new(code: Arc<CodeMap>, start: u64) -> Self {
        Self { code, start }
    }
}

impl WithBitmapSlice<'_> for CodeTracker {
    type S = Self;
}

impl BitmapSlice for CodeTracker {}

impl Bitmap for CodeTracker {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.code
            .device_wrote(self.start + offset as u64, len as u64);
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self {
            code: Arc::clone(&self.code),
            start: self.start + offset as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::GuestMemory;

    #[derive(Default)]
    struct Log(Arc<Mutex<Vec<(u64, u64)>>>);

    impl CodeWriteListener for Log {
        fn code_written(&self, address: u64, length: u64) {
            self.0.lock().unwrap().push((address, length));
        }
    }

    #[test]
    fn granules_cover_exactly_the_bytes_asked_for() {
        assert_eq!(granules(0, 1), 1);
        assert_eq!(granules(63, 2), 0b11);
        assert_eq!(granules(0x1000, 4096), u64::MAX);
        assert_eq!(granules(0x1fff, 1), 1 << 63);
    }

    #[test]
    fn device_writes_beside_code_in_the_same_page_are_not_reported() {
        let memory = GuestMemory::new(0x4000).unwrap();
        let log = Log::default();
        let seen = Arc::clone(&log.0);
        memory.code().set_listener(Box::new(log));
        memory.code().mark(0x1040, 10);

        memory
            .ram()
            .write_slice(&[1; 64], GuestAddress(0x1000))
            .unwrap();
        assert!(seen.lock().unwrap().is_empty());

        memory
            .ram()
            .write_slice(&[1; 0x1000], GuestAddress(0x0800))
            .unwrap();
        assert_eq!(*seen.lock().unwrap(), [(0x1000, 0x800)]);
    }
}
