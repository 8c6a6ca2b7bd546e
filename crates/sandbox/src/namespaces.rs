//! Namespaces of the process's own: nothing to see of files, networks, IPC objects. To a process
//! that serves a folder, that is the root directory.
//!
//! An ordinary user gets them through a user namespace, where the host allows that. There is no
//! PID namespace: a process cannot move itself into one and then start threads.

// unshare(2), mount_setattr(2) and dup3(2) onto a number have no safe form.
#![allow(unsafe_code)]

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
};
use rustix::process::{chdir, fchdir, pivot_root};
use rustix::thread::UnshareFlags;

use crate::{Folder, Role};

/// A directory that is there on every host; it becomes the root, with nothing in it.
const ROOT: &str = "/proc";
/// One inode, the root's, which nobody may search.
const ROOT_OPTIONS: &std::ffi::CStr = c"mode=0,size=4k,nr_inodes=1";
/// Two inodes: the root's, and that of what a single file is mounted on.
const FILE_ROOT_OPTIONS: &std::ffi::CStr = c"mode=0555,size=4k,nr_inodes=2";

pub(crate) fn enter(role: Role<'_>) -> Result<String, String> {
    // Known after unshare only as "nobody".
    let (user, group) = (
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    let (network, list) = match role {
        Role::Machine | Role::ListeningMachine | Role::Files(_) => {
            (UnshareFlags::NEWNET, "mount, network, IPC, UTS, cgroup")
        }
        Role::Network => (UnshareFlags::empty(), "mount, IPC, UTS, cgroup"),
    };
    let others = UnshareFlags::NEWNS
        | network
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    // In a user namespace with one user no other could own a file: root, who may do without, does.
    let keeps_users = matches!(role, Role::Files(_)) && user == 0;
    let list = if keeps_users {
        unshare(others).map_err(|error| refusal(&error, setting))?;
        list.to_owned()
    } else {
        match unshare(UnshareFlags::NEWUSER | others) {
            Ok(()) => {
                map(user, group)?;
                format!("user, {list}")
            }
            // Root may do without, where user namespaces are turned off.
            Err(error) => match unshare(others) {
                Ok(()) => list.to_owned(),
                Err(_) => return Err(refusal(&error, setting)),
            },
        }
    };
    if let Role::Files(folder) = role {
        only_folder(folder)
            .map_err(|error| format!("the folder cannot be made the root directory: {error}"))?;
        let is = folder.file.map_or("is the folder", |_| "holds one file");
        return Ok(format!("{list}; the root directory {is}"));
    }
    empty_root().map_err(|error| format!("the root directory cannot be emptied: {error}"))?;
    Ok(format!("{list}; the root directory is empty"))
}

/// Why the host refuses, with the setting that says so, where one does.
fn refusal(error: &io::Error, setting: impl Fn(&str) -> Option<u64>) -> String {
    /// Whether a setting's value closes user namespaces.
    type Closes = fn(u64) -> bool;
    let settings: [(&str, Closes); 3] = [
        ("user/max_user_namespaces", |value| value == 0),
        ("kernel/unprivileged_userns_clone", |value| value == 0),
        ("kernel/apparmor_restrict_unprivileged_userns", |value| {
            value != 0
        }),
    ];
    let closing = settings
        .iter()
        .find(|(name, closes)| setting(name).is_some_and(closes));
    match closing {
        Some((name, _)) => {
            let name = name.replace('/', ".");
            format!("user namespaces are turned off by the sysctl {name}")
        }
        None => format!("the host or its container refuses user namespaces: {error}"),
    }
}

fn setting(name: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/sys/{name}")).ok()?;
    text.trim().parse().ok()
}

fn unshare(flags: UnshareFlags) -> io::Result<()> {
    // SAFETY: the flags are without FILES, the one that is unsafe in Rust: descriptors stay
    // shared among all threads.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(io::Error::from)
}

/// Maps the one user and group that the process has.
fn map(user: u32, group: u32) -> Result<(), String> {
    let write = |file: &str, text: String| {
        fs::write(file, text).map_err(|error| format!("{file} cannot be written: {error}"))
    };
    // An ordinary user has to give up changing its groups first.
    write("/proc/self/setgroups", "deny".into())?;
    write("/proc/self/uid_map", format!("{user} {user} 1"))?;
    write("/proc/self/gid_map", format!("{group} {group} 1"))
}

/// Makes an empty, read-only directory the root. Files that are open stay open.
fn empty_root() -> io::Result<()> {
    // Nothing of this is to reach the mount namespace that we come from.
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RDONLY;
    rustix::mount::mount("none", ROOT, "tmpfs", flags, ROOT_OPTIONS)?;
    chdir(ROOT)?;
    enter_root()
}

/// Makes the working directory, where a file system is mounted, the root, and the only mount.
fn enter_root() -> io::Result<()> {
    // The old root ends up on top of the new one (pivot_root(2), "pivot_root(".", ".")").
    pivot_root(".", ".")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    chdir("/")?;
    Ok(())
}

/// Makes a folder the root directory, with what is mounted in it; or a directory that holds a
/// single file.
fn only_folder(folder: Folder<'_>) -> io::Result<()> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private)?;
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let whole = clone | OpenTreeFlags::AT_RECURSIVE | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
    let tree = rustix::mount::open_tree(CWD, folder.path, whole)?;
    // The path was looked up once before: it must not have become another folder since.
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let here = rustix::fs::open(folder.file.unwrap_or("."), flags, Mode::empty())?;
    if identity(&here)? != identity(&tree)? {
        return Err(io::Error::other("it has been moved meanwhile"));
    }
    harden(&tree, folder.read_only)?;
    if let Some(number) = folder.descriptors {
        // A mount of its own, so that ".." leads nowhere from there.
        let descriptors = rustix::mount::open_tree(CWD, "/proc/self/fd", clone)?;
        // SAFETY: both are open; whoever owns the number owns the new description too.
        if unsafe { libc::dup3(descriptors.as_raw_fd(), number, libc::O_CLOEXEC) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    let from_there = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    if let Some(name) = folder.file {
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        rustix::mount::mount("none", ROOT, "tmpfs", flags, FILE_ROOT_OPTIONS)?;
        chdir(ROOT)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        drop(rustix::fs::open(name, flags, Mode::empty())?);
        rustix::mount::move_mount(&tree, "", CWD, name, from_there)?;
        harden_root()?;
    } else {
        rustix::mount::move_mount(&tree, "", CWD, ROOT, from_there)?;
        fchdir(&tree)?;
    }
    enter_root()
}

/// Makes the file system at the working directory read only.
fn harden_root() -> io::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RDONLY;
    rustix::mount::mount_remount(".", flags, c"")?;
    Ok(())
}

/// Which file or directory an open one is.
fn identity(open: impl AsFd) -> io::Result<(u64, u64)> {
    let status = rustix::fs::fstat(open)?;
    Ok((status.st_dev, status.st_ino))
}

/// Takes from a tree of mounts what a server of files does not need.
fn harden(tree: &OwnedFd, read_only: bool) -> io::Result<()> {
    let read_only = if read_only {
        libc::MOUNT_ATTR_RDONLY
    } else {
        0
    };
    let less = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    let attributes = libc::mount_attr {
        attr_set: less | read_only,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: an open mount, an empty path with NUL, and a structure that is valid for its size.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_setting_that_closes_namespaces_is_named() {
        let error = io::Error::from_raw_os_error(libc::EPERM);
        let by = |closed: &'static str, value| {
            refusal(&error, move |name| name.contains(closed).then_some(value))
        };

        assert!(by("userns_clone", 0).contains("kernel.unprivileged_userns_clone"));
        assert!(by("apparmor", 1).contains("apparmor"));
        assert!(by("apparmor", 0).contains("container refuses"));
    }
}
