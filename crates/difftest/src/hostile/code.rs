//! Random code: bytes as they come, instructions of every form with operands that are where it
//! hurts, and the ones that change what the machine is. Used by `hostile`.

use super::{CODE, CODE_SIZE, RAM, STACK_TOP, tables};
use crate::rng::Rng;

/// MSRs that mean something to the CPU or to what is around it.
const MSRS: [u32; 30] = [
    0x10,
    0x1b,
    0x48,
    0x49,
    0x8b,
    0xfe,
    0x10a,
    0x174,
    0x175,
    0x176,
    0x1a0,
    0x1d9,
    0x277,
    0x2ff,
    0x6e0,
    0x802,
    0x80b,
    0x830,
    0xc000_0080,
    0xc000_0080,
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0100,
    0xc000_0101,
    0xc000_0102,
    0xc000_0103,
    0x4b56_4d00,
    0x4b56_4d01,
];

/// Control-register contents, to be mixed.
const CONTROLS: [u64; 10] = [
    0,
    1,
    0x8000_0001,
    0x8005_0033,
    0xe005_003f,
    0x20,
    0x620,
    0x0035_06f0,
    0x0037_0ef8,
    tables::FIRST,
];

/// A number that is an address at the edge of something, or a count, or anything.
pub(super) fn value(rng: &mut Rng) -> u64 {
    let edge = match rng.below(16) {
        0..4 => rng.below(0x10) * 0x1000,
        4..6 => tables::address(rng),
        6 => RAM,
        7 => RAM - 0x1000 * rng.below(4),
        8 => rng.pick(&[0xc000_0000, 0x1_0000_0000, 0xfee0_0000, 0xf_ffff_ffff_f000]),
        9 => rng.pick(&[
            0x7fff_ffff_ffff,
            0xffff_8000_0000_0000,
            0xffff_ffff_8000_0000,
        ]),
        10 => 0x20_0000 * rng.below(3),
        11 => 0xffff_8000_0000_0000 | rng.below(RAM),
        12 => CODE + rng.below(CODE_SIZE),
        13 => rng.below(0x100),
        14 => 1 << rng.below(64),
        _ => rng.bits(),
    };
    edge.wrapping_add(rng.below(36)).wrapping_sub(rng.below(36))
}

/// An address in low memory, mostly the code's own.
fn near(rng: &mut Rng) -> u16 {
    let at = match rng.below(8) {
        0..4 => CODE + rng.below(CODE_SIZE),
        4 => CODE + 0x1000 * (1 + rng.below(3)) - rng.below(9),
        5 => STACK_TOP - rng.below(0x100),
        _ => rng.below(0x1_0000),
    };
    at as u16
}

/// A random piece of code for a segment of `bits` bits: seldom more than a few instructions.
pub(super) fn piece(rng: &mut Rng, bits: u32) -> Vec<u8> {
    match rng.below(24) {
        0 => rng.bits().to_le_bytes().to_vec(),
        1..10 => form(rng, bits),
        10 => [load(rng, bits), form(rng, bits)].concat(),
        11 => [load(rng, bits), string(rng)].concat(),
        12 => control(rng, bits),
        13 => msr(rng, bits),
        14 | 15 => store(rng, bits),
        16 | 17 => system(rng),
        18 | 19 => transfer(rng, bits),
        20 => atomic(rng, bits),
        21 => segment(rng, bits),
        22 => extended(rng, bits),
        _ => trap(rng, bits),
    }
}

/// MOV of an immediate to a register, as wide as can be.
fn load(rng: &mut Rng, bits: u32) -> Vec<u8> {
    load_into(rng.below(8) as u8, value(rng), rng, bits)
}

fn load_into(register: u8, value: u64, rng: &mut Rng, bits: u32) -> Vec<u8> {
    let bytes = value.to_le_bytes();
    let opcode = 0xb8 | register & 7;
    match bits {
        64 if value > u64::from(u32::MAX) => {
            [&[0x48 | u8::from(rng.chance(10)), opcode], &bytes[..]].concat()
        }
        16 if u16::try_from(value).is_ok() => [&[opcode], &bytes[..2]].concat(),
        16 => [&[0x66, opcode], &bytes[..4]].concat(),
        _ => [&[opcode], &bytes[..4]].concat(),
    }
}

/// An instruction of any form: prefixes, opcode of any map, ModRM, SIB, displacement, and an
/// immediate for those that take one.
fn form(rng: &mut Rng, bits: u32) -> Vec<u8> {
    let mut out = Vec::new();
    while rng.chance(25) {
        out.push(rng.pick(&[
            0x66, 0x67, 0xf0, 0xf2, 0xf3, 0x64, 0x65, 0x2e, 0x36, 0x3e, 0x26,
        ]));
    }
    match rng.below(10) {
        // VEX, whose registers are inverted
        0 => out.extend([0xc5, rng.bits() as u8 | 0x78, rng.bits() as u8]),
        1 => {
            let map = 1 + rng.below(3) as u8;
            let rest = rng.bits() as u8 | 0x78;
            out.extend([0xc4, 0xe0 | map, rest, rng.bits() as u8]);
        }
        choice => {
            if bits == 64 && rng.chance(60) {
                out.push(0x40 | rng.below(16) as u8);
            }
            match choice {
                2..6 => {}
                6..8 => out.push(0x0f),
                8 => out.extend([0x0f, 0x38]),
                _ => out.extend([0x0f, 0x3a]),
            }
            out.push(rng.bits() as u8);
        }
    }
    operand(rng, bits, &mut out);
    let immediate = value(rng).to_le_bytes();
    out.extend(&immediate[..rng.pick(&[0, 0, 1, 1, 2, 4])]);
    out
}

/// ModRM and what follows it.
fn operand(rng: &mut Rng, bits: u32, out: &mut Vec<u8>) {
    let modrm = rng.bits() as u8;
    out.push(modrm);
    let (mode, rm) = (modrm >> 6, modrm & 7);
    if mode == 3 {
        return;
    }
    if bits == 16 {
        match (mode, rm) {
            (0, 6) | (2, _) => out.extend(near(rng).to_le_bytes()),
            (1, _) => out.push(rng.bits() as u8),
            _ => {}
        }
        return;
    }
    let sib = (rm == 4).then(|| rng.bits() as u8);
    out.extend(sib);
    let wide = mode == 2 || mode == 0 && (rm == 5 || sib.is_some_and(|s| s & 7 == 5));
    if mode == 1 {
        out.push(rng.bits() as u8);
    } else if wide {
        let displacement = match rng.below(3) {
            0 => rng.below(0x100) as u32,
            1 => (rng.below(0x2000) as u32).wrapping_sub(0x1000),
            _ => value(rng) as u32,
        };
        out.extend(displacement.to_le_bytes());
    }
}

/// A string instruction with any prefixes, and a count first.
fn string(rng: &mut Rng) -> Vec<u8> {
    let mut out = vec![];
    if rng.chance(20) {
        out.push(rng.pick(&[0xfc, 0xfd])); // CLD, STD
    }
    if rng.chance(20) {
        out.push(rng.pick(&[0x66, 0x67, 0x48, 0x64]));
    }
    if rng.chance(80) {
        out.push(rng.pick(&[0xf3, 0xf3, 0xf2]));
    }
    out.push(rng.pick(&[
        0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf, 0x6c, 0x6d, 0x6e, 0x6f,
    ]));
    out
}

/// MOV to a control or debug register, of something that is mostly allowed.
fn control(rng: &mut Rng, bits: u32) -> Vec<u8> {
    let number = rng.pick(&[0, 0, 3, 3, 4, 4, 2, 8]) as u8;
    let mut value = match number {
        3 => tables::root(rng),
        _ => rng.pick(&CONTROLS) ^ rng.pick(&CONTROLS) & rng.bits(),
    };
    if rng.chance(30) {
        value ^= 1 << rng.below(64);
    }
    // most often one bit changes: read it, flip the bit, write it
    let mut out = if rng.chance(50) && number != 3 {
        let bit = rng.pick(&[0, 2, 3, 4, 5, 7, 9, 10, 16, 17, 18, 20, 21, 29, 30, 31]);
        // MOV EAX, CRn; BTC EAX, bit
        vec![0x0f, 0x20, 0xc0 | (number & 7) << 3, 0x0f, 0xba, 0xf8, bit]
    } else {
        load_into(0, value, rng, bits)
    };
    if number == 8 && bits == 64 {
        out.push(0x44);
    }
    let opcode = if rng.chance(20) { 0x23 } else { 0x22 };
    out.extend([0x0f, opcode, 0xc0 | (number & 7) << 3]);
    out
}

fn msr(rng: &mut Rng, bits: u32) -> Vec<u8> {
    let number = if rng.chance(90) {
        rng.pick(&MSRS)
    } else {
        rng.bits() as u32
    };
    let low = value(rng);
    let high = rng.pick(&[0, 0, 0xffff_ffff, rng.clone().bits()]);
    [
        load_into(1, number.into(), rng, bits),
        load_into(0, low & 0xffff_ffff, rng, bits),
        load_into(2, high & 0xffff_ffff, rng, bits),
        vec![0x0f, rng.pick(&[0x30, 0x30, 0x30, 0x32])],
    ]
    .concat()
}

/// A store to code, to a page table or a descriptor, of a random width.
fn store(rng: &mut Rng, bits: u32) -> Vec<u8> {
    let at = match rng.below(4) {
        0 => tables::address(rng),
        _ => near(rng).into(),
    };
    let what = value(rng);
    let mut out = [load_into(3, at, rng, bits), load_into(0, what, rng, bits)].concat();
    match rng.below(5) {
        0 if bits == 64 => out.extend([0x48, 0x89, 0x03]),
        1 => out.extend([0x88, 0x03]),
        // MOVUPS [rbx], xmm0
        2 => out.extend([0x0f, 0x11, 0x03]),
        _ => out.extend([0x89, 0x03]),
    }
    if bits == 16 {
        // there [bx] is 7, and addresses end at 64 KiB
        if let Some(modrm) = out.last_mut() {
            *modrm = 0x07;
        }
    }
    out
}

/// Instructions without operands, and those with a table or an address.
fn system(rng: &mut Rng) -> Vec<u8> {
    let modrm = rng.bits() as u8;
    rng.pick(&[
        &[0xfa][..],                     // CLI
        &[0xfb],                         // STI
        &[0xf4],                         // HLT
        &[0x0f, 0xa2],                   // CPUID
        &[0x0f, 0x31],                   // RDTSC
        &[0x0f, 0x01, 0xf9],             // RDTSCP
        &[0x0f, 0x01, 0xf8],             // SWAPGS
        &[0x0f, 0x01, 0xca],             // CLAC
        &[0x0f, 0x01, 0xcb],             // STAC
        &[0x0f, 0x01, 0xd0],             // XGETBV
        &[0x0f, 0x01, 0xd1],             // XSETBV
        &[0x0f, 0x01, 0xc1],             // VMCALL
        &[0x0f, 0x06],                   // CLTS
        &[0x0f, 0x08],                   // INVD
        &[0x0f, 0x09],                   // WBINVD
        &[0x0f, 0x0b],                   // UD2
        &[0x0f, 0x33],                   // RDPMC
        &[0x0f, 0x01, 0x3b],             // INVLPG [rbx]
        &[0x0f, 0x01, 0x13],             // LGDT
        &[0x0f, 0x01, 0x1b],             // LIDT
        &[0x0f, 0x01, 0x03],             // SGDT
        &[0x0f, 0x01, 0x0b],             // SIDT
        &[0x0f, 0x01, 0xf0],             // LMSW AX
        &[0x66, 0x0f, 0x38, 0x82, 0x03], // INVPCID
        &[0xf3, 0x0f, 0xae, 0xd8],       // WRGSBASE
        &[0xf3, 0x0f, 0xae, 0xd0],       // WRFSBASE
        &[0x0f, 0x00, modrm],
        &[0x0f, 0x01, modrm],
        &[0x0f, 0xae, modrm],
        &[0x0f, 0xc7, modrm],
        &[0xe4, modrm],
        &[0xe7, modrm],
    ])
    .to_vec()
}

/// Jumps, calls and returns of every kind.
fn transfer(rng: &mut Rng, bits: u32) -> Vec<u8> {
    let [low, high] = near(rng).to_le_bytes();
    let selector = tables::selector(rng).to_le_bytes();
    let vector = rng.bits() as u8;
    match rng.below(14) {
        // mostly forward: code that loops goes nowhere
        0..3 => vec![0xeb, vector >> u8::from(rng.chance(85))],
        3 => vec![0x70 | vector & 15, vector >> 2],
        4 => vec![0xe2, vector >> u8::from(rng.chance(70))], // LOOP
        5 => vec![0xcd, vector],
        6 => vec![rng.pick(&[0xcb, 0xca, 0xcf]), 8, 0],
        7 if bits == 64 => vec![0x48, rng.pick(&[0xcf, 0xcb])],
        8 => vec![0x0f, rng.pick(&[0x05, 0x34])], // SYSCALL, SYSENTER
        9 => vec![0x48, 0x0f, rng.pick(&[0x07, 0x35])], // SYSRET, SYSEXIT
        10 if bits == 16 => vec![rng.pick(&[0x9a, 0xea]), low, high, selector[0], selector[1]],
        10 if bits == 32 => {
            let opcode = rng.pick(&[0x9a, 0xea]);
            vec![opcode, low, high, 0, 0, selector[0], selector[1]]
        }
        11 => {
            // through a register: JMP or CALL
            let target = if rng.chance(85) {
                u64::from(near(rng))
            } else {
                value(rng)
            };
            let modrm = rng.pick(&[0xe0, 0xd0]);
            [load_into(0, target, rng, bits), vec![0xff, modrm]].concat()
        }
        12 => vec![0xc3],
        // PUSH of a code address, RET
        _ if bits == 16 => vec![0x68, low, high, 0xc3],
        _ => vec![0x68, low, high, 0, 0, 0xc3],
    }
}

/// A locked instruction, mostly across pages.
fn atomic(rng: &mut Rng, bits: u32) -> Vec<u8> {
    let page = CODE + 0x1000 * rng.below(8);
    let mut out = load_into(3, page - rng.below(20), rng, bits);
    out.push(0xf0);
    if bits == 64 && rng.chance(50) {
        out.push(0x48);
    }
    let address = if bits == 16 { 0x07 } else { 0x03 };
    match rng.below(5) {
        0 => out.extend([0x01, address]),
        1 => out.extend([0x0f, 0xc1, address]),
        2 => out.extend([0x0f, 0xb1, address]),
        3 => out.extend([0x0f, 0xc7, address | 8]),
        _ => out.extend([0x87, address]),
    }
    out
}

/// Loads of segment and table registers.
fn segment(rng: &mut Rng, bits: u32) -> Vec<u8> {
    let selector = tables::selector(rng);
    let mut out = load_into(0, selector.into(), rng, bits);
    match rng.below(8) {
        0 => out.extend([0x0f, 0x00, 0xd0]),                    // LLDT
        1 => out.extend([0x0f, 0x00, 0xd8]),                    // LTR
        2 => out.extend([0x0f, rng.pick(&[2, 3]), 0xc0]),       // LAR, LSL
        3 => out.extend([0x0f, 0x00, rng.pick(&[0xe0, 0xe8])]), // VERR, VERW
        4 => out.extend([0x0f, rng.pick(&[0xb2, 0xb4, 0xb5]), 0x03]), // LSS, LFS, LGS
        _ => out.extend([0x8e, 0xc0 | rng.pick(&[0, 2, 3, 3, 4, 5]) << 3]),
    }
    out
}

/// Extended state: saves, restores, x87 and vectors at awkward places.
fn extended(rng: &mut Rng, bits: u32) -> Vec<u8> {
    let at = if rng.chance(50) {
        value(rng) & !63
    } else {
        value(rng)
    };
    let mut out = load_into(3, at, rng, bits);
    if rng.chance(50) {
        out.extend(load_into(0, rng.below(8), rng, bits));
        out.extend(load_into(2, 0, rng, bits));
    }
    if bits == 64 && rng.chance(30) {
        out.push(0x48);
    }
    match rng.below(6) {
        // FXSAVE to XSAVEOPT, CLFLUSH
        0..3 => out.extend([0x0f, 0xae, (rng.below(8) as u8) << 3 | 3]),
        // XSAVEC, XRSTORS, XSAVES
        3 => out.extend([0x0f, 0xc7, (3 + rng.below(3) as u8) << 3 | 3]),
        _ => out.extend([0xd8 | rng.below(8) as u8, rng.bits() as u8]),
    }
    out
}

/// Flags and debug registers: TF, AC, NT, RF, breakpoints.
fn trap(rng: &mut Rng, bits: u32) -> Vec<u8> {
    if rng.chance(40) {
        let number = rng.pick(&[0, 1, 2, 3, 6, 7, 7]) as u8;
        let value = if number == 7 { rng.bits() } else { value(rng) };
        let mut out = load_into(0, value, rng, bits);
        out.extend([0x0f, 0x23, 0xc0 | number << 3]);
        return out;
    }
    // PUSHF; OR or XOR of a bit; POPF
    let bit = rng.pick(&[8, 9, 10, 14, 16, 17, 18, 21, 12]);
    let mut out = vec![0x9c];
    if bits == 16 {
        out.extend([0x58, 0x0f, 0xba, 0xf8, bit & 15, 0x50]); // POP AX; BTC; PUSH AX
    } else {
        out.extend([0x0f, 0xba, 0x3c, 0x24, bit]); // BTC [rsp], bit
    }
    out.push(0x9d);
    out
}
