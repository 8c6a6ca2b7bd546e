//! A single file, served in a directory that is in no file system of the host's: it holds that
//! file, called [`NAME`], and nothing else can be made there, found or put in its place.
//!
//! All that is asked of the file goes to a [`Folder`] whose root is the file itself, so that there
//! is no directory of the host's from which a name could be looked up.

use std::ffi::CStr;
use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, ROOT_ID};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, OpenOptions, SetattrValid, ZeroCopyReader,
    ZeroCopyWriter,
};
use libc::{stat64, statvfs64};

use crate::Owners;
use crate::folder::{BELIEF, Folder, error};

/// What the file is called in its directory.
pub const NAME: &str = "file";

/// The number of the file for the guest, whose root is the directory.
const FILE: u64 = ROOT_ID + 1;

type Attributes = (stat64, Duration);
type Opened = (Option<u64>, OpenOptions, Option<u32>);

/// A file that is served.
pub(crate) struct SingleFile(Folder);

impl SingleFile {
    /// The file at `path`, which is opened when the guest first asks.
    pub(crate) fn new(path: &str, read_only: bool, owners: Owners) -> io::Result<Self> {
        Folder::new(path, read_only, owners).map(Self)
    }

    pub(crate) fn descriptors(&self) -> Option<RawFd> {
        self.0.descriptors()
    }

    /// The directory, which is root's in the guest and nobody's on the host.
    fn directory(&self, ctx: &Context) -> io::Result<stat64> {
        let (mut directory, _) = self.0.getattr(ctx, ROOT_ID, None)?;
        directory.st_ino = ROOT_ID;
        directory.st_mode = libc::S_IFDIR | 0o555;
        directory.st_nlink = 2;
        (directory.st_uid, directory.st_gid) = (0, 0);
        (directory.st_size, directory.st_blocks, directory.st_rdev) = (0, 0, 0);
        Ok(directory)
    }
}

/// The number that the file has as a root of its own; only what is done to files is done to it.
fn file(inode: u64) -> io::Result<u64> {
    match inode {
        FILE => Ok(ROOT_ID),
        ROOT_ID => Err(error(libc::EISDIR)),
        _ => Err(error(libc::EBADF)),
    }
}

/// What becomes of every attempt to change the directory.
fn fixed<T>() -> io::Result<T> {
    Err(error(libc::EPERM))
}

impl FileSystem for SingleFile {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        let plus = FsOptions::DO_READDIRPLUS | FsOptions::READDIRPLUS_AUTO;
        Ok(self.0.init(capable - plus)? - plus)
    }

    fn destroy(&self) {
        self.0.destroy();
    }

    fn id_remap(&self, ctx: &mut Context) -> io::Result<()> {
        self.0.id_remap(ctx)
    }

    fn lookup(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        if parent != ROOT_ID {
            return Err(error(libc::ENOTDIR));
        }
        if name.to_bytes() != NAME.as_bytes() {
            return Err(error(libc::ENOENT));
        }
        let (attr, belief) = self.0.getattr(ctx, ROOT_ID, None)?;
        Ok(Entry {
            inode: FILE,
            generation: 0,
            attr,
            attr_flags: 0,
            attr_timeout: belief,
            entry_timeout: BELIEF,
        })
    }

    // Both numbers mean what they mean for as long as the server lives.
    fn forget(&self, _ctx: &Context, _inode: u64, _count: u64) {}

    fn batch_forget(&self, _ctx: &Context, _requests: Vec<(u64, u64)>) {}

    fn getattr(&self, ctx: &Context, inode: u64, handle: Option<u64>) -> io::Result<Attributes> {
        if inode == ROOT_ID {
            return Ok((self.directory(ctx)?, BELIEF));
        }
        self.0.getattr(ctx, file(inode)?, handle)
    }

    fn setattr(
        &self,
        ctx: &Context,
        inode: u64,
        attr: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<Attributes> {
        if inode == ROOT_ID {
            return fixed();
        }
        self.0.setattr(ctx, file(inode)?, attr, handle, valid)
    }

    fn symlink(&self, _: &Context, _: &CStr, _: u64, _: &CStr) -> io::Result<Entry> {
        fixed()
    }

    fn mknod(&self, _: &Context, _: u64, _: &CStr, _: u32, _: u32, _: u32) -> io::Result<Entry> {
        fixed()
    }

    fn mkdir(&self, _: &Context, _: u64, _: &CStr, _: u32, _: u32) -> io::Result<Entry> {
        fixed()
    }

    fn unlink(&self, _: &Context, _: u64, _: &CStr) -> io::Result<()> {
        fixed()
    }

    fn rmdir(&self, _: &Context, _: u64, _: &CStr) -> io::Result<()> {
        fixed()
    }

    fn rename(&self, _: &Context, _: u64, _: &CStr, _: u64, _: &CStr, _: u32) -> io::Result<()> {
        fixed()
    }

    fn link(&self, _: &Context, _: u64, _: u64, _: &CStr) -> io::Result<Entry> {
        fixed()
    }

    fn create(
        &self,
        _: &Context,
        _: u64,
        _: &CStr,
        _: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        fixed()
    }

    fn open(&self, ctx: &Context, inode: u64, flags: u32, fuse_flags: u32) -> io::Result<Opened> {
        self.0.open(ctx, file(inode)?, flags, fuse_flags)
    }

    fn read(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        w: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        let inode = file(inode)?;
        self.0
            .read(ctx, inode, handle, w, size, offset, lock_owner, flags)
    }

    fn write(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        r: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed_write: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        self.0.write(
            ctx,
            file(inode)?,
            handle,
            r,
            size,
            offset,
            lock_owner,
            delayed_write,
            flags,
            fuse_flags,
        )
    }

    fn flush(&self, ctx: &Context, inode: u64, handle: u64, lock_owner: u64) -> io::Result<()> {
        self.0.flush(ctx, file(inode)?, handle, lock_owner)
    }

    fn fsync(&self, ctx: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.0.fsync(ctx, file(inode)?, datasync, handle)
    }

    fn fallocate(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.0
            .fallocate(ctx, file(inode)?, handle, mode, offset, length)
    }

    fn release(
        &self,
        ctx: &Context,
        inode: u64,
        flags: u32,
        handle: u64,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        let inode = file(inode)?;
        self.0
            .release(ctx, inode, flags, handle, flush, flock_release, lock_owner)
    }

    fn statfs(&self, ctx: &Context, _inode: u64) -> io::Result<statvfs64> {
        self.0.statfs(ctx, ROOT_ID)
    }

    fn opendir(
        &self,
        _ctx: &Context,
        inode: u64,
        _flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        match inode {
            ROOT_ID => Ok((None, OpenOptions::empty())),
            _ => Err(error(libc::ENOTDIR)),
        }
    }

    fn readdir(
        &self,
        ctx: &Context,
        inode: u64,
        _handle: u64,
        _size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        if inode != ROOT_ID {
            return Err(error(libc::ENOTDIR));
        }
        if offset == 0 {
            let (attributes, _) = self.0.getattr(ctx, ROOT_ID, None)?;
            add_entry(DirEntry {
                ino: attributes.st_ino,
                offset: 1,
                type_: u32::from(libc::DT_REG),
                name: NAME.as_bytes(),
            })?;
        }
        Ok(())
    }

    fn releasedir(&self, _: &Context, _: u64, _: u32, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn lseek(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        self.0.lseek(ctx, file(inode)?, handle, offset, whence)
    }
}
