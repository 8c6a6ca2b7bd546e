//! Where things are in a qcow2 image, and what table entries mean. The names are those of QEMU's
//! docs/interop/qcow2.rst, sections "Cluster mapping" and "Extended L2 Entries".

use super::header::{Header, Incompatible};

/// Bits of L1 and L2 entries.
pub(super) const COPIED: u64 = 1 << 63;
pub(super) const COMPRESSED: u64 = 1 << 62;
pub(super) const ZERO: u64 = 1;
/// The host offset in an entry.
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bytes that compressed data is counted in.
const SECTOR: u64 = 512;
/// Subclusters of a cluster, if entries have a bitmap of them.
pub(super) const SUBCLUSTERS: u64 = 32;

/// Sizes that follow from the header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) cluster_bits: u32,
    /// Whether entries of L2 tables have bitmaps.
    pub(super) extended: bool,
    /// Whether data is in a file of its own, where offset 0 is as good as any.
    pub(super) external: bool,
    pub(super) version: u32,
}

/// What a range of one cluster is, as its entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// At a host offset; `true` if nothing else refers to the cluster.
    Data(u64, bool),
    /// Zeroes.
    Zero,
    /// In the backing image.
    Backing,
    /// Compressed.
    Compressed(CompressedData),
}

/// Where compressed data of a cluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CompressedData {
    /// Host offset, in bytes.
    pub(super) offset: u64,
    /// Bytes at most.
    pub(super) length: u64,
}

/// An entry of an L2 table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) value: u64,
    /// Which subclusters are allocated (low half) or zeroes (high half).
    pub(super) bitmap: u64,
}

impl Layout {
    pub(super) fn new(header: &Header) -> Self {
        Self {
            cluster_bits: header.cluster_bits,
            extended: header.has_subclusters(),
            external: header.incompatible.contains(Incompatible::DATA_FILE),
            version: header.version,
        }
    }

    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes that have an allocation state of their own.
    pub(super) fn unit(&self) -> u64 {
        if self.extended {
            self.cluster_size() / SUBCLUSTERS
        } else {
            self.cluster_size()
        }
    }

    /// Bytes of an entry of an L2 table.
    pub(super) fn entry_size(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// Entries of an L2 table.
    pub(super) fn l2_entries(&self) -> u64 {
        self.cluster_size() / self.entry_size()
    }

    /// Bytes of the disk that an L2 table is for.
    pub(super) fn l2_reach(&self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// L1 entries for a disk of this size.
    pub(super) fn l1_entries(&self, size: u64) -> u64 {
        size.div_ceil(self.l2_reach())
    }

    /// Where a guest offset is looked up: in L1, in L2.
    pub(super) fn indexes(&self, offset: u64) -> (usize, u64) {
        let l1 = offset / self.l2_reach();
        let l2 = (offset % self.l2_reach()) >> self.cluster_bits;
        (l1 as usize, l2)
    }

    /// What `offset` within the cluster that `entry` is for is.
    pub(super) fn place(&self, entry: Entry, offset: u64) -> Place {
        let inside = offset % self.cluster_size();
        let value = entry.value;
        if value & COMPRESSED != 0 {
            return Place::Compressed(self.compressed(value));
        }
        let host = value & OFFSET;
        let data = Place::Data(host + inside, value & COPIED != 0);
        if self.extended {
            let bit = inside / self.unit();
            return match (
                entry.bitmap >> bit & 1,
                entry.bitmap >> (bit + SUBCLUSTERS) & 1,
            ) {
                (_, 1) => Place::Zero,
                (1, _) => data,
                _ => Place::Backing,
            };
        }
        if value & ZERO != 0 && self.version >= 3 {
            Place::Zero
        } else if host == 0 && !(self.external && value & COPIED != 0) {
            Place::Backing
        } else {
            data
        }
    }

    /// "Compressed Clusters Descriptor".
    pub(super) fn compressed(&self, value: u64) -> CompressedData {
        let shift = 62 - (self.cluster_bits - 8);
        let offset = value & ((1 << shift) - 1);
        let sectors = (value & (COMPRESSED - 1)) >> shift;
        CompressedData {
            offset,
            length: (sectors + 1) * SECTOR - offset % SECTOR,
        }
    }

    /// The entry for compressed data of so many bytes; none if it is too far in the file.
    pub(super) fn compressed_entry(&self, offset: u64, length: u64) -> Option<u64> {
        let shift = 62 - (self.cluster_bits - 8);
        let sectors = (offset + length - 1) / SECTOR - offset / SECTOR;
        let fits = offset < 1 << shift && sectors < 1 << (self.cluster_bits - 8);
        fits.then_some(COMPRESSED | sectors << shift | offset)
    }

    /// The host clusters that an entry refers to, as the first and how many.
    pub(super) fn clusters(&self, entry: Entry) -> (u64, u64) {
        if entry.value & COMPRESSED != 0 {
            let data = self.compressed(entry.value);
            let first = data.offset >> self.cluster_bits;
            let last = (data.offset + data.length - 1) >> self.cluster_bits;
            return (first, last - first + 1);
        }
        let first = (entry.value & OFFSET) >> self.cluster_bits;
        (first, u64::from(first != 0 && !self.external))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(cluster_bits: u32, extended: bool) -> Layout {
        Layout {
            cluster_bits,
            extended,
            external: false,
            version: 3,
        }
    }

    #[test]
    fn entries_say_where_data_is() {
        let layout = layout(16, false);
        let entry = |value| Entry { value, bitmap: 0 };
        for (value, place) in [
            (COPIED | 0x50000, Place::Data(0x51234, true)),
            (0x50000, Place::Data(0x51234, false)),
            (ZERO, Place::Zero),
            (COPIED | 0x50000 | ZERO, Place::Zero),
            (0, Place::Backing),
        ] {
            assert_eq!(layout.place(entry(value), 0x71234), place, "{value:#x}");
        }
        assert_eq!(layout.indexes(0x3_2001_0000), (0x19, 1));
    }

    #[test]
    fn subclusters_have_states_of_their_own() {
        let layout = layout(16, true);
        let entry = Entry {
            value: COPIED | 0x50000,
            bitmap: 1 << 32 | 1 << 1,
        };
        assert_eq!(layout.place(entry, 0x7ff), Place::Zero);
        assert_eq!(layout.place(entry, 0x800), Place::Data(0x50800, true));
        assert_eq!(layout.place(entry, 0x1000), Place::Backing);
    }

    #[test]
    fn compressed_entries_tell_what_went_in() {
        for bits in [9, 16, 21] {
            let layout = layout(bits, false);
            for (offset, length) in [(0x1_0000, 1), (0x1_01ff, 2), (0x7fe00, 511)] {
                let value = layout.compressed_entry(offset, length).unwrap();
                let data = layout.compressed(value);
                assert_eq!(data.offset, offset);
                assert!(data.length >= length && data.length < length + 512);
            }
            assert_eq!(layout.compressed_entry(1 << 62, 1), None);
        }
    }
}
