//! Memory operands: picks an address worth testing, then a form that computes it and
//! register values that make it so.

use iced_x86::{Instruction, OpKind, Register};

use super::builder::{Builder, RSP, gpr_number, gpr64};
use crate::case::Width;
use crate::layout::{
    self, EDGE, FAR, FS_BASE, GS_BASE, HOLE, PAGE, READ_ONLY, READ_ONLY_TO_WRITABLE, STACK,
    WRITABLE, WRITABLE_TO_READ_ONLY,
};
use crate::rng::Rng;

/// A linear address for an access of `size` bytes (0: none is made).
pub(super) fn address(rng: &mut Rng, size: u64, code_address: u64) -> u64 {
    let size = size.max(1);
    // how far before an edge an access that straddles it begins
    let mut before = |edge: u64| edge - 1 - rng.below(size.max(2) - 1);
    let straddling = [
        EDGE,
        HOLE,
        WRITABLE,
        READ_ONLY_TO_WRITABLE,
        WRITABLE_TO_READ_ONLY,
    ]
    .map(&mut before);
    match rng.below(100) {
        0..=11 => straddling[0],
        12..=17 => straddling[1],
        18..=19 => straddling[2],
        20..=22 => straddling[3],
        23..=25 => straddling[4],
        26..=30 => READ_ONLY + rng.below(PAGE - size),
        31..=33 => HOLE + rng.below(PAGE - size),
        34..=38 => FAR + rng.below(PAGE - size),
        39..=40 => FAR + PAGE - 1 - rng.below(size.max(2) - 1),
        41..=43 => STACK + rng.below(2 * PAGE - size),
        // behind the code, where nothing runs but translations live on the same page
        44..=45 => code_address + 640 + rng.below(300),
        46..=47 => non_canonical(rng),
        // the last bytes before a page edge, and the first behind
        48..=51 => EDGE - size,
        52..=53 => EDGE,
        54..=69 => WRITABLE + rng.below((2 * PAGE - size) / 16) * 16,
        70..=79 => WRITABLE + rng.below((2 * PAGE - size) / 32) * 32,
        _ => WRITABLE + rng.below(2 * PAGE - size),
    }
}

/// An address with bits 63:47 not all alike.
pub(super) fn non_canonical(rng: &mut Rng) -> u64 {
    match rng.below(3) {
        0 => 0x0000_8000_0000_0000 + rng.below(0x1000),
        1 => 0xffff_7fff_ffff_f000 + rng.below(0xff0),
        _ => 1 << (48 + rng.below(14)) | layout::WRITABLE,
    }
}

/// How an operand's address is to be computed.
struct Form {
    base: Option<usize>,
    index: Option<(usize, u64)>,
    wide: bool,
}

/// Makes operand `operand` of `instruction` a memory operand at linear address `linear`.
/// May append loads of registers. False if no form was found.
pub(super) fn set_operand(
    builder: &mut Builder,
    rng: &mut Rng,
    instruction: &mut Instruction,
    operand: u32,
    linear: u64,
) -> bool {
    instruction.set_op_kind(operand, OpKind::Memory);
    let offset = match rng.below(100) {
        0..=4 => {
            instruction.set_segment_prefix(Register::FS);
            linear.wrapping_sub(FS_BASE)
        }
        5..=9 => {
            instruction.set_segment_prefix(Register::GS);
            linear.wrapping_sub(GS_BASE)
        }
        10..=11 => {
            instruction.set_segment_prefix(rng.pick(&[Register::DS, Register::ES, Register::CS]));
            builder.width().data_offset(linear)
        }
        12..=14 if builder.width() == Width::Bits16 => {
            instruction.set_segment_prefix(Register::SS);
            linear.wrapping_sub(layout::STACK_16.base)
        }
        _ => builder.width().data_offset(linear),
    };
    if builder.width() != Width::Bits64 {
        return set_narrow_operand(builder, rng, instruction, offset & 0xffff_ffff);
    }
    if rng.chance(10) && offset.abs_diff(layout::CODE) < 0x7000_0000 {
        instruction.set_memory_base(Register::RIP);
        instruction.set_memory_displ_size(8);
        instruction.set_memory_displacement64(offset);
        return true;
    }
    if rng.chance(5) && i64::from(offset as i32) as u64 == offset {
        instruction.set_memory_displ_size(8);
        instruction.set_memory_displacement64(offset);
        return true;
    }
    let narrow = rng.chance(6) && offset >> 32 == 0;
    let form = pick_form(builder, rng, !narrow);
    apply(builder, rng, instruction, offset, &form)
}

/// As `set_operand`, in 32-bit code: with a 16-bit address where the offset allows it.
fn set_narrow_operand(
    builder: &mut Builder,
    rng: &mut Rng,
    instruction: &mut Instruction,
    offset: u64,
) -> bool {
    let short = builder.width() == Width::Bits16;
    if rng.chance(10) {
        let size = if short && offset <= 0xffff { 2 } else { 4 };
        instruction.set_memory_displ_size(size);
        instruction.set_memory_displacement64(offset);
        return true;
    }
    let percent = if short { 85 } else { 50 };
    if rng.chance(2) || offset <= 0xffff && rng.chance(percent) {
        return set_short_operand(builder, rng, instruction, offset & 0xffff);
    }
    let form = pick_form(builder, rng, false);
    apply(builder, rng, instruction, offset, &form)
}

/// The forms of 16-bit addresses: a base, an index, and what is missing as displacement.
fn set_short_operand(
    builder: &mut Builder,
    rng: &mut Rng,
    instruction: &mut Instruction,
    offset: u64,
) -> bool {
    use Register as R;
    let (base, index) = rng.pick(&[
        (R::BX, R::SI),
        (R::BX, R::DI),
        (R::BP, R::SI),
        (R::BP, R::DI),
        (R::SI, R::None),
        (R::DI, R::None),
        (R::BP, R::None),
        (R::BX, R::None),
    ]);
    // BP is relative to SS, which is where only some of these are to go
    if base == R::BP && instruction.segment_prefix() == R::None && rng.chance(90) {
        instruction.set_segment_prefix(R::DS);
    }
    let mut rest = offset;
    for register in [base, index] {
        if register == R::None {
            continue;
        }
        let n = gpr_number(register);
        let Some(value) = builder.known(n) else {
            return false;
        };
        builder.commit(n);
        rest = rest.wrapping_sub(value);
    }
    instruction.set_memory_base(base);
    instruction.set_memory_index(index);
    instruction.set_memory_displ_size(2);
    instruction.set_memory_displacement64(rest & 0xffff);
    true
}

fn pick_form(builder: &Builder, rng: &mut Rng, wide: bool) -> Form {
    let base = match rng.below(10) {
        0 => None,
        1 => Some(RSP),
        2 => Some(builder.any_register(rng)),
        _ => builder
            .pick_free(rng, &[])
            .or_else(|| Some(builder.any_register(rng))),
    };
    let wants_index = base.is_none() || rng.chance(40);
    let index = wants_index
        .then(|| {
            let taken = [base.unwrap_or(RSP)];
            let free = builder.pick_free(rng, &taken);
            free.or_else(|| {
                (0..builder.width().registers()).find(|&n| n != RSP && !taken.contains(&n))
            })
        })
        .flatten()
        .map(|n| (n, 1 << rng.below(4)));
    Form { base, index, wide }
}

/// Chooses register values and a displacement that add up to `offset`.
fn apply(
    builder: &mut Builder,
    rng: &mut Rng,
    instruction: &mut Instruction,
    offset: u64,
    form: &Form,
) -> bool {
    let name = |n: usize| {
        if form.wide {
            gpr64(n)
        } else {
            Register::EAX + n as u32
        }
    };
    let mut displacement = match rng.below(4) {
        0 => 0,
        1 => u64::from(rng.bits() as u8) as i8 as i64,
        _ if rng.chance(50) => i64::from(rng.bits() as i32),
        _ => rng.below(4096) as i64,
    };
    let mut rest = offset;
    if let Some((n, scale)) = form.index {
        let value = if form.base.is_none() {
            // the displacement has to bring the index to the address, so it must be near
            displacement = (offset % scale) as i64;
            offset.wrapping_sub(displacement as u64) / scale
        } else {
            index_value(builder, rng, n)
        };
        builder.make(n, value);
        let Some(value) = builder.known(n) else {
            return false;
        };
        rest = rest.wrapping_sub(value.wrapping_mul(scale));
        instruction.set_memory_index(name(n));
        instruction.set_memory_index_scale(scale as u32);
    }
    if let Some(n) = form.base {
        let near = |v: u64| i32::try_from(truncate(rest.wrapping_sub(v), form.wide)).is_ok();
        match builder.known(n).filter(|_| !builder.is_free(n)) {
            Some(value) if near(value) => {
                displacement = truncate(rest.wrapping_sub(value), form.wide);
            }
            Some(_) | None if n == RSP && !rng.chance(20) => return false,
            _ => {
                let mut value = rest.wrapping_sub(displacement as u64);
                if !form.wide {
                    value = value & 0xffff_ffff | rng.pick(&[0, rng_high(rest), u64::MAX << 32]);
                }
                builder.make(n, value);
            }
        }
        builder.commit(n);
        instruction.set_memory_base(name(n));
    } else if form.index.is_none() {
        return false;
    }
    let small = i8::try_from(displacement).is_ok();
    let size = match (form.wide, displacement) {
        (_, 0) if form.base.is_some() && rng.chance(80) => 0,
        (_, _) if small && rng.chance(80) && form.base.is_some() => 1,
        (true, _) => 8,
        (false, _) => 4,
    };
    instruction.set_memory_displ_size(size);
    let displacement = displacement as u64;
    instruction.set_memory_displacement64(if form.wide {
        displacement
    } else {
        displacement & 0xffff_ffff
    });
    true
}

fn rng_high(value: u64) -> u64 {
    value.wrapping_mul(0x9e37_79b9_7f4a_7c15) & u64::MAX << 32
}

/// A difference of addresses as a signed number of the address size.
fn truncate(difference: u64, wide: bool) -> i64 {
    if wide {
        difference as i64
    } else {
        i64::from(difference as i32)
    }
}

fn index_value(builder: &Builder, rng: &mut Rng, n: usize) -> u64 {
    match builder.known(n) {
        Some(value) if !builder.is_free(n) => value,
        _ => match rng.below(4) {
            0 => rng.below(16),
            1 => 0_u64.wrapping_sub(rng.below(4096)),
            2 => rng.below(4096),
            _ => super::values::integer(rng),
        },
    }
}

/// Makes operand `operand` a vector of addresses near `linear`, as gathers take it, with
/// index elements of `element` bytes in vector register `index`.
pub(super) fn set_vector_operand(
    builder: &mut Builder,
    rng: &mut Rng,
    instruction: &mut Instruction,
    operand: u32,
    linear: u64,
    index: (Register, usize),
) -> bool {
    let (register, element) = index;
    let scale = 1_u64 << rng.below(4);
    let number = register.number() % 16;
    if builder.free_vectors[number] {
        let mut value = [0; 32];
        for chunk in value.chunks_exact_mut(element) {
            let delta = rng.below(64) as i64 - 32;
            chunk.copy_from_slice(&delta.to_le_bytes()[..element]);
        }
        builder.program.xsave.set_ymm(number, &value);
        builder.free_vectors[number] = false;
    }
    let Some(base) = builder
        .pick_free(rng, &[])
        .or(Some(builder.any_register(rng)))
        .filter(|&n| n != RSP)
    else {
        return false;
    };
    let offset = builder.width().data_offset(linear);
    builder.make(base, offset);
    instruction.set_op_kind(operand, OpKind::Memory);
    let name = match builder.width() {
        Width::Bits64 => gpr64(base),
        _ => Register::EAX + base as u32,
    };
    instruction.set_memory_base(name);
    instruction.set_memory_index(register);
    instruction.set_memory_index_scale(scale as u32);
    true
}
