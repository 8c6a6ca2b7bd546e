//! What the gateway answers by itself: who has an address, ARP (RFC 826) and neighbour discovery
//! (RFC 4861); which address a guest is to take, DHCP (RFC 2131) and router advertisements;
//! whether it is alive, ICMP echo. Pure: a packet of one guest in, a frame for it out.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::config::{
    Addresses, DOMAIN, GATEWAY, GATEWAY_LINK, GATEWAY_MAC, MTU, Subnet, is_gateway,
};
use crate::wire::{
    self, Datagram, Frame, Link, MacAddress, Packet, ethertype, ipv6_at, protocol, u32_at,
};

/// How frames of the gateway's go to a guest.
pub(crate) fn link_to(guest: &Addresses) -> Link {
    Link {
        source: GATEWAY_MAC,
        destination: guest.mac,
    }
}

const ARP_REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];
const ARP_REPLY: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 2];

/// An ARP packet for Ethernet and IPv4.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arp<'a> {
    request: bool,
    /// Who says so: Ethernet and IPv4 address.
    pub(crate) sender: (&'a [u8], Ipv4Addr),
    pub(crate) target: Ipv4Addr,
}

impl<'a> Arp<'a> {
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let start = bytes.get(..8)?;
        (start == ARP_REQUEST || start == ARP_REPLY).then_some(())?;
        Some(Self {
            request: start == ARP_REQUEST,
            sender: (bytes.get(8..14)?, u32_at(bytes, 14)?.into()),
            target: u32_at(bytes, 24)?.into(),
        })
    }

    /// The answer, if the gateway is asked for.
    pub(crate) fn answer(&self, guest: &Addresses) -> Option<Vec<u8>> {
        if !self.request || self.target != GATEWAY {
            return None;
        }
        let mut frame = Vec::new();
        wire::put_ethernet(&mut frame, link_to(guest), ethertype::ARP);
        frame.extend(ARP_REPLY);
        frame.extend(GATEWAY_MAC.0);
        frame.extend(GATEWAY.octets());
        frame.extend(guest.mac.0);
        frame.extend(self.sender.1.octets());
        Some(frame)
    }
}

/// ICMP types.
mod icmp {
    pub(super) const ECHO_REPLY: u8 = 0;
    pub(super) const ECHO: u8 = 8;
    pub(super) const V6_ECHO: u8 = 128;
    pub(super) const V6_ECHO_REPLY: u8 = 129;
    pub(super) const ROUTER_SOLICITATION: u8 = 133;
    pub(super) const ROUTER_ADVERTISEMENT: u8 = 134;
    pub(super) const NEIGHBOUR_SOLICITATION: u8 = 135;
    pub(super) const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
    pub(super) const REDIRECT: u8 = 137;
}

/// An echo request: who it is from is in `identifier`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Echo<'a> {
    pub(crate) identifier: u16,
    /// Sequence number and data.
    pub(crate) rest: &'a [u8],
}

impl<'a> Echo<'a> {
    /// The echo request in an ICMP packet, if it is one.
    pub(crate) fn parse(packet: &Packet<'a>) -> Option<Self> {
        let kind = match packet.protocol {
            protocol::ICMP => icmp::ECHO,
            protocol::ICMPV6 => icmp::V6_ECHO,
            _ => return None,
        };
        if packet.payload.get(..2)? != [kind, 0] {
            return None;
        }
        Some(Self {
            identifier: wire::u16_at(packet.payload, 4)?,
            rest: packet.payload.get(6..)?,
        })
    }

    /// An ICMP message, without its checksum, as a socket for pings takes it.
    pub(crate) fn request(&self, v6: bool) -> Vec<u8> {
        self.message(if v6 { icmp::V6_ECHO } else { icmp::ECHO })
    }

    fn message(&self, kind: u8) -> Vec<u8> {
        let mut message = vec![kind, 0, 0, 0];
        message.extend(self.identifier.to_be_bytes());
        message.extend(self.rest);
        message
    }

    /// The reply from `from` as a frame for the guest.
    pub(crate) fn reply(&self, link: Link, from: IpAddr, to: IpAddr) -> Vec<u8> {
        let (protocol, kind) = match from {
            IpAddr::V4(_) => (protocol::ICMP, icmp::ECHO_REPLY),
            IpAddr::V6(_) => (protocol::ICMPV6, icmp::V6_ECHO_REPLY),
        };
        wire::frame_of(link, (from, to), protocol, &self.message(kind), 2)
    }
}

/// Whether a message is an echo reply, of either version.
pub(crate) fn is_echo_reply(message: &[u8], v6: bool) -> bool {
    let kind = if v6 {
        icmp::V6_ECHO_REPLY
    } else {
        icmp::ECHO_REPLY
    };
    message.first() == Some(&kind)
}

/// What a guest may not say to its neighbours: that it is a router (RFC 6105), or where theirs is.
pub(crate) fn is_routers(packet: &Packet<'_>) -> bool {
    packet.protocol == protocol::ICMPV6
        && matches!(
            packet.payload.first(),
            Some(&(icmp::ROUTER_ADVERTISEMENT | icmp::REDIRECT))
        )
}

/// The address that a neighbour advertisement is about.
pub(crate) fn advertised(packet: &Packet<'_>) -> Option<Ipv6Addr> {
    let advertises = packet.protocol == protocol::ICMPV6
        && packet.payload.first() == Some(&icmp::NEIGHBOUR_ADVERTISEMENT);
    if advertises {
        ipv6_at(packet.payload, 8)
    } else {
        None
    }
}

/// The address that a guest without one asks about before it takes it (RFC 4862 §5.4).
pub(crate) fn probed(packet: &Packet<'_>) -> Option<Ipv6Addr> {
    let probes = packet.protocol == protocol::ICMPV6
        && packet.payload.first() == Some(&icmp::NEIGHBOUR_SOLICITATION)
        && packet.source == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    if probes {
        ipv6_at(packet.payload, 8)
    } else {
        None
    }
}

/// Whether a message is one of neighbour discovery, none of which comes in fragments (RFC 6980).
pub(crate) fn is_discovery(packet: &Packet<'_>) -> bool {
    packet.protocol == protocol::ICMPV6
        && matches!(
            packet.payload.first(),
            Some(icmp::ROUTER_SOLICITATION..=icmp::REDIRECT)
        )
}

/// Whether a datagram comes from a DHCP server for IPv6 (RFC 8415 §7.2), which no guest is.
pub(crate) fn is_dhcpv6_servers(packet: &Packet<'_>) -> bool {
    packet.protocol == protocol::UDP && wire::u16_at(packet.payload, 0) == Some(DHCPV6_SERVER)
}

/// The answer to ICMPv6 messages of neighbour discovery.
pub(crate) fn discover(packet: &Packet<'_>, guest: &Addresses, router: bool) -> Option<Vec<u8>> {
    if packet.protocol != protocol::ICMPV6 {
        return None;
    }
    match *packet.payload.first()? {
        icmp::ROUTER_SOLICITATION => Some(advertise_router(guest, router)),
        icmp::NEIGHBOUR_SOLICITATION => {
            let target = ipv6_at(packet.payload, 8)?;
            // Whether an address is free (source ::) is never asked of the gateway's by mistake.
            if !is_gateway(target.into()) || packet.source == IpAddr::V6(Ipv6Addr::UNSPECIFIED) {
                return None;
            }
            // Router, solicited, override.
            let mut body = vec![icmp::NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, 0xe0, 0, 0, 0];
            body.extend(target.octets());
            body.extend([2, 1]);
            body.extend(GATEWAY_MAC.0);
            let addresses = (target.into(), packet.source);
            Some(wire::frame_of(
                link_to(guest),
                addresses,
                protocol::ICMPV6,
                &body,
                2,
            ))
        }
        _ => None,
    }
}

/// A router advertisement (RFC 4861 §4.2): the prefix to make an address in, the name server
/// (RFC 8106); with `router`, also that the gateway is a way out.
pub(crate) fn advertise_router(guest: &Addresses, router: bool) -> Vec<u8> {
    let body = router_advertisement(Subnet::USER, router);
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let addresses = (GATEWAY_LINK.into(), all_nodes.into());
    wire::frame_of(link_to(guest), addresses, protocol::ICMPV6, &body, 2)
}

/// Whether a message of ICMPv6 asks for routers.
pub(crate) fn asks_for_router(message: &[u8]) -> bool {
    message.first() == Some(&icmp::ROUTER_SOLICITATION)
}

/// The advertisement's message, without its checksum.
pub(crate) fn router_advertisement(subnet: Subnet, router: bool) -> Vec<u8> {
    /// Seconds for which all of it holds.
    const LIFETIME: u32 = 24 * 3600;
    /// At most this is allowed for a router: 18 hours (RFC 4861 §6.2.1 with RFC 8319).
    const ROUTER_LIFETIME: u16 = 65_535;
    let mut body = vec![icmp::ROUTER_ADVERTISEMENT, 0, 0, 0, 64, 0];
    body.extend(if router { ROUTER_LIFETIME } else { 0 }.to_be_bytes());
    body.extend([0; 8]);
    // Source link-layer address.
    body.extend([1, 1]);
    body.extend(GATEWAY_MAC.0);
    body.extend([5, 1, 0, 0]);
    body.extend(u32::from(MTU).to_be_bytes());
    // Prefix: on this link, to be used for autonomous configuration.
    body.extend([3, 4, 64, 0xc0]);
    body.extend(LIFETIME.to_be_bytes());
    body.extend(LIFETIME.to_be_bytes());
    body.extend([0; 4]);
    body.extend(subnet.prefix().octets());
    body.extend([25, 3, 0, 0]);
    body.extend(LIFETIME.to_be_bytes());
    body.extend(subnet.gateway_v6().octets());
    body
}

pub(crate) const DHCP_SERVER: u16 = 67;
pub(crate) const DHCP_CLIENT: u16 = 68;
const DHCPV6_SERVER: u16 = 547;
/// Where the options of a DHCP message begin, and what is just before (RFC 2131 §3).
const DHCP_OPTIONS: usize = 240;
const DHCP_COOKIE: u32 = 0x6382_5363;
/// Seconds for which a guest may keep its address; it is its own for as long as it lives.
const DHCP_LEASE: u32 = 24 * 3600;

mod dhcp {
    pub(super) const DISCOVER: u8 = 1;
    pub(super) const OFFER: u8 = 2;
    pub(super) const REQUEST: u8 = 3;
    pub(super) const ACK: u8 = 5;
    pub(super) const NAK: u8 = 6;
    pub(super) const INFORM: u8 = 8;
}

/// The option with this number.
fn dhcp_option(message: &[u8], wanted: u8) -> Option<&[u8]> {
    let mut rest = message.get(DHCP_OPTIONS..)?;
    loop {
        match *rest {
            [0, ref more @ ..] => rest = more,
            [kind, length, ref more @ ..] if kind != 255 => {
                let value = more.get(..usize::from(length))?;
                if kind == wanted {
                    return Some(value);
                }
                rest = &more[usize::from(length)..];
            }
            _ => return None,
        }
    }
}

/// The answer to a DHCP message as a frame.
pub(crate) fn serve_dhcp(datagram: &Datagram<'_>, guest: &Addresses) -> Option<Vec<u8>> {
    let (to, reply) = answer_dhcp(datagram.payload, guest, GATEWAY)?;
    let from = (GATEWAY, DHCP_SERVER).into();
    Some(wire::udp_frame(link_to(guest), from, to, &reply))
}

/// The Ethernet address of the client of a DHCP message.
pub(crate) fn dhcp_client(message: &[u8]) -> Option<MacAddress> {
    let mac = message.get(28..34)?;
    Some(MacAddress(mac.try_into().ok()?))
}

/// The answer to a DHCP message (RFC 2131), and where it goes: each guest has one address, and
/// gets it always.
pub(crate) fn answer_dhcp(
    message: &[u8],
    guest: &Addresses,
    gateway: Ipv4Addr,
) -> Option<(SocketAddr, Vec<u8>)> {
    if message.first() != Some(&1) || u32_at(message, 236)? != DHCP_COOKIE {
        return None;
    }
    let address_at = |at| u32_at(message, at).map(Ipv4Addr::from);
    let current = address_at(12)?;
    let requested = dhcp_option(message, 50)
        .and_then(|value| u32_at(value, 0))
        .map_or(current, Ipv4Addr::from);
    let other_server = dhcp_option(message, 54).is_some_and(|id| id != gateway.octets());
    let kind = match *dhcp_option(message, 53)?.first()? {
        dhcp::DISCOVER => dhcp::OFFER,
        dhcp::REQUEST if other_server => return None,
        dhcp::REQUEST if requested == guest.ipv4 => dhcp::ACK,
        dhcp::REQUEST => dhcp::NAK,
        dhcp::INFORM => dhcp::ACK,
        _ => return None,
    };
    let granted = if kind == dhcp::NAK {
        Ipv4Addr::UNSPECIFIED
    } else {
        guest.ipv4
    };

    let mut reply = vec![2, 1, 6, 0];
    reply.extend(message.get(4..8)?);
    reply.extend([0, 0]);
    reply.extend(message.get(10..12)?);
    reply.extend(current.octets());
    reply.extend(granted.octets());
    reply.extend(gateway.octets());
    reply.extend([0; 4]);
    // The client's Ethernet address, then names that nobody uses.
    reply.extend(message.get(28..44)?);
    reply.resize(DHCP_OPTIONS - 4, 0);
    reply.extend(DHCP_COOKIE.to_be_bytes());
    let mut option = |number: u8, value: &[u8]| {
        reply.extend([number, value.len() as u8]);
        reply.extend(value);
    };
    option(53, &[kind]);
    option(54, &gateway.octets());
    if kind != dhcp::NAK {
        option(51, &DHCP_LEASE.to_be_bytes());
        option(1, &[255, 255, 255, 0]);
        option(3, &gateway.octets());
        option(6, &gateway.octets());
        option(15, DOMAIN.as_bytes());
        option(26, &MTU.to_be_bytes());
    }
    reply.push(255);
    // Some clients want no less (RFC 951).
    reply.resize(reply.len().max(300), 0);

    let to: SocketAddr = match kind {
        dhcp::ACK if !current.is_unspecified() => (current, DHCP_CLIENT).into(),
        _ => (Ipv4Addr::BROADCAST, DHCP_CLIENT).into(),
    };
    Some((to, reply))
}

/// Whether a frame asks for an address, from a guest that has none.
pub(crate) fn asks_for_address(frame: &Frame<'_>, packet: &Packet<'_>) -> bool {
    let to = (packet.protocol, wire::u16_at(packet.payload, 2));
    frame.ethertype == ethertype::IPV4 && to == (protocol::UDP, Some(DHCP_SERVER))
}
