//! Places in ring 3's code that access another page nearly every time: a window is no use to them.
//! They look into the TLB in line instead, behind a wide window if one is of use where they roam.
//! Found by how fast windows are filled.
//!
//! A thunk counts fills of each window and comes to `engine::slow` every [`FILLS`] of them, which
//! asks here. Blocks with such a place are made anew.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::mmu::Wide;
use crate::state::{WIDE_WINDOWS, WINDOWS};

/// Fills of a window between two looks at the clock. So many that a loop with ever longer strides,
/// which stays in pages at first, is not taken for one that never does.
pub(crate) const FILLS: u32 = 1 << 18;
/// A window that is filled more often than every so many cycles of the TSC is no use. A loop
/// that goes through memory word by word stays in a page for longer.
const CYCLES: u64 = 128;

/// A place that roams, and its wide window if it has one.
pub(crate) type Place = (u16, Option<Wide>);

/// See the module.
pub(crate) struct Roaming {
    /// By guest physical address of the instruction.
    places: BTreeMap<u64, Option<Wide>>,
    /// All places roam.
    all: bool,
    /// When each window had been filled so often, for loads and for stores: host TSC.
    since: [[u64; WINDOWS]; 2],
}

impl Default for Roaming {
    fn default() -> Self {
        Self {
            places: BTreeMap::new(),
            all: false,
            since: [[0; WINDOWS]; 2],
        }
    }
}

impl Roaming {
    /// A window was filled another [`FILLS`] times. Returns whether that was fast: the place that
    /// is to use it now roams.
    pub(crate) fn filled(&mut self, window: usize, store: bool, now: u64) -> bool {
        let since = &mut self.since[usize::from(store)][window];
        let took = now.wrapping_sub(std::mem::replace(since, now));
        took < u64::from(FILLS) * CYCLES
    }

    /// The instruction at physical `place`, if it is known to roam, with its wide window.
    pub(crate) fn place(&self, place: u64) -> Option<&Option<Wide>> {
        self.places.get(&place)
    }

    /// The instruction at physical `place` roams.
    pub(crate) fn add(&mut self, place: u64, wide: Option<Wide>) {
        self.places.insert(place, wide);
    }

    /// Takes all places for such that roam, with the wide windows in turns.
    pub(crate) fn set_all(&mut self, on: bool) {
        self.all = on;
    }

    /// Which places in a range of addresses roam, as distances from its start.
    pub(crate) fn within(&self, range: Range<u64>) -> Vec<Place> {
        let start = range.start;
        if self.all {
            let wide = |address: u64| Wide {
                store: address & 1 != 0,
                number: (address / 2 % WIDE_WINDOWS as u64) as u8,
            };
            return range
                .map(|address| ((address - start) as u16, Some(wide(address))))
                .collect();
        }
        let places = self.places.range(range);
        places
            .map(|(place, wide)| ((place - start) as u16, *wide))
            .collect()
    }

    /// Forgets all places, when blocks went away.
    pub(crate) fn clear(&mut self) {
        self.places.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOW: u64 = FILLS as u64 * CYCLES;

    #[test]
    fn places_roam_whose_windows_are_filled_fast() {
        let mut roaming = Roaming::default();

        assert!(!roaming.filled(3, false, SLOW));
        assert!(!roaming.filled(3, false, 2 * SLOW));
        assert!(roaming.filled(3, false, 3 * SLOW - 1));
        assert!(!roaming.filled(3, true, 3 * SLOW));
        assert!(!roaming.filled(4, false, 3 * SLOW));
    }

    #[test]
    fn places_are_told_by_their_distance_from_a_block() {
        let mut roaming = Roaming::default();
        let wide = Some(Wide {
            store: true,
            number: 2,
        });

        roaming.add(0x1010, None);
        roaming.add(0x1020, wide);

        assert_eq!(roaming.within(0x1000..0x1400), [(0x10, None), (0x20, wide)]);
        assert!(roaming.within(0x1021..0x1400).is_empty());
        assert_eq!(roaming.place(0x1010), Some(&None));
        assert_eq!(roaming.place(0x1011), None);
    }
}
