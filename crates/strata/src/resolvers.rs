//! The host's name servers while a network lives. The switch is locked up and can open no file, so
//! a process of its own looks at `/etc/resolv.conf` for it: it hears of changes from the kernel
//! (inotify), sends the new list, and ends when the switch does. It reads nothing else.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify::{CreateFlags, WatchFlags, add_watch, init};
use rustix::net::{SendFlags, send};
use strata_net::Config;

use crate::exit::End;
use crate::report;

/// Name of the hidden subcommand.
pub(crate) const SUBCOMMAND: &str = "network-resolvers";
/// The host's list of name servers.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Symbolic links that are followed to it: as many as the kernel does (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// The name servers now.
pub(crate) fn read() -> Vec<SocketAddr> {
    Config::resolvers_of(&fs::read_to_string(RESOLV_CONF).unwrap_or_default())
}

/// Starts a process that tells of changes through the other end of the socket that is returned.
pub(crate) fn start() -> io::Result<OwnedFd> {
    let (theirs, ours) = strata_net::port_pair()?;
    Command::new("/proc/self/exe")
        .arg(SUBCOMMAND)
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    Ok(ours)
}

/// What the hidden subcommand does: standard input is the socket to the switch.
pub(crate) fn watch() -> End {
    match tell(Path::new(RESOLV_CONF)) {
        Ok(()) => End::Done,
        Err(error) => {
            report::say_error(&error);
            End::NotStarted
        }
    }
}

/// Directories where a change may change what `path` leads to.
fn directories(path: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut path = path.to_owned();
    for _ in 0..MAX_LINKS {
        let Some(parent) = path.parent().map(Path::to_owned) else {
            break;
        };
        let target = fs::read_link(&path);
        found.insert(parent.clone());
        match target {
            Ok(target) => path = parent.join(target),
            Err(_) => break,
        }
    }
    found
}

fn tell(path: &Path) -> io::Result<()> {
    let switch = io::stdin().as_fd().try_clone_to_owned()?;
    let events = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    let mut told = None;
    loop {
        let changes = WatchFlags::CREATE
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::MOVED_TO
            | WatchFlags::DELETE;
        // Before reading: what changes after that is told of.
        for directory in directories(path) {
            let _ = add_watch(&events, &directory, changes);
        }
        // In a container it may be mounted there, and the directory not hear of it.
        let _ = add_watch(&events, path, WatchFlags::CLOSE_WRITE);
        let servers = read();
        if told.as_ref() != Some(&servers) {
            let text = serde_json::to_vec(&servers)?;
            send(&switch, &text, SendFlags::NOSIGNAL)?;
            told = Some(servers);
        }
        let mut both = [
            PollFd::new(&events, PollFlags::IN),
            PollFd::new(&switch, PollFlags::IN),
        ];
        poll(&mut both, None)?;
        if !both[1].revents().is_empty() {
            return Ok(());
        }
        while rustix::io::read(&events, &mut [0_u8; 4096][..]).is_ok_and(|length| length > 0) {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_followed_to_all_directories_that_count() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        for name in ["etc", "run"] {
            fs::create_dir(root.join(name)).unwrap();
        }
        std::os::unix::fs::symlink("../run/stub", root.join("etc/resolv.conf")).unwrap();
        let found = directories(&root.join("etc/resolv.conf"));
        assert!(found.contains(&root.join("etc")));
        let real = found.iter().map(|path| path.canonicalize().unwrap());
        assert!(
            real.into_iter()
                .any(|p| p == root.canonicalize().unwrap().join("run"))
        );
        // A link to itself ends.
        std::os::unix::fs::symlink("loop", root.join("loop")).unwrap();
        assert_eq!(directories(&root.join("loop")).len(), 1);
    }
}
