//! What is on the disk, byte by byte: `fs/erofs/erofs_fs.h` of Linux. All numbers are
//! little-endian. Called by `metadata`; pure.

/// Size of a block, bytes. Kernels before 6.4 know no other than the page's.
pub(crate) const BLOCK: u64 = 4096;
const BLOCK_BITS: u8 = 12;

/// Where the superblock is, bytes.
pub(crate) const SUPERBLOCK_AT: u64 = 1024;
const MAGIC: u32 = 0xe0f5_e1e2;
const COMPAT_CHECKSUM: u32 = 1;
/// Times are of the last change of contents.
const COMPAT_MTIME: u32 = 2;
const INCOMPAT_CHUNKED_FILE: u32 = 4;

/// An inode's number is its place in the metadata area in units of this many bytes.
pub(crate) const SLOT: u64 = 32;
/// Size of an extended inode, bytes.
pub(crate) const INODE: u64 = 64;

/// Permissions, set-ID and sticky bits of a mode.
pub(crate) const MODE_BITS: u16 = 0o7777;
/// Longest name in a directory, bytes.
pub(crate) const MAX_NAME: usize = 255;
/// Longest target of a symbolic link that Linux follows, bytes.
pub(crate) const MAX_SYMLINK: usize = 4095;
/// In the map of a chunked file: nothing but zeros here.
pub(crate) const HOLE: u32 = u32::MAX;

/// Types of files: in the upper bits of a mode, and in directories.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileType {
    Regular,
    Directory,
    Character,
    Block,
    Fifo,
    Symlink,
}

impl FileType {
    /// `S_IFMT` of inode(7).
    pub(crate) fn mode(self) -> u16 {
        match self {
            Self::Fifo => 0o010_000,
            Self::Character => 0o020_000,
            Self::Directory => 0o040_000,
            Self::Block => 0o060_000,
            Self::Regular => 0o100_000,
            Self::Symlink => 0o120_000,
        }
    }

    /// `EROFS_FT_*`.
    fn in_directory(self) -> u8 {
        match self {
            Self::Regular => 1,
            Self::Directory => 2,
            Self::Character => 3,
            Self::Block => 4,
            Self::Fifo => 5,
            Self::Symlink => 7,
        }
    }
}

/// How an inode's contents are found: `EROFS_INODE_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// In blocks in a row.
    FlatPlain = 0,
    /// The same, but for the end, which follows the inode.
    FlatInline = 2,
    /// By a map of chunks, which follows the inode.
    ChunkBased = 4,
}

/// An extended inode.
#[derive(Debug, Clone)]
pub(crate) struct DiskInode {
    pub(crate) layout: Layout,
    /// Size of the attributes that follow; see [`xattr_area`].
    pub(crate) xattr_bytes: u64,
    pub(crate) mode: u16,
    pub(crate) size: u64,
    /// First block, device number or size of chunks.
    pub(crate) place: u32,
    pub(crate) number: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) seconds: i64,
    pub(crate) nanoseconds: u32,
    pub(crate) links: u32,
}

impl DiskInode {
    pub(crate) fn encode(&self) -> [u8; INODE as usize] {
        let xattr_count = match self.xattr_bytes {
            0 => 0,
            bytes => (bytes - XATTR_HEADER) / 4 + 1,
        };
        let mut out = Fields::default();
        out.u16(1 | (self.layout as u16) << 1)
            .u16(xattr_count as u16)
            .u16(self.mode)
            .u16(0)
            .u64(self.size)
            .u32(self.place)
            .u32(self.number)
            .u32(self.uid)
            .u32(self.gid)
            .u64(self.seconds as u64)
            .u32(self.nanoseconds)
            .u32(self.links);
        out.padded()
    }
}

/// The device number as Linux encodes it in 32 bits, if it fits.
pub(crate) fn device(major: u32, minor: u32) -> Option<u32> {
    (major < 1 << 12 && minor < 1 << 20)
        .then_some((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
}

/// What a directory's entry takes, but for its name, bytes.
pub(crate) const DIRECTORY_ENTRY: usize = 12;

/// One block of a directory: entries, then their names.
pub(crate) fn directory_block(entries: &[(&[u8], u64, FileType)]) -> Vec<u8> {
    let mut out = Fields::default();
    let mut name_at = entries.len() * DIRECTORY_ENTRY;
    for (name, nid, kind) in entries {
        out.u64(*nid)
            .u16(name_at as u16)
            .u8(kind.in_directory())
            .u8(0);
        name_at += name.len();
    }
    for (name, ..) in entries {
        out.0.extend_from_slice(name);
    }
    out.0
}

/// An extended attribute: its name with the namespace, and its value.
pub(crate) type Xattr = (Box<[u8]>, Box<[u8]>);

const XATTR_HEADER: u64 = 12;
/// The most that an inode's field for it can tell, bytes.
pub(crate) const MAX_XATTR_BYTES: u64 = XATTR_HEADER + (u16::MAX as u64 - 1) * 4;

/// Namespaces of attributes, by number: `EROFS_XATTR_INDEX_*`.
const XATTR_PREFIXES: [(u8, &[u8]); 5] = [
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
];

/// Number of the attribute's namespace, and the rest of its name; `None` for namespaces that
/// EROFS does not know.
pub(crate) fn xattr_name(name: &[u8]) -> Option<(u8, &[u8])> {
    XATTR_PREFIXES.iter().find_map(|(number, prefix)| {
        let rest = name.strip_prefix(*prefix)?;
        // A namespace needs a name in it; the two of ACLs are names themselves.
        let whole = !prefix.ends_with(b".");
        (rest.is_empty() == whole && rest.len() <= MAX_NAME).then_some((*number, rest))
    })
}

/// The attributes as they follow their inode; empty without any.
pub(crate) fn xattr_area(xattrs: &[Xattr]) -> Vec<u8> {
    let mut out = Fields::default();
    if xattrs.is_empty() {
        return out.0;
    }
    out.0.resize(XATTR_HEADER as usize, 0);
    for (name, value) in xattrs {
        let Some((namespace, rest)) = xattr_name(name) else {
            continue;
        };
        out.u8(rest.len() as u8)
            .u8(namespace)
            .u16(value.len() as u16);
        out.0.extend_from_slice(rest);
        out.0.extend_from_slice(value);
        out.0.resize(out.0.len().next_multiple_of(4), 0);
    }
    out.0
}

/// The superblock.
#[derive(Debug, Clone)]
pub(crate) struct Superblock {
    pub(crate) root: u16,
    pub(crate) inodes: u64,
    pub(crate) blocks: u32,
    /// First block of the metadata area.
    pub(crate) metadata: u32,
    pub(crate) uuid: [u8; 16],
    /// Whether there are chunked files.
    pub(crate) chunked: bool,
}

impl Superblock {
    /// The first block, from [`SUPERBLOCK_AT`] on.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut block = self.encode_with_checksum(0);
        block.resize((BLOCK - SUPERBLOCK_AT) as usize, 0);
        let checksum = crc32c(&block);
        block[4..8].copy_from_slice(&checksum.to_le_bytes());
        block
    }

    fn encode_with_checksum(&self, checksum: u32) -> Vec<u8> {
        let mut out = Fields::default();
        out.u32(MAGIC)
            .u32(checksum)
            .u32(COMPAT_CHECKSUM | COMPAT_MTIME)
            .u8(BLOCK_BITS)
            .u8(0) // no extension slots
            .u16(self.root)
            .u64(self.inodes)
            .u64(0) // time of the build: none, so that the same tar gives the same bytes
            .u32(0)
            .u32(self.blocks)
            .u32(self.metadata)
            .u32(0); // no shared attributes
        out.0.extend_from_slice(&self.uuid);
        out.0.extend_from_slice(&[0; 16]); // no name
        out.u32(if self.chunked {
            INCOMPAT_CHUNKED_FILE
        } else {
            0
        });
        out.0
    }
}

/// CRC-32C as Linux has it: without the inversion at the end.
fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (POLYNOMIAL & (crc & 1).wrapping_neg())
        })
    })
}

/// Little-endian fields one after the other.
#[derive(Default)]
struct Fields(Vec<u8>);

impl Fields {
    fn u8(&mut self, value: u8) -> &mut Self {
        self.0.push(value);
        self
    }

    fn u16(&mut self, value: u16) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn padded<const N: usize>(&self) -> [u8; N] {
        let mut out = [0; N];
        out[..self.0.len()].copy_from_slice(&self.0);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_crc32c_without_its_inversion() {
        // RFC 3720, appendix B.4: 32 bytes of zeros
        assert_eq!(crc32c(&[0; 32]), !0x8a91_36aa);
    }

    #[test]
    fn device_numbers_are_linuxes() {
        assert_eq!(device(1, 3), Some(0x103));
        assert_eq!(device(259, 0x12345), Some(0x1231_0345));
        assert_eq!(device(1 << 12, 0), None);
        assert_eq!(device(0, 1 << 20), None);
    }

    #[test]
    fn attributes_outside_known_namespaces_have_no_name() {
        assert_eq!(xattr_name(b"user.a"), Some((1, &b"a"[..])));
        assert_eq!(xattr_name(b"system.posix_acl_access"), Some((2, &b""[..])));
        assert_eq!(
            xattr_name(b"security.capability"),
            Some((6, &b"capability"[..]))
        );
        for name in [
            &b"user."[..],
            b"system.nfs4_acl",
            b"system.posix_acl_accessx",
            b"x",
        ] {
            assert_eq!(xattr_name(name), None);
        }
    }

    #[test]
    fn attributes_are_padded_to_words() {
        let xattrs = [(b"user.ab"[..].into(), b"xyz"[..].into())];
        let area = xattr_area(&xattrs);
        assert_eq!(area[12..], *b"\x02\x01\x03\x00abxyz\0\0\0");
        assert!(xattr_area(&[]).is_empty());
    }
}
