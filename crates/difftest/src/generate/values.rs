//! Operand values: mostly edges, because edges are where CPUs and emulators differ.

#![expect(
    clippy::cast_precision_loss,
    reason = "rounded numbers are as good as others"
)]

use crate::layout;
use crate::rng::Rng;

/// A value for a general register.
pub(crate) fn integer(rng: &mut Rng) -> u64 {
    match rng.below(10) {
        0 => rng.below(8),
        1 => rng.pick(&[
            0,
            1,
            u64::MAX,
            0x7f,
            0x80,
            0xff,
            0x7fff,
            0x8000,
            0xffff,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_ffff,
            0x7fff_ffff_ffff_ffff,
            0x8000_0000_0000_0000,
            0x0000_7fff_ffff_ffff,
            0x0000_8000_0000_0000,
        ]),
        2 => (1_u64 << rng.below(64))
            .wrapping_add(rng.below(3))
            .wrapping_sub(1),
        3 => 0_u64.wrapping_sub(rng.below(0x1000)),
        4 => rng.bits() & 0xffff_ffff,
        5 => rng.bits() as i32 as u64,
        6 => rng.bits() & rng.bits() & rng.bits(),
        7 => layout::WRITABLE + rng.below(0x2000),
        _ => rng.bits(),
    }
}

/// An immediate of `bits` bits, as an unsigned number.
pub(crate) fn immediate(rng: &mut Rng, bits: u32) -> u64 {
    let value = match rng.below(4) {
        0 => rng.below(16),
        1 => rng.pick(&[
            1_u64 << (bits - 1),
            (1 << (bits - 1)) - 1,
            u64::MAX,
            0,
            31,
            32,
            33,
            63,
        ]),
        _ => rng.bits(),
    };
    if bits == 64 {
        value
    } else {
        value & ((1 << bits) - 1)
    }
}

/// A single-precision number, as its bits.
pub(crate) fn single(rng: &mut Rng) -> u32 {
    let sign = (rng.below(2) as u32) << 31;
    sign | match rng.below(12) {
        0 => 0,
        1 => 0x7f80_0000,
        2 => 0x7fc0_0000 | rng.bits() as u32 & 0x003f_ffff,
        3 => 0x7f80_0001 | rng.bits() as u32 & 0x003f_ffff,
        4 => rng.bits() as u32 & 0x007f_ffff,
        5 => rng.pick(&[1, 0x007f_ffff, 0x0080_0000, 0x7f7f_ffff]),
        6 => (rng.below(1 << 16) as f32).to_bits(),
        7 => ((rng.bits() as i32 as f32) / 65536.0).to_bits() & 0x7fff_ffff,
        8 => rng
            .pick(&[
                1.0_f32,
                0.5,
                2.0,
                3.0,
                0.1,
                2_147_483_648.0,
                4_294_967_296.0,
            ])
            .to_bits(),
        _ => rng.bits() as u32 & 0x7fff_ffff,
    }
}

/// A double-precision number, as its bits.
pub(crate) fn double(rng: &mut Rng) -> u64 {
    let sign = rng.below(2) << 63;
    sign | match rng.below(12) {
        0 => 0,
        1 => 0x7ff0_0000_0000_0000,
        2 => 0x7ff8_0000_0000_0000 | rng.bits() & 0x0007_ffff_ffff_ffff,
        3 => 0x7ff0_0000_0000_0001 | rng.bits() & 0x0007_ffff_ffff_ffff,
        4 => rng.bits() & 0x000f_ffff_ffff_ffff,
        5 => rng.pick(&[
            1,
            0x000f_ffff_ffff_ffff,
            0x0010_0000_0000_0000,
            0x7fef_ffff_ffff_ffff,
            0x36a0_0000_0000_0000,
        ]),
        6 => (rng.below(1 << 16) as f64).to_bits(),
        7 => ((rng.bits() as i64 as f64) / 4_294_967_296.0).to_bits() & i64::MAX as u64,
        8 => rng
            .pick(&[
                1.0_f64,
                0.5,
                2.0,
                0.1,
                2_147_483_648.0,
                9_223_372_036_854_775_808.0,
                1e300,
            ])
            .to_bits(),
        _ => rng.bits() & i64::MAX as u64,
    }
}

/// An extended-precision number, as its ten bytes: normal, denormal, infinite, not a
/// number, or of the kinds that the x87 no longer produces.
pub(crate) fn extended(rng: &mut Rng) -> [u8; 10] {
    let (exponent, mantissa) = match rng.below(12) {
        0 => (0, 0),
        1 => (0x7fff, 1 << 63),
        2 => (0x7fff, 3 << 62 | rng.bits() >> 2),
        3 => (0x7fff, 1 << 63 | 1 | rng.bits() >> 2),
        4 => (0, rng.bits() >> 1),
        5 => (0, 1 << 63 | rng.bits() >> 1),
        6 => (rng.below(0x7fff) as u16, rng.bits() >> 1),
        7 => (0x7fff, rng.bits() >> 1),
        8 => (0x3fff, 1 << 63),
        9 => (0x3ffe + rng.below(66) as u16, 1 << 63 | rng.bits() >> 1),
        10 => (
            0x3fff + rng.below(4) as u16,
            1 << 63 | (rng.bits() >> 60) << 59,
        ),
        _ => (rng.below(0x7fff) as u16, 1 << 63 | rng.bits() >> 1),
    };
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&mantissa.to_le_bytes());
    bytes[8..].copy_from_slice(&(exponent | (rng.below(2) as u16) << 15).to_le_bytes());
    bytes
}

/// 32 bytes for a vector register, of elements of one kind.
pub(crate) fn vector(rng: &mut Rng) -> [u8; 32] {
    let mut value = [0; 32];
    match rng.below(8) {
        0 => {}
        1 => value.fill(0xff),
        2 | 3 => {
            for chunk in value.chunks_exact_mut(4) {
                chunk.copy_from_slice(&single(rng).to_le_bytes());
            }
        }
        4 | 5 => {
            for chunk in value.chunks_exact_mut(8) {
                chunk.copy_from_slice(&double(rng).to_le_bytes());
            }
        }
        6 => {
            for byte in &mut value {
                *byte = rng.pick(&[0, 0x7f, 0x80, 0xff, 1]);
            }
        }
        _ => {
            for chunk in value.chunks_exact_mut(8) {
                chunk.copy_from_slice(&rng.bits().to_le_bytes());
            }
        }
    }
    value
}

/// Eight bytes of initial memory.
pub(crate) fn memory_word(rng: &mut Rng) -> [u8; 8] {
    match rng.below(6) {
        0 => integer(rng).to_le_bytes(),
        1 => double(rng).to_le_bytes(),
        2 | 3 => (u64::from(single(rng)) << 32 | u64::from(single(rng))).to_le_bytes(),
        4 => {
            let mut word = [0; 8];
            word.copy_from_slice(&extended(rng)[2..]);
            word
        }
        _ => rng.bits().to_le_bytes(),
    }
}

/// MXCSR: usually the default, sometimes other rounding, flush modes, sticky flags, and
/// now and then unmasked exceptions.
pub(crate) fn mxcsr(rng: &mut Rng) -> u32 {
    let mut value = 0x1f80;
    if rng.chance(40) {
        value |= (rng.below(4) as u32) << 13;
    }
    if rng.chance(15) {
        value |= 0x8000;
    }
    if rng.chance(15) {
        value |= 0x0040;
    }
    if rng.chance(20) {
        value |= rng.below(64) as u32;
    }
    if rng.chance(12) {
        value &= !((rng.below(64) as u32) << 7);
    }
    value
}
