//! The linear addresses that both machines agree on, and what the pages hold at first.
//!
//! The host process maps these pages at these very addresses and the guest's page tables
//! map RAM there, so that every address a test computes means the same on both sides.
//! Everything a test may touch lies in the lower half; the upper half belongs to the host's
//! kernel on one side and to the guest's descriptor tables on the other.

use crate::rng::Rng;

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// First byte of the code pages: two, readable, writable and executable; then a hole.
pub const CODE: u64 = 0x1000_0000;
/// Bytes of code pages.
pub const CODE_SIZE: u64 = 2 * PAGE;

/// Where the code pages can be written, but not run, at another linear address.
pub const ALIAS: u64 = 0x1004_0000;

/// Base of the data window; see [`PAGES`] for what is mapped in it.
pub const DATA: u64 = 0x1001_0000;
/// Two neighbouring writable pages with a hole before and after.
pub const WRITABLE: u64 = DATA + 0x1000;
/// The edge between the two pages of [`WRITABLE`].
pub const EDGE: u64 = DATA + 0x2000;
/// Where [`WRITABLE`] ends and a hole begins.
pub const HOLE: u64 = DATA + 0x3000;
/// A read-only page, followed by a writable one and another read-only one.
pub const READ_ONLY: u64 = DATA + 0x4000;
/// From a read-only page below this address to a writable one above.
pub const READ_ONLY_TO_WRITABLE: u64 = DATA + 0x5000;
/// From a writable page below this address to a read-only one above.
pub const WRITABLE_TO_READ_ONLY: u64 = DATA + 0x6000;

/// Two writable pages for saved extended state alone, with holes around them.
pub const IMAGES: u64 = DATA + 0x8000;
/// Bytes of [`IMAGES`].
pub const IMAGES_SIZE: u64 = 2 * PAGE;

/// First byte of the two stack pages, with holes around them.
pub const STACK: u64 = 0x1002_1000;
/// First byte behind the stack pages.
pub const STACK_END: u64 = STACK + 2 * PAGE;

/// A writable page whose address does not fit in 32 bits.
pub const FAR: u64 = 0x1234_5678_9000;

/// Base of FS throughout the tests.
pub const FS_BASE: u64 = WRITABLE + 0x380;
/// Base of GS throughout the tests.
pub const GS_BASE: u64 = FAR - 0x2000_0000 + 0x40;

/// FS and GS, flat but for their bases, in the LDT: its first two entries. Where the host
/// cannot set bases apart from selectors both are null, and 32-bit code cannot use them.
pub const FS_SELECTOR: u16 = 7;
/// See [`FS_SELECTOR`].
pub const GS_SELECTOR: u16 = 15;

/// The selectors of 64-bit Linux in ring 3: CS of 64-bit code.
pub const CODE_SELECTOR: u16 = 0x33;
/// CS of 32-bit code.
pub const CODE_32_SELECTOR: u16 = 0x23;
/// SS, DS and ES.
pub const STACK_SELECTOR: u16 = 0x2b;

/// A segment of the LDT for 16-bit code.
#[derive(Clone, Copy, Debug)]
pub struct Segment16 {
    /// Its selector.
    pub selector: u16,
    /// Linear address of offset 0.
    pub base: u64,
    /// The last offset.
    pub limit: u32,
    /// Whether it is for code, else for data.
    pub code: bool,
}

/// CS of 16-bit code: the code pages and a hole.
pub const CODE_16: Segment16 = Segment16 {
    selector: 0x17,
    base: CODE,
    limit: 0xffff,
    code: true,
};
/// DS and ES of 16-bit code: the data window, with its end cut off in the middle of a page.
pub const DATA_16: Segment16 = Segment16 {
    selector: 0x1f,
    base: DATA,
    limit: 0x6fff,
    code: false,
};
/// SS of 16-bit code: the stack pages are at its end.
pub const STACK_16: Segment16 = Segment16 {
    selector: 0x27,
    base: STACK - 0x1000,
    limit: 0x2fff,
    code: false,
};
/// All of them.
pub const SEGMENTS_16: [Segment16; 3] = [CODE_16, DATA_16, STACK_16];

/// What may be done with a page in ring 3. Every page may be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing but reads.
    ReadOnly,
    /// Reads and writes.
    Writable,
    /// Everything.
    Code,
}

/// The pages a test can see, as linear address and access.
pub const PAGES: [(u64, Access); 12] = [
    (CODE, Access::Code),
    (CODE + PAGE, Access::Code),
    (WRITABLE, Access::Writable),
    (EDGE, Access::Writable),
    (READ_ONLY, Access::ReadOnly),
    (READ_ONLY_TO_WRITABLE, Access::Writable),
    (WRITABLE_TO_READ_ONLY, Access::ReadOnly),
    (IMAGES, Access::Writable),
    (IMAGES + PAGE, Access::Writable),
    (STACK, Access::Writable),
    (STACK + PAGE, Access::Writable),
    (FAR, Access::Writable),
];

/// Code pages are full of this where no test code lies, so that a stray jump ends at once.
pub const INT3: u8 = 0xcc;

/// What each of [`PAGES`] holds when a case begins, before the case's own patches.
pub fn pristine() -> Vec<[u8; PAGE as usize]> {
    let mut rng = Rng::new(0x5712_a7a0, 0);
    PAGES
        .iter()
        .map(|&(_, access)| {
            let mut page = [INT3; PAGE as usize];
            if access != Access::Code {
                for chunk in page.chunks_exact_mut(8) {
                    chunk.copy_from_slice(&crate::generate::values::memory_word(&mut rng));
                }
            }
            page
        })
        .collect()
}
