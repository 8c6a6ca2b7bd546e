//! The state of a virtio device that all types share: device status, feature negotiation,
//! virtqueues and their interrupts (virtio 1.2 §2.1 to §2.7, §4.1.4.3).
//!
//! [`VirtioPci`](super::VirtioPci) routes the driver's register accesses here; the owner
//! of the device takes chains with [`Transport::pop`] and gives them back with
//! [`Transport::push`]. A reset waits for chains that are still out: until all of them are
//! dropped the status register does not read 0, so nothing is written to guest memory
//! once the driver has seen the reset.

use std::sync::Arc;

use bitflags::bitflags;
use strata_memory::{GuestMemory, Ram};

use super::queue::{Chain, QueueError, Virtqueue};
use super::{MAX_QUEUES, NO_VECTOR, QUEUE_SIZE, VirtioDevice, copy_config, feature};
use crate::pci::{Msi, Msix};

/// Broken drivers are logged this many times for each device, then no more.
const MAX_COMPLAINTS: u32 = 8;
/// ISR bit 0: a queue was used.
const ISR_QUEUE: u8 = 1;
/// ISR bit 1: the configuration has changed.
const ISR_CONFIG: u8 = 2;

/// Offsets in the common configuration structure (§4.1.4.3).
pub mod common {
    /// Which half of the device's features is shown, u32.
    pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
    /// 32 feature bits of the device, u32.
    pub const DEVICE_FEATURE: u64 = 0x04;
    /// Which half of the driver's features is written, u32.
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    /// 32 feature bits that the driver accepts, u32.
    pub const DRIVER_FEATURE: u64 = 0x0c;
    /// The vector of configuration changes, u16.
    pub const CONFIG_MSIX_VECTOR: u64 = 0x10;
    /// The number of queues, u16.
    pub const NUM_QUEUES: u64 = 0x12;
    /// The device status, u8.
    pub const DEVICE_STATUS: u64 = 0x14;
    /// The generation of the configuration, u8.
    pub const CONFIG_GENERATION: u64 = 0x15;
    /// Which queue the rest is about, u16.
    pub const QUEUE_SELECT: u64 = 0x16;
    /// Entries in the queue, u16.
    pub const QUEUE_SIZE: u64 = 0x18;
    /// The vector of the queue, u16.
    pub const QUEUE_MSIX_VECTOR: u64 = 0x1a;
    /// Whether the queue is enabled, u16.
    pub const QUEUE_ENABLE: u64 = 0x1c;
    /// The queue's place in the notification structure, u16.
    pub const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    /// The descriptor table, u64.
    pub const QUEUE_DESC: u64 = 0x20;
    /// The available ring, u64.
    pub const QUEUE_DRIVER: u64 = 0x28;
    /// The used ring, u64.
    pub const QUEUE_DEVICE: u64 = 0x30;
    /// Bytes of the structure, `queue_notify_data` and `queue_reset` included.
    pub const SIZE: usize = 0x3c;
}

bitflags! {
    /// The device status register (§2.1).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct DeviceStatus: u8 {
        /// The guest has found the device.
        const ACKNOWLEDGE = 1;
        /// The guest has a driver for it.
        const DRIVER = 2;
        /// The driver is ready.
        const DRIVER_OK = 4;
        /// The features are agreed.
        const FEATURES_OK = 8;
        /// The device cannot go on without a reset.
        const DEVICE_NEEDS_RESET = 64;
        /// The driver has given up.
        const FAILED = 128;
    }
}

/// What the owner has to do after it has let the driver or a request touch the device.
#[derive(Debug, Default)]
pub struct Events {
    /// Interrupts to deliver.
    pub messages: Vec<Msi>,
    /// Queues with something new, bit 0 for queue 0.
    pub notified: u64,
    /// The device was reset: what the owner holds of it is void.
    pub reset: bool,
}

/// What a register write means to the device model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transition {
    None,
    Activated,
    Reset,
}

/// Status, features, queues and interrupts of one device.
#[derive(Debug)]
pub struct Transport {
    memory: GuestMemory,
    name: &'static str,
    offered: u64,
    accepted: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    status: DeviceStatus,
    resetting: bool,
    busy: Arc<()>,
    config_vector: u16,
    generation: u8,
    isr: u8,
    queue_select: u16,
    queues: Vec<Virtqueue>,
    pub(super) msix: Msix,
    pub(super) events: Events,
    complaints: u32,
}

impl Transport {
    /// The transport of a device as it is before any driver has seen it.
    ///
    /// # Panics
    /// If the model has no queue or more than [`MAX_QUEUES`].
    pub(super) fn new(memory: GuestMemory, device: &impl VirtioDevice) -> Self {
        let queues = device.queue_count();
        assert!(
            (1..=MAX_QUEUES).contains(&queues),
            "a virtio device with {queues} queues"
        );
        let general = feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT_DESC;
        Self {
            memory,
            name: std::any::type_name_of_val(device)
                .rsplit("::")
                .next()
                .unwrap_or("virtio"),
            offered: device.features() | general,
            accepted: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            status: DeviceStatus::empty(),
            resetting: false,
            busy: Arc::new(()),
            config_vector: NO_VECTOR,
            generation: 0,
            isr: 0,
            queue_select: 0,
            queues: (0..queues).map(|_| Virtqueue::new(QUEUE_SIZE)).collect(),
            // One for each queue and one for configuration changes.
            msix: Msix::new(queues + 1),
            events: Events::default(),
            complaints: 0,
        }
    }

    /// The guest's memory.
    pub fn memory(&self) -> &Ram {
        self.memory.ram()
    }

    /// The device status.
    pub fn status(&self) -> DeviceStatus {
        self.status
    }

    /// Whether requests are served: the driver is ready and has broken no rule.
    pub fn running(&self) -> bool {
        let down = DeviceStatus::DEVICE_NEEDS_RESET;
        !self.resetting
            && self.status.contains(DeviceStatus::DRIVER_OK)
            && !self.status.intersects(down)
    }

    /// Takes the next chain from queue `index`; `None` if there is none, or if the queue
    /// or the device is not in service.
    pub fn pop(&mut self, index: usize) -> Option<Chain> {
        if !self.running() {
            return None;
        }
        let queue = self.queues.get_mut(index).filter(|q| q.enabled())?;
        match queue.pop(self.memory.ram(), &self.busy) {
            Ok(chain) => chain,
            Err(error) => {
                self.fail(&error);
                None
            }
        }
    }

    /// Gives a chain back to queue `index`, the first `written` bytes of its writable
    /// buffers filled, and raises the queue's interrupt if the driver wants it.
    #[expect(clippy::needless_pass_by_value, reason = "the chain ends here")]
    pub fn push(&mut self, index: usize, chain: Chain, written: u32) {
        if !self.running() {
            return;
        }
        let Some(queue) = self.queues.get_mut(index) else {
            return;
        };
        match queue.push(self.memory.ram(), &chain, written) {
            Ok(true) => {
                let vector = queue.vector;
                self.raise(vector, ISR_QUEUE);
            }
            Ok(false) => {}
            Err(error) => self.fail(&error),
        }
    }

    /// Gives several chains back to queue `index`, so that the driver sees all of them or none.
    #[expect(clippy::needless_pass_by_value, reason = "the chains end here")]
    pub fn push_all(&mut self, index: usize, chains: Vec<(Chain, u32)>) {
        if !self.running() {
            return;
        }
        let Some(queue) = self.queues.get_mut(index) else {
            return;
        };
        match queue.push_all(self.memory.ram(), &chains) {
            Ok(true) => {
                let vector = queue.vector;
                self.raise(vector, ISR_QUEUE);
            }
            Ok(false) => {}
            Err(error) => self.fail(&error),
        }
    }

    /// Puts the chains that were taken last from queue `index` back, as if they had not been
    /// taken. None may have been taken after them.
    #[expect(clippy::needless_pass_by_value, reason = "the chains end here")]
    pub fn unpop(&mut self, index: usize, chains: Vec<Chain>) {
        if self.running()
            && let Some(queue) = self.queues.get_mut(index)
        {
            queue.unpop(chains.len() as u16);
        }
    }

    /// Asks the driver to notify when queue `index` gets its next chain. Returns true if
    /// one is there already, so that the caller looks again before it sleeps.
    pub fn rearm(&mut self, index: usize) -> bool {
        if !self.running() {
            return false;
        }
        let Some(queue) = self.queues.get_mut(index).filter(|q| q.enabled()) else {
            return false;
        };
        match queue.rearm(self.memory.ram()) {
            Ok(more) => more,
            Err(error) => {
                self.fail(&error);
                false
            }
        }
    }

    /// The driver has broken a rule: the device stops and says so.
    pub fn fail(&mut self, error: &QueueError) {
        if self.complaints < MAX_COMPLAINTS {
            self.complaints += 1;
            let error = error as &dyn std::error::Error;
            tracing::warn!(device = self.name, error, "the driver broke the protocol");
        }
        if !self.status.contains(DeviceStatus::DEVICE_NEEDS_RESET) {
            self.status |= DeviceStatus::DEVICE_NEEDS_RESET;
            if self.status.contains(DeviceStatus::DRIVER_OK) {
                self.raise(self.config_vector, ISR_CONFIG);
            }
        }
    }

    /// The device's configuration structure has changed: tells the driver.
    pub fn config_changed(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        if self.running() {
            self.raise(self.config_vector, ISR_CONFIG);
        }
    }

    fn raise(&mut self, vector: u16, cause: u8) {
        if self.msix.enabled() {
            self.msix.signal(vector, &mut self.events.messages);
        } else {
            self.isr |= cause;
        }
    }

    /// The driver has written to the notification of queue `index`.
    pub(super) fn notify(&mut self, index: u64) {
        if self.running() && index < self.queues.len() as u64 {
            self.events.notified |= 1 << index;
        }
    }

    /// Reads the ISR status, which clears it (§4.1.4.5).
    pub(super) fn take_isr(&mut self) -> u8 {
        std::mem::take(&mut self.isr)
    }

    fn selected(&self) -> Option<&Virtqueue> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// A load from the common configuration structure.
    pub(super) fn read_common(&mut self, offset: u64, data: &mut [u8]) {
        self.finish_reset();
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        let mut image = [0; common::SIZE];
        let mut put = |at: u64, bytes: &[u8]| {
            image[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
        };
        put(
            common::DEVICE_FEATURE_SELECT,
            &self.device_feature_select.to_le_bytes(),
        );
        let shown = half(self.offered, self.device_feature_select);
        put(common::DEVICE_FEATURE, &shown.to_le_bytes());
        put(
            common::DRIVER_FEATURE_SELECT,
            &self.driver_feature_select.to_le_bytes(),
        );
        let shown = half(self.accepted, self.driver_feature_select);
        put(common::DRIVER_FEATURE, &shown.to_le_bytes());
        put(
            common::CONFIG_MSIX_VECTOR,
            &self.config_vector.to_le_bytes(),
        );
        put(
            common::NUM_QUEUES,
            &(self.queues.len() as u16).to_le_bytes(),
        );
        put(common::DEVICE_STATUS, &[self.status.bits()]);
        put(common::CONFIG_GENERATION, &[self.generation]);
        put(common::QUEUE_SELECT, &self.queue_select.to_le_bytes());
        // A queue that is not there has size 0 (§4.1.4.3.1).
        if let Some(queue) = self.selected() {
            put(common::QUEUE_SIZE, &queue.size().to_le_bytes());
            put(common::QUEUE_MSIX_VECTOR, &queue.vector.to_le_bytes());
            put(
                common::QUEUE_ENABLE,
                &u16::from(queue.enabled()).to_le_bytes(),
            );
            put(common::QUEUE_NOTIFY_OFF, &self.queue_select.to_le_bytes());
            put(common::QUEUE_DESC, &queue.descriptors.to_le_bytes());
            put(common::QUEUE_DRIVER, &queue.driver.to_le_bytes());
            put(common::QUEUE_DEVICE, &queue.device.to_le_bytes());
        }
        copy_config(&image, offset, data);
    }

    /// Whether this store would reset the device.
    pub(super) fn is_reset(&self, offset: u64, data: &[u8]) -> bool {
        !self.resetting && offset == common::DEVICE_STATUS && *data == [0]
    }

    /// A store to the common configuration structure. Stores that are not to one whole
    /// field (or half of a 64-bit one) are ignored.
    pub(super) fn write_common(&mut self, offset: u64, data: &[u8]) -> Transition {
        self.finish_reset();
        if self.resetting {
            return Transition::None;
        }
        match *data {
            [value] if offset == common::DEVICE_STATUS => return self.set_status(value),
            [a, b] => self.write_u16(offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.write_u32(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => {
                // One store to a 64-bit field is two halves.
                self.write_u32(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_u32(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
        Transition::None
    }

    fn write_u16(&mut self, offset: u64, value: u16) {
        let vector = if value < self.msix.len() {
            value
        } else {
            NO_VECTOR
        };
        match offset {
            common::CONFIG_MSIX_VECTOR => self.config_vector = vector,
            common::QUEUE_SELECT => self.queue_select = value,
            _ => {
                let agreed = self.status.contains(DeviceStatus::FEATURES_OK);
                let event_idx = self.accepted & feature::EVENT_IDX != 0;
                let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else {
                    return;
                };
                match offset {
                    common::QUEUE_SIZE => queue.set_size(value),
                    common::QUEUE_MSIX_VECTOR => queue.vector = vector,
                    common::QUEUE_ENABLE if value == 1 && agreed && !queue.enabled() => {
                        if let Err(error) = queue.enable(self.memory.ram(), event_idx) {
                            self.fail(&error);
                        }
                    }
                    _ => {}
                }
            }
        }
    }

    fn write_u32(&mut self, offset: u64, value: u32) {
        match offset {
            common::DEVICE_FEATURE_SELECT => self.device_feature_select = value,
            common::DRIVER_FEATURE_SELECT => self.driver_feature_select = value,
            common::DRIVER_FEATURE => {
                if self.status.contains(DeviceStatus::FEATURES_OK) {
                    return;
                }
                match self.driver_feature_select {
                    0 => set_half(&mut self.accepted, false, value),
                    1 => set_half(&mut self.accepted, true, value),
                    _ => {}
                }
            }
            _ => {
                let index = usize::from(self.queue_select);
                let queue = self.queues.get_mut(index).filter(|q| !q.enabled());
                let Some(queue) = queue else { return };
                let high = offset & 4 != 0;
                match offset & !4 {
                    common::QUEUE_DESC => set_half(&mut queue.descriptors, high, value),
                    common::QUEUE_DRIVER => set_half(&mut queue.driver, high, value),
                    common::QUEUE_DEVICE => set_half(&mut queue.device, high, value),
                    _ => {}
                }
            }
        }
    }

    fn set_status(&mut self, value: u8) -> Transition {
        if value == 0 {
            self.resetting = true;
            self.events = Events {
                reset: true,
                messages: std::mem::take(&mut self.events.messages),
                notified: 0,
            };
            return Transition::Reset;
        }
        let mut added = DeviceStatus::from_bits_truncate(value);
        added.remove(self.status | DeviceStatus::DEVICE_NEEDS_RESET);
        let acceptable =
            self.accepted & !self.offered == 0 && self.accepted & feature::VERSION_1 != 0;
        if !acceptable {
            added.remove(DeviceStatus::FEATURES_OK);
        }
        if !(self.status | added).contains(DeviceStatus::FEATURES_OK) {
            added.remove(DeviceStatus::DRIVER_OK);
        }
        self.status |= added;
        if !added.contains(DeviceStatus::DRIVER_OK) {
            return Transition::None;
        }
        // Drivers may have filled queues before they were ready.
        self.events.notified = u64::MAX >> (64 - self.queues.len());
        Transition::Activated
    }

    /// The features in force.
    pub(super) fn features(&self) -> u64 {
        self.accepted
    }

    /// Ends a reset, if no chain is out any more.
    pub(super) fn finish_reset(&mut self) {
        if !self.resetting || Arc::strong_count(&self.busy) > 1 {
            return;
        }
        self.resetting = false;
        self.status = DeviceStatus::empty();
        self.accepted = 0;
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.config_vector = NO_VECTOR;
        self.isr = 0;
        self.queue_select = 0;
        for queue in &mut self.queues {
            queue.reset();
        }
    }
}

fn set_half(field: &mut u64, high: bool, value: u32) {
    *field = if high {
        *field & 0xffff_ffff | u64::from(value) << 32
    } else {
        *field & !0xffff_ffff | u64::from(value)
    };
}
