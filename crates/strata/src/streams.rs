//! This process's standard streams, unbuffered and byte for byte.
//!
//! They may be in non-blocking mode, set by another process that shares them; reads and
//! writes here wait all the same. Called by `console` and `command` on I/O threads.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read};
use std::os::fd::BorrowedFd;
use std::sync::mpsc::Receiver;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

/// Reads standard input, waiting for at least one byte; 0 at its end, and also where it can
/// not be read any more (a terminal that is gone).
pub(crate) fn read_stdin(buffer: &mut [u8]) -> usize {
    let stdin = rustix::stdio::stdin();
    loop {
        match rustix::io::read(stdin, &mut *buffer) {
            Ok(count) => return count,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait(stdin, PollFlags::IN),
            Err(error) => {
                tracing::debug!(%error, "standard input cannot be read");
                return 0;
            }
        }
    }
}

/// Pieces from another thread as a stream; at its end when nobody can send more.
#[derive(Debug)]
pub(crate) struct Queue {
    pieces: Receiver<Vec<u8>>,
    rest: VecDeque<u8>,
}

impl From<Receiver<Vec<u8>>> for Queue {
    fn from(pieces: Receiver<Vec<u8>>) -> Self {
        let rest = VecDeque::new();
        Self { pieces, rest }
    }
}

impl Read for Queue {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.rest.is_empty() {
            match self.pieces.recv() {
                Ok(bytes) => self.rest.extend(bytes),
                Err(_) => return Ok(0),
            }
        }
        self.rest.read(buffer)
    }
}

/// An output stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    /// Its name, for messages.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stdout => "standard output",
            Self::Stderr => "standard error",
        }
    }

    /// Writes all of `bytes`.
    pub(crate) fn write(self, mut bytes: &[u8]) -> io::Result<()> {
        let stream = match self {
            Self::Stdout => rustix::stdio::stdout(),
            Self::Stderr => rustix::stdio::stderr(),
        };
        while !bytes.is_empty() {
            match rustix::io::write(stream, bytes) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => bytes = &bytes[count..],
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => wait(stream, PollFlags::OUT),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

fn wait(stream: BorrowedFd<'_>, what: PollFlags) {
    // An error here shows again, and is told, at the next read or write.
    let _ = poll(&mut [PollFd::from_borrowed_fd(stream, what)], None);
}
