//! The pvpanic device: one port through which a guest says that it has panicked.
//! Described to the guest by the ACPI device QEMU0001. Called by the machine, which
//! decides what becomes of it.

use bitflags::bitflags;

/// Its I/O port.
pub const PVPANIC_PORT: u16 = 0x505;

bitflags! {
    /// What the guest can tell.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Events: u8 {
        /// It panicked.
        const PANICKED = 1 << 0;
        /// It panicked and a crash kernel takes over.
        const CRASH_LOADED = 1 << 1;
    }
}

/// `IN`: the events that are understood.
pub fn read() -> u8 {
    Events::all().bits()
}

/// `OUT`: what the guest tells; unknown bits are dropped.
pub fn write(value: u8) -> Events {
    Events::from_bits_truncate(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_events_are_offered_and_understood() {
        assert_eq!(read(), 3);
        assert_eq!(write(1), Events::PANICKED);
        assert_eq!(write(0xfe), Events::CRASH_LOADED);
    }
}
