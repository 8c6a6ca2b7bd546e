//! The streams of a command: the ports of the machine, behind pipes.
//!
//! A port can be open once only, and a command may open `/dev/stdout` anew. So the command has
//! pipes, and threads here move what goes through them.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Stdio;
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};
use strata_protocol::{STREAM_PORTS, Streams};

use super::Fault;
use super::control::find;
use crate::sys::{self, Identity};
use crate::terminal;

const PIECE: usize = 64 << 10;

/// The open ports.
pub(super) struct Ports {
    stdin: File,
    stdout: File,
    stderr: File,
}

/// What [`Ports::make`] makes: the command's ends, what moves what it writes, and where its input goes
/// if that is not to a port.
type Made = ([Stdio; 3], Relays, Option<OwnedFd>);

impl Ports {
    /// Opens them. They are there when the control port is.
    pub(super) fn open() -> Result<Self, Fault> {
        let [stdin, stdout, stderr] = STREAM_PORTS.map(find);
        let there = |path: Option<PathBuf>| path.ok_or(io::ErrorKind::NotFound);
        let write = |path| OpenOptions::new().write(true).open(there(path)?);
        let open = || {
            Ok(Self {
                stdout: write(stdout)?,
                stderr: write(stderr)?,
                stdin: File::open(there(stdin)?)?,
            })
        };
        open().map_err(Fault::of::<io::Error>("open the ports of the command"))
    }

    /// Writes an error of ours where the command's would be.
    pub(super) fn complain(&mut self, message: &str) {
        let _ = self
            .stderr
            .write_all(format!("strata: {message}\n").as_bytes());
    }

    /// The streams of a command that runs as `identity`.
    pub(super) fn make(&self, how: Streams, identity: Option<&Identity>) -> io::Result<Made> {
        let (gone, going) = pipe_with(PipeFlags::CLOEXEC)?;
        let relay = |from: OwnedFd, to: &File, how: Move| {
            let to = to.try_clone()?;
            let gone = gone.try_clone()?;
            thread::Builder::new().spawn(move || drain(&from, &gone, &to, how))
        };
        if let Streams::Terminal(size) = how {
            let (master, terminal) = terminal::open(size)?;
            if let Some(identity) = identity {
                sys::give([&terminal], identity);
            }
            let input = master.try_clone()?;
            let threads = vec![relay(master, &self.stdout, copy)?];
            let ends = [terminal.try_clone()?, terminal.try_clone()?, terminal];
            return Ok((
                ends.map(Stdio::from),
                Relays { going, threads },
                Some(input),
            ));
        }
        let (stdin, to_command) = pipe_with(PipeFlags::CLOEXEC)?;
        let (from_stdout, stdout) = pipe_with(PipeFlags::CLOEXEC)?;
        let (from_stderr, stderr) = pipe_with(PipeFlags::CLOEXEC)?;
        if let Some(identity) = identity {
            sys::give([&stdin, &stdout, &stderr], identity);
        }
        let input = if how.takes_input() {
            Some(to_command)
        } else {
            let port = self.stdin.try_clone()?;
            thread::Builder::new().spawn(move || feed(port, to_command.into()))?;
            None
        };
        let threads = vec![
            relay(from_stdout, &self.stdout, forward)?,
            relay(from_stderr, &self.stderr, forward)?,
        ];
        let ends = [stdin, stdout, stderr].map(Stdio::from);
        Ok((ends, Relays { going, threads }, input))
    }
}

/// Moves the host's input to the command until either ends.
fn feed(mut from: File, mut to: File) {
    let mut piece = vec![0; PIECE];
    loop {
        match from.read(&mut piece) {
            Ok(0) => return,
            Ok(count) => {
                if to.write_all(&piece[..count]).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// The output streams on their way to the host.
pub(super) struct Relays {
    /// Its other end going tells the threads that the command has ended.
    going: OwnedFd,
    threads: Vec<JoinHandle<()>>,
}

impl Relays {
    /// Waits until all that the command wrote has been sent. What it left running may hold its
    /// pipes open and go on writing: nobody waits for that.
    pub(super) fn finish(self) {
        drop(self.going);
        for thread in self.threads {
            let _ = thread.join();
        }
    }
}

/// Moves a piece of what there is to a port; gives its length, and 0 at the end.
type Move = fn(&OwnedFd, &File) -> Result<usize, Errno>;

/// From a pipe, without a copy of its own.
fn forward(from: &OwnedFd, to: &File) -> Result<usize, Errno> {
    splice(from, None, to, None, PIECE, SpliceFlags::MOVE)
}

/// From a terminal.
fn copy(from: &OwnedFd, mut to: &File) -> Result<usize, Errno> {
    let mut piece = [0; 4096];
    let count = rustix::io::read(from, &mut piece)?;
    to.write_all(&piece[..count]).map_err(|_| Errno::IO)?;
    Ok(count)
}

/// How much of what the command wrote is still moved after its end, bytes: more than a pipe holds.
/// What it left running could go on for ever.
const LAST: usize = 1 << 20;

/// Moves what the command writes to a port until it is all and the command `gone`.
fn drain(from: &OwnedFd, gone: &OwnedFd, to: &File, how: Move) {
    let mut left = LAST;
    while left > 0 {
        let mut waiting = [
            PollFd::new(from, PollFlags::IN),
            PollFd::new(gone, PollFlags::IN),
        ];
        match poll(&mut waiting, None) {
            Ok(_) if waiting[0].revents().is_empty() => return,
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(_) => return,
        }
        let is_last = !waiting[1].revents().is_empty();
        match how(from, to) {
            Ok(0) => return,
            Ok(count) if is_last => left = left.saturating_sub(count),
            // A terminal that those who attach write to does not wait.
            Ok(_) | Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => return,
        }
    }
}
