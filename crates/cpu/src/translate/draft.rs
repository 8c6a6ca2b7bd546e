//! Drafts: blocks as they are made first, small rather than fast. Most of what a guest runs it
//! runs a few times only, so the checks of accesses are calls of thunks here, without anything
//! out of line. What a draft has no form for, it leaves to blocks that have: an access that
//! cannot be done in place to a block of that instruction alone, a span whose check fails to
//! one that checks every access by itself.
//!
//! A draft begins with a call, of a thunk that looks at the attention word and counts. Every so
//! often the draft that is about to run is made anew as a whole, which the draft then gives way
//! to: a block that runs often is soon met.
//!
//! Called by `access` and `lower`; `engine` settles what drafts leave.

use super::access::Place;
use super::asm::{Alu, Asm, RAX, T0, T1, cc};
use super::lower::{Lower, meta};
use super::thunks::{DELTA, Leave, line_of, slow_index, tag_offset};
use crate::mmu::{Rights, TLBS};
use crate::state::{DRAFT_COUNTERS, DRAFT_SHIFT, state_offset};

/// What accesses most often are, but for their sizes.
const KINDS: [u32; 6] = [
    0,
    meta::STORE,
    meta::STORE | meta::LOAD,
    meta::STACK,
    meta::STACK | meta::STORE,
    meta::STACK | meta::STORE | meta::LOAD,
];

/// Their sizes, most often, in bytes.
const SIZES: [u32; 4] = [1, 2, 4, 8];

/// Addresses of the thunks.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Thunks {
    /// What drafts begin with.
    pub(crate) entry: u64,
    /// Instead of `entry` in those that were thrown away.
    pub(crate) out: u64,
    /// The check of an access of a common kind, by [`Rights`], [`KINDS`] and [`SIZES`].
    check: [[[u64; SIZES.len()]; KINDS.len()]; 3],
    /// Of any other, whose word is on the stack. Indexed as `Thunks::slow`.
    pub(crate) check_pushed: [u64; TLBS],
}

impl Thunks {
    /// The thunk that checks an access, if it is of a common kind.
    fn check(&self, rights: Rights, what: u32) -> Option<u64> {
        let kind = KINDS.iter().position(|kind| *kind == what & !meta::SIZE)?;
        let size = SIZES.iter().position(|size| *size == what & meta::SIZE)?;
        Some(self.check[rights as usize][kind][size])
    }

    /// What the thunk at `address` checks.
    #[cfg(test)]
    pub(super) fn checks(&self, address: u64) -> Option<u32> {
        let at = self.check.as_flattened().as_flattened();
        let index = at.iter().position(|thunk| *thunk == address)?;
        let size = SIZES[index % SIZES.len()];
        Some(KINDS[index / SIZES.len() % KINDS.len()] | size)
    }
}

impl Lower<'_> {
    /// Checks an access at `place`: then T0 is its linear address, and T1 the distance from
    /// there to the host's. `what`: its size and kind.
    pub(super) fn draft_check(&mut self, place: Place, what: u32) {
        if place.base != T0 {
            self.asm.lea(T0, Some(place.base), None, place.disp, false);
        }
        let thunks = &self.thunks().draft;
        if let Some(thunk) = thunks.check(self.rights, what) {
            self.asm.call(thunk);
            return;
        }
        let index = slow_index(self.rights, what & meta::STORE != 0);
        self.asm.push_imm(what | meta::DRAFT);
        self.asm.call(thunks.check_pushed[index]);
    }
}

/// Writes the thunks. `slow` are those of accesses that are not in the TLB.
pub(super) fn emit(a: &mut Asm, slow: &[u64; TLBS], leave: u64) -> Thunks {
    let mut thunks = Thunks {
        entry: a.here(),
        ..Thunks::default()
    };
    a.test_gs_zero(0);
    let wanted = a.jcc_forward(cc::NE);
    const { assert!(DRAFT_COUNTERS == 1 << 16) };
    a.raw(&[0x4c, 0x8b, 0x1c, 0x24]); // mov r11, [rsp]
    a.shift(5, T1, DRAFT_SHIFT);
    a.raw(&[0x45, 0x0f, 0xb7, 0xdb]); // movzx r11d, r11w
    a.raw(&[0x65, 0x41, 0xfe, 0x8b]); // dec byte gs:[r11 + drafts]
    a.raw(&state_offset!(drafts).to_le_bytes());
    let counted = a.jcc_forward(cc::E);
    a.raw(&[0xc3]); // ret
    a.aim(wanted);
    a.aim(counted);
    thunks.out = a.here();
    a.pop(T1);
    a.store_gs(state_offset!(temp), T1);
    a.store_gs(state_offset!(status), RAX);
    a.mov_imm(RAX, Leave::Draft as u64);
    a.jmp(leave);
    for rights in Rights::ALL {
        for (number, kind) in KINDS.into_iter().enumerate() {
            let slow = slow[slow_index(rights, kind & meta::STORE != 0)];
            thunks.check[rights as usize][number] =
                SIZES.map(|size| check(a, rights, kind | size, slow));
        }
        for store in [false, true] {
            let index = slow_index(rights, store);
            thunks.check_pushed[index] = check_pushed(a, rights, store, slow[index]);
        }
    }
    thunks
}

/// Checks an access of this kind at T0. Clobbers the host's flags.
fn check(a: &mut Asm, rights: Rights, what: u32, slow: u64) -> u64 {
    let at = a.here();
    let tag = tag_offset(rights, what & meta::STORE != 0);
    line_of(a, T0);
    a.alu_mem(Alu::Sub, T0, T1, tag);
    a.alu_imm(Alu::Cmp, T0, 4096 - (what & meta::SIZE) as i32);
    let miss = a.jcc_forward(cc::A);
    a.alu_mem(Alu::Add, T0, T1, tag);
    a.load(T1, T1, tag + DELTA);
    a.raw(&[0xc3]); // ret
    a.aim(miss);
    a.alu_mem(Alu::Add, T0, T1, tag);
    a.pop(T1);
    a.push_imm(what | meta::DRAFT);
    a.push(T1);
    a.jmp(slow);
    at
}

/// As `check`, of the access whose word was pushed.
fn check_pushed(a: &mut Asm, rights: Rights, store: bool, slow: u64) -> u64 {
    let at = a.here();
    let tag = tag_offset(rights, store);
    line_of(a, T0);
    a.push(RAX);
    a.mov(RAX, T0);
    a.alu_mem(Alu::Sub, RAX, T1, tag);
    a.alu_imm(Alu::Cmp, RAX, 4095);
    let miss = a.jcc_forward(cc::A);
    a.load(T1, T1, tag + DELTA);
    a.push(T1);
    a.raw(&[0x44, 0x0f, 0xb7, 0x5c, 0x24, 24]); // movzx r11d, word [rsp + 24]
    a.alu(Alu::Add, RAX, T1);
    a.pop(T1);
    a.alu_imm(Alu::Cmp, RAX, 4096);
    let crosses = a.jcc_forward(cc::A);
    a.pop(RAX);
    a.raw(&[0xc2, 8, 0]); // ret 8
    a.aim(miss);
    a.aim(crosses);
    a.pop(RAX);
    a.jmp(slow);
    at
}
