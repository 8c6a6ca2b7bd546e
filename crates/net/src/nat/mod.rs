//! Network address translation: what a guest sends to the world goes out through sockets of this
//! process, so the host's kernel sees its own user and no guest. What a guest holds here is
//! bounded in number and bytes.

mod datagrams;
mod forwards;
mod mapping;
mod names;
mod streams;

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use crate::gateway::{self, Echo};
use crate::switch::Switch;
use crate::tcp::Flow;
use crate::wire::{self, Datagram, Packet, Unreachable, protocol};
use datagrams::Exchange;
use forwards::Forwarding;
pub use forwards::listen_on;
use mapping::Mappings;
use names::Talk;

/// Connections that a guest may have through the NAT.
const MAX_CONNECTIONS: usize = 4096;
/// From so many on they have less room each, so that a guest makes the switch hold no more than
/// 250 MiB in all.
const MANY_CONNECTIONS: usize = 256;
/// Bytes that may wait in each direction of a connection.
const ROOM: usize = 256 << 10;
const LITTLE_ROOM: usize = 16 << 10;
/// Exchanges of datagrams that a guest may have through the NAT.
const MAX_EXCHANGES: usize = 1024;

/// What tells flows apart: the port, and both ends as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    port: u8,
    protocol: u8,
    guest: SocketAddr,
    remote: SocketAddr,
}

/// All that goes through the NAT. Numbers are never used twice, so an event for one that is gone
/// finds nothing.
#[derive(Debug, Default)]
pub(crate) struct Nat {
    last: u64,
    connections: HashMap<u64, (Key, Flow)>,
    exchanges: HashMap<u64, Exchange>,
    keys: HashMap<Key, u64>,
    forwards: HashMap<u64, Forwarding>,
    mappings: Mappings,
    talks: HashMap<u64, Talk>,
    /// Connections that something has happened to, to be pumped.
    stirred: Vec<u64>,
    /// Exchanges that have more to be read than was taken at once.
    unread: Vec<u64>,
    /// Which of the host's name servers is asked.
    resolver: usize,
    /// Where sequence numbers begin: the time that passes from here, and a secret for each pair of
    /// ends.
    began: Option<Instant>,
    secret: RandomState,
}

/// What an event is about, in the upper byte of its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Door,
    Port,
    Connection,
    Exchange,
    Forward,
    Service,
    Resolvers,
    /// Either side of a connection for names.
    Talk,
}

const KIND_SHIFT: u32 = 56;

impl Source {
    const ALL: [Self; 8] = [
        Self::Door,
        Self::Port,
        Self::Connection,
        Self::Exchange,
        Self::Forward,
        Self::Service,
        Self::Resolvers,
        Self::Talk,
    ];

    pub(crate) fn data(self, number: u64) -> EventData {
        EventData::new_u64((self as u64) << KIND_SHIFT | number)
    }

    pub(crate) fn of(data: EventData) -> Option<(Self, u64)> {
        let kind = Self::ALL.get((data.u64() >> KIND_SHIFT) as usize)?;
        Some((*kind, data.u64() & !(u64::MAX << KIND_SHIFT)))
    }
}

impl Nat {
    fn next(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    /// Where a connection's sequence numbers begin (RFC 6528): nobody can guess it, and it lies
    /// behind those of an earlier connection of the same ends, which the guest may remember.
    fn initial_sequence(&mut self, key: &Key, now: Instant) -> u32 {
        let began = *self.began.get_or_insert(now);
        let ticks = now.duration_since(began).as_micros() / 4;
        (self.secret.hash_one(key) as u32).wrapping_add(ticks as u32)
    }

    /// Forgets all that belongs to a port.
    pub(crate) fn remove_port(&mut self, number: u8) {
        self.connections.retain(|_, (key, _)| key.port != number);
        self.exchanges
            .retain(|_, exchange| exchange.key.port != number);
        self.keys.retain(|key, _| key.port != number);
        self.forwards.retain(|_, forward| forward.port != number);
        self.talks.retain(|_, talk| talk.port != number);
    }

    /// Whether there is something to read of which no event tells.
    pub(crate) fn has_unread(&self) -> bool {
        !self.unread.is_empty()
    }

    /// Whether nothing needs to be looked at until an event comes.
    pub(crate) fn is_quiet(&self) -> bool {
        self.connections.is_empty()
            && self.exchanges.is_empty()
            && self.forwards.is_empty()
            && self.talks.is_empty()
    }

    /// Whether a connection waits for its guest's answer, or a client for a place.
    pub(crate) fn is_waiting(&self) -> bool {
        self.connections.values().any(|(_, flow)| flow.is_waiting())
            || self.forwards.values().any(|forward| forward.postponed)
    }
}

fn family_of(address: SocketAddr) -> AddressFamily {
    match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    }
}

fn new_socket(
    address: SocketAddr,
    kind: SocketType,
    protocol: Option<rustix::net::Protocol>,
) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(family_of(address), kind, flags, protocol)
}

/// What an error of the host's sockets means to a guest.
fn meaning(error: Errno) -> Unreachable {
    match error {
        Errno::CONNREFUSED => Unreachable::Port,
        Errno::ACCESS | Errno::PERM => Unreachable::Prohibited,
        _ => Unreachable::Host,
    }
}

impl Switch {
    /// A packet of a guest's to the gateway, or through it.
    pub(crate) fn translate(&mut self, number: u8, packet: &Packet<'_>) {
        match packet.protocol {
            protocol::TCP => self.take_segment(number, packet),
            protocol::UDP => {
                if let Some(datagram) = Datagram::parse(packet.payload) {
                    self.take_datagram(number, packet, &datagram);
                }
            }
            _ => {
                if let Some(echo) = Echo::parse(packet) {
                    self.take_echo(number, packet, &echo);
                }
            }
        }
    }

    fn watch(&self, socket: &OwnedFd, source: Source, number: u64) -> bool {
        // Once for each change: what a socket's state is, flows remember.
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&self.poll, socket, source.data(number), flags).is_ok()
    }

    /// Tells a guest that its packet was not delivered.
    fn refuse(&mut self, number: u8, packet: &Packet<'_>, why: Unreachable) {
        let Some(guest) = self.ports.get(&number).map(|port| port.addresses) else {
            return;
        };
        let from = if packet.source.is_ipv4() {
            crate::config::GATEWAY.into()
        } else {
            crate::config::GATEWAY_V6.into()
        };
        let link = gateway::link_to(&guest);
        let frame = wire::unreachable_frame(link, from, packet, why);
        self.reply(number, Some(frame));
    }

    /// The same for a packet that is not there any more: `start` is what its payload began with.
    fn refuse_later(&mut self, key: &Key, start: &[u8], why: Unreachable) {
        let Some(guest) = self.ports.get(&key.port).map(|port| port.addresses) else {
            return;
        };
        let mut frame = Vec::new();
        let ends = (key.guest.ip(), key.remote.ip());
        wire::put_headers(
            &mut frame,
            gateway::link_to(&guest),
            ends,
            key.protocol,
            start.len(),
        );
        frame.extend(start);
        if let Some(packet) = Packet::parse(&frame[wire::ETHERNET_HEADER..]) {
            self.refuse(key.port, &packet, why);
        }
    }

    /// The host's name server to ask.
    fn resolver(&self) -> Option<SocketAddr> {
        let servers = &self.config.resolvers;
        servers
            .get(self.nat.resolver % servers.len().max(1))
            .copied()
    }
}
