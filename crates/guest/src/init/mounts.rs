//! The file systems that every Linux has, and the console.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use strata_protocol::Mount;

use super::Fault;

/// Device of the console, where there is one.
pub(super) const CONSOLE: &str = "/dev/ttyS0";

const QUIET: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC);

/// Mounts a file system without a device of its own at a directory, which is made.
pub(super) fn mount_at(kind: &str, at: &str, flags: MountFlags, data: &str) -> Result<(), Fault> {
    fs::create_dir_all(at)
        .and_then(|()| {
            let data = std::ffi::CString::new(data)?;
            match mount(kind, at, kind, flags, data.as_c_str()) {
                // The kernel may have mounted it itself.
                Ok(()) | Err(Errno::BUSY) => Ok(()),
                Err(error) => Err(error.into()),
            }
        })
        .map_err(Fault::of(format!("mount {at}")))
}

/// What has to be there before anything else.
pub(super) fn first() -> Result<(), Fault> {
    mount_at("proc", "/proc", QUIET, "")?;
    mount_at("sysfs", "/sys", QUIET, "")?;
    mount_at("devtmpfs", "/dev", MountFlags::NOSUID, "mode=0755")
}

/// What programs expect in `/dev`. A guest without it is worth running all the same.
pub(super) fn devices() {
    let results = [
        mount_at(
            "devpts",
            "/dev/pts",
            MountFlags::NOSUID | MountFlags::NOEXEC,
            "mode=0620,ptmxmode=0666",
        ),
        mount_at(
            "tmpfs",
            "/dev/shm",
            MountFlags::NOSUID | MountFlags::NODEV,
            "mode=1777",
        ),
    ];
    for Fault(message) in results.into_iter().filter_map(Result::err) {
        eprintln!("strata: {message}");
    }
    for (target, link) in [
        ("/proc/self/fd", "fd"),
        ("fd/0", "stdin"),
        ("fd/1", "stdout"),
        ("fd/2", "stderr"),
    ] {
        let _ = symlink(target, Path::new("/dev").join(link));
    }
}

/// Takes the console for this process's streams. What the kernel opened for them lies under
/// what is mounted now.
pub(super) fn open_console() -> io::Result<()> {
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY;
    let console = rustix::fs::openat(CWD, CONSOLE, flags, rustix::fs::Mode::empty())?;
    dup2_stdin(&console)?;
    dup2_stdout(&console)?;
    dup2_stderr(&console)?;
    Ok(())
}

/// Where a folder is for a moment, of which a single file is mounted elsewhere.
const ASIDE: &str = "/run/strata-file";

/// Mounts the host's folders at their places, which are made; in the root that this process has.
pub(super) fn folders(of: &[Mount]) -> Result<(), Fault> {
    for Mount {
        tag,
        path,
        read_only,
        file,
    } in of
    {
        let path = Path::new(crate::place::word(path));
        let flags = if *read_only {
            MountFlags::RDONLY
        } else {
            MountFlags::empty()
        };
        let (mounted, what) = match file {
            Some(name) => (single_file(tag, name, path, flags), "file"),
            None => (folder(tag, path, flags), "folder"),
        };
        mounted.map_err(Fault::of(format!(
            "mount a {what} of the host at {}",
            path.display()
        )))?;
    }
    Ok(())
}

fn folder(tag: &str, path: &Path, flags: MountFlags) -> io::Result<()> {
    fs::create_dir_all(path)?;
    mount(tag, path, "virtiofs", flags, None)?;
    Ok(())
}

/// Mounts the file `name` of a folder over the one at `path`, which is made if it is missing.
fn single_file(tag: &str, name: &str, path: &Path, flags: MountFlags) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    if !path.exists() {
        OpenOptions::new().append(true).create(true).open(path)?;
    }
    folder(tag, Path::new(ASIDE), flags)?;
    let bound = mount_bind(Path::new(ASIDE).join(name), path);
    // The file stays mounted without its folder.
    unmount(ASIDE, UnmountFlags::DETACH)?;
    fs::remove_dir(ASIDE)?;
    Ok(bound?)
}

/// Writes a whole file, such as one of the kernel's settings.
pub(super) fn put(path: impl AsRef<Path>, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)?;
    io::Write::write_all(&mut file, text.as_bytes())
}
