//! Namespaces of the process's own: nothing to see of files, networks, IPC objects.
//!
//! An ordinary user gets them through a user namespace, where the host allows that. There is no
//! PID namespace: a process cannot move itself into one and then start threads.

// unshare(2) has no safe form.
#![allow(unsafe_code)]

use std::fs;
use std::io;

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{chdir, pivot_root};
use rustix::thread::UnshareFlags;

use crate::Role;

/// A directory that is there on every host; it becomes the root, with nothing in it.
const ROOT: &str = "/proc";
/// One inode, the root's, which nobody may search.
const ROOT_OPTIONS: &std::ffi::CStr = c"mode=0,size=4k,nr_inodes=1";

pub(crate) fn enter(role: Role) -> Result<String, String> {
    // Known after unshare only as "nobody".
    let (user, group) = (
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    let (network, list) = match role {
        Role::Machine | Role::ListeningMachine => {
            (UnshareFlags::NEWNET, "mount, network, IPC, UTS, cgroup")
        }
        Role::Network => (UnshareFlags::empty(), "mount, IPC, UTS, cgroup"),
    };
    let others = UnshareFlags::NEWNS
        | network
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    let list = match unshare(UnshareFlags::NEWUSER | others) {
        Ok(()) => {
            map(user, group)?;
            format!("user, {list}")
        }
        // Root may do without, where user namespaces are turned off.
        Err(error) => match unshare(others) {
            Ok(()) => list.to_owned(),
            Err(_) => return Err(refusal(&error, setting)),
        },
    };
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
    // The old root ends up on top of the new one (pivot_root(2), "pivot_root(".", ".")").
    pivot_root(".", ".")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    chdir("/")?;
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
