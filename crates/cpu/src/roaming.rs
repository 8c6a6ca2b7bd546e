//! Places in ring 3's code that access another page nearly every time: a window is no use to them,
//! and they look into the TLB in line instead. Found by how fast windows are filled.
//!
//! A thunk counts fills of each window and comes to `engine::slow` every [`FILLS`] of them, which
//! asks here. Blocks with such a place are made anew.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::state::WINDOWS;

/// Fills of a window between two looks at the clock. So many that a loop with ever longer strides,
/// which stays in pages at first, is not taken for one that never does.
pub(crate) const FILLS: u32 = 1 << 18;
/// A window that is filled more often than every so many cycles of the TSC is no use. A loop
/// that goes through memory word by word stays in a page for longer.
const CYCLES: u64 = 128;

/// See the module.
pub(crate) struct Roaming {
    /// Guest physical addresses of instructions.
    places: BTreeSet<u64>,
    /// When each window had been filled so often, for loads and for stores: host TSC.
    since: [[u64; WINDOWS]; 2],
}

impl Default for Roaming {
    fn default() -> Self {
        Self {
            places: BTreeSet::new(),
            since: [[0; WINDOWS]; 2],
        }
    }
}

impl Roaming {
    /// A window was filled another [`FILLS`] times, as the instruction at physical `place` was to
    /// use it. Returns whether that is one that roams, which was not known.
    pub(crate) fn filled(&mut self, window: usize, store: bool, place: u64, now: u64) -> bool {
        let since = &mut self.since[usize::from(store)][window];
        let took = now.wrapping_sub(std::mem::replace(since, now));
        took < u64::from(FILLS) * CYCLES && self.places.insert(place)
    }

    /// Which places in a range of addresses roam, as distances from its start.
    pub(crate) fn within(&self, range: Range<u64>) -> Vec<u16> {
        let start = range.start;
        let places = self.places.range(range);
        places.map(|place| (place - start) as u16).collect()
    }

    /// Forgets all places, when blocks went away.
    pub(crate) fn clear(&mut self) {
        self.places.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_roams_whose_window_is_filled_fast() {
        let mut roaming = Roaming::default();
        let slow = u64::from(FILLS) * CYCLES;

        assert!(!roaming.filled(3, false, 0x1010, slow));
        assert!(!roaming.filled(3, false, 0x1010, 2 * slow));
        assert!(roaming.filled(3, false, 0x1010, 2 * slow + 1));
        assert!(!roaming.filled(3, false, 0x1010, 2 * slow + 2));
        assert!(!roaming.filled(3, true, 0x1020, 2 * slow + 3));

        assert_eq!(roaming.within(0x1000..0x1400), [0x10]);
        assert!(roaming.within(0x1011..0x1400).is_empty());
    }
}
