//! The header before every frame on a port's socket: what is left to do to the frame, checksum
//! and segmentation. It is `struct virtio_net_hdr` (virtio 1.2 §5.1.6), 12 bytes, little-endian.

use crate::wire::{fold, sum};

/// Bytes of the header.
pub const HEADER_SIZE: usize = 12;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`: the checksum is to be completed.
const NEEDS_CSUM: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_*`.
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;

/// What a port takes on itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// It accepts frames whose checksum is not completed.
    pub checksum: bool,
    /// It accepts TCP over IPv4 of up to 64 KiB in one frame.
    pub tso4: bool,
    /// It accepts TCP over IPv6 of up to 64 KiB in one frame.
    pub tso6: bool,
}

impl Offloads {
    /// Bytes of a message to the switch that tells them: shorter than any frame's.
    pub const MESSAGE_SIZE: usize = 1;

    /// The message to the switch.
    pub fn message(self) -> [u8; Self::MESSAGE_SIZE] {
        [u8::from(self.checksum) | u8::from(self.tso4) << 1 | u8::from(self.tso6) << 2]
    }

    /// Reads such a message.
    pub(crate) fn parse([bits]: [u8; Self::MESSAGE_SIZE]) -> Self {
        Self {
            checksum: bits & 1 != 0,
            // Segments need their checksums completed.
            tso4: bits & 3 == 3,
            tso6: bits & 5 == 5,
        }
    }
}

/// A decoded header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) needs_checksum: bool,
    pub(crate) gso: Gso,
    /// Bytes of all headers of a frame to be segmented.
    pub(crate) headers: u16,
    /// Payload of each segment.
    pub(crate) segment_size: u16,
    /// Where summing starts in the frame, and where behind that the sum goes.
    pub(crate) checksum_start: u16,
    pub(crate) checksum_offset: u16,
}

/// How a frame is to be segmented.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Gso {
    #[default]
    None,
    TcpV4,
    TcpV6,
}

impl Header {
    /// Splits a message of a port into header and frame. `None` if it makes no sense.
    pub(crate) fn split(message: &[u8]) -> Option<(Self, &[u8])> {
        let (header, frame) = message.split_at_checked(HEADER_SIZE)?;
        let field = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let decoded = Self {
            needs_checksum: header[0] & NEEDS_CSUM != 0,
            gso: match header[1] {
                GSO_NONE => Gso::None,
                GSO_TCPV4 => Gso::TcpV4,
                GSO_TCPV6 => Gso::TcpV6,
                _ => return None,
            },
            headers: field(2),
            segment_size: field(4),
            checksum_start: field(6),
            checksum_offset: field(8),
        };
        let sum_end =
            usize::from(decoded.checksum_start) + usize::from(decoded.checksum_offset) + 2;
        let sum_fits = !decoded.needs_checksum || sum_end <= frame.len();
        let segments =
            decoded.gso == Gso::None || decoded.needs_checksum && decoded.segment_size > 0;
        (sum_fits && segments).then_some((decoded, frame))
    }

    /// The frame with its checksum completed.
    pub(crate) fn finish_checksum(&self, frame: &[u8]) -> Option<Vec<u8>> {
        let start = usize::from(self.checksum_start);
        let at = start + usize::from(self.checksum_offset);
        let mut frame = frame.to_vec();
        let checksum = !fold(sum(frame.get(start..)?, 0));
        frame
            .get_mut(at..at + 2)?
            .copy_from_slice(&checksum.to_be_bytes());
        Some(frame)
    }

    /// The header's bytes.
    pub(crate) fn encode(self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[0] = if self.needs_checksum { NEEDS_CSUM } else { 0 };
        bytes[1] = match self.gso {
            Gso::None => GSO_NONE,
            Gso::TcpV4 => GSO_TCPV4,
            Gso::TcpV6 => GSO_TCPV6,
        };
        bytes[2..4].copy_from_slice(&self.headers.to_le_bytes());
        bytes[4..6].copy_from_slice(&self.segment_size.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.checksum_start.to_le_bytes());
        bytes[8..10].copy_from_slice(&self.checksum_offset.to_le_bytes());
        // One buffer; who receives into several knows how many.
        bytes[10] = 1;
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_its_encoding() {
        let header = Header {
            needs_checksum: true,
            gso: Gso::TcpV6,
            headers: 74,
            segment_size: 1440,
            checksum_start: 54,
            checksum_offset: 16,
        };
        let mut message = header.encode().to_vec();
        message.extend([0; 100]);
        assert_eq!(Header::split(&message), Some((header, &[0; 100][..])));
    }

    #[test]
    fn a_checksum_outside_the_frame_is_refused() {
        let header = Header {
            needs_checksum: true,
            checksum_start: 90,
            checksum_offset: 9,
            ..Header::default()
        };
        let mut message = header.encode().to_vec();
        message.extend([0; 100]);
        assert_eq!(Header::split(&message), None);
    }

    #[test]
    fn segments_without_checksums_are_not_taken() {
        let offered = Offloads {
            checksum: false,
            tso4: true,
            tso6: true,
        };
        assert_eq!(Offloads::parse(offered.message()), Offloads::default());
    }
}
