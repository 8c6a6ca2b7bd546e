//! Starting the agent: late, so that nobody waits for it. What it needs is opened before the
//! appliance's files are gone, the modules of its sockets among them, which it loads itself.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::io::{FdFlags, fcntl_setfd};
use strata_protocol::{SESSION_PATH, Session};

use super::drivers;
use crate::AGENT;

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

    /// Starts the agent, which outlives everything but the machine. A guest without one can do all
    /// but what the agent does.
    pub(super) fn start(self) {
        let mut numbers = Vec::new();
        for module in &self.modules {
            // The agent alone gets them: nothing else is started before they are closed.
            if fcntl_setfd(module, FdFlags::empty()).is_ok() {
                numbers.push(module.as_raw_fd().to_string());
            }
        }
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
