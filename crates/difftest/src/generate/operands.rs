//! Fills in the operands of one instruction.

use iced_x86::{Code, Instruction, Mnemonic, OpCodeOperandKind as Kind, OpKind, Register};

use super::builder::{Builder, RSP, gpr_number};
use super::{memory, values};
use crate::case::Width;
use crate::catalog::Catalog;
use crate::rng::Rng;

/// Appends an instruction of the given kind, with what it needs before it. False if it
/// could not be made this time.
pub(super) fn append(builder: &mut Builder, rng: &mut Rng, code: Code) -> bool {
    let mut instruction = Instruction::default();
    instruction.set_code(code);
    let op_code = code.op_code();
    super::special::prepare(builder, rng, &mut instruction);
    let mut immediates = 0;
    let mut has_memory = false;
    let registers_only = rng.chance(45);
    for (operand, &kind) in op_code.op_kinds().iter().enumerate() {
        let operand = operand as u32;
        let done = if let Some(class) = memory_alternative(kind) {
            if registers_only {
                set_register(
                    &mut instruction,
                    operand,
                    vector_or_general(builder, rng, class),
                );
                true
            } else {
                has_memory = true;
                set_memory(builder, rng, &mut instruction, operand)
            }
        } else if matches!(kind, Kind::mem | Kind::mem_offs) {
            has_memory = true;
            if kind == Kind::mem {
                set_memory(builder, rng, &mut instruction, operand)
            } else {
                set_absolute(builder, rng, &mut instruction, operand)
            }
        } else if let Some(vector) = vector_index(kind) {
            has_memory = true;
            set_gather(builder, rng, &mut instruction, operand, vector)
        } else {
            set_other(
                builder,
                rng,
                &mut instruction,
                operand,
                kind,
                &mut immediates,
            )
        };
        if !done {
            return false;
        }
    }
    if has_memory && op_code.can_use_lock_prefix() && rng.chance(40) {
        instruction.set_has_lock_prefix(true);
    }
    set_repeat(rng, &mut instruction);
    super::special::finish(builder, rng, &mut instruction);
    builder.push(instruction)
}

fn set_repeat(rng: &mut Rng, instruction: &mut Instruction) {
    let op_code = instruction.code().op_code();
    if op_code.can_use_rep_prefix() && rng.chance(60) {
        if op_code.can_use_repne_prefix() && rng.chance(50) {
            instruction.set_has_repne_prefix(true);
        } else {
            instruction.set_has_rep_prefix(true);
        }
    }
}

/// Register classes.
#[derive(Clone, Copy)]
enum Class {
    Byte,
    Word,
    Double,
    Quad,
    Mmx,
    Xmm,
    Ymm,
}

/// The class of an operand that may be a register or memory.
fn memory_alternative(kind: Kind) -> Option<Class> {
    Some(match kind {
        Kind::r8_or_mem => Class::Byte,
        Kind::r16_or_mem => Class::Word,
        Kind::r32_or_mem => Class::Double,
        Kind::r64_or_mem => Class::Quad,
        Kind::mm_or_mem => Class::Mmx,
        Kind::xmm_or_mem => Class::Xmm,
        Kind::ymm_or_mem => Class::Ymm,
        _ => return None,
    })
}

/// The index register's class and element size of a gather's operand.
fn vector_index(kind: Kind) -> Option<(Class, usize)> {
    Some(match kind {
        Kind::mem_vsib32x => (Class::Xmm, 4),
        Kind::mem_vsib64x => (Class::Xmm, 8),
        Kind::mem_vsib32y => (Class::Ymm, 4),
        Kind::mem_vsib64y => (Class::Ymm, 8),
        _ => return None,
    })
}

fn vector_or_general(builder: &Builder, rng: &mut Rng, class: Class) -> Register {
    let mut n = builder.any_register(rng);
    if n == RSP && !rng.chance(15) {
        n = builder.any_register(rng);
    }
    // mostly keep what later memory operands can be built on
    let general = !matches!(class, Class::Mmx | Class::Xmm | Class::Ymm);
    if general && builder.is_free(n) && rng.chance(50) {
        n = builder.any_register(rng);
    }
    let n32 = n as u32;
    match class {
        // AH, CH, DH and BH follow BL; SPL to DIL and R8B to R15B follow those
        Class::Byte if builder.width() == Width::Bits64 => Register::AL + rng.below(20) as u32,
        Class::Byte => Register::AL + rng.below(8) as u32,
        Class::Word => Register::AX + n32,
        Class::Double => Register::EAX + n32,
        Class::Quad => Register::RAX + n32,
        Class::Mmx => Register::MM0 + n32 % 8,
        Class::Xmm => Register::XMM0 + n32,
        Class::Ymm => Register::YMM0 + n32,
    }
}

fn set_register(instruction: &mut Instruction, operand: u32, register: Register) {
    instruction.set_op_kind(operand, OpKind::Register);
    instruction.set_op_register(operand, register);
}

fn set_memory(
    builder: &mut Builder,
    rng: &mut Rng,
    instruction: &mut Instruction,
    operand: u32,
) -> bool {
    let op_code = instruction.code().op_code();
    let size = op_code.memory_size().size() as u64;
    let mut linear = memory::address(rng, size, builder.program.code_address);
    let may_lock = op_code.can_use_lock_prefix() || instruction.mnemonic() == Mnemonic::Xchg;
    if may_lock && Catalog::shared().aligns_locks() {
        linear &= !(size.next_power_of_two().max(1) - 1);
    }
    super::special::on_memory(builder, rng, instruction, linear);
    memory::set_operand(builder, rng, instruction, operand, linear)
}

fn set_absolute(
    builder: &mut Builder,
    rng: &mut Rng,
    instruction: &mut Instruction,
    operand: u32,
) -> bool {
    let size = instruction.code().op_code().memory_size().size() as u64;
    instruction.set_op_kind(operand, OpKind::Memory);
    instruction.set_memory_displ_size(builder.width().bits() / 8);
    let linear = memory::address(rng, size, builder.program.code_address);
    let offset = builder.width().data_offset(linear);
    instruction.set_memory_displacement64(offset & builder.width().mask());
    true
}

fn set_gather(
    builder: &mut Builder,
    rng: &mut Rng,
    instruction: &mut Instruction,
    operand: u32,
    (class, element): (Class, usize),
) -> bool {
    let destination = instruction.op0_register().number() % 16;
    let mut index = vector_or_general(builder, rng, class);
    if index.number() % 16 == destination {
        index = index - (destination as u32) + ((destination as u32 + 1) % 16);
    }
    let linear = memory::address(rng, 64, builder.program.code_address);
    memory::set_vector_operand(builder, rng, instruction, operand, linear, (index, element))
}

/// Operands that are neither memory nor may be.
fn set_other(
    builder: &mut Builder,
    rng: &mut Rng,
    instruction: &mut Instruction,
    operand: u32,
    kind: Kind,
    immediates: &mut u32,
) -> bool {
    let class = match kind {
        Kind::r8_reg | Kind::r8_opcode => Some(Class::Byte),
        Kind::r16_reg | Kind::r16_reg_mem | Kind::r16_rm | Kind::r16_opcode => Some(Class::Word),
        Kind::r32_reg | Kind::r32_reg_mem | Kind::r32_rm | Kind::r32_opcode | Kind::r32_vvvv => {
            Some(Class::Double)
        }
        Kind::r64_reg | Kind::r64_reg_mem | Kind::r64_rm | Kind::r64_opcode | Kind::r64_vvvv => {
            Some(Class::Quad)
        }
        Kind::mm_reg | Kind::mm_rm => Some(Class::Mmx),
        Kind::xmm_reg | Kind::xmm_rm | Kind::xmm_vvvv | Kind::xmm_is4 | Kind::xmm_is5 => {
            Some(Class::Xmm)
        }
        Kind::ymm_reg | Kind::ymm_rm | Kind::ymm_vvvv | Kind::ymm_is4 | Kind::ymm_is5 => {
            Some(Class::Ymm)
        }
        _ => None,
    };
    if let Some(class) = class {
        let mut register = vector_or_general(builder, rng, class);
        // the destination, mask and index of a gather must differ
        if instruction.code().op_code().requires_unique_reg_nums() && operand > 0 {
            let used = (instruction.op0_register().number() % 16) as u32;
            let low = register - (register.number() % 16) as u32;
            register = low + (used + 2 + rng.below(13) as u32) % 16;
        }
        set_register(instruction, operand, register);
        return true;
    }
    if let Some(register) = fixed_register(rng, builder.width(), kind) {
        set_register(instruction, operand, register);
        return true;
    }
    if let Some(string) = string_operand(builder, rng, kind) {
        instruction.set_op_kind(operand, string);
        if matches!(kind, Kind::seg_rSI | Kind::seg_rDI) && rng.chance(6) {
            instruction.set_segment_prefix(rng.pick(&[Register::FS, Register::GS]));
        }
        return true;
    }
    if matches!(kind, Kind::br64_1 | Kind::br64_4) {
        instruction.set_op_kind(operand, OpKind::NearBranch64);
        instruction.set_near_branch64(crate::layout::CODE);
        return true;
    }
    if matches!(kind, Kind::br16_1 | Kind::br16_2) {
        instruction.set_op_kind(operand, OpKind::NearBranch16);
        instruction.set_near_branch16(builder.width().ip(crate::layout::CODE) as u16);
        return true;
    }
    if matches!(kind, Kind::br32_1 | Kind::br32_4) {
        instruction.set_op_kind(operand, OpKind::NearBranch32);
        instruction.set_near_branch32(builder.width().ip(crate::layout::CODE) as u32);
        return true;
    }
    if kind == Kind::seg_rBX_al {
        instruction.set_op_kind(operand, OpKind::Memory);
        instruction.set_memory_base(builder.pointer(3));
        instruction.set_memory_index(Register::AL);
        return true;
    }
    set_immediate(rng, instruction, operand, kind, immediates)
}

fn fixed_register(rng: &mut Rng, width: Width, kind: Kind) -> Option<Register> {
    Some(match kind {
        Kind::al => Register::AL,
        Kind::cl => Register::CL,
        Kind::ax => Register::AX,
        Kind::dx => Register::DX,
        Kind::eax => Register::EAX,
        Kind::rax => Register::RAX,
        Kind::es => Register::ES,
        Kind::cs => Register::CS,
        Kind::ss => Register::SS,
        Kind::ds => Register::DS,
        Kind::fs => Register::FS,
        Kind::gs => Register::GS,
        Kind::st0 => Register::ST0,
        Kind::sti_opcode => Register::ST0 + rng.below(8) as u32,
        Kind::seg_reg => Register::ES + rng.below(6) as u32,
        // outside of 64-bit mode CR8 needs a LOCK prefix, which only AMD knows
        Kind::cr_reg => {
            let all = [
                Register::CR0,
                Register::CR2,
                Register::CR3,
                Register::CR4,
                Register::CR8,
            ];
            let count = if width == Width::Bits64 { 5 } else { 4 };
            rng.pick(&all[..count])
        }
        Kind::dr_reg => Register::DR0 + rng.below(8) as u32,
        _ => return None,
    })
}

/// The address size of all of an instruction's string operands must agree; whether it is
/// narrow follows from how many items there are, so that both operands get the same.
fn string_operand(builder: &Builder, _rng: &mut Rng, kind: Kind) -> Option<OpKind> {
    let narrow = builder.length() % 16 == 7;
    let bits = match (builder.width(), narrow) {
        (Width::Bits64, false) => 64,
        (Width::Bits64 | Width::Bits16, true) | (Width::Bits32, false) => 32,
        (Width::Bits32, true) | (Width::Bits16, false) => 16,
    };
    Some(match (kind, bits) {
        (Kind::seg_rSI, 64) => OpKind::MemorySegRSI,
        (Kind::es_rDI, 64) => OpKind::MemoryESRDI,
        (Kind::seg_rDI, 64) => OpKind::MemorySegRDI,
        (Kind::seg_rSI, 32) => OpKind::MemorySegESI,
        (Kind::es_rDI, 32) => OpKind::MemoryESEDI,
        (Kind::seg_rDI, 32) => OpKind::MemorySegEDI,
        (Kind::seg_rSI, _) => OpKind::MemorySegSI,
        (Kind::es_rDI, _) => OpKind::MemoryESDI,
        (Kind::seg_rDI, _) => OpKind::MemorySegDI,
        _ => return None,
    })
}

fn set_immediate(
    rng: &mut Rng,
    instruction: &mut Instruction,
    operand: u32,
    kind: Kind,
    immediates: &mut u32,
) -> bool {
    let second = *immediates > 0;
    *immediates += 1;
    let (op_kind, bits) = match kind {
        Kind::imm8 if second => (OpKind::Immediate8_2nd, 8),
        Kind::imm8 | Kind::imm8_const_1 => (OpKind::Immediate8, 8),
        Kind::imm8sex16 => (OpKind::Immediate8to16, 8),
        Kind::imm8sex32 => (OpKind::Immediate8to32, 8),
        Kind::imm8sex64 => (OpKind::Immediate8to64, 8),
        Kind::imm16 => (OpKind::Immediate16, 16),
        Kind::imm32 => (OpKind::Immediate32, 32),
        Kind::imm32sex64 => (OpKind::Immediate32to64, 32),
        Kind::imm64 => (OpKind::Immediate64, 64),
        _ => return false,
    };
    let mut value = values::immediate(rng, bits);
    if kind == Kind::imm8_const_1 {
        value = 1;
    }
    if instruction.mnemonic() == Mnemonic::Enter {
        // frames and nesting that mostly fit the stack
        value = if second { rng.below(6) } else { rng.below(200) };
    }
    instruction.set_op_kind(operand, op_kind);
    match op_kind {
        OpKind::Immediate8 => instruction.set_immediate8(value as u8),
        OpKind::Immediate8_2nd => instruction.set_immediate8_2nd(value as u8),
        OpKind::Immediate8to16 => instruction.set_immediate8to16(i16::from(value as i8)),
        OpKind::Immediate8to32 => instruction.set_immediate8to32(i32::from(value as i8)),
        OpKind::Immediate8to64 => instruction.set_immediate8to64(i64::from(value as i8)),
        OpKind::Immediate16 => instruction.set_immediate16(value as u16),
        OpKind::Immediate32 => instruction.set_immediate32(value as u32),
        OpKind::Immediate32to64 => instruction.set_immediate32to64(i64::from(value as i32)),
        _ => instruction.set_immediate64(value),
    }
    true
}

/// The number of the general register that is the second operand, for bit tests.
pub(super) fn bit_offset_register(instruction: &Instruction) -> Option<usize> {
    let register = instruction.op1_register();
    register.is_gpr().then(|| gpr_number(register))
}
