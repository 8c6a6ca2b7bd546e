//! Virtio 1.2: the PCI transport, virtqueues, and the devices on them.
//!
//! ```text
//!   vCPU ─BAR─► VirtioPci<D> ─► Transport: status, features, queues, MSI-X
//!                    │              ▲  pop: Chain     events: notified queues,
//!                    ▼              │  push: Chain    interrupts to send
//!                D: VirtioDevice ───┘                       │
//!         (Block, Console, Entropy, Fs, Net, Vsock)         ▼
//!                    ▲ requests, bytes                 the owner's threads
//!                    └──────────────────────────────────────┘
//! ```
//!
//! A device here is its protocol and nothing else: it turns descriptor chains into typed
//! requests, and the owner (in `vmm`) carries them out on threads of its own. What the
//! owner has to do after a register access is told by [`Events`].
//!
//! A driver that breaks the rules gets `DEVICE_NEEDS_RESET` (§2.1.2) and no more service
//! until it resets the device. Nothing a driver does panics.

mod block;
mod console;
mod entropy;
mod fs;
mod net;
mod pci;
mod queue;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod transport;
mod vsock;

pub use block::{Action, Block, BlockConfig, Request, SECTOR_SIZE, SectorRange, Status};
pub use console::{Console, MAX_PORTS, PortConfig};
pub use entropy::{Entropy, EntropyRequest};
pub use fs::{EIO, Fs, FsRequest, MAX_FS_MESSAGE, OUT_HEADER, TAG_SIZE, fs_queue};
pub use net::{Accepts, Buffers, MAX_MESSAGE, Net, NetConfig, OutgoingFrame, net_queue};
pub use pci::{VirtioPci, bar};
pub use queue::{Chain, QueueError, Segment};
pub use transport::{DeviceStatus, Events, Transport, common};
pub use vsock::{
    Hold, IncomingBuffers, MAX_CONNECTIONS, MAX_DATA, OutgoingData, Shutdown, Vsock, VsockEvent,
    vsock_queue,
};

/// Entries in every queue.
pub const QUEUE_SIZE: u16 = 256;
/// The most queues a device may have: what fits in [`Events::notified`].
pub const MAX_QUEUES: u16 = 64;
/// `VIRTIO_MSI_NO_VECTOR`: no interrupt is wanted (§4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;

/// Feature bits that do not belong to a device type (§6).
pub mod feature {
    /// `VIRTIO_F_INDIRECT_DESC`: a descriptor may point to a table of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// `VIRTIO_F_EVENT_IDX`: both sides say when they next want to be notified.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// `VIRTIO_F_VERSION_1`: the driver follows virtio 1.0 or later.
    pub const VERSION_1: u64 = 1 << 32;
}

/// What kind of device this is (§5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceType {
    /// The virtio device ID.
    pub id: u16,
    /// The PCI class, subclass and programming interface: 0xCCSSPP.
    pub class: u32,
}

/// What one type of device has of its own; [`VirtioPci`] does the rest.
pub trait VirtioDevice {
    /// The type.
    fn device_type(&self) -> DeviceType;
    /// The features of this type that are offered (bits 0 to 23 and 50 to 127 of §6; the
    /// general ones are added by the transport).
    fn features(&self) -> u64;
    /// The number of queues, 1 to [`MAX_QUEUES`].
    fn queue_count(&self) -> u16;
    /// Reads the device's configuration structure at `offset`; what is beyond it reads 0.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes to the configuration structure; read-only fields ignore it.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// The driver is ready, and `features` are in force.
    fn activate(&mut self, _features: u64) {}
    /// The driver is about to reset the device. What it has made available is done for the last time
    /// now, or never.
    fn before_reset(&mut self, _transport: &mut Transport) {}
    /// The device was reset. Chains it holds are to be dropped.
    fn reset(&mut self) {}
}

/// Copies the bytes of a configuration structure from `offset` on; those beyond read 0.
fn copy_config(structure: &[u8], offset: u64, data: &mut [u8]) {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let rest = structure.get(start..).unwrap_or(&[]);
    for (index, byte) in data.iter_mut().enumerate() {
        *byte = rest.get(index).copied().unwrap_or(0);
    }
}

#[cfg(test)]
mod fuzz_tests;
#[cfg(test)]
mod tests;
