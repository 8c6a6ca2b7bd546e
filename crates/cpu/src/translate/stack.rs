//! Stack operations: PUSH, POP, LEAVE, and what CALL and RET do to the stack.
//!
//! Called by `lower`. RSP changes after the access, so that a fault finds it as it was; in a span,
//! whose first access alone can fault, after all of them that follow each other. So calls do not
//! wait for a chain of additions.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::access::{Place, STACK_WINDOW, window_number};
use super::asm::{GUEST_RSP, HOME, RBP, T0, T1};
use super::classify::Class;
use super::lower::{Flags, Lower, meta};
use crate::state::{gpr, state_offset};

impl Lower<'_> {
    /// Lowers a stack operation; false if it has to be emulated after all.
    pub(super) fn stack(&mut self, instruction: &Instruction) -> bool {
        if let Some(legacy) = self.mode.legacy {
            return self.legacy_stack(instruction, legacy);
        }
        match instruction.mnemonic() {
            Mnemonic::Push => self.push(instruction),
            Mnemonic::Pop => self.pop(instruction),
            Mnemonic::Leave if instruction.code() == Code::Leaveq => {
                self.release_host_flags();
                let frame = Place { base: RBP, disp: 0 };
                let window = window_number(instruction);
                self.access_at(frame, window, 8, meta::STACK, |s| {
                    s.asm.load_at(T0, frame, 8);
                    Flags::Ax
                });
                self.asm.lea(GUEST_RSP, Some(RBP), None, 8, false);
                self.asm.mov(RBP, T0);
                true
            }
            _ => false,
        }
    }

    /// An access at `[RSP + disp]`, whose check a span may have made.
    fn on_stack(&mut self, disp: i32, size: u32, what: u32, body: impl FnOnce(&mut Self, Place)) {
        let place = Place {
            base: GUEST_RSP,
            disp: disp + self.stack_moves,
        };
        if self.in_span {
            body(self, place);
            return;
        }
        self.release_host_flags();
        self.access_at(place, STACK_WINDOW, size, what | meta::STACK, |s| {
            body(s, place);
            Flags::Ax
        });
    }

    /// Moves RSP, which may come later where nothing else of the span can fault.
    fn move_stack(&mut self, by: i32) {
        self.stack_moves += by;
        if !self.in_span {
            self.settle_stack();
        }
    }

    /// Makes the guest's RSP what it is to be.
    pub(super) fn settle_stack(&mut self) {
        let by = std::mem::take(&mut self.stack_moves);
        if by != 0 {
            self.asm.lea(GUEST_RSP, Some(GUEST_RSP), None, by, false);
        }
    }

    fn push(&mut self, instruction: &Instruction) -> bool {
        let size = instruction.stack_pointer_increment().unsigned_abs();
        let back = -(size as i32);
        match instruction.op0_kind() {
            OpKind::Memory => {
                self.load_operand(instruction, size);
                self.on_stack(back, size, meta::STORE, |s, place| {
                    s.asm.load_gs(T0, state_offset!(temp) + 8);
                    s.asm.store_at(place, T0, size);
                });
            }
            OpKind::Register => {
                let guest = instruction.op0_register().full_register().number();
                self.on_stack(back, size, meta::STORE, |s, place| {
                    let from = s.register(guest, T0);
                    s.asm.store_at(place, from, size);
                });
            }
            _ => {
                let value = instruction.immediate(0) as i64 as i32;
                self.on_stack(back, size, meta::STORE, |s, place| {
                    s.asm.store_imm_at(place, value, size);
                });
            }
        }
        self.move_stack(back);
        true
    }

    /// The memory operand of PUSH, CALL or JMP into `temp[1]`.
    pub(super) fn load_operand(&mut self, instruction: &Instruction, size: u32) {
        self.release_host_flags();
        self.address(instruction, 0);
        let what = self.stack_segment(instruction);
        self.access(window_number(instruction), size, what, |s| {
            s.asm.load_sized(T1, T0, size);
            s.asm.store_gs(state_offset!(temp) + 8, T1);
            Flags::Ax
        });
    }

    fn pop(&mut self, instruction: &Instruction) -> bool {
        let size = instruction.stack_pointer_increment().unsigned_abs();
        if instruction.op0_kind() == OpKind::Memory {
            self.pop_to_memory(instruction, size);
            return true;
        }
        let guest = instruction.op0_register().full_register().number();
        let home = HOME[guest].filter(|_| guest != gpr::RSP);
        self.on_stack(0, size, 0, |s, place| {
            if home.is_none() && size == 2 {
                let old = s.register(guest, T0);
                s.asm.mov(T0, old);
            }
            s.asm.load_at(home.unwrap_or(T0), place, size);
        });
        self.move_stack(size as i32);
        if guest == gpr::RSP {
            self.settle_stack();
        }
        match (home, size) {
            (Some(_), _) => {}
            // POP SP keeps the upper bits of the incremented RSP
            (None, 2) if guest == gpr::RSP => self.asm.raw(&[0x66, 0x45, 0x89, 0xd7]), // mov r15w, r10w
            _ => self.set_register(guest, T0),
        }
        true
    }

    fn pop_to_memory(&mut self, instruction: &Instruction, size: u32) {
        self.on_stack(0, size, 0, |s, place| {
            s.asm.load_at(T0, place, size);
            s.asm.store_gs(state_offset!(temp) + 8, T0);
        });
        let on_rsp = instruction.memory_base().full_register() == Register::RSP;
        self.address(instruction, if on_rsp { size as i32 } else { 0 });
        let what = meta::STORE | self.stack_segment(instruction);
        self.access(window_number(instruction), size, what, |s| {
            s.asm.load_gs(T1, state_offset!(temp) + 8);
            s.asm.store_sized(T0, T1, size);
            Flags::Ax
        });
        self.move_stack(size as i32);
    }

    /// What CALL pushes.
    pub(super) fn push_return(&mut self, instruction: &Instruction) {
        let next = instruction.next_ip();
        self.on_stack(-8, 8, meta::STORE, |s, place| {
            if let Ok(short) = i32::try_from(next as i64) {
                s.asm.store_imm_at(place, short, 8);
            } else {
                s.asm.mov_imm(T0, next);
                s.asm.store_at(place, T0, 8);
            }
        });
        self.move_stack(-8);
    }

    /// What RET pops, into T0.
    pub(super) fn pop_return(&mut self, instruction: &Instruction) {
        self.on_stack(0, 8, 0, |s, place| s.asm.load_at(T0, place, 8));
        let drop = if instruction.op_count() == 1 {
            i32::from(instruction.immediate16())
        } else {
            0
        };
        self.move_stack(8 + drop);
    }

    /// RFLAGS in T1, made by PUSHFQ, onto the stack.
    pub(super) fn push_t1(&mut self) {
        self.asm.store_gs(state_offset!(temp) + 8, T1);
        self.on_stack(-8, 8, meta::STORE, |s, place| {
            s.asm.load_gs(T0, state_offset!(temp) + 8);
            s.asm.store_at(place, T0, 8);
        });
        self.move_stack(-8);
    }
}

/// Whether an instruction of a span neither reads RSP but to push and pop, nor can fault once the
/// span has been checked, nor ends the block.
pub(super) fn leaves_stack_pointer(instruction: &Instruction, class: Class) -> bool {
    use Mnemonic as M;
    let registers = 0..instruction.op_count();
    let names_it = registers
        .map(|i| instruction.op_register(i).full_register())
        .any(|register| register == Register::RSP);
    let memory = instruction.memory_base().full_register() == Register::RSP
        || (0..instruction.op_count()).any(|i| instruction.op_kind(i) == OpKind::Memory);
    let simple = matches!(
        instruction.mnemonic(),
        M::Mov | M::Movzx | M::Movsx | M::Movsxd | M::Xor | M::And | M::Or | M::Not | M::Neg
    ) || matches!(
        instruction.mnemonic(),
        M::Add | M::Sub | M::Inc | M::Dec | M::Cmp | M::Test
    );
    match class {
        Class::Nop => true,
        Class::Plain => simple && !names_it && !memory,
        Class::Stack => matches!(instruction.mnemonic(), M::Push | M::Pop) && !names_it && !memory,
        Class::Branch => instruction.is_call_near() || instruction.mnemonic() == M::Ret,
        Class::Special if instruction.mnemonic() == M::Lea => {
            !names_it && instruction.memory_base().full_register() != Register::RSP
        }
        Class::Special | Class::Transfer | Class::System => false,
    }
}
