//! virtio-net (virtio 1.2 §5.1): an Ethernet card with one pair of queues.
//!
//! The owner moves messages, each the 12 bytes of `struct virtio_net_hdr` (§5.1.6)
//! and a frame: from [`Net::next_frame`] to its network, which then are given back with
//! [`Net::sent`]; and from the network into the buffers of [`Net::take_buffers`], with
//! [`Net::received`]. What the driver leaves to the device, and takes on itself, checksums and
//! segmentation, is in the header and goes through as it is; this file never sees a frame.

use std::collections::VecDeque;

use super::queue::{Chain, QueueError, Segment};
use super::transport::Transport;
use super::{DeviceType, VirtioDevice, copy_config};

/// Bytes of the header before each frame.
const HEADER_SIZE: usize = 12;
/// Bytes of the largest message: header, Ethernet header, an IP packet.
pub const MAX_MESSAGE: usize = HEADER_SIZE + 14 + 65_535;
/// Bytes of an Ethernet header, without which a frame is none.
const ETHERNET_HEADER: usize = 14;
/// Where in the header the number of buffers is (§5.1.6.4).
const NUM_BUFFERS: u64 = 10;
/// `VIRTIO_NET_S_LINK_UP` (§5.1.4).
const LINK_UP: u16 = 1;

/// The queues, by their numbers (§5.1.2).
pub mod net_queue {
    /// Buffers for frames to the driver.
    pub const RECEIVE: usize = 0;
    /// Frames from the driver.
    pub const TRANSMIT: usize = 1;
}

use net_queue::{RECEIVE, TRANSMIT};

/// Feature bits (§5.1.3).
mod feature {
    pub(super) const CSUM: u64 = 1 << 0;
    pub(super) const GUEST_CSUM: u64 = 1 << 1;
    pub(super) const MTU: u64 = 1 << 3;
    pub(super) const MAC: u64 = 1 << 5;
    pub(super) const GUEST_TSO4: u64 = 1 << 7;
    pub(super) const GUEST_TSO6: u64 = 1 << 8;
    pub(super) const HOST_TSO4: u64 = 1 << 11;
    pub(super) const HOST_TSO6: u64 = 1 << 12;
    pub(super) const MRG_RXBUF: u64 = 1 << 15;
    pub(super) const STATUS: u64 = 1 << 16;
}

/// What a card is.
#[derive(Clone, Copy, Debug)]
pub struct NetConfig {
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// Bytes of the largest IP packet on its network.
    pub mtu: u16,
}

/// What the driver accepts in frames for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accepts {
    /// Checksums that are not completed.
    pub checksum: bool,
    /// TCP over IPv4 of up to 64 KiB.
    pub tso4: bool,
    /// TCP over IPv6 of up to 64 KiB.
    pub tso6: bool,
}

/// A message from the driver, on its way to the network.
#[derive(Debug)]
#[must_use = "a frame is to be given back with Net::sent"]
pub struct OutgoingFrame(Chain);

impl OutgoingFrame {
    /// Where the header and the frame are, in order: at most [`MAX_MESSAGE`] bytes.
    pub fn buffers(&self) -> &[Segment] {
        self.0.readable()
    }
}

/// Buffers of the driver's that wait for frames, in order.
#[derive(Debug, Default)]
pub struct Buffers {
    chains: VecDeque<Chain>,
    size: u64,
}

impl Buffers {
    /// Bytes in all of them.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where the buffers are, in order.
    pub fn segments(&self) -> impl Iterator<Item = Segment> {
        self.chains.iter().flat_map(Chain::writable).copied()
    }

    fn pop(&mut self) -> Option<Chain> {
        let chain = self.chains.pop_front()?;
        self.size -= chain.writable_length();
        Some(chain)
    }
}

/// A virtio network card.
#[derive(Clone, Debug)]
pub struct Net {
    config: NetConfig,
    link: bool,
    accepts: Accepts,
    /// What the owner was told of it. At first, and behind a reset, nothing is accepted.
    told: Accepts,
    /// A frame may take several buffers.
    mergeable: bool,
}

impl Net {
    /// A card as `config` says.
    pub fn new(config: NetConfig) -> Self {
        Self {
            config,
            link: true,
            accepts: Accepts::default(),
            told: Accepts::default(),
            mergeable: false,
        }
    }

    /// Whether a frame may take several of the driver's buffers.
    pub fn is_mergeable(&self) -> bool {
        self.mergeable
    }

    /// What the driver accepts, if that is not what the last call gave; nothing, at first.
    pub fn take_accepts(&mut self) -> Option<Accepts> {
        let told = std::mem::replace(&mut self.told, self.accepts);
        (told != self.accepts).then_some(self.accepts)
    }

    /// The network is gone, or there again: tells the driver.
    pub fn set_link(&mut self, transport: &mut Transport, up: bool) {
        if self.link != up {
            self.link = up;
            transport.config_changed();
        }
    }

    /// Takes the next frame that the driver sends; `None` if there is none. One that cannot be a
    /// frame is dropped, as a cable would.
    pub fn next_frame(&self, transport: &mut Transport) -> Option<OutgoingFrame> {
        loop {
            let chain = transport.pop(TRANSMIT)?;
            let length = chain.readable_length();
            let least = (HEADER_SIZE + ETHERNET_HEADER) as u64;
            if (least..=MAX_MESSAGE as u64).contains(&length) {
                return Some(OutgoingFrame(chain));
            }
            transport.push(TRANSMIT, chain, 0);
        }
    }

    /// Gives a frame back that was sent, or dropped.
    pub fn sent(&self, transport: &mut Transport, frame: OutgoingFrame) {
        transport.push(TRANSMIT, frame.0, 0);
    }

    /// Takes buffers of the driver's until `held` has room for any message, or there are no more.
    pub fn take_buffers(&self, transport: &mut Transport, held: &mut Buffers) {
        while held.size < MAX_MESSAGE as u64 && (self.mergeable || held.chains.is_empty()) {
            let Some(chain) = transport.pop(RECEIVE) else {
                return;
            };
            if chain.writable_length() < HEADER_SIZE as u64 {
                transport.fail(&QueueError::Protocol(
                    "a receive buffer has no room for a header",
                ));
                return;
            }
            held.size += chain.writable_length();
            held.chains.push_back(chain);
        }
    }

    /// A message of `length` bytes lies in the first of `held`: gives those to the driver.
    pub fn received(&self, transport: &mut Transport, held: &mut Buffers, length: usize) {
        let mut left = length as u64;
        let mut used = Vec::new();
        while left > 0 || used.is_empty() {
            let Some(chain) = held.pop() else {
                break;
            };
            let filled = chain.writable_length().min(left);
            left -= filled;
            used.push((chain, filled as u32));
        }
        if let Some((first, _)) = used.first() {
            let count = (used.len() as u16).to_le_bytes();
            first.write(transport.memory(), NUM_BUFFERS, &count);
        }
        transport.push_all(RECEIVE, used);
    }

    /// Puts buffers back that were not used, as if they had not been taken.
    pub fn give_back(&self, transport: &mut Transport, held: &mut Buffers) {
        held.size = 0;
        transport.unpop(RECEIVE, held.chains.drain(..).collect());
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType {
            id: 1,
            class: 0x02_00_00,
        }
    }

    fn features(&self) -> u64 {
        feature::CSUM
            | feature::GUEST_CSUM
            | feature::MTU
            | feature::MAC
            | feature::GUEST_TSO4
            | feature::GUEST_TSO6
            | feature::HOST_TSO4
            | feature::HOST_TSO6
            | feature::MRG_RXBUF
            | feature::STATUS
    }

    fn queue_count(&self) -> u16 {
        2
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut image = [0; 12];
        image[..6].copy_from_slice(&self.config.mac);
        let status = if self.link { LINK_UP } else { 0 };
        image[6..8].copy_from_slice(&status.to_le_bytes());
        // One pair of queues, though nobody asks without VIRTIO_NET_F_MQ.
        image[8..10].copy_from_slice(&1_u16.to_le_bytes());
        image[10..12].copy_from_slice(&self.config.mtu.to_le_bytes());
        copy_config(&image, offset, data);
    }

    fn activate(&mut self, features: u64) {
        let has = |bit| features & bit != 0;
        let checksum = has(feature::GUEST_CSUM);
        self.accepts = Accepts {
            checksum,
            tso4: checksum && has(feature::GUEST_TSO4),
            tso6: checksum && has(feature::GUEST_TSO6),
        };
        self.mergeable = has(feature::MRG_RXBUF);
    }

    fn reset(&mut self) {
        self.accepts = Accepts::default();
        self.mergeable = false;
    }
}

#[cfg(test)]
mod tests;
