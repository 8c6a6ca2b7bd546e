//! Initial state: registers, flags, extended state.

use crate::case::{MXCSR_OFFSET, Registers, ST_OFFSET, Xsave};
use crate::generate::values;
use crate::layout::{EDGE, PAGE, STACK, STACK_END, WRITABLE};
use crate::rng::Rng;

/// RFLAGS bits (Intel SDM vol. 1 §3.4.3).
pub(crate) mod rflags {
    pub(crate) const FIXED: u64 = 1 << 1;
    pub(crate) const STATUS: u64 = 0x8d5;
    pub(crate) const TF: u64 = 1 << 8;
    pub(crate) const IF: u64 = 1 << 9;
    pub(crate) const DF: u64 = 1 << 10;
    pub(crate) const NT: u64 = 1 << 14;
    pub(crate) const AC: u64 = 1 << 18;
    pub(crate) const ID: u64 = 1 << 21;
}

/// Integer registers: pointers into the data pages, edges and noise.
pub(super) fn registers(rng: &mut Rng) -> Registers {
    let mut registers = Registers::default();
    for value in &mut registers.gpr {
        *value = if rng.chance(40) {
            WRITABLE + rng.below(2 * PAGE)
        } else {
            values::integer(rng)
        };
    }
    registers.gpr[4] = stack_pointer(rng);
    registers.rflags = rflags::FIXED | rflags::IF | rng.bits() & rflags::STATUS;
    if rng.chance(12) {
        registers.rflags |= rflags::DF;
    }
    if rng.chance(1) {
        registers.rflags |= rflags::TF;
    }
    if rng.chance(1) {
        registers.rflags |= rflags::AC;
    }
    registers
}

/// A stack pointer: mostly inside the stack, sometimes where pushes or pops leave it.
pub(super) fn stack_pointer(rng: &mut Rng) -> u64 {
    match rng.below(24) {
        0 => STACK + rng.below(17),
        1 => STACK_END - rng.below(17),
        2 => STACK + PAGE - 8 + rng.below(17),
        3 => EDGE - 8 + rng.below(16),
        4 => STACK + 512 + rng.below(2 * PAGE - 1024),
        5 => super::memory::non_canonical(rng),
        _ => STACK + 512 + 16 * rng.below((2 * PAGE - 1024) / 16),
    }
}

/// A value for POPF, with the bits that ring 3 may or may not change.
pub(super) fn popped_flags(rng: &mut Rng) -> u64 {
    let mut value = rng.bits() & (rflags::STATUS | rflags::DF);
    if rng.chance(30) {
        // IF, IOPL, and what reads as zero
        value |= rng.bits() & 0xffff_ffff_ffc3_b228;
    }
    for (bit, percent) in [
        (rflags::TF, 4),
        (rflags::AC, 4),
        (rflags::NT, 8),
        (rflags::ID, 10),
    ] {
        if rng.chance(percent) {
            value |= bit;
        }
    }
    value
}

/// x87, SSE and AVX state.
pub(super) fn extended(rng: &mut Rng) -> Xsave {
    let mut area = Xsave::initial();
    for register in 0..16 {
        let mut value = values::vector(rng);
        if rng.chance(20) {
            value[16..].fill(0);
        }
        area.set_ymm(register, &value);
    }
    area.0[MXCSR_OFFSET..MXCSR_OFFSET + 4].copy_from_slice(&values::mxcsr(rng).to_le_bytes());
    x87(rng, &mut area);
    area
}

fn x87(rng: &mut Rng, area: &mut Xsave) {
    let mut control = 0x037f_u16;
    if rng.chance(30) {
        // rounding and precision control; precision 1 is reserved
        control = control & !0x0f00 | (rng.below(4) as u16) << 10 | rng.pick(&[0, 2, 3, 3]) << 8;
    }
    if rng.chance(10) {
        control &= !(rng.below(64) as u16);
    }
    let top = if rng.chance(60) {
        0
    } else {
        rng.below(8) as u16
    };
    let mut status = top << 11 | rng.bits() as u16 & 0x4700;
    if rng.chance(15) {
        status |= rng.below(128) as u16;
    }
    // an unmasked exception pending, which the next waiting instruction reports
    if status & !control & 0x3f != 0 {
        if rng.chance(30) {
            status |= 0x8080;
        } else {
            status &= !0x3f;
        }
    }
    let tags = rng.pick(&[0, 0xff, 0x0f, 0xf0, rng.clone().bits() as u8, 0xff]);
    area.0[0..2].copy_from_slice(&control.to_le_bytes());
    area.0[2..4].copy_from_slice(&status.to_le_bytes());
    area.0[4] = tags;
    for register in 0..8 {
        let at = ST_OFFSET + 16 * register;
        let value = if rng.chance(15) {
            // as MMX leaves a register
            let mut bytes = [0xff; 10];
            bytes[..8].copy_from_slice(&rng.bits().to_le_bytes());
            bytes
        } else {
            values::extended(rng)
        };
        area.0[at..at + 10].copy_from_slice(&value);
    }
}
