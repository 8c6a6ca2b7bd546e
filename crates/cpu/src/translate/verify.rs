//! Checks finished blocks against the rules that make the software CPU a boundary
//! (docs/security.md): where emitted code reads and writes, where it jumps, what it never
//! contains. It decodes what was emitted and knows nothing of how it came about.
//!
//! ```text
//!   bytes ─► instructions ─► paths, which never loop ─► what each register is, at each
//!                                                       instruction ─► is it allowed?
//! ```
//!
//! For tests: every form of every instruction, and random bytes.

mod facts;

use std::mem::{offset_of, size_of};

use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory,
    Mnemonic, OpKind, Register, UsedMemory, UsedRegister,
};

use super::lower::{Lowered, meta};
use super::thunks::Thunks;
use crate::mmu::{AddressSpace, JumpEntry, Rights};
use crate::returns::stack_number;
use crate::state::{Block, WIDE_WINDOWS, WideWindow, state_offset};
use facts::{Facts, Value, gs_constant, writes};

/// Instructions without privilege that read or change what is not the guest's: the identity of
/// the processor, its tables and counters, segment bases, and flags that Rust code relies on.
const OF_THE_HOST: [Mnemonic; 28] = [
    Mnemonic::Cpuid,
    Mnemonic::Lar,
    Mnemonic::Lsl,
    Mnemonic::Verr,
    Mnemonic::Verw,
    Mnemonic::Sgdt,
    Mnemonic::Sidt,
    Mnemonic::Sldt,
    Mnemonic::Str,
    Mnemonic::Smsw,
    Mnemonic::Rdpid,
    Mnemonic::Rdpmc,
    Mnemonic::Rdpru,
    Mnemonic::Xgetbv,
    Mnemonic::Rdfsbase,
    Mnemonic::Rdgsbase,
    Mnemonic::Wrfsbase,
    Mnemonic::Wrgsbase,
    Mnemonic::Xrstor,
    Mnemonic::Xrstor64,
    Mnemonic::Fxrstor,
    Mnemonic::Fxrstor64,
    Mnemonic::Std,
    Mnemonic::Cld,
    Mnemonic::Stac,
    Mnemonic::Clac,
    Mnemonic::Popfq,
    Mnemonic::Pushfq,
];

/// What translated code may write of the state block: offset and length.
fn writable() -> Vec<(i32, usize)> {
    let misses = |n| {
        let window = state_offset!(wide) + (n * size_of::<WideWindow>()) as i32;
        (window + offset_of!(WideWindow, misses) as i32, 8)
    };
    let misses = (0..2 * WIDE_WINDOWS).map(misses);
    let fields = [
        (state_offset!(gpr), 16 * 8),
        (state_offset!(temp), 4 * 8),
        (state_offset!(status), 8),
        (state_offset!(saved_status), 8),
        (state_offset!(system_flags), 8),
        (state_offset!(gs_base), 8),
        (state_offset!(kernel_gs_base), 8),
        (state_offset!(fs_base), 8),
        (state_offset!(frame), 5 * 8),
        (state_offset!(segments), 6 * 16),
        (state_offset!(cpl), 1),
        (state_offset!(user_returns), 8),
    ];
    fields.into_iter().chain(misses).collect()
}

/// A block, decoded.
struct Code64<'a> {
    base: u64,
    length: u64,
    all: Vec<Instruction>,
    /// Index of the instruction that begins at an offset.
    at: Vec<Option<usize>>,
    thunks: &'a Thunks,
}

/// Whether `block`, placed at host address `base`, keeps to the rules; else what breaks one.
///
/// `offered` are the features of the guest's CPUID: `iced-x86` does not tell of the memory that
/// some exotic instructions of others touch.
pub(super) fn verify(
    block: &Lowered,
    base: u64,
    thunks: &Thunks,
    offered: &dyn Fn(CpuidFeature) -> bool,
) -> Result<(), String> {
    let mut decoder = Decoder::with_ip(64, &block.code, base, DecoderOptions::NONE);
    let all: Vec<Instruction> = decoder.iter().collect();
    let mut at = vec![None; block.code.len()];
    for (index, instruction) in all.iter().enumerate() {
        at[(instruction.ip() - base) as usize] = Some(index);
    }
    let code = Code64 {
        base,
        length: block.code.len() as u64,
        all,
        at,
        thunks,
    };
    let entry = at_offset(&code, u64::from(block.entry)).map_err(str::to_owned)?;
    let order = code.order(&[0, entry])?;
    let mut facts: Vec<Option<Facts>> = vec![None; code.all.len()];
    facts[0] = Some(Facts::at_entry());
    facts[entry] = Some(Facts::at_entry());
    let mut info = InstructionInfoFactory::new();
    for index in order {
        let instruction = &code.all[index];
        let wrong = |what: &str| format!("{what}: {instruction} at {:#x}", instruction.ip() - base);
        let Some(before) = facts[index].take() else {
            continue; // no path leads here
        };
        let known = info.info(instruction);
        let registers = known.used_registers();
        plain(instruction, registers, offered).map_err(wrong)?;
        match known.used_memory() {
            [] => {}
            [one] => memory(&code, instruction, one, &before).map_err(wrong)?,
            _ => return Err(wrong("more than one memory operand")),
        }
        code.flow(instruction, &before).map_err(wrong)?;
        let next = code.next(index).map_err(wrong)?;
        for (target, jumped) in next {
            let after = before.after(&code, index, registers, jumped);
            if let Some(after) = after.map_err(wrong)? {
                let merged = match facts[target].take() {
                    Some(other) => other.join(&after, target),
                    None => after,
                };
                facts[target] = Some(merged);
            }
        }
    }
    Ok(())
}

fn at_offset(code: &Code64<'_>, offset: u64) -> Result<usize, &'static str> {
    let index = code.at.get(offset as usize).copied().flatten();
    index.ok_or("a jump into the middle of an instruction, or beyond the end")
}

/// What no instruction of a block may be or do.
fn plain(
    i: &Instruction,
    registers: &[UsedRegister],
    offered: &dyn Fn(CpuidFeature) -> bool,
) -> Result<(), &'static str> {
    if i.is_invalid() {
        return Err("no instruction");
    }
    if i.is_privileged() {
        return Err("privileged");
    }
    if OF_THE_HOST.contains(&i.mnemonic()) {
        return Err("reads or changes what is the host's");
    }
    if !i.cpuid_features().iter().all(|f| offered(*f)) {
        return Err("an instruction that the guest is not offered");
    }
    if is_on_stack(i) {
        return Ok(());
    }
    for used in registers {
        let register = used.register();
        if register.full_register() == Register::RSP && !changes_stack(i) {
            return Err("uses the host's stack pointer");
        }
        let special = register.is_segment_register() || register.is_cr() || register.is_dr();
        if special && writes(used.access()) {
            return Err("writes a control or segment register");
        }
    }
    Ok(())
}

/// Whether it is one of the stack operations of a block: the word for a slow path, calls, and
/// returns to where a call of some block comes back.
fn is_on_stack(i: &Instruction) -> bool {
    matches!(
        i.code(),
        Code::Pushq_imm32 | Code::Call_rel32_64 | Code::Retnq
    )
}

/// Whether it goes from one return stack to the other.
fn changes_stack(i: &Instruction) -> bool {
    let supervisor = state_offset!(return_bases) + 8 * stack_number(Rights::Supervisor) as i32;
    let user = state_offset!(user_returns);
    let at = gs_constant(i);
    match i.code() {
        Code::Mov_r64_rm64 => at == Some(supervisor.into()) || at == Some(user.into()),
        Code::Mov_rm64_r64 => i.op1_register() == Register::RSP && at == Some(user.into()),
        _ => false,
    }
}

/// 1 if an access with this word is a store.
fn stores(what: u32) -> usize {
    usize::from(what & meta::STORE != 0)
}

/// Where memory is read and written.
fn memory(
    code: &Code64<'_>,
    i: &Instruction,
    used: &UsedMemory,
    facts: &Facts,
) -> Result<(), &'static str> {
    if is_on_stack(i) {
        return Ok(());
    }
    if i.is_stack_instruction() {
        return Err("a stack operation of the guest's");
    }
    let size = used.memory_size().size() as i64;
    if size == 0 {
        return Err("memory of unknown size");
    }
    let stored = writes(used.access());
    let at = used.displacement() as i64;
    if used.segment() == Register::GS || used.segment() == Register::FS {
        let constant = used.base() == Register::None && used.index() == Register::None;
        if !constant || used.segment() == Register::FS {
            return Err("a segment base and a register");
        }
        return state_block(at, size, stored);
    }
    if i.is_ip_rel_memory_operand() {
        // a constant in the block
        let first = i.ip_rel_memory_address();
        let last = first + size as u64 - 1;
        return if stored || !code.is_inside(first) || !code.is_inside(last) {
            Err("a constant beyond the block")
        } else {
            Ok(())
        };
    }
    let index = match used.index() {
        Register::None => None,
        _ if used.scale() == 1 => Some(facts.get(used.index())),
        _ => return Err("memory of nobody's"),
    };
    match (facts.get(used.base()), index) {
        // [base + T1 + displacement], what T1 belongs to being near the base
        (Value::Plain { sym, off }, Some(Value::Delta(checked))) if checked.sym == sym => {
            let from = off.wrapping_add(at).wrapping_sub(checked.low);
            checked.covers(from, size, stored)
        }
        // [T0], which is base + T1
        (Value::Host(checked), None) => checked.covers(at, size, stored),
        // a line of the address space
        (Value::Space { most } | Value::Line { most, .. } | Value::Jump { most, .. }, None) => {
            let end = at + i64::from(most) + size;
            if stored || at < 0 || end > size_of::<AddressSpace>() as i64 {
                Err("outside of the address space")
            } else {
                Ok(())
            }
        }
        (Value::Plain { .. }, Some(Value::Delta(_))) => Err("not the address that was checked"),
        _ => Err("memory of nobody's"),
    }
}

fn state_block(at: i64, size: i64, stored: bool) -> Result<(), &'static str> {
    if at < 0 || at + size > size_of::<Block>() as i64 {
        return Err("outside of the state block");
    }
    let within = |(start, length): &(i32, usize)| {
        i64::from(*start) <= at && at + size <= i64::from(*start) + *length as i64
    };
    if stored && !writable().iter().any(within) {
        return Err("writes what is not the guest's of the state block");
    }
    Ok(())
}

impl Code64<'_> {
    /// Whether control may go where the instruction sends it.
    fn flow(&self, i: &Instruction, facts: &Facts) -> Result<(), &'static str> {
        let t = self.thunks;
        if facts.pushed.is_some() && self.slow_thunk(i).is_none() && !self.is_pushed_check(i) {
            return Err("a word on the stack that no slow path takes");
        }
        match i.flow_control() {
            FlowControl::Next => Ok(()),
            FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch => {
                let target = i.near_branch_target();
                let outs = [t.lookup, t.apart, t.branch, t.system, t.attention, t.fault];
                let far = [t.far_lookup, t.far_branch, t.unchained];
                let mut outs = outs.iter().chain(far.as_flattened()).chain(&t.returned);
                if self.is_inside(target) || outs.any(|t| *t == target) {
                    Ok(())
                } else {
                    Err("a jump to somewhere else")
                }
            }
            FlowControl::Call => {
                let slow = self.slow_thunk(i).is_some() || self.is_pushed_check(i);
                let slow = slow && facts.pushed.is_some();
                let others = [t.commit, t.fpu_load, t.link, t.draft.entry];
                if i.code() == Code::Call_rel32_64
                    && (slow
                        || self.is_inside(i.near_branch_target())
                        || self.is_repeat(i)
                        || t.draft.checks(i.near_branch_target()).is_some()
                        || others.contains(&i.near_branch_target()))
                {
                    Ok(())
                } else {
                    Err("a call to somewhere else")
                }
            }
            FlowControl::IndirectBranch => {
                let code = offset_of!(JumpEntry, code) as i64;
                match facts.get(i.memory_base()) {
                    Value::Jump { at, .. }
                        if i.code() == Code::Jmp_rm64
                            && i.op0_kind() == OpKind::Memory
                            && i.memory_index() == Register::None
                            && i.memory_displacement64() as i64 == at + code =>
                    {
                        Ok(())
                    }
                    _ => Err("an indirect jump past the jump cache"),
                }
            }
            // what cannot be encoded
            FlowControl::Return if i.code() == Code::Retnq => Ok(()),
            FlowControl::Exception if i.code() == Code::Ud2 => Ok(()),
            _ => Err("a transfer of control that no block may contain"),
        }
    }

    fn is_inside(&self, target: u64) -> bool {
        target.wrapping_sub(self.base) < self.length
    }

    /// Whether a repeated copy or fill is called.
    fn is_repeat(&self, i: &Instruction) -> bool {
        self.thunks
            .repeat
            .as_flattened()
            .contains(&i.near_branch_target())
    }

    /// Whether the check of a draft's access is called whose word was pushed.
    fn is_pushed_check(&self, i: &Instruction) -> bool {
        self.thunks
            .draft
            .check_pushed
            .contains(&i.near_branch_target())
    }

    /// What a draft's check that is called has checked.
    fn draft_check(&self, i: &Instruction, pushed: Option<u32>) -> Option<u32> {
        let draft = &self.thunks.draft;
        let store = draft
            .check_pushed
            .iter()
            .position(|t| *t == i.near_branch_target());
        let right = |what: &u32| store.is_some_and(|index| index & 1 == stores(*what));
        draft
            .checks(i.near_branch_target())
            .or_else(|| pushed.filter(right))
    }

    /// Which slow path is called: whether for a store.
    fn slow_thunk(&self, i: &Instruction) -> Option<bool> {
        let is_it = |thunk: &u64| *thunk == i.near_branch_target();
        let Thunks {
            slow, slow_always, ..
        } = self.thunks;
        let index = slow.iter().position(is_it);
        let index = index.or_else(|| slow_always.iter().position(is_it))?;
        Some(index & 1 != 0)
    }

    /// Where control can go within the block, and whether by the jump.
    fn next(&self, index: usize) -> Result<Vec<(usize, bool)>, &'static str> {
        let i = &self.all[index];
        let mut next = Vec::new();
        let links =
            i.flow_control() == FlowControl::Call && i.near_branch_target() == self.thunks.link;
        if !links
            && !matches!(
                i.flow_control(),
                FlowControl::UnconditionalBranch
                    | FlowControl::IndirectBranch
                    | FlowControl::Return
                    | FlowControl::Exception
            )
        {
            next.push((self.following(index)?, false));
        }
        let branch = matches!(
            i.flow_control(),
            FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch | FlowControl::Call
        );
        if branch && i.op0_kind() == OpKind::NearBranch64 && self.is_inside(i.near_branch_target())
        {
            let target = at_offset(self, i.near_branch_target() - self.base)?;
            next.push((target, true));
        }
        // a slow path may return behind the jump that follows it
        if self.slow_thunk(i).is_some() && i.flow_control() == FlowControl::Call {
            let after = self.following(index)?;
            if self.all[after].code() != Code::Jmp_rel32_64 {
                return Err("a slow path that does not go back");
            }
            next.push((self.following(after)?, true));
        }
        Ok(next)
    }

    fn following(&self, index: usize) -> Result<usize, &'static str> {
        if index + 1 < self.all.len() {
            Ok(index + 1)
        } else {
            Err("the block runs on beyond its end")
        }
    }

    /// All instructions that can be reached, each after all that lead to it.
    fn order(&self, starts: &[usize]) -> Result<Vec<usize>, String> {
        #[derive(Clone, Copy, PartialEq)]
        enum Mark {
            New,
            Open,
            Done,
        }
        let mut marks = vec![Mark::New; self.all.len()];
        let mut order = Vec::new();
        let mut stack: Vec<(usize, bool)> = starts.iter().map(|s| (*s, false)).collect();
        while let Some((index, leave)) = stack.pop() {
            if leave {
                marks[index] = Mark::Done;
                order.push(index);
                continue;
            }
            match marks[index] {
                Mark::Done => continue,
                // met again on a path from itself, or queued twice before it was opened
                Mark::Open => return Err("a block that loops".into()),
                Mark::New => {}
            }
            marks[index] = Mark::Open;
            stack.push((index, true));
            for (next, _) in self.next(index).map_err(str::to_owned)? {
                match marks[next] {
                    // the way back to the stub before the entry
                    Mark::Open => return Err("a block that loops".into()),
                    Mark::New => stack.push((next, false)),
                    Mark::Done => {}
                }
            }
        }
        order.reverse();
        Ok(order)
    }
}

#[cfg(test)]
mod tests;
