//! Between the host and a program: what the host has for it (input, signals, sizes of its terminal),
//! and what is told the host.
//!
//! Nothing here waits for one side while the other has something to say. A program that does not read
//! holds up its input, of which the host sends no more than a [`WINDOW`], and no signal behind it; a
//! host that does not read holds up the program's output, and hears of nothing else.

use std::collections::VecDeque;
use std::io::{BufReader, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use rustix::process::Pid;
use strata_protocol::{Input, Reply, WINDOW, read, write};
use vsock::VsockStream;

use crate::{sys, terminal};

/// What ends the input of a terminal that reads lines.
const END_OF_TRANSMISSION: u8 = 4;

/// What a host that sends, or has gone, is ready for.
const SPEAKS: PollFlags = PollFlags::IN.union(PollFlags::HUP).union(PollFlags::ERR);

/// A descriptor and what it is waited for with; `None` where there is none.
pub(super) type Watched<'a> = Option<(BorrowedFd<'a>, PollFlags)>;

/// Waits until one of `watched` is ready, or just looks if not to `wait`; gives what each is ready for.
pub(super) fn wait_for<const N: usize>(
    watched: [Watched<'_>; N],
    wait: bool,
) -> Result<[PollFlags; N], Errno> {
    let mut fds: Vec<PollFd<'_>> = watched
        .into_iter()
        .flatten()
        .map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags))
        .collect();
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    match poll(&mut fds, (!wait).then_some(&now)) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => return Err(error),
    }
    let mut polled = fds.iter().map(PollFd::revents);
    Ok(watched.map(|each| match each {
        Some(_) => polled.next().unwrap_or(PollFlags::empty()),
        None => PollFlags::empty(),
    }))
}

/// Stands between the host and a program.
pub(super) struct Proxy<'a> {
    pub(super) pid: Pid,
    /// The program's input is a terminal.
    pub(super) terminal: bool,
    /// Where its input goes, as long as somebody keeps that open.
    input: Weak<OwnedFd>,
    /// Input that it has not taken yet, which keeps it open, and whether that is all.
    pending: VecDeque<u8>,
    kept: Option<Arc<OwnedFd>>,
    ended: bool,
    /// Where the host is, until it has gone.
    host: Option<&'a VsockStream>,
    from: BufReader<&'a VsockStream>,
    /// What it has not taken yet.
    outgoing: VecDeque<u8>,
}

impl<'a> Proxy<'a> {
    pub(super) fn new(
        pid: Pid,
        input: Weak<OwnedFd>,
        terminal: bool,
        host: &'a VsockStream,
        from: BufReader<&'a VsockStream>,
    ) -> Result<Self, Errno> {
        if let Some(input) = input.upgrade() {
            rustix::io::ioctl_fionbio(&*input, true)?;
        }
        Ok(Self {
            pid,
            terminal,
            input,
            pending: VecDeque::new(),
            kept: None,
            ended: false,
            host: Some(host),
            from,
            outgoing: VecDeque::new(),
        })
    }

    /// Whether the host has gone.
    pub(super) fn is_gone(&self) -> bool {
        self.host.is_none()
    }

    /// Whether the host has taken all that it was told.
    pub(super) fn is_idle(&self) -> bool {
        self.outgoing.is_empty()
    }

    /// Whether the input has ended and the program has got all of it.
    pub(super) fn input_is_over(&self) -> bool {
        self.ended && self.pending.is_empty() && !self.terminal
    }

    /// Whether there is a message that was read ahead, for which nobody need wait.
    pub(super) fn has_message(&self) -> bool {
        self.host.is_some() && !self.from.buffer().is_empty()
    }

    /// What it has to wait for: the host and the program.
    pub(super) fn waits_for(&self) -> [Watched<'_>; 2] {
        let mut wanted = PollFlags::IN;
        wanted.set(PollFlags::OUT, !self.outgoing.is_empty());
        [
            self.host.map(|host| (host.as_fd(), wanted)),
            self.kept
                .as_ref()
                .map(|input| (input.as_fd(), PollFlags::OUT)),
        ]
    }

    /// Does what can be done, now that those waited for are ready.
    pub(super) fn serve(&mut self, host: PollFlags, input: PollFlags) {
        if host.contains(PollFlags::OUT) {
            self.flush();
        }
        if self.has_message() || host.intersects(SPEAKS) {
            self.take();
        }
        if !input.is_empty() {
            self.feed();
        }
    }

    /// Takes the next message of the host's.
    fn take(&mut self) {
        match read(&mut self.from) {
            Ok(Some(Input::Data(data))) if self.pending.len() + data.len() <= WINDOW => {
                if !self.ended {
                    self.pending.extend(data);
                    self.feed();
                }
            }
            Ok(Some(Input::End)) => {
                if self.terminal {
                    self.pending.push_back(END_OF_TRANSMISSION);
                } else {
                    self.ended = true;
                }
                self.feed();
            }
            Ok(Some(Input::Resize(size))) => {
                if let (true, Some(terminal)) = (self.terminal, self.input.upgrade()) {
                    terminal::set_size(&*terminal, size);
                }
            }
            Ok(Some(Input::Signal(number))) => {
                if let Some(signal) = sys::signal(number) {
                    let _ = sys::pass(signal, self.pid);
                }
            }
            Ok(Some(Input::Data(_)) | None) | Err(_) => self.host = None,
        }
    }

    /// Gives the program what it takes of its input, and tells the host how much that was.
    fn feed(&mut self) {
        let before = self.pending.len();
        self.kept = None;
        match self.input.upgrade() {
            Some(input) => {
                if self.write_to(&input) {
                    self.kept = Some(input);
                }
            }
            // It has none, or no more: what comes for it goes nowhere.
            None => self.pending.clear(),
        }
        let taken = before - self.pending.len();
        if taken > 0 {
            self.tell(&Reply::Taken(taken as u32));
        }
    }

    /// Whether something is left that the program does not take now.
    fn write_to(&mut self, input: &OwnedFd) -> bool {
        while !self.pending.is_empty() {
            match rustix::io::write(input, self.pending.as_slices().0) {
                Ok(count) => drop(self.pending.drain(..count)),
                Err(Errno::AGAIN) => return true,
                Err(Errno::INTR) => {}
                // It does not read any more.
                Err(_) => self.pending.clear(),
            }
        }
        false
    }

    /// Tells the host something, as soon as it listens.
    pub(super) fn tell(&mut self, reply: &Reply) {
        if self.host.is_some() && write(&mut self.outgoing, reply).is_ok() {
            self.flush();
        }
    }

    fn flush(&mut self) {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        while let (Some(host), false) = (self.host, self.outgoing.is_empty()) {
            match send(host, self.outgoing.as_slices().0, flags) {
                Ok(count) => drop(self.outgoing.drain(..count)),
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR) => {}
                Err(_) => self.host = None,
            }
        }
    }

    /// Waits until the host has taken all that it was told: nothing else is left to do.
    pub(super) fn finish(&mut self) {
        if let Some(mut host) = self.host {
            let _ = host.write_all(self.outgoing.make_contiguous());
            self.outgoing.clear();
        }
    }

    /// Forgets what was on its way: the host has gone.
    pub(super) fn close(&mut self) {
        self.host = None;
        self.outgoing.clear();
        self.pending.clear();
        self.kept = None;
    }
}
