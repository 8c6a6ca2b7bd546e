//! `run -- CMD`: this process's standard streams as ports of the guest, and the command's end.

use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};

use strata_machines::Stream as LogStream;
use strata_protocol::PORTS;
use strata_vmm::ConsolePort;

use crate::console::{Ring, output_lost};
use crate::streams::{self, read_stdin};
use crate::supervisor::Stopper;

/// Longest line that is taken from the status port. A guest may write anything there.
const MAX_LINE: usize = 64;

/// What is known about the command.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    /// The guest was about to start it.
    pub(crate) started: bool,
    /// Its exit status.
    pub(crate) exit: Option<u8>,
}

/// Reads the lines of the status port; see [`strata_protocol::PORTS`].
#[derive(Debug, Default, Clone)]
pub(crate) struct Status {
    progress: Arc<Mutex<Progress>>,
    line: Vec<u8>,
}

impl Status {
    pub(crate) fn progress(&self) -> Progress {
        *self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_line(&mut self) {
        let line = std::mem::take(&mut self.line);
        let Ok(line) = std::str::from_utf8(&line) else {
            return;
        };
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        if line == "ready" {
            progress.started = true;
        } else if let Some(status) = line.strip_prefix("exit ") {
            progress.exit = status.parse().ok();
        }
    }
}

impl Write for Status {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            if *byte == b'\n' {
                self.take_line();
            } else if self.line.len() < MAX_LINE {
                self.line.push(*byte);
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The ports for a command, in the order the guest relies on: this process's streams, or what is
/// kept in the background, where nothing is read.
pub(crate) fn ports(status: &Status, stopper: &Stopper, ring: Option<&Ring>) -> Vec<ConsolePort> {
    let written = |own, kept| -> Box<dyn Write + Send> {
        match ring {
            None => Box::new(Stream::new(own, stopper)),
            Some(ring) => Box::new(ring.of(kept)),
        }
    };
    let input: Box<dyn Read + Send> = match ring {
        None => Box::new(Stdin),
        Some(_) => Box::new(io::empty()),
    };
    let [stdin, stdout, stderr, status_port] = PORTS;
    let output = |name: &str, write: Box<dyn Write + Send>| ConsolePort {
        name: name.to_owned(),
        input: None,
        output: Some(write),
    };
    vec![
        ConsolePort {
            name: stdin.to_owned(),
            input: Some(input),
            output: None,
        },
        output(stdout, written(streams::Stream::Stdout, LogStream::Stdout)),
        output(stderr, written(streams::Stream::Stderr, LogStream::Stderr)),
        output(status_port, Box::new(status.clone())),
    ]
}

struct Stdin;

impl Read for Stdin {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(read_stdin(buffer))
    }
}

/// A standard stream that stops the machine when it cannot be written any more.
struct Stream {
    to: Option<streams::Stream>,
    stopper: Stopper,
}

impl Stream {
    fn new(to: streams::Stream, stopper: &Stopper) -> Self {
        Self {
            to: Some(to),
            stopper: stopper.clone(),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(to) = self.to
            && let Err(error) = to.write(bytes)
        {
            self.to = None;
            self.stopper.stop(output_lost(to.name(), error));
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(text: &[u8]) -> Progress {
        let mut status = Status::default();
        // In pieces, as a port may deliver it.
        for piece in text.chunks(3) {
            status.write_all(piece).unwrap();
        }
        status.progress()
    }

    #[test]
    fn the_exit_status_is_the_one_reported() {
        let done = |status| Progress {
            started: true,
            exit: Some(status),
        };
        assert_eq!(after(b"ready\nexit 0\n"), done(0));
        assert_eq!(after(b"ready\nexit 139\n"), done(139));
    }

    #[test]
    fn a_command_that_was_started_has_no_status_yet() {
        let progress = after(b"ready\nexit 0");
        assert!(progress.started && progress.exit.is_none());
    }

    #[test]
    fn nonsense_from_the_guest_is_no_status() {
        for text in [
            &b"exit 256\n"[..],
            b"exit -1\n",
            b"exit x\n",
            b"\xff\xfe\n",
            &vec![b'a'; 100_000],
        ] {
            assert_eq!(after(text), Progress::default());
        }
    }
}
