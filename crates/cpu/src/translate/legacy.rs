//! Code that is not 64-bit code, as 64-bit host code: 16- and 32-bit addresses with their
//! segments, stacks of ESP or SP, near branches within a code segment.
//!
//! Called by `lower` in place of its own methods when the block's mode has a [`Legacy`]
//! part; what is not lowered here goes to `system`. Linear addresses have 32 bits, and so
//! have the code offsets that stand for RIP. Plain instructions are `plain`'s here too.

use std::mem::offset_of;

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::access::{STACK_WINDOW, window_number};
use super::asm::{Alu, GUEST_RSP, HOME, RAX, RBP, RCX, Reg, T0, T1, cc};
use super::classify::Class;
use super::lower::{Flags, Lower, condition_number, meta};
use crate::exception::vector;
use crate::segmentation::{Extent, Legacy, segment_fault};
use crate::state::{Segment, segment as index, state_offset};

/// A jump to where a fault is raised: of general protection or, for the stack, #SS(0).
pub(super) struct SegmentFault {
    jump: usize,
    ip: u64,
    vector: u8,
    /// A pending x87 exception goes before it.
    waits: bool,
}

/// What to do with an instruction that was decoded as 16- or 32-bit code, where that is not
/// what `classify` says of it.
pub(super) fn classify(instruction: &Instruction) -> Option<Class> {
    use Mnemonic as M;
    if instruction.is_invalid() {
        return None;
    }
    match instruction.code() {
        Code::Jmp_rm16
        | Code::Jmp_rm32
        | Code::Call_rm16
        | Code::Call_rm32
        | Code::Retnw
        | Code::Retnw_imm16
        | Code::Retnd
        | Code::Retnd_imm16 => return Some(Class::Branch),
        _ => {}
    }
    matches!(
        instruction.mnemonic(),
        M::Aaa | M::Aas | M::Aad | M::Aam | M::Daa | M::Das | M::Salc | M::Arpl
    )
    .then_some(Class::System)
}

/// The number of a segment register.
pub(super) fn segment_number(register: Register) -> usize {
    match register {
        Register::ES => index::ES,
        Register::CS => index::CS,
        Register::SS => index::SS,
        Register::FS => index::FS,
        Register::GS => index::GS,
        _ => index::DS,
    }
}

/// Whether the memory operand has a 16-bit address.
fn has_short_address(instruction: &Instruction) -> bool {
    let base = instruction.memory_base();
    let index = instruction.memory_index();
    if base == Register::None && index == Register::None {
        return instruction.memory_displ_size() == 2;
    }
    base.size() == 2 || index.size() == 2
}

/// GS displacement of a segment register's base.
fn base_of(segment: usize) -> i32 {
    match segment {
        index::FS => state_offset!(fs_base),
        index::GS => state_offset!(gs_base),
        _ => {
            let at = segment * size_of::<Segment>() + offset_of!(Segment, base);
            state_offset!(segments) + at as i32
        }
    }
}

/// Whether the operand's offset is a constant and the access ends within 4 GiB of it.
fn is_inside(instruction: &Instruction, size: u64) -> bool {
    instruction.memory_base() == Register::None
        && instruction.memory_index() == Register::None
        && instruction.memory_displacement64() + size <= 1 << 32
}

/// What an access beyond a segment raises.
fn fault_vector(segment: usize) -> u8 {
    segment_fault(segment).vector
}

/// Beside the vector of a fault: a pending x87 exception goes before it.
pub(crate) const FAULT_WAITS: u64 = 1 << 8;

const BELOW: u8 = 2;

impl Lower<'_> {
    /// The effective address plus `extra` into T0, zero-extended; flags stay.
    pub(super) fn legacy_effective(&mut self, instruction: &Instruction, extra: i32) {
        let short = has_short_address(instruction);
        let base = instruction.memory_base();
        let index = instruction.memory_index();
        let displacement = instruction.memory_displacement64() as u32;
        let total = displacement.wrapping_add(extra as u32);
        if base == Register::None && index == Register::None {
            let mask = if short { 0xffff } else { u32::MAX };
            self.asm.mov_imm(T0, u64::from(total & mask));
            return;
        }
        let home = |r: Register| HOME[r.full_register().number() & 7];
        let host_base = (base != Register::None).then(|| home(base)).flatten();
        let host_index = (index != Register::None)
            .then(|| home(index))
            .flatten()
            .map(|reg| (reg, instruction.memory_index_scale() as u8));
        self.asm.lea(T0, host_base, host_index, total as i32, true);
        if short {
            self.cut_t0_to_word();
        }
    }

    fn cut_t0_to_word(&mut self) {
        self.asm.raw(&[0x45, 0x0f, 0xb7, 0xd2]); // movzx r10d, r10w
    }

    /// Makes the offset in T0 that `instruction` accesses a linear address, checked. T1 and
    /// the host's flags must be free.
    pub(super) fn legacy_segment(&mut self, instruction: &Instruction, legacy: Legacy) {
        if has_short_address(instruction) {
            // sums of several steps
            self.cut_t0_to_word();
        }
        let (what, size) = self.memory_use(instruction).unwrap_or((meta::STORE, 1));
        self.fault_waits = what & meta::WAITS != 0;
        let store = what & meta::STORE != 0;
        let segment = segment_number(instruction.memory_segment());
        let checked = legacy.checked >> segment & 1 != 0;
        let based = legacy.based >> segment & 1 != 0;
        if checked && segment == index::SS && what & meta::ALIGNED != 0 {
            // the #GP for what is misaligned goes before this segment's #SS
            self.asm.mov(T1, T0);
            self.add_base(T1, segment);
            self.asm.raw(&[0x41, 0xf7, 0xc3]); // test r11d, size - 1
            self.asm.raw(&(size - 1).to_le_bytes());
            let misaligned = self.asm.jcc_forward(cc::NE);
            self.segment_fault(misaligned, vector::GP);
        }
        if based && !checked && !is_inside(instruction, size.into()) {
            // what reaches beyond 4 GiB of a flat segment wraps in the linear addresses only
            self.asm.lea(T1, Some(T0), None, size as i32 - 1, false);
            self.asm.shift(5, T1, 32);
            let beyond = self.asm.jcc_forward(cc::NE);
            self.segment_fault(beyond, fault_vector(segment));
        }
        self.segment_access(legacy, segment, size, store);
        self.fault_waits = false;
    }

    /// Checks `size` bytes at the offset in T0 against a segment, and adds its base.
    fn segment_access(&mut self, legacy: Legacy, segment: usize, size: u32, store: bool) {
        if legacy.checked >> segment & 1 != 0 {
            let extent = state_offset!(extents) + (segment * size_of::<Extent>()) as i32;
            let end = if store {
                offset_of!(Extent, store_end)
            } else {
                offset_of!(Extent, end)
            };
            let first = extent + offset_of!(Extent, first) as i32;
            self.asm.alu_gs(Alu::Cmp, T0, first);
            let below = self.asm.jcc_forward(BELOW);
            self.asm.lea(T1, Some(T0), None, size as i32, false);
            self.asm.alu_gs(Alu::Cmp, T1, extent + end as i32);
            let above = self.asm.jcc_forward(cc::A);
            self.segment_fault(below, fault_vector(segment));
            self.segment_fault(above, fault_vector(segment));
        }
        if legacy.based >> segment & 1 != 0 {
            self.add_base(T0, segment);
            self.wraps = meta::WRAPS;
        }
    }

    /// Adds a segment's base to T0 or T1 in 32 bits.
    fn add_base(&mut self, to: Reg, segment: usize) {
        // add to, gs:[base]
        self.asm.raw(&[0x65, 0x44, 0x03, (to.0 & 7) << 3 | 4, 0x25]);
        self.asm.raw(&base_of(segment).to_le_bytes());
    }

    fn segment_fault(&mut self, jump: usize, vector: u8) {
        let ip = self.current_ip();
        let waits = self.fault_waits;
        self.segment_faults.push(SegmentFault {
            jump,
            ip,
            vector,
            waits,
        });
    }

    /// Writes where segment faults are raised.
    pub(super) fn finish_segment_faults(&mut self) {
        for fault in std::mem::take(&mut self.segment_faults) {
            self.asm.aim(fault.jump);
            self.asm.mov_imm(T0, fault.ip);
            let waits = if fault.waits { FAULT_WAITS } else { 0 };
            self.asm.mov_imm(T1, u64::from(fault.vector) | waits);
            self.asm.jmp(self.thunks().fault);
        }
    }

    /// The linear address `offset` bytes from the top of the stack into T0, checked.
    fn stack_address(&mut self, legacy: Legacy, offset: i32, size: u32, store: bool) {
        self.asm.lea(T0, Some(GUEST_RSP), None, offset, true);
        if !legacy.big_stack {
            self.cut_t0_to_word();
        }
        self.segment_access(legacy, index::SS, size, store);
    }

    /// Adds to ESP or SP. T1 and flags stay.
    fn legacy_move_stack(&mut self, legacy: Legacy, by: i32) {
        if legacy.big_stack {
            self.asm.lea(GUEST_RSP, Some(GUEST_RSP), None, by, true);
        } else {
            self.asm.lea(T0, Some(GUEST_RSP), None, by, true);
            self.asm.raw(&[0x66, 0x45, 0x89, 0xd7]); // mov r15w, r10w
        }
    }

    /// `mov r11d, [r10]`, or a zero-extended word.
    fn load_t1(&mut self, size: u32) {
        if size == 2 {
            self.asm.raw(&[0x45, 0x0f, 0xb7, 0x1a]);
        } else {
            self.asm.raw(&[0x45, 0x8b, 0x1a]);
        }
    }

    /// `mov [r10], from`, 4 or 2 bytes.
    fn store_part(&mut self, from: Reg, size: u32) {
        if size == 2 {
            self.asm.raw(&[0x66]);
        }
        let rex = 0x41 | (from.0 >> 3) << 2;
        self.asm.raw(&[rex, 0x89, (from.0 & 7) << 3 | 2]);
    }

    /// T1 as the new value of a general register, 4 or 2 bytes of it.
    fn set_part(&mut self, guest: usize, size: u32) {
        let Some(home) = HOME[guest & 7] else { return };
        if size == 2 {
            self.asm.raw(&[0x66]);
        }
        // mov home, r11
        let rex = 0x44 | home.0 >> 3;
        self.asm.raw(&[rex, 0x89, 0xd8 | home.0 & 7]);
    }

    /// Loads `size` bytes at the linear address in T0 into T1.
    fn load(&mut self, window: u32, size: u32, what: u32) {
        self.access(window, size, what, |s| {
            s.load_t1(size);
            Flags::Ax
        });
    }

    /// Pushes what `value` puts into T1, or a constant.
    fn push_value(&mut self, legacy: Legacy, size: u32, value: impl FnOnce(&mut Self) -> Reg) {
        self.stack_address(legacy, -(size as i32), size, true);
        self.access(STACK_WINDOW, size, meta::STORE | meta::STACK, |s| {
            let from = value(s);
            s.store_part(from, size);
            Flags::Ax
        });
        self.legacy_move_stack(legacy, -(size as i32));
    }

    fn push_constant(&mut self, legacy: Legacy, size: u32, value: u64) {
        self.push_value(legacy, size, |s| {
            s.asm.mov_imm(T1, value & 0xffff_ffff);
            T1
        });
    }

    /// PUSH, POP and LEAVE; false if `system` has to do it.
    pub(super) fn legacy_stack(&mut self, instruction: &Instruction, legacy: Legacy) -> bool {
        let size = match instruction.mnemonic() {
            Mnemonic::Leave => return self.legacy_leave(instruction, legacy),
            _ => instruction.stack_pointer_increment().unsigned_abs(),
        };
        if size != 2 && size != 4 {
            return false;
        }
        self.release_host_flags();
        match (instruction.mnemonic(), instruction.op0_kind()) {
            (Mnemonic::Push, OpKind::Register) => {
                let guest = instruction.op0_register().full_register().number();
                self.push_value(legacy, size, |_| HOME[guest & 7].unwrap_or(T1));
            }
            (Mnemonic::Push, OpKind::Memory) => {
                self.address(instruction, 0);
                self.load(window_number(instruction), size, 0);
                self.asm.store_gs(state_offset!(temp) + 8, T1);
                self.push_value(legacy, size, |s| {
                    s.asm.load_gs(T1, state_offset!(temp) + 8);
                    T1
                });
            }
            (Mnemonic::Push, _) => self.push_constant(legacy, size, instruction.immediate(0)),
            (_, OpKind::Memory) => self.pop_memory(instruction, legacy, size),
            _ => {
                let guest = instruction.op0_register().full_register().number();
                self.stack_address(legacy, 0, size, false);
                self.load(STACK_WINDOW, size, meta::STACK);
                self.legacy_move_stack(legacy, size as i32);
                self.set_part(guest, size);
            }
        }
        true
    }

    /// POP to memory, whose address is computed with the new ESP.
    fn pop_memory(&mut self, instruction: &Instruction, legacy: Legacy, size: u32) {
        self.stack_address(legacy, 0, size, false);
        self.load(STACK_WINDOW, size, meta::STACK);
        self.asm.store_gs(state_offset!(temp) + 8, T1);
        let on_stack = instruction.memory_base() == Register::ESP;
        self.address(instruction, if on_stack { size as i32 } else { 0 });
        self.access(window_number(instruction), size, meta::STORE, |s| {
            s.asm.load_gs(T1, state_offset!(temp) + 8);
            s.store_part(T1, size);
            Flags::Ax
        });
        self.legacy_move_stack(legacy, size as i32);
    }

    fn legacy_leave(&mut self, instruction: &Instruction, legacy: Legacy) -> bool {
        if instruction.code() != Code::Leaved || !legacy.big_stack {
            return false;
        }
        self.release_host_flags();
        self.asm.lea(T0, Some(RBP), None, 0, true);
        self.segment_access(legacy, index::SS, 4, false);
        self.load(window_number(instruction), 4, meta::STACK);
        self.asm.lea(GUEST_RSP, Some(RBP), None, 4, true);
        self.set_part(5, 4);
        true
    }

    /// A near branch.
    pub(super) fn legacy_branch(&mut self, instruction: &Instruction, legacy: Legacy) {
        if instruction.is_jcc_short_or_near() {
            self.flags_into_ax();
            self.flags_into_host();
            let condition = condition_number(instruction.condition_code());
            let jump = self.asm.jcc_forward(condition);
            self.leave_to(legacy, jump, instruction.near_branch_target());
            self.fall_through(instruction.next_ip());
        } else if instruction.is_jcx_short() || instruction.is_loop() || instruction.is_loopcc() {
            self.legacy_count_branch(instruction, legacy);
        } else if instruction.is_jmp_short_or_near() {
            self.flags_into_ax();
            let jump = self.asm.jmp_forward();
            self.leave_to(legacy, jump, instruction.near_branch_target());
        } else if instruction.is_call_near() {
            self.release_host_flags();
            let target = instruction.near_branch_target();
            if target <= u64::from(legacy.code_limit) {
                let size = instruction.stack_pointer_increment().unsigned_abs();
                self.push_constant(legacy, size, instruction.next_ip());
            }
            let jump = self.asm.jmp_forward();
            self.leave_to(legacy, jump, target);
        } else if instruction.mnemonic() == Mnemonic::Ret {
            self.legacy_return(instruction, legacy);
        } else {
            self.legacy_indirect(instruction, legacy);
        }
    }

    /// Aims `jump` at a direct branch's target, which may lie beyond the code segment.
    fn leave_to(&mut self, legacy: Legacy, jump: usize, target: u64) {
        if target > u64::from(legacy.code_limit) {
            self.segment_fault(jump, vector::GP);
        } else {
            self.leave_at(jump, target);
        }
    }

    /// Raises #GP(0) if the code offset in T0 lies beyond the code segment.
    fn check_target(&mut self, legacy: Legacy) {
        if legacy.code_limit == u32::MAX {
            return;
        }
        self.asm.mov_imm(T1, legacy.code_limit.into());
        self.asm.raw(&[0x4d, 0x39, 0xda]); // cmp r10, r11
        let beyond = self.asm.jcc_forward(cc::A);
        self.segment_fault(beyond, vector::GP);
    }

    fn legacy_return(&mut self, instruction: &Instruction, legacy: Legacy) {
        let word = matches!(instruction.code(), Code::Retnw | Code::Retnw_imm16);
        let size = if word { 2 } else { 4 };
        self.release_host_flags();
        self.stack_address(legacy, 0, size, false);
        self.load(STACK_WINDOW, size, meta::STACK);
        self.asm.mov(T0, T1);
        self.check_target(legacy);
        let drop = if instruction.op_count() == 1 {
            i32::from(instruction.immediate16())
        } else {
            0
        };
        let target = state_offset!(temp) + 8;
        self.asm.store_gs(target, T0);
        self.legacy_move_stack(legacy, size as i32 + drop);
        self.asm.load_gs(T0, target);
        self.jump_to_t0(instruction);
    }

    /// JMP or CALL through a register or memory.
    fn legacy_indirect(&mut self, instruction: &Instruction, legacy: Legacy) {
        let word = matches!(instruction.code(), Code::Jmp_rm16 | Code::Call_rm16);
        let size = if word { 2 } else { 4 };
        self.release_host_flags();
        if instruction.op0_kind() == OpKind::Memory {
            self.address(instruction, 0);
            self.load(window_number(instruction), size, 0);
            self.asm.mov(T0, T1);
        } else {
            let guest = instruction.op0_register().full_register().number();
            let from = HOME[guest & 7].unwrap_or(T1);
            self.asm.lea(T0, Some(from), None, 0, true);
            if word {
                self.cut_t0_to_word();
            }
        }
        self.check_target(legacy);
        if instruction.mnemonic() == Mnemonic::Call {
            let target = state_offset!(temp) + 8;
            self.asm.store_gs(target, T0);
            self.push_constant(legacy, size, instruction.next_ip());
            self.asm.load_gs(T0, target);
        }
        self.jump_to_t0(instruction);
    }

    /// JCXZ, LOOP and their kin, with CX or ECX: no flags are changed.
    fn legacy_count_branch(&mut self, instruction: &Instruction, legacy: Legacy) {
        let word = matches!(
            instruction.code(),
            Code::Jcxz_rel8_16
                | Code::Jcxz_rel8_32
                | Code::Loop_rel8_16_CX
                | Code::Loop_rel8_32_CX
                | Code::Loope_rel8_16_CX
                | Code::Loope_rel8_32_CX
                | Code::Loopne_rel8_16_CX
                | Code::Loopne_rel8_32_CX
        );
        self.release_host_flags();
        let taken = instruction.near_branch_target();
        let test: &[u8] = if word {
            &[0x66, 0x85, 0xc9] // test cx, cx
        } else {
            &[0x85, 0xc9] // test ecx, ecx
        };
        if instruction.is_jcx_short() {
            self.asm.raw(test);
            let jump = self.asm.jcc_forward(cc::E);
            self.leave_to(legacy, jump, taken);
            self.fall_through(instruction.next_ip());
            return;
        }
        self.asm.lea(T1, Some(RCX), None, -1, true);
        self.set_part(1, if word { 2 } else { 4 });
        self.asm.raw(test);
        let done = self.asm.jcc_forward(cc::E);
        self.leave_at(done, instruction.next_ip());
        if !instruction.is_loop() {
            let equal = matches!(
                instruction.code(),
                Code::Loope_rel8_16_CX
                    | Code::Loope_rel8_32_CX
                    | Code::Loope_rel8_16_ECX
                    | Code::Loope_rel8_32_ECX
            );
            self.asm.raw(&[0xf6, 0xc4, 0x40]); // test ah, 0x40: ZF as LAHF has it
            let out = self.asm.jcc_forward(if equal { cc::E } else { cc::NE });
            self.leave_at(out, instruction.next_ip());
        }
        if taken > u64::from(legacy.code_limit) {
            // the branch faults, so it has not counted
            self.asm.lea(T1, Some(RCX), None, 1, true);
            self.set_part(1, if word { 2 } else { 4 });
        }
        let jump = self.asm.jmp_forward();
        self.leave_to(legacy, jump, taken);
    }

    /// VZEROUPPER and VZEROALL, which leave the upper eight registers alone here.
    pub(super) fn legacy_clear_vectors(&mut self, all: bool) {
        for number in 0..8_u8 {
            let same = 0xc0 | number << 3 | number;
            if all {
                // vpxor xmm, xmm, xmm
                self.asm
                    .raw(&[0xc5, 0x80 | (!number & 0xf) << 3 | 1, 0xef, same]);
            } else {
                // vmovaps xmm, xmm
                self.asm.raw(&[0xc5, 0xf8, 0x28, same]);
            }
        }
    }

    /// Puts into T0 what stands for its code offset in the jump cache.
    pub(super) fn tag_t0(&mut self, legacy: Legacy) {
        self.asm.mov_imm(T1, legacy.jump_key(0));
        self.asm.lea(T0, Some(T0), Some((T1, 1)), 0, false);
    }

    /// Takes from T0 what [`Lower::tag_t0`] added.
    pub(super) fn untag_t0(&mut self) {
        self.asm.raw(&[0x45, 0x89, 0xd2]); // mov r10d, r10d
    }
}

const _: () = assert!(T0.0 == 10 && T1.0 == 11 && GUEST_RSP.0 == 15 && RAX.0 == 0);
