//! Fragments of guests' packets, put together again (RFC 791 §3.2, RFC 8200 §4.5). Bounded in
//! number, bytes and time; a packet whose fragments overlap is dropped as a whole (RFC 5722). Only
//! UDP and ICMP: a TCP that has its segments cut is not one of today's.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::wire::{
    ETHERNET_HEADER, IPV4_HEADER, IPV6_HEADER, Link, MacAddress, Packet, fold, ipv6_at, protocol,
    pseudo_sum, put_headers, sum, u16_at, u32_at,
};

/// Packets of one guest that may be incomplete at once; the oldest makes room.
const MAX_PACKETS: usize = 8;
/// Fragments of one packet: 64 KiB in pieces of the smallest MTU of IPv6, and then some.
const MAX_FRAGMENTS: usize = 128;
/// For how long the rest of a packet is waited for: 15 s at least in RFC 791, 60 s in RFC 8200.
const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes of the largest payload.
const MAX_PAYLOAD: usize = 65_535 - IPV4_HEADER;
const FRAGMENT_HEADER_SIZE: usize = 8;

/// What tells packets apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    identification: u32,
}

/// One fragment of a packet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fragment<'a> {
    key: Key,
    /// Where its bytes are in the packet's payload.
    pub(crate) offset: usize,
    /// There are others behind.
    more: bool,
    pub(crate) payload: &'a [u8],
}

impl<'a> Fragment<'a> {
    /// Parses what lies behind an Ethernet header; `None` if that is no fragment.
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (key, place, payload) = match bytes.first()? >> 4 {
            4 => Self::split_v4(bytes)?,
            6 => Self::split_v6(bytes)?,
            _ => return None,
        };
        let (offset, more) = place;
        // All but the last are of whole units of eight bytes.
        let fits = offset + payload.len() <= MAX_PAYLOAD && !payload.is_empty();
        let whole_units = !more || payload.len().is_multiple_of(8);
        (fits && whole_units).then_some(Self {
            key,
            offset,
            more,
            payload,
        })
    }

    fn split_v4(bytes: &'a [u8]) -> Option<(Key, (usize, bool), &'a [u8])> {
        let header = usize::from(bytes.first()? & 0xf) * 4;
        let total = usize::from(u16_at(bytes, 2)?);
        let place = u16_at(bytes, 6)?;
        let (offset, more) = (usize::from(place & 0x1fff) * 8, place & 0x2000 != 0);
        if header < IPV4_HEADER || (offset == 0 && !more) {
            return None;
        }
        let key = Key {
            source: IpAddr::V4(u32_at(bytes, 12)?.into()),
            destination: IpAddr::V4(u32_at(bytes, 16)?.into()),
            protocol: *bytes.get(9)?,
            identification: u16_at(bytes, 4)?.into(),
        };
        Some((key, (offset, more), bytes.get(header..total)?))
    }

    fn split_v6(bytes: &'a [u8]) -> Option<(Key, (usize, bool), &'a [u8])> {
        let total = IPV6_HEADER + usize::from(u16_at(bytes, 4)?);
        if *bytes.get(6)? != protocol::FRAGMENT {
            return None;
        }
        let place = u16_at(bytes, IPV6_HEADER + 2)?;
        let key = Key {
            source: ipv6_at(bytes, 8)?.into(),
            destination: ipv6_at(bytes, 24)?.into(),
            protocol: *bytes.get(IPV6_HEADER)?,
            identification: u32_at(bytes, IPV6_HEADER + 4)?,
        };
        let payload = bytes.get(IPV6_HEADER + FRAGMENT_HEADER_SIZE..total)?;
        Some((key, (usize::from(place & 0xfff8), place & 1 != 0), payload))
    }

    /// The protocol of the packet that it is of.
    pub(crate) fn protocol(&self) -> u8 {
        self.key.protocol
    }
}

/// What is known of a packet.
#[derive(Debug)]
struct Partial {
    began: Instant,
    /// By where they begin; none overlap.
    pieces: BTreeMap<usize, Vec<u8>>,
    /// Bytes of the payload, if its end is known.
    length: Option<usize>,
    /// It was broken: what else comes of it is dropped.
    dead: bool,
}

impl Partial {
    /// Takes a fragment in. Returns false if it does not fit what is there.
    fn add(&mut self, fragment: &Fragment<'_>) -> bool {
        let (start, end) = (fragment.offset, fragment.offset + fragment.payload.len());
        let before = self.pieces.range(..end).next_back();
        let overlaps = before.is_some_and(|(at, piece)| at + piece.len() > start);
        let last_end = self.pieces.last_key_value().map(|(at, p)| at + p.len());
        let beyond = match (self.length, fragment.more) {
            (Some(length), true) => end > length,
            (Some(length), false) => end != length,
            (None, true) => false,
            (None, false) => last_end.is_some_and(|last| last > end),
        };
        if overlaps || beyond || self.pieces.len() >= MAX_FRAGMENTS {
            return false;
        }
        if !fragment.more {
            self.length = Some(end);
        }
        self.pieces.insert(start, fragment.payload.to_vec());
        true
    }

    fn is_whole(&self) -> bool {
        let known: usize = self.pieces.values().map(Vec::len).sum();
        self.length == Some(known)
    }
}

/// A packet that was put together, behind an Ethernet header that means nothing.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Whole(Vec<u8>);

impl Whole {
    fn new(key: &Key, pieces: BTreeMap<usize, Vec<u8>>) -> Option<Self> {
        let payload: Vec<u8> = pieces.into_values().flatten().collect();
        let nowhere = Link {
            source: MacAddress::BROADCAST,
            destination: MacAddress::BROADCAST,
        };
        let ends = (key.source, key.destination);
        let mut frame = Vec::new();
        put_headers(&mut frame, nowhere, ends, key.protocol, payload.len());
        frame.extend(payload);
        let whole = Self(frame);
        // Pieces of different packets may have met.
        has_its_checksum(&whole.packet()?).then_some(whole)
    }

    /// It, as one packet.
    pub(crate) fn packet(&self) -> Option<Packet<'_>> {
        Packet::parse(self.0.get(ETHERNET_HEADER..)?)
    }
}

/// Whether a packet is what its sender sent.
fn has_its_checksum(packet: &Packet<'_>) -> bool {
    let (source, destination, payload) = (packet.source, packet.destination, packet.payload);
    let start = match packet.protocol {
        protocol::ICMP => 0,
        // UDP over IPv4 may have none.
        protocol::UDP if source.is_ipv4() && u16_at(payload, 6) == Some(0) => return true,
        other => pseudo_sum(source, destination, other, payload.len()),
    };
    fold(sum(payload, start)) == 0xffff
}

/// The incomplete packets of a guest.
#[derive(Debug, Default)]
pub(crate) struct Fragments {
    packets: BTreeMap<Key, Partial>,
}

impl Fragments {
    /// Takes a fragment; gives the packet that it makes whole.
    pub(crate) fn take(&mut self, fragment: &Fragment<'_>, now: Instant) -> Option<Whole> {
        let known = [protocol::UDP, protocol::ICMP, protocol::ICMPV6];
        if !known.contains(&fragment.protocol()) {
            return None;
        }
        self.packets
            .retain(|_, partial| now.duration_since(partial.began) < PATIENCE);
        let key = fragment.key;
        if !self.packets.contains_key(&key) && self.packets.len() >= MAX_PACKETS {
            let oldest = self.packets.iter().min_by_key(|(_, p)| p.began);
            let oldest = *oldest?.0;
            self.packets.remove(&oldest);
        }
        let partial = self.packets.entry(key).or_insert_with(|| Partial {
            began: now,
            pieces: BTreeMap::new(),
            length: None,
            dead: false,
        });
        if partial.dead || !partial.add(fragment) {
            partial.dead = true;
            partial.pieces.clear();
            return None;
        }
        if !partial.is_whole() {
            return None;
        }
        let partial = self.packets.remove(&key)?;
        Whole::new(&key, partial.pieces)
    }

    /// Bytes that are held.
    #[cfg(test)]
    pub(crate) fn held(&self) -> usize {
        let pieces = self.packets.values().flat_map(|p| p.pieces.values());
        pieces.map(Vec::len).sum()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::wire::udp_frame;

    const LINK: Link = Link {
        source: MacAddress([2, 0, 0, 0, 0, 1]),
        destination: MacAddress([2, 0, 0, 0, 0, 2]),
    };

    /// The packets that a frame is cut into, so many bytes of its payload in each.
    pub(crate) fn cut(frame: &[u8], size: usize, identification: u16) -> Vec<Vec<u8>> {
        let packet = &frame[ETHERNET_HEADER..];
        let v4 = packet[0] >> 4 == 4;
        let header = if v4 { IPV4_HEADER } else { IPV6_HEADER };
        let (head, payload) = packet.split_at(header);
        let count = payload.chunks(size).count();
        let pieces = payload.chunks(size).enumerate();
        let fragment = |(index, piece): (usize, &[u8])| {
            let (offset, more) = (index * size, index + 1 < count);
            let mut bytes = head.to_vec();
            if v4 {
                let total = (header + piece.len()) as u16;
                let place = (offset / 8) as u16 | u16::from(more) << 13;
                bytes[2..4].copy_from_slice(&total.to_be_bytes());
                bytes[4..6].copy_from_slice(&identification.to_be_bytes());
                bytes[6..8].copy_from_slice(&place.to_be_bytes());
            } else {
                let length = (FRAGMENT_HEADER_SIZE + piece.len()) as u16;
                let next = std::mem::replace(&mut bytes[6], protocol::FRAGMENT);
                bytes[4..6].copy_from_slice(&length.to_be_bytes());
                bytes.extend([next, 0]);
                bytes.extend((offset as u16 | u16::from(more)).to_be_bytes());
                bytes.extend(u32::from(identification).to_be_bytes());
            }
            bytes.extend(piece);
            [&frame[..ETHERNET_HEADER], &bytes].concat()
        };
        pieces.map(fragment).collect()
    }

    fn datagram(ends: (&str, &str), length: usize) -> Vec<u8> {
        let data: Vec<u8> = (0..length).map(|i| (i / 7) as u8).collect();
        udp_frame(
            LINK,
            ends.0.parse().unwrap(),
            ends.1.parse().unwrap(),
            &data,
        )
    }

    fn take_all(fragments: &mut Fragments, frames: &[Vec<u8>], now: Instant) -> Option<Whole> {
        let mut whole = None;
        for frame in frames {
            let fragment = Fragment::parse(&frame[ETHERNET_HEADER..]).unwrap();
            whole = whole.or(fragments.take(&fragment, now));
        }
        whole
    }

    const V4: (&str, &str) = ("10.0.2.2:9", "10.0.2.1:9");
    const V6: (&str, &str) = ("[fd00::2]:9", "[fd00::1]:9");

    #[test]
    fn a_packet_is_put_together_in_any_order() {
        for ends in [V4, V6] {
            let frame = datagram(ends, 5000);
            let mut pieces = cut(&frame, 1480, 7);
            pieces.rotate_left(2);
            let mut fragments = Fragments::default();
            let whole = take_all(&mut fragments, &pieces, Instant::now()).unwrap();
            let expected = Packet::parse(&frame[ETHERNET_HEADER..]).unwrap();
            let packet = whole.packet().unwrap();
            assert_eq!(packet.payload, expected.payload);
            assert_eq!(packet.source, expected.source);
            assert_eq!(fragments.held(), 0);
        }
    }

    #[test]
    fn fragments_that_overlap_make_no_packet() {
        let frame = datagram(V4, 3000);
        let mut pieces = cut(&frame, 1000, 7);
        pieces.insert(1, cut(&frame, 504, 7).swap_remove(1));
        let mut fragments = Fragments::default();
        assert_eq!(take_all(&mut fragments, &pieces, Instant::now()), None);
        assert_eq!(fragments.held(), 0);
    }

    #[test]
    fn pieces_of_different_packets_make_none() {
        let mut pieces = cut(&datagram(V6, 2000), 1000, 7);
        pieces[0][ETHERNET_HEADER + 60] ^= 1;
        assert_eq!(
            take_all(&mut Fragments::default(), &pieces, Instant::now()),
            None
        );
    }

    #[test]
    fn what_waits_is_bounded_in_number_and_time() {
        let mut fragments = Fragments::default();
        let start = Instant::now();
        for identification in 0..100 {
            let pieces = cut(&datagram(V4, 60_000), 1480, identification);
            assert_eq!(take_all(&mut fragments, &pieces[1..], start), None);
        }
        assert!(fragments.held() <= MAX_PACKETS * 60_008);
        let last = &cut(&datagram(V4, 100), 8, 200)[1..2];
        take_all(&mut fragments, last, start + PATIENCE);
        assert_eq!(fragments.held(), 8);
    }
}
