//! Making new images.

use super::header::{
    Autoclear, CLUSTER_BITS, Compatible, Compression, Encryption, Header, Incompatible, MAX_L1,
};
use super::layout::Layout;
use super::refcounts::numbers;
use crate::crypt::Luks;
use crate::error::{Error, Result};
use crate::{Cipher, Hash, HostFile, Passphrase};

/// What a new image is to be like.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of a cluster: a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// Version of the format: 2 or 3.
    pub version: u32,
    /// The image that it is based on, as it is to be written there, and its format.
    pub backing: Option<(String, String)>,
    /// How clusters are compressed, if any are.
    pub compression: Compression,
    /// Whether parts of clusters have states of their own (version 3, clusters from 16 KiB on).
    pub extended_l2: bool,
    /// Whether refcounts may be written late (version 3). Strata does in any case, and repairs what a
    /// crash leaves.
    pub lazy_refcounts: bool,
    /// Bits of a refcount: a power of two up to 64; 16 in version 2.
    pub refcount_bits: u32,
    /// The file that data is to be in, if not in the image.
    pub data_file: Option<String>,
    /// How data is to be encrypted, if it is.
    pub secret: Option<Secret>,
}

/// How a new image is encrypted: with LUKS.
#[derive(Clone, Debug)]
pub struct Secret {
    /// What opens it.
    pub passphrase: Passphrase,
    /// With what.
    pub cipher: Cipher,
    /// What makes a key of the passphrase, with PBKDF2.
    pub hash: Hash,
    /// How often it is done for that: each time the image is opened takes so long.
    pub rounds: u32,
}

impl Secret {
    /// The usual one: AES with keys of 256 bits in XTS mode, SHA-256 and a million rounds, which take
    /// some tenths of a second.
    pub fn new(passphrase: Passphrase) -> Self {
        Self {
            passphrase,
            cipher: Cipher::default(),
            hash: Hash::Sha256,
            rounds: 1_000_000,
        }
    }
}

impl Options {
    /// The usual image of a disk of so many bytes.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            cluster_size: 64 << 10,
            version: 3,
            backing: None,
            compression: Compression::Zlib,
            extended_l2: false,
            lazy_refcounts: false,
            refcount_bits: 16,
            data_file: None,
            secret: None,
        }
    }

    fn header(&self) -> Result<Header> {
        let invalid = |what: &str| Err(Error::Invalid(what.to_owned()));
        let bits = self.cluster_size.ilog2();
        if !self.cluster_size.is_power_of_two() || !CLUSTER_BITS.contains(&bits) {
            return invalid("the cluster size must be a power of two from 512 to 2M");
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return invalid("the bits of a refcount must be a power of two up to 64");
        }
        let new = self.extended_l2
            || self.lazy_refcounts
            || self.refcount_bits != 16
            || self.data_file.is_some()
            || self.secret.is_some()
            || self.compression != Compression::Zlib;
        if self.version != 3 && (self.version != 2 || new) {
            return invalid("such an image must be of version 3");
        }
        if self.extended_l2 && bits < 14 {
            return invalid("subclusters need clusters of at least 16K");
        }
        let mut header = Header::new(self.version, self.size, bits);
        header.refcount_order = self.refcount_bits.ilog2();
        header.compression = self.compression;
        let flags = [
            (
                self.compression != Compression::Zlib,
                Incompatible::COMPRESSION,
            ),
            (self.extended_l2, Incompatible::EXTENDED_L2),
            (self.data_file.is_some(), Incompatible::DATA_FILE),
        ];
        for (_, flag) in flags.into_iter().filter(|flag| flag.0) {
            header.incompatible |= flag;
        }
        if self.lazy_refcounts {
            header.compatible |= Compatible::LAZY_REFCOUNTS;
        }
        if let Some((name, format)) = &self.backing {
            header.backing_name = Some(name.clone());
            header.backing_format = Some(format.clone());
        }
        header.data_file.clone_from(&self.data_file);
        header.autoclear = Autoclear::empty();
        let entries = Layout::new(&header).l1_entries(self.size);
        if entries * 8 > MAX_L1 {
            return invalid("the disk is too large for its cluster size; use larger clusters");
        }
        header.l1_entries = entries as u32;
        Ok(header)
    }
}

/// Makes `file`, which is empty, an image without data.
pub fn create(file: &HostFile, options: &Options) -> Result<()> {
    let mut header = options.header()?;
    let size = options.cluster_size;
    let l1_clusters = (u64::from(header.l1_entries) * 8).div_ceil(size);
    let luks_length = options.secret.as_ref();
    let luks_length = luks_length.map_or(0, |secret| Luks::length(&secret.cipher));
    let luks_clusters = luks_length.div_ceil(size);
    // header, refcount table, its blocks, L1 table, LUKS header
    let per_block = (size * 8) >> header.refcount_order;
    let mut blocks = 1;
    let mut used = 0;
    let mut table = 1;
    while used == 0 || blocks * per_block < used {
        blocks = used.div_ceil(per_block).max(1);
        table = (blocks * 8).div_ceil(size);
        used = 1 + table + blocks + l1_clusters + luks_clusters;
    }
    header.refcount_table_offset = size;
    header.refcount_table_clusters = table as u32;
    header.l1_offset = (1 + table + blocks) * size;
    let first_block = (1 + table) * size;
    let offsets: Vec<u64> = (0..blocks)
        .map(|block| first_block + block * size)
        .collect();
    file.set_size(used * size)?;
    file.write_bytes(size, &numbers(&offsets))?;
    let mut counts = vec![0_u8; (blocks * size) as usize];
    let width = 1_u64 << header.refcount_order;
    for cluster in 0..used {
        let bit = cluster * width;
        // the lowest bit of a big-endian number, or of a field within a byte
        let (byte, shift) = if width < 8 {
            (bit / 8, bit % 8)
        } else {
            (bit / 8 + width / 8 - 1, 0)
        };
        counts[byte as usize] |= 1 << shift;
    }
    file.write_bytes(first_block, &counts)?;
    if let Some(secret) = &options.secret {
        let Secret {
            passphrase,
            cipher,
            hash,
            rounds,
        } = secret;
        let offset = (used - luks_clusters) * size;
        header.encryption = Some(Encryption::Luks(offset, luks_length));
        file.write_bytes(offset, &Luks::create(cipher, *hash, passphrase, *rounds)?)?;
    }
    file.write_bytes(0, &header.encode()?)?;
    file.sync()?;
    Ok(())
}
