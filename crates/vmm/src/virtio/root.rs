//! The machine's PCI root: the bus of state machines, shared by vCPUs and workers.
//!
//! The bus has a lock, and each device one of its own. A BAR access takes the bus lock
//! only to find the device, so vCPUs meet on it no longer than that. No I/O is done under
//! either lock.

use std::sync::{Arc, Mutex};

use strata_devices::pci::{
    BAR_COUNT, BarWindows, BusFull, HostBridge, PciBus, PciFunction, PciLayout,
};
use strata_devices::virtio::{Events, Transport, VirtioDevice, VirtioPci};

use super::doorbell::Doorbell;
use super::{Connect, MsiSink};
use crate::sync::lock;

/// A function that several threads reach.
pub(super) trait Endpoint: Send + Sync {
    /// Runs `access` on the function, then does what comes of it.
    fn access(&self, access: &mut dyn FnMut(&mut dyn PciFunction));
}

struct Bridge(Mutex<HostBridge>);

impl Endpoint for Bridge {
    fn access(&self, access: &mut dyn FnMut(&mut dyn PciFunction)) {
        access(&mut *lock(&self.0));
    }
}

/// A virtio device, the doorbells of its workers, and where its interrupts go.
pub(super) struct Shared<D> {
    device: Mutex<VirtioPci<D>>,
    /// Of each queue.
    doorbells: Vec<Arc<Doorbell>>,
    interrupts: Arc<dyn MsiSink>,
}

impl<D: VirtioDevice> Shared<D> {
    /// Puts `device` on PCI. Queue `i` rings the doorbell that `bell_of(i)` returns.
    pub(super) fn new(
        device: D,
        connect: &Connect,
        bell_of: impl Fn(usize) -> Arc<Doorbell>,
    ) -> Arc<Self> {
        let doorbells = (0..usize::from(device.queue_count()))
            .map(bell_of)
            .collect();
        Arc::new(Self {
            device: Mutex::new(VirtioPci::new(device, connect.memory.clone())),
            doorbells,
            interrupts: Arc::clone(&connect.interrupts),
        })
    }

    /// Lets a worker use the device and its queues. `use_device` must not block.
    pub(super) fn with<T>(&self, use_device: impl FnOnce(&mut D, &mut Transport) -> T) -> T {
        let mut pci = lock(&self.device);
        let (device, transport) = pci.parts();
        let result = use_device(device, transport);
        let events = pci.take_events();
        drop(pci);
        self.act(events);
        result
    }

    fn act(&self, events: Events) {
        for message in events.messages {
            self.interrupts.deliver_msi(message.address, message.data);
        }
        let mut notified = events.notified;
        while notified != 0 {
            let queue = notified.trailing_zeros() as usize;
            notified &= notified - 1;
            if let Some(bell) = self.doorbells.get(queue) {
                bell.ring();
            }
        }
        if events.reset {
            // Workers may hold what the device waits for.
            self.doorbells.iter().for_each(|bell| bell.ring());
        }
    }
}

impl<D: VirtioDevice + Send> Endpoint for Shared<D> {
    fn access(&self, access: &mut dyn FnMut(&mut dyn PciFunction)) {
        let mut pci = lock(&self.device);
        access(&mut *pci);
        let events = pci.take_events();
        drop(pci);
        self.act(events);
    }
}

/// An endpoint as the bus holds it.
#[derive(Clone)]
struct Function(Arc<dyn Endpoint>);

impl PciFunction for Function {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.0.access(&mut |f| f.config_read(offset, data));
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.0.access(&mut |f| f.config_write(offset, data));
    }

    fn bar_windows(&self) -> BarWindows {
        let mut windows = [None; BAR_COUNT];
        self.0.access(&mut |f| windows = f.bar_windows());
        windows
    }

    fn bar_sizes(&self) -> [u64; BAR_COUNT] {
        let mut sizes = [0; BAR_COUNT];
        self.0.access(&mut |f| sizes = f.bar_sizes());
        sizes
    }

    fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]) {
        self.0.access(&mut |f| f.bar_read(bar, offset, data));
    }

    fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]) {
        self.0.access(&mut |f| f.bar_write(bar, offset, data));
    }
}

/// The PCI bus of a machine. The machine's dispatch calls it from any vCPU thread.
pub struct PciRoot {
    bus: Mutex<PciBus<Function>>,
}

impl PciRoot {
    /// A bus with its host bridge.
    pub(super) fn new(layout: PciLayout) -> Result<Self, BusFull> {
        let root = Self {
            bus: Mutex::new(PciBus::new(layout)),
        };
        root.add(Arc::new(Bridge(Mutex::new(HostBridge::new()))))?;
        Ok(root)
    }

    pub(super) fn add(&self, endpoint: Arc<dyn Endpoint>) -> Result<u8, BusFull> {
        lock(&self.bus).add(Function(endpoint))
    }

    /// `IN` from a port of 0xcf8 to 0xcff.
    pub fn port_read(&self, port: u16, size: u8) -> u32 {
        lock(&self.bus).port_read(port, size)
    }

    /// `OUT` to a port of 0xcf8 to 0xcff.
    pub fn port_write(&self, port: u16, size: u8, value: u32) {
        lock(&self.bus).port_write(port, size, value);
    }

    /// Which function's BAR is at `address`, the bus lock no longer held.
    fn decode(&self, address: u64, length: usize) -> Option<(Function, usize, u64)> {
        let mut bus = lock(&self.bus);
        let hit = bus.decode(address, length)?;
        Some((hit.function.clone(), hit.bar, hit.offset))
    }

    /// A load from ECAM or a BAR. False, and `data` untouched, if nobody is there.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) -> bool {
        if let Some((mut function, bar, offset)) = self.decode(address, data.len()) {
            function.bar_read(bar, offset, data);
            return true;
        }
        lock(&self.bus).ecam_read(address, data)
    }

    /// A store to ECAM or a BAR. False if nobody is there.
    pub fn mmio_write(&self, address: u64, data: &[u8]) -> bool {
        if let Some((mut function, bar, offset)) = self.decode(address, data.len()) {
            function.bar_write(bar, offset, data);
            return true;
        }
        lock(&self.bus).ecam_write(address, data)
    }
}

impl std::fmt::Debug for PciRoot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PciRoot").finish_non_exhaustive()
    }
}
