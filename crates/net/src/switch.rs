//! The switch: which frame of which port goes where. The event loop ([`Switch::run`]) is in
//! `run`, the NAT in `nat`.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::Ipv6Addr;
use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::event::epoll;

use crate::bridge::Services;
use crate::config::{
    Addresses, Config, FIRST_GUEST, GATEWAY_LINK, GATEWAY_MAC, LAST_GUEST, is_gateway, is_inside,
};
use crate::fragments::{Fragment, Whole};
use crate::gateway::{self, Arp};
use crate::nat::Nat;
use crate::offload::{Gso, Header, Offloads};
use crate::port::Port;
use crate::protocol::Hello;
use crate::wire::{Frame, Packet, ethertype, ipv6_at, protocol, u16_at, u32_at};
use crate::{dns, policy};

/// IPv6 addresses that a guest may use at once.
const MAX_CLAIMS: usize = 16;

/// A network's switch and gateway.
///
/// Made with all that it needs of the host's files; after that it makes sockets only.
#[derive(Debug)]
pub struct Switch {
    pub(crate) config: Config,
    pub(crate) poll: OwnedFd,
    /// By the last byte of their addresses.
    pub(crate) ports: BTreeMap<u8, Port>,
    pub(crate) nat: Nat,
    /// Who uses which IPv6 address.
    owners: HashMap<Ipv6Addr, u8>,
    pub(crate) door: Option<Door>,
    /// What it is to the guests of a bridge, whose frames it does not see.
    pub(crate) services: Option<Services>,
    /// Who tells of changes of the host's name servers.
    pub(crate) resolvers: Option<OwnedFd>,
    pub(crate) now: Instant,
}

/// Where further machines come in.
#[derive(Debug)]
pub(crate) struct Door {
    pub(crate) listener: OwnedFd,
    /// Held locked by a machine on its way in.
    pub(crate) lock: OwnedFd,
}

/// Where a frame goes.
enum Target {
    Gateway,
    /// The gateway and everybody else.
    All,
    Port(u8),
}

impl Switch {
    /// A network without machines.
    pub fn new(mut config: Config) -> io::Result<Self> {
        config.ipv6 = config.ipv6 || !config.isolated && policy::has_ipv6();
        Ok(Self {
            config,
            poll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            ports: BTreeMap::new(),
            nat: Nat::default(),
            owners: HashMap::new(),
            door: None,
            services: None,
            resolvers: None,
            now: Instant::now(),
        })
    }

    /// A number for a new port, if one is free.
    pub(crate) fn free_number(&self) -> Option<u8> {
        (FIRST_GUEST..=LAST_GUEST).find(|number| !self.ports.contains_key(number))
    }

    /// Takes the first message of a port. Returns why the machine may not join.
    pub(crate) fn admit(&mut self, number: u8, message: &[u8]) -> Result<Addresses, String> {
        let hello: Hello = serde_json::from_slice(message).map_err(|e| e.to_string())?;
        if let Some(name) = &hello.name {
            if !dns::is_host_name(name) {
                return Err(format!(
                    "'{name}' is no host name: a-z, 0-9 and inner hyphens"
                ));
            }
            if self
                .ports
                .values()
                .any(|port| port.name.as_ref() == Some(name))
            {
                return Err(format!("there is a machine named '{name}' already"));
            }
        }
        self.open_forwards(number, &hello.forwards)?;
        let port = self.ports.get_mut(&number).ok_or("the port is gone")?;
        port.joined = true;
        port.name = hello.name;
        Ok(port.addresses)
    }

    /// A message of a machine that has joined.
    pub(crate) fn receive(&mut self, number: u8, message: &[u8]) {
        let Some(port) = self.ports.get_mut(&number) else {
            return;
        };
        if let Ok(offloads) = <[u8; Offloads::MESSAGE_SIZE]>::try_from(message) {
            port.offloads = Offloads::parse(offloads);
            return;
        }
        let parsed = Header::split(message)
            .and_then(|(header, bytes)| Some((header, bytes, Frame::parse(bytes)?)));
        let Some((header, bytes, frame)) = parsed else {
            port.complain("a frame that is none");
            return;
        };
        if !self.is_honest(number, &frame) {
            if let Some(port) = self.ports.get_mut(&number) {
                port.complain("a frame with an address that is not the guest's own");
            }
            return;
        }
        match self.target(number, &frame) {
            Some(Target::Gateway) => self.serve(number, &frame, true),
            Some(Target::All) => {
                self.serve(number, &frame, false);
                let others: Vec<u8> = self
                    .ports
                    .keys()
                    .copied()
                    .filter(|n| *n != number)
                    .collect();
                for other in others {
                    self.forward(other, header, bytes);
                }
            }
            Some(Target::Port(other)) => self.forward(other, header, bytes),
            None => {}
        }
    }

    /// Whether a frame's addresses are those of the guest that sent it.
    fn is_honest(&mut self, number: u8, frame: &Frame<'_>) -> bool {
        let Some(own) = self.ports.get(&number).map(|port| port.addresses) else {
            return false;
        };
        if frame.source != own.mac {
            return false;
        }
        let packet = frame.payload;
        match frame.ethertype {
            ethertype::ARP => Arp::parse(packet).is_some_and(|arp| {
                let (mac, ip) = arp.sender;
                // Whoever has no address yet asks for nobody's but its own (RFC 5227).
                let probes = ip.is_unspecified() && arp.target == own.ipv4;
                mac == own.mac.0 && (ip == own.ipv4 || probes)
            }),
            ethertype::IPV4 => {
                // A fragment says so too, if it is the first.
                let start = |packet| match Fragment::parse(packet) {
                    Some(fragment) if fragment.offset == 0 => {
                        Some((fragment.protocol(), fragment.payload))
                    }
                    Some(_) => None,
                    None => Packet::parse(packet).map(|p| (p.protocol, p.payload)),
                };
                let from_server = start(packet).is_some_and(|(protocol, payload)| {
                    protocol == protocol::UDP && u16_at(payload, 0) == Some(gateway::DHCP_SERVER)
                });
                let source = u32_at(packet, 12);
                let asks = || {
                    source == Some(0)
                        && Packet::parse(packet)
                            .is_some_and(|p| gateway::asks_for_address(frame, &p))
                };
                !from_server && (source == Some(own.ipv4.to_bits()) || asks())
            }
            ethertype::IPV6 => {
                let Some(source) = ipv6_at(packet, 8) else {
                    return false;
                };
                let behind = Packet::parse(packet).and_then(Packet::behind_extensions);
                let Some((inner, is_fragment)) = behind else {
                    return false;
                };
                if gateway::is_routers(&inner)
                    || gateway::is_dhcpv6_servers(&inner)
                    || is_fragment && gateway::is_discovery(&inner)
                {
                    return false;
                }
                let about = gateway::advertised(&inner).or_else(|| gateway::probed(&inner));
                let may_send = if source.is_unspecified() {
                    inner.protocol == protocol::ICMPV6
                } else {
                    self.claim(number, source)
                };
                may_send && about.is_none_or(|address| self.claim(number, address))
            }
            _ => false,
        }
    }

    /// Whether the guest may use this IPv6 address: nobody else does, and it lies in the network.
    fn claim(&mut self, number: u8, address: Ipv6Addr) -> bool {
        if let Some(owner) = self.owners.get(&address) {
            return *owner == number;
        }
        let link_local = address.segments()[0] & 0xffc0 == 0xfe80;
        let inside = link_local || is_inside(address.into());
        let made_by = |n: u8| {
            let Addresses { mac, ipv6, .. } = Addresses::of(n);
            address == ipv6 || address == mac.address_in(GATEWAY_LINK)
        };
        let anothers = (FIRST_GUEST..=LAST_GUEST).any(|n| n != number && made_by(n));
        let Some(port) = self.ports.get_mut(&number) else {
            return false;
        };
        if !inside || is_gateway(address.into()) || anothers || port.claims >= MAX_CLAIMS {
            return false;
        }
        port.claims += 1;
        self.owners.insert(address, number);
        true
    }

    fn target(&self, number: u8, frame: &Frame<'_>) -> Option<Target> {
        let to = frame.destination;
        if to == GATEWAY_MAC {
            return Some(Target::Gateway);
        }
        if to.is_group() {
            return Some(Target::All);
        }
        let mut ports = self.ports.iter();
        let (other, _) = ports.find(|(n, port)| **n != number && port.addresses.mac == to)?;
        Some(Target::Port(*other))
    }

    /// Passes a frame on to another guest.
    fn forward(&mut self, number: u8, header: Header, frame: &[u8]) {
        let Some(port) = self.ports.get_mut(&number).filter(|port| port.joined) else {
            return;
        };
        let takes = match header.gso {
            Gso::None => true,
            Gso::TcpV4 => port.offloads.tso4,
            Gso::TcpV6 => port.offloads.tso6,
        };
        if !takes {
            return;
        }
        if header.needs_checksum && !port.offloads.checksum {
            if let Some(finished) = header.finish_checksum(frame) {
                port.deliver(Header::default(), &finished);
            }
            return;
        }
        port.deliver(header, frame);
    }

    /// A frame for the gateway; if not `unicast`, one for everybody.
    fn serve(&mut self, number: u8, frame: &Frame<'_>, unicast: bool) {
        let Some(guest) = self.ports.get(&number).map(|port| port.addresses) else {
            return;
        };
        if frame.ethertype == ethertype::ARP {
            let reply = Arp::parse(frame.payload).and_then(|arp| arp.answer(&guest));
            return self.reply(number, reply);
        }
        if let Some(fragment) = Fragment::parse(frame.payload) {
            if unicast {
                self.gather(number, &fragment);
            }
            return;
        }
        let Some(packet) = Packet::parse(frame.payload) else {
            return;
        };
        if gateway::asks_for_address(frame, &packet) {
            let datagram = crate::wire::Datagram::parse(packet.payload);
            let reply = datagram.and_then(|d| gateway::serve_dhcp(&d, &guest));
            return self.reply(number, reply);
        }
        if let Some(reply) = gateway::discover(&packet, &guest, self.config.ipv6) {
            return self.reply(number, Some(reply));
        }
        if unicast && !packet.source.is_unspecified() {
            self.translate(number, &packet);
        }
    }

    /// A fragment for the gateway; what it makes whole goes on as a packet would.
    fn gather(&mut self, number: u8, fragment: &Fragment<'_>) {
        let Some(port) = self.ports.get_mut(&number) else {
            return;
        };
        let whole = port.fragments.take(fragment, self.now);
        if let Some(packet) = whole.as_ref().and_then(Whole::packet) {
            self.translate(number, &packet);
        }
    }

    /// Sends a frame of the gateway's to a guest.
    pub(crate) fn reply(&mut self, number: u8, frame: Option<Vec<u8>>) {
        if self.services.is_some() {
            return;
        }
        if let (Some(frame), Some(port)) = (frame, self.ports.get_mut(&number)) {
            port.deliver(Header::default(), &frame);
        }
    }

    /// The addresses of the guest with this name.
    pub(crate) fn find(&self, name: &str) -> Option<Addresses> {
        let mut ports = self.ports.values();
        let port = ports.find(|port| port.name.as_deref() == Some(name))?;
        Some(port.addresses)
    }

    /// Forgets a port and all that belongs to it.
    pub(crate) fn remove_port(&mut self, number: u8) {
        self.ports.remove(&number);
        self.owners.retain(|_, owner| *owner != number);
        self.nat.remove_port(number);
    }
}
