//! Descriptor tables and page tables of a hostile guest: mostly good enough to get somewhere,
//! with entries that are not. Used by `hostile`.

use strata_memory::GuestMemory;

use super::vcpu::Mode;
use super::{CODE, CODE_SIZE, RAM, STACK_TOP, UPPER, put};
use crate::rng::Rng;

/// Where the global descriptor table is, and how large, in bytes.
pub(super) const GDT: u64 = 0x1000;
pub(super) const GDT_SIZE: u64 = 0x100;
/// The local one.
pub(super) const LDT: u64 = 0x1400;
/// The interrupt descriptor table.
pub(super) const IDT: u64 = 0x2000;
/// The task state segment: 64 bits, or 32.
pub(super) const TSS: u64 = 0x3000;
/// Page tables: the first, and how many.
pub(super) const FIRST: u64 = 0x1_0000;
const COUNT: u64 = 24;
/// Selectors of [`descriptors`].
pub(super) const CODE_64: u16 = 0x08;
pub(super) const DATA: u16 = 0x10;
pub(super) const CODE_32: u16 = 0x18;
pub(super) const CODE_16: u16 = 0x20;
pub(super) const DATA_16: u16 = 0x28;
pub(super) const USER_CODE_32: u16 = 0x33;
pub(super) const USER_DATA: u16 = 0x3b;
pub(super) const USER_CODE_64: u16 = 0x43;
pub(super) const USER_CODE_16: u16 = 0x4b;
pub(super) const USER_DATA_16: u16 = 0x53;
pub(super) const TASK: u16 = 0x60;

/// Present, writable, for ring 3, accessed, dirty.
const OPEN: u64 = 0x67;
const USER: u64 = 4;
/// A large page, where there may be one.
const LARGE: u64 = 0x80;

/// Where the table of a kind begins: each paging mode has roots and tables of its own.
fn table(number: u64) -> u64 {
    FIRST + number * 0x1000
}

/// What CR3 may be in a mode: the first of two roots.
pub(super) fn first_root(mode: Mode) -> u64 {
    match mode {
        Mode::Paged32 => table(8),
        Mode::Pae => table(12),
        _ => table(0),
    }
}

/// Something to load CR3 with.
pub(super) fn root(rng: &mut Rng) -> u64 {
    let root = table(rng.pick(&[0, 0, 4, 8, 8, 10, 12, 16]));
    let bits = match rng.below(4) {
        0 => rng.below(8),      // a PCID, or cache control
        1 => 1 << 63,           // keep what is cached
        2 => rng.below(0x1000), // anything
        _ => 0,
    };
    root | bits
}

/// The address of a table entry or descriptor.
pub(super) fn address(rng: &mut Rng) -> u64 {
    match rng.below(4) {
        0 => GDT + rng.below(GDT_SIZE),
        1 => IDT + rng.below(0x1000),
        2 => TSS + rng.below(0x80),
        // the entries that lead to low memory
        _ => table(rng.below(COUNT)) + 4 * rng.below(40),
    }
}

/// A selector, mostly of something that is there.
pub(super) fn selector(rng: &mut Rng) -> u16 {
    match rng.below(8) {
        0 => rng.bits() as u16,
        1 => 4 | (rng.below(8) as u16) << 3 | rng.below(4) as u16,
        _ => (rng.below(24) as u16) << 3 | rng.pick(&[0, 0, 3, 1]),
    }
}

/// Writes all tables. The interrupt vectors of real mode are there too.
pub(super) fn write(memory: &GuestMemory, rng: &mut Rng, modes: &[Mode]) {
    for vector in 0..256 {
        let offset = (CODE + rng.below(CODE_SIZE)) as u32;
        put(memory, vector * 4, &offset.to_le_bytes());
    }
    descriptors(memory, rng);
    write_gates(memory, rng, modes);
    task(memory, rng, modes[0].is_long());
    four_levels(memory, 0);
    four_levels(memory, 4);
    two_levels(memory, 8);
    two_levels(memory, 10);
    three_levels(memory, 12);
    three_levels(memory, 16);
    if rng.chance(70) {
        for _ in 0..rng.below(12) {
            let mode = rng.pick(modes);
            disturb(memory, rng, mode);
        }
    }
}

fn descriptors(memory: &GuestMemory, rng: &mut Rng) {
    let known: [u64; 12] = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_9b00_0000_ffff,
        0x0000_9b00_0000_ffff,
        0x0000_9300_0000_ffff,
        0x00cf_fb00_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        0x0000_fb00_0000_ffff,
        0x0000_f300_0000_ffff,
        0x00cf_9700_0000_ffff, // expand down
    ];
    for at in (0..GDT_SIZE).step_by(8) {
        let number = (at / 8) as usize;
        let descriptor = known.get(number).copied();
        let mut descriptor = descriptor.unwrap_or_else(|| random_descriptor(rng));
        if number > 0 && rng.chance(2) {
            descriptor ^= 1 << rng.below(64);
        }
        put(memory, GDT + at, &descriptor.to_le_bytes());
        put(memory, LDT + at, &random_descriptor(rng).to_le_bytes());
    }
    let task = 0x67 | TSS << 16 | 0x89 << 40;
    put(memory, GDT + u64::from(TASK), &task.to_le_bytes());
    put(memory, GDT + u64::from(TASK) + 8, &[0; 8]);
}

/// A segment, a gate or a table: type, rights, base and limit as they come, mostly present and
/// in low memory.
fn random_descriptor(rng: &mut Rng) -> u64 {
    let kind = rng.below(32) << 40;
    let present = u64::from(rng.chance(85)) << 47;
    let level = rng.pick(&[0, 3, 3, rng.clone().below(4)]) << 45;
    let base = rng.pick(&[0, 0, 1, 0x10, 0x8000, 0xfff_f000]) << 16;
    let size = rng.pick(&[0, 4, 8, 12, 2, 10, 6]) << 52;
    let limit = rng.pick(&[0, 0xfff, 0xffff, 0xf_fff0]);
    let limit = limit & 0xffff | (limit >> 16) << 48;
    kind | present | level | base | size | limit
}

fn write_gates(memory: &GuestMemory, rng: &mut Rng, modes: &[Mode]) {
    // the width of gates is that of most vCPUs
    let long = modes[0].is_long();
    for vector in 0..256_u64 {
        gate(memory, rng, vector, long);
    }
}

fn gate(memory: &GuestMemory, rng: &mut Rng, vector: u64, long: bool) {
    let offset = if rng.chance(97) {
        CODE + rng.below(CODE_SIZE) + if long { UPPER } else { 0 }
    } else {
        rng.bits()
    };
    let code = if long { CODE_64 } else { CODE_32 };
    let (selector, rights) = if rng.chance(95) {
        let rights = rng.pick(&[0x8e, 0xee, 0xef, 0x8f]);
        (code, rights)
    } else {
        (selector(rng), rng.below(256))
    };
    let stack = if rng.chance(15) { rng.below(8) } else { 0 };
    let low = offset & 0xffff
        | u64::from(selector) << 16
        | if long { stack << 32 } else { 0 }
        | rights << 40
        | (offset >> 16 & 0xffff) << 48;
    if long {
        let high = offset >> 32;
        put(memory, IDT + vector * 16, &low.to_le_bytes());
        put(memory, IDT + vector * 16 + 8, &high.to_le_bytes());
    } else {
        put(memory, IDT + vector * 8, &low.to_le_bytes());
    }
}

/// Stacks for all widths of a TSS: the fields of the 64-bit one lie over those of the others.
fn task(memory: &GuestMemory, rng: &mut Rng, long: bool) {
    let half = if long { UPPER } else { 0 };
    for at in (4..0x5c).step_by(8) {
        let stack = half + STACK_TOP - 0x400 * rng.below(8);
        put(memory, TSS + at, &stack.to_le_bytes());
    }
    // SS0 of a 32-bit TSS, which is in the upper half of RSP0's place
    if !long {
        put(memory, TSS + 8, &u32::from(DATA).to_le_bytes());
    }
    let map = rng.pick(&[0x68_u16, 0x60, 0, 0xffff]);
    put(memory, TSS + 0x66, &map.to_le_bytes());
}

fn entry(memory: &GuestMemory, table: u64, index: u64, value: u64) {
    put(memory, table + index * 8, &value.to_le_bytes());
}

/// IA-32e tables: low memory is where it is, and again in the upper half; 2 MiB in small pages,
/// the rest in a large one.
fn four_levels(memory: &GuestMemory, first: u64) {
    let [root, upper, middle, last] = [0, 1, 2, 3].map(|n| table(first + n));
    entry(memory, root, 0, upper | OPEN);
    for index in [256, 511] {
        entry(memory, root, index, upper | OPEN & !USER);
    }
    for index in [0, 3, 510] {
        entry(memory, upper, index, middle | OPEN);
    }
    entry(memory, upper, 1, OPEN | LARGE);
    entry(memory, middle, 0, last | OPEN);
    entry(memory, middle, 1, 0x20_0000 | OPEN | LARGE);
    entry(memory, middle, 2, RAM | OPEN | LARGE);
    for index in 0..512 {
        entry(memory, last, index, index << 12 | OPEN);
    }
}

fn two_levels(memory: &GuestMemory, first: u64) {
    let [root, last] = [table(first), table(first + 1)];
    for index in 0..1024_u64 {
        let page = index << 12 | OPEN;
        put(memory, last + index * 4, &(page as u32).to_le_bytes());
    }
    for index in [0, 0x200, 0x3ff] {
        put(
            memory,
            root + index * 4,
            &((last | OPEN) as u32).to_le_bytes(),
        );
    }
    put(memory, root + 4, &((OPEN | LARGE) as u32).to_le_bytes());
}

fn three_levels(memory: &GuestMemory, first: u64) {
    let [root, middle, last] = [0, 1, 2].map(|n| table(first + n));
    for index in 0..4 {
        entry(memory, root, index, middle | 1);
    }
    entry(memory, middle, 0, last | OPEN);
    entry(memory, middle, 1, 0x20_0000 | OPEN | LARGE);
    entry(memory, middle, 511, last | OPEN);
    for index in 0..512 {
        entry(memory, last, index, index << 12 | OPEN);
    }
}

/// Changes an entry that a vCPU in `mode` may use: other pages, rights that deny, reserved
/// bits, large pages, tables that lead to themselves.
pub(super) fn disturb(memory: &GuestMemory, rng: &mut Rng, mode: Mode) {
    if rng.chance(10) {
        return gate(memory, rng, rng.clone().below(256), mode.is_long());
    }
    let (first, depth) = match mode {
        Mode::Paged32 => (8, 2),
        Mode::Pae => (12, 3),
        _ => (0, 4),
    };
    // mostly the last level: what is above decides over everything
    let level = if rng.chance(75) {
        depth - 1
    } else {
        rng.below(depth)
    };
    let own = table(first + level);
    let page = match rng.below(8) {
        0 => own,
        1 => table(rng.below(COUNT)),
        2 => RAM - 0x1000,
        3 => rng.pick(&[RAM, 0xc000_0000, 0xfee0_0000, 0xf_ffff_ffff_f000]),
        4 => rng.bits() & 0x000f_ffff_ffff_f000,
        5 => CODE + 0x1000 * rng.below(4),
        _ => 0x1000 * rng.below(1024),
    };
    let flags = match rng.below(6) {
        0 => OPEN & !1,
        1 => OPEN & !2,
        2 => OPEN & !USER,
        3 => OPEN & !0x60,
        4 => OPEN | 1 << rng.below(12) | u64::from(rng.chance(30)) << 63,
        _ => rng.bits() & 0xfff0_0000_0000_0fff | 1,
    };
    let value = page | flags | if rng.chance(20) { LARGE } else { 0 };
    let index = if rng.chance(80) {
        rng.below(16)
    } else {
        rng.below(512)
    };
    if mode == Mode::Paged32 {
        put(memory, own + index * 4, &(value as u32).to_le_bytes());
    } else {
        entry(memory, own, index, value);
    }
}
