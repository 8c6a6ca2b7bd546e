//! Places in ring 3's code that access another page nearly every time: a window is no use to them.
//! They look into the TLB in line instead, those that are seen at large pages behind a wide window.
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
    /// Wide windows that were given away, for loads and for stores.
    given: [usize; 2],
    /// When each window had been filled so often, for loads and for stores: host TSC.
    since: [[u64; WINDOWS]; 2],
}

impl Default for Roaming {
    fn default() -> Self {
        Self {
            places: BTreeMap::new(),
            given: [0; 2],
            since: [[0; WINDOWS]; 2],
        }
    }
}

impl Roaming {
    /// A window was filled another [`FILLS`] times, as the instruction at physical `place` was to
    /// use it. Returns whether that is one that roams, which was not known. It gets a wide window
    /// if `large`, also later.
    pub(crate) fn filled(
        &mut self,
        window: usize,
        store: bool,
        place: u64,
        now: u64,
        large: bool,
    ) -> bool {
        let since = &mut self.since[usize::from(store)][window];
        let took = now.wrapping_sub(std::mem::replace(since, now));
        let known = match self.places.get(&place) {
            Some(None) => !large,
            Some(Some(_)) => true,
            None => false,
        };
        if known || took >= u64::from(FILLS) * CYCLES {
            return false;
        }
        let given = &mut self.given[usize::from(store)];
        let wide = large.then(|| {
            let number = (*given % WIDE_WINDOWS) as u8;
            *given += 1;
            Wide { store, number }
        });
        self.places.insert(place, wide);
        true
    }

    /// Which places in a range of addresses roam, as distances from its start.
    pub(crate) fn within(&self, range: Range<u64>) -> Vec<Place> {
        let start = range.start;
        let places = self.places.range(range);
        places
            .map(|(place, wide)| ((place - start) as u16, *wide))
            .collect()
    }

    /// Forgets all places, when blocks went away.
    pub(crate) fn clear(&mut self) {
        self.places.clear();
        self.given = [0; 2];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOW: u64 = FILLS as u64 * CYCLES;

    #[test]
    fn a_place_roams_whose_window_is_filled_fast() {
        let mut roaming = Roaming::default();
        let small = false;

        assert!(!roaming.filled(3, false, 0x1010, SLOW, small));
        assert!(!roaming.filled(3, false, 0x1010, 2 * SLOW, small));
        assert!(roaming.filled(3, false, 0x1010, 2 * SLOW + 1, small));
        assert!(!roaming.filled(3, false, 0x1010, 2 * SLOW + 2, small));
        assert!(!roaming.filled(3, true, 0x1020, 2 * SLOW + 3, small));

        assert_eq!(roaming.within(0x1000..0x1400), [(0x10, None)]);
        assert!(roaming.within(0x1011..0x1400).is_empty());
    }

    #[test]
    fn a_place_that_roamed_in_small_pages_gets_a_wide_window_at_large_ones() {
        let mut roaming = Roaming::default();

        assert!(roaming.filled(3, true, 0x1010, 0, false));
        assert!(!roaming.filled(3, true, 0x1010, 1, false));
        assert!(roaming.filled(3, true, 0x1010, 2, true));
        assert!(!roaming.filled(3, true, 0x1010, 3, true));
    }

    #[test]
    fn places_at_large_pages_have_wide_windows_as_long_as_there_are_some() {
        let mut roaming = Roaming::default();

        for place in 0..=WIDE_WINDOWS as u64 {
            roaming.filled(0, false, place, 0, true);
        }
        roaming.filled(0, true, 0x1000, 0, true);

        let numbers: Vec<u8> = roaming
            .within(0..0x1000)
            .iter()
            .map(|place| place.1.unwrap().number)
            .collect();
        assert_eq!(numbers, [0, 1, 2, 3, 0]);
        let first_store = Wide {
            store: true,
            number: 0,
        };
        assert_eq!(roaming.within(0x1000..0x1001), [(0, Some(first_store))]);
    }
}
