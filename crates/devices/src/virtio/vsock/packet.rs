//! The header of a vsock packet (virtio 1.2 §5.10.6) and what its fields may hold.

use bitflags::bitflags;

/// Bytes of a header.
pub(super) const HEADER_SIZE: usize = 44;
/// The context ID of the host (§5.10.4).
pub(super) const HOST_CID: u64 = 2;
/// `VIRTIO_VSOCK_TYPE_STREAM`, the one type of socket that is offered.
pub(super) const STREAM: u16 = 1;

/// Operations (§5.10.6).
pub(super) mod op {
    pub(in super::super) const REQUEST: u16 = 1;
    pub(in super::super) const RESPONSE: u16 = 2;
    pub(in super::super) const RST: u16 = 3;
    pub(in super::super) const SHUTDOWN: u16 = 4;
    pub(in super::super) const RW: u16 = 5;
    pub(in super::super) const CREDIT_UPDATE: u16 = 6;
    pub(in super::super) const CREDIT_REQUEST: u16 = 7;
}

bitflags! {
    /// What a side of a connection will do no more: the flags of a shutdown (§5.10.6.6.1).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Shutdown: u32 {
        /// It receives nothing any more.
        const RECEIVE = 1;
        /// It sends nothing any more.
        const SEND = 2;
    }
}

/// `struct virtio_vsock_hdr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) source_cid: u64,
    pub(super) destination_cid: u64,
    pub(super) source_port: u32,
    pub(super) destination_port: u32,
    /// Bytes behind the header.
    pub(super) length: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// Bytes that the sender has room for in all.
    pub(super) buf_alloc: u32,
    /// Bytes that have left that room since the connection began.
    pub(super) fwd_cnt: u32,
}

impl Header {
    pub(super) fn parse(bytes: &[u8; HEADER_SIZE]) -> Self {
        let mut rest = bytes.as_slice();
        Self {
            source_cid: u64::from_le_bytes(next(&mut rest)),
            destination_cid: u64::from_le_bytes(next(&mut rest)),
            source_port: u32::from_le_bytes(next(&mut rest)),
            destination_port: u32::from_le_bytes(next(&mut rest)),
            length: u32::from_le_bytes(next(&mut rest)),
            kind: u16::from_le_bytes(next(&mut rest)),
            op: u16::from_le_bytes(next(&mut rest)),
            flags: u32::from_le_bytes(next(&mut rest)),
            buf_alloc: u32::from_le_bytes(next(&mut rest)),
            fwd_cnt: u32::from_le_bytes(next(&mut rest)),
        }
    }

    pub(super) fn bytes(&self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[..8].copy_from_slice(&self.source_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.destination_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.source_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.destination_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.length.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The reset that answers this packet.
    pub(super) fn refusal(&self) -> Self {
        Self {
            source_cid: self.destination_cid,
            destination_cid: self.source_cid,
            source_port: self.destination_port,
            destination_port: self.source_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        }
    }
}

/// Takes the first bytes off `rest`; those that are not there are 0.
fn next<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let Some((first, others)) = rest.split_first_chunk() else {
        return [0; N];
    };
    *rest = others;
    *first
}
