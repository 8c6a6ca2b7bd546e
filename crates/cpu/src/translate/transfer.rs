//! Ways from block to block through the jump cache of the address space, and the changes
//! of privilege that go this way: SYSCALL and SYSRET in their common form. What is not
//! common (single-stepping, alignment checks, interrupts that were held back, addresses that
//! are not canonical) is left to `system`, before anything has changed.
//!
//! Called by `lower` and `thunks`.

use iced_x86::{Instruction, Mnemonic};

use super::access::{Place, STACK_WINDOW, window_number};
use super::asm::{Alu, Asm, GUEST_RSP, RAX, RCX, RSP, Reg, T0, T1, cc, slot};
use super::lower::{Flags, Lower, meta};
use crate::mmu::{
    AddressSpace, JUMP_ENTRIES, JUMP_HASH, JUMP_NEIGHBOUR, JUMP_SHIFT, JumpEntry, Rights,
    jump_entries, jump_index, jump_table,
};
use crate::returns::stack_number;
use crate::state::{efer, gpr, rflags, segment, state_offset};
use crate::system::{FLAT_CODE, FLAT_STACK, SYSRET_FLAGS};

/// Flags that make what follows a return to ring 3 another kind of block.
pub(super) const SPECIAL_FLAGS: u64 = rflags::TF | rflags::AC;

/// What POPF and IRET may change in ring 0, but for what makes them special.
pub(super) const RESTORED_FLAGS: u64 =
    rflags::STATUS | rflags::DF | rflags::NT | rflags::ID | rflags::IF | rflags::IOPL;
/// VIF and VIP, which SYSRET alone can set.
pub(super) const VIRTUAL_FLAGS: u64 = 3 << 19;

/// The values that IRET pops, by their order.
const FRAME_RIP: i32 = 0;
const FRAME_CS: i32 = 1;
const FRAME_FLAGS: i32 = 2;
const FRAME_RSP: i32 = 3;
const FRAME_SS: i32 = 4;

/// Where IRET puts a value that it popped.
fn frame(value: i32) -> i32 {
    state_offset!(frame) + 8 * value
}

/// Offset in the address space of the line of a jump cache that `target` is in.
pub(super) fn jump_line_offset(table: usize, target: u64) -> i32 {
    jumps_offset(table) + (jump_index(table, target) * size_of::<JumpEntry>()) as i32
}

/// Offset of jump cache number `table` in the address space.
fn jumps_offset(table: usize) -> i32 {
    let table = table * size_of::<[JumpEntry; JUMP_ENTRIES]>();
    (std::mem::offset_of!(AddressSpace, jumps) + table) as i32
}

/// Goes on at the guest address in T0, if the jump cache knows it. Returns the jump to aim
/// for when it does not; T0 is still the address there. Clobbers T1 and the host's flags.
pub(super) fn jump_through_cache(a: &mut Asm, table: usize) -> usize {
    jump_line(a, T1, table, 0);
    let entry = jumps_offset(table);
    a.alu_mem(Alu::Cmp, T0, T1, entry);
    let miss = a.jcc_forward(cc::NE);
    a.jmp_mem(T1, entry + std::mem::offset_of!(JumpEntry, code) as i32);
    miss
}

/// As `jump_through_cache`, in the neighbouring line. Keeps T1, but for when it jumps; RAX,
/// which it clobbers, is taken from `temp[1]` then.
pub(super) fn jump_through_neighbour(a: &mut Asm, table: usize) -> usize {
    jump_line(a, RAX, table, JUMP_NEIGHBOUR);
    let entry = jumps_offset(table);
    a.alu_mem(Alu::Cmp, T0, RAX, entry);
    let miss = a.jcc_forward(cc::NE);
    a.load(
        T1,
        RAX,
        entry + std::mem::offset_of!(JumpEntry, code) as i32,
    );
    a.load_gs(RAX, state_offset!(temp) + 8);
    a.jmp_reg(T1);
    miss
}

/// The distance of a line from the first of the first table, plus the address space: into
/// `to`, for the guest address in T0. `change` are bits of its number to change.
fn jump_line(a: &mut Asm, to: Reg, table: usize, change: usize) {
    let entry = size_of::<JumpEntry>();
    a.multiply(to, T0, JUMP_HASH as i32);
    a.shift(5, to, JUMP_SHIFT - entry.trailing_zeros() as u8);
    a.and32(to, ((jump_entries(table) - 1) * entry) as u32);
    if change != 0 {
        a.alu_imm(Alu::Xor, to, (change * entry) as i32);
    }
    a.alu_gs(Alu::Add, to, state_offset!(space));
}

impl Lower<'_> {
    /// A change of privilege. False: the instruction has no short form here.
    pub(super) fn transfer(&mut self, instruction: &Instruction) -> bool {
        let mode = self.mode;
        if mode.single || mode.aligned || mode.legacy.is_some() {
            return false;
        }
        self.release_host_flags();
        match instruction.mnemonic() {
            Mnemonic::Syscall if mode.user => self.syscall(instruction),
            Mnemonic::Sysretq if !mode.user => self.sysret(instruction),
            // the next block begins with a look at what others have changed
            Mnemonic::Serialize => self.fall_through(instruction.next_ip()),
            Mnemonic::Iretq if !mode.user => self.iretq(instruction),
            _ => return false,
        }
        true
    }

    /// Leaves `instruction` to `system` if `condition` holds.
    pub(super) fn depart_if(&mut self, condition: u8, instruction: &Instruction) {
        let jump = self.asm.jcc_forward(condition);
        self.departures.push((jump, *instruction));
    }

    fn depart_unless_enabled(&mut self, instruction: &Instruction) {
        self.asm.test_gs(state_offset!(efer), efer::SCE as u32);
        self.depart_if(cc::E, instruction);
    }

    /// SYSCALL from ring 3, where `system::syscall` says what it does.
    fn syscall(&mut self, instruction: &Instruction) {
        self.depart_unless_enabled(instruction);
        // which would open ring 3's pages to the supervisor
        self.asm
            .test_gs(state_offset!(system_flags), rflags::AC as u32);
        self.depart_if(cc::NE, instruction);
        self.rflags_into_t1();
        let a = &mut self.asm;
        a.store_gs(slot(gpr::R11), T1);
        a.mov_imm(RCX, instruction.next_ip());
        a.load_gs(T0, state_offset!(msrs.sfmask));
        a.raw(&[0x49, 0xf7, 0xd2]); // not r10
        a.alu(Alu::And, T1, T0);
        self.split_t1();
        let a = &mut self.asm;
        a.load_gs_word(T0, state_offset!(msrs.star) + 4);
        a.and32(T0, 0xfffc);
        self.flat_segment(segment::CS, FLAT_CODE);
        self.next_selector();
        self.flat_segment(segment::SS, FLAT_STACK);
        let a = &mut self.asm;
        a.store_gs_byte(state_offset!(cpl), 0);
        a.load_gs(T0, state_offset!(msrs.lstar));
        a.store_gs(state_offset!(user_returns), RSP);
        let stack = 8 * stack_number(Rights::Supervisor) as i32;
        a.load_gs(RSP, state_offset!(return_bases) + stack);
        self.enter_ring(Rights::Supervisor);
    }

    /// SYSRET to 64-bit code, where `system::sysret` says what it does.
    fn sysret(&mut self, instruction: &Instruction) {
        self.depart_unless_ring_0(instruction);
        self.depart_unless_enabled(instruction);
        self.asm.test_gs_zero(state_offset!(interrupts_held));
        self.depart_if(cc::NE, instruction);
        self.asm.mov(T0, RCX);
        self.depart_unless_canonical(instruction);
        self.asm.load_gs(T1, slot(gpr::R11));
        self.asm.test32(T1, SPECIAL_FLAGS as u32);
        self.depart_if(cc::NE, instruction);
        self.asm.and32(T1, SYSRET_FLAGS as u32);
        self.split_t1();
        self.asm.load_gs_word(T0, state_offset!(msrs.star) + 6);
        self.next_selector();
        self.asm.alu_imm(Alu::Or, T0, 3);
        self.flat_segment(segment::SS, FLAT_STACK | 3 << 5);
        self.next_selector();
        self.flat_segment(segment::CS, FLAT_CODE | 3 << 5);
        self.asm.store_gs_byte(state_offset!(cpl), 3);
        self.asm.mov(T0, RCX);
        self.asm.load_gs(RSP, state_offset!(user_returns));
        self.enter_ring(Rights::User);
    }

    /// IRETQ from ring 0 to ring 3 or 0 with flat segments, where `transfer::iret` says what
    /// it does.
    fn iretq(&mut self, instruction: &Instruction) {
        self.depart_unless_ring_0(instruction);
        let a = &mut self.asm;
        a.test_gs(
            state_offset!(system_flags),
            (rflags::NT | VIRTUAL_FLAGS) as u32,
        );
        self.depart_if(cc::NE, instruction);
        self.asm.test_gs_zero(state_offset!(interrupts_held));
        self.depart_if(cc::NE, instruction);
        // an NMI may wait for this
        self.asm.cmp_gs_byte(state_offset!(nmi_blocked), 0);
        self.depart_if(cc::NE, instruction);
        let place = |value: i32| Place {
            base: GUEST_RSP,
            disp: 8 * value,
        };
        self.access_at(place(0), STACK_WINDOW, 40, meta::STACK, |s| {
            for value in 0..5 {
                s.asm.load_at(T0, place(value), 8);
                s.asm.store_gs(frame(value), T0);
            }
            Flags::Ax
        });
        self.asm.load_gs(T0, frame(FRAME_FLAGS));
        self.asm.test32(T0, SPECIAL_FLAGS as u32);
        self.depart_if(cc::NE, instruction);
        self.asm.load_gs(T0, frame(FRAME_RIP));
        self.depart_unless_canonical(instruction);
        self.asm.load_gs_word(T0, frame(FRAME_CS));
        self.asm.test32(T0, 3);
        let to_ring_0 = self.asm.jcc_forward(cc::E);
        self.iretq_to(3, instruction);
        self.asm.aim(to_ring_0);
        self.iretq_to(0, instruction);
    }

    fn iretq_to(&mut self, ring: u16, instruction: &Instruction) {
        let (code, stack) = (FLAT_CODE | ring << 5, FLAT_STACK | ring << 5);
        self.depart_unless_flat(FRAME_CS, code, instruction);
        self.asm.load_gs_word(T0, frame(FRAME_SS));
        let mut null = None;
        if ring == 0 {
            self.asm.test32(T0, 0xffff);
            null = Some(self.asm.jcc_forward(cc::E));
        }
        self.depart_unless_flat(FRAME_SS, stack, instruction);
        if ring != 0 {
            self.depart_if_dropping(instruction);
        }
        self.asm.load_gs_word(T0, frame(FRAME_SS));
        self.flat_segment(segment::SS, stack);
        if let Some(null) = null {
            let over = self.asm.jmp_forward();
            self.asm.aim(null);
            let at = state_offset!(segments) + 16 * segment::SS as i32;
            self.asm.store_gs_imm(at, 0);
            self.asm.store_gs_imm(at + 8, 0);
            self.asm.aim(over);
        }
        self.asm.load_gs_word(T0, frame(FRAME_CS));
        self.flat_segment(segment::CS, code);
        let a = &mut self.asm;
        a.load_gs(GUEST_RSP, frame(FRAME_RSP));
        a.load_gs(T1, frame(FRAME_FLAGS));
        a.and32(T1, RESTORED_FLAGS as u32);
        self.split_t1();
        let a = &mut self.asm;
        a.store_gs_byte(state_offset!(cpl), ring as u8);
        a.load_gs(T0, frame(FRAME_RIP));
        if ring == 3 {
            a.load_gs(RSP, state_offset!(user_returns));
            self.enter_ring(Rights::User);
        } else {
            self.enter_ring(Rights::Supervisor);
        }
    }

    /// Leaves `instruction` to `system` unless the selector in the frame is one of the GDT
    /// whose descriptor is flat, was accessed before and has these attributes.
    fn depart_unless_flat(&mut self, selector: i32, attributes: u16, instruction: &Instruction) {
        let ring = u32::from(attributes >> 5 & 3);
        let a = &mut self.asm;
        a.load_gs_word(T0, frame(selector));
        a.mov(T1, T0);
        a.and32(T1, 7);
        a.alu_imm(Alu::Cmp, T1, ring as i32);
        self.depart_if(cc::NE, instruction);
        let a = &mut self.asm;
        a.alu_imm(Alu::Or, T0, 7);
        a.load_gs_word(T1, state_offset!(gdtr.limit));
        a.alu(Alu::Cmp, T1, T0);
        self.depart_if(cc::B, instruction);
        let a = &mut self.asm;
        a.alu_imm(Alu::And, T0, !7);
        // the null descriptor
        self.depart_if(cc::E, instruction);
        self.asm.alu_gs(Alu::Add, T0, state_offset!(gdtr.base));
        self.access(window_number(instruction), 8, 0, |s| {
            s.asm.load(T0, T0, 0);
            Flags::Ax
        });
        let descriptor = (u64::from(attributes) | 0xf00) << 40 | 0xffff;
        self.asm.mov_imm(T1, descriptor);
        self.asm.alu(Alu::Cmp, T0, T1);
        self.depart_if(cc::NE, instruction);
    }

    /// Leaves `instruction` to `system` if a data segment is loaded that ring 3 may not
    /// keep, or any other.
    fn depart_if_dropping(&mut self, instruction: &Instruction) {
        let descriptor = |index: usize| state_offset!(segments) + 16 * index as i32 + 8;
        let a = &mut self.asm;
        a.load_gs(T1, descriptor(segment::DS));
        for index in [segment::ES, segment::FS, segment::GS] {
            a.alu_gs(Alu::Or, T1, descriptor(index));
        }
        // the present bit of the attributes
        a.shift(5, T1, 48);
        a.test32(T1, 0x80);
        self.depart_if(cc::NE, instruction);
    }

    /// Goes on at the guest address in T0 in another ring.
    fn enter_ring(&mut self, rights: Rights) {
        let miss = jump_through_cache(&mut self.asm, jump_table(rights, false));
        self.asm.aim(miss);
        self.asm.jmp(self.thunks.far_lookup[rights as usize]);
    }

    /// RFLAGS, less RF and VM, into T1: put together from AX and the system flags. Clobbers
    /// T0 and the host's flags.
    pub(super) fn rflags_into_t1(&mut self) {
        let a = &mut self.asm;
        a.mov(T1, RAX);
        a.shift(5, T1, 8);
        a.and32(T1, 0xd5);
        a.raw(&[0x44, 0x0f, 0xb6, 0xd0]); // movzx r10d, al
        a.shift(4, T0, 11);
        a.alu(Alu::Or, T1, T0);
        a.load_gs(T0, state_offset!(system_flags));
        a.alu_imm(Alu::And, T0, !((rflags::RF | rflags::VM) as i32));
        a.alu(Alu::Or, T1, T0);
    }

    /// RFLAGS in T1 to where they are kept: AX and the system flags. Clobbers T1 and the
    /// host's flags.
    pub(super) fn split_t1(&mut self) {
        let a = &mut self.asm;
        a.mov(RAX, T1);
        a.and32(RAX, 0xd5);
        a.shift(4, RAX, 8);
        a.raw(&[0x41, 0x0f, 0xba, 0xe3, 11]); // bt r11d, 11
        a.raw(&[0x83, 0xd0, 0]); // adc eax, 0
        a.alu_imm(Alu::And, T1, !(rflags::STATUS as i32));
        a.alu_imm(Alu::Or, T1, rflags::FIXED as i32);
        a.store_gs(state_offset!(system_flags), T1);
    }

    /// Adds 8 to the selector in T0.
    fn next_selector(&mut self) {
        self.asm.raw(&[0x66, 0x41, 0x83, 0xc2, 8]); // add r10w, 8
    }

    /// Loads a segment register with the selector in T0, zero-extended, and a flat
    /// descriptor. Clobbers T1 and the host's flags.
    fn flat_segment(&mut self, index: usize, attributes: u16) {
        const { assert!(std::mem::offset_of!(crate::state::Segment, limit) == 8) };
        let at = state_offset!(segments) + 16 * index as i32;
        let a = &mut self.asm;
        a.store_gs_imm(at, 0);
        // attributes and selector above a limit of all ones
        let high = (u32::from(attributes) << 16) as i32;
        a.lea(T1, Some(T0), None, high.wrapping_add(1), true);
        a.shift(4, T1, 32);
        a.alu_imm(Alu::Sub, T1, 1);
        a.store_gs(at + 8, T1);
    }
}
