//! Branches: conditional ones, calls and returns, jumps through the jump cache, and the ways
//! out of a block. Called by `lower`.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::asm::{Alu, Asm, RCX, T0, T1, cc};
use super::lower::{Flags, Lower, PendingExit, condition_number};
use super::transfer::{jump_line_offset, jump_through_cache};
use crate::mmu::{JumpEntry, Rights, apart_table};
use crate::returns::stack_number;
use crate::state::state_offset;

impl Lower<'_> {
    /// A jump at `jump` leaves the block for `target`, with the flags in AX.
    pub(super) fn leave_at(&mut self, jump: usize, target: u64) {
        self.pending.push(PendingExit {
            jump,
            target,
            flags_in_host: false,
            rights: self.rights,
            calls: false,
            constant: None,
        });
    }

    /// A conditional jump out of the block's middle. The flags are saved only where it is
    /// taken.
    pub(super) fn side_exit(&mut self, instruction: &Instruction) {
        self.flags_into_host();
        let condition = condition_number(instruction.condition_code());
        let jump = self.asm.jcc_forward(condition);
        self.pending.push(PendingExit {
            jump,
            target: instruction.near_branch_target(),
            flags_in_host: self.flags == Flags::Host,
            rights: self.rights,
            calls: false,
            constant: None,
        });
    }

    pub(super) fn branch(&mut self, instruction: &Instruction) {
        if let Some(legacy) = self.mode.legacy {
            return self.legacy_branch(instruction, legacy);
        }
        let mnemonic = instruction.mnemonic();
        if instruction.is_jcc_short_or_near() {
            self.flags_into_ax();
            self.flags_into_host();
            let condition = condition_number(instruction.condition_code());
            let jump = self.asm.jcc_forward(condition);
            self.leave_at(jump, instruction.near_branch_target());
            self.fall_through(instruction.next_ip());
        } else if instruction.is_jcx_short() || instruction.is_loop() || instruction.is_loopcc() {
            self.count_branch(instruction);
        } else if instruction.is_jmp_short_or_near() {
            self.fall_through(instruction.near_branch_target());
        } else if instruction.is_call_near() {
            self.push_return(instruction);
            self.call(instruction);
        } else if mnemonic == Mnemonic::Ret {
            self.pop_return(instruction);
            self.release_host_flags();
            self.return_to_t0(instruction);
        } else {
            self.indirect_branch(instruction);
        }
    }

    pub(super) fn indirect_branch(&mut self, instruction: &Instruction) {
        self.release_host_flags();
        let target = state_offset!(temp) + 8;
        if instruction.op0_kind() == OpKind::Memory {
            self.load_operand(instruction, 8);
        } else {
            let guest = instruction.op0_register().full_register().number();
            let from = self.register(guest, T0);
            self.asm.store_gs(target, from);
        }
        if instruction.mnemonic() == Mnemonic::Call {
            // #GP comes before the push
            self.asm.load_gs(T1, target);
            self.asm.shift(7, T1, 47);
            self.asm.alu_imm(Alu::Add, T1, 1);
            self.asm.alu_imm(Alu::Cmp, T1, 1);
            let bad = self.asm.jcc_forward(cc::A);
            self.departures.push((bad, *instruction));
            self.push_return(instruction);
            self.asm.load_gs(T0, target);
            self.indirect_call(instruction);
            return;
        }
        self.asm.load_gs(T0, target);
        self.jump_to_t0(instruction);
    }

    /// JRCXZ, LOOP and their kin: no flags are changed.
    pub(super) fn count_branch(&mut self, instruction: &Instruction) {
        let narrow = matches!(
            instruction.code(),
            Code::Jecxz_rel8_64
                | Code::Loop_rel8_64_ECX
                | Code::Loope_rel8_64_ECX
                | Code::Loopne_rel8_64_ECX
        );
        self.flags_into_ax();
        let prefix: &[u8] = if narrow { &[0x67] } else { &[] };
        let jump_if_zero = |asm: &mut Asm, over: u8| {
            asm.raw(prefix);
            asm.raw(&[0xe3, over]);
        };
        let taken = instruction.near_branch_target();
        let next = instruction.next_ip();
        if instruction.is_jcx_short() {
            jump_if_zero(&mut self.asm, 5);
            self.fall_through(next);
            self.fall_through(taken);
            return;
        }
        self.asm.lea(RCX, Some(RCX), None, -1, narrow);
        if instruction.is_loop() {
            jump_if_zero(&mut self.asm, 5);
            self.fall_through(taken);
            self.fall_through(next);
            return;
        }
        self.flags_into_host();
        let equal = matches!(
            instruction.code(),
            Code::Loope_rel8_64_ECX | Code::Loope_rel8_64_RCX
        );
        jump_if_zero(&mut self.asm, 6);
        let jump = self.asm.jcc_forward(if equal { cc::E } else { cc::NE });
        self.leave_at(jump, taken);
        self.fall_through(next);
    }

    /// Whether CALL and RET are so on the host too. Both have the same rights then: those
    /// between STAC and CLAC leave the return stack alone.
    fn pairs_returns(&self) -> bool {
        !self.mode.single && self.mode.legacy.is_none() && self.rights != Rights::Open
    }

    /// Goes on where a direct CALL leads to, and behind it when that has returned.
    fn call(&mut self, instruction: &Instruction) {
        let target = instruction.near_branch_target();
        self.settle_stack();
        if !self.pairs_returns() {
            return self.fall_through(target);
        }
        self.flags_into_ax();
        let jump = self.asm.call_forward();
        self.pending.push(PendingExit {
            jump,
            target,
            flags_in_host: false,
            rights: self.rights,
            calls: true,
            constant: None,
        });
        self.come_back(instruction.next_ip());
    }

    /// As `call`, to the guest address in T0.
    fn indirect_call(&mut self, instruction: &Instruction) {
        self.settle_stack();
        if !self.pairs_returns() {
            return self.jump_to_t0(instruction);
        }
        let call = self.asm.call_forward();
        self.calls.push((call, *instruction));
        self.come_back(instruction.next_ip());
    }

    /// Where a return leads: to `next` if T0 is that, and elsewhere otherwise.
    fn come_back(&mut self, next: u64) {
        let mut constant = None;
        if let Ok(short) = i32::try_from(next as i64) {
            self.asm.alu_imm(Alu::Cmp, T0, short);
        } else {
            constant = Some(self.asm.cmp_constant(T0));
        }
        let elsewhere = self.thunks.returned[stack_number(self.rights)];
        self.asm.jcc(cc::NE, elsewhere);
        self.fall_through(next);
        if let Some(exit) = self.pending.last_mut() {
            exit.constant = constant;
        }
    }

    /// A return to the guest address in T0.
    fn return_to_t0(&mut self, instruction: &Instruction) {
        self.settle_stack();
        if !self.pairs_returns() {
            return self.jump_to_t0(instruction);
        }
        // for the case that it is not canonical
        self.asm.mov_imm(T1, instruction.ip());
        self.asm.ret();
    }

    /// Goes to the guest address in T0 through the jump cache.
    pub(super) fn jump_to_t0(&mut self, instruction: &Instruction) {
        debug_assert!(self.flags != Flags::Host);
        if self.mode.single {
            // the jump cache leads to blocks of more than one instruction
            let miss = self.asm.jmp_forward();
            self.misses.push((miss, instruction.ip()));
            return;
        }
        if let Some(legacy) = self.mode.legacy {
            self.tag_t0(legacy);
        }
        let table = self.mode.jumps_with(self.rights);
        let miss = jump_through_cache(&mut self.asm, table);
        self.misses.push((miss, instruction.ip()));
    }

    /// Whether a branch's target lies in the page that the block begins in.
    pub(super) fn same_page(&self, target: u64) -> bool {
        self.mode.linear(target) >> 12 == self.mode.linear(self.start) >> 12
    }

    /// To the block for the instruction at an offset from here that checks every access by
    /// itself.
    pub(super) fn go_apart(&mut self, guest: u16, rights: Rights) {
        let target = self.start.wrapping_add(guest.into());
        let line = jump_line_offset(apart_table(rights), target);
        let a = &mut self.asm;
        a.mov_imm(T0, target);
        a.load_gs(T1, state_offset!(space));
        a.alu_mem(Alu::Cmp, T0, T1, line);
        a.jcc(cc::NE, self.thunks.apart);
        a.jmp_mem(T1, line + std::mem::offset_of!(JumpEntry, code) as i32);
    }

    /// To another page, whose mapping may change: through the jump cache.
    pub(super) fn far_exit(&mut self, target: u64, rights: Rights) {
        let entry = jump_line_offset(self.mode.jumps_with(rights), target);
        let a = &mut self.asm;
        if self.mode.single {
            a.mov_imm(T0, target);
            a.jmp(self.thunks.lookup);
            return;
        }
        if let Some(legacy) = self.mode.legacy {
            a.mov_imm(T0, legacy.jump_key(target));
            a.load_gs(T1, state_offset!(space));
            a.alu_mem(Alu::Cmp, T0, T1, entry);
            let miss = a.jcc_forward(cc::NE);
            a.jmp_mem(T1, entry + std::mem::offset_of!(JumpEntry, code) as i32);
            a.aim(miss);
            self.untag_t0();
            self.asm.jmp(self.thunks.lookup);
            return;
        }
        a.mov_imm(T0, target);
        a.load_gs(T1, state_offset!(space));
        a.alu_mem(Alu::Cmp, T0, T1, entry);
        a.jcc(cc::NE, self.thunks.far_lookup[rights as usize]);
        a.jmp_mem(T1, entry + std::mem::offset_of!(JumpEntry, code) as i32);
    }
}
