//! From decoded guest instructions to host code: the block's frame, memory accesses, stack
//! operations and branches. Plain instructions are in `plain`.
//!
//! Invariants while a block runs: guest registers are in their [`HOME`]s; RSP is the return
//! stack (`returns`); GS is the state block. At block boundaries the guest's status flags are
//! in AX (`LAHF; SETO AL`). [`Flags`] follows where they are in between.

use iced_x86::{
    ConditionCode, Encoder, Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register,
};

use super::Source;
use super::access::{Stub, window_number};
use super::asm::{Alu, Asm, GUEST_RAX, HOME, RAX, RBX, RCX, RDX, Reg, T0, T1, cc, slot};
use super::classify::Class;
use super::legacy::SegmentFault;
use super::plain::is_harmless;
use super::spans::Role;
use super::stack::leaves_stack_pointer;
use super::thunks::Thunks;
use crate::mmu::{Rights, jump_table};
use crate::roaming;
use crate::segmentation::Legacy;
use crate::state::{rflags, state_offset};

/// Where the guest's status flags are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flags {
    /// In AX only.
    Ax,
    /// In the host's RFLAGS only.
    Host,
    /// In both.
    Both,
    /// In `saved_status`: only for the site of an instruction that uses host RAX.
    Saved,
}

/// What a block was made for. Part of its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Mode {
    /// Ring 3.
    pub(crate) user: bool,
    /// Extended state that CR0, CR4 and XCR0 let the guest use, as `Extended`'s order.
    pub(crate) extended: u8,
    /// RDTSC is allowed: ring 0, or CR4.TSD clear.
    pub(crate) tsc: bool,
    /// Alignment is checked (RFLAGS.AC, CR0.AM, ring 3): every access takes the slow path.
    pub(crate) aligned: bool,
    /// One instruction only, no attention check: single-stepping.
    pub(crate) single: bool,
    /// Every access is checked by itself: no spans.
    pub(crate) apart: bool,
    /// Ring 1 or 2.
    pub(crate) middle: bool,
    /// SMAP is on, so that STAC and CLAC change what may be accessed.
    pub(crate) smap: bool,
    /// It is, and RFLAGS.AC is set in the supervisor.
    pub(crate) open: bool,
    /// What matters outside of 64-bit mode.
    pub(crate) legacy: Option<Legacy>,
}

impl Mode {
    /// Whose rights accesses have where a block begins.
    pub(crate) fn rights(&self) -> Rights {
        match (self.user, self.open) {
            (true, _) => Rights::User,
            (false, true) => Rights::Open,
            (false, false) => Rights::Supervisor,
        }
    }

    /// Whether blocks of this mode are drafts at first.
    pub(crate) fn has_drafts(&self) -> bool {
        !self.single && !self.apart && !self.aligned && self.legacy.is_none()
    }

    /// Which jump cache leads on from blocks of this mode.
    pub(crate) fn jumps(&self) -> usize {
        self.jumps_with(self.rights())
    }

    /// Which jump cache leads to blocks of this mode but for these rights.
    pub(super) fn jumps_with(&self, rights: Rights) -> usize {
        jump_table(rights, self.legacy.is_some())
    }

    /// What stands for a block at `rip` in the jump cache.
    pub(crate) fn jump_key(&self, rip: u64) -> u64 {
        self.legacy.map_or(rip, |legacy| legacy.jump_key(rip))
    }

    /// The linear address of code at `rip`.
    pub(crate) fn linear(&self, rip: u64) -> u64 {
        self.legacy.map_or(rip, |legacy| legacy.linear(rip))
    }

    /// The linear address of the page that follows the one that `rip` lies in.
    pub(crate) fn next_page(&self, rip: u64) -> u64 {
        let next = (self.linear(rip) | 0xfff).wrapping_add(1);
        if self.legacy.is_some() {
            next & u64::from(u32::MAX)
        } else {
            next
        }
    }

    /// Bytes of code from `rip` to the end of the code segment.
    pub(crate) fn code_left(&self, rip: u64) -> usize {
        self.legacy.map_or(usize::MAX, |legacy| {
            let left = u64::from(legacy.code_limit).saturating_sub(rip);
            left as usize + 1
        })
    }
}

/// From here on in the host code, this guest instruction runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Site {
    pub(crate) host: u32,
    pub(crate) guest: u16,
    pub(crate) flags: Flags,
}

/// A jump out of the block that may be chained to its target.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Exit {
    /// Offset of the jump's displacement.
    pub(crate) jump: u32,
    /// Offset of the stub that it leads to when not chained.
    pub(crate) stub: u32,
    /// Offset of the displacement of the stub's call.
    pub(crate) out: u32,
    /// It is a call.
    pub(crate) calls: bool,
}

pub(super) struct PendingExit {
    pub(super) jump: usize,
    pub(super) target: u64,
    /// The guest's flags are in the host's only, where this leaves from the block's middle.
    pub(super) flags_in_host: bool,
    pub(super) rights: Rights,
    pub(super) calls: bool,
    /// The displacement of an instruction that uses the target's address as a constant.
    pub(super) constant: Option<usize>,
}

/// Bits of the word that tells the slow path what an access is.
pub(crate) mod meta {
    /// Bytes accessed.
    pub(crate) const SIZE: u32 = 0xffff;
    /// A store, or a load and a store.
    pub(crate) const STORE: u32 = 1 << 16;
    /// The old contents matter.
    pub(crate) const LOAD: u32 = 1 << 17;
    /// The stack segment: #SS instead of #GP.
    pub(crate) const STACK: u32 = 1 << 18;
    /// The address must be a multiple of the size, which is checked before the page is.
    pub(crate) const ALIGNED: u32 = 1 << 19;
    /// A pending x87 exception is reported before the page is looked at.
    pub(crate) const WAITS: u32 = 1 << 20;
    /// Several accesses that were to share one check.
    pub(crate) const SPAN: u32 = 1 << 21;
    /// Outside of 64-bit mode: the segment has a base, so the end of the linear addresses
    /// need not be that of the segment.
    pub(crate) const WRAPS: u32 = 1 << 22;
    /// From a draft, which has no place for an access out of line.
    pub(crate) const DRAFT: u32 = 1 << 23;
    /// Where the number of the window that it went through begins.
    pub(crate) const WINDOW_SHIFT: u32 = 24; // eight bits
}

/// A finished block.
pub(crate) struct Lowered {
    pub(crate) code: Vec<u8>,
    /// Offset of the entry.
    pub(crate) entry: u32,
    pub(crate) sites: Vec<Site>,
    pub(crate) exits: Vec<Exit>,
    /// Instructions that it leaves to `system::execute`.
    pub(crate) systems: Vec<Instruction>,
}

/// Tools that live longer than one block.
pub(crate) struct Tools {
    pub(crate) encoder: Encoder,
    pub(crate) info: InstructionInfoFactory,
}

/// One block being lowered.
pub(crate) struct Lower<'a> {
    pub(super) asm: Asm,
    pub(super) flags: Flags,
    pub(super) tools: &'a mut Tools,
    pub(super) thunks: &'a Thunks,
    pub(super) mode: Mode,
    /// Small rather than fast; see `draft`.
    pub(super) draft: bool,
    /// Whose rights accesses have now: STAC and CLAC change them.
    pub(super) rights: Rights,
    pub(super) start: u64,
    first_system: u32,
    systems: Vec<Instruction>,
    pub(super) current: u16,
    pub(super) stubs: Vec<Stub>,
    pub(super) pending: Vec<PendingExit>,
    pub(super) sites: Vec<Site>,
    /// The current instruction never faults and needs no site.
    silent: bool,
    /// The current instruction's access was checked with those before it; T1 is taken.
    pub(super) in_span: bool,
    /// What guest RSP is to be moved by, where pushes or pops of a span follow each other.
    pub(super) stack_moves: i32,
    /// See [`Source::roaming`].
    pub(super) roaming: Vec<roaming::Place>,
    fpu_check: Option<usize>,
    /// Indirect branches: where they look up in vain, and the branch's address.
    pub(super) misses: Vec<(usize, u64)>,
    /// Indirect calls: where they call, and the call's address.
    pub(super) calls: Vec<(usize, Instruction)>,
    /// Jumps to where an instruction is left to `system`: indirect calls to non-canonical
    /// addresses, and what the short forms of others do not do.
    pub(super) departures: Vec<(usize, Instruction)>,
    pub(super) segment_faults: Vec<SegmentFault>,
    /// The instruction reports pending x87 exceptions before segment faults.
    pub(super) fault_waits: bool,
    /// What the address of the next access adds to its word for the slow path.
    pub(super) wraps: u32,
    entry: usize,
}

/// The numbers that name a block's parts from outside.
pub(crate) struct Numbers {
    /// Of its first system instruction.
    pub(crate) first_system: u32,
}

/// Bytes of the attention check at a block's entry, which it may be entered behind.
pub(crate) const fn check_length(draft: bool) -> u32 {
    if draft { 5 } else { 11 }
}

impl<'a> Lower<'a> {
    pub(crate) fn new(
        tools: &'a mut Tools,
        thunks: &'a Thunks,
        base: u64,
        source: &Source<'_>,
        numbers: &Numbers,
    ) -> Self {
        let mode = source.mode;
        Self {
            asm: Asm::new(base),
            flags: Flags::Ax,
            tools,
            thunks,
            rights: mode.rights(),
            mode,
            draft: source.draft,
            start: source.start,
            first_system: numbers.first_system,
            systems: Vec::new(),
            current: 0,
            stubs: Vec::new(),
            pending: Vec::new(),
            sites: Vec::new(),
            silent: false,
            in_span: false,
            stack_moves: 0,
            roaming: source.roaming.to_vec(),
            fpu_check: None,
            misses: Vec::new(),
            calls: Vec::new(),
            departures: Vec::new(),
            segment_faults: Vec::new(),
            fault_waits: false,
            wraps: 0,
            entry: 0,
        }
    }

    /// Writes what precedes the first instruction.
    pub(crate) fn begin(&mut self, uses_fpu: bool) {
        if self.draft {
            self.asm.call(self.thunks.draft.entry);
            debug_assert_eq!(self.asm.len() as u32, check_length(true));
        } else {
            self.begin_whole();
        }
        if uses_fpu {
            self.asm.test_gs_zero(state_offset!(fpu_loaded));
            self.fpu_check = Some(self.asm.jcc_forward(cc::E));
        }
    }

    fn begin_whole(&mut self) {
        self.asm.mov_imm(T0, self.start);
        self.asm.jmp(self.thunks.attention);
        while !self.asm.len().is_multiple_of(16) {
            self.asm.raw(&[0x90]);
        }
        self.entry = self.asm.len();
        // the attention word is the first of the block that GS points at
        self.asm.test_gs_zero(0);
        let back = -(self.asm.len() as i64 + 2);
        self.asm.raw(&[0x75, back as u8]);
        debug_assert_eq!((self.asm.len() - self.entry) as u32, check_length(false));
        if self.mode.single {
            // never taken: the block is entered behind it
            debug_assert!(self.entry >= 16);
        }
    }

    /// Lowers one instruction. Returns true when it ends the block.
    pub(crate) fn instruction(
        &mut self,
        instruction: &Instruction,
        class: Class,
        role: Role,
        last: bool,
    ) -> bool {
        self.current = (instruction.ip() - self.start) as u16;
        self.silent = class == Class::Plain && is_harmless(instruction);
        self.site(self.flags);
        if role != Role::Inside || !leaves_stack_pointer(instruction, class) {
            self.settle_stack();
        }
        if let Role::First(span) = role {
            self.begin_span(span, instruction);
        }
        self.in_span = role != Role::Outside;
        match class {
            Class::Plain if self.mode.legacy.is_some() && clears_vectors(instruction) => {
                self.legacy_clear_vectors(instruction.mnemonic() == Mnemonic::Vzeroall);
                false
            }
            Class::Plain => !self.plain(instruction) && self.system(instruction),
            Class::Nop => false,
            Class::Stack => !self.stack(instruction) && self.system(instruction),
            Class::Branch if instruction.is_jcc_short_or_near() && !last => {
                self.side_exit(instruction);
                false
            }
            Class::Branch => {
                self.branch(instruction);
                true
            }
            Class::Special => !self.special(instruction) && self.system(instruction),
            Class::Transfer => self.transfer(instruction) || self.system(instruction),
            Class::System => self.system(instruction),
        }
    }

    pub(super) fn site(&mut self, flags: Flags) {
        if self.silent {
            return;
        }
        let host = self.asm.len() as u32;
        self.sites.push(Site {
            host,
            guest: self.current,
            flags,
        });
    }

    fn system(&mut self, instruction: &Instruction) -> bool {
        self.settle_stack();
        self.flags_into_ax();
        self.asm.mov_imm(T0, instruction.ip());
        self.asm
            .mov_imm(T1, u64::from(self.first_system) + self.systems.len() as u64);
        self.systems.push(*instruction);
        self.asm.jmp(self.thunks.system);
        true
    }

    /// Ends the block by going on at `target`.
    pub(crate) fn fall_through(&mut self, target: u64) {
        self.settle_stack();
        self.flags_into_ax();
        let jump = self.asm.jmp_forward();
        self.leave_at(jump, target);
    }

    /// RIP of the instruction being lowered.
    pub(super) fn current_ip(&self) -> u64 {
        self.start.wrapping_add(self.current.into())
    }

    pub(super) fn thunks(&self) -> &'a Thunks {
        self.thunks
    }

    /// Makes AX hold the flags, so that the host's may be clobbered.
    pub(super) fn flags_into_ax(&mut self) {
        if self.flags == Flags::Host {
            self.asm.flags_to_ax();
            self.flags = Flags::Both;
        }
    }

    /// As `flags_into_ax`, and the host's are about to be clobbered.
    pub(super) fn release_host_flags(&mut self) {
        self.flags_into_ax();
        self.flags = Flags::Ax;
    }

    /// Makes the host's RFLAGS hold the flags.
    pub(super) fn flags_into_host(&mut self) {
        if self.flags == Flags::Ax {
            self.asm.flags_from_ax();
            self.flags = Flags::Both;
        }
    }

    /// The host register with a guest register's value, loading a spilled one into `temp`.
    pub(super) fn register(&mut self, guest: usize, temp: Reg) -> Reg {
        HOME[guest].unwrap_or_else(|| {
            self.asm.load_gs(temp, slot(guest));
            temp
        })
    }

    /// Stores `from` as the guest register's new 64-bit value.
    pub(super) fn set_register(&mut self, guest: usize, from: Reg) {
        match HOME[guest] {
            Some(home) => self.asm.mov(home, from),
            None => self.asm.store_gs(slot(guest), from),
        }
    }

    fn special(&mut self, instruction: &Instruction) -> bool {
        match instruction.mnemonic() {
            Mnemonic::Lea => self.lea(instruction),
            Mnemonic::Xlatb => {
                self.release_host_flags();
                self.asm.raw(&[0x45, 0x0f, 0xb6, 0xd9]); // movzx r11d, r9b
                let narrow = instruction.memory_base() == Register::EBX;
                self.asm.lea(T0, Some(RBX), Some((T1, 1)), 0, narrow);
                self.add_segment_base(instruction);
                self.access(window_number(instruction), 1, 0, |s| {
                    s.asm.raw(&[0x45, 0x8a, 0x0a]); // mov r9b, [r10]
                    Flags::Ax
                });
                true
            }
            Mnemonic::Cli if self.is_ring0() => {
                self.system_flags(Alu::And, !(rflags::IF as i32));
                true
            }
            Mnemonic::Sti if self.is_ring0() && !self.mode.single => self.sti(instruction),
            Mnemonic::Stac | Mnemonic::Clac if self.is_ring0() && self.mode.legacy.is_none() => {
                self.set_ac(instruction.mnemonic() == Mnemonic::Stac);
                true
            }
            Mnemonic::Swapgs if self.is_ring0() => {
                self.asm.load_gs(T0, state_offset!(gs_base));
                self.asm.load_gs(T1, state_offset!(kernel_gs_base));
                self.asm.store_gs(state_offset!(gs_base), T1);
                self.asm.store_gs(state_offset!(kernel_gs_base), T0);
                true
            }
            Mnemonic::Rdtsc | Mnemonic::Rdtscp if self.mode.tsc => {
                self.rdtsc(instruction.mnemonic() == Mnemonic::Rdtscp);
                true
            }
            Mnemonic::Pushfq => {
                self.pushfq();
                true
            }
            Mnemonic::Cld => {
                self.system_flags(Alu::And, !(rflags::DF as i32));
                true
            }
            Mnemonic::Std => {
                self.system_flags(Alu::Or, rflags::DF as i32);
                true
            }
            _ if instruction.is_string_instruction() => self.repeat(instruction),
            _ => self.privileged(instruction),
        }
    }

    fn is_ring0(&self) -> bool {
        !self.mode.user && !self.mode.middle
    }

    /// STAC and CLAC: under SMAP, the accesses that follow have other rights.
    fn set_ac(&mut self, on: bool) {
        let ac = rflags::AC as i32;
        if on {
            self.system_flags(Alu::Or, ac);
        } else {
            self.system_flags(Alu::And, !ac);
        }
        if self.mode.smap {
            self.rights = if on { Rights::Open } else { Rights::Supervisor };
        }
    }

    /// STI with its shadow: the block goes on with the next instruction, and attention is
    /// only looked at where blocks begin. Interrupts that were held back while IF was
    /// clear take the long way.
    fn sti(&mut self, instruction: &Instruction) -> bool {
        self.release_host_flags();
        self.asm.test_gs_zero(state_offset!(interrupts_held));
        let go_on = self.asm.jcc_forward(cc::E);
        self.system(instruction);
        self.asm.aim(go_on);
        self.asm
            .alu_gs_imm(Alu::Or, state_offset!(system_flags), rflags::IF as i32);
        true
    }

    fn rdtsc(&mut self, with_aux: bool) {
        self.release_host_flags();
        self.asm.mov(T1, RAX);
        if with_aux {
            self.asm.raw(&[0x0f, 0x01, 0xf9]); // rdtscp
            self.asm.load_gs(RCX, state_offset!(msrs.tsc_aux));
        } else {
            self.asm.raw(&[0x0f, 0x31]); // rdtsc
        }
        self.asm.shift(4, RDX, 32);
        self.asm.raw(&[0x48, 0x09, 0xd0]); // or rax, rdx
        self.asm.alu_gs(Alu::Add, RAX, state_offset!(tsc_offset));
        self.asm.raw(&[0x41, 0x89, 0xc1]); // mov r9d, eax
        self.asm.mov(RDX, RAX);
        self.asm.shift(5, RDX, 32);
        self.asm.mov(RAX, T1);
    }

    /// PUSHFQ: RFLAGS put together from AX and the system flags, less RF and VM.
    fn pushfq(&mut self) {
        self.release_host_flags();
        self.rflags_into_t1();
        self.push_t1();
    }

    fn system_flags(&mut self, op: Alu, mask: i32) {
        self.release_host_flags();
        self.asm.alu_gs_imm(op, state_offset!(system_flags), mask);
    }

    fn lea(&mut self, instruction: &Instruction) -> bool {
        if instruction.op1_kind() != OpKind::Memory {
            return false;
        }
        let to = instruction.op0_register();
        let guest = to.full_register().number();
        if let (Some(home), true, None) = (HOME[guest], to.size() >= 4, self.mode.legacy) {
            self.sum_into(home, instruction, 0, to.size() == 4);
            return true;
        }
        self.effective_address(instruction, 0);
        match to.size() {
            8 => self.set_register(guest, T0),
            4 => {
                self.asm.raw(&[0x45, 0x89, 0xd2]); // mov r10d, r10d
                self.set_register(guest, T0);
            }
            _ => self.set_word(guest),
        }
        true
    }

    /// The low word of T0 into a guest register, whose other bits stay.
    pub(super) fn set_word(&mut self, guest: usize) {
        if let Some(home) = HOME[guest] {
            // mov home16, r10w
            self.asm
                .raw(&[0x66, 0x44 | home.0 >> 3, 0x89, 0xd0 | home.0 & 7]);
        } else {
            // mov word gs:[slot], r10w
            self.asm.raw(&[0x65, 0x66, 0x44, 0x89, 0x14, 0x25]);
            self.asm.raw(&slot(guest).to_le_bytes());
        }
    }

    /// Writes the out-of-line parts.
    pub(crate) fn finish(mut self) -> Lowered {
        if let Some(check) = self.fpu_check.take() {
            self.asm.aim(check);
            self.asm.call(self.thunks.fpu_load);
            let back = self.asm.base + check as u64 + 4;
            self.asm.jmp(back);
        }
        for stub in std::mem::take(&mut self.stubs) {
            self.slow_path(&stub);
        }
        for (call, instruction) in std::mem::take(&mut self.calls) {
            self.asm.aim(call);
            self.jump_to_t0(&instruction);
        }
        for (miss, source) in std::mem::take(&mut self.misses) {
            self.asm.aim(miss);
            if self.mode.legacy.is_some() {
                self.untag_t0();
            }
            self.asm.mov_imm(T1, source);
            self.asm.jmp(match self.mode.legacy {
                None if !self.mode.single => self.thunks.far_branch[self.rights as usize],
                _ => self.thunks.branch,
            });
        }
        for (bad, instruction) in std::mem::take(&mut self.departures) {
            self.asm.aim(bad);
            self.flags = Flags::Ax;
            self.system(&instruction);
        }
        self.finish_segment_faults();
        let mut exits = Vec::new();
        for exit in std::mem::take(&mut self.pending) {
            let (mut jump, target) = (exit.jump, exit.target);
            self.asm.aim(jump);
            if exit.flags_in_host {
                self.asm.flags_to_ax();
                jump = self.asm.jmp_forward();
                self.asm.aim(jump);
            }
            let stub = self.asm.len() as u32;
            if let Some(at) = exit.constant {
                // the stub begins with `mov r10, target`
                let distance = stub + 2 - (at as u32 + 4);
                self.asm.bytes[at..at + 4].copy_from_slice(&distance.to_le_bytes());
            }
            if self.same_page(target) && !self.mode.single {
                self.asm.mov_imm(T0, target);
                // the return address tells which exit it is
                self.asm.call(self.thunks.link);
                exits.push(Exit {
                    jump: jump as u32,
                    stub,
                    out: self.asm.len() as u32 - 4,
                    calls: exit.calls,
                });
            } else if self.draft {
                self.asm.mov_imm(T0, target);
                self.asm.jmp(self.thunks.unchained[exit.rights as usize]);
            } else {
                self.far_exit(target, exit.rights);
            }
        }
        Lowered {
            code: self.asm.bytes,
            entry: self.entry as u32,
            sites: self.sites,
            exits,
            systems: self.systems,
        }
    }

    pub(super) fn load_guest_rax(&mut self) {
        self.asm.mov(RAX, GUEST_RAX);
    }
}

fn clears_vectors(instruction: &Instruction) -> bool {
    matches!(
        instruction.mnemonic(),
        Mnemonic::Vzeroupper | Mnemonic::Vzeroall
    )
}

/// The number of a condition in opcodes (Intel SDM vol. 2 appendix B).
pub(super) fn condition_number(condition: ConditionCode) -> u8 {
    use ConditionCode as C;
    match condition {
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        C::g | C::None => 15,
    }
}
