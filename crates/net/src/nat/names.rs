//! Names over TCP (RFC 7766): the gateway is the name server there too. Questions for guests'
//! names are answered here, the others go on to a name server of the host's, over TCP as they came:
//! who asks so mostly wants what was too long for a datagram.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketType, connect, recv, send, sockopt};

use super::{Source, new_socket};
use crate::switch::Switch;

/// Connections for names that a guest may have at once.
const MAX_TALKS: usize = 32;
/// For how long one may be silent (RFC 7766 §6.2.3: some seconds).
const IDLE: Duration = Duration::from_secs(30);
/// Bytes from which on no more are taken, until some have gone: the longest message, twice.
const LIMIT: usize = 2 * (2 + 65_535);
/// Bytes of the length before each message (RFC 1035 §4.2.2).
const LENGTH: usize = 2;

/// One side of a connection for names.
#[derive(Debug)]
struct Side {
    socket: OwnedFd,
    inbox: Vec<u8>,
    outbox: Vec<u8>,
    /// It says no more.
    ended: bool,
}

impl Side {
    fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            inbox: Vec::new(),
            outbox: Vec::new(),
            ended: false,
        }
    }

    /// Takes what has come, as far as there is room. Returns whether there was any.
    fn read(&mut self) -> Result<bool, Errno> {
        let mut buffer = [0; 4096];
        let before = self.inbox.len();
        while !self.ended && self.inbox.len() < LIMIT {
            match recv(&self.socket, &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok((_, 0)) => self.ended = true,
                Ok((_, length)) => self.inbox.extend(&buffer[..length]),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(self.inbox.len() > before)
    }

    /// Sends what there is room for. Returns whether there was any.
    fn write(&mut self) -> Result<bool, Errno> {
        let before = self.outbox.len();
        while !self.outbox.is_empty() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match send(&self.socket, &self.outbox, flags) {
                Ok(length) => drop(self.outbox.drain(..length)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(self.outbox.len() < before)
    }

    /// The next message that has come whole.
    fn next(&mut self) -> Option<Vec<u8>> {
        let &[high, low, ..] = &self.inbox[..] else {
            return None;
        };
        let end = LENGTH + usize::from(u16::from_be_bytes([high, low]));
        if self.inbox.len() < end {
            return None;
        }
        let rest = self.inbox.split_off(end);
        let mut message = std::mem::replace(&mut self.inbox, rest);
        message.drain(..LENGTH);
        Some(message)
    }

    fn put(&mut self, message: &[u8]) {
        self.outbox.extend((message.len() as u16).to_be_bytes());
        self.outbox.extend(message);
    }

    fn has_room(&self) -> bool {
        self.outbox.len() < LIMIT
    }
}

/// A connection for names.
#[derive(Debug)]
pub(super) struct Talk {
    pub(super) port: u8,
    guest: Side,
    /// The host's name server, if it was needed.
    server: Option<Side>,
    /// Questions that it has not answered.
    open: usize,
    last_use: Instant,
}

impl Talk {
    /// Moves what the name server has said. Returns whether there was any; fails if there will be
    /// no answer.
    fn listen_to_server(&mut self) -> Result<bool, Errno> {
        let Some(server) = &mut self.server else {
            return Ok(false);
        };
        let mut moved = server.write()?;
        moved |= server.read()?;
        while self.guest.has_room()
            && let Some(answer) = server.next()
        {
            self.open = self.open.saturating_sub(1);
            self.guest.put(&answer);
            moved = true;
        }
        if server.ended && self.open > 0 && server.inbox.is_empty() {
            return Err(Errno::CONNRESET);
        }
        if server.ended && self.open == 0 {
            self.server = None;
        }
        Ok(moved)
    }

    fn is_over(&self) -> bool {
        self.guest.ended && self.open == 0 && self.guest.outbox.is_empty()
    }
}

impl Switch {
    /// Answers questions that come through `socket` from a guest. False if it has too many such
    /// connections.
    pub(crate) fn begin_talk(&mut self, number: u8, socket: OwnedFd) -> bool {
        let own = self.nat.talks.values().filter(|talk| talk.port == number);
        if own.count() >= MAX_TALKS {
            return false;
        }
        let id = self.nat.next();
        if !self.watch(&socket, Source::Talk, id) {
            return false;
        }
        let talk = Talk {
            port: number,
            guest: Side::new(socket),
            server: None,
            open: 0,
            last_use: self.now,
        };
        self.nat.talks.insert(id, talk);
        true
    }

    /// Something has happened to a socket of a connection for names.
    pub(crate) fn talk_ready(&mut self, id: u64) {
        let Some(mut talk) = self.nat.talks.remove(&id) else {
            return;
        };
        talk.last_use = self.now;
        if self.talk_on(id, &mut talk).is_some() && !talk.is_over() {
            self.nat.talks.insert(id, talk);
        }
    }

    /// Moves all that can be moved. `None` if the connection is to end.
    fn talk_on(&mut self, id: u64, talk: &mut Talk) -> Option<()> {
        loop {
            let mut moved = talk.guest.read().ok()?;
            while talk.guest.has_room()
                && talk.server.as_ref().is_none_or(Side::has_room)
                && let Some(question) = talk.guest.next()
            {
                moved = true;
                if let Some(answer) = self.own_answer(&question) {
                    talk.guest.put(&answer);
                    continue;
                }
                if talk.server.is_none() {
                    talk.server = Some(self.dial_server(id)?);
                }
                talk.server.as_mut()?.put(&question);
                talk.open += 1;
            }
            let Ok(heard) = talk.listen_to_server() else {
                // The guest asks again, and another server.
                self.nat.resolver = self.nat.resolver.wrapping_add(1);
                return None;
            };
            moved |= heard;
            moved |= talk.guest.write().ok()?;
            if !moved {
                return Some(());
            }
        }
    }

    fn dial_server(&mut self, id: u64) -> Option<Side> {
        if self.config.isolated {
            return None;
        }
        let target: SocketAddr = self.resolver()?;
        let socket = new_socket(target, SocketType::STREAM, None).ok()?;
        let _ = sockopt::set_tcp_nodelay(&socket, true);
        match connect(&socket, &target) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(_) => {
                self.nat.resolver = self.nat.resolver.wrapping_add(1);
                return None;
            }
        }
        self.watch(&socket, Source::Talk, id)
            .then(|| Side::new(socket))
    }

    /// Ends connections for names that are silent.
    pub(crate) fn tick_talks(&mut self) {
        let now = self.now;
        self.nat
            .talks
            .retain(|_, talk| now.duration_since(talk.last_use) < IDLE);
    }
}
