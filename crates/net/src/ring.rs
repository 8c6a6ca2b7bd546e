//! A queue of bytes of bounded size that grows as it is needed, for data on its way through the
//! NAT. Read from and written to in place, so that data is copied by the kernel alone.

/// Bytes at first: most connections never need more.
const INITIAL: usize = 16 << 10;

/// Bytes in order, at most `limit` of them.
#[derive(Debug)]
pub(crate) struct Ring {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
    limit: usize,
}

impl Ring {
    /// An empty queue, without memory of its own yet. `limit` is a multiple of 16 KiB.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            bytes: Vec::new(),
            start: 0,
            length: 0,
            limit,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.length
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Bytes that still fit.
    pub(crate) fn room(&self) -> usize {
        self.limit - self.length
    }

    /// Makes room for more where there is none and the limit allows it.
    pub(crate) fn grow(&mut self) {
        if self.length < self.bytes.len() || self.bytes.len() >= self.limit {
            return;
        }
        let size = (self.bytes.len() * 4).clamp(INITIAL, self.limit);
        let mut larger = vec![0; size];
        let [first, second] = self.range(0, self.length);
        larger[..first.len()].copy_from_slice(first);
        larger[first.len()..self.length].copy_from_slice(second);
        self.bytes = larger;
        self.start = 0;
    }

    /// The free places in order; what is written there counts after [`Ring::commit`].
    pub(crate) fn spare(&mut self) -> [&mut [u8]; 2] {
        let end = self.start + self.length;
        let size = self.bytes.len();
        if end >= size {
            let end = end - size;
            return [&mut self.bytes[end..self.start], &mut []];
        }
        let (low, high) = self.bytes.split_at_mut(end);
        [high, &mut low[..self.start]]
    }

    /// Counts `count` bytes written to the free places.
    pub(crate) fn commit(&mut self, count: usize) {
        self.length = (self.length + count).min(self.bytes.len());
    }

    /// Appends as much of `data` as fits, and returns how much that was.
    pub(crate) fn push(&mut self, data: &[u8]) -> usize {
        let mut done = 0;
        loop {
            self.grow();
            let [spare, _] = self.spare();
            let count = spare.len().min(data.len() - done);
            if count == 0 {
                return done;
            }
            spare[..count].copy_from_slice(&data[done..done + count]);
            self.commit(count);
            done += count;
        }
    }

    /// `length` bytes from `offset` on, or as many as there are.
    pub(crate) fn range(&self, offset: usize, length: usize) -> [&[u8]; 2] {
        let offset = offset.min(self.length);
        let length = length.min(self.length - offset);
        let size = self.bytes.len();
        if size == 0 {
            return [&[], &[]];
        }
        let first = (self.start + offset) % size;
        let in_first = length.min(size - first);
        [
            &self.bytes[first..first + in_first],
            &self.bytes[..length - in_first],
        ]
    }

    /// Drops the first `count` bytes.
    pub(crate) fn consume(&mut self, count: usize) {
        let count = count.min(self.length);
        self.length -= count;
        self.start = if self.length == 0 {
            0
        } else {
            (self.start + count) % self.bytes.len()
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents(ring: &Ring, offset: usize, length: usize) -> Vec<u8> {
        ring.range(offset, length).concat()
    }

    #[test]
    fn bytes_come_out_in_order_around_the_edge_and_after_growing() {
        let mut ring = Ring::new(64 << 10);
        let mut sent = 0_u32;
        let mut seen = 0_u32;
        for round in 0..200 {
            let data: Vec<u8> = (sent..sent + 700 * (round % 5))
                .map(|i| (i % 251) as u8)
                .collect();
            sent += ring.push(&data) as u32;
            let there = contents(&ring, 0, 1000);
            for (index, byte) in there.iter().enumerate() {
                assert_eq!(*byte, ((seen + index as u32) % 251) as u8);
            }
            ring.consume(there.len());
            seen += there.len() as u32;
        }
        assert!(seen > 100_000);
    }

    #[test]
    fn no_more_than_the_limit_fits() {
        let mut ring = Ring::new(32 << 10);
        assert_eq!(ring.push(&vec![1; 40 << 10]), 32 << 10);
        assert_eq!(ring.room(), 0);
        ring.consume(10);
        assert_eq!(ring.push(&[2; 20]), 10);
        assert_eq!(
            contents(&ring, (32 << 10) - 12, 99),
            [&[1; 2][..], &[2; 10]].concat()
        );
    }
}
