//! What the switch is to the guests of a bridge: their DHCP server, their name server and who
//! tells them of the router, through sockets on the bridge. Everything else is the kernel's.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventFlags};
use rustix::net::{RecvFlags, SendFlags, SocketFlags, accept_with, getpeername, recvfrom, sendto};
use socket2::{Domain, Protocol, Socket, Type};

use super::host;
use crate::config::{Addresses, Subnet};
use crate::gateway;
use crate::nat::Source;
use crate::policy::DNS_PORT;
use crate::switch::Switch;

/// How often the router is told of without being asked for (RFC 4861 §6.2.1).
const ADVERTISED_EVERY: Duration = Duration::from_mins(3);
/// Connections that may wait to be taken.
const BACKLOG: i32 = 64;
/// Messages taken from a socket before others have their turn.
const BATCH: usize = 64;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);

/// The sockets on a bridge.
#[derive(Debug)]
pub(crate) struct Services {
    subnet: Subnet,
    dhcp: OwnedFd,
    names: OwnedFd,
    /// The same, for connections.
    names_tcp: OwnedFd,
    /// Where the host has IPv6: names, and what routers say.
    names_v6: Option<OwnedFd>,
    names_tcp_v6: Option<OwnedFd>,
    routers: Option<OwnedFd>,
    /// The host is a router for IPv6.
    routes_v6: bool,
    advertised: Option<Instant>,
}

/// The sockets, as events name them.
#[derive(Clone, Copy)]
enum Service {
    Dhcp,
    Names,
    NamesV6,
    NamesTcp,
    NamesTcpV6,
    Routers,
}

impl Service {
    const ALL: [Self; 6] = [
        Self::Dhcp,
        Self::Names,
        Self::NamesV6,
        Self::NamesTcp,
        Self::NamesTcpV6,
        Self::Routers,
    ];
}

/// A socket that hears what comes over `device`, and nothing else.
fn bound(device: &str, address: SocketAddr, kind: Type) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, None)?;
    socket.set_reuse_address(true)?;
    socket.bind_device(Some(device.as_bytes()))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

fn router(device: &str) -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
    socket.bind_device(Some(device.as_bytes()))?;
    let index = host::index(device)?;
    socket.set_multicast_if_v6(index)?;
    socket.set_multicast_hops_v6(255)?;
    socket.join_multicast_v6(&ALL_ROUTERS, index)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

impl Services {
    pub(super) fn open(device: &str, subnet: Subnet) -> io::Result<Self> {
        let any = (Ipv4Addr::UNSPECIFIED, gateway::DHCP_SERVER).into();
        let dhcp = bound(device, any, Type::DGRAM)?;
        dhcp.set_broadcast(true)?;
        let listening = |address| {
            let socket = bound(device, address, Type::STREAM)?;
            socket.listen(BACKLOG)?;
            Ok::<_, io::Error>(socket)
        };
        let server = (subnet.gateway(), DNS_PORT).into();
        let server_v6 = (subnet.gateway_v6(), DNS_PORT).into();
        let names = bound(device, server, Type::DGRAM)?;
        let names_tcp = listening(server)?;
        let v6 = host::has_ipv6();
        let names_v6 = v6.then(|| bound(device, server_v6, Type::DGRAM));
        let names_tcp_v6 = v6.then(|| listening(server_v6));
        let routers = v6.then(|| router(device));
        Ok(Self {
            subnet,
            dhcp: dhcp.into(),
            names: names.into(),
            names_tcp: names_tcp.into(),
            names_v6: names_v6.transpose()?.map(OwnedFd::from),
            names_tcp_v6: names_tcp_v6.transpose()?.map(OwnedFd::from),
            routers: routers.transpose()?.map(OwnedFd::from),
            routes_v6: host::forwards_ipv6(),
            advertised: None,
        })
    }

    fn socket(&self, service: Service) -> Option<&OwnedFd> {
        match service {
            Service::Dhcp => Some(&self.dhcp),
            Service::Names => Some(&self.names),
            Service::NamesV6 => self.names_v6.as_ref(),
            Service::NamesTcp => Some(&self.names_tcp),
            Service::NamesTcpV6 => self.names_tcp_v6.as_ref(),
            Service::Routers => self.routers.as_ref(),
        }
    }

    pub(super) fn watch(&self, poll: &OwnedFd) -> io::Result<()> {
        for service in Service::ALL {
            if let Some(socket) = self.socket(service) {
                let data = Source::Service.data(service as u64);
                epoll::add(poll, socket, data, EventFlags::IN)?;
            }
        }
        Ok(())
    }

    /// Sends a name server's answer to a guest.
    pub(crate) fn answer(&self, guest: SocketAddr, payload: &[u8]) {
        let socket = match guest {
            SocketAddr::V4(_) => Some(&self.names),
            SocketAddr::V6(_) => self.names_v6.as_ref(),
        };
        if let Some(socket) = socket {
            // Whoever hears nothing asks again.
            let _ = sendto(socket, payload, SendFlags::DONTWAIT, &guest);
        }
    }

    fn advertise(&mut self, ipv6: bool, now: Instant) {
        self.advertised = Some(now);
        if let Some(socket) = &self.routers {
            let router = ipv6 && self.routes_v6;
            let message = gateway::router_advertisement(self.subnet, router);
            let to = SocketAddr::from((ALL_NODES, 0));
            let _ = sendto(socket, &message, SendFlags::DONTWAIT, &to);
        }
    }
}

impl Switch {
    /// Something has come to a socket on the bridge.
    pub(crate) fn service_ready(&mut self, service: u64, buffer: &mut [u8]) {
        let Some(service) = Service::ALL.get(service as usize).copied() else {
            return;
        };
        for _ in 0..BATCH {
            let Some(services) = &mut self.services else {
                return;
            };
            let Some(socket) = services.socket(service) else {
                return;
            };
            if matches!(service, Service::NamesTcp | Service::NamesTcpV6) {
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                let Ok(socket) = accept_with(socket, flags) else {
                    return;
                };
                self.let_talk(socket);
                continue;
            }
            let Ok((_, length, from)) = recvfrom(socket, &mut *buffer, RecvFlags::DONTWAIT) else {
                return;
            };
            let message = &buffer[..length.min(buffer.len())];
            let from = from.and_then(|from| SocketAddr::try_from(from).ok());
            match service {
                Service::Dhcp => self.lease(message),
                Service::Routers if gateway::asks_for_router(message) => {
                    let ipv6 = self.config.ipv6;
                    services.advertise(ipv6, self.now);
                }
                Service::Routers | Service::NamesTcp | Service::NamesTcpV6 => {}
                Service::Names | Service::NamesV6 => {
                    if let Some(from) = from {
                        self.asked(from, message);
                    }
                }
            }
        }
    }

    /// A DHCP message: what a guest is told is its own by its number, which its Ethernet address
    /// ends in.
    fn lease(&mut self, message: &[u8]) {
        let Some(services) = &self.services else {
            return;
        };
        let Some(client) = gateway::dhcp_client(message) else {
            return;
        };
        let guest = self
            .ports
            .values()
            .find(|port| port.addresses.mac == client);
        let answer = guest.and_then(|port| {
            gateway::answer_dhcp(message, &port.addresses, services.subnet.gateway())
        });
        if let Some((to, reply)) = answer {
            let _ = sendto(&services.dhcp, &reply, SendFlags::DONTWAIT, &to);
        }
    }

    /// A question for a name.
    fn asked(&mut self, from: SocketAddr, message: &[u8]) {
        let subnet = self.config.subnet;
        let Some(number) = self.number_of(from.ip()) else {
            return;
        };
        let server: IpAddr = match from {
            SocketAddr::V4(_) => subnet.gateway().into(),
            SocketAddr::V6(_) => subnet.gateway_v6().into(),
        };
        self.take_question(number, [from, (server, DNS_PORT).into()], message);
    }

    /// A connection for names.
    fn let_talk(&mut self, socket: OwnedFd) {
        let from = getpeername(&socket).ok().flatten();
        let from = from.and_then(|from| SocketAddr::try_from(from).ok());
        if let Some(number) = from.and_then(|from| self.number_of(from.ip())) {
            // One too many is closed.
            let _ = self.begin_talk(number, socket);
        }
    }

    fn number_of(&self, address: IpAddr) -> Option<u8> {
        let is_its = |own: &Addresses| match address {
            IpAddr::V4(v4) => own.ipv4 == v4,
            IpAddr::V6(v6) => own.ipv6 == v6,
        };
        let mut ports = self.ports.iter();
        let (number, _) = ports.find(|(_, port)| is_its(&port.addresses))?;
        Some(*number)
    }

    /// Tells guests of the router from time to time.
    pub(crate) fn tick_services(&mut self) {
        let (ipv6, now) = (self.config.ipv6, self.now);
        if let Some(services) = &mut self.services {
            let due = |last: Instant| now.duration_since(last) >= ADVERTISED_EVERY;
            if services.advertised.is_none_or(due) {
                services.advertise(ipv6, now);
            }
        }
    }
}
