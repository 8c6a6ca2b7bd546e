//! The switch's event loop: one thread, no locks.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::event::epoll::{self, EventFlags};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags, accept_with, recv, send};

use crate::nat::Source;
use crate::port::Port;
use crate::protocol::{Answer, MAX_MESSAGE, widen};
use crate::switch::{Door, Switch};

/// Events taken from the kernel at once.
const EVENTS: usize = 128;
/// Frames of one port that are taken before others have their turn.
const BATCH: usize = 64;
/// How often it is looked whether a guest should have answered, and whether anything is over.
const SOON: Duration = Duration::from_millis(100);
const LATER: Duration = Duration::from_secs(5);

impl Switch {
    /// Adds the port whose machine has the other end of `socket`.
    pub fn add_port(&mut self, socket: OwnedFd) -> io::Result<()> {
        let number = self
            .free_number()
            .ok_or_else(|| io::Error::other("the network is full"))?;
        widen(&socket);
        epoll::add(
            &self.poll,
            &socket,
            Source::Port.data(number.into()),
            EventFlags::IN,
        )?;
        let addresses = self.config.subnet.guest(number);
        self.ports.insert(number, Port::new(socket, addresses));
        Ok(())
    }

    /// Adds the port of a network's only machine, and waits for what that says first: ports of the
    /// host that it wants are opened with all rights that this process has now.
    pub fn add_first_port(&mut self, socket: OwnedFd) -> io::Result<()> {
        let mut buffer = vec![0; MAX_MESSAGE];
        let (_, length) = recv(&socket, &mut buffer[..], RecvFlags::empty())?;
        self.add_port(socket)?;
        let number = self.ports.keys().next().copied();
        if let Some(number) = number {
            self.greet(number, &buffer[..length]);
        }
        Ok(())
    }

    /// Lets machines come in through `listener`, a listening Unix socket of packets in order. The
    /// network ends when nobody is in it and `lock`, which those who come in hold, is free.
    pub fn open_door(&mut self, listener: OwnedFd, lock: OwnedFd) -> io::Result<()> {
        rustix::io::ioctl_fionbio(&listener, true)?;
        epoll::add(&self.poll, &listener, Source::Door.data(0), EventFlags::IN)?;
        self.door = Some(Door { listener, lock });
        Ok(())
    }

    /// Takes new lists of the host's name servers from `socket`, each a message, in JSON.
    pub fn hear_resolvers(&mut self, socket: OwnedFd) -> io::Result<()> {
        let data = Source::Resolvers.data(0);
        epoll::add(&self.poll, &socket, data, EventFlags::IN)?;
        self.resolvers = Some(socket);
        Ok(())
    }

    fn take_resolvers(&mut self, buffer: &mut [u8]) {
        let Some(socket) = &self.resolvers else {
            return;
        };
        match recv(socket, &mut *buffer, RecvFlags::DONTWAIT) {
            // Whoever told of them has gone.
            Ok((_, 0)) => self.resolvers = None,
            Ok((_, length)) => {
                if let Ok(servers) = serde_json::from_slice(&buffer[..length]) {
                    self.config.resolvers = servers;
                }
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.resolvers = None,
        }
    }

    /// Serves the network until its last machine has gone.
    pub fn run(&mut self) -> io::Result<()> {
        let mut buffer = vec![0; MAX_MESSAGE];
        let mut events = Vec::with_capacity(EVENTS);
        let mut ticked = Instant::now();
        while !self.is_over() {
            events.clear();
            let timeout = self.timeout();
            match epoll::wait(
                &self.poll,
                rustix::buffer::spare_capacity(&mut events),
                timeout.as_ref(),
            ) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            self.now = Instant::now();
            for event in &events {
                if let Some((source, number)) = Source::of(event.data) {
                    self.handle(source, number, event.flags, &mut buffer);
                }
            }
            if self.now.duration_since(ticked) >= SOON {
                ticked = self.now;
                self.tick_connections();
                self.tick_exchanges();
                self.tick_forwards(&mut buffer);
                self.tick_services();
                self.tick_talks();
            }
            self.read_on(&mut buffer);
            self.pump();
            self.watch_for_room();
        }
        Ok(())
    }

    fn timeout(&self) -> Option<Timespec> {
        let time = if self.nat.has_unread() {
            Duration::ZERO
        } else if self.nat.is_waiting() {
            SOON
        } else if self.door.is_some() || !self.nat.is_quiet() {
            LATER
        } else {
            return None;
        };
        Timespec::try_from(time).ok()
    }

    fn is_over(&self) -> bool {
        if !self.ports.is_empty() {
            return false;
        }
        // Whoever comes in holds the lock until it is in: nobody is lost.
        self.door
            .as_ref()
            .is_none_or(|door| flock(&door.lock, FlockOperation::NonBlockingLockExclusive).is_ok())
    }

    fn handle(&mut self, source: Source, number: u64, flags: EventFlags, buffer: &mut [u8]) {
        match source {
            Source::Door => self.let_in(),
            Source::Port => {
                let number = number as u8;
                if flags.contains(EventFlags::OUT) {
                    self.port_writable(number);
                }
                if flags.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR) {
                    self.read_port(number, buffer);
                }
            }
            Source::Connection => self.connection_ready(number, flags),
            Source::Exchange => self.exchange_ready(number, buffer),
            Source::Forward => self.forward_ready(number, buffer),
            Source::Service => self.service_ready(number, buffer),
            Source::Resolvers => self.take_resolvers(buffer),
            Source::Talk => self.talk_ready(number),
        }
    }

    fn let_in(&mut self) {
        while let Some(door) = &self.door {
            match accept_with(&door.listener, SocketFlags::CLOEXEC) {
                Ok(socket) => {
                    if let Err(error) = self.add_port(socket) {
                        tracing::warn!(%error, "a machine is not let in");
                    }
                }
                Err(Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }

    fn read_port(&mut self, number: u8, buffer: &mut [u8]) {
        for _ in 0..BATCH {
            let Some(port) = self.ports.get(&number) else {
                return;
            };
            match recv(&port.socket, &mut *buffer, RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return self.remove_port(number),
                Ok((_, length)) if port.joined => self.receive(number, &buffer[..length]),
                Ok((_, length)) => self.greet(number, &buffer[..length]),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => return self.remove_port(number),
            }
        }
    }

    /// Answers the first message of a port.
    fn greet(&mut self, number: u8, message: &[u8]) {
        let admitted = self.admit(number, message);
        let answer = match &admitted {
            Ok(addresses) => Answer::welcome(addresses, self.config.subnet.gateway()),
            Err(why) => Answer::Refused(why.clone()),
        };
        if let (Some(port), Ok(text)) = (self.ports.get(&number), serde_json::to_vec(&answer)) {
            let _ = send(
                &port.socket,
                &text,
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            );
        }
        if admitted.is_err() {
            self.remove_port(number);
        }
    }

    /// Asks to be told when sockets of ports have room, where something waits for it.
    fn watch_for_room(&mut self) {
        for (number, port) in &mut self.ports {
            if port.blocked == port.watched {
                continue;
            }
            let out = if port.blocked {
                EventFlags::OUT
            } else {
                EventFlags::empty()
            };
            let data = Source::Port.data(u64::from(*number));
            if epoll::modify(&self.poll, &port.socket, data, EventFlags::IN | out).is_ok() {
                port.watched = port.blocked;
            }
        }
    }
}
