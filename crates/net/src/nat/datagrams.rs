//! UDP and ICMP echo through the NAT. An exchange is a pair of ends; each has a socket of its own
//! that is connected, so nobody but the one who was asked can answer (RFC 4787's address and
//! port-dependent filtering). Exchanges through a port forward share the forward's socket. What
//! else a guest sends from one port comes from one port of the host's: see `mapping`.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketType, connect, ipproto, recv, send, sendto};

use super::mapping::Mapping;
use super::{Key, MAX_EXCHANGES, Source, meaning, new_socket};
use crate::dns::Question;
use crate::gateway::{self, Echo};
use crate::policy::{DNS_PORT, Route, route};
use crate::switch::Switch;
use crate::wire::{self, Datagram, Packet, Unreachable, protocol};

/// For how long an exchange may be silent (RFC 4787, REQ-5), and one that asks for a name.
const IDLE: Duration = Duration::from_mins(2);
const IDLE_QUESTION: Duration = Duration::from_secs(15);
/// Datagrams taken from a socket before others have their turn.
const BATCH: usize = 64;

/// Datagrams between a guest and one remote end.
#[derive(Debug)]
pub(super) struct Exchange {
    pub(super) key: Key,
    kind: Kind,
    last_use: Instant,
    answered: bool,
    /// The host's port, for as long as an exchange uses it.
    mapping: Option<Arc<Mapping>>,
}

#[derive(Debug)]
enum Kind {
    Udp(OwnedFd),
    /// A question to the host's name server.
    Question(OwnedFd),
    Echo(OwnedFd),
    /// Through a port forward: its number, and who has sent.
    Forwarded(u64, SocketAddr),
}

impl Exchange {
    fn new(key: Key, kind: Kind, now: Instant) -> Self {
        Self {
            key,
            kind,
            last_use: now,
            answered: false,
            mapping: None,
        }
    }

    /// An exchange that a client has begun.
    pub(super) fn forwarded(key: Key, forward: u64, client: SocketAddr, now: Instant) -> Self {
        Self::new(key, Kind::Forwarded(forward, client), now)
    }

    pub(super) fn is_of(&self, forward: u64, client: SocketAddr) -> bool {
        matches!(self.kind, Kind::Forwarded(f, c) if f == forward && c == client)
    }

    pub(super) fn touch(&mut self, now: Instant) {
        self.last_use = now;
    }

    fn socket(&self) -> Option<&OwnedFd> {
        match &self.kind {
            Kind::Udp(socket) | Kind::Question(socket) | Kind::Echo(socket) => Some(socket),
            Kind::Forwarded(..) => None,
        }
    }

    fn is_over(&self, now: Instant) -> bool {
        let idle = if matches!(self.kind, Kind::Question(_)) {
            IDLE_QUESTION
        } else {
            IDLE
        };
        now.duration_since(self.last_use) > idle
    }
}

/// Drops what came to a socket of a shared port before it was connected, from anybody.
fn drop_unasked(socket: &OwnedFd) {
    while recv(socket, &mut [0_u8; 1][..], RecvFlags::DONTWAIT).is_ok() {}
}

impl Switch {
    /// A UDP datagram of a guest's.
    pub(super) fn take_datagram(
        &mut self,
        number: u8,
        packet: &Packet<'_>,
        datagram: &Datagram<'_>,
    ) {
        let key = Key {
            port: number,
            protocol: protocol::UDP,
            guest: (packet.source, datagram.source).into(),
            remote: (packet.destination, datagram.destination).into(),
        };
        let id = match self.nat.keys.get(&key) {
            Some(id) => *id,
            None => match route(&self.config, key.remote) {
                Route::Host(target) => match self.exchange(key, target, Kind::Udp) {
                    Ok(id) => id,
                    Err(error) => return self.refuse(number, packet, meaning(error)),
                },
                Route::Resolver => match self.ask(key, datagram.payload) {
                    Some(id) => id,
                    None => return,
                },
                Route::Refused => return self.refuse(number, packet, Unreachable::Port),
                Route::Unreachable(why) => return self.refuse(number, packet, why),
            },
        };
        let sent = self.send_datagram(id, datagram.payload);
        if let Err(error) = sent {
            self.refuse(number, packet, meaning(error));
        }
    }

    /// The answer to a question for a guest's name; `None` if it is for others to answer.
    pub(super) fn own_answer(&self, message: &[u8]) -> Option<Vec<u8>> {
        let question = Question::parse(message)?;
        match question.guest().and_then(|name| self.find(name)) {
            Some(guest) => Some(question.answer(guest.ipv4, guest.ipv6)),
            None => question.is_inside().then(|| question.no_such_name()),
        }
    }

    /// A question for a name: answered here if it is for a guest's, else to be sent on.
    fn ask(&mut self, key: Key, message: &[u8]) -> Option<u64> {
        if let Some(answer) = self.own_answer(message) {
            self.send_to_guest(&key, &answer);
            return None;
        }
        if self.config.isolated {
            return None;
        }
        let server = self.resolver()?;
        self.exchange(key, server, Kind::Question).ok()
    }

    /// A question for a name that came to the name server of a bridge.
    pub(crate) fn take_question(&mut self, number: u8, ends: [SocketAddr; 2], message: &[u8]) {
        let [guest, remote] = ends;
        let key = Key {
            port: number,
            protocol: protocol::UDP,
            guest,
            remote,
        };
        let known = self.nat.keys.get(&key).copied();
        if let Some(id) = known.or_else(|| self.ask(key, message)) {
            // Whoever hears nothing asks again.
            let _ = self.send_datagram(id, message);
        }
    }

    pub(super) fn send_to_guest(&mut self, key: &Key, payload: &[u8]) {
        if let Some(services) = &self.services {
            return services.answer(key.guest, payload);
        }
        let Some(guest) = self.ports.get(&key.port).map(|port| port.addresses) else {
            return;
        };
        let link = gateway::link_to(&guest);
        let frame = wire::udp_frame(link, key.remote, key.guest, payload);
        self.reply(key.port, Some(frame));
    }

    /// Opens an exchange with `target`.
    fn exchange(
        &mut self,
        key: Key,
        target: SocketAddr,
        kind: fn(OwnedFd) -> Kind,
    ) -> Result<u64, Errno> {
        let protocol = match (key.protocol, target) {
            (protocol::UDP, _) => None,
            (_, SocketAddr::V4(_)) => Some(ipproto::ICMP),
            (_, SocketAddr::V6(_)) => Some(ipproto::ICMPV6),
        };
        if !self.has_room(key.port) {
            return Err(Errno::NOBUFS);
        }
        let mut exchange = Exchange::new(
            key,
            kind(new_socket(target, SocketType::DGRAM, protocol)?),
            self.now,
        );
        exchange.mapping = match &exchange.kind {
            Kind::Udp(socket) => Some(self.nat.mappings.share(socket, &key)?),
            _ => None,
        };
        let id = self.nat.next();
        if let Some(socket) = exchange.socket() {
            connect(socket, &target)?;
            drop_unasked(socket);
            if !self.watch(socket, Source::Exchange, id) {
                return Err(Errno::NOBUFS);
            }
        }
        self.keep_exchange(id, exchange);
        Ok(id)
    }

    /// Whether the guest may begin another exchange. The oldest of too many ends.
    pub(super) fn has_room(&mut self, number: u8) -> bool {
        let Some(port) = self.ports.get(&number) else {
            return false;
        };
        if port.exchanges < MAX_EXCHANGES {
            return true;
        }
        let own = |exchange: &Exchange| exchange.key.port == number;
        let all = self.nat.exchanges.iter().filter(|(_, e)| own(e));
        let oldest = all.min_by_key(|(_, e)| e.last_use).map(|(id, _)| *id);
        oldest.is_some_and(|id| self.remove_exchange(id))
    }

    pub(super) fn keep_exchange(&mut self, id: u64, exchange: Exchange) {
        if let Some(port) = self.ports.get_mut(&exchange.key.port) {
            port.exchanges += 1;
        }
        self.nat.keys.insert(exchange.key, id);
        self.nat.exchanges.insert(id, exchange);
    }

    fn remove_exchange(&mut self, id: u64) -> bool {
        let Some(exchange) = self.nat.exchanges.remove(&id) else {
            return false;
        };
        self.nat.keys.remove(&exchange.key);
        if let Some(port) = self.ports.get_mut(&exchange.key.port) {
            port.exchanges -= 1;
        }
        true
    }

    fn send_datagram(&mut self, id: u64, payload: &[u8]) -> Result<(), Errno> {
        let Some(exchange) = self.nat.exchanges.get_mut(&id) else {
            return Ok(());
        };
        exchange.touch(self.now);
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let sent = match &exchange.kind {
            Kind::Udp(socket) | Kind::Question(socket) | Kind::Echo(socket) => {
                send(socket, payload, flags)
            }
            Kind::Forwarded(forward, client) => match self.nat.forwards.get(forward) {
                Some(forward) => sendto(&forward.socket, payload, flags, client),
                None => return Ok(()),
            },
        };
        match sent {
            // Datagrams may be lost; one that is refused tells of an earlier one.
            Ok(_) | Err(Errno::AGAIN | Errno::NOBUFS | Errno::INTR | Errno::CONNREFUSED) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// An echo request of a guest's.
    pub(super) fn take_echo(&mut self, number: u8, packet: &Packet<'_>, echo: &Echo<'_>) {
        let Some(guest) = self.ports.get(&number).map(|port| port.addresses) else {
            return;
        };
        if crate::config::is_gateway(packet.destination) {
            let link = gateway::link_to(&guest);
            let reply = echo.reply(link, packet.destination, packet.source);
            return self.reply(number, Some(reply));
        }
        let key = Key {
            port: number,
            protocol: packet.protocol,
            guest: (packet.source, echo.identifier).into(),
            remote: (packet.destination, 0).into(),
        };
        let id = match self.nat.keys.get(&key) {
            Some(id) => *id,
            None => match route(&self.config, key.remote) {
                // The kernel lets users of net.ipv4.ping_group_range do this.
                Route::Host(target) => match self.exchange(key, target, Kind::Echo) {
                    Ok(id) => id,
                    Err(error) => return self.refuse(number, packet, meaning(error)),
                },
                Route::Unreachable(why) => return self.refuse(number, packet, why),
                Route::Resolver | Route::Refused => return,
            },
        };
        // The kernel puts its own identifier in.
        if let Err(error) = self.send_datagram(id, &echo.request(packet.source.is_ipv6())) {
            self.refuse(number, packet, meaning(error));
        }
    }

    /// Something came for an exchange.
    pub(crate) fn exchange_ready(&mut self, id: u64, buffer: &mut [u8]) {
        for _ in 0..BATCH {
            let Some(exchange) = self.nat.exchanges.get_mut(&id) else {
                return;
            };
            let key = exchange.key;
            let Some(socket) = exchange.socket() else {
                return;
            };
            match recv(socket, &mut *buffer, RecvFlags::DONTWAIT) {
                Ok((_, length)) => {
                    exchange.last_use = self.now;
                    exchange.answered = true;
                    let message = &buffer[..length.min(buffer.len())];
                    match exchange.kind {
                        Kind::Echo(_) => self.send_echo(&key, message),
                        _ => self.send_to_guest(&key, message),
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(error) => {
                    if matches!(exchange.kind, Kind::Question(_)) {
                        self.nat.resolver = self.nat.resolver.wrapping_add(1);
                    }
                    // What its sender looks at: ports, or type and identifier.
                    let mut start = Vec::new();
                    start.extend(key.guest.port().to_be_bytes());
                    start.extend(key.remote.port().to_be_bytes());
                    start.extend([0, 8, 0, 0]);
                    if key.protocol == protocol::UDP {
                        self.refuse_later(&key, &start, meaning(error));
                    }
                    self.remove_exchange(id);
                    return;
                }
            }
        }
        // More may be there, of which no event tells again: the next round reads on.
        self.nat.unread.push(id);
    }

    /// Reads on where more was there than was taken at once.
    pub(crate) fn read_on(&mut self, buffer: &mut [u8]) {
        for id in std::mem::take(&mut self.nat.unread) {
            self.exchange_ready(id, buffer);
        }
    }

    fn send_echo(&mut self, key: &Key, message: &[u8]) {
        let v6 = key.guest.is_ipv6();
        let Some(guest) = self.ports.get(&key.port).map(|port| port.addresses) else {
            return;
        };
        let Some(rest) = message
            .get(6..)
            .filter(|_| gateway::is_echo_reply(message, v6))
        else {
            return;
        };
        let echo = Echo {
            identifier: key.guest.port(),
            rest,
        };
        let link = gateway::link_to(&guest);
        let frame = echo.reply(link, key.remote.ip(), key.guest.ip());
        self.reply(key.port, Some(frame));
    }

    /// Ends exchanges that are silent.
    pub(crate) fn tick_exchanges(&mut self) {
        let over = self
            .nat
            .exchanges
            .iter()
            .filter(|(_, e)| e.is_over(self.now));
        let over: Vec<u64> = over.map(|(id, _)| *id).collect();
        for id in over {
            let exchange = self.nat.exchanges.get(&id);
            let unanswered =
                exchange.is_some_and(|e| !e.answered && e.key.remote.port() == DNS_PORT);
            if unanswered {
                self.nat.resolver = self.nat.resolver.wrapping_add(1);
            }
            self.remove_exchange(id);
        }
    }
}
