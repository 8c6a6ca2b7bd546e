//! TCP connections through the NAT: opening them, and keeping their flows moving.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socketpair, sockopt};

use super::{
    Key, LITTLE_ROOM, MANY_CONNECTIONS, MAX_CONNECTIONS, ROOM, Source, meaning, new_socket,
};
use crate::gateway;
use crate::policy::{Route, route};
use crate::switch::Switch;
use crate::tcp::{Flow, Link as _, Outgoing, Path, Segment, Verdict, flag};
use crate::wire::{Packet, Unreachable, protocol};

impl Switch {
    /// A TCP segment of a guest's.
    pub(super) fn take_segment(&mut self, number: u8, packet: &Packet<'_>) {
        let Some(segment) = Segment::parse(packet.payload) else {
            return;
        };
        let key = Key {
            port: number,
            protocol: protocol::TCP,
            guest: (packet.source, segment.source).into(),
            remote: (packet.destination, segment.destination).into(),
        };
        if let Some(id) = self.nat.keys.get(&key).copied() {
            let (Some((_, flow)), Some(port)) = (
                self.nat.connections.get_mut(&id),
                self.ports.get_mut(&number),
            ) else {
                return;
            };
            let verdict = flow.take(&segment, port, self.now);
            self.settle(id, verdict);
            self.stir(id);
        } else if segment.has(flag::SYN) && !segment.has(flag::ACK) {
            self.open(key, packet, &segment);
        } else if !segment.has(flag::RST) {
            self.answer_with_reset(&key, &segment);
        }
    }

    pub(super) fn path(&self, key: &Key) -> Option<Path> {
        let port = self.ports.get(&key.port)?;
        Some(Path {
            link: gateway::link_to(&port.addresses),
            guest: key.guest,
            remote: key.remote,
            offloads: port.offloads,
            room: if port.connections < MANY_CONNECTIONS {
                ROOM
            } else {
                LITTLE_ROOM
            },
        })
    }

    fn answer_with_reset(&mut self, key: &Key, segment: &Segment<'_>) {
        let (Some(path), Some(port)) = (self.path(key), self.ports.get_mut(&key.port)) else {
            return;
        };
        let out = Outgoing::reset_for(segment);
        // Whoever misses it asks again.
        let _ = port.send(&path.encode(&out), out.payload);
    }

    /// A guest wants to connect.
    fn open(&mut self, key: Key, packet: &Packet<'_>, syn: &Segment<'_>) {
        let opened = match route(&self.config, key.remote) {
            Route::Host(target) => self.dial(key, target, syn),
            Route::Resolver => self.talk(key, syn),
            Route::Refused => Err(Errno::CONNREFUSED),
            Route::Unreachable(why) => return self.refuse(key.port, packet, why),
        };
        match opened {
            Err(Errno::CONNREFUSED) => self.answer_with_reset(&key, syn),
            // Where there is no room, the guest asks again, and finds some then.
            Ok(()) | Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::AGAIN) => {}
            Err(error) => self.refuse(key.port, packet, meaning(error)),
        }
    }

    /// Connects a guest to a socket of the host's.
    fn dial(&mut self, key: Key, target: SocketAddr, syn: &Segment<'_>) -> Result<(), Errno> {
        self.has_place(&key)?;
        let socket = new_socket(target, SocketType::STREAM, None)?;
        let _ = sockopt::set_tcp_nodelay(&socket, true);
        match connect(&socket, &target) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(error) => return Err(error),
        }
        self.splice(key, socket, syn);
        Ok(())
    }

    /// Connects a guest to the gateway's own name server.
    fn talk(&mut self, key: Key, syn: &Segment<'_>) -> Result<(), Errno> {
        self.has_place(&key)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (theirs, ours) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        if !self.begin_talk(key.port, ours) {
            return Err(Errno::CONNREFUSED);
        }
        self.splice(key, theirs, syn);
        Ok(())
    }

    /// Fails if the guest has as many connections as it may.
    fn has_place(&self, key: &Key) -> Result<(), Errno> {
        let port = self.ports.get(&key.port).ok_or(Errno::AGAIN)?;
        if port.connections < MAX_CONNECTIONS {
            return Ok(());
        }
        Err(Errno::AGAIN)
    }

    /// Begins the connection of a guest whose other end is `socket`.
    fn splice(&mut self, key: Key, socket: OwnedFd, syn: &Segment<'_>) {
        if let Some(path) = self.path(&key) {
            let initial = self.nat.initial_sequence(&key, self.now);
            let flow = Flow::connecting(path, socket, syn, initial, self.now);
            self.insert(key, flow);
        }
    }

    /// Takes a connection into the tables.
    pub(super) fn insert(&mut self, key: Key, flow: Flow) -> Option<u64> {
        let id = self.nat.next();
        if !self.watch(flow.socket(), Source::Connection, id) {
            return None;
        }
        if let Some(port) = self.ports.get_mut(&key.port) {
            port.connections += 1;
        }
        self.nat.keys.insert(key, id);
        self.nat.connections.insert(id, (key, flow));
        Some(id)
    }

    pub(super) fn stir(&mut self, id: u64) {
        if self.nat.stirred.last() != Some(&id) {
            self.nat.stirred.push(id);
        }
    }

    /// Carries out what is to become of a connection.
    pub(super) fn settle(&mut self, id: u64, verdict: Verdict) {
        match verdict {
            Verdict::Keep => {}
            Verdict::Blocked => {
                let port = self.nat.connections.get(&id).map(|(key, _)| key.port);
                if let Some(port) = port.and_then(|number| self.ports.get_mut(&number)) {
                    port.blocked = true;
                    if !port.waiting.contains(&id) {
                        port.waiting.push(id);
                    }
                }
            }
            Verdict::Remove => {
                let Some((key, _)) = self.nat.connections.remove(&id) else {
                    return;
                };
                self.nat.keys.remove(&key);
                if let Some(port) = self.ports.get_mut(&key.port) {
                    port.connections -= 1;
                }
            }
        }
    }

    /// Something has happened to a connection's socket.
    pub(crate) fn connection_ready(&mut self, id: u64, flags: EventFlags) {
        let Some((_, flow)) = self.nat.connections.get_mut(&id) else {
            return;
        };
        let over = flags.intersects(EventFlags::ERR | EventFlags::HUP);
        let readable = over || flags.intersects(EventFlags::IN | EventFlags::RDHUP);
        let writable = over || flags.intersects(EventFlags::OUT);
        flow.ready(readable, writable);
        if flow.is_connecting() && writable {
            self.connected(id);
        }
        self.stir(id);
    }

    /// The host's side is connected, or cannot be.
    fn connected(&mut self, id: u64) {
        let Some((key, flow)) = self.nat.connections.get_mut(&id) else {
            return;
        };
        let key = *key;
        let Some(port) = self.ports.get_mut(&key.port) else {
            return;
        };
        match sockopt::socket_error(flow.socket()) {
            Ok(Ok(())) => {
                let verdict = flow.connected(port, self.now);
                self.settle(id, verdict);
            }
            Ok(Err(Errno::HOSTUNREACH | Errno::NETUNREACH | Errno::TIMEDOUT)) => {
                // The SYN as it was: ports and sequence number are what its sender looks at.
                let mut start = flow.syn_start();
                start.resize(20, 0);
                self.refuse_later(&key, &start, Unreachable::Host);
                self.settle(id, Verdict::Remove);
            }
            Ok(Err(_)) | Err(_) => {
                flow.reset(port);
                self.settle(id, Verdict::Remove);
            }
        }
    }

    /// Lets all connections go on that something has happened to.
    pub(crate) fn pump(&mut self) {
        for id in std::mem::take(&mut self.nat.stirred) {
            let Some((key, flow)) = self.nat.connections.get_mut(&id) else {
                continue;
            };
            let Some(port) = self.ports.get_mut(&key.port) else {
                continue;
            };
            let verdict = flow.pump(port, self.now);
            self.settle(id, verdict);
        }
    }

    /// A port's socket has room again.
    pub(crate) fn port_writable(&mut self, number: u8) {
        let Some(port) = self.ports.get_mut(&number) else {
            return;
        };
        for id in port.flush() {
            self.stir(id);
        }
    }

    /// Looks at all connections whose guest should have answered.
    pub(crate) fn tick_connections(&mut self) {
        let ids: Vec<u64> = self.nat.connections.keys().copied().collect();
        for id in ids {
            let Some((key, flow)) = self.nat.connections.get_mut(&id) else {
                continue;
            };
            // A guest that does not take frames has not lost any.
            let Some(port) = self.ports.get_mut(&key.port).filter(|port| !port.blocked) else {
                continue;
            };
            let verdict = flow.tick(port, self.now);
            self.settle(id, verdict);
        }
    }
}
