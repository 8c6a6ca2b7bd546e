//! Whether a code cache is too small: remembers, roughly, which blocks were made since it was
//! last emptied, and counts those that had been made before that as well. Called by `engine`.

/// log2 of the bits of a set.
const SHIFT: u32 = 18;

/// A set of hashes that at times finds what was not put in.
struct Set(Box<[u64]>);

impl Default for Set {
    fn default() -> Self {
        Self(vec![0; 1 << (SHIFT - 6)].into())
    }
}

impl Set {
    fn place(hash: u64) -> (usize, u64) {
        let bit = hash.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - SHIFT);
        (bit as usize / 64, 1 << (bit % 64))
    }

    fn insert(&mut self, hash: u64) {
        let (word, bit) = Self::place(hash);
        self.0[word] |= bit;
    }

    fn has(&self, hash: u64) -> bool {
        let (word, bit) = Self::place(hash);
        self.0[word] & bit != 0
    }
}

/// See the module.
#[derive(Default)]
pub(crate) struct Wanted {
    before: Set,
    now: Set,
    made: u32,
    again: u32,
}

impl Wanted {
    /// A block was made; what stands for its key is `hash`.
    pub(crate) fn note(&mut self, hash: u64) {
        self.made += 1;
        self.again += u32::from(self.before.has(hash));
        self.now.insert(hash);
    }

    /// Whether most of what was made since the cache was emptied had been made before.
    pub(crate) fn mostly_again(&self) -> bool {
        self.again > self.made / 4 * 3
    }

    /// The cache was emptied.
    pub(crate) fn turn(&mut self) {
        std::mem::swap(&mut self.before, &mut self.now);
        self.now.0.fill(0);
        (self.made, self.again) = (0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make(wanted: &mut Wanted, blocks: std::ops::Range<u64>) {
        for block in blocks {
            wanted.note(block << 12);
        }
    }

    #[test]
    fn a_working_set_that_does_not_fit_is_wanted_again() {
        let mut wanted = Wanted::default();
        make(&mut wanted, 0..10_000);
        assert!(!wanted.mostly_again());
        wanted.turn();
        make(&mut wanted, 0..10_000);
        assert!(wanted.mostly_again());
    }

    #[test]
    fn new_code_is_not_wanted_again() {
        let mut wanted = Wanted::default();
        make(&mut wanted, 0..10_000);
        wanted.turn();
        make(&mut wanted, 10_000..20_000);
        assert!(!wanted.mostly_again());
    }
}
