//! Makes a differing program smaller while it still differs.
//!
//! Called by `runner` with a test that runs both machines. Must not care what the
//! difference is: the smallest program that differs in any way is the one worth reading.

use crate::case::{HEADER_OFFSET, MXCSR_OFFSET, ST_OFFSET, Xsave};
use crate::generate::state::rflags;
use crate::program::Program;

/// The smallest program found for which `differs` still holds.
pub(crate) fn shrink(program: &Program, mut differs: impl FnMut(&Program) -> bool) -> Program {
    let mut best = program.clone();
    loop {
        let before = best.items.len();
        for index in (0..before).rev() {
            if index < best.items.len() {
                try_replace(&mut best, |p| *p = p.without(index), &mut differs);
            }
        }
        if best.items.len() == before {
            break;
        }
    }
    simplify_state(&mut best, &mut differs);
    best
}

fn try_replace(
    best: &mut Program,
    change: impl FnOnce(&mut Program),
    differs: &mut impl FnMut(&Program) -> bool,
) {
    let mut candidate = best.clone();
    change(&mut candidate);
    if differs(&candidate) {
        *best = candidate;
    }
}

fn simplify_state(best: &mut Program, differs: &mut impl FnMut(&Program) -> bool) {
    let initial = Xsave::initial();
    try_replace(best, |p| p.xsave = initial, differs);
    try_replace(
        best,
        |p| p.xsave.0[..MXCSR_OFFSET].copy_from_slice(&initial.0[..MXCSR_OFFSET]),
        differs,
    );
    try_replace(
        best,
        |p| p.xsave.0[MXCSR_OFFSET..MXCSR_OFFSET + 4].copy_from_slice(&0x1f80_u32.to_le_bytes()),
        differs,
    );
    for at in (ST_OFFSET..HEADER_OFFSET).step_by(16) {
        try_replace(best, |p| p.xsave.0[at..at + 16].fill(0), differs);
    }
    for register in 0..16 {
        try_replace(best, |p| p.xsave.set_ymm(register, &[0; 32]), differs);
        try_replace(best, |p| p.registers.gpr[register] = 0, differs);
    }
    try_replace(
        best,
        |p| p.registers.rflags = rflags::FIXED | rflags::IF,
        differs,
    );
    for bit in (0..22).filter(|bit| (rflags::FIXED | rflags::IF) >> bit & 1 == 0) {
        try_replace(best, |p| p.registers.rflags &= !(1 << bit), differs);
    }
    for index in (0..best.patches.len()).rev() {
        try_replace(best, |p| _ = p.patches.remove(index), differs);
    }
    for index in (0..best.fixups.len()).rev() {
        try_replace(best, |p| _ = p.fixups.remove(index), differs);
    }
    try_replace(best, |p| p.code_address = crate::layout::CODE, differs);
}
