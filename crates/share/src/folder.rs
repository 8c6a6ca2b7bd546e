//! What a guest may do in the folder: [`PassthroughFs`] does the work, and every request comes
//! through here first.
//!
//! - A name is one component: not empty, not `.` or `..`, without `/`. The library opens each with
//!   O_NOFOLLOW and O_PATH, and reopens regular files and directories alone, so a link is never
//!   followed here: the guest's kernel does that, within what it sees.
//! - A folder that is read only is not changed, whatever its files' handles would allow.
//! - No device nodes, no set-user-ID or set-group-ID bits, no whiteouts: what would mean something
//!   to others on the host.
//! - Only those flags of open(2) that make sense from afar reach the host.

use std::ffi::CStr;
use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::CreateIn;
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, OpenOptions, SetattrValid, ZeroCopyReader,
    ZeroCopyWriter,
};
use fuse_backend_rs::passthrough::{CachePolicy, Config, PassthroughFs};
use libc::{stat64, statvfs64};

use crate::Owners;

/// How long a guest may believe what it was told of a file or name; then changes by others show.
pub(crate) const BELIEF: Duration = Duration::from_secs(1);
/// Bytes of the longest name (`NAME_MAX`).
const NAME_MAX: usize = 255;
/// What a guest may set of a mode: not the set-user-ID and set-group-ID bits.
const MODE: u32 = !(libc::S_ISUID | libc::S_ISGID);
/// The flags of open(2) that a guest has a say in.
const FLAGS: i32 =
    libc::O_ACCMODE | libc::O_APPEND | libc::O_TRUNC | libc::O_EXCL | libc::O_SYNC | libc::O_DSYNC;

type Inode = u64;
type Handle = u64;

/// A folder that is served.
pub(crate) struct Folder {
    files: PassthroughFs<()>,
    read_only: bool,
    owners: Owners,
}

pub(crate) fn error(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// Whether a name is one that a directory can have.
fn check(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(error(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(error(libc::EINVAL)),
        bytes if bytes.len() > NAME_MAX => Err(error(libc::ENAMETOOLONG)),
        _ => Ok(()),
    }
}

impl Folder {
    /// What is at `path`, such as the working directory, as it will be when the guest first asks.
    pub(crate) fn new(path: &str, read_only: bool, owners: Owners) -> io::Result<Self> {
        let config = Config {
            root_dir: path.into(),
            cache_policy: CachePolicy::Auto,
            entry_timeout: BELIEF,
            attr_timeout: BELIEF,
            allow_direct_io: false,
            ..Config::default()
        };
        Ok(Self {
            files: PassthroughFs::new(config)?,
            read_only,
            owners,
        })
    }

    /// The descriptor of `/proc/self/fd` through which files are opened.
    pub(crate) fn descriptors(&self) -> Option<RawFd> {
        self.files.keep_fds().first().copied()
    }

    /// Ends every request that would change something in a folder that is read only.
    fn writable(&self) -> io::Result<()> {
        if self.read_only {
            Err(error(libc::EROFS))
        } else {
            Ok(())
        }
    }

    /// The flags with which a file is opened when the guest opens it with `flags`.
    fn flags(&self, flags: u32) -> io::Result<u32> {
        let flags = flags as i32;
        if flags & libc::O_ACCMODE != libc::O_RDONLY || flags & libc::O_TRUNC != 0 {
            self.writable()?;
        }
        Ok((flags & FLAGS) as u32)
    }

    fn show(&self, entry: io::Result<Entry>) -> io::Result<Entry> {
        Ok(self.owners.show_entry(entry?))
    }
}

type Attributes = (stat64, Duration);
type Opened = (Option<Handle>, OpenOptions, Option<u32>);

impl FileSystem for Folder {
    type Inode = Inode;
    type Handle = Handle;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        // What a driver before this one has left.
        self.files.destroy();
        let capable = capable - FsOptions::PERFILE_DAX;
        let own = FsOptions::ASYNC_READ
            | FsOptions::BIG_WRITES
            | FsOptions::MAX_PAGES
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::AUTO_INVAL_DATA
            | FsOptions::ATOMIC_O_TRUNC
            | FsOptions::HANDLE_KILLPRIV;
        Ok(self.files.init(capable)? | own)
    }

    fn destroy(&self) {
        self.files.destroy();
    }

    fn id_remap(&self, ctx: &mut Context) -> io::Result<()> {
        self.owners.act_as(ctx);
        Ok(())
    }

    fn lookup(&self, ctx: &Context, parent: Inode, name: &CStr) -> io::Result<Entry> {
        check(name)?;
        self.show(self.files.lookup(ctx, parent, name))
    }

    fn forget(&self, ctx: &Context, inode: Inode, count: u64) {
        self.files.forget(ctx, inode, count);
    }

    fn batch_forget(&self, ctx: &Context, requests: Vec<(Inode, u64)>) {
        self.files.batch_forget(ctx, requests);
    }

    fn getattr(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Option<Handle>,
    ) -> io::Result<Attributes> {
        let (attributes, belief) = self.files.getattr(ctx, inode, handle)?;
        Ok((self.owners.show(attributes), belief))
    }

    fn setattr(
        &self,
        ctx: &Context,
        inode: Inode,
        mut attr: stat64,
        handle: Option<Handle>,
        valid: SetattrValid,
    ) -> io::Result<Attributes> {
        self.writable()?;
        let (shown, _) = self.getattr(ctx, inode, None)?;
        let valid = self.owners.change(&shown, &attr, valid)?;
        attr.st_mode &= MODE;
        let (changed, belief) = self.files.setattr(ctx, inode, attr, handle, valid)?;
        Ok((self.owners.show(changed), belief))
    }

    fn readlink(&self, ctx: &Context, inode: Inode) -> io::Result<Vec<u8>> {
        self.files.readlink(ctx, inode)
    }

    fn symlink(
        &self,
        ctx: &Context,
        linkname: &CStr,
        parent: Inode,
        name: &CStr,
    ) -> io::Result<Entry> {
        self.writable()?;
        check(name)?;
        self.show(self.files.symlink(ctx, linkname, parent, name))
    }

    fn mknod(
        &self,
        ctx: &Context,
        inode: Inode,
        name: &CStr,
        mode: u32,
        _rdev: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.writable()?;
        check(name)?;
        if !matches!(
            mode & libc::S_IFMT,
            0 | libc::S_IFREG | libc::S_IFIFO | libc::S_IFSOCK
        ) {
            return Err(error(libc::EPERM));
        }
        self.show(self.files.mknod(ctx, inode, name, mode & MODE, 0, umask))
    }

    fn mkdir(
        &self,
        ctx: &Context,
        parent: Inode,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.writable()?;
        check(name)?;
        self.show(self.files.mkdir(ctx, parent, name, mode & MODE, umask))
    }

    fn unlink(&self, ctx: &Context, parent: Inode, name: &CStr) -> io::Result<()> {
        self.writable()?;
        check(name)?;
        self.files.unlink(ctx, parent, name)
    }

    fn rmdir(&self, ctx: &Context, parent: Inode, name: &CStr) -> io::Result<()> {
        self.writable()?;
        check(name)?;
        self.files.rmdir(ctx, parent, name)
    }

    fn rename(
        &self,
        ctx: &Context,
        olddir: Inode,
        oldname: &CStr,
        newdir: Inode,
        newname: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        self.writable()?;
        check(oldname)?;
        check(newname)?;
        if flags & !(libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE) != 0 {
            return Err(error(libc::EINVAL));
        }
        self.files
            .rename(ctx, olddir, oldname, newdir, newname, flags)
    }

    fn link(
        &self,
        ctx: &Context,
        inode: Inode,
        newparent: Inode,
        newname: &CStr,
    ) -> io::Result<Entry> {
        self.writable()?;
        check(newname)?;
        let linked = self.files.link(ctx, inode, newparent, newname);
        // What kernels before 6.10 say to whoever lacks CAP_DAC_READ_SEARCH.
        let linked = linked.map_err(|failed| match failed.raw_os_error() {
            Some(libc::ENOENT) => error(libc::EPERM),
            _ => failed,
        });
        self.show(linked)
    }

    fn open(&self, ctx: &Context, inode: Inode, flags: u32, fuse_flags: u32) -> io::Result<Opened> {
        self.files.open(ctx, inode, self.flags(flags)?, fuse_flags)
    }

    fn create(
        &self,
        ctx: &Context,
        parent: Inode,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<Handle>, OpenOptions, Option<u32>)> {
        self.writable()?;
        check(name)?;
        let args = CreateIn {
            flags: self.flags(args.flags)?,
            mode: args.mode & MODE,
            ..args
        };
        let (entry, handle, options, backing) = self.files.create(ctx, parent, name, args)?;
        Ok((self.owners.show_entry(entry), handle, options, backing))
    }

    fn read(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Handle,
        w: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        let flags = self.flags(flags)?;
        self.files
            .read(ctx, inode, handle, w, size, offset, lock_owner, flags)
    }

    fn write(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Handle,
        r: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed_write: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        self.writable()?;
        let flags = self.flags(flags)?;
        self.files.write(
            ctx,
            inode,
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

    fn flush(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Handle,
        lock_owner: u64,
    ) -> io::Result<()> {
        self.files.flush(ctx, inode, handle, lock_owner)
    }

    fn fsync(&self, ctx: &Context, inode: Inode, datasync: bool, handle: Handle) -> io::Result<()> {
        self.files.fsync(ctx, inode, datasync, handle)
    }

    fn fallocate(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Handle,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.writable()?;
        self.files
            .fallocate(ctx, inode, handle, mode, offset, length)
    }

    fn release(
        &self,
        ctx: &Context,
        inode: Inode,
        flags: u32,
        handle: Handle,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.files
            .release(ctx, inode, flags, handle, flush, flock_release, lock_owner)
    }

    fn statfs(&self, ctx: &Context, inode: Inode) -> io::Result<statvfs64> {
        self.files.statfs(ctx, inode)
    }

    fn opendir(
        &self,
        ctx: &Context,
        inode: Inode,
        _flags: u32,
    ) -> io::Result<(Option<Handle>, OpenOptions)> {
        self.files.opendir(ctx, inode, libc::O_RDONLY as u32)
    }

    fn readdir(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Handle,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.files
            .readdir(ctx, inode, handle, size, offset, add_entry)
    }

    fn readdirplus(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Handle,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let mut add =
            |name: DirEntry<'_>, entry: Entry| add_entry(name, self.owners.show_entry(entry));
        self.files
            .readdirplus(ctx, inode, handle, size, offset, &mut add)
    }

    fn fsyncdir(
        &self,
        ctx: &Context,
        inode: Inode,
        datasync: bool,
        handle: Handle,
    ) -> io::Result<()> {
        self.files.fsyncdir(ctx, inode, datasync, handle)
    }

    fn releasedir(
        &self,
        ctx: &Context,
        inode: Inode,
        flags: u32,
        handle: Handle,
    ) -> io::Result<()> {
        self.files.releasedir(ctx, inode, flags, handle)
    }

    fn lseek(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Handle,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        self.files.lseek(ctx, inode, handle, offset, whence)
    }
}
