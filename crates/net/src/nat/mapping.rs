//! Which port of the host's a guest's datagrams come from: one for each of its own ports, whoever
//! they go to (endpoint-independent mapping, RFC 4787 REQ-1), so that others can be told of it.
//!
//! The sockets of all exchanges from one port of a guest's are bound to that one, which the kernel
//! lets sockets of one user do that have SO_REUSEPORT. It gives a datagram to the one that is
//! connected to its sender, and to none if nobody is.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use rustix::io::Errno;
use rustix::net::{bind, getsockname, sockopt};

use super::Key;

/// A port of the host's, which is a guest's for as long as an exchange holds it.
#[derive(Debug)]
pub(super) struct Mapping {
    port: u16,
}

/// The ports of the host's by those of guests.
#[derive(Debug, Default)]
pub(super) struct Mappings {
    ports: HashMap<(u8, SocketAddr), Weak<Mapping>>,
}

impl Mappings {
    /// Binds `socket` to the port of the host's that is the guest's end of `key`, a new one if it
    /// has none yet.
    pub(super) fn share(&mut self, socket: &OwnedFd, key: &Key) -> Result<Arc<Mapping>, Errno> {
        let any: IpAddr = if key.guest.is_ipv4() {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            Ipv6Addr::UNSPECIFIED.into()
        };
        if any.is_ipv6() {
            sockopt::set_ipv6_v6only(socket, true)?;
        }
        let end = (key.port, key.guest);
        if let Some(mapping) = self.ports.get(&end).and_then(Weak::upgrade) {
            sockopt::set_socket_reuseport(socket, true)?;
            bind(socket, &SocketAddr::new(any, mapping.port))?;
            return Ok(mapping);
        }
        // The option comes after: with it the kernel would give out a port that has others already.
        bind(socket, &SocketAddr::new(any, 0))?;
        sockopt::set_socket_reuseport(socket, true)?;
        let local = SocketAddr::try_from(getsockname(socket)?)?;
        let mapping = Arc::new(Mapping { port: local.port() });
        self.ports.retain(|_, mapping| mapping.strong_count() > 0);
        self.ports.insert(end, Arc::downgrade(&mapping));
        Ok(mapping)
    }
}
