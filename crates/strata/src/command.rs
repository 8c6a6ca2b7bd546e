//! The main command of a guest, seen from here: its streams as ports of the machine, what becomes of
//! it, and what it is told.

use std::io::{self, Read, Write};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use strata_machines::Stream as LogStream;
use strata_protocol::{CONTROL_PORT, Input, Reply, STREAM_PORTS, Size, read, write};
use strata_vmm::ConsolePort;

use crate::console::{Ring, output_lost};
use crate::streams::{self, Queue, read_stdin};
use crate::supervisor::Stopper;

/// Longest message that is taken from the control port, bytes. A guest may write anything there.
const MAX_MESSAGE: usize = 64;
/// Before a message comes its length.
const HEADER: usize = 4;

/// What is known about the command.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    /// The guest was about to start it.
    pub(crate) started: bool,
    /// Its exit status.
    pub(crate) exit: Option<u8>,
}

/// The host's end of the [`CONTROL_PORT`].
#[derive(Debug, Clone)]
pub(crate) struct Control {
    progress: Arc<Mutex<Progress>>,
    to_guest: Sender<Vec<u8>>,
}

impl Control {
    /// A control, and the port for the machine.
    pub(crate) fn new() -> (Self, ConsolePort) {
        let (to_guest, from_host) = mpsc::channel();
        let control = Self {
            progress: Arc::default(),
            to_guest,
        };
        let port = ConsolePort {
            name: CONTROL_PORT.to_owned(),
            input: Some(Box::new(Queue::from(from_host))),
            output: Some(Box::new(Hearing {
                progress: Arc::clone(&control.progress),
                message: Vec::new(),
                nonsense: false,
            })),
        };
        (control, port)
    }

    pub(crate) fn progress(&self) -> Progress {
        *lock(&self.progress)
    }

    /// Sends the command a signal; whether there is a command to send it to.
    pub(crate) fn signal(&self, number: i32) -> bool {
        let Progress { started, exit } = self.progress();
        let runs = started && exit.is_none();
        runs && self.send(&Input::Signal(number as u8))
    }

    /// Tells the command that its terminal has another size.
    pub(crate) fn resize(&self, size: Size) {
        // One that is not there yet, or no more, has no use for it.
        self.send(&Input::Resize(size));
    }

    fn send(&self, input: &Input) -> bool {
        let mut frame = Vec::new();
        write(&mut frame, input).is_ok() && self.to_guest.send(frame).is_ok()
    }
}

fn lock(progress: &Mutex<Progress>) -> MutexGuard<'_, Progress> {
    progress.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads what the guest says on the control port. Nothing there is an error of the machine's.
struct Hearing {
    progress: Arc<Mutex<Progress>>,
    /// What has come of the next message.
    message: Vec<u8>,
    /// No message of ours: nothing more is understood.
    nonsense: bool,
}

impl Hearing {
    /// Understands the message if it is complete.
    fn understand(&mut self) {
        let Some((length, _)) = self.message.split_first_chunk::<HEADER>() else {
            return;
        };
        let length = u32::from_le_bytes(*length) as usize;
        if length > MAX_MESSAGE {
            self.nonsense = true;
        } else if self.message.len() == HEADER + length {
            match read(&mut self.message.as_slice()) {
                Ok(Some(Reply::Starting)) => lock(&self.progress).started = true,
                Ok(Some(Reply::Ended(status))) => {
                    lock(&self.progress).exit = Some(status.code());
                }
                Ok(_) => {}
                Err(_) => self.nonsense = true,
            }
            self.message.clear();
        }
    }
}

impl Write for Hearing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            if self.nonsense {
                break;
            }
            self.message.push(*byte);
            self.understand();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The ports for a command's streams: this process's, or what is kept in the background, where
/// nothing is read.
pub(crate) fn ports(stopper: &Stopper, ring: Option<&Ring>) -> Vec<ConsolePort> {
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
    let [stdin, stdout, stderr] = STREAM_PORTS;
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
    use strata_protocol::Status;

    use super::*;

    /// What is known after a guest has written this, in pieces, as a port may deliver it.
    fn after(bytes: &[u8]) -> Progress {
        let (control, port) = Control::new();
        let mut to_host = port.output.unwrap();
        for piece in bytes.chunks(3) {
            to_host.write_all(piece).unwrap();
        }
        control.progress()
    }

    fn said(replies: &[Reply]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for reply in replies {
            write(&mut bytes, reply).unwrap();
        }
        bytes
    }

    #[test]
    fn the_exit_status_is_the_one_reported() {
        for (status, exit) in [
            (Status::Exited(0), 0),
            (Status::Exited(7), 7),
            (Status::Signal(11), 139),
        ] {
            let progress = after(&said(&[Reply::Starting, Reply::Ended(status)]));
            let exit = Some(exit);
            assert_eq!(
                progress,
                Progress {
                    started: true,
                    exit
                }
            );
        }
    }

    #[test]
    fn a_command_that_was_started_has_no_status_yet() {
        let mut bytes = said(&[Reply::Starting, Reply::Ended(Status::Exited(0))]);
        bytes.pop();
        let progress = after(&bytes);
        assert!(progress.started && progress.exit.is_none());
    }

    #[test]
    fn nonsense_from_the_guest_is_no_status() {
        let ended = said(&[Reply::Ended(Status::Exited(0))]);
        for text in [
            &b"exit 0\n"[..],
            b"\xff\xff\xff\xff",
            b"\x00\x00\x00\x00",
            b"\x01\x00\x00\x00\xff",
            &vec![b'a'; 100_000],
        ] {
            assert_eq!(after(&[text, &ended].concat()), Progress::default());
        }
    }

    #[test]
    fn signals_reach_a_command_only_while_it_runs() {
        let (control, port) = Control::new();
        let (mut to_host, mut from_host) = (port.output.unwrap(), port.input.unwrap());
        assert!(!control.signal(2));
        to_host.write_all(&said(&[Reply::Starting])).unwrap();
        assert!(control.signal(2));
        assert_eq!(read(&mut from_host).unwrap(), Some(Input::Signal(2)));
        let ended = said(&[Reply::Ended(Status::Exited(0))]);
        to_host.write_all(&ended).unwrap();
        assert!(!control.signal(2));
    }
}
