//! What a program is given by the host: input, signals, and the size of its terminal.

use std::collections::VecDeque;
use std::io::BufReader;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::Pid;
use strata_protocol::{Input, MAX_DATA, Reply, read, write};
use vsock::VsockStream;

use crate::{sys, terminal};

/// What ends the input of a terminal that reads lines.
const END_OF_TRANSMISSION: u8 = 4;

/// A descriptor and what it is waited for with; `None` where there is none.
pub(super) type Watched<'a> = Option<(BorrowedFd<'a>, PollFlags)>;

/// Waits until one of `watched` is ready; gives which are.
pub(super) fn wait_for<const N: usize>(watched: [Watched<'_>; N]) -> Result<[bool; N], Errno> {
    let mut fds: Vec<PollFd<'_>> = watched
        .into_iter()
        .flatten()
        .map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags))
        .collect();
    match poll(&mut fds, None) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => return Err(error),
    }
    let mut polled = fds.iter().map(|fd| !fd.revents().is_empty());
    Ok(watched.map(|each| each.is_some() && polled.next().unwrap_or(false)))
}

/// What became of a message that was to be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taken {
    Message,
    /// The input of the program is at its end.
    End,
    /// The host has gone.
    Gone,
}

/// The way from the host to a program.
pub(super) struct Inlet<'a> {
    pub(super) pid: Pid,
    /// Its input is a terminal.
    pub(super) terminal: bool,
    /// Where its input goes, until that has ended.
    to: Option<OwnedFd>,
    /// Input that the program has not taken yet, and whether that is all.
    pending: VecDeque<u8>,
    ended: bool,
    /// Where the host is, until it has gone.
    host: Option<&'a VsockStream>,
    from: BufReader<&'a VsockStream>,
}

impl<'a> Inlet<'a> {
    pub(super) fn new(
        pid: Pid,
        to: Option<OwnedFd>,
        terminal: bool,
        host: &'a VsockStream,
        from: BufReader<&'a VsockStream>,
    ) -> Result<Self, Errno> {
        if let Some(to) = &to {
            rustix::io::ioctl_fionbio(to, true)?;
        }
        Ok(Self {
            pid,
            terminal,
            to,
            pending: VecDeque::new(),
            ended: false,
            host: Some(host),
            from,
        })
    }

    pub(super) fn is_gone(&self) -> bool {
        self.host.is_none()
    }

    /// While the program does not take what it has, no more is taken from the host.
    fn has_room(&self) -> bool {
        self.pending.len() < MAX_DATA
    }

    /// Whether there is something to take that was read ahead, and which nobody need wait for.
    pub(super) fn has_message(&self) -> bool {
        self.has_room() && self.host.is_some() && !self.from.buffer().is_empty()
    }

    /// What it has to wait for: the host, to take from it, and the program, to feed it.
    pub(super) fn waits_for(&self) -> [Watched<'_>; 2] {
        let if_room = if self.has_room() {
            PollFlags::IN
        } else {
            PollFlags::empty()
        };
        let input = self.to.as_ref().filter(|_| !self.pending.is_empty());
        [
            self.host.map(|host| (host.as_fd(), if_room)),
            input.map(|input| (input.as_fd(), PollFlags::OUT)),
        ]
    }

    /// Takes the next message of the host's.
    pub(super) fn take(&mut self) -> Taken {
        match read(&mut self.from) {
            Ok(Some(Input::Data(data))) => {
                if self.to.is_some() && !self.ended {
                    self.pending.extend(data);
                    self.feed();
                }
            }
            Ok(Some(Input::End)) => {
                if self.terminal {
                    self.pending.push_back(END_OF_TRANSMISSION);
                }
                self.ended = true;
                self.feed();
                return Taken::End;
            }
            Ok(Some(Input::Resize(size))) => {
                if let (true, Some(terminal)) = (self.terminal, &self.to) {
                    terminal::set_size(terminal, size);
                }
            }
            Ok(Some(Input::Signal(number))) => {
                if let Some(signal) = sys::signal(number) {
                    let _ = sys::pass(signal, self.pid);
                }
            }
            Ok(None) | Err(_) => return Taken::Gone,
        }
        Taken::Message
    }

    /// Gives the program what it takes of its input.
    pub(super) fn feed(&mut self) {
        let Some(input) = &self.to else {
            return;
        };
        while !self.pending.is_empty() {
            match rustix::io::write(input, self.pending.as_slices().0) {
                Ok(count) => drop(self.pending.drain(..count)),
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR) => {}
                // It does not read any more.
                Err(_) => {
                    self.pending.clear();
                    self.to = None;
                    return;
                }
            }
        }
        // A terminal has a size yet.
        if self.ended && !self.terminal {
            self.to = None;
        }
    }

    /// Tells the host something; whether it is there to hear it.
    pub(super) fn tell(&self, reply: &Reply) -> bool {
        self.host
            .is_some_and(|mut host| write(&mut host, reply).is_ok())
    }

    /// Nothing more comes from the host.
    pub(super) fn close(&mut self) {
        self.host = None;
        self.pending.clear();
        self.to = None;
    }
}
