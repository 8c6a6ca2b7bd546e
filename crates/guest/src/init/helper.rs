//! Starting the agent: late, so that nobody waits for it. What it needs is opened before the
//! appliance's files are gone, the modules of its sockets among them, which it loads itself.

use std::fs::File;
use std::io;
use std::iter;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::io::{FdFlags, fcntl_setfd};
use strata_protocol::{SESSION_PATH, Session};

use super::drivers;
use crate::{AGENT, sys};

/// Stands in the agent's arguments for a descriptor that there is not.
const NONE: &str = "-";

/// What the agent is given.
pub(super) struct Helper {
    session: File,
    modules: Vec<File>,
}

impl Helper {
    /// What it needs of a machine that has a socket device; `None` where there is nobody to talk to.
    pub(super) fn prepare(session: &Session) -> Option<Self> {
        if !drivers::has_sockets() {
            return None;
        }
        let modules = drivers::open_modules(&[drivers::SOCKETS]);
        if session.sockets_first {
            modules.iter().for_each(drivers::insert);
        }
        let session = File::open(Path::new("/").join(SESSION_PATH)).ok()?;
        Some(Self { session, modules })
    }

    /// Starts the agent, which outlives everything but the machine, and gives it the main command's
    /// input, if it is for those who attach. A guest without an agent can do all but what that does.
    pub(super) fn start(self, main_input: Option<&OwnedFd>) {
        // The agent alone gets them: nothing else is started before they are closed.
        let pass = |fd: BorrowedFd<'_>| match fcntl_setfd(fd, FdFlags::empty()) {
            Ok(()) => fd.as_raw_fd().to_string(),
            Err(_) => NONE.to_owned(),
        };
        let main_input = main_input.map_or_else(|| NONE.to_owned(), |fd| pass(fd.as_fd()));
        let modules = self.modules.iter().map(|module| pass(module.as_fd()));
        let numbers = iter::once(main_input).chain(modules);
        let started: io::Result<_> = Command::new("/proc/self/exe")
            .arg0(AGENT)
            .args(numbers)
            .stdin(Stdio::from(self.session))
            .spawn();
        if let Err(error) = started {
            eprintln!("strata: no agent: {error}");
        }
    }
}

/// What the agent was given by [`Helper::start`], in its order: the main command's input, if there is
/// one to be had, and modules. May be called once.
pub(crate) fn given() -> impl Iterator<Item = Option<OwnedFd>> {
    std::env::args().skip(1).map(|number| {
        let number = number.parse().ok()?;
        sys::take_inherited(number).ok()
    })
}
