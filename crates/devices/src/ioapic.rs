//! The I/O APIC (Intel 82093AA): 24 pins, each turned into an interrupt message.
//!
//! Called by the machine: MMIO at [`IOAPIC_BASE`], pin levels from devices, and ends of
//! interrupts from local APICs. What comes back are [`Message`]s to deliver; it never
//! looks for their target itself.

use bitflags::bitflags;

/// Where it is in guest physical memory.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Bytes of MMIO.
pub const IOAPIC_SIZE: u64 = 0x1000;
/// Number of pins, which are the global system interrupts 0 to 23.
pub const PINS: u8 = 24;

/// `IOREGSEL`: selects what `IOWIN` shows.
const SELECT: u64 = 0x00;
/// `IOWIN`.
const WINDOW: u64 = 0x10;
/// `EOIR`: ends the interrupts of a vector (version 0x20 only).
const EOI: u64 = 0x40;

const REGISTER_ID: u8 = 0x00;
const REGISTER_VERSION: u8 = 0x01;
const REGISTER_ARBITRATION: u8 = 0x02;
const REGISTER_TABLE: u8 = 0x10;

/// Version 0x20: with an EOI register.
const VERSION: u32 = 0x20 | (PINS as u32 - 1) << 16;

bitflags! {
    /// The flags of a redirection table entry. Vector (7:0), delivery mode (10:8) and
    /// destination (63:56) are numbers.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Redirection: u64 {
        const LOGICAL = 1 << 11;
        const REMOTE_IRR = 1 << 14;
        const LEVEL = 1 << 15;
        const MASKED = 1 << 16;
        const _ = !0;
    }
}

/// Vector, delivery mode, destination mode, polarity, trigger mode, mask, destination.
const WRITABLE: u64 = 0xff00_0000_0001_afff;

/// An interrupt message for the local APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// APIC ID, or logical destination if `logical`.
    pub destination: u8,
    /// How `destination` is meant.
    pub logical: bool,
    /// 0 fixed, 1 lowest priority, 2 SMI, 4 NMI, 5 INIT, 7 external.
    pub delivery_mode: u8,
    /// The interrupt vector.
    pub vector: u8,
    /// Level-triggered.
    pub level: bool,
}

/// The I/O APIC's registers and pin levels.
#[derive(Clone, Debug)]
pub struct IoApic {
    id: u8,
    select: u8,
    table: [u64; PINS as usize],
    /// One bit a pin: the line is asserted.
    lines: u32,
}

impl Default for IoApic {
    fn default() -> Self {
        Self::new()
    }
}

impl IoApic {
    /// The state after reset: all pins masked.
    pub fn new() -> Self {
        let table = [Redirection::MASKED.bits(); PINS as usize];
        Self {
            id: 0,
            select: 0,
            table,
            lines: 0,
        }
    }

    /// A load, `offset` bytes into the MMIO page.
    pub fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            SELECT => u32::from(self.select),
            WINDOW => self.read_register(),
            _ => 0,
        };
        data.fill(0);
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    /// A store, `offset` bytes into the MMIO page. A write can unmask a pin that is
    /// asserted, or end an interrupt whose line still is: then there are messages.
    pub fn mmio_write(&mut self, offset: u64, data: &[u8]) -> Vec<Message> {
        let Some(&low) = data.first() else {
            return Vec::new();
        };
        match offset {
            SELECT => self.select = low,
            WINDOW => {
                let Ok(value) = data.try_into().map(u32::from_le_bytes) else {
                    return Vec::new();
                };
                return self.write_register(value).into_iter().collect();
            }
            EOI => return self.end_of_interrupt(low),
            _ => {}
        }
        Vec::new()
    }

    fn read_register(&self) -> u32 {
        match self.select {
            REGISTER_ID | REGISTER_ARBITRATION => u32::from(self.id) << 24,
            REGISTER_VERSION => VERSION,
            _ => match self.selected() {
                Some((pin, 0)) => self.table[pin] as u32,
                Some((pin, _)) => (self.table[pin] >> 32) as u32,
                None => 0,
            },
        }
    }

    /// The table entry and half (0 low, 1 high) that `IOREGSEL` selects.
    fn selected(&self) -> Option<(usize, u8)> {
        let index = self.select.checked_sub(REGISTER_TABLE)?;
        (index < 2 * PINS).then_some((usize::from(index / 2), index % 2))
    }

    fn write_register(&mut self, value: u32) -> Option<Message> {
        if self.select == REGISTER_ID {
            self.id = (value >> 24) as u8 & 0xf;
            return None;
        }
        let (pin, half) = self.selected()?;
        let old = self.table[pin];
        let merged = match half {
            0 => old >> 32 << 32 | u64::from(value),
            _ => old & 0xffff_ffff | u64::from(value) << 32,
        };
        let mut new = merged & WRITABLE | old & Redirection::REMOTE_IRR.bits();
        if new & Redirection::LEVEL.bits() == 0 {
            // An edge has no remote IRR. Linux switches a pin to edge and back to clear it.
            new &= !Redirection::REMOTE_IRR.bits();
        }
        self.table[pin] = new;
        if self.is_asserted(pin) {
            self.raise_level(pin)
        } else {
            None
        }
    }

    fn is_asserted(&self, pin: usize) -> bool {
        self.lines & 1 << pin != 0
    }

    fn message(&self, pin: usize) -> Message {
        let entry = self.table[pin];
        let flags = Redirection::from_bits_retain(entry);
        Message {
            destination: (entry >> 56) as u8,
            logical: flags.contains(Redirection::LOGICAL),
            delivery_mode: (entry >> 8 & 7) as u8,
            vector: entry as u8,
            level: flags.contains(Redirection::LEVEL),
        }
    }

    /// The message of an asserted level-triggered pin that nobody is serving yet.
    fn raise_level(&mut self, pin: usize) -> Option<Message> {
        let flags = Redirection::from_bits_retain(self.table[pin]);
        let quiet = Redirection::MASKED | Redirection::REMOTE_IRR;
        if flags.intersects(quiet) || !flags.contains(Redirection::LEVEL) {
            return None;
        }
        self.table[pin] |= Redirection::REMOTE_IRR.bits();
        Some(self.message(pin))
    }

    /// A device drives `pin` (0 to 23) to a level, asserted or not. Polarity is the
    /// device's and the table's agreement and needs no translation here.
    pub fn set_line(&mut self, pin: u8, asserted: bool) -> Option<Message> {
        if pin >= PINS {
            return None;
        }
        let index = usize::from(pin);
        let rising = asserted && !self.is_asserted(index);
        self.lines = self.lines & !(1 << pin) | u32::from(asserted) << pin;
        if !asserted {
            return None;
        }
        let flags = Redirection::from_bits_retain(self.table[index]);
        if flags.contains(Redirection::LEVEL) {
            return self.raise_level(index);
        }
        // A masked edge is lost, as on the chip.
        (rising && !flags.contains(Redirection::MASKED)).then(|| self.message(index))
    }

    /// A level-triggered interrupt of `vector` ended. Lines that are still asserted raise
    /// it again.
    pub fn end_of_interrupt(&mut self, vector: u8) -> Vec<Message> {
        let mut messages = Vec::new();
        for pin in 0..usize::from(PINS) {
            let served = Redirection::LEVEL | Redirection::REMOTE_IRR;
            let flags = Redirection::from_bits_retain(self.table[pin]);
            if self.table[pin] as u8 != vector || !flags.contains(served) {
                continue;
            }
            self.table[pin] &= !Redirection::REMOTE_IRR.bits();
            if self.is_asserted(pin) {
                messages.extend(self.raise_level(pin));
            }
        }
        messages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEVEL: u32 = 1 << 15;
    const MASKED: u32 = 1 << 16;

    fn write(ioapic: &mut IoApic, register: u8, value: u32) -> Vec<Message> {
        ioapic.mmio_write(SELECT, &u32::from(register).to_le_bytes());
        ioapic.mmio_write(WINDOW, &value.to_le_bytes())
    }

    fn read(ioapic: &mut IoApic, register: u8) -> u32 {
        let mut data = [0; 4];
        ioapic.mmio_write(SELECT, &[register]);
        ioapic.mmio_read(WINDOW, &mut data);
        u32::from_le_bytes(data)
    }

    fn with_pin(pin: u8, low: u32) -> IoApic {
        let mut ioapic = IoApic::new();
        write(&mut ioapic, REGISTER_TABLE + 2 * pin + 1, 2 << 24);
        write(&mut ioapic, REGISTER_TABLE + 2 * pin, low);
        ioapic
    }

    fn message(vector: u8, level: bool) -> Message {
        Message {
            destination: 2,
            logical: false,
            delivery_mode: 0,
            vector,
            level,
        }
    }

    #[test]
    fn the_version_tells_24_pins_and_all_are_masked_at_reset() {
        let mut ioapic = IoApic::new();

        assert_eq!(read(&mut ioapic, REGISTER_VERSION), 0x0017_0020);
        for pin in 0..PINS {
            assert_eq!(read(&mut ioapic, REGISTER_TABLE + 2 * pin), MASKED);
        }
    }

    #[test]
    fn read_only_bits_of_an_entry_keep_their_value() {
        let mut ioapic = with_pin(3, u32::MAX);

        assert_eq!(read(&mut ioapic, REGISTER_TABLE + 6), 0x0001_afff);
        write(&mut ioapic, REGISTER_TABLE + 7, u32::MAX);
        assert_eq!(read(&mut ioapic, REGISTER_TABLE + 7), 0xff00_0000);
    }

    #[test]
    fn an_edge_sends_one_message_for_each_rise() {
        let mut ioapic = with_pin(4, 0x31);

        assert_eq!(ioapic.set_line(4, true), Some(message(0x31, false)));
        assert_eq!(ioapic.set_line(4, true), None);
        assert_eq!(ioapic.set_line(4, false), None);
        assert_eq!(ioapic.set_line(4, true), Some(message(0x31, false)));
    }

    #[test]
    fn a_masked_edge_is_lost() {
        let mut ioapic = with_pin(4, MASKED | 0x31);

        assert_eq!(ioapic.set_line(4, true), None);
        assert_eq!(write(&mut ioapic, REGISTER_TABLE + 8, 0x31), []);
    }

    #[test]
    fn a_level_is_raised_once_until_its_end_and_again_while_asserted() {
        let mut ioapic = with_pin(9, LEVEL | 0x41);

        assert_eq!(ioapic.set_line(9, true), Some(message(0x41, true)));
        assert_eq!(ioapic.set_line(9, true), None);
        assert_eq!(ioapic.end_of_interrupt(0x40), []);
        assert_eq!(ioapic.end_of_interrupt(0x41), [message(0x41, true)]);
        ioapic.set_line(9, false);
        assert_eq!(ioapic.end_of_interrupt(0x41), []);
    }

    #[test]
    fn unmasking_an_asserted_level_raises_it() {
        let mut ioapic = with_pin(9, MASKED | LEVEL | 0x41);
        assert_eq!(ioapic.set_line(9, true), None);

        let raised = write(&mut ioapic, REGISTER_TABLE + 18, LEVEL | 0x41);

        assert_eq!(raised, [message(0x41, true)]);
    }

    #[test]
    fn switching_a_pin_to_edge_forgets_that_it_is_being_served() {
        let mut ioapic = with_pin(9, LEVEL | 0x41);
        ioapic.set_line(9, true);
        assert_ne!(read(&mut ioapic, REGISTER_TABLE + 18) & 1 << 14, 0);

        write(&mut ioapic, REGISTER_TABLE + 18, MASKED | 0x41);

        assert_eq!(read(&mut ioapic, REGISTER_TABLE + 18) & 1 << 14, 0);
    }

    #[test]
    fn the_eoi_register_ends_an_interrupt() {
        let mut ioapic = with_pin(9, LEVEL | 0x41);
        ioapic.set_line(9, true);

        assert_eq!(
            ioapic.mmio_write(EOI, &[0x41, 0, 0, 0]),
            [message(0x41, true)]
        );
    }

    #[test]
    fn accesses_of_any_register_and_width_are_harmless() {
        let mut ioapic = IoApic::new();
        for select in 0..=255 {
            for offset in 0..0x50 {
                for length in 0..=8 {
                    ioapic.mmio_write(SELECT, &[select]);
                    ioapic.mmio_write(offset, &[0xff; 8][..length]);
                    ioapic.mmio_read(offset, &mut [0; 8][..length]);
                }
            }
        }
        assert_eq!(ioapic.set_line(24, true), None);
    }
}
