//! The header of a qcow2 image: its first cluster. The layout is that of QEMU's
//! docs/interop/qcow2.rst, sections "Header" and "Header extensions".

use bitflags::bitflags;

use crate::crypt::PROLOGUE;
use crate::error::{Error, Result, damaged};

pub(super) const MAGIC: u32 = 0x5146_49fb;
/// Bytes of a version 2 header, and of the shortest version 3 header.
const V2_LENGTH: usize = 72;
const V3_LENGTH: usize = 104;
/// What this writes: version 3 with the compression type, padded to eight bytes.
const LENGTH: usize = 112;
/// Longest name of a backing image, in bytes.
const MAX_BACKING_NAME: usize = 1023;

/// Smallest and largest cluster, as log2 of bytes.
pub(super) const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// Largest L1 table and refcount table, in bytes, as in QEMU.
pub(super) const MAX_L1: u64 = 32 << 20;
pub(super) const MAX_REFCOUNT_TABLE: u64 = 8 << 20;

/// Largest LUKS header with its keys, in bytes, and the numbers of encryption methods.
const MAX_LUKS: u64 = 64 << 20;
const METHOD_NONE: u32 = 0;
const METHOD_AES: u32 = 1;
const METHOD_LUKS: u32 = 2;

/// Header extension types.
mod extension {
    pub(super) const END: u32 = 0;
    pub(super) const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub(super) const FEATURE_NAMES: u32 = 0x6803_f857;
    pub(super) const DATA_FILE: u32 = 0x4441_5441;
    pub(super) const ENCRYPTION: u32 = 0x0537_be77;
    pub(super) const BITMAPS: u32 = 0x2385_2875;
}

bitflags! {
    /// Features that whoever opens the image has to know.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Incompatible: u64 {
        /// Refcounts may be wrong.
        const DIRTY = 1;
        /// Something is wrong with the tables: not to be written to.
        const CORRUPT = 1 << 1;
        /// Data is in a file of its own.
        const DATA_FILE = 1 << 2;
        /// Another compression than zlib.
        const COMPRESSION = 1 << 3;
        /// L2 entries of 16 bytes, with subclusters.
        const EXTENDED_L2 = 1 << 4;
        const _ = !0;
    }

    /// Features that may be ignored.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Compatible: u64 {
        /// Refcounts may be written late.
        const LAZY_REFCOUNTS = 1;
        const _ = !0;
    }

    /// Features to be cleared by who writes without knowing them.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Autoclear: u64 {
        /// Bitmaps are as the disk is.
        const BITMAPS = 1;
        /// The data file can be read without the tables.
        const RAW_DATA = 1 << 1;
        const _ = !0;
    }
}

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate, with a window of 4 KiB (RFC 1951).
    Zlib,
    /// Zstandard (RFC 8878).
    Zstd,
}

/// How data is encrypted: what method the header names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encryption {
    /// AES in CBC mode, with the passphrase as the key. Long given up, for that.
    Aes,
    /// LUKS, whose own header is in the file: host offset, and bytes.
    Luks(u64, u64),
}

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) backing_name: Option<String>,
    pub(super) backing_format: Option<String>,
    pub(super) data_file: Option<String>,
    pub(super) cluster_bits: u32,
    pub(super) size: u64,
    pub(super) l1_entries: u32,
    pub(super) l1_offset: u64,
    pub(super) refcount_table_offset: u64,
    pub(super) refcount_table_clusters: u32,
    pub(super) snapshots: u32,
    pub(super) snapshots_offset: u64,
    pub(super) incompatible: Incompatible,
    pub(super) compatible: Compatible,
    pub(super) autoclear: Autoclear,
    pub(super) refcount_order: u32,
    pub(super) compression: Compression,
    pub(super) encryption: Option<Encryption>,
    /// Extensions that this does not know, to be kept.
    others: Vec<(u32, Vec<u8>)>,
}

impl Header {
    /// A new image's, without tables.
    pub(super) fn new(version: u32, size: u64, cluster_bits: u32) -> Self {
        Self {
            version,
            backing_name: None,
            backing_format: None,
            data_file: None,
            cluster_bits,
            size,
            l1_entries: 0,
            l1_offset: 0,
            refcount_table_offset: 0,
            refcount_table_clusters: 0,
            snapshots: 0,
            snapshots_offset: 0,
            incompatible: Incompatible::empty(),
            compatible: Compatible::empty(),
            autoclear: Autoclear::empty(),
            refcount_order: 4,
            compression: Compression::Zlib,
            encryption: None,
            others: Vec::new(),
        }
    }

    /// How much of an image `parse` wants to see: the cluster size, at least 512, from its first
    /// bytes.
    pub(super) fn extent(first: &[u8]) -> Result<usize> {
        let fields = Fields(first);
        if fields.u32(0)? != MAGIC {
            return Err(Error::Invalid("this is no qcow2 image".to_owned()));
        }
        let bits = fields.u32(20)?;
        if !CLUSTER_BITS.contains(&bits) {
            return Err(damaged(format!("clusters of 2^{bits} bytes")));
        }
        Ok(1 << bits)
    }

    /// Reads the first cluster.
    pub(super) fn parse(cluster: &[u8]) -> Result<Self> {
        let bits = Self::extent(cluster)?.trailing_zeros();
        let fields = Fields(cluster);
        let version = fields.u32(4)?;
        if !(2..=3).contains(&version) {
            let what = format!("version {version} of the qcow2 format");
            return Err(Error::Unsupported(what));
        }
        let mut header = Self {
            encryption: match fields.u32(32)? {
                METHOD_NONE => None,
                METHOD_AES => Some(Encryption::Aes),
                // where it is, an extension says
                METHOD_LUKS => Some(Encryption::Luks(0, 0)),
                other => return Err(damaged(format!("encryption method {other}"))),
            },
            l1_entries: fields.u32(36)?,
            l1_offset: fields.u64(40)?,
            refcount_table_offset: fields.u64(48)?,
            refcount_table_clusters: fields.u32(56)?,
            snapshots: fields.u32(60)?,
            snapshots_offset: fields.u64(64)?,
            ..Self::new(version, fields.u64(24)?, bits)
        };
        let mut length = V2_LENGTH;
        if version == 3 {
            length = fields.u32(100)? as usize;
            if length < V3_LENGTH || length > cluster.len() || !length.is_multiple_of(8) {
                return Err(damaged(format!("a header of {length} bytes")));
            }
            header.incompatible = Incompatible::from_bits_retain(fields.u64(72)?);
            header.compatible = Compatible::from_bits_retain(fields.u64(80)?);
            header.autoclear = Autoclear::from_bits_retain(fields.u64(88)?);
            header.refcount_order = fields.u32(96)?;
            if length > V3_LENGTH {
                header.compression = match cluster[V3_LENGTH] {
                    0 => Compression::Zlib,
                    1 => Compression::Zstd,
                    other => {
                        let what = format!("compression type {other}");
                        return Err(Error::Unsupported(what));
                    }
                };
            }
        }
        header.parse_extensions(cluster, length)?;
        header.parse_backing_name(cluster, &fields)?;
        header.check()?;
        Ok(header)
    }

    fn parse_extensions(&mut self, cluster: &[u8], length: usize) -> Result<()> {
        let backing = Fields(cluster).u64(8)?;
        let end = match usize::try_from(backing) {
            Ok(0) | Err(_) => cluster.len(),
            Ok(backing) => backing.min(cluster.len()),
        };
        let fields = Fields(&cluster[..end]);
        let mut at = length;
        while at + 8 <= end {
            let (kind, size) = (fields.u32(at)?, fields.u32(at + 4)? as usize);
            if kind == extension::END {
                break;
            }
            let data = fields.bytes(at + 8, size)?;
            let text = || {
                let text = String::from_utf8(data.to_vec());
                text.map_err(|_| damaged("a name in the header is no text"))
            };
            match kind {
                extension::BACKING_FORMAT => self.backing_format = Some(text()?),
                extension::DATA_FILE => self.data_file = Some(text()?),
                // made anew
                extension::FEATURE_NAMES => {}
                extension::ENCRYPTION => {
                    let place = Fields(data);
                    if let Some(Encryption::Luks(offset, length)) = &mut self.encryption {
                        (*offset, *length) = (place.u64(0)?, place.u64(8)?);
                    }
                }
                _ => self.others.push((kind, data.to_vec())),
            }
            at += 8 + size.next_multiple_of(8);
        }
        Ok(())
    }

    fn parse_backing_name(&mut self, cluster: &[u8], fields: &Fields) -> Result<()> {
        let offset = fields.u64(8)?;
        if offset == 0 {
            return Ok(());
        }
        let size = fields.u32(16)? as usize;
        let offset = usize::try_from(offset).unwrap_or(cluster.len());
        if size > MAX_BACKING_NAME {
            return Err(damaged(format!("a backing image's name of {size} bytes")));
        }
        let name = fields.bytes(offset, size)?.to_vec();
        let name = String::from_utf8(name);
        self.backing_name = Some(name.map_err(|_| damaged("the backing image's name is no text"))?);
        Ok(())
    }

    fn check(&self) -> Result<()> {
        let known = Incompatible::DIRTY
            | Incompatible::CORRUPT
            | Incompatible::DATA_FILE
            | Incompatible::COMPRESSION
            | Incompatible::EXTENDED_L2;
        let unknown = self.incompatible.bits() & !known.bits();
        if unknown != 0 {
            let what = format!("features that are not known (bits {unknown:#x})");
            return Err(Error::Unsupported(what));
        }
        if (self.compression != Compression::Zlib)
            != self.incompatible.contains(Incompatible::COMPRESSION)
        {
            return Err(damaged("the compression type is not the one announced"));
        }
        if self.has_subclusters() && self.cluster_bits < 14 {
            return Err(damaged("subclusters in clusters of less than 16 KiB"));
        }
        if self.refcount_order > 6 {
            let order = self.refcount_order;
            return Err(damaged(format!("refcounts of 2^{order} bits")));
        }
        let cluster = 1_u64 << self.cluster_bits;
        for (what, offset) in [
            ("L1 table", self.l1_offset),
            ("refcount table", self.refcount_table_offset),
            ("snapshot table", self.snapshots_offset),
        ] {
            if !offset.is_multiple_of(cluster) || offset > i64::MAX as u64 {
                return Err(damaged(format!("the {what} is at byte {offset:#x}")));
            }
        }
        if let Some(Encryption::Luks(offset, length)) = self.encryption {
            let whole = offset.is_multiple_of(cluster) && i64::try_from(offset).is_ok();
            if offset == 0 || !whole || !(PROLOGUE as u64..=MAX_LUKS).contains(&length) {
                return Err(damaged(format!("the LUKS header is at byte {offset:#x}")));
            }
        }
        let l1 = u64::from(self.l1_entries) * 8;
        if l1 > MAX_L1 || self.size > i64::MAX as u64 {
            return Err(damaged(format!("an L1 table of {l1} bytes")));
        }
        let table = u64::from(self.refcount_table_clusters) << self.cluster_bits;
        if table > MAX_REFCOUNT_TABLE || table == 0 {
            return Err(damaged(format!("a refcount table of {table} bytes")));
        }
        Ok(())
    }

    /// The extension that says where bitmaps are.
    pub(super) fn bitmaps(&self) -> Option<&[u8]> {
        let found = self
            .others
            .iter()
            .find(|(kind, _)| *kind == extension::BITMAPS);
        found.map(|(_, data)| data.as_slice())
    }

    /// Lets the image have no bitmaps.
    pub(super) fn forget_bitmaps(&mut self) {
        self.autoclear.remove(Autoclear::BITMAPS);
        self.others.retain(|(kind, _)| *kind != extension::BITMAPS);
    }

    /// Whether L2 entries have a bitmap of subclusters.
    pub(super) fn has_subclusters(&self) -> bool {
        self.incompatible.contains(Incompatible::EXTENDED_L2)
    }

    /// The bytes of the first cluster, as many as are used.
    pub(super) fn encode(&self) -> Result<Vec<u8>> {
        let length = if self.version == 2 { V2_LENGTH } else { LENGTH };
        let mut bytes = vec![0; length];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &MAGIC.to_be_bytes());
        put(4, &self.version.to_be_bytes());
        put(20, &self.cluster_bits.to_be_bytes());
        put(24, &self.size.to_be_bytes());
        let method = match self.encryption {
            None => METHOD_NONE,
            Some(Encryption::Aes) => METHOD_AES,
            Some(Encryption::Luks(..)) => METHOD_LUKS,
        };
        put(32, &method.to_be_bytes());
        put(36, &self.l1_entries.to_be_bytes());
        put(40, &self.l1_offset.to_be_bytes());
        put(48, &self.refcount_table_offset.to_be_bytes());
        put(56, &self.refcount_table_clusters.to_be_bytes());
        put(60, &self.snapshots.to_be_bytes());
        put(64, &self.snapshots_offset.to_be_bytes());
        if self.version == 3 {
            put(72, &self.incompatible.bits().to_be_bytes());
            put(80, &self.compatible.bits().to_be_bytes());
            put(88, &self.autoclear.bits().to_be_bytes());
            put(96, &self.refcount_order.to_be_bytes());
            put(100, &(LENGTH as u32).to_be_bytes());
            put(104, &[u8::from(self.compression == Compression::Zstd)]);
        }
        let mut extend = |kind: u32, data: &[u8]| {
            bytes.extend(kind.to_be_bytes());
            bytes.extend((data.len() as u32).to_be_bytes());
            bytes.extend(data);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        };
        if let Some(format) = &self.backing_format {
            extend(extension::BACKING_FORMAT, format.as_bytes());
        }
        if let Some(name) = &self.data_file {
            extend(extension::DATA_FILE, name.as_bytes());
        }
        if let Some(Encryption::Luks(offset, length)) = self.encryption {
            let place = [offset.to_be_bytes(), length.to_be_bytes()].concat();
            extend(extension::ENCRYPTION, &place);
        }
        for (kind, data) in &self.others {
            extend(*kind, data);
        }
        if self.version == 3 {
            extend(extension::FEATURE_NAMES, &feature_names());
        }
        extend(extension::END, &[]);
        if let Some(name) = &self.backing_name {
            let (offset, size) = (bytes.len() as u64, name.len() as u32);
            bytes[8..16].copy_from_slice(&offset.to_be_bytes());
            bytes[16..20].copy_from_slice(&size.to_be_bytes());
            bytes.extend(name.as_bytes());
        }
        let name = self.backing_name.as_ref().map_or(0, String::len);
        if bytes.len() > 1 << self.cluster_bits || name > MAX_BACKING_NAME {
            let what = "the backing image's name is too long; use a shorter path";
            return Err(Error::Invalid(what.to_owned()));
        }
        Ok(bytes)
    }
}

/// The names of feature bits, for programs that do not know them: kind, bit, 46 bytes of text.
fn feature_names() -> Vec<u8> {
    let names: [(u8, u8, &str); 7] = [
        (0, 0, "dirty bit"),
        (0, 1, "corrupt bit"),
        (0, 2, "external data file"),
        (0, 3, "compression type"),
        (0, 4, "extended L2 entries"),
        (1, 0, "lazy refcounts"),
        (2, 1, "raw external data"),
    ];
    let mut bytes = Vec::new();
    for (kind, bit, name) in names {
        let start = bytes.len();
        bytes.extend([kind, bit]);
        bytes.extend(name.as_bytes());
        bytes.resize(start + 48, 0);
    }
    bytes
}

/// Big-endian fields of bytes that may be too few.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes(&self, at: usize, length: usize) -> Result<&[u8]> {
        let end = at.checked_add(length);
        end.and_then(|end| self.0.get(at..end))
            .ok_or_else(|| damaged("the header is cut off"))
    }

    fn u32(&self, at: usize) -> Result<u32> {
        let bytes = self.bytes(at, 4)?;
        Ok(bytes
            .iter()
            .fold(0, |all, byte| all << 8 | u32::from(*byte)))
    }

    fn u64(&self, at: usize) -> Result<u64> {
        let bytes = self.bytes(at, 8)?;
        Ok(bytes
            .iter()
            .fold(0, |all, byte| all << 8 | u64::from(*byte)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            backing_name: Some("base.raw".to_owned()),
            backing_format: Some("raw".to_owned()),
            l1_entries: 3,
            l1_offset: 0x30000,
            refcount_table_offset: 0x10000,
            refcount_table_clusters: 1,
            compatible: Compatible::LAZY_REFCOUNTS,
            others: vec![(0x1234, vec![1, 2, 3])],
            ..Header::new(3, 5 << 20, 16)
        }
    }

    fn cluster(header: &Header) -> Vec<u8> {
        let mut bytes = header.encode().unwrap();
        bytes.resize(1 << header.cluster_bits, 0);
        bytes
    }

    #[test]
    fn what_is_encoded_is_parsed_again() {
        for version in [2, 3] {
            let mut header = header();
            header.version = version;
            if version == 2 {
                header.compatible = Compatible::empty();
            }
            let parsed = Header::parse(&cluster(&header)).unwrap();
            assert_eq!(format!("{parsed:?}"), format!("{header:?}"));
        }
    }

    #[test]
    fn headers_that_lie_are_refused() {
        let good = cluster(&header());
        let spoil: [(usize, u64, usize, &str); 9] = [
            (0, 0, 4, "no qcow2"),
            (4, 4, 4, "version 4"),
            (20, 30, 4, "2^30"),
            (32, 2, 4, "LUKS"),
            (36, 1 << 30, 4, "L1 table"),
            (40, 0x30001, 8, "L1 table"),
            (72, 1 << 40, 8, "not known"),
            (96, 7, 4, "2^7"),
            (100, 0xffff_fff8, 4, "header of"),
        ];
        for (at, value, size, what) in spoil {
            let mut bad = good.clone();
            bad[at..at + size].copy_from_slice(&value.to_be_bytes()[8 - size..]);
            let error = Header::parse(&bad).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
    }

    #[test]
    fn no_bytes_make_the_parser_panic() {
        let good = cluster(&header());
        for length in 0..200 {
            let _ = Header::parse(&good[..length]);
        }
        for at in 0..400 {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                let _ = Header::parse(&bad);
            }
        }
    }
}
