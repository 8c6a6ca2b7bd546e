//! Places all inodes, and writes them with directories, attributes, maps and tails.
//!
//! Sizes are known before anything is placed, and all is placed before anything is written,
//! because directories tell where inodes are. Called by `Layer::finish`.

use crate::Summary;
use crate::blocks::{Blocks, Data, MAX_TAIL};
use crate::error::Error;
use crate::format::{
    self, BLOCK, DIRECTORY_ENTRY, DiskInode, FileType, HOLE, INODE, Layout, SLOT, SUPERBLOCK_AT,
    Superblock, Xattr,
};
use crate::tree::{Children, Content, Id, Inode, ROOT, Tree};

/// Where the first inode is in the metadata area, so that none has the number 0.
const FIRST: u64 = 2 * SLOT;

/// What is known of an inode that a directory names.
#[derive(Debug, Clone, Copy, Default)]
struct Place {
    links: u32,
    parent: Id,
    /// Its place in the metadata area, bytes.
    at: u64,
    /// First block of contents that this module writes.
    block: u32,
}

/// Writes all metadata and the superblock.
pub(crate) fn write(tree: &Tree, mut blocks: Blocks<'_>, uuid: [u8; 16]) -> Result<Summary, Error> {
    let inodes = tree.inodes();
    let mut places = count_links(inodes);
    // in the order of the tar, as the tails are
    let order: Vec<Id> = (0..inodes.len())
        .filter(|id| places[*id].links > 0)
        .collect();

    // Directories and symbolic links that are too large to be with their inodes come first.
    let mut block = u64::from(blocks.block()?);
    for id in &order {
        places[*id].block = block_number(block)?;
        block += bytes_of(&inodes[*id], &places, *id).map_or(0, |bytes| bytes.own_blocks());
    }
    let metadata = block;
    let mut at = FIRST;
    for id in &order {
        let (head, tail) = sizes(&inodes[*id], &places, *id);
        at = fit(at, head, tail);
        places[*id].at = at;
        at += head + tail;
    }
    block_number(metadata + at.div_ceil(BLOCK))?;

    for id in &order {
        if let Some(bytes) = bytes_of(&inodes[*id], &places, *id) {
            for block in bytes.in_blocks(&places, inodes) {
                blocks.put(&block)?;
                blocks.align()?;
            }
        }
    }
    let mut chunked = false;
    for (number, id) in order.iter().enumerate() {
        blocks.skip_to(metadata * BLOCK + places[*id].at)?;
        chunked |= matches!(inodes[*id].content, Content::File(Data::Chunks { .. }));
        put_inode(
            &inodes[*id],
            *id,
            number as u32 + 1,
            &places,
            inodes,
            &mut blocks,
        )?;
    }

    let superblock = Superblock {
        root: u16::try_from(places[ROOT].at / SLOT)
            .map_err(|_| Error::TooLarge("2 MiB before the root's inode"))?,
        inodes: order.len() as u64,
        blocks: block_number(metadata + at.div_ceil(BLOCK))?,
        metadata: block_number(metadata)?,
        uuid,
        chunked,
    };
    let size = blocks.finish((SUPERBLOCK_AT, &superblock.encode()))?;
    Ok(Summary {
        inodes: superblock.inodes,
        size,
    })
}

fn block_number(block: u64) -> Result<u32, Error> {
    u32::try_from(block).map_err(|_| Error::TooLarge("16 TiB"))
}

/// Walks the tree from its root: what was replaced by later entries is not met.
fn count_links(inodes: &[Inode]) -> Vec<Place> {
    let mut places = vec![Place::default(); inodes.len()];
    places[ROOT].links = 2;
    let mut open = vec![ROOT];
    while let Some(directory) = open.pop() {
        let Content::Directory { children, .. } = &inodes[directory].content else {
            continue;
        };
        for child in children.values() {
            places[*child].links += 1;
            if matches!(inodes[*child].content, Content::Directory { .. }) {
                // its own '.', and its '..' in here
                places[*child].links += 1;
                places[directory].links += 1;
                places[*child].parent = directory;
                open.push(*child);
            }
        }
    }
    places
}

/// The attributes of an inode, with what overlayfs is to know of it.
fn xattr_area(inode: &Inode) -> Vec<u8> {
    let opaque: Xattr = (b"trusted.overlay.opaque"[..].into(), b"y"[..].into());
    match inode.content {
        Content::Directory { opaque: true, .. } => {
            let mut all = inode.xattrs.clone();
            all.push(opaque);
            format::xattr_area(&all)
        }
        _ => format::xattr_area(&inode.xattrs),
    }
}

/// Bytes of the inode with its attributes and map, and of what follows and must not cross a
/// block's end.
fn sizes(inode: &Inode, places: &[Place], id: Id) -> (u64, u64) {
    let head = INODE + xattr_area(inode).len() as u64;
    match &inode.content {
        Content::File(Data::Chunks { size, bits, .. }) => {
            (head + 4 * size.div_ceil(BLOCK << bits), 0)
        }
        Content::File(data) => (head, data.tail_size()),
        _ => (
            head,
            bytes_of(inode, places, id).map_or(0, |bytes| bytes.tail_size()),
        ),
    }
}

/// The first place from `at` on where the tail after the head is within one block.
fn fit(at: u64, head: u64, tail: u64) -> u64 {
    let at = at.next_multiple_of(SLOT);
    let tail_at = at + head;
    if tail == 0 || tail_at / BLOCK == (tail_at + tail - 1) / BLOCK {
        return at;
    }
    (tail_at.next_multiple_of(BLOCK) - head).next_multiple_of(SLOT)
}

/// Contents that are kept in memory: of a directory or of a symbolic link.
enum Bytes<'a> {
    /// Blocks of a directory, each with its entries.
    Directory(Vec<Vec<(&'a [u8], Id)>>),
    Symlink(&'a [u8]),
}

fn bytes_of<'a>(inode: &'a Inode, places: &[Place], id: Id) -> Option<Bytes<'a>> {
    match &inode.content {
        Content::Directory { children, .. } => {
            Some(Bytes::Directory(pack(children, id, places[id].parent)))
        }
        Content::Symlink(target) => Some(Bytes::Symlink(target)),
        _ => None,
    }
}

/// Spreads a directory's entries over blocks, in order of their names.
fn pack(children: &Children, own: Id, parent: Id) -> Vec<Vec<(&[u8], Id)>> {
    let mut entries: Vec<(&[u8], Id)> = children
        .iter()
        .map(|(name, id)| (&**name, *id))
        .chain([(&b"."[..], own), (&b".."[..], parent)])
        .collect();
    entries.sort_unstable_by_key(|(name, _)| *name);
    let mut blocks: Vec<Vec<(&[u8], Id)>> = vec![Vec::new()];
    let mut used = 0;
    for (name, id) in entries {
        let length = DIRECTORY_ENTRY + name.len();
        if used + length > BLOCK as usize {
            blocks.push(Vec::new());
            used = 0;
        }
        used += length;
        if let Some(block) = blocks.last_mut() {
            block.push((name, id));
        }
    }
    blocks
}

impl Bytes<'_> {
    fn size(&self) -> u64 {
        match self {
            Self::Directory(blocks) => {
                let last = blocks.last().into_iter().flatten();
                let last: usize = last.map(|(name, _)| DIRECTORY_ENTRY + name.len()).sum();
                (blocks.len() as u64 - 1) * BLOCK + last as u64
            }
            Self::Symlink(target) => target.len() as u64,
        }
    }

    fn tail_size(&self) -> u64 {
        match self.size() % BLOCK {
            tail if tail <= MAX_TAIL => tail,
            _ => 0,
        }
    }

    /// Blocks that are not with the inode.
    fn own_blocks(&self) -> u64 {
        (self.size() - self.tail_size()).div_ceil(BLOCK)
    }

    /// All contents, in pieces of one block each.
    fn all(&self, places: &[Place], inodes: &[Inode]) -> Vec<Vec<u8>> {
        match self {
            Self::Symlink(target) => vec![target.to_vec()],
            Self::Directory(blocks) => blocks
                .iter()
                .map(|entries| {
                    let entries: Vec<(&[u8], u64, FileType)> = entries
                        .iter()
                        .map(|(name, id)| {
                            (
                                *name,
                                places[*id].at / SLOT,
                                inodes[*id].content.file_type(),
                            )
                        })
                        .collect();
                    format::directory_block(&entries)
                })
                .collect(),
        }
    }

    fn in_blocks(&self, places: &[Place], inodes: &[Inode]) -> Vec<Vec<u8>> {
        if self.own_blocks() == 0 {
            return Vec::new();
        }
        let mut all = self.all(places, inodes);
        all.truncate(self.own_blocks() as usize);
        all
    }

    fn tail(&self, places: &[Place], inodes: &[Inode]) -> Vec<u8> {
        if self.tail_size() == 0 {
            return Vec::new();
        }
        self.all(places, inodes).pop().unwrap_or_default()
    }
}

fn put_inode(
    inode: &Inode,
    id: Id,
    number: u32,
    places: &[Place],
    inodes: &[Inode],
    blocks: &mut Blocks<'_>,
) -> Result<(), Error> {
    let xattrs = xattr_area(inode);
    let bytes = bytes_of(inode, places, id);
    let inline = |tail: u64| match tail {
        0 => Layout::FlatPlain,
        _ => Layout::FlatInline,
    };
    let (layout, size, place) = match (&inode.content, &bytes) {
        (_, Some(bytes)) => (inline(bytes.tail_size()), bytes.size(), places[id].block),
        (Content::File(data @ Data::Flat { block, .. }), _) => {
            (inline(data.tail_size()), data.size(), *block)
        }
        (Content::File(Data::Chunks { size, bits, .. }), _) => {
            (Layout::ChunkBased, *size, u32::from(*bits))
        }
        (Content::Character(device) | Content::Block(device), _) => (Layout::FlatPlain, 0, *device),
        _ => (Layout::FlatPlain, 0, 0),
    };
    let disk_inode = DiskInode {
        layout,
        xattr_bytes: xattrs.len() as u64,
        mode: inode.mode | inode.content.file_type().mode(),
        size,
        place,
        number,
        uid: inode.uid,
        gid: inode.gid,
        seconds: inode.time.0,
        nanoseconds: inode.time.1,
        links: places[id].links,
    };
    blocks.put(&disk_inode.encode())?;
    blocks.put(&xattrs)?;
    match (&inode.content, bytes) {
        (_, Some(bytes)) => blocks.put(&bytes.tail(places, inodes)),
        (
            Content::File(Data::Flat {
                size,
                tail: Some(tail),
                ..
            }),
            _,
        ) => blocks.put_tail(*tail, size % BLOCK),
        (Content::File(Data::Chunks { size, bits, map }), _) => {
            let mut map = map.iter().peekable();
            for index in 0..size.div_ceil(BLOCK << bits) {
                let chunk = map.next_if(|(at, _)| u64::from(*at) == index);
                blocks.put(&chunk.map_or(HOLE, |(_, block)| *block).to_le_bytes())?;
            }
            Ok(())
        }
        _ => Ok(()),
    }
}
