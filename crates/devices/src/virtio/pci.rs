//! A virtio device as a PCI function (virtio 1.2 §4.1): identity, capabilities and the
//! layout of its one BAR. Modern only; there is no legacy interface.
//!
//! The machine's PCI bus calls it as a [`PciFunction`]; the owner's threads reach the
//! device model and its queues through [`VirtioPci::parts`]. After either, the owner
//! takes [`VirtioPci::take_events`].

use strata_memory::GuestMemory;

use super::transport::{Events, Transition, Transport, common};
use super::{VirtioDevice, copy_config};
use crate::pci::{BAR_COUNT, BarWindows, ConfigSpace, Identity, Msix, PciFunction};

/// The layout of BAR 0. Each structure has a page of its own.
pub mod bar {
    /// Common configuration.
    pub const COMMON: u64 = 0x0000;
    /// ISR status.
    pub const ISR: u64 = 0x1000;
    /// Device-specific configuration.
    pub const DEVICE: u64 = 0x2000;
    /// Queue notifications, [`NOTIFY_MULTIPLIER`] bytes each.
    pub const NOTIFY: u64 = 0x3000;
    /// The MSI-X table.
    pub const MSIX_TABLE: u64 = 0x4000;
    /// The MSI-X pending bits.
    pub const MSIX_PENDING: u64 = 0x5000;
    /// Bytes in all.
    pub const SIZE: u64 = 0x8000;
    /// `notify_off_multiplier` (§4.1.4.4): bytes from one queue's notification to the next.
    pub const NOTIFY_MULTIPLIER: u64 = 4;
}

/// Each structure's share of the BAR.
const PAGE: u64 = 0x1000;
/// PCI vendor of all virtio devices (§4.1.2).
const VENDOR: u16 = 0x1af4;
/// Modern PCI device IDs are this plus the virtio device ID (§4.1.2).
const DEVICE_BASE: u16 = 0x1040;
/// A subsystem ID of 0x40 or more tells that this is no transitional device (§4.1.2.1).
const SUBSYSTEM: u16 = 0x40;
/// Vendor-specific capability.
const CAPABILITY_VENDOR: u8 = 0x09;

/// `cfg_type` of a virtio capability (§4.1.4).
#[derive(Clone, Copy)]
enum Structure {
    Common = 1,
    Notify = 2,
    Isr = 3,
    Device = 4,
    Access = 5,
}

/// A capability after its ID and link (§4.1.4): length, type, BAR 0, offset, size, more.
fn capability(structure: Structure, offset: u64, size: u32, more: &[u8]) -> Vec<u8> {
    let mut body = vec![16 + more.len() as u8, structure as u8, 0, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend(size.to_le_bytes());
    body.extend(more);
    body
}

/// A virtio device with its transport, as a PCI function.
#[derive(Debug)]
pub struct VirtioPci<D> {
    config: ConfigSpace,
    /// Offset of the MSI-X capability.
    msix: u16,
    /// Offset of the capability that reaches into the BAR.
    access: u16,
    transport: Transport,
    device: D,
}

impl<D: VirtioDevice> VirtioPci<D> {
    /// Puts `device` on PCI, its queues in `memory`.
    pub fn new(device: D, memory: GuestMemory) -> Self {
        let kind = device.device_type();
        let transport = Transport::new(memory, &device);
        let mut config = ConfigSpace::new(Identity {
            vendor: VENDOR,
            device: DEVICE_BASE + kind.id,
            revision: 1,
            class: kind.class,
            subsystem_vendor: VENDOR,
            subsystem: SUBSYSTEM,
        });
        config.add_memory_bar(0, bar::SIZE);
        let table = (bar::MSIX_TABLE as u32, bar::MSIX_PENDING as u32);
        let msix = transport.msix.capability(0, table.0, table.1);
        let msix = config.add_capability(Msix::CAPABILITY_ID, &msix);
        config.allow(
            msix + 2,
            &(Msix::ENABLE | Msix::FUNCTION_MASK).to_le_bytes(),
        );

        let mut add = |structure, offset, size: u64, more: &[u8]| {
            let body = capability(structure, offset, size as u32, more);
            config.add_capability(CAPABILITY_VENDOR, &body)
        };
        add(Structure::Common, bar::COMMON, common::SIZE as u64, &[]);
        add(Structure::Isr, bar::ISR, 1, &[]);
        add(Structure::Device, bar::DEVICE, PAGE, &[]);
        let multiplier = bar::NOTIFY_MULTIPLIER;
        let notify = u64::from(device.queue_count()) * multiplier;
        add(
            Structure::Notify,
            bar::NOTIFY,
            notify,
            &(multiplier as u32).to_le_bytes(),
        );
        let access = add(Structure::Access, 0, 0, &[0; 4]);
        // The driver chooses BAR, offset, length, and moves data (§4.1.4.9).
        config.allow(access + 4, &[0xff]);
        config.allow(access + 8, &[0xff; 12]);
        Self {
            config,
            msix,
            access,
            transport,
            device,
        }
    }

    /// The device model.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The device model and its queues.
    pub fn parts(&mut self) -> (&mut D, &mut Transport) {
        (&mut self.device, &mut self.transport)
    }

    /// What has happened since the last call that the owner must act on.
    pub fn take_events(&mut self) -> Events {
        std::mem::take(&mut self.transport.events)
    }

    /// The window of the access capability, if `offset` in configuration space touches
    /// its data field: BAR offset and width.
    fn access_window(&self, offset: u16, length: usize) -> Option<(u64, usize)> {
        let data = self.access + 16;
        if offset + length as u16 <= data || offset >= data + 4 {
            return None;
        }
        let bar = self.config.read_u16(self.access + 4) & 0xff;
        let address = u64::from(self.config.read_u32(self.access + 8));
        let width = self.config.read_u32(self.access + 12) as usize;
        let fits = address.is_multiple_of(width as u64) && address + width as u64 <= bar::SIZE;
        (bar == 0 && matches!(width, 1 | 2 | 4) && fits).then_some((address, width))
    }

    fn write_common(&mut self, offset: u64, data: &[u8]) {
        if self.transport.is_reset(offset, data) {
            self.device.before_reset(&mut self.transport);
        }
        match self.transport.write_common(offset, data) {
            Transition::None => {}
            Transition::Activated => self.device.activate(self.transport.features()),
            Transition::Reset => {
                self.device.reset();
                self.transport.finish_reset();
            }
        }
    }
}

impl<D: VirtioDevice> PciFunction for VirtioPci<D> {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        if let Some((address, width)) = self.access_window(offset, data.len()) {
            let mut value = [0; 4];
            self.bar_read(0, address, &mut value[..width]);
            self.config.set(self.access + 16, &value);
        }
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        if let Some((address, width)) = self.access_window(offset, data.len()) {
            let value = self.config.read_u32(self.access + 16).to_le_bytes();
            self.bar_write(0, address, &value[..width]);
        }
        let control = self.config.read_u16(self.msix + 2);
        let Transport { msix, events, .. } = &mut self.transport;
        msix.set_control(control, &mut events.messages);
    }

    fn bar_windows(&self) -> BarWindows {
        self.config.bar_windows()
    }

    fn bar_sizes(&self) -> [u64; BAR_COUNT] {
        self.config.bar_sizes()
    }

    fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if bar != 0 {
            return;
        }
        let at = offset % PAGE;
        match offset - at {
            bar::COMMON => self.transport.read_common(at, data),
            bar::ISR if at == 0 => {
                copy_config(&[self.transport.take_isr()], 0, data);
            }
            bar::DEVICE => self.device.read_config(at, data),
            bar::MSIX_TABLE => self.transport.msix.table_read(at, data),
            bar::MSIX_PENDING => self.transport.msix.pending_read(at, data),
            _ => {}
        }
    }

    fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]) {
        if bar != 0 {
            return;
        }
        let at = offset % PAGE;
        match offset - at {
            bar::COMMON => self.write_common(at, data),
            bar::DEVICE => self.device.write_config(at, data),
            bar::NOTIFY => self.transport.notify(at / bar::NOTIFY_MULTIPLIER),
            bar::MSIX_TABLE => {
                let Transport { msix, events, .. } = &mut self.transport;
                msix.table_write(at, data, &mut events.messages);
            }
            _ => {}
        }
    }
}
