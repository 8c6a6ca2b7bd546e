//! What instructions need besides operands: implicit registers, stack contents, branch
//! targets; and short patterns that random choice would never hit on.

use iced_x86::{Code, FlowControl, Instruction, MemoryOperand, Mnemonic, OpKind, Register};

use super::builder::{Builder, RSP, gpr_number};
use super::{memory, operands, state, values};
use crate::case::{PATCH_SIZE, Patch, Width};
use crate::layout::{PAGE, PAGES, STACK, STACK_END};
use crate::program::{Place, Reference, word_patch};
use crate::rng::Rng;

const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RBX: usize = 3;
const RBP: usize = 5;
const RSI: usize = 6;
const RDI: usize = 7;

/// Sets up implicit operands, before the explicit ones are chosen.
pub(super) fn prepare(builder: &mut Builder, rng: &mut Rng, instruction: &mut Instruction) {
    let code = instruction.code();
    let op_code = code.op_code();
    let size = op_code.memory_size().size() as u64;
    let code_address = builder.program.code_address;
    match code.mnemonic() {
        Mnemonic::Div | Mnemonic::Idiv if rng.chance(70) => {
            let high = rng.pick(&[0, 0, u64::MAX, 1]);
            builder.make(RDX, high);
        }
        Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne if rng.chance(70) => {
            let count = rng.pick(&[0, 1, 2, 1 << 32, (1 << 32) + 1, 0x1_0001]);
            builder.make(RCX, count);
        }
        Mnemonic::Jrcxz | Mnemonic::Jecxz | Mnemonic::Jcxz if rng.chance(70) => {
            let count = rng.pick(&[0, 1, 1 << 32, 1 << 16]);
            builder.make(RCX, count);
        }
        Mnemonic::Xlatb => {
            let table = memory::address(rng, 1, code_address);
            let table = builder.width().data_offset(table);
            builder.make(RBX, table.wrapping_sub(rng.below(256)));
        }
        Mnemonic::Maskmovdqu | Mnemonic::Maskmovq | Mnemonic::Vmaskmovdqu => {
            let place = memory::address(rng, 16, code_address);
            builder.make(RDI, builder.width().data_offset(place));
        }
        Mnemonic::Leave | Mnemonic::Enter if rng.chance(85) => {
            let frame = state::stack_pointer(rng);
            builder.make(RBP, builder.width().stack_offset(frame));
        }
        Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq => {
            let flags = state::popped_flags(rng);
            on_stack(builder, rng, |rsp| Some(word_patch(rsp, flags)));
        }
        Mnemonic::Ret => {
            on_stack(builder, rng, |_| None);
            if let Some(rsp) = builder.known(RSP).filter(|_| rng.chance(85)) {
                let target = builder.length() + 1 + rng.index(4);
                let place = builder.width().stack_linear(rsp);
                builder.fixup(target, Place::Memory(place));
            }
        }
        _ if uses_strings(code) => prepare_string(builder, rng, size),
        _ => {}
    }
}

fn uses_strings(code: Code) -> bool {
    use iced_x86::OpCodeOperandKind as Kind;
    code.op_code()
        .op_kinds()
        .iter()
        .any(|k| matches!(k, Kind::seg_rSI | Kind::es_rDI))
}

fn prepare_string(builder: &mut Builder, rng: &mut Rng, size: u64) {
    let code_address = builder.program.code_address;
    let source = memory::address(rng, size, code_address);
    let destination = match rng.below(10) {
        0 | 1 => source.wrapping_add(rng.below(4 * size.max(1))),
        2 => source.wrapping_sub(rng.below(4 * size.max(1))),
        _ => memory::address(rng, size, code_address),
    };
    let count = match rng.below(20) {
        0 => 0,
        1 => 1,
        2..=14 => rng.below(24),
        15..=17 => rng.below(300),
        _ => rng.below(6000),
    };
    builder.make(RSI, builder.width().data_offset(source));
    builder.make(RDI, builder.width().data_offset(destination));
    builder.make(RCX, count);
}

/// Sees to it that RSP usually points into the stack, and puts something there.
fn on_stack(builder: &mut Builder, rng: &mut Rng, patch: impl Fn(u64) -> Option<Patch>) {
    if builder.known(RSP).is_none() && rng.chance(70) {
        let rsp = state::stack_pointer(rng);
        builder.make(RSP, builder.width().stack_offset(rsp));
    }
    if let Some(patch) = builder
        .known(RSP)
        .map(|rsp| builder.width().stack_linear(rsp))
        .filter(|&rsp| is_mapped(rsp, 8))
        .and_then(patch)
    {
        builder.patch(patch);
    }
}

fn is_mapped(address: u64, length: u64) -> bool {
    let page_of = |a: u64| PAGES.iter().any(|&(page, _)| a >= page && a - page < PAGE);
    page_of(address) && page_of(address + length - 1)
}

/// Called with the address of each explicit memory operand.
pub(super) fn on_memory(
    builder: &mut Builder,
    rng: &mut Rng,
    instruction: &Instruction,
    linear: u64,
) {
    if !is_mapped(linear, 16) {
        return;
    }
    let size = instruction.code().op_code().memory_size().size();
    match instruction.mnemonic() {
        // half the time, let the comparison succeed
        Mnemonic::Cmpxchg | Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b if rng.chance(50) => {
            let (low, high) = (
                builder.known(RAX).unwrap_or(0),
                builder.known(RDX).unwrap_or(0),
            );
            let mut bytes = [0; PATCH_SIZE];
            let pair = match instruction.mnemonic() {
                Mnemonic::Cmpxchg8b => u128::from(low & 0xffff_ffff | high << 32),
                _ => u128::from(low) | u128::from(high) << 64,
            };
            bytes[..16].copy_from_slice(&pair.to_le_bytes());
            builder.patch(Patch {
                address: linear,
                length: size as u64,
                bytes,
            });
            builder.commit(RAX);
            builder.commit(RDX);
        }
        Mnemonic::Jmp | Mnemonic::Call if rng.chance(85) => {
            let target = builder.length() + 4 + rng.index(3);
            builder.fixup(target, Place::Memory(linear));
        }
        _ if size == 10 || size == 8 => {
            let mut bytes = [0; PATCH_SIZE];
            if size == 10 && rng.chance(70) {
                bytes[..10].copy_from_slice(&values::extended(rng));
                builder.patch(Patch {
                    address: linear,
                    length: 10,
                    bytes,
                });
            } else if size == 8 && rng.chance(10) {
                let value = values::double(rng);
                builder.patch(word_patch(linear, value));
            }
        }
        _ => {}
    }
}

/// Sees to operands that only make sense together, before the instruction is appended.
pub(super) fn finish(builder: &mut Builder, rng: &mut Rng, instruction: &mut Instruction) {
    let has_memory = instruction.op0_kind() == OpKind::Memory;
    match instruction.mnemonic() {
        // the bit offset reaches far beyond the operand
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc if has_memory => {
            if let Some(n) = operands::bit_offset_register(instruction)
                && gpr_number_of(instruction.memory_base()) != Some(n)
                && gpr_number_of(instruction.memory_index()) != Some(n)
                && rng.chance(80)
            {
                let offset = rng.below(600).wrapping_sub(300);
                builder.make(n, offset);
            }
        }
        Mnemonic::Jmp | Mnemonic::Call if instruction.op0_kind() == OpKind::Register => {
            let n = gpr_number(instruction.op0_register());
            if n != RSP && rng.chance(85) {
                let target = builder.length() + 2 + rng.index(3);
                builder.make_address(n, target);
            }
        }
        _ => {}
    }
}

fn gpr_number_of(register: Register) -> Option<usize> {
    register.is_gpr().then(|| gpr_number(register))
}

/// Gives the instruction just appended a target, if it is a direct branch.
pub(super) fn aim(builder: &mut Builder, rng: &mut Rng) {
    let is_branch = builder.last_instruction().is_some_and(|instruction| {
        matches!(
            instruction.flow_control(),
            FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch | FlowControl::Call
        ) && matches!(
            instruction.op0_kind(),
            OpKind::NearBranch64 | OpKind::NearBranch32 | OpKind::NearBranch16
        )
    });
    if is_branch {
        let target = builder.length() + rng.index(4);
        builder.last_target(Reference::Branch, target);
    }
}

/// Appends one of the patterns, with the help of `filler`, which appends any instruction.
pub(super) fn pattern(
    builder: &mut Builder,
    rng: &mut Rng,
    filler: &mut dyn FnMut(&mut Builder, &mut Rng),
) {
    // a branch from before must not skip what sets the pattern up
    builder.limit_targets();
    match rng.below(4) {
        0 => counted_loop(builder, rng, filler),
        1 => super::save::pattern(builder, rng, filler),
        2 => call_and_return(builder, rng, filler),
        // 16-bit code cannot write to its own segment, nor reach it through another
        _ if builder.width() == Width::Bits16 => {}
        _ => self_modification(builder, rng, filler),
    }
}

fn counted_loop(
    builder: &mut Builder,
    rng: &mut Rng,
    filler: &mut dyn FnMut(&mut Builder, &mut Rng),
) {
    let count = 2 + rng.below(5);
    builder.load(RCX, count);
    let top = builder.length();
    for _ in 0..=rng.below(3) {
        filler(builder, rng);
    }
    close_loop(builder, rng, top, count);
}

/// Jumps back to `top` while RCX counts down, unless the body may have changed RCX.
fn close_loop(builder: &mut Builder, rng: &mut Rng, top: usize, count: u64) {
    if builder.known(RCX) != Some(count) {
        return;
    }
    let (looped, dec, branches) = match builder.width() {
        Width::Bits64 => (
            Code::Loop_rel8_64_RCX,
            Code::Dec_rm64,
            [Code::Jne_rel8_64, Code::Jne_rel32_64, Code::Jg_rel32_64],
        ),
        Width::Bits32 => (
            Code::Loop_rel8_32_ECX,
            Code::Dec_r32,
            [Code::Jne_rel8_32, Code::Jne_rel32_32, Code::Jg_rel32_32],
        ),
        Width::Bits16 => (
            Code::Loop_rel8_16_CX,
            Code::Dec_r16,
            [Code::Jne_rel8_16, Code::Jne_rel16, Code::Jg_rel16],
        ),
    };
    if rng.chance(40) {
        builder.push_branch(looped, top);
    } else if let Ok(dec) = Instruction::with1(dec, builder.pointer(RCX)) {
        builder.push(dec);
        let code = rng.pick(&branches);
        builder.push_branch(code, top);
    }
    builder.forget_all();
}

fn call_and_return(
    builder: &mut Builder,
    rng: &mut Rng,
    filler: &mut dyn FnMut(&mut Builder, &mut Rng),
) {
    let rsp = builder.known(RSP);
    let width = builder.width();
    let linear = rsp.map(|rsp| width.stack_linear(rsp));
    if !linear.is_some_and(|rsp| (STACK + 64..STACK_END).contains(&rsp)) {
        let rsp = STACK + 8 * (64 + rng.below(800));
        builder.load(RSP, width.stack_offset(rsp));
    }
    let (call_code, jump_code, return_code) = match width {
        Width::Bits64 => (Code::Call_rel32_64, Code::Jmp_rel32_64, Code::Retnq),
        Width::Bits32 => (Code::Call_rel32_32, Code::Jmp_rel32_32, Code::Retnd),
        Width::Bits16 => (Code::Call_rel16, Code::Jmp_rel16, Code::Retnw),
    };
    builder.push_branch(call_code, 0);
    let call = builder.length() - 1;
    for _ in 0..rng.below(3) {
        filler(builder, rng);
    }
    builder.push_branch(jump_code, 0);
    let jump = builder.length() - 1;
    let body = builder.length();
    builder.aim_at(call, Reference::Branch, body);
    for _ in 0..=rng.below(2) {
        filler(builder, rng);
    }
    builder.push(Instruction::with(return_code));
    let end = builder.length();
    builder.aim_at(jump, Reference::Branch, end);
    builder.forget_all();
}

/// A loop whose body holds a MOV that is rewritten between the rounds, or straight code
/// that rewrites a MOV still to come.
fn self_modification(
    builder: &mut Builder,
    rng: &mut Rng,
    filler: &mut dyn FnMut(&mut Builder, &mut Rng),
) {
    // RCX counts; the new instruction writes EBX or EDX, as does the old one
    let new = 0xb8 | rng.pick(&[2, 3]) | (rng.bits() as u32) << 8;
    let code = crate::layout::CODE;
    let operand = if builder.width() == Width::Bits64 {
        MemoryOperand::with_base_displ_size(Register::RIP, code as i64, 8)
    } else {
        MemoryOperand::with_displ(code, 4)
    };
    let store = Instruction::with2(Code::Mov_rm32_imm32, operand, new);
    let old = Instruction::with2(Code::Mov_r32_imm32, Register::EBX, rng.bits() as u32);
    let (Ok(store), Ok(old)) = (store, old) else {
        return;
    };
    let looped = rng.chance(50);
    let way = rng.pick(&[Reference::Memory, Reference::Memory, Reference::Alias]);
    if looped {
        builder.load(RCX, 2);
        let top = builder.length();
        builder.push(old);
        if rng.chance(60) {
            filler(builder, rng);
        }
        builder.push(store);
        builder.last_target(way, top);
        close_loop(builder, rng, top, 2);
    } else {
        builder.push(store);
        let position = builder.length() - 1;
        for _ in 0..rng.below(3) {
            filler(builder, rng);
        }
        let place = builder.length();
        builder.aim_at(position, way, place);
        builder.push(old);
    }
    // what the decoder would say of the old instruction no longer holds
    builder.forget_all();
}
