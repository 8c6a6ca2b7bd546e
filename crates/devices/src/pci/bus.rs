//! The root bus: configuration access by ports and by ECAM, and who answers at an address.
//!
//! Called by the machine's bus dispatch for the ports 0xcf8 to 0xcff and for MMIO in the
//! ECAM range and the BAR window. Knows functions only through [`PciFunction`].

use std::ops::Range;

use super::{BAR_COUNT, BarWindows, PciFunction, register};

/// The address port (`CONFIG_ADDRESS`), 4 bytes.
const ADDRESS_PORT: u16 = 0xcf8;
/// The data port (`CONFIG_DATA`), 4 bytes.
const DATA_PORT: u16 = 0xcfc;
/// `CONFIG_ADDRESS` bit 31: accesses to the data port are configuration cycles.
const ADDRESS_ENABLE: u32 = 1 << 31;
/// Devices on a bus.
const SLOTS: usize = 32;
/// Bytes of ECAM for each function (PCI Express 5.0 §7.2.2).
const ECAM_FUNCTION_SIZE: u64 = 4096;

/// Where the bus is in guest physical memory.
#[derive(Clone, Debug)]
pub struct PciLayout {
    /// Start of [`PciLayout::ECAM_SIZE`] bytes of configuration space.
    pub ecam: u64,
    /// Where BARs are placed at first. The guest may move them.
    pub window: Range<u64>,
}

impl PciLayout {
    /// Bytes of ECAM for the one bus there is.
    pub const ECAM_SIZE: u64 = 1 << 20;
}

/// No slot, or no room for BARs, is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusFull {
    /// All 32 slots are taken.
    #[error("the PCI bus has no free slot: it holds 32 devices, the host bridge among them")]
    Slots,
    /// The BAR window is used up.
    #[error("the PCI memory window has no room for another device")]
    Window,
}

struct Slot<F> {
    function: F,
    windows: BarWindows,
}

/// An address that a BAR decodes.
#[derive(Debug)]
pub struct BarHit<'a, F> {
    /// The function that answers.
    pub function: &'a mut F,
    /// Which of its BARs.
    pub bar: usize,
    /// Bytes into that BAR.
    pub offset: u64,
}

/// The root bus and its functions, each function 0 of its device.
pub struct PciBus<F> {
    slots: Vec<Slot<F>>,
    layout: PciLayout,
    next_bar: u64,
    address: u32,
}

impl<F: PciFunction> PciBus<F> {
    /// An empty bus. The host bridge is to be added first, to become 00:00.0.
    pub fn new(layout: PciLayout) -> Self {
        let next_bar = layout.window.start;
        Self {
            slots: Vec::new(),
            layout,
            next_bar,
            address: 0,
        }
    }

    /// Adds a function in the next slot, gives its BARs addresses, and returns its device
    /// number (0 to 31).
    pub fn add(&mut self, mut function: F) -> Result<u8, BusFull> {
        if self.slots.len() >= SLOTS {
            return Err(BusFull::Slots);
        }
        for (index, &size) in function.bar_sizes().iter().enumerate() {
            if size == 0 {
                continue;
            }
            let start = self
                .next_bar
                .checked_next_multiple_of(size)
                .ok_or(BusFull::Window)?;
            let end = start.checked_add(size).ok_or(BusFull::Window)?;
            if end > self.layout.window.end {
                return Err(BusFull::Window);
            }
            self.next_bar = end;
            function.config_write(register::BAR0 + 4 * index as u16, &start.to_le_bytes());
        }
        let windows = function.bar_windows();
        self.slots.push(Slot { function, windows });
        Ok(self.slots.len() as u8 - 1)
    }

    /// `IN` from a port of 0xcf8 to 0xcff, `size` 1, 2 or 4 bytes.
    pub fn port_read(&mut self, port: u16, size: u8) -> u32 {
        match (port, size) {
            (ADDRESS_PORT, 4) => self.address,
            (DATA_PORT..=0xcff, 1 | 2 | 4) if self.address & ADDRESS_ENABLE != 0 => {
                let mut data = [0xff; 4];
                let (slot, offset) = self.selected(port);
                if port - DATA_PORT + u16::from(size) <= 4 {
                    self.config_read(slot, offset, &mut data[..usize::from(size)]);
                }
                u32::from_le_bytes(data) & (u32::MAX >> (32 - 8 * u32::from(size)))
            }
            (_, 1..=3) => u32::MAX >> (32 - 8 * u32::from(size)),
            _ => u32::MAX,
        }
    }

    /// `OUT` to a port of 0xcf8 to 0xcff, `size` 1, 2 or 4 bytes.
    pub fn port_write(&mut self, port: u16, size: u8, value: u32) {
        match (port, size) {
            // Bits 30:24 and 1:0 are reserved.
            (ADDRESS_PORT, 4) => self.address = value & 0x80ff_fffc,
            (DATA_PORT..=0xcff, 1 | 2 | 4) if self.address & ADDRESS_ENABLE != 0 => {
                let (slot, offset) = self.selected(port);
                if port - DATA_PORT + u16::from(size) <= 4 {
                    self.config_write(slot, offset, &value.to_le_bytes()[..usize::from(size)]);
                }
            }
            _ => {}
        }
    }

    /// The slot and register that the address port selects; no slot for other buses and
    /// for functions but 0.
    fn selected(&self, port: u16) -> (usize, u16) {
        let device = (self.address >> 11 & 0x1f) as usize;
        let elsewhere = self.address & 0x00ff_0700 != 0;
        let slot = if elsewhere { usize::MAX } else { device };
        (slot, (self.address & 0xfc) as u16 + (port - DATA_PORT))
    }

    fn config_read(&mut self, slot: usize, offset: u16, data: &mut [u8]) {
        match self.slots.get_mut(slot) {
            Some(slot) => slot.function.config_read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn config_write(&mut self, slot: usize, offset: u16, data: &[u8]) {
        if let Some(slot) = self.slots.get_mut(slot) {
            slot.function.config_write(offset, data);
            slot.windows = slot.function.bar_windows();
        }
    }

    /// The slot and register that an address in ECAM stands for.
    fn ecam(&self, address: u64, length: usize) -> Option<(usize, u16)> {
        let offset = address.checked_sub(self.layout.ecam)?;
        if offset >= PciLayout::ECAM_SIZE {
            return None;
        }
        // Bits 19:15 device, 14:12 function, 11:0 register.
        let (index, register) = (offset / ECAM_FUNCTION_SIZE, offset % ECAM_FUNCTION_SIZE);
        let absent = index % 8 != 0 || register + length as u64 > ECAM_FUNCTION_SIZE;
        let slot = if absent {
            usize::MAX
        } else {
            index as usize / 8
        };
        Some((slot, register as u16))
    }

    /// Which function's BAR holds `length` bytes at `address`.
    pub fn decode(&mut self, address: u64, length: usize) -> Option<BarHit<'_, F>> {
        self.slots.iter_mut().find_map(|slot| {
            let (bar, offset) = (0..BAR_COUNT).find_map(|bar| {
                let window = slot.windows[bar]?;
                Some((bar, window.offset_of(address, length as u64)?))
            })?;
            Some(BarHit {
                function: &mut slot.function,
                bar,
                offset,
            })
        })
    }

    /// A load from ECAM. False if `address` is not in it.
    pub fn ecam_read(&mut self, address: u64, data: &mut [u8]) -> bool {
        let Some((slot, offset)) = self.ecam(address, data.len()) else {
            return false;
        };
        self.config_read(slot, offset, data);
        true
    }

    /// A store to ECAM. False if `address` is not in it.
    pub fn ecam_write(&mut self, address: u64, data: &[u8]) -> bool {
        let Some((slot, offset)) = self.ecam(address, data.len()) else {
            return false;
        };
        self.config_write(slot, offset, data);
        true
    }

    /// A load from ECAM or from a BAR. False, and `data` untouched, if nobody is there.
    pub fn mmio_read(&mut self, address: u64, data: &mut [u8]) -> bool {
        if self.ecam_read(address, data) {
            return true;
        }
        let Some(hit) = self.decode(address, data.len()) else {
            return false;
        };
        hit.function.bar_read(hit.bar, hit.offset, data);
        true
    }

    /// A store to ECAM or to a BAR. False if nobody is there.
    pub fn mmio_write(&mut self, address: u64, data: &[u8]) -> bool {
        if self.ecam_write(address, data) {
            return true;
        }
        let Some(hit) = self.decode(address, data.len()) else {
            return false;
        };
        hit.function.bar_write(hit.bar, hit.offset, data);
        true
    }
}

impl<F> std::fmt::Debug for PciBus<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let slots = self.slots.len();
        f.debug_struct("PciBus")
            .field("slots", &slots)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::{ConfigSpace, HostBridge, Identity};

    const LAYOUT: PciLayout = PciLayout {
        ecam: 0xe000_0000,
        window: 0xc000_0000..0xc000_3000,
    };

    /// A function with a BAR of 4 KiB that keeps the last byte written to it.
    struct Scratch(ConfigSpace, u8);

    impl Scratch {
        fn new() -> Self {
            let mut config = ConfigSpace::new(Identity {
                vendor: 0x1234,
                device: 0x5678,
                revision: 0,
                class: 0xff_00_00,
                subsystem_vendor: 0,
                subsystem: 0,
            });
            config.add_memory_bar(0, 0x1000);
            Self(config, 0)
        }
    }

    impl PciFunction for Scratch {
        fn config_read(&mut self, offset: u16, data: &mut [u8]) {
            self.0.read(offset, data);
        }
        fn config_write(&mut self, offset: u16, data: &[u8]) {
            self.0.write(offset, data);
        }
        fn bar_windows(&self) -> BarWindows {
            self.0.bar_windows()
        }
        fn bar_sizes(&self) -> [u64; BAR_COUNT] {
            self.0.bar_sizes()
        }
        fn bar_read(&mut self, _bar: usize, _offset: u64, data: &mut [u8]) {
            data.fill(self.1);
        }
        fn bar_write(&mut self, _bar: usize, _offset: u64, data: &[u8]) {
            self.1 = data[0];
        }
    }

    fn config_address(device: u32, register: u32) -> u32 {
        ADDRESS_ENABLE | device << 11 | register
    }

    fn bus() -> PciBus<Scratch> {
        let mut bus = PciBus::new(LAYOUT);
        bus.add(Scratch::new()).unwrap();
        bus.add(Scratch::new()).unwrap();
        bus
    }

    #[test]
    fn the_host_bridge_is_found_through_the_ports() {
        let mut bus = PciBus::new(LAYOUT);
        bus.add(HostBridge::new()).unwrap();

        bus.port_write(0xcf8, 4, config_address(0, 8));

        assert_eq!(bus.port_read(0xcf8, 4), config_address(0, 8));
        assert_eq!(bus.port_read(0xcfe, 2), 0x0600);
    }

    #[test]
    fn an_empty_slot_another_bus_and_another_function_read_all_ones() {
        let mut bus = bus();
        for address in [
            config_address(2, 0),
            config_address(0, 0) | 1 << 16,
            0x8000_0100,
        ] {
            bus.port_write(0xcf8, 4, address);
            assert_eq!(bus.port_read(0xcfc, 4), 0xffff_ffff);
            assert_eq!(bus.port_read(0xcfc, 2), 0xffff);
        }
    }

    #[test]
    fn ports_and_ecam_show_the_same_registers() {
        let mut bus = bus();
        let mut data = [0; 2];

        bus.port_write(0xcf8, 4, config_address(1, 0x3c));
        bus.port_write(0xcfc, 1, 0x0b);
        assert!(bus.mmio_read(0xe000_0000 + (1 << 15) + 0x3c, &mut data));

        assert_eq!(data, [0x0b, 0]);
    }

    #[test]
    fn a_bar_answers_where_the_guest_has_moved_it() {
        let mut bus = bus();
        let config = 0xe000_0000 + (1 << 15);
        assert!(!bus.mmio_write(0xc000_1000, &[7]));
        bus.mmio_write(config + 4, &[2, 0]);
        assert!(bus.mmio_write(0xc000_1000, &[7]));

        bus.mmio_write(config + 0x10, &0xd000_0000_u32.to_le_bytes());

        let mut data = [0];
        assert!(!bus.mmio_read(0xc000_1000, &mut data));
        assert!(bus.mmio_read(0xd000_0fff, &mut data));
        assert_eq!(data, [7]);
        assert!(!bus.mmio_read(0xd000_0fff, &mut [0; 2]));
    }

    #[test]
    fn a_full_window_or_bus_is_an_error() {
        let mut bus = bus();
        bus.add(Scratch::new()).unwrap();
        assert_eq!(bus.add(Scratch::new()).unwrap_err(), BusFull::Window);

        let mut bridges = PciBus::new(LAYOUT);
        for _ in 0..32 {
            bridges.add(HostBridge::new()).unwrap();
        }
        assert_eq!(bridges.add(HostBridge::new()).unwrap_err(), BusFull::Slots);
    }

    #[test]
    fn accesses_across_the_data_port_are_harmless() {
        let mut bus = bus();
        bus.port_write(0xcf8, 4, 0xffff_ffff);
        for port in 0xcf8..=0xcff {
            for size in [1, 2, 4] {
                bus.port_write(port, size, 0);
                bus.port_read(port, size);
            }
        }
        assert!(bus.mmio_read(0xe000_0fff, &mut [0; 8]));
    }
}
