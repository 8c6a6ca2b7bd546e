//! The host end of a socket device: a Unix socket on which programs of the host ask for ports of
//! the guest, and a connection for each. One thread moves all bytes, between sockets and guest
//! memory without a copy of its own, unless a program does not take them at once.
//!
//! ```text
//!   program ──CONNECT 52──► listener ─accept─► Stream ◄──► Vsock (devices) ◄──► driver
//!           ◄─OK 1073741824─                     │
//!           ◄══════ bytes ══════════════════► socket ◄─readv, writev─► guest memory
//! ```
//!
//! The thread never waits for one connection: sockets do not block, what they do not take is
//! bounded by the credit that the guest has, and what they have is read when the guest has room.
//! Connections take turns of one packet's size.

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::io::Errno;
use rustix::net::{Shutdown as Direction, SocketFlags, accept_with, shutdown};
use strata_devices::virtio::{Hold, MAX_CONNECTIONS, OutgoingData, Shutdown, Vsock, VsockEvent};
use strata_memory::Ram;

use super::doorbell::Doorbell;
use super::root::Shared;
use stream::{Greeting, Phase, Stream};

mod stream;

/// What the listener and the doorbell are called among the sources of events; connections have
/// their host ports.
const LISTENER: u64 = u64::MAX;
const BELL: u64 = u64::MAX - 1;
/// Where host ports begin, and how many there are.
const FIRST_PORT: u32 = 1 << 30;
const PORTS: u32 = 1 << 30;
/// Events taken from the kernel, connections accepted and packets taken from the guest before
/// others have their turn.
const BATCH: usize = 64;
/// How soon it is tried again to accept connections where the host has no room for one more.
const RETRY: Duration = Duration::from_millis(100);
/// For how long programs may still take what an ended machine has sent.
const LINGER: Duration = Duration::from_secs(2);

/// Where programs of the host come in, and all that a worker needs to wait for them.
#[derive(Debug)]
pub struct Door {
    listener: OwnedFd,
    poll: OwnedFd,
    bell: Arc<Doorbell>,
}

impl Door {
    /// Makes a door of a Unix stream socket that listens.
    pub fn open(listener: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&listener, true)?;
        let poll = epoll::create(CreateFlags::CLOEXEC)?;
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(
            &poll,
            &listener,
            EventData::new_u64(LISTENER),
            EventFlags::IN,
        )?;
        // By the edge: each ring is an event, and it need not be read.
        let edge = EventFlags::IN | EventFlags::ET;
        epoll::add(&poll, &event, EventData::new_u64(BELL), edge)?;
        Ok(Self {
            listener,
            poll,
            bell: Arc::new(Doorbell::of_event(event)),
        })
    }

    /// What wakes the worker.
    pub(super) fn bell(&self) -> Arc<Doorbell> {
        Arc::clone(&self.bell)
    }
}

/// Serves connections until the doorbell stops it.
pub(super) fn serve(shared: &Arc<Shared<Vsock>>, memory: &Ram, door: &Door, bell: &Doorbell) {
    let mut server = Server {
        shared,
        memory,
        door,
        streams: HashMap::new(),
        turns: VecDeque::new(),
        next_port: 0,
        full: false,
    };
    while !bell.is_stopping() {
        bell.answer();
        let more = server.work();
        let timeout = match (more, server.full) {
            (true, _) => Some(Duration::ZERO),
            (false, true) => Some(RETRY),
            (false, false) => None,
        };
        if let Err(error) = server.wait(timeout) {
            tracing::warn!(%error, "the socket device has stopped");
            return;
        }
    }
    server.finish();
}

struct Server<'a> {
    shared: &'a Shared<Vsock>,
    memory: &'a Ram,
    door: &'a Door,
    /// By host port.
    streams: HashMap<u32, Stream>,
    /// Those that may have something for the guest, in the order of their turns.
    turns: VecDeque<u32>,
    /// What the next host port is, less the first.
    next_port: u32,
    /// The host had no room for one more connection; the listener is not watched.
    full: bool,
}

impl Server<'_> {
    /// Moves what can be moved, once round. Returns true if there may be more.
    fn work(&mut self) -> bool {
        if self.full {
            self.watch_listener(true);
        }
        if self.shared.with(|vsock, _| vsock.take_reset()) {
            self.drop_lost();
        }
        let mut more = self.take_from_guest();
        // Those whom the lack of buffers has held up come first when there are some.
        let mut held_up = VecDeque::new();
        for _ in 0..self.turns.len() {
            let Some(id) = self.turns.pop_front() else {
                break;
            };
            match self.take_turn(id, held_up.is_empty()) {
                Turn::Over => self.unqueue(id),
                Turn::Again => {
                    more = true;
                    self.turns.push_back(id);
                }
                Turn::NoBuffers => held_up.push_back(id),
            }
        }
        let wants_buffers = !held_up.is_empty();
        held_up.append(&mut self.turns);
        self.turns = held_up;
        let settle = |vsock: &mut Vsock, transport: &mut _| vsock.settle(transport, wants_buffers);
        self.shared.with(settle) || more
    }

    /// Sleeps until something happens, at most for `timeout`, and notes what it was.
    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let mut events: Vec<Event> = Vec::with_capacity(BATCH);
        let timeout = timeout.and_then(|time| Timespec::try_from(time).ok());
        let room = rustix::buffer::spare_capacity(&mut events);
        match epoll::wait(&self.door.poll, room, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for event in events {
            match event.data.u64() {
                LISTENER => self.accept(),
                BELL => {}
                id => self.note(id as u32, event.flags),
            }
        }
        Ok(())
    }

    fn accept(&mut self) {
        for _ in 0..BATCH {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match accept_with(&self.door.listener, flags) {
                // One too many is closed.
                Ok(socket) if self.streams.len() < MAX_CONNECTIONS => self.add(socket),
                Ok(_) | Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => return,
                Err(error) => {
                    tracing::debug!(%error, "cannot accept a connection for the guest");
                    self.watch_listener(false);
                    return;
                }
            }
        }
    }

    fn watch_listener(&mut self, watch: bool) {
        let flags = if watch {
            EventFlags::IN
        } else {
            EventFlags::empty()
        };
        let name = EventData::new_u64(LISTENER);
        let done = epoll::modify(&self.door.poll, &self.door.listener, name, flags);
        self.full = !watch || done.is_err();
    }

    fn add(&mut self, socket: OwnedFd) {
        let id = loop {
            let id = FIRST_PORT + self.next_port;
            self.next_port = (self.next_port + 1) % PORTS;
            if !self.streams.contains_key(&id) {
                break id;
            }
        };
        // By the edge: what a connection can do is noted, and asked for no more until it cannot.
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        if epoll::add(
            &self.door.poll,
            &socket,
            EventData::new_u64(id.into()),
            flags,
        )
        .is_ok()
        {
            self.streams.insert(id, Stream::new(socket));
        }
    }

    /// Notes what a connection can do now.
    fn note(&mut self, id: u32, flags: EventFlags) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        let ends = EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR;
        stream.readable |= flags.intersects(EventFlags::IN | ends);
        stream.hung_up |= flags.contains(EventFlags::HUP);
        if flags.intersects(EventFlags::OUT | ends) {
            self.flush(id);
        }
        self.queue(id);
    }

    /// Gives a connection a turn.
    fn queue(&mut self, id: u32) {
        if let Some(stream) = self.streams.get_mut(&id)
            && !stream.queued
        {
            stream.queued = true;
            self.turns.push_back(id);
        }
    }

    fn unqueue(&mut self, id: u32) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.queued = false;
        }
    }

    /// The device was reset: drops the connections that it does not know any more.
    fn drop_lost(&mut self) {
        let streams = &self.streams;
        let lost: Vec<u32> = self.shared.with(|vsock, _| {
            let lost = |(id, stream): &(&u32, &Stream)| {
                matches!(stream.phase, Phase::Asked | Phase::Open) && !vsock.has(**id)
            };
            streams.iter().filter(lost).map(|(id, _)| *id).collect()
        });
        for id in lost {
            self.streams.remove(&id);
        }
    }

    /// What a connection's turn is: to say what it wants, or, if there may be buffers, one packet
    /// for the guest.
    fn take_turn(&mut self, id: u32, buffers: bool) -> Turn {
        let Some(stream) = self.streams.get_mut(&id) else {
            return Turn::Over;
        };
        match stream.phase {
            Phase::Greeting => {
                let gone = stream.hung_up;
                self.greet(id);
                if gone {
                    return Turn::Again;
                }
            }
            // A program that has gone does not want it any more.
            Phase::Asked | Phase::Over if stream.hung_up => self.cut_off(id),
            Phase::Asked | Phase::Over => {}
            Phase::Open if stream.read_all => {
                if stream.hung_up {
                    self.streams.remove(&id);
                    self.end(id, Shutdown::all());
                }
            }
            Phase::Open if !stream.readable => {}
            Phase::Open if !buffers => return Turn::NoBuffers,
            Phase::Open => return self.take_in(id),
        }
        Turn::Over
    }

    fn greet(&mut self, id: u32) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        match stream.greeting() {
            Greeting::Port(port) if self.shared.with(|vsock, _| vsock.connect(id, port)) => {
                stream.phase = Phase::Asked;
            }
            Greeting::Incomplete if !stream.hung_up => {}
            _ => _ = self.streams.remove(&id),
        }
    }

    /// Moves a packet's size to the guest.
    fn take_in(&mut self, id: u32) -> Turn {
        let Some(stream) = self.streams.get_mut(&id) else {
            return Turn::Over;
        };
        let taken = |vsock: &mut Vsock, transport: &mut _| vsock.take_buffers(transport, id);
        let buffers = match self.shared.with(taken) {
            Ok(buffers) => buffers,
            Err(Hold::Buffers) => return Turn::NoBuffers,
            // Its guest will say when it has room.
            Err(Hold::Credit) => return Turn::Over,
            Err(Hold::Gone) => {
                self.streams.remove(&id);
                return Turn::Over;
            }
        };
        let result = stream.receive(self.memory, &buffers);
        let length = *result.as_ref().unwrap_or(&0);
        self.shared
            .with(|vsock, transport| vsock.received(transport, buffers, length));
        match result {
            Ok(0) => {
                stream.read_all = true;
                self.end(id, Shutdown::SEND);
                Turn::Again
            }
            Ok(_) => Turn::Again,
            Err(error) if error.kind() == ErrorKind::Interrupted => Turn::Again,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                stream.readable = false;
                Turn::Over
            }
            Err(_) => {
                self.cut_off(id);
                Turn::Over
            }
        }
    }

    fn end(&self, id: u32, ends: Shutdown) {
        self.shared.with(|vsock, _| vsock.end(id, ends));
    }

    /// Ends a connection at once, both ways.
    fn cut_off(&mut self, id: u32) {
        self.streams.remove(&id);
        self.shared.with(|vsock, _| vsock.close(id));
    }

    /// Takes packets from the guest. Returns true if there may be more.
    fn take_from_guest(&mut self) -> bool {
        for _ in 0..BATCH {
            let Some(event) = self.shared.with(Vsock::next_event) else {
                return false;
            };
            self.handle(event);
        }
        true
    }

    fn handle(&mut self, event: VsockEvent) {
        match event {
            VsockEvent::Nothing => {}
            VsockEvent::Data(data) => self.pass_on(data),
            VsockEvent::Credit(id) => self.queue(id),
            VsockEvent::Accepted(id) => match self.streams.get_mut(&id) {
                Some(stream) if stream.confirm(id).is_ok() => {
                    stream.phase = Phase::Open;
                    self.queue(id);
                }
                _ => self.cut_off(id),
            },
            VsockEvent::Ended(id, ends) => {
                if let Some(stream) = self.streams.get_mut(&id) {
                    stream.write_no_more |= ends.contains(Shutdown::SEND);
                    if ends.contains(Shutdown::RECEIVE) {
                        stream.read_all = true;
                        let _ = shutdown(&stream.socket, Direction::Read);
                    }
                }
                self.end_writing(id);
                self.queue(id);
            }
            VsockEvent::Over(id) => {
                if let Some(stream) = self.streams.get_mut(&id) {
                    stream.phase = Phase::Over;
                }
                self.end_writing(id);
            }
            VsockEvent::Reset(id) => _ = self.streams.remove(&id),
        }
    }

    /// Passes data of the guest's on to its program. Data for one that takes no more is lost.
    fn pass_on(&mut self, data: OutgoingData) {
        let id = data.connection();
        let stream = self.streams.get_mut(&id).filter(|stream| !stream.deaf);
        let result = stream.map_or(Ok(0), |stream| stream.send(self.memory, &data));
        let sent = *result.as_ref().unwrap_or(&0);
        self.shared.with(|vsock, transport| {
            vsock.taken(transport, data);
            vsock.forwarded(id, sent as u32);
        });
        if result.is_err() {
            self.give_up_sending(id);
        }
        self.queue(id);
    }

    /// Passes on what a program has not taken before.
    fn flush(&mut self, id: u32) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        match stream.flush() {
            Ok(0) => {}
            Ok(sent) => self
                .shared
                .with(|vsock, _| vsock.forwarded(id, sent as u32)),
            Err(_) => self.give_up_sending(id),
        }
        self.end_writing(id);
    }

    /// A program takes no more. It may still send.
    fn give_up_sending(&mut self, id: u32) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.give_up_sending();
            self.end(id, Shutdown::RECEIVE);
        }
    }

    /// Tells a program that the guest sends no more, once it has all that came before.
    fn end_writing(&mut self, id: u32) {
        let Some(stream) = self.streams.get_mut(&id).filter(|s| !s.has_unsent()) else {
            return;
        };
        if stream.phase == Phase::Over {
            self.streams.remove(&id);
        } else if std::mem::take(&mut stream.write_no_more) {
            let _ = shutdown(&stream.socket, Direction::Write);
        }
    }

    /// The machine has ended: takes what the guest has sent before, and gives programs a moment to
    /// take it.
    fn finish(&mut self) {
        while self.take_from_guest() {}
        let _ = epoll::delete(&self.door.poll, &self.door.listener);
        let until = Instant::now() + LINGER;
        loop {
            self.streams.retain(|_, stream| stream.has_unsent());
            let left = until.saturating_duration_since(Instant::now());
            if self.streams.is_empty() || left.is_zero() || self.wait(Some(left)).is_err() {
                return;
            }
        }
    }
}

/// What came of a connection's turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// It has nothing more for now.
    Over,
    /// It may have more.
    Again,
    /// It has something, and the driver has no buffers for it.
    NoBuffers,
}
