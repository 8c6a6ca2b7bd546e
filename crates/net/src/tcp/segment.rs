//! TCP segments (RFC 9293 §3.1): what a guest sent, checked, and what it is sent.

use std::net::{IpAddr, SocketAddr};

use crate::offload::{Gso, HEADER_SIZE, Header, Offloads};
use crate::wire::{self, Link, TCP_HEADER, u16_at, u32_at};

/// Control bits.
pub(crate) mod flag {
    pub(crate) const FIN: u8 = 1;
    pub(crate) const SYN: u8 = 2;
    pub(crate) const RST: u8 = 4;
    pub(crate) const PSH: u8 = 8;
    pub(crate) const ACK: u8 = 16;
}

/// The largest window shift (RFC 7323 §2.3).
const MAX_SHIFT: u8 = 14;

/// A segment of the guest's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment<'a> {
    pub(crate) source: u16,
    pub(crate) destination: u16,
    pub(crate) sequence: u32,
    pub(crate) acknowledged: u32,
    pub(crate) flags: u8,
    pub(crate) window: u16,
    /// The options, unparsed.
    options: &'a [u8],
    pub(crate) payload: &'a [u8],
}

impl<'a> Segment<'a> {
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let header = usize::from(*bytes.get(12)? >> 4) * 4;
        Some(Self {
            source: u16_at(bytes, 0)?,
            destination: u16_at(bytes, 2)?,
            sequence: u32_at(bytes, 4)?,
            acknowledged: u32_at(bytes, 8)?,
            flags: *bytes.get(13)?,
            window: u16_at(bytes, 14)?,
            options: bytes.get(TCP_HEADER..header)?,
            payload: bytes.get(header..)?,
        })
    }

    pub(crate) fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// Sequence numbers that it takes.
    pub(crate) fn length(&self) -> u32 {
        let controls = u32::from(self.has(flag::SYN)) + u32::from(self.has(flag::FIN));
        self.payload.len() as u32 + controls
    }

    /// The options of a SYN: maximum segment size, window shift.
    pub(crate) fn syn_options(&self) -> (Option<u16>, Option<u8>) {
        let (mut size, mut shift) = (None, None);
        let mut rest = self.options;
        while let [kind, more @ ..] = rest {
            match (*kind, more) {
                (0, _) => break,
                (1, _) => rest = more,
                (kind, [length, ..]) if (2..=rest.len()).contains(&usize::from(*length)) => {
                    let (option, behind) = rest.split_at(usize::from(*length));
                    match (kind, option) {
                        (2, [_, _, high, low]) => size = Some(u16::from_be_bytes([*high, *low])),
                        (3, [_, _, bits]) => shift = Some((*bits).min(MAX_SHIFT)),
                        _ => {}
                    }
                    rest = behind;
                }
                _ => break,
            }
        }
        (size, shift)
    }
}

/// The two ends of a connection as the guest sees them, and how frames reach the guest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Path {
    pub(crate) link: Link,
    pub(crate) guest: SocketAddr,
    pub(crate) remote: SocketAddr,
    pub(crate) offloads: Offloads,
    /// Bytes that may wait in each direction, a multiple of 16 KiB.
    pub(crate) room: usize,
}

impl Path {
    /// Bytes of Ethernet, IP and TCP headers without options.
    fn headers(&self) -> usize {
        let ip = if self.guest.is_ipv4() {
            wire::IPV4_HEADER
        } else {
            wire::IPV6_HEADER
        };
        wire::ETHERNET_HEADER + ip + TCP_HEADER
    }

    /// The largest payload of a frame to the guest, whose segments hold `segment` bytes each.
    pub(crate) fn most(&self, segment: usize) -> usize {
        let large = if self.guest.is_ipv4() {
            self.offloads.tso4
        } else {
            self.offloads.tso6
        };
        if !large {
            return segment;
        }
        // An IP packet has at most 65,535 bytes; whole segments only.
        let most = usize::from(u16::MAX) - self.headers();
        (most - most % segment).max(segment)
    }

    /// The header before the frame and all of the frame's headers, for a segment to the guest.
    pub(crate) fn encode(&self, out: &Outgoing<'_>) -> Vec<u8> {
        let payload = out.payload[0].len() + out.payload[1].len();
        let tcp_length = TCP_HEADER + out.options.len() + payload;
        let mut frame = Vec::with_capacity(HEADER_SIZE + self.headers() + out.options.len());
        frame.resize(HEADER_SIZE, 0);
        let (source, destination): (IpAddr, IpAddr) = (self.remote.ip(), self.guest.ip());
        let addresses = (source, destination);
        wire::put_headers(
            &mut frame,
            self.link,
            addresses,
            wire::protocol::TCP,
            tcp_length,
        );
        let start = frame.len();
        frame.extend(self.remote.port().to_be_bytes());
        frame.extend(self.guest.port().to_be_bytes());
        frame.extend(out.sequence.to_be_bytes());
        frame.extend(out.acknowledged.to_be_bytes());
        let words = (TCP_HEADER + out.options.len()) / 4;
        frame.extend([(words as u8) << 4, out.flags]);
        frame.extend(out.window.to_be_bytes());
        frame.extend([0; 4]);
        frame.extend(out.options);

        let pseudo = wire::pseudo_sum(source, destination, wire::protocol::TCP, tcp_length);
        let mut header = Header::default();
        let checksum = if self.offloads.checksum {
            header.needs_checksum = true;
            header.checksum_start = (start - HEADER_SIZE) as u16;
            header.checksum_offset = 16;
            wire::fold(pseudo)
        } else {
            // Parts of the payload end on any byte: they are summed as one.
            let body = [out.payload[0], out.payload[1]].concat();
            !wire::fold(wire::sum(&body, wire::sum(&frame[start..], pseudo)))
        };
        frame[start + 16..start + 18].copy_from_slice(&checksum.to_be_bytes());
        if payload > usize::from(out.segment_size) {
            header.gso = if self.guest.is_ipv4() {
                Gso::TcpV4
            } else {
                Gso::TcpV6
            };
            header.headers = (frame.len() - HEADER_SIZE) as u16;
            header.segment_size = out.segment_size;
        }
        frame[..HEADER_SIZE].copy_from_slice(&header.encode());
        frame
    }
}

/// A segment for the guest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outgoing<'a> {
    pub(crate) sequence: u32,
    pub(crate) acknowledged: u32,
    pub(crate) flags: u8,
    pub(crate) window: u16,
    /// A multiple of 4 bytes.
    pub(crate) options: &'a [u8],
    /// In two parts, as a ring has it.
    pub(crate) payload: [&'a [u8]; 2],
    /// Payload that a real segment holds; more is to be segmented by the receiver.
    pub(crate) segment_size: u16,
}

impl Outgoing<'_> {
    /// The answer to a segment that belongs to no connection (RFC 9293 §3.10.7.1).
    pub(crate) fn reset_for(segment: &Segment<'_>) -> Self {
        let (sequence, acknowledged, flags) = if segment.has(flag::ACK) {
            (segment.acknowledged, 0, flag::RST)
        } else {
            let end = segment.sequence.wrapping_add(segment.length());
            (0, end, flag::RST | flag::ACK)
        };
        Self {
            sequence,
            acknowledged,
            flags,
            window: 0,
            options: &[],
            payload: [&[], &[]],
            segment_size: u16::MAX,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Frame, MacAddress, Packet};

    #[test]
    fn what_is_encoded_without_offloads_has_a_right_checksum_and_parses() {
        let path = Path {
            link: Link {
                source: MacAddress([2, 0, 0, 0, 0, 1]),
                destination: MacAddress([2, 0, 0, 0, 0, 2]),
            },
            guest: "10.0.2.2:4000".parse().unwrap(),
            remote: "192.0.2.1:80".parse().unwrap(),
            offloads: Offloads::default(),
            room: 16 << 10,
        };
        let out = Outgoing {
            sequence: 7,
            acknowledged: 9,
            flags: flag::ACK | flag::SYN,
            window: 1000,
            options: &[2, 4, 5, 0xb4, 1, 3, 3, 7],
            payload: [b"odd", b"bytes"],
            segment_size: 1460,
        };

        let mut message = path.encode(&out);
        message.extend(b"oddbytes");
        let (header, frame) = Header::split(&message).unwrap();
        let packet = Packet::parse(Frame::parse(frame).unwrap().payload).unwrap();
        let segment = Segment::parse(packet.payload).unwrap();

        assert_eq!(header, Header::default());
        let pseudo = wire::pseudo_sum(packet.source, packet.destination, 6, packet.payload.len());
        assert_eq!(wire::fold(wire::sum(packet.payload, pseudo)), 0xffff);
        assert_eq!((segment.sequence, segment.acknowledged), (7, 9));
        assert_eq!(segment.syn_options(), (Some(1460), Some(7)));
        assert_eq!(segment.payload, b"oddbytes");
    }

    #[test]
    fn broken_options_end_the_list() {
        for options in [&[2, 0, 0, 0][..], &[3, 200, 1, 1], &[8], &[2, 4, 1]] {
            let segment = Segment {
                source: 1,
                destination: 2,
                sequence: 0,
                acknowledged: 0,
                flags: flag::SYN,
                window: 0,
                options,
                payload: &[],
            };
            assert_eq!(segment.syn_options(), (None, None));
        }
    }
}
