//! Packets as they are on the wire: checked views of what a guest sent, and builders of what it
//! gets. Pure; every length is checked, nothing here panics on any bytes.
//!
//! Ethernet II, IPv4 (RFC 791), IPv6 (RFC 8200), TCP (RFC 9293), UDP (RFC 768).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// A 48-bit Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// All stations.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Whether it names a group, the broadcast address included.
    pub fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// The interface identifier made of it (RFC 4291, appendix A), under `prefix`/64.
    pub fn address_in(self, prefix: Ipv6Addr) -> Ipv6Addr {
        let [a, b, c, d, e, f] = self.0;
        let mut bytes = prefix.octets();
        bytes[8..].copy_from_slice(&[a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
        bytes.into()
    }
}

impl std::fmt::Display for MacAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Protocol numbers.
pub(crate) mod protocol {
    pub(crate) const ICMP: u8 = 1;
    pub(crate) const TCP: u8 = 6;
    pub(crate) const UDP: u8 = 17;
    pub(crate) const ICMPV6: u8 = 58;
    /// Extension headers of IPv6 (RFC 8200 §4), which stand before the protocol proper.
    pub(crate) const HOP_BY_HOP: u8 = 0;
    pub(crate) const ROUTING: u8 = 43;
    pub(crate) const FRAGMENT: u8 = 44;
    pub(crate) const AUTHENTICATION: u8 = 51;
    pub(crate) const DESTINATION: u8 = 60;
}

/// EtherTypes.
pub(crate) mod ethertype {
    pub(crate) const IPV4: u16 = 0x0800;
    pub(crate) const ARP: u16 = 0x0806;
    pub(crate) const IPV6: u16 = 0x86dd;
}

pub(crate) const ETHERNET_HEADER: usize = 14;
pub(crate) const IPV4_HEADER: usize = 20;
pub(crate) const IPV6_HEADER: usize = 40;
pub(crate) const TCP_HEADER: usize = 20;
pub(crate) const UDP_HEADER: usize = 8;
/// Hop limit of what the gateway sends.
const HOP_LIMIT: u8 = 64;

/// The 16-bit field at `at`, if it is there.
pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let field = bytes.get(at..at + 2)?;
    Some(u16::from_be_bytes([field[0], field[1]]))
}

/// The 32-bit field at `at`, if it is there.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..at + 4)?;
    Some(u32::from_be_bytes([field[0], field[1], field[2], field[3]]))
}

fn ipv4_at(bytes: &[u8], at: usize) -> Option<Ipv4Addr> {
    u32_at(bytes, at).map(Ipv4Addr::from)
}

/// The IPv6 address at `at`, if it is there.
pub(crate) fn ipv6_at(bytes: &[u8], at: usize) -> Option<Ipv6Addr> {
    let field: [u8; 16] = bytes.get(at..at + 16)?.try_into().ok()?;
    Some(field.into())
}

/// An Ethernet frame.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame<'a> {
    pub(crate) destination: MacAddress,
    pub(crate) source: MacAddress,
    pub(crate) ethertype: u16,
    pub(crate) payload: &'a [u8],
}

impl<'a> Frame<'a> {
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let mac = |at: usize| Some(MacAddress(bytes.get(at..at + 6)?.try_into().ok()?));
        Some(Self {
            destination: mac(0)?,
            source: mac(6)?,
            ethertype: u16_at(bytes, 12)?,
            payload: bytes.get(ETHERNET_HEADER..)?,
        })
    }
}

/// An IP packet of either version that is whole: no fragment, no extension headers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packet<'a> {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) protocol: u8,
    pub(crate) payload: &'a [u8],
    /// Header and payload.
    pub(crate) whole: &'a [u8],
}

impl<'a> Packet<'a> {
    /// Parses what lies behind an Ethernet header; bytes behind the packet are padding.
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        match bytes.first()? >> 4 {
            4 => Self::parse_v4(bytes),
            6 => Self::parse_v6(bytes),
            _ => None,
        }
    }

    fn parse_v4(bytes: &'a [u8]) -> Option<Self> {
        let header = usize::from(bytes.first()? & 0xf) * 4;
        let total = usize::from(u16_at(bytes, 2)?);
        // More fragments, or an offset.
        if header < IPV4_HEADER || total < header || u16_at(bytes, 6)? & 0x3fff != 0 {
            return None;
        }
        Some(Self {
            source: ipv4_at(bytes, 12)?.into(),
            destination: ipv4_at(bytes, 16)?.into(),
            protocol: *bytes.get(9)?,
            payload: bytes.get(header..total)?,
            whole: bytes.get(..total)?,
        })
    }

    fn parse_v6(bytes: &'a [u8]) -> Option<Self> {
        let total = IPV6_HEADER + usize::from(u16_at(bytes, 4)?);
        Some(Self {
            source: ipv6_at(bytes, 8)?.into(),
            destination: ipv6_at(bytes, 24)?.into(),
            protocol: *bytes.get(6)?,
            payload: bytes.get(IPV6_HEADER..total)?,
            whole: bytes.get(..total)?,
        })
    }

    /// The packet as it is behind IPv6's extension headers, and whether it is a fragment. One that
    /// is not the first has the protocol [`protocol::FRAGMENT`] and no payload. `None` if a header
    /// is cut off, or if nothing is behind them, which RFC 7112 forbids.
    pub(crate) fn behind_extensions(mut self) -> Option<(Self, bool)> {
        let mut is_fragment = false;
        loop {
            let unit = |size: usize, first: usize| {
                let units = usize::from(*self.payload.get(1)?);
                Some((units + first) * size)
            };
            let length = match self.protocol {
                protocol::HOP_BY_HOP | protocol::ROUTING | protocol::DESTINATION => unit(8, 1)?,
                protocol::AUTHENTICATION => unit(4, 2)?,
                protocol::FRAGMENT => {
                    is_fragment = true;
                    if u16_at(self.payload, 2)? & 0xfff8 != 0 {
                        self.payload = &[];
                        return Some((self, true));
                    }
                    8
                }
                _ => return (!self.payload.is_empty()).then_some((self, is_fragment)),
            };
            self.protocol = *self.payload.first()?;
            self.payload = self.payload.get(length..)?;
        }
    }
}

/// A UDP datagram.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Datagram<'a> {
    pub(crate) source: u16,
    pub(crate) destination: u16,
    pub(crate) payload: &'a [u8],
}

impl<'a> Datagram<'a> {
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let length = usize::from(u16_at(bytes, 4)?);
        Some(Self {
            source: u16_at(bytes, 0)?,
            destination: u16_at(bytes, 2)?,
            payload: bytes.get(UDP_HEADER..length)?,
        })
    }
}

/// Adds `bytes` to a ones' complement sum that is not folded yet (RFC 1071).
pub(crate) fn sum(bytes: &[u8], start: u64) -> u64 {
    let mut total = start;
    let mut words = bytes.chunks_exact(4);
    for word in &mut words {
        total += u64::from(u32::from_be_bytes([word[0], word[1], word[2], word[3]]));
    }
    for (index, byte) in words.remainder().iter().enumerate() {
        total += u64::from(*byte) << (24 - 8 * index);
    }
    total
}

/// Folds a sum to the 16 bits of a checksum field, not complemented.
pub(crate) fn fold(mut total: u64) -> u16 {
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

/// The sum of a pseudo header (RFC 9293 §3.1, RFC 8200 §8.1).
pub(crate) fn pseudo_sum(source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> u64 {
    let start = u64::from(protocol) + length as u64;
    match (source, destination) {
        (IpAddr::V4(a), IpAddr::V4(b)) => sum(&b.octets(), sum(&a.octets(), start)),
        (IpAddr::V6(a), IpAddr::V6(b)) => sum(&b.octets(), sum(&a.octets(), start)),
        // The caller never mixes versions.
        _ => start,
    }
}

/// Where a packet of the gateway's goes, and from where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) source: MacAddress,
    pub(crate) destination: MacAddress,
}

/// Appends an Ethernet header.
pub(crate) fn put_ethernet(frame: &mut Vec<u8>, link: Link, ethertype: u16) {
    frame.extend(link.destination.0);
    frame.extend(link.source.0);
    frame.extend(ethertype.to_be_bytes());
}

/// Appends Ethernet and IP headers for `length` bytes of `protocol`.
pub(crate) fn put_headers(
    frame: &mut Vec<u8>,
    link: Link,
    (source, destination): (IpAddr, IpAddr),
    protocol: u8,
    length: usize,
) {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            put_ethernet(frame, link, ethertype::IPV4);
            let start = frame.len();
            frame.extend([0x45, 0]);
            frame.extend(((IPV4_HEADER + length) as u16).to_be_bytes());
            // No fragments, so no identification (RFC 6864).
            frame.extend([0, 0, 0x40, 0, HOP_LIMIT, protocol, 0, 0]);
            frame.extend(source.octets());
            frame.extend(destination.octets());
            let checksum = !fold(sum(&frame[start..], 0));
            frame[start + 10..start + 12].copy_from_slice(&checksum.to_be_bytes());
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            put_ethernet(frame, link, ethertype::IPV6);
            frame.extend([0x60, 0, 0, 0]);
            frame.extend((length as u16).to_be_bytes());
            // Neighbour discovery asks for 255 (RFC 4861); nothing minds it elsewhere.
            let hops = if protocol == protocol::ICMPV6 {
                255
            } else {
                HOP_LIMIT
            };
            frame.extend([protocol, hops]);
            frame.extend(source.octets());
            frame.extend(destination.octets());
        }
        _ => {}
    }
}

/// A whole frame with `body` as its `protocol`, the body's checksum, at `checksum_at` in it,
/// filled in.
pub(crate) fn frame_of(
    link: Link,
    addresses: (IpAddr, IpAddr),
    protocol: u8,
    body: &[u8],
    checksum_at: usize,
) -> Vec<u8> {
    let mut frame = Vec::with_capacity(ETHERNET_HEADER + IPV6_HEADER + body.len());
    put_headers(&mut frame, link, addresses, protocol, body.len());
    let start = frame.len();
    frame.extend(body);
    let pseudo = match protocol {
        protocol::ICMP => 0,
        _ => pseudo_sum(addresses.0, addresses.1, protocol, body.len()),
    };
    let at = start + checksum_at;
    if let Some(field) = frame.get_mut(at..at + 2) {
        field.fill(0);
        let checksum = match !fold(sum(&frame[start..], pseudo)) {
            // In UDP 0 would mean that there is none.
            0 if protocol == protocol::UDP => 0xffff,
            other => other,
        };
        frame[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
    }
    frame
}

/// A UDP datagram as a frame.
pub(crate) fn udp_frame(
    link: Link,
    source: SocketAddr,
    destination: SocketAddr,
    payload: &[u8],
) -> Vec<u8> {
    let length = UDP_HEADER + payload.len();
    let mut body = Vec::with_capacity(length);
    body.extend(source.port().to_be_bytes());
    body.extend(destination.port().to_be_bytes());
    body.extend((length as u16).to_be_bytes());
    body.extend([0, 0]);
    body.extend(payload);
    frame_of(
        link,
        (source.ip(), destination.ip()),
        protocol::UDP,
        &body,
        6,
    )
}

/// Why a packet could not be delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unreachable {
    /// There is no way to the network or host.
    Host,
    /// Nothing listens on the UDP port.
    Port,
    /// The network's rules forbid it.
    Prohibited,
}

/// An ICMP message (RFC 792, RFC 4443) from `from` that `packet` could not be delivered.
pub(crate) fn unreachable_frame(
    link: Link,
    from: IpAddr,
    packet: &Packet<'_>,
    why: Unreachable,
) -> Vec<u8> {
    let (protocol, kind, code, quoted) = match (from, why) {
        (IpAddr::V4(_), Unreachable::Host) => (protocol::ICMP, 3, 1, 548),
        (IpAddr::V4(_), Unreachable::Port) => (protocol::ICMP, 3, 3, 548),
        (IpAddr::V4(_), Unreachable::Prohibited) => (protocol::ICMP, 3, 13, 548),
        (IpAddr::V6(_), Unreachable::Host) => (protocol::ICMPV6, 1, 3, 1232),
        (IpAddr::V6(_), Unreachable::Port) => (protocol::ICMPV6, 1, 4, 1232),
        (IpAddr::V6(_), Unreachable::Prohibited) => (protocol::ICMPV6, 1, 1, 1232),
    };
    let mut body = vec![kind, code, 0, 0, 0, 0, 0, 0];
    body.extend(&packet.whole[..packet.whole.len().min(quoted)]);
    frame_of(link, (from, packet.source), protocol, &body, 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINK: Link = Link {
        source: MacAddress([2, 0, 0, 0, 0, 1]),
        destination: MacAddress([2, 0, 0, 0, 0, 2]),
    };

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn the_protocol_is_found_behind_extension_headers() {
        let packet = |start: &[u8], rest: &[u8]| {
            let header = [
                &[0x60, 0, 0, 0, 0, (start.len() + rest.len() - 1) as u8][..],
                &start[..1],
            ];
            [&header.concat()[..], &[255], &[0; 32], &start[1..], rest].concat()
        };
        let behind = |bytes: &[u8]| {
            let (packet, is_fragment) = Packet::parse(bytes)?.behind_extensions()?;
            Some((packet.protocol, packet.payload.to_vec(), is_fragment))
        };
        let skipped = [60, 0, 1, 4, 0, 0, 0, 0];
        // Hop-by-hop options, destination options of 16 bytes, ICMPv6.
        let options = [&[0][..], &skipped, &[58, 1], &[0; 14]].concat();
        assert_eq!(
            behind(&packet(&options, &[134])),
            Some((58, vec![134], false))
        );
        assert_eq!(behind(&packet(&options, &[])), None);
        assert_eq!(behind(&packet(&options[..16], &[])), None);
        let first = [44, 17, 0, 0, 1, 0, 0, 0, 7];
        assert_eq!(behind(&packet(&first, &[9])), Some((17, vec![9], true)));
        let second = [44, 17, 0, 0, 9, 0, 0, 0, 7];
        assert_eq!(behind(&packet(&second, &[9])), Some((44, vec![], true)));
    }

    #[test]
    fn a_datagram_comes_back_from_its_frame() {
        for (from, to) in [
            ("10.0.2.1:53", "10.0.2.2:4000"),
            ("[fd00::1]:53", "[fd00::2]:4000"),
        ] {
            let frame = udp_frame(LINK, address(from), address(to), b"question");
            let frame = Frame::parse(&frame).unwrap();
            let packet = Packet::parse(frame.payload).unwrap();
            let datagram = Datagram::parse(packet.payload).unwrap();

            assert_eq!(
                (frame.source, frame.destination),
                (LINK.source, LINK.destination)
            );
            assert_eq!(packet.source, address(from).ip());
            assert_eq!((datagram.source, datagram.destination), (53, 4000));
            assert_eq!(datagram.payload, b"question");
            let pseudo = pseudo_sum(packet.source, packet.destination, 17, packet.payload.len());
            assert_eq!(fold(sum(packet.payload, pseudo)), 0xffff);
        }
    }

    #[test]
    fn a_sum_does_not_depend_on_how_the_bytes_are_cut() {
        let bytes: Vec<u8> = (0..=255).collect();
        let whole = fold(sum(&bytes, 0));
        assert_eq!(fold(sum(&bytes[64..], sum(&bytes[..64], 0))), whole);
        assert_eq!(fold(sum(&[0xab], 0)), 0xab00);
    }

    #[test]
    fn fragments_and_packets_longer_than_their_frame_are_refused() {
        let frame = udp_frame(LINK, address("10.0.2.1:1"), address("10.0.2.2:2"), b"x");
        let packet = &frame[ETHERNET_HEADER..];
        assert!(Packet::parse(&packet[..packet.len() - 1]).is_none());
        let mut fragment = packet.to_vec();
        fragment[6] = 0x20;
        assert!(Packet::parse(&fragment).is_none());
    }

    #[test]
    fn an_interface_identifier_is_made_as_rfc_4291_says() {
        let mac = MacAddress([0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde]);
        let address = mac.address_in("fe80::".parse().unwrap());
        assert_eq!(address.to_string(), "fe80::3656:78ff:fe9a:bcde");
    }
}
