//! Short forms of instructions that read or change privileged state: segment and control
//! registers, FS and GS bases, POPF in ring 0. What faults or has consequences beyond the
//! register is left to `system`, before anything has changed.
//!
//! Called by `lower`.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::access::{Place, STACK_WINDOW};
use super::asm::{Alu, GUEST_RSP, T0, T1, cc};
use super::lower::{Flags, Lower, meta};
use super::transfer::{RESTORED_FLAGS, SPECIAL_FLAGS, VIRTUAL_FLAGS};
use crate::state::{cr4, rflags, state_offset};

/// Whether `instruction` is a MOV from a segment or control register to a general one.
pub(super) fn reads_special_register(instruction: &Instruction) -> bool {
    instruction.mnemonic() == Mnemonic::Mov
        && instruction.op0_kind() == OpKind::Register
        && instruction.op1_kind() == OpKind::Register
        && !instruction.has_lock_prefix()
        && (instruction.op1_register().is_segment_register()
            || matches!(
                instruction.op1_register(),
                Register::CR0 | Register::CR2 | Register::CR3 | Register::CR4
            ))
}

impl Lower<'_> {
    /// False: the instruction has no short form here.
    pub(super) fn privileged(&mut self, instruction: &Instruction) -> bool {
        if self.mode.legacy.is_some() {
            return false;
        }
        match instruction.mnemonic() {
            Mnemonic::Mov => self.read_special_register(instruction),
            Mnemonic::Rdfsbase | Mnemonic::Rdgsbase => self.read_base(instruction),
            Mnemonic::Wrfsbase | Mnemonic::Wrgsbase => self.write_base(instruction),
            Mnemonic::Popfq => self.popfq(instruction),
            _ => false,
        }
    }

    /// Leaves `instruction` to `system` outside ring 0.
    pub(super) fn depart_unless_ring_0(&mut self, instruction: &Instruction) {
        self.asm.cmp_gs_byte(state_offset!(cpl), 0);
        self.depart_if(cc::NE, instruction);
    }

    fn read_special_register(&mut self, instruction: &Instruction) -> bool {
        let (to, from) = (instruction.op0_register(), instruction.op1_register());
        let guest = to.full_register().number();
        if from.is_segment_register() {
            let selector = state_offset!(segments)
                + 16 * from.number() as i32
                + std::mem::offset_of!(crate::state::Segment, selector) as i32;
            self.asm.load_gs_word(T0, selector);
            if to.size() == 2 {
                self.set_word(guest);
            } else {
                self.set_register(guest, T0);
            }
            return true;
        }
        let at = match from {
            Register::CR0 => state_offset!(cr0),
            Register::CR2 => state_offset!(cr2),
            Register::CR3 => state_offset!(cr3),
            _ => state_offset!(cr4),
        };
        if self.mode.user || to.size() != 8 {
            return false;
        }
        self.release_host_flags();
        self.depart_unless_ring_0(instruction);
        self.asm.load_gs(T0, at);
        self.set_register(guest, T0);
        true
    }

    fn base_of(instruction: &Instruction) -> i32 {
        if matches!(
            instruction.mnemonic(),
            Mnemonic::Rdfsbase | Mnemonic::Wrfsbase
        ) {
            state_offset!(fs_base)
        } else {
            state_offset!(gs_base)
        }
    }

    fn depart_without_fsgsbase(&mut self, instruction: &Instruction) {
        self.release_host_flags();
        self.asm.test_gs(state_offset!(cr4), cr4::FSGSBASE as u32);
        self.depart_if(cc::E, instruction);
    }

    fn read_base(&mut self, instruction: &Instruction) -> bool {
        let to = instruction.op0_register();
        self.depart_without_fsgsbase(instruction);
        self.asm.load_gs(T0, Self::base_of(instruction));
        if to.size() == 4 {
            self.asm.raw(&[0x45, 0x89, 0xd2]); // mov r10d, r10d
        }
        self.set_register(to.full_register().number(), T0);
        true
    }

    fn write_base(&mut self, instruction: &Instruction) -> bool {
        let from = instruction.op0_register();
        self.depart_without_fsgsbase(instruction);
        let value = self.register(from.full_register().number(), T0);
        self.asm.mov(T0, value);
        if from.size() == 4 {
            self.asm.raw(&[0x45, 0x89, 0xd2]); // mov r10d, r10d
        }
        self.depart_unless_canonical(instruction);
        self.asm.store_gs(Self::base_of(instruction), T0);
        true
    }

    /// Leaves `instruction` to `system` if the address in T0 is not canonical. Clobbers T1
    /// and the host's flags.
    pub(super) fn depart_unless_canonical(&mut self, instruction: &Instruction) {
        let a = &mut self.asm;
        a.mov(T1, T0);
        a.shift(7, T1, 47);
        a.alu_imm(Alu::Add, T1, 1);
        a.alu_imm(Alu::Cmp, T1, 1);
        self.depart_if(cc::A, instruction);
    }

    /// POPFQ in ring 0. Interrupts that it would let through after they were held back take
    /// the long way, as with STI.
    fn popfq(&mut self, instruction: &Instruction) -> bool {
        if self.mode.user || self.mode.single || instruction.code() != Code::Popfq {
            return false;
        }
        self.release_host_flags();
        self.depart_unless_ring_0(instruction);
        self.asm.test_gs(
            state_offset!(system_flags),
            (VIRTUAL_FLAGS | rflags::AC) as u32,
        );
        self.depart_if(cc::NE, instruction);
        self.asm.test_gs_zero(state_offset!(interrupts_held));
        self.depart_if(cc::NE, instruction);
        let place = Place {
            base: GUEST_RSP,
            disp: 0,
        };
        self.access_at(place, STACK_WINDOW, 8, meta::STACK, |s| {
            s.asm.load_at(T0, place, 8);
            Flags::Ax
        });
        self.asm.mov(T1, T0);
        self.asm.test32(T1, SPECIAL_FLAGS as u32);
        self.depart_if(cc::NE, instruction);
        self.asm.and32(T1, RESTORED_FLAGS as u32);
        self.split_t1();
        self.asm.lea(GUEST_RSP, Some(GUEST_RSP), None, 8, false);
        true
    }
}
