//! The streams of a command: the ports of the machine, behind pipes.
//!
//! A port can be open once only, and a command may open `/dev/stdout` anew. So the command has
//! pipes, and threads here move what goes through them.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Stdio;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Gid, Uid, fchown};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};

use strata_protocol::PORTS;

use super::Fault;
use crate::sys::Identity;

const TRIES: usize = 5000;
const PAUSE: Duration = Duration::from_millis(2);
const PIECE: usize = 64 << 10;

/// The open ports.
pub(super) struct Ports {
    stdin: File,
    stdout: File,
    stderr: File,
    status: File,
}

impl Ports {
    /// Waits for the ports, whose names arrive a moment after the driver, and opens them.
    pub(super) fn open() -> Result<Self, Fault> {
        let mut tries = 0;
        let [stdin, stdout, stderr, status] = loop {
            if let Some(ports) = find() {
                break ports;
            }
            tries += 1;
            if tries > TRIES {
                return Err(Fault("the ports of the command did not appear".to_owned()));
            }
            thread::sleep(PAUSE);
        };
        let write = |path: &PathBuf| OpenOptions::new().write(true).open(path);
        let open = || {
            Ok(Self {
                status: write(&status)?,
                stdout: write(&stdout)?,
                stderr: write(&stderr)?,
                stdin: File::open(&stdin)?,
            })
        };
        open().map_err(Fault::of::<io::Error>("open the ports of the command"))
    }

    /// Tells the host a line on the status port.
    pub(super) fn tell(&mut self, line: &str) {
        let _ = self.status.write_all(format!("{line}\n").as_bytes());
    }

    /// Writes an error of ours where the command's would be.
    pub(super) fn complain(&mut self, message: &str) {
        let _ = self
            .stderr
            .write_all(format!("strata: {message}\n").as_bytes());
    }

    /// Pipes for a command that runs as `identity`, and what moves their contents.
    pub(super) fn pipes(&self, identity: Option<&Identity>) -> io::Result<(Streams, Relays)> {
        let (stdin, to_command) = pipe_with(PipeFlags::CLOEXEC)?;
        let (from_stdout, stdout) = pipe_with(PipeFlags::CLOEXEC)?;
        let (from_stderr, stderr) = pipe_with(PipeFlags::CLOEXEC)?;
        if let Some(Identity { user, group, .. }) = identity {
            // Or it could not open them anew.
            for pipe in [&stdin, &stdout, &stderr] {
                fchown(
                    pipe,
                    Some(Uid::from_raw(*user)),
                    Some(Gid::from_raw(*group)),
                )?;
            }
        }
        let port = self.stdin.try_clone()?;
        thread::Builder::new().spawn(move || feed(port, to_command.into()))?;
        let (gone, going) = pipe_with(PipeFlags::CLOEXEC)?;
        let relay = |from: OwnedFd, to: &File| {
            let to = to.try_clone()?;
            let gone = gone.try_clone()?;
            thread::Builder::new().spawn(move || drain(&from, &gone, &to))
        };
        let threads = [
            relay(from_stdout, &self.stdout)?,
            relay(from_stderr, &self.stderr)?,
        ];
        let relays = Relays { going, threads };
        let streams = Streams {
            stdin: stdin.into(),
            stdout: stdout.into(),
            stderr: stderr.into(),
        };
        Ok((streams, relays))
    }
}

/// The command's ends of its pipes.
pub(super) struct Streams {
    pub(super) stdin: Stdio,
    pub(super) stdout: Stdio,
    pub(super) stderr: Stdio,
}

/// Finds the ports by their names.
fn find() -> Option<[PathBuf; 4]> {
    let mut found: [Option<PathBuf>; 4] = Default::default();
    for port in fs::read_dir("/sys/class/virtio-ports").ok()?.flatten() {
        let Ok(name) = fs::read_to_string(port.path().join("name")) else {
            continue;
        };
        let at = PORTS.iter().position(|wanted| *wanted == name.trim());
        let device = PathBuf::from("/dev").join(port.file_name());
        if let Some(at) = at
            && device.exists()
        {
            found[at] = Some(device);
        }
    }
    let [Some(a), Some(b), Some(c), Some(d)] = found else {
        return None;
    };
    Some([a, b, c, d])
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
    threads: [JoinHandle<()>; 2],
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

/// Moves what the command writes to a port, without a copy of its own, until it is all and the
/// command `gone`.
fn drain(from: &OwnedFd, gone: &OwnedFd, to: &File) {
    loop {
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
        match splice(from, None, to, None, PIECE, SpliceFlags::MOVE) {
            Ok(0) => return,
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return,
        }
    }
}
