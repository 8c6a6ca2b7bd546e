//! Register numbers and bit layouts of the local APIC (Intel SDM vol. 3A §11.4 to §11.12).

use bitflags::bitflags;

/// MMIO offsets; the x2APIC MSR is `0x800 + offset / 16`.
pub(super) mod offset {
    pub(in crate::lapic) const ID: u32 = 0x020;
    pub(in crate::lapic) const VERSION: u32 = 0x030;
    pub(in crate::lapic) const TPR: u32 = 0x080;
    pub(in crate::lapic) const PPR: u32 = 0x0a0;
    pub(in crate::lapic) const EOI: u32 = 0x0b0;
    pub(in crate::lapic) const LDR: u32 = 0x0d0;
    pub(in crate::lapic) const DFR: u32 = 0x0e0;
    pub(in crate::lapic) const SVR: u32 = 0x0f0;
    pub(in crate::lapic) const ISR: u32 = 0x100;
    pub(in crate::lapic) const ISR_END: u32 = 0x170;
    pub(in crate::lapic) const TMR: u32 = 0x180;
    pub(in crate::lapic) const TMR_END: u32 = 0x1f0;
    pub(in crate::lapic) const IRR: u32 = 0x200;
    pub(in crate::lapic) const IRR_END: u32 = 0x270;
    pub(in crate::lapic) const ESR: u32 = 0x280;
    pub(in crate::lapic) const ICR: u32 = 0x300;
    pub(in crate::lapic) const ICR_HIGH: u32 = 0x310;
    pub(in crate::lapic) const LVT_TIMER: u32 = 0x320;
    pub(in crate::lapic) const LVT_ERROR: u32 = 0x370;
    pub(in crate::lapic) const INITIAL_COUNT: u32 = 0x380;
    pub(in crate::lapic) const CURRENT_COUNT: u32 = 0x390;
    pub(in crate::lapic) const DIVIDE: u32 = 0x3e0;
    pub(in crate::lapic) const SELF_IPI: u32 = 0x3f0;
}

bitflags! {
    /// Error status register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Esr: u32 {
        const SEND_ILLEGAL_VECTOR = 1 << 5;
        const RECEIVE_ILLEGAL_VECTOR = 1 << 6;
        const ILLEGAL_REGISTER = 1 << 7;
    }
}

/// The local vector table: timer, thermal, performance, LINT0, LINT1, error.
pub(super) struct Lvt;

impl Lvt {
    pub(super) const COUNT: usize = 6;
    pub(super) const TIMER: usize = 0;
    pub(super) const ERROR: usize = 5;
    /// Bit 16: the event is dropped.
    pub(super) const MASKED: u32 = 1 << 16;

    /// The entry of a register from `LVT_TIMER` to `LVT_ERROR`.
    pub(super) fn index(register: u32) -> usize {
        (((register - offset::LVT_TIMER) >> 4) as usize).min(Self::COUNT - 1)
    }
}

/// Interrupt command register.
#[derive(Clone, Copy)]
pub(super) struct Icr(pub(super) u64);

pub(super) enum DeliveryMode {
    Fixed,
    LowestPriority,
    Smi,
    Reserved,
    Nmi,
    Init,
    Startup,
}

impl Icr {
    /// All but the reserved bits 31:20, 17:16, 13 and the xAPIC's delivery status, bit 12.
    pub(super) const WRITABLE_X2APIC: u64 = 0xffff_ffff_000c_cfff;

    pub(super) fn vector(self) -> u8 {
        self.0 as u8
    }

    pub(super) fn mode(self) -> DeliveryMode {
        match self.0 >> 8 & 7 {
            0 => DeliveryMode::Fixed,
            1 => DeliveryMode::LowestPriority,
            2 => DeliveryMode::Smi,
            4 => DeliveryMode::Nmi,
            5 => DeliveryMode::Init,
            6 => DeliveryMode::Startup,
            _ => DeliveryMode::Reserved,
        }
    }

    pub(super) fn is_logical(self) -> bool {
        self.0 & 1 << 11 != 0
    }

    /// Level-triggered with the level bit clear.
    pub(super) fn is_deassert(self) -> bool {
        self.0 & 1 << 15 != 0 && self.0 & 1 << 14 == 0
    }

    pub(super) fn shorthand(self) -> u64 {
        self.0 >> 18 & 3
    }

    pub(super) fn high(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// The bits of a register that software may set; writing others is #GP in x2APIC mode.
pub(super) fn writable(register: u32) -> u32 {
    match register {
        offset::TPR | offset::SELF_IPI => 0xff,
        offset::SVR => 0x1ff,
        // Vector, mask, timer mode.
        offset::LVT_TIMER => 0x7_00ff,
        // Thermal and performance: vector, delivery mode, mask.
        0x330 | 0x340 => 0x1_07ff,
        // LINT0, LINT1: polarity and trigger mode as well.
        0x350 | 0x360 => 0x1_a7ff,
        offset::LVT_ERROR => 0x1_00ff,
        offset::INITIAL_COUNT => u32::MAX,
        offset::DIVIDE => 0b1011,
        // EOI and ESR take 0 only; the rest is read-only and refused later.
        _ => 0,
    }
}

/// One bit for each of the 256 vectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Bits([u32; 8]);

impl Bits {
    pub(super) fn word(&self, index: usize) -> u32 {
        self.0[index & 7]
    }

    pub(super) fn get(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 5)] & 1 << (vector & 31) != 0
    }

    pub(super) fn set(&mut self, vector: u8, value: bool) {
        let word = &mut self.0[usize::from(vector >> 5)];
        *word = *word & !(1 << (vector & 31)) | u32::from(value) << (vector & 31);
    }

    pub(super) fn highest(&self) -> Option<u8> {
        let (index, word) = self.0.iter().enumerate().rfind(|(_, word)| **word != 0)?;
        Some(index as u8 * 32 + word.ilog2() as u8)
    }
}
