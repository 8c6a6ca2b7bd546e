//! The files of a layer as a tree in memory, built from entries in any order.
//!
//! Names are resolved inside this tree alone. `..` in an entry's name is refused; a symbolic
//! link on the way to an entry is followed within the layer, as extraction in a root of its own
//! would. Called by `Layer`, read by `metadata`.

use std::collections::{BTreeMap, VecDeque};
use std::mem;

use crate::blocks::Data;
use crate::error::Error;
use crate::format::{FileType, MAX_NAME, MAX_XATTR_BYTES, Xattr, xattr_area};
use crate::tar::Time;

/// Begins the names of whiteouts (OCI image specification, "Whiteouts").
const WHITEOUT: &[u8] = b".wh.";
/// Hides all that lower layers have in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Begins the names of notes that aufs kept for itself.
const AUFS: &[u8] = b".wh..wh.";

/// Symbolic links followed for one name, as in Linux.
const MAX_HOPS: u32 = 40;

/// Most that metadata may take in memory, bytes.
const MAX_METADATA: usize = 1 << 30;

/// Place of an inode among all of a layer's.
pub(crate) type Id = usize;
pub(crate) const ROOT: Id = 0;

/// Names in a directory, in the order that the disk has them.
pub(crate) type Children = BTreeMap<Box<[u8]>, Id>;

#[derive(Debug)]
pub(crate) struct Inode {
    /// Permissions alone; the type is that of the content.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) time: Time,
    pub(crate) xattrs: Vec<Xattr>,
    pub(crate) content: Content,
}

#[derive(Debug)]
pub(crate) enum Content {
    Directory {
        children: Children,
        /// Nothing of lower layers shows through.
        opaque: bool,
    },
    File(Data),
    Symlink(Box<[u8]>),
    Character(u32),
    Block(u32),
    Fifo,
    /// Hides the lower layers' entry of this name.
    Whiteout,
}

impl Content {
    pub(crate) fn directory() -> Self {
        Self::Directory {
            children: Children::new(),
            opaque: false,
        }
    }

    /// What overlayfs takes for a whiteout is a character device.
    pub(crate) fn file_type(&self) -> FileType {
        match self {
            Self::Directory { .. } => FileType::Directory,
            Self::File(_) => FileType::Regular,
            Self::Symlink(_) => FileType::Symlink,
            Self::Character(_) | Self::Whiteout => FileType::Character,
            Self::Block(_) => FileType::Block,
            Self::Fifo => FileType::Fifo,
        }
    }
}

impl Inode {
    fn new(mode: u16, content: Content) -> Self {
        Self {
            mode,
            uid: 0,
            gid: 0,
            time: (0, 0),
            xattrs: Vec::new(),
            content,
        }
    }

    fn memory(&self) -> usize {
        let xattrs = self
            .xattrs
            .iter()
            .map(|(name, value)| name.len() + value.len() + 32);
        let content = match &self.content {
            Content::Symlink(target) => target.len(),
            Content::File(Data::Chunks { map, .. }) => map.len() * 8,
            _ => 0,
        };
        size_of::<Self>() + xattrs.sum::<usize>() + content
    }
}

/// Whether the path's last name is one of the markers that [`Tree::mark`] understands.
pub(crate) fn is_marker(path: &[u8]) -> bool {
    let name = path.rsplit(|byte| *byte == b'/').next();
    name.is_some_and(|name| name.starts_with(WHITEOUT))
}

#[derive(Debug)]
pub(crate) struct Tree {
    inodes: Vec<Inode>,
    memory: usize,
}

impl Tree {
    /// A root directory and nothing in it.
    pub(crate) fn new() -> Self {
        Self {
            inodes: vec![Inode::new(0o755, Content::directory())],
            memory: 0,
        }
    }

    pub(crate) fn inodes(&self) -> &[Inode] {
        &self.inodes
    }

    /// Puts `inode` at `path`, in place of what is there; a directory keeps what is in it.
    pub(crate) fn insert(&mut self, path: &[u8], mut inode: Inode) -> Result<(), Error> {
        if xattr_area(&inode.xattrs).len() as u64 > MAX_XATTR_BYTES / 2 {
            return Err(Error::bad_entry(
                path,
                "it has too many extended attributes",
            ));
        }
        let Some((parent, name)) = self.place(path, Missing::Make)? else {
            if inode.content.file_type() != FileType::Directory {
                return Err(Error::bad_entry(path, "the root is a directory"));
            }
            self.replace_directory(ROOT, inode);
            return Ok(());
        };
        if let Content::Directory { opaque, .. } = &mut inode.content
            && let Some(old) = self.children(parent).get(&name).copied()
        {
            match self.inodes[old].content {
                Content::Directory { .. } => {
                    self.replace_directory(old, inode);
                    return Ok(());
                }
                Content::Whiteout => *opaque = true,
                _ => {}
            }
        }
        let id = self.add(inode)?;
        self.set(parent, name, id)
    }

    /// Makes `path` another name of `target`.
    pub(crate) fn link(&mut self, path: &[u8], target: &[u8]) -> Result<(), Error> {
        let bad = |reason| Error::bad_entry(path, reason);
        let (parent, name) = self
            .place(target, Missing::Refuse)?
            .ok_or_else(|| bad("it links to a directory"))?;
        let id = *self
            .children(parent)
            .get(&name)
            .ok_or_else(|| bad("the file it links to is not in the layer"))?;
        if matches!(
            self.inodes[id].content,
            Content::Directory { .. } | Content::Whiteout
        ) {
            return Err(bad("it links to a directory"));
        }
        let (parent, name) = self
            .place(path, Missing::Make)?
            .ok_or_else(|| bad("the root is a directory"))?;
        self.set(parent, name, id)
    }

    /// Does what the marker at `path` says of lower layers; see [`is_marker`].
    pub(crate) fn mark(&mut self, path: &[u8]) -> Result<(), Error> {
        let Some((parent, name)) = self.place(path, Missing::Make)? else {
            return Ok(());
        };
        if *name == *OPAQUE {
            self.make_opaque(parent);
            return Ok(());
        }
        if name.starts_with(AUFS) {
            return Ok(());
        }
        let hidden: Box<[u8]> = name[WHITEOUT.len()..].into();
        if matches!(&*hidden, b"" | b"." | b"..") {
            return Err(Error::bad_entry(path, "it hides nothing that has a name"));
        }
        // It is about lower layers: what this one has of that name stays.
        if let Some(id) = self.children(parent).get(&hidden).copied() {
            self.make_opaque(id);
        } else {
            let id = self.add(Inode::new(0, Content::Whiteout))?;
            self.set(parent, hidden, id)?;
        }
        Ok(())
    }

    /// The directory in which `path` is, and its name there; `None` for the root.
    fn place(&mut self, path: &[u8], missing: Missing) -> Result<Option<Place>, Error> {
        let bad = |reason| Error::bad_entry(path, reason);
        let mut names: VecDeque<Box<[u8]>> = names(path).map(Into::into).collect();
        if names.iter().any(|name| **name == *b"..") {
            return Err(bad("'..' in its name may lead out of the layer"));
        }
        let Some(last) = names.pop_back() else {
            return Ok(None);
        };
        let mut way = vec![ROOT];
        let mut hops = 0;
        while let Some(name) = names.pop_front() {
            let here = way.last().copied().unwrap_or(ROOT);
            if *name == *b".." {
                // The root is its own parent.
                if way.len() > 1 {
                    way.pop();
                }
                continue;
            }
            check_name(path, &name)?;
            let Some(child) = self.children(here).get(&name).copied() else {
                if missing == Missing::Refuse {
                    return Err(bad("the file it links to is not in the layer"));
                }
                let made = self.add(Inode::new(0o755, Content::directory()))?;
                self.set(here, name, made)?;
                way.push(made);
                continue;
            };
            match &mut self.inodes[child].content {
                Content::Directory { .. } => way.push(child),
                content @ Content::Whiteout => {
                    *content = Content::Directory {
                        children: Children::new(),
                        opaque: true,
                    };
                    self.inodes[child].mode = 0o755;
                    way.push(child);
                }
                Content::Symlink(target) => {
                    hops += 1;
                    if hops > MAX_HOPS {
                        return Err(bad("too many symbolic links lead to it"));
                    }
                    if target.starts_with(b"/") {
                        way.truncate(1);
                    }
                    for name in self::names(target).rev() {
                        names.push_front(name.into());
                    }
                }
                _ => return Err(bad("what should be its directory is none")),
            }
        }
        check_name(path, &last)?;
        let parent = way.last().copied().unwrap_or(ROOT);
        Ok(Some((parent, last)))
    }

    /// What is in the directory `id`.
    fn children(&self, id: Id) -> &Children {
        match &self.inodes[id].content {
            Content::Directory { children, .. } => children,
            _ => unreachable!("places are in directories"),
        }
    }

    fn set(&mut self, parent: Id, name: Box<[u8]>, id: Id) -> Result<(), Error> {
        self.charge(name.len() + 64)?;
        if let Content::Directory { children, .. } = &mut self.inodes[parent].content {
            children.insert(name, id);
        }
        Ok(())
    }

    fn make_opaque(&mut self, id: Id) {
        if let Content::Directory { opaque, .. } = &mut self.inodes[id].content {
            *opaque = true;
        }
    }

    /// Gives the directory `id` the attributes of `inode`.
    fn replace_directory(&mut self, id: Id, mut inode: Inode) {
        let old = &mut self.inodes[id];
        mem::swap(&mut old.content, &mut inode.content);
        // now `inode` has what is in the directory, and replaces all else
        *old = inode;
    }

    fn add(&mut self, inode: Inode) -> Result<Id, Error> {
        self.charge(inode.memory())?;
        self.inodes.push(inode);
        Ok(self.inodes.len() - 1)
    }

    fn charge(&mut self, bytes: usize) -> Result<(), Error> {
        self.memory += bytes;
        if self.memory > MAX_METADATA {
            return Err(Error::TooLarge("1 GiB of names, attributes and the like"));
        }
        Ok(())
    }
}

/// A directory, and a name in it.
type Place = (Id, Box<[u8]>);

/// What becomes of directories that a path goes through and that are not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Missing {
    /// They are made, as the root's.
    Make,
    /// The path is refused.
    Refuse,
}

/// The names that a path is made of.
fn names(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/')
        .filter(|name| !matches!(*name, b"" | b"."))
}

fn check_name(path: &[u8], name: &[u8]) -> Result<(), Error> {
    if name.len() > MAX_NAME {
        return Err(Error::bad_entry(path, "a name is longer than 255 bytes"));
    }
    if name.contains(&0) {
        return Err(Error::bad_entry(path, "a name has a zero byte in it"));
    }
    Ok(())
}
