//! Which guest memory is taken while a kernel and what goes with it are placed.

use std::ops::Range;

/// Ranges that are taken.
#[derive(Debug, Default)]
pub(super) struct Room(Vec<Range<u64>>);

impl Room {
    /// Takes a range, whoever else may have it.
    pub(super) fn take(&mut self, range: Range<u64>) {
        let at = self.0.partition_point(|other| other.start < range.start);
        self.0.insert(at, range);
    }

    /// Whether something was taken twice.
    pub(super) fn overlaps(&self) -> bool {
        self.0.windows(2).any(|pair| pair[1].start < pair[0].end)
    }

    /// Takes the lowest free `size` bytes of `within` at a multiple of `alignment`, a power of
    /// two. What is empty takes a byte. `None` if there is no such place.
    pub(super) fn place(&mut self, size: u64, alignment: u64, within: Range<u64>) -> Option<u64> {
        let size = size.max(1);
        let aligned = |address: u64| address.checked_next_multiple_of(alignment);
        let mut start = aligned(within.start)?;
        for taken in &self.0 {
            if taken.end <= start {
                continue;
            }
            if start.checked_add(size)? <= taken.start {
                break;
            }
            start = aligned(taken.end)?;
        }
        let end = start.checked_add(size)?;
        if end > within.end {
            return None;
        }
        self.take(start..end);
        Some(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn room(taken: &[Range<u64>]) -> Room {
        let mut room = Room::default();
        for range in taken {
            room.take(range.clone());
        }
        room
    }

    #[test]
    fn the_lowest_gap_that_is_large_enough_is_taken() {
        let mut room = room(&[0x3000..0x3800, 0x1000..0x2000, 0x6000..0x7000]);

        assert_eq!(room.place(0x1000, 0x1000, 0x1000..0x9000), Some(0x2000));
        assert_eq!(room.place(0x1000, 0x1000, 0x1000..0x9000), Some(0x4000));
        assert_eq!(room.place(0x800, 0x10, 0x1000..0x9000), Some(0x3800));
        assert_eq!(room.place(0x1001, 0x10, 0x1000..0x9000), Some(0x7000));
        assert!(!room.overlaps());
    }

    #[test]
    fn what_does_not_fit_gets_no_place() {
        let mut room = Room::default();
        room.take(0x2000..0x3000);

        assert_eq!(room.place(0x2000, 0x1000, 0x1000..0x4000), None);
        assert_eq!(room.place(u64::MAX, 0x1000, 0x1000..0x4000), None);
        assert_eq!(room.place(1, 0x1000, 0..0), None);
    }

    #[test]
    fn ranges_that_share_a_byte_overlap_and_neighbours_do_not() {
        assert!(!room(&[0x1000..0x2000, 0x2000..0x3000]).overlaps());
        assert!(room(&[0x1fff..0x3000, 0x1000..0x2000]).overlaps());
    }
}
