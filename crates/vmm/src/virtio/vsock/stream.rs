//! A connection of a program of the host's: its socket, what is known of it, and what it has not
//! taken yet. Called by [`super`], on its thread; nothing here waits.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice};
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use strata_devices::virtio::{IncomingBuffers, OutgoingData};
use strata_memory::Ram;
use strata_memory::vm_memory::Permissions;

use super::super::disk::slices;
use super::super::sys;

/// Bytes of the first line, at most.
const LINE: usize = 32;

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// It has not said which port it wants.
    Greeting,
    /// The guest was, or will be, asked.
    Asked,
    /// Somebody in the guest has accepted.
    Open,
    /// The guest has ended it; what it sent is still to be taken.
    Over,
}

/// What a program says first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Greeting {
    /// It wants this port of the guest.
    Port(u32),
    /// The line has not come to its end.
    Incomplete,
    /// Something else.
    Wrong,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) socket: OwnedFd,
    pub(super) phase: Phase,
    /// There may be something to read.
    pub(super) readable: bool,
    /// All was read, or nobody wants it.
    pub(super) read_all: bool,
    /// Both directions have ended.
    pub(super) hung_up: bool,
    /// The program takes no bytes any more.
    pub(super) deaf: bool,
    /// The guest sends no more; the program is to learn that behind the last byte.
    pub(super) write_no_more: bool,
    /// It is among those that have their turn to be read from.
    pub(super) queued: bool,
    /// Bytes of the guest's that the socket did not take. The guest's credit bounds them.
    unsent: VecDeque<u8>,
}

impl Stream {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            phase: Phase::Greeting,
            readable: true,
            read_all: false,
            hung_up: false,
            deaf: false,
            write_no_more: false,
            queued: false,
            unsent: VecDeque::new(),
        }
    }

    /// Takes the first line, if it is there, and no byte of what follows.
    pub(super) fn greeting(&self) -> Greeting {
        let mut line = [0; LINE];
        let flags = RecvFlags::DONTWAIT;
        let there = match recv(&self.socket, &mut line, flags | RecvFlags::PEEK) {
            Ok((_, length)) if length > 0 => &line[..length],
            Err(Errno::AGAIN | Errno::INTR) => return Greeting::Incomplete,
            _ => return Greeting::Wrong,
        };
        let Some(end) = there.iter().position(|byte| *byte == b'\n') else {
            return if there.len() < LINE {
                Greeting::Incomplete
            } else {
                Greeting::Wrong
            };
        };
        let port = port(&there[..end]).map_or(Greeting::Wrong, Greeting::Port);
        // It is all there, and nobody else reads.
        match recv(&self.socket, &mut line[..=end], flags) {
            Ok(_) => port,
            Err(_) => Greeting::Wrong,
        }
    }

    /// Says that the guest has accepted.
    pub(super) fn confirm(&self, number: u32) -> io::Result<()> {
        let line = format!("OK {number}\n");
        // The first bytes in an empty socket: all of them fit.
        rustix::io::write(&self.socket, line.as_bytes())?;
        Ok(())
    }

    /// Passes data of the guest's on: what the socket takes at once straight from guest memory,
    /// the rest later. Returns the bytes that went.
    pub(super) fn send(&mut self, memory: &Ram, data: &OutgoingData) -> io::Result<usize> {
        let mut sent = 0;
        if self.unsent.is_empty() {
            let buffers = slices(memory, data.segments(), Permissions::Read)?;
            sent = now(sys::send(&self.socket, &buffers))?;
        }
        if sent < data.length() as usize {
            self.unsent.extend(data.copy_from(memory, sent as u32));
        }
        Ok(sent)
    }

    /// Passes on what was left. Returns the bytes that went.
    pub(super) fn flush(&mut self) -> io::Result<usize> {
        let mut sent = 0;
        while !self.unsent.is_empty() {
            let (first, second) = self.unsent.as_slices();
            let parts = [IoSlice::new(first), IoSlice::new(second)];
            match now(rustix::io::writev(&self.socket, &parts).map_err(Into::into))? {
                0 => return Ok(sent),
                count => {
                    self.unsent.drain(..count);
                    sent += count;
                }
            }
        }
        // Idle connections hold nothing.
        self.unsent = VecDeque::new();
        Ok(sent)
    }

    /// Whether the program has not taken all yet.
    pub(super) fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// The program will take no more: nothing is kept for it.
    pub(super) fn give_up_sending(&mut self) {
        self.deaf = true;
        self.unsent = VecDeque::new();
    }

    /// Reads into buffers of the guest's. Returns the bytes, 0 at the end.
    pub(super) fn receive(&self, memory: &Ram, buffers: &IncomingBuffers) -> io::Result<usize> {
        let slices = slices(memory, buffers.segments(), Permissions::Write)?;
        sys::receive(&self.socket, &slices)
    }
}

/// What was written, 0 if that has to wait.
fn now(result: io::Result<usize>) -> io::Result<usize> {
    match result {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
            Ok(0)
        }
        other => other,
    }
}

/// The port in `CONNECT PORT`, as Firecracker and Cloud Hypervisor take it.
fn port(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let command = words.next()?;
    let port = words.next()?.parse().ok()?;
    (command.eq_ignore_ascii_case("connect") && words.next().is_none()).then_some(port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_asked_for_in_one_line() {
        assert_eq!(port(b"CONNECT 52"), Some(52));
        assert_eq!(port(b"connect  4294967294\r"), Some(u32::MAX - 1));
        let wrong: [&[u8]; 6] = [
            b"",
            b"CONNECT",
            b"CONNECT 4294967296",
            b"CONNECT -1",
            b"CONNECT 1 2",
            b"\xff 1",
        ];
        for line in wrong {
            assert_eq!(port(line), None);
        }
    }
}
