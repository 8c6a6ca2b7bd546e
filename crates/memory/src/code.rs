//! Which parts of guest memory hold translated code, in granules of 64 bytes, for each
//! vCPU by itself; and which vCPUs may store to a page without looking here.
//!
//! A software CPU marks what it has translated and asks on its slow store path. Device
//! writes arrive through vm-memory's [`Bitmap`] hook. Nobody here knows what a listener
//! does; it is told the range and must not write guest memory itself.
//!
//! All operations are sequentially consistent, since two sides look at each other here:
//! whoever translates marks first and then looks for stores, whoever stores without a look
//! says so first and then looks for marks. One of them sees the other.

use std::sync::atomic::{AtomicU16, AtomicU64, Ordering, fence};
use std::sync::{Arc, OnceLock};

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

use crate::PAGE_SIZE;

/// Bytes that one bit of the map stands for.
pub const GRANULE_SIZE: u64 = 64;
/// vCPUs that a map can tell apart.
pub const MAX_CPUS: usize = 16;

/// A set of vCPUs: bit `n` stands for vCPU `n`.
pub type CpuSet = u16;

/// The members of a set.
fn members(set: CpuSet) -> impl Iterator<Item = usize> {
    (0..MAX_CPUS).filter(move |cpu| set >> cpu & 1 != 0)
}

/// Told when a device has written into translated code.
pub trait CodeWriteListener: Send + Sync {
    /// Bytes `address..address + length` (guest physical, within one page) were written,
    /// in which `holders` have translated code.
    fn code_written(&self, holders: CpuSet, address: u64, length: u64);
}

/// What is known of one page.
#[derive(Default)]
struct Page {
    /// vCPUs that have translated code of it.
    holders: AtomicU16,
    /// vCPUs that may store to it without asking.
    storers: AtomicU16,
}

/// The pages of one region of RAM.
struct Region {
    start: u64,
    pages: Box<[Page]>,
    /// For each vCPU a word a page: the granules that it has translated. Made with a
    /// vCPU's first mark.
    granules: [OnceLock<Box<[AtomicU64]>>; MAX_CPUS],
}

impl Region {
    fn granules(&self, cpu: usize) -> Option<&[AtomicU64]> {
        let make = || zeroed(self.pages.len());
        self.granules
            .get(cpu)
            .map(|words| &**words.get_or_init(make))
    }
}

/// One bit for each 64-byte granule of RAM that holds translated code, for each vCPU.
pub struct CodeMap {
    regions: Vec<Region>,
    listener: OnceLock<Box<dyn CodeWriteListener>>,
}

impl std::fmt::Debug for CodeMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CodeMap").finish_non_exhaustive()
    }
}

/// A slice of zeros that takes memory only where it is written.
fn zeroed<T>(length: usize) -> Box<[T]>
where
    T: Zeroable,
{
    // SAFETY: zeroes are a value of every `Zeroable` type.
    unsafe { Box::new_zeroed_slice(length).assume_init() }
}

/// Types of which zeroes are a value.
///
/// # Safety
/// They must be.
unsafe trait Zeroable {}
// SAFETY: two integers.
unsafe impl Zeroable for Page {}
// SAFETY: an integer.
unsafe impl Zeroable for AtomicU64 {}

/// The bits of a page's word that `length` bytes from `address` touch.
fn granules(address: u64, length: u64) -> u64 {
    debug_assert!(length > 0 && address % PAGE_SIZE + length <= PAGE_SIZE);
    let first = address % PAGE_SIZE / GRANULE_SIZE;
    let last = (address % PAGE_SIZE + length - 1) / GRANULE_SIZE;
    (u64::MAX >> (63 - (last - first))) << first
}

impl CodeMap {
    pub(crate) fn new(ranges: &[(u64, u64)]) -> Self {
        let region = |&(start, size)| Region {
            start,
            pages: zeroed((size / PAGE_SIZE) as usize),
            granules: Default::default(),
        };
        Self {
            regions: ranges.iter().map(region).collect(),
            listener: OnceLock::new(),
        }
    }

    #[inline]
    fn find(&self, address: u64) -> Option<(&Region, usize)> {
        self.regions.iter().find_map(|region| {
            let page = (address.checked_sub(region.start)? / PAGE_SIZE) as usize;
            (page < region.pages.len()).then_some((region, page))
        })
    }

    fn page(&self, address: u64) -> Option<&Page> {
        let (region, page) = self.find(address)?;
        region.pages.get(page)
    }

    /// Sets who is told of device writes into code. The first caller wins; returns
    /// whether that was this one.
    pub fn set_listener(&self, listener: Box<dyn CodeWriteListener>) -> bool {
        self.listener.set(listener).is_ok()
    }

    /// Notes that vCPU `cpu` translates `length` bytes at `address`, within one page.
    /// Returns which vCPUs may still store to the page without asking.
    pub fn mark(&self, cpu: usize, address: u64, length: u64) -> CpuSet {
        let Some((region, page)) = self.find(address) else {
            return 0;
        };
        if let Some(words) = region.granules(cpu) {
            words[page].fetch_or(granules(address, length), Ordering::SeqCst);
        }
        region.pages[page]
            .holders
            .fetch_or(1 << cpu, Ordering::SeqCst);
        region.pages[page].storers.load(Ordering::SeqCst)
    }

    /// The vCPUs that have translated any of `length` bytes at `address`, within one page.
    #[inline]
    pub fn overlaps(&self, address: u64, length: u64) -> CpuSet {
        let Some((region, page)) = self.find(address) else {
            return 0;
        };
        let holders = region.pages[page].holders.load(Ordering::SeqCst);
        if holders == 0 {
            return 0;
        }
        let wanted = granules(address, length);
        let hit = |cpu: &usize| {
            let words = region.granules(*cpu);
            words.is_some_and(|words| words[page].load(Ordering::SeqCst) & wanted != 0)
        };
        members(holders)
            .filter(hit)
            .fold(0, |set, cpu| set | 1 << cpu)
    }

    /// Whether the page of `address` holds any translated code.
    #[inline]
    pub fn page_has_code(&self, address: u64) -> bool {
        self.page(address)
            .is_some_and(|page| page.holders.load(Ordering::SeqCst) != 0)
    }

    /// Forgets what `cpu` has translated in the page of `address`.
    pub fn clear_page(&self, cpu: usize, address: u64) {
        let Some((region, page)) = self.find(address) else {
            return;
        };
        if let Some(words) = region.granules(cpu) {
            words[page].store(0, Ordering::SeqCst);
        }
        region.pages[page]
            .holders
            .fetch_and(!(1 << cpu), Ordering::SeqCst);
    }

    /// Notes that `cpu` is going to store to the page of `address` without asking, if
    /// nobody has translated code of it; returns whether that is so.
    pub fn claim_stores(&self, cpu: usize, address: u64) -> bool {
        let Some(page) = self.page(address) else {
            return true;
        };
        if page.holders.load(Ordering::SeqCst) != 0 {
            return false;
        }
        if page.storers.load(Ordering::SeqCst) & 1 << cpu == 0 {
            page.storers.fetch_or(1 << cpu, Ordering::SeqCst);
        }
        page.holders.load(Ordering::SeqCst) == 0
    }

    /// Whether `cpu` may store to the page of `address` without asking.
    pub fn claims_stores(&self, cpu: usize, address: u64) -> bool {
        self.page(address)
            .is_some_and(|page| page.storers.load(Ordering::SeqCst) & 1 << cpu != 0)
    }

    /// `cpu` asks before each store to the page of `address` from now on.
    pub fn disclaim_stores(&self, cpu: usize, address: u64) {
        if let Some(page) = self.page(address) {
            page.storers.fetch_and(!(1 << cpu), Ordering::SeqCst);
        }
    }

    fn device_wrote(&self, mut address: u64, length: u64) {
        // the bytes are there before the marks are looked at
        fence(Ordering::SeqCst);
        let end = address.saturating_add(length);
        while address < end {
            let in_page = (end - address).min(PAGE_SIZE - address % PAGE_SIZE);
            let holders = self.overlaps(address, in_page);
            if holders != 0
                && let Some(listener) = self.listener.get()
            {
                listener.code_written(holders, address, in_page);
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
        fn code_written(&self, _holders: CpuSet, address: u64, length: u64) {
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
        memory.code().mark(0, 0x1040, 10);

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

    #[test]
    fn code_is_told_apart_by_vcpu_and_granule() {
        let memory = GuestMemory::new(0x4000).unwrap();
        let code = memory.code();
        code.mark(1, 0x1040, 10);
        code.mark(3, 0x1050, 64);

        assert_eq!(code.overlaps(0x1040, 1), 1 << 1 | 1 << 3);
        assert_eq!(code.overlaps(0x1080, 8), 1 << 3);
        assert_eq!(code.overlaps(0x1000, 64), 0);
        code.clear_page(3, 0x1fff);
        assert_eq!(code.overlaps(0x1000, 4096), 1 << 1);
        code.clear_page(1, 0x1000);
        assert!(!code.page_has_code(0x1000));
    }

    #[test]
    fn who_stores_without_asking_is_told_to_who_translates() {
        let memory = GuestMemory::new(0x4000).unwrap();
        let code = memory.code();

        assert!(code.claim_stores(2, 0x1000));
        assert_eq!(code.mark(0, 0x1040, 10), 1 << 2);
        assert!(!code.claim_stores(5, 0x1ff8));
        code.disclaim_stores(2, 0x1000);
        assert_eq!(code.mark(1, 0x1000, 1), 0);
    }
}
