//! The test pages as one machine has them mapped: loads a case into them, and finds and
//! undoes what the case changed.
//!
//! Used by the host process, between two signals, and by the guest's harness. Must never
//! allocate or call anything that depends on thread-local storage, which the host process
//! does not have.

use crate::case::{Changes, LINE, LINE_MAX};
use crate::layout::{Access, PAGE, PAGES};

const PAGE_BYTES: usize = PAGE as usize;

/// How a machine's pages are read and written.
pub(crate) trait Store {
    /// The bytes of page number `index` of [`PAGES`], all [`PAGE`] of them.
    fn page(&self, index: usize) -> &[u8; PAGE_BYTES];
    /// Replaces bytes of page number `index`.
    fn write(&mut self, index: usize, offset: usize, bytes: &[u8]);
}

/// Writes `bytes` at linear `address`, across pages. What lies on no page or on a read-only
/// one is ignored.
pub(crate) fn write(store: &mut impl Store, address: u64, bytes: &[u8]) {
    for (index, &(start, access)) in PAGES.iter().enumerate() {
        let from = address.max(start);
        let to = address.saturating_add(bytes.len() as u64).min(start + PAGE);
        if from < to && access != Access::ReadOnly {
            let part = &bytes[(from - address) as usize..(to - address) as usize];
            store.write(index, (from - start) as usize, part);
        }
    }
}

/// Records every line that is not `pristine` and puts it back.
pub(crate) fn take_changes(
    store: &mut impl Store,
    pristine: &[[u8; PAGE_BYTES]],
    changes: &mut Changes,
) {
    changes.count = 0;
    changes.hash = 0;
    for (index, expected) in pristine.iter().enumerate() {
        if store.page(index) == expected {
            continue;
        }
        for offset in (0..PAGE_BYTES).step_by(LINE) {
            let mut line = [0; LINE];
            line.copy_from_slice(&store.page(index)[offset..offset + LINE]);
            let expected = &expected[offset..offset + LINE];
            if line == *expected {
                continue;
            }
            let address = PAGES[index].0 + offset as u64;
            if (changes.count as usize) < LINE_MAX {
                let slot = &mut changes.lines[changes.count as usize];
                slot.address = address;
                slot.bytes = line;
            }
            changes.count += 1;
            changes.hash = hash_line(changes.hash ^ address, &line);
            store.write(index, offset, expected);
        }
    }
}

fn hash_line(start: u64, line: &[u8; LINE]) -> u64 {
    line.chunks_exact(8).fold(start, |hash, chunk| {
        let word = chunk
            .iter()
            .rev()
            .fold(0, |word, &b| word << 8 | u64::from(b));
        (hash ^ word)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(29)
    })
}
