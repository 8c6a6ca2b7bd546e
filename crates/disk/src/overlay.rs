//! Changes to a file that are only in memory: what reads see in place of what the file has.

use std::collections::BTreeMap;
use std::ops::Range;

/// See the module. Later changes hide earlier ones.
#[derive(Debug, Default)]
pub(crate) struct Overlay {
    /// By their first byte, none over another.
    changes: BTreeMap<u64, Change>,
}

#[derive(Debug)]
struct Change {
    length: u64,
    /// Zeroes, if none.
    data: Option<Box<[u8]>>,
}

/// What is at a byte, and how far that goes on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Seen<'a> {
    /// What the file has.
    File(u64),
    /// So many zeroes.
    Zeroes(u64),
    /// These bytes.
    Data(&'a [u8]),
}

impl Overlay {
    /// Bytes from `offset` on are these.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        let length = data.len() as u64;
        self.put(offset, length, Some(data.into()));
    }

    /// They are zeroes.
    pub(crate) fn zero(&mut self, offset: u64, length: u64) {
        self.put(offset, length, None);
    }

    fn put(&mut self, start: u64, length: u64, data: Option<Box<[u8]>>) {
        let end = start.saturating_add(length);
        if start == end {
            return;
        }
        let length = end - start;
        // the last one that begins before, and all that begin within
        let before = self.changes.range(..start).next_back().map(|(at, _)| *at);
        let within = self.changes.range(start..end).map(|(at, _)| *at);
        for at in within.chain(before).collect::<Vec<_>>() {
            if let Some(old) = self.changes.remove(&at) {
                self.keep(at, &old, at..start);
                self.keep(at, &old, end..at + old.length);
            }
        }
        self.changes.insert(start, Change { length, data });
    }

    /// Puts back the part of a change, which began at `at`, that is within a range.
    fn keep(&mut self, at: u64, old: &Change, range: Range<u64>) {
        let start = range.start.max(at);
        let end = range.end.min(at + old.length);
        if start < end {
            let part = |data: &[u8]| data[(start - at) as usize..(end - at) as usize].into();
            let change = Change {
                length: end - start,
                data: old.data.as_deref().map(part),
            };
            self.changes.insert(start, change);
        }
    }

    /// What is at byte `offset`.
    pub(crate) fn see(&self, offset: u64) -> Seen<'_> {
        if let Some((at, change)) = self.changes.range(..=offset).next_back() {
            let inside = offset - at;
            if inside < change.length {
                return match &change.data {
                    None => Seen::Zeroes(change.length - inside),
                    Some(data) => Seen::Data(&data[inside as usize..]),
                };
            }
        }
        let next = self.changes.range(offset..).next();
        Seen::File(next.map_or(u64::MAX, |(at, _)| *at) - offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_changes_hide_earlier_ones_and_nothing_else() {
        let mut overlay = Overlay::default();
        overlay.write(10, &[1, 2, 3, 4, 5, 6]);
        overlay.zero(12, 2);
        overlay.write(15, &[9, 9]);

        assert_eq!(overlay.see(0), Seen::File(10));
        assert_eq!(overlay.see(11), Seen::Data(&[2]));
        assert_eq!(overlay.see(12), Seen::Zeroes(2));
        assert_eq!(overlay.see(14), Seen::Data(&[5]));
        assert_eq!(overlay.see(16), Seen::Data(&[9]));
        assert_eq!(overlay.see(17), Seen::File(u64::MAX - 17));

        overlay.zero(0, 100);
        assert_eq!(overlay.see(0), Seen::Zeroes(100));
        overlay.write(40, &[7]);
        assert_eq!(overlay.see(39), Seen::Zeroes(1));
        assert_eq!(overlay.see(41), Seen::Zeroes(59));
    }
}
