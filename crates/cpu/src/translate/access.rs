//! Memory accesses of translated code: the check in line, and the way out where it fails.
//!
//! ```text
//!   lea  T0, [base + disp]          the linear address
//!   sub  T0, gs:[window.start]      its distance from the window of this place
//!   cmp  T0, 4096 - size
//!   ja   slow                       soft TLB, then Rust; fills the window
//!   mov  T1, gs:[window.delta]      host address less linear address
//!   op   [base + T1 + disp]
//! ```
//!
//! A window is one page that was used last (`State::windows`) by a place in the code, or by all
//! accesses to the stack, or to one fixed page. The address that the access itself takes does
//! not wait for the check, which the host predicts. Other places in the supervisor's code look
//! into the TLB instead: it goes through much code and many pages, for one process and the
//! next, and would find its windows used by others. So do places of ring 3 that `roaming` found,
//! some of which look into a wide window before (`mmu::wide`).
//!
//! A span is a run of accesses off one base register that share a check (`spans`).
//!
//! Called by `lower`, `plain` and `stack`. Nothing here decides what an instruction does.

use std::ops::Range;

use iced_x86::{Instruction, Register};

use super::asm::{Alu, RAX, Reg, T0, T1, cc};
use super::lower::{Flags, Lower, Site, meta};
use super::thunks::{DELTA, line_of, slow_index, tag_offset, wide_offset, window_offset};
use crate::mmu::{Rights, window_kind};
use crate::state::{WINDOWS, WideWindow, Window, state_offset};

/// Where a checked access is done: `[base + T1 + disp]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(super) base: Reg,
    pub(super) disp: i32,
}

impl Place {
    /// At the linear address in T0.
    pub(super) const T0: Self = Self { base: T0, disp: 0 };
}

/// Set beside a window's number: all accesses that have it are to one page, mostly.
const SHARED: u32 = 1 << 8;
/// Which window serves accesses off the stack pointer: they share one.
pub(super) const STACK_WINDOW: u32 = SHARED;

/// The window of an instruction. Accesses to fixed addresses share theirs by page, others
/// have it by where they are in the code.
pub(super) fn window_number(instruction: &Instruction) -> u32 {
    let base = instruction.memory_base();
    let (key, shared) = match base {
        Register::RSP => return STACK_WINDOW,
        Register::None | Register::RIP if instruction.memory_index() == Register::None => {
            let segment = (instruction.memory_segment() as u64) << 56;
            (instruction.memory_displacement64() >> 12 ^ segment, SHARED)
        }
        _ => (instruction.ip(), 0),
    };
    let mixed = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    (1 + (mixed as u32) % (WINDOWS as u32 - 1)) | shared
}

/// What a check looks at.
#[derive(Clone, Copy)]
enum Through {
    /// Every access takes the slow path.
    Nothing,
    /// The window at this offset of the state block.
    Window(i32),
    /// The TLB whose tags are at this offset of the address space.
    Tlb(i32),
    /// The wide window at this offset of the state block, then the TLB.
    Wide(i32, i32),
}

/// An access whose check may fail, and what is to be written for that case.
pub(super) struct Stub {
    branch: usize,
    meta: u32,
    store: bool,
    rights: Rights,
    through: Through,
    /// Off a register other than T0.
    direct: bool,
    /// Where the check has passed.
    resume: usize,
    /// The access itself, to be written again; none for a span.
    body: Option<Range<usize>>,
    site: Site,
    body_flags: Flags,
}

impl Lower<'_> {
    /// The linear address of the memory operand into T0. The host's flags must be free.
    pub(super) fn address(&mut self, instruction: &Instruction, extra: i32) {
        self.effective_address(instruction, extra);
        self.add_segment_base(instruction);
    }

    /// Makes the effective address in T0 a linear one. The host's flags must be free.
    pub(super) fn add_segment_base(&mut self, instruction: &Instruction) {
        if let Some(legacy) = self.mode.legacy {
            return self.legacy_segment(instruction, legacy);
        }
        match instruction.memory_segment() {
            Register::FS => self.asm.alu_gs(Alu::Add, T0, state_offset!(fs_base)),
            Register::GS => self.asm.alu_gs(Alu::Add, T0, state_offset!(gs_base)),
            _ => {}
        }
    }

    /// The effective address into T0; flags stay.
    pub(super) fn effective_address(&mut self, instruction: &Instruction, extra: i32) {
        if self.mode.legacy.is_some() {
            return self.legacy_effective(instruction, extra);
        }
        self.sum_into(T0, instruction, extra, false);
    }

    /// The effective address of 64-bit code into `to`; flags stay. `low`: its lower half,
    /// zero-extended.
    pub(super) fn sum_into(&mut self, to: Reg, instruction: &Instruction, extra: i32, low: bool) {
        let base = instruction.memory_base();
        let index = instruction.memory_index();
        let displacement = instruction.memory_displacement64();
        let fixed = base == Register::RIP || base == Register::EIP;
        if fixed || base == Register::None && index == Register::None {
            let low = low || !fixed && instruction.memory_displ_size() == 4;
            let mask = if low { u64::from(u32::MAX) } else { u64::MAX };
            self.asm.mov_imm(to, displacement & mask);
            return;
        }
        let narrow = low || base.size() == 4 || index.size() == 4;
        let host_base =
            (base != Register::None).then(|| self.register(base.full_register().number(), T0));
        let host_index = (index != Register::None).then(|| {
            let reg = self.register(index.full_register().number(), T1);
            (reg, instruction.memory_index_scale() as u8)
        });
        let disp = displacement as i32;
        let total = disp.wrapping_add(extra);
        match (host_base, host_index) {
            (Some(base), None) if total == 0 && !narrow => self.asm.mov(to, base),
            _ => self.asm.lea(to, host_base, host_index, total, narrow),
        }
    }

    /// Whether a fault of the memory operand's address is the stack segment's.
    pub(super) fn stack_segment(&self, instruction: &Instruction) -> u32 {
        if self.mode.legacy.is_some() {
            let on_stack = instruction.memory_segment() == Register::SS;
            return if on_stack { meta::STACK } else { 0 };
        }
        // overrides other than FS and GS are ignored in 64-bit mode
        let on_stack = !matches!(instruction.segment_prefix(), Register::FS | Register::GS)
            && matches!(
                instruction.memory_base(),
                Register::RSP | Register::RBP | Register::ESP | Register::EBP
            );
        if on_stack { meta::STACK } else { 0 }
    }

    /// An access of `size` bytes at the linear address in T0. In `body` T0 is a host pointer
    /// and T1 is free.
    pub(super) fn access(
        &mut self,
        window: u32,
        size: u32,
        what: u32,
        body: impl FnOnce(&mut Self) -> Flags,
    ) {
        self.access_at(Place::T0, window, size, what, |s| {
            s.asm.alu(Alu::Add, T0, T1);
            body(s)
        });
    }

    /// An access of `size` bytes at the linear address `place.base + place.disp`. `body` is
    /// written twice, in place and in the slow path; it does the access at `place`, and may
    /// use T0 where that is not its base.
    pub(super) fn access_at(
        &mut self,
        place: Place,
        window: u32,
        size: u32,
        what: u32,
        body: impl FnOnce(&mut Self) -> Flags,
    ) {
        let stub = self.check(place, window, size, what);
        let start = self.asm.len();
        let body_flags = body(self);
        let site = Site {
            host: start as u32,
            guest: self.current,
            flags: body_flags,
        };
        // the body's own instructions come before whatever follows it
        let position = self.sites.partition_point(|s| s.host <= start as u32);
        self.sites.insert(position, site);
        if let Some(mut stub) = stub {
            stub.body = Some(start..self.asm.len());
            stub.body_flags = body_flags;
            self.stubs.push(stub);
        }
    }

    /// Checks that the accesses of a span, from `place` on, are within one page, so that
    /// they need no checks of their own as long as T1 is kept.
    pub(super) fn span(&mut self, place: Place, window: u32, size: u32, what: u32) {
        let stub = self.check(place, window, size, what | meta::SPAN);
        self.stubs.extend(stub);
    }

    fn check(&mut self, place: Place, window: u32, size: u32, what: u32) -> Option<Stub> {
        debug_assert!(self.flags == Flags::Ax);
        if self.draft {
            self.draft_check(place, size | what);
            return None;
        }
        let what = what | std::mem::take(&mut self.wraps);
        let store = what & meta::STORE != 0;
        let number = window & !SHARED;
        let roams = self.roaming.iter().find(|place| place.0 == self.current);
        let fits = window & SHARED != 0 || self.mode.user;
        let kind = window_kind(self.rights, store).filter(|_| fits && roams.is_none());
        let tag = tag_offset(self.rights, store);
        let wide = roams.and_then(|place| place.1);
        let through = match (kind, wide) {
            _ if self.mode.single || self.mode.aligned => Through::Nothing,
            (Some(kind), _) => {
                Through::Window(window_offset(kind) + (number * size_of_window()) as i32)
            }
            (None, Some(wide)) if wide.store == store => Through::Wide(wide_offset(wide), tag),
            (None, _) => Through::Tlb(tag),
        };
        let direct = place.base != T0;
        if direct {
            self.asm.lea(T0, Some(place.base), None, place.disp, false);
        }
        let limit = 4096 - size as i32;
        let branch = match through {
            Through::Nothing => {
                // never below zero
                self.asm.alu_imm(Alu::Cmp, T0, 0);
                self.asm.jcc_forward(cc::AE)
            }
            Through::Window(at) => {
                let distance = if direct { T0 } else { T1 };
                self.asm.mov(distance, T0);
                self.asm.alu_gs(Alu::Sub, distance, at);
                self.asm.alu_imm(Alu::Cmp, distance, limit);
                let branch = self.asm.jcc_forward(cc::A);
                self.asm.load_gs(T1, at + WINDOW_DELTA);
                branch
            }
            Through::Tlb(tag) => {
                line_of(&mut self.asm, T0);
                let branch = self.compare_line(tag, limit);
                self.take_line(tag, direct);
                branch
            }
            Through::Wide(at, _) => {
                self.asm.mov(T1, T0);
                self.asm.alu_gs(Alu::Sub, T1, at);
                self.asm.alu_gs(Alu::Cmp, T1, at + WIDE_LIMIT);
                let branch = self.asm.jcc_forward(cc::A);
                self.asm.load_gs(T1, at + WIDE_DELTA);
                branch
            }
        };
        Some(Stub {
            branch,
            meta: size | what | number << meta::WINDOW_SHIFT,
            store,
            rights: self.rights,
            through,
            direct,
            resume: self.asm.len(),
            body: None,
            site: Site {
                host: 0,
                guest: self.current,
                flags: Flags::Ax,
            },
            body_flags: Flags::Ax,
        })
    }

    /// Compares the linear address in T0 with the line at T1, whose tag is at `tag` from there.
    fn compare_line(&mut self, tag: i32, limit: i32) -> usize {
        self.asm.alu_mem(Alu::Sub, T0, T1, tag);
        self.asm.alu_imm(Alu::Cmp, T0, limit);
        self.asm.jcc_forward(cc::A)
    }

    /// The line was the right one.
    fn take_line(&mut self, tag: i32, direct: bool) {
        if !direct {
            self.asm.alu_mem(Alu::Add, T0, T1, tag);
        }
        self.asm.load(T1, T1, tag + DELTA);
    }

    /// Writes what happens when the check of `stub` failed.
    pub(super) fn slow_path(&mut self, stub: &Stub) {
        self.asm.aim(stub.branch);
        let here = self.asm.len() as u32;
        self.sites.push(Site {
            host: here,
            ..stub.site
        });
        let index = slow_index(stub.rights, stub.store);
        let mut thunk = self.thunks.slow[index];
        let resume = self.asm.base + stub.resume as u64;
        match stub.through {
            Through::Nothing => thunk = self.thunks.slow_always[index],
            Through::Wide(at, tag) => {
                // what asks Rust about the window has to get there
                thunk = self.thunks.slow_always[index];
                self.asm.alu_gs_imm(Alu::Sub, at + WIDE_MISSES, 1);
                let enough = self.asm.jcc_forward(cc::E);
                line_of(&mut self.asm, T0);
                let miss = self.compare_line(tag, 4096 - (stub.meta & meta::SIZE) as i32);
                self.take_line(tag, stub.direct);
                self.asm.jmp(resume);
                self.asm.aim(miss);
                self.asm.alu_mem(Alu::Add, T0, T1, tag);
                self.asm.aim(enough);
            }
            Through::Window(at) if stub.direct => self.asm.alu_gs(Alu::Add, T0, at),
            Through::Window(_) => {}
            Through::Tlb(tag) => self.asm.alu_mem(Alu::Add, T0, T1, tag),
        }
        self.asm.push_imm(stub.meta);
        self.asm.call(thunk);
        // the thunk returns here, or behind this jump if the access cannot be done in place
        self.asm.jmp(resume);
        let Some(body) = stub.body.clone() else {
            self.go_apart(stub.site.guest, stub.rights);
            return;
        };
        let here = self.asm.len() as u32;
        self.sites.push(Site {
            host: here,
            flags: stub.body_flags,
            ..stub.site
        });
        let back = self.asm.base + body.end as u64;
        self.asm.bytes.extend_from_within(body);
        if stub.store {
            self.asm.call(self.thunks.commit);
        }
        self.asm.jmp(back);
    }

    /// Puts guest RAX into host RAX, noting where the flags that were there went.
    pub(super) fn borrow_rax(&mut self) -> bool {
        let saved = self.flags == Flags::Ax;
        if saved {
            self.asm.store_gs(state_offset!(saved_status), RAX);
        } else {
            self.flags = Flags::Host;
        }
        saved
    }
}

/// Distance of a window's delta from its start.
const WINDOW_DELTA: i32 = std::mem::offset_of!(Window, delta) as i32;

/// The same of a wide window, and of its other fields.
const WIDE_DELTA: i32 = std::mem::offset_of!(WideWindow, delta) as i32;
const WIDE_LIMIT: i32 = std::mem::offset_of!(WideWindow, limit) as i32;
const WIDE_MISSES: i32 = std::mem::offset_of!(WideWindow, misses) as i32;

/// Bytes of one window in the state block.
const fn size_of_window() -> u32 {
    size_of::<Window>() as u32
}
