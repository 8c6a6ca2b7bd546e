//! Writes the layer of a container image as one uncompressed, read-only EROFS file system.
//!
//! A layer is a tar stream (OCI image specification, "Image Layer Filesystem Changeset"). It is
//! read once: the contents of files go to the blob while they pass, all that describes them is
//! kept and written after them. So memory holds metadata only, whatever the layer's size.
//!
//! ```text
//!  tar ──(tar)──> entries ──(tree)──> inodes, directories, whiteouts ──┐
//!                    │                                                 ├─(metadata)─┐
//!                    └──(blocks)──> contents, block by block           │            │
//!                                       │         ends of files ───────┘            │
//!  blob:  superblock │ contents of files │ large directories │ inodes, xattrs, tails
//! ```
//!
//! Whiteouts become what overlayfs knows, so a guest mounts layers over each other as they are.
//! The same tar gives the same bytes. Everything in a tar is taken as hostile: names cannot
//! leave the layer, memory is bounded, and what makes no sense is an [`Error`].
//!
//! The format is that of Linux, `Documentation/filesystems/erofs.rst` and `fs/erofs/erofs_fs.h`,
//! as far as Linux 5.15 reads it.
#![forbid(unsafe_code)]

mod blocks;
mod error;
mod format;
mod metadata;
mod record;
mod tar;
mod tree;

use std::fs::File;
use std::io::{Read, Write};

use tar_core::EntryType;

use crate::blocks::Blocks;
pub use crate::error::Error;
use crate::format::BLOCK;
use crate::record::Recorder;
pub use crate::record::Replay;
use crate::tar::{Entry, Reader};
use crate::tree::{Content, Inode, Tree};

/// A layer whose contents are in the blob, and whose metadata is not yet.
#[derive(Debug)]
pub struct Layer<'a> {
    blocks: Blocks<'a>,
    tree: Tree,
}

/// What a finished blob holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// Inodes: files, directories, links, devices, whiteouts.
    pub inodes: u64,
    /// Size of the blob, bytes; a multiple of 4096.
    pub size: u64,
}

impl<'a> Layer<'a> {
    /// Reads a layer to its end, and writes the contents of its files to `blob`, which must be
    /// empty and open for reading and writing.
    pub fn read(tar: impl Read, blob: &'a File) -> Result<Self, Error> {
        Self::read_into(tar, blob, Recorder(None))
    }

    /// The same, with a record by which [`Replay`] gives the tar back.
    pub fn read_recorded(
        tar: impl Read,
        blob: &'a File,
        record: &mut dyn Write,
    ) -> Result<Self, Error> {
        Self::read_into(tar, blob, Recorder(Some(record)))
    }

    fn read_into(tar: impl Read, blob: &'a File, record: Recorder<'_>) -> Result<Self, Error> {
        let mut layer = Self {
            // the first block is the superblock's
            blocks: Blocks::new(blob, BLOCK),
            tree: Tree::new(),
        };
        let mut tar = Reader::new(tar, record);
        while let Some(entry) = tar.next_entry()? {
            layer.add(entry, &mut tar)?;
        }
        tar.finish()?;
        Ok(layer)
    }

    /// Writes all metadata, and the superblock last. `uuid` names the file system.
    pub fn finish(self, uuid: [u8; 16]) -> Result<Summary, Error> {
        metadata::write(&self.tree, self.blocks, uuid)
    }

    fn add(&mut self, entry: Entry, tar: &mut Reader<'_, impl Read>) -> Result<(), Error> {
        let size = entry.content_size();
        let path = entry.path.clone();
        let bad = |reason| Error::bad_entry(&path, reason);
        let content = match entry.kind {
            EntryType::Directory => Content::directory(),
            EntryType::Symlink => {
                let target = entry
                    .link
                    .as_deref()
                    .ok_or_else(|| bad("it leads nowhere"))?;
                if target.len() > format::MAX_SYMLINK {
                    return Err(bad("its target is too long"));
                }
                Content::Symlink(target.into())
            }
            EntryType::Link => {
                let target = entry
                    .link
                    .as_deref()
                    .ok_or_else(|| bad("it leads nowhere"))?;
                return self.tree.link(&entry.path, target);
            }
            EntryType::Char | EntryType::Block => {
                let (major, minor) = entry.device;
                let device = format::device(major, minor)
                    .ok_or_else(|| bad("its device number is too large"))?;
                match entry.kind {
                    EntryType::Char => Content::Character(device),
                    _ => Content::Block(device),
                }
            }
            EntryType::Fifo => Content::Fifo,
            // Whiteouts and the like are empty; nothing of them is kept.
            EntryType::Regular | EntryType::Continuous | EntryType::GnuSparse => {
                if tree::is_marker(&entry.path) {
                    tar.skip_content(size)?;
                    return self.tree.mark(&entry.path);
                }
                Content::File(match &entry.sparse {
                    Some(sparse) if sparse.size > 0 => {
                        self.blocks.store_sparse(tar, sparse, size, &path)?
                    }
                    _ => self.blocks.store(tar, size)?,
                })
            }
            _ => return Err(bad("it is of a kind that a layer cannot have")),
        };
        tar.end_content(size)?;
        let inode = Inode {
            mode: entry.mode & format::MODE_BITS,
            uid: entry.uid,
            gid: entry.gid,
            time: entry.time,
            xattrs: entry.xattrs,
            content,
        };
        self.tree.insert(&entry.path, inode)
    }
}
