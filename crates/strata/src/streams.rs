//! This process's standard streams, unbuffered and byte for byte.
//!
//! They may be in non-blocking mode, set by another process that shares them; reads and
//! writes here wait all the same. Called by `console` and `command` on I/O threads.

use std::io::{self, ErrorKind};
use std::os::fd::BorrowedFd;

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
