//! Configuration space with a type 0 header (PCI Local Bus 3.0 §6.1): registers, each bit
//! read-only or writable, BARs that size themselves, and a list of capabilities.
//!
//! A function holds one and adds what its registers do; this file does nothing beside
//! remembering bits.

use bitflags::bitflags;

use super::{BAR_COUNT, BarWindows};

/// Offsets of header registers (PCI Local Bus 3.0 §6.1).
pub mod register {
    /// Vendor ID, 2 bytes.
    pub const VENDOR_ID: u16 = 0x00;
    /// Device ID, 2 bytes.
    pub const DEVICE_ID: u16 = 0x02;
    /// Command, 2 bytes.
    pub const COMMAND: u16 = 0x04;
    /// Status, 2 bytes.
    pub const STATUS: u16 = 0x06;
    /// Revision, 1 byte.
    pub const REVISION: u16 = 0x08;
    /// Programming interface, subclass and class, 3 bytes.
    pub const CLASS: u16 = 0x09;
    /// Cache line size, 1 byte.
    pub const CACHE_LINE_SIZE: u16 = 0x0c;
    /// The first base address register, 4 bytes each.
    pub const BAR0: u16 = 0x10;
    /// Subsystem vendor ID, 2 bytes.
    pub const SUBSYSTEM_VENDOR_ID: u16 = 0x2c;
    /// Subsystem ID, 2 bytes.
    pub const SUBSYSTEM_ID: u16 = 0x2e;
    /// Where the list of capabilities begins, 1 byte.
    pub const CAPABILITIES: u16 = 0x34;
    /// Interrupt line, 1 byte of scratch for software.
    pub const INTERRUPT_LINE: u16 = 0x3c;
}

/// Bytes of configuration space kept; the rest of the 4 KiB that ECAM shows reads 0.
const SIZE: usize = 256;
/// Where the header ends and capabilities may be put.
const HEADER_END: usize = 0x40;
/// Status bit 4: there is a capability list.
const STATUS_CAPABILITIES: u8 = 1 << 4;
/// BAR bits 2:1 = 10: a 64-bit memory BAR.
const BAR_MEMORY_64: u8 = 0b100;

bitflags! {
    /// The command register (PCI Local Bus 3.0 §6.2.2), as far as it can be set here.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Command: u16 {
        /// The function answers at its memory BARs.
        const MEMORY = 1 << 1;
        /// The function may write to memory.
        const BUS_MASTER = 1 << 2;
        /// The INTx pin is off.
        const INTX_DISABLE = 1 << 10;
    }
}

/// Who a function says it is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class, subclass and programming interface: 0xCCSSPP.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// A range of guest physical addresses that a BAR decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarWindow {
    /// First address.
    pub start: u64,
    /// Bytes, a power of two.
    pub size: u64,
}

impl BarWindow {
    /// The offset of an access of `length` bytes at `address`, if all of it is inside.
    pub fn offset_of(&self, address: u64, length: u64) -> Option<u64> {
        let offset = address.checked_sub(self.start)?;
        (offset < self.size && length <= self.size - offset).then_some(offset)
    }
}

/// The registers of one function.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    bar_sizes: [u64; BAR_COUNT],
    last_capability: Option<usize>,
    free: usize,
}

impl ConfigSpace {
    /// A header with no BARs and no capabilities.
    pub fn new(identity: Identity) -> Self {
        let mut config = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            bar_sizes: [0; BAR_COUNT],
            last_capability: None,
            free: HEADER_END,
        };
        config.set(register::VENDOR_ID, &identity.vendor.to_le_bytes());
        config.set(register::DEVICE_ID, &identity.device.to_le_bytes());
        config.set(register::REVISION, &[identity.revision]);
        config.set(register::CLASS, &identity.class.to_le_bytes()[..3]);
        config.set(
            register::SUBSYSTEM_VENDOR_ID,
            &identity.subsystem_vendor.to_le_bytes(),
        );
        config.set(register::SUBSYSTEM_ID, &identity.subsystem.to_le_bytes());
        config.allow(register::COMMAND, &Command::all().bits().to_le_bytes());
        config.allow(register::CACHE_LINE_SIZE, &[0xff]);
        config.allow(register::INTERRUPT_LINE, &[0xff]);
        config
    }

    /// Sets bytes whatever their writability. Host-side set-up: `offset` is the model's.
    pub fn set(&mut self, offset: u16, value: &[u8]) {
        let start = usize::from(offset);
        self.bytes[start..start + value.len()].copy_from_slice(value);
    }

    /// Lets the guest write the bits that are set in `mask`. Host-side set-up.
    pub fn allow(&mut self, offset: u16, mask: &[u8]) {
        let start = usize::from(offset);
        self.writable[start..start + mask.len()].copy_from_slice(mask);
    }

    /// Adds a 64-bit memory BAR of `size` bytes in the registers `index` and `index + 1`.
    ///
    /// # Panics
    /// If `size` is no power of two of at least 16, or `index` is above 4.
    pub fn add_memory_bar(&mut self, index: usize, size: u64) {
        assert!(size.is_power_of_two() && size >= 16 && index + 1 < BAR_COUNT);
        self.bar_sizes[index] = size;
        let offset = register::BAR0 + 4 * index as u16;
        self.allow(offset, &(!(size - 1)).to_le_bytes());
        self.set(offset, &[BAR_MEMORY_64]);
    }

    /// The sizes of the BARs in bytes, 0 for absent ones.
    pub fn bar_sizes(&self) -> [u64; BAR_COUNT] {
        self.bar_sizes
    }

    /// Adds a capability: its ID, and `body`, which begins at its third byte. Returns the
    /// offset of the ID. Its bytes are read-only until [`ConfigSpace::allow`].
    ///
    /// # Panics
    /// If the capabilities do not fit: a mistake in the model, not of the guest.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> u16 {
        let start = self.free;
        let end = start + 2 + body.len();
        assert!(end <= SIZE, "capabilities exceed configuration space");
        self.bytes[start] = id;
        self.bytes[start + 2..end].copy_from_slice(body);
        let link = self
            .last_capability
            .map_or(usize::from(register::CAPABILITIES), |c| c + 1);
        self.bytes[link] = start as u8;
        self.bytes[usize::from(register::STATUS)] |= STATUS_CAPABILITIES;
        self.last_capability = Some(start);
        self.free = end.next_multiple_of(4);
        start as u16
    }

    /// Reads bytes; those beyond the 256 kept read 0.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// Writes the writable bits of bytes.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (at, value) in (usize::from(offset)..).zip(data) {
            if let (Some(byte), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = *byte & !mask | value & mask;
            }
        }
    }

    /// Two bytes at `offset`, little endian.
    pub fn read_u16(&self, offset: u16) -> u16 {
        let mut data = [0; 2];
        self.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    /// Four bytes at `offset`, little endian.
    pub fn read_u32(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// The command register.
    pub fn command(&self) -> Command {
        Command::from_bits_truncate(self.read_u16(register::COMMAND))
    }

    /// What the BARs decode: nothing while the command register's memory bit is clear.
    pub fn bar_windows(&self) -> BarWindows {
        let mut windows = [None; BAR_COUNT];
        if !self.command().contains(Command::MEMORY) {
            return windows;
        }
        for (index, window) in windows.iter_mut().enumerate() {
            let size = self.bar_sizes[index];
            let offset = register::BAR0 + 4 * index as u16;
            if size != 0 {
                let low = u64::from(self.read_u32(offset));
                let high = u64::from(self.read_u32(offset + 4));
                let start = (high << 32 | low) & !(size - 1);
                *window = start.checked_add(size).map(|_| BarWindow { start, size });
            }
        }
        windows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> ConfigSpace {
        ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0x01_80_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x40,
        })
    }

    #[test]
    fn identity_is_read_only() {
        let mut config = config();

        config.write(register::VENDOR_ID, &[0; 4]);

        assert_eq!(config.read_u32(register::VENDOR_ID), 0x1042_1af4);
        assert_eq!(config.read_u32(register::REVISION), 0x0180_0001);
    }

    #[test]
    fn a_bar_tells_its_size_when_all_ones_are_written() {
        let mut config = config();
        config.add_memory_bar(0, 0x8000);

        config.write(register::BAR0, &[0xff; 8]);

        assert_eq!(config.read_u32(register::BAR0), 0xffff_8004);
        assert_eq!(config.read_u32(register::BAR0 + 4), 0xffff_ffff);
    }

    #[test]
    fn a_bar_decodes_only_while_memory_is_enabled() {
        let mut config = config();
        config.add_memory_bar(2, 0x1000);
        config.write(register::BAR0 + 8, &0x2_c000_0000_u64.to_le_bytes());

        assert_eq!(config.bar_windows(), [None; BAR_COUNT]);

        config.write(register::COMMAND, &Command::MEMORY.bits().to_le_bytes());
        let window = BarWindow {
            start: 0x2_c000_0000,
            size: 0x1000,
        };
        assert_eq!(config.bar_windows()[2], Some(window));
    }

    #[test]
    fn a_bar_at_the_end_of_the_address_space_does_not_overflow() {
        let mut config = config();
        config.add_memory_bar(0, 0x1000);
        config.write(register::COMMAND, &[0xff; 2]);

        config.write(register::BAR0, &[0xff; 8]);

        assert_eq!(config.bar_windows()[0], None);
    }

    #[test]
    fn capabilities_form_a_list_from_the_header() {
        let mut config = config();

        let first = config.add_capability(0x11, &[1, 2, 3]);
        let second = config.add_capability(0x09, &[4]);

        assert_eq!(config.read_u16(register::CAPABILITIES) & 0xff, first);
        assert_eq!(config.read_u16(first), 0x11 | second << 8);
        assert_eq!(config.read_u16(second), 0x09);
        assert_ne!(config.read_u16(register::STATUS) & 1 << 4, 0);
    }

    #[test]
    fn extended_space_reads_zero() {
        let mut data = [0xaa; 4];

        config().read(0xffe, &mut data);

        assert_eq!(data, [0; 4]);
    }
}
