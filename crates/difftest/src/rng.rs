//! Where the generator's choices come from: a small seeded generator, or a fuzzer's bytes.
//!
//! Called by everything under `generate`. Must never draw from the clock or the system: a
//! printed seed has to give the same cases on every host.

/// A deterministic source of choices.
#[derive(Clone, Debug)]
pub struct Rng<'a> {
    state: u64,
    bytes: &'a [u8],
}

impl Rng<'static> {
    /// A source that depends on `seed` and `stream` alone. Different streams of one seed are
    /// unrelated, so that case N can be made again without the N - 1 cases before it.
    pub fn new(seed: u64, stream: u64) -> Self {
        Self {
            state: mix(seed ^ mix(stream.wrapping_add(0x9e37_79b9_7f4a_7c15))),
            bytes: &[],
        }
    }
}

impl<'a> Rng<'a> {
    /// A source that spends `bytes` first and goes on with what follows from them.
    pub fn from_bytes(bytes: &'a [u8]) -> Self {
        let state = bytes.iter().fold(0, |state, &b| mix(state ^ u64::from(b)));
        Self { state, bytes }
    }

    /// 64 uniform bits.
    pub fn bits(&mut self) -> u64 {
        if let Some((head, rest)) = self.bytes.split_first_chunk::<8>() {
            self.bytes = rest;
            return u64::from_le_bytes(*head);
        }
        self.step()
    }

    /// A number from 0 to `limit` - 1. `limit` is 1 or more.
    pub fn below(&mut self, limit: u64) -> u64 {
        debug_assert!(limit > 0);
        if limit <= 1 << 16
            && let Some((head, rest)) = self.bytes.split_first_chunk::<2>()
        {
            self.bytes = rest;
            return u64::from(u16::from_le_bytes(*head)) % limit;
        }
        ((u128::from(self.step()) * u128::from(limit)) >> 64) as u64
    }

    /// A number from 0 to `limit` - 1, as an index. `limit` is 1 or more.
    pub fn index(&mut self, limit: usize) -> usize {
        self.below(limit as u64) as usize
    }

    /// True in `percent` of 100 cases.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// One of `choices`, which is not empty.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.index(choices.len())]
    }

    fn step(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.state)
    }
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_and_stream_give_the_same_numbers() {
        let (mut a, mut b, mut c) = (Rng::new(7, 3), Rng::new(7, 3), Rng::new(7, 4));

        assert_eq!(a.bits(), b.bits());
        assert_ne!(a.bits(), c.bits());
    }

    #[test]
    fn bytes_are_spent_before_anything_is_made_up() {
        let mut rng = Rng::from_bytes(&[5, 0, 0, 0, 0, 0, 0, 0, 9, 0]);

        assert_eq!(rng.bits(), 5);
        assert_eq!(rng.below(100), 9);
    }
}
