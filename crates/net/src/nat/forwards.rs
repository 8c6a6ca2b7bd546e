//! Ports of the host that lead to guests.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{
    RecvFlags, SocketFlags, SocketType, accept_with, bind, getpeername, listen, recvfrom, sockopt,
};

use super::datagrams::Exchange;
use super::{Key, MAX_CONNECTIONS, Source, new_socket};
use crate::config::{GATEWAY, GATEWAY_V6, is_inside};
use crate::protocol::{Forward, Protocol};
use crate::switch::Switch;
use crate::tcp::Flow;
use crate::wire::protocol;

/// Forwards that a machine may have.
const MAX_FORWARDS: usize = 256;
/// Connections that may wait to be taken, at most: the host's own limit is net.core.somaxconn.
const BACKLOG: i32 = 4096;
/// Connections or datagrams taken before others have their turn.
const BATCH: usize = 64;

/// An open forward.
#[derive(Debug)]
pub(super) struct Forwarding {
    pub(super) port: u8,
    pub(super) socket: OwnedFd,
    protocol: Protocol,
    guest: SocketAddr,
    /// There is more to take, later.
    pub(super) postponed: bool,
}

impl Switch {
    /// Opens all of `forwards`, or none and says why.
    pub(crate) fn open_forwards(&mut self, number: u8, forwards: &[Forward]) -> Result<(), String> {
        if forwards.len() > MAX_FORWARDS {
            return Err(format!(
                "more than {MAX_FORWARDS} ports are to be forwarded"
            ));
        }
        let Some(guest) = self.ports.get(&number).map(|port| port.addresses) else {
            return Ok(());
        };
        let mut opened = Vec::new();
        for forward in forwards {
            let address: IpAddr = match forward.host {
                SocketAddr::V4(_) => guest.ipv4.into(),
                SocketAddr::V6(_) => guest.ipv6.into(),
            };
            let socket = listen_on(forward).map_err(|error| {
                let error = std::io::Error::from(error);
                format!("port {} of this host cannot be used: {error}", forward.host)
            })?;
            opened.push(Forwarding {
                port: number,
                socket,
                protocol: forward.protocol,
                guest: (address, forward.guest).into(),
                postponed: false,
            });
        }
        for forwarding in opened {
            let id = self.nat.next();
            if !self.watch(&forwarding.socket, Source::Forward, id) {
                return Err("this host has no room for more sockets".to_owned());
            }
            self.nat.forwards.insert(id, forwarding);
        }
        Ok(())
    }

    /// Somebody has come to a forward.
    pub(crate) fn forward_ready(&mut self, id: u64, buffer: &mut [u8]) {
        let Some(forwarding) = self.nat.forwards.get_mut(&id) else {
            return;
        };
        forwarding.postponed = false;
        match forwarding.protocol {
            Protocol::Tcp => self.accept(id),
            Protocol::Udp => self.take_clients(id, buffer),
        }
    }

    fn postpone(&mut self, id: u64) {
        if let Some(forwarding) = self.nat.forwards.get_mut(&id) {
            forwarding.postponed = true;
        }
    }

    /// Goes on with forwards that had more than there was room for.
    pub(crate) fn tick_forwards(&mut self, buffer: &mut [u8]) {
        let postponed = self.nat.forwards.iter().filter(|(_, f)| f.postponed);
        let postponed: Vec<u64> = postponed.map(|(id, _)| *id).collect();
        for id in postponed {
            self.forward_ready(id, buffer);
        }
    }

    fn accept(&mut self, id: u64) {
        for _ in 0..BATCH {
            let Some(Forwarding {
                port,
                socket,
                guest,
                ..
            }) = self.nat.forwards.get(&id)
            else {
                return;
            };
            let (number, guest) = (*port, *guest);
            let full = self
                .ports
                .get(&number)
                .is_none_or(|p| p.connections >= MAX_CONNECTIONS);
            if full {
                break;
            }
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match accept_with(socket, flags) {
                Ok(client) => self.begin(number, guest, client),
                Err(Errno::AGAIN) => return,
                // A client that has gone already.
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(_) => break,
            }
        }
        self.postpone(id);
    }

    /// Connects a client to the guest.
    fn begin(&mut self, number: u8, guest: SocketAddr, client: OwnedFd) {
        let _ = sockopt::set_tcp_nodelay(&client, true);
        let peer = getpeername(&client).ok().flatten();
        let Some(peer) = peer.and_then(|peer| SocketAddr::try_from(peer).ok()) else {
            return;
        };
        let Some(key) = self.client_key(number, protocol::TCP, guest, peer) else {
            return;
        };
        let Some(path) = self.path(&key) else {
            return;
        };
        let initial = self.nat.initial_sequence(&key, self.now);
        let flow = Flow::accepted(path, client, initial, self.now);
        let Some(id) = self.insert(key, flow) else {
            return;
        };
        if let (Some((_, flow)), Some(port)) = (
            self.nat.connections.get_mut(&id),
            self.ports.get_mut(&number),
        ) {
            let verdict = flow.begin(port, self.now);
            self.settle(id, verdict);
        }
    }

    /// A key for a client: its own address if the guest can answer there, else the gateway's,
    /// with a port that is free.
    fn client_key(
        &self,
        number: u8,
        protocol: u8,
        guest: SocketAddr,
        client: SocketAddr,
    ) -> Option<Key> {
        let gateway: IpAddr = if guest.is_ipv4() {
            GATEWAY.into()
        } else {
            GATEWAY_V6.into()
        };
        let address = client.ip();
        let hidden = address.is_loopback() || is_inside(address) || is_link_local(address);
        let seen = if hidden { gateway } else { address };
        let key = |remote: SocketAddr| Key {
            port: number,
            protocol,
            guest,
            remote,
        };
        let own = (seen, client.port()).into();
        if !self.nat.keys.contains_key(&key(own)) {
            return Some(key(own));
        }
        let others = (1024..=u16::MAX)
            .rev()
            .map(|port| key((gateway, port).into()));
        others
            .into_iter()
            .find(|key| !self.nat.keys.contains_key(key))
    }

    fn take_clients(&mut self, id: u64, buffer: &mut [u8]) {
        for _ in 0..BATCH {
            let Some(Forwarding {
                port,
                socket,
                guest,
                ..
            }) = self.nat.forwards.get(&id)
            else {
                return;
            };
            let (number, guest) = (*port, *guest);
            match recvfrom(socket, &mut *buffer, RecvFlags::DONTWAIT) {
                Ok((_, length, from)) => {
                    let client = from.and_then(|from| SocketAddr::try_from(from).ok());
                    let payload = &buffer[..length.min(buffer.len())];
                    if let Some(client) = client {
                        self.take_client(id, number, guest, client, payload);
                    }
                }
                Err(Errno::AGAIN) => return,
                // Errors of earlier datagrams among them.
                Err(_) => {}
            }
        }
        self.postpone(id);
    }

    fn take_client(
        &mut self,
        forward: u64,
        number: u8,
        guest: SocketAddr,
        client: SocketAddr,
        payload: &[u8],
    ) {
        let mut known = self.nat.exchanges.values_mut();
        let key = if let Some(exchange) = known.find(|exchange| exchange.is_of(forward, client)) {
            exchange.touch(self.now);
            exchange.key
        } else {
            let key = self.client_key(number, protocol::UDP, guest, client);
            let Some(key) = key.filter(|_| self.has_room(number)) else {
                return;
            };
            let id = self.nat.next();
            self.keep_exchange(id, Exchange::forwarded(key, forward, client, self.now));
            key
        };
        self.send_to_guest(&key, payload);
    }
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.segments()[0] & 0xffc0 == 0xfe80,
    }
}

/// Takes the port of the host that a forward is for, so that nobody else does.
pub fn listen_on(forward: &Forward) -> Result<OwnedFd, Errno> {
    let kind = match forward.protocol {
        Protocol::Tcp => SocketType::STREAM,
        Protocol::Udp => SocketType::DGRAM,
    };
    let socket = new_socket(forward.host, kind, None)?;
    if forward.host.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    if forward.protocol == Protocol::Tcp {
        // A port whose last connections are still in TIME-WAIT is free.
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    bind(&socket, &forward.host)?;
    if forward.protocol == Protocol::Tcp {
        listen(&socket, BACKLOG)?;
    }
    Ok(socket)
}
