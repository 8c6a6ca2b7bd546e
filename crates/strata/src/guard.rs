//! A second, tiny process that gives the terminal back where `strata` itself cannot any more:
//! killed with SIGKILL, or crashed.
//!
//! It is this same program, started with a hidden subcommand. Its standard input is a pipe
//! from the first process, which writes a byte at each change of the terminal's mode; when
//! the pipe ends with the terminal still raw, the guard restores it. Its standard output is
//! the terminal. It must never read the terminal or write text to it.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::process::{Child, ChildStderr, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

/// Name of the hidden subcommand.
pub(crate) const SUBCOMMAND: &str = "terminal-guard";

const RAW: u8 = b'w';
const RESTORED: u8 = b'r';
const READY: u8 = b'+';

/// The first process's end.
#[derive(Debug)]
pub(crate) struct Guard {
    pipe: ChildStdin,
    ready: Option<ChildStderr>,
}

impl Guard {
    /// Starts the guard; it gets ready by itself.
    pub(crate) fn start() -> io::Result<Self> {
        let terminal = io::stdin().as_fd().try_clone_to_owned()?;
        let child = Command::new("/proc/self/exe")
            .arg(SUBCOMMAND)
            .stdin(Stdio::piped())
            .stdout(terminal)
            .stderr(Stdio::piped())
            .spawn()?;
        let Child {
            stdin: Some(pipe),
            stderr,
            ..
        } = child
        else {
            return Err(io::Error::other("a child without the pipe asked for"));
        };
        Ok(Self {
            pipe,
            ready: stderr,
        })
    }

    /// Tells of a change of mode. The first time waits until the guard knows the old one.
    pub(crate) fn mode_is(&mut self, raw: bool) {
        if let Some(mut ready) = self.ready.take() {
            let _ = ready.read(&mut [0]);
        }
        let byte = if raw { RAW } else { RESTORED };
        // A guard that is gone is no reason not to go on.
        let _ = self.pipe.write_all(&[byte]);
    }
}

/// What the second process does.
pub(crate) fn watch() -> io::Result<()> {
    let terminal = io::stdout();
    let saved = tcgetattr(&terminal)?;
    // It outlives what ends the first process.
    for signal in [SIGHUP, SIGINT, SIGQUIT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)))?;
    }
    io::stderr().write_all(&[READY])?;
    let mut changes = Vec::new();
    io::stdin().lock().read_to_end(&mut changes)?;
    if changes.last() == Some(&RAW) {
        tcsetattr(&terminal, OptionalActions::Now, &saved)?;
    }
    Ok(())
}
