//! The translator: guest instructions in, host code out.
//!
//! ```text
//!   bytes ─iced─► Instruction ─classify─► Class ─lower/plain─► Asm ─► CodeCache
//! ```
//!
//! Called by `engine` when no block exists for where the guest is. It never touches guest
//! memory or state; what it emits addresses the state block through GS and guest memory
//! through host pointers that the TLB gave.

mod access;
pub(crate) mod asm;
mod branch;
pub(crate) mod cache;
pub(crate) mod classify;
pub(crate) mod draft;
mod generic;
pub(crate) mod legacy;
pub(crate) mod lower;
mod plain;
mod privileged;
mod repeat;
mod spans;
mod stack;
pub(crate) mod thunks;
mod transfer;
#[cfg(test)]
mod verify;

use iced_x86::{CpuidFeature, Decoder, DecoderOptions, Instruction, Mnemonic};

use classify::{Class, Extended, classify, extended_state};
use lower::{Lower, Lowered, Mode, Numbers, Tools};
use thunks::Thunks;

use crate::roaming::Place;

/// Guest instructions in one block, at most.
const MAX_INSTRUCTIONS: usize = 64;

/// Conditional branches in a block that it goes on behind, at most.
const MAX_SIDE_EXITS: usize = 3;

/// A block before it is placed in the cache.
pub(crate) struct Translated {
    pub(crate) lowered: Lowered,
    /// Guest bytes covered.
    pub(crate) length: u32,
}

/// What a block is made from.
pub(crate) struct Source<'a> {
    /// Linear address of the first byte.
    pub(crate) start: u64,
    /// Bytes from there; complete up to the page's end, or the first instruction whole.
    pub(crate) bytes: &'a [u8],
    pub(crate) mode: Mode,
    /// Only the first instruction, which crosses into the next page.
    pub(crate) crossing: bool,
    /// Small rather than fast; see `draft`.
    pub(crate) draft: bool,
    /// Instructions whose accesses have no windows of their own.
    pub(crate) roaming: &'a [Place],
}

/// Translates from `source.start` until a branch, a system instruction or the bytes' end.
/// `None`: the first instruction is cut off by the end of `bytes`.
pub(crate) fn translate(
    source: &Source<'_>,
    tools: &mut Tools,
    thunks: &Thunks,
    host: u64,
    numbers: &Numbers,
    offered: impl Fn(CpuidFeature) -> bool + Copy,
) -> Option<Translated> {
    let bitness = source.mode.legacy.map_or(64, |legacy| legacy.bitness());
    let mut decoder = Decoder::with_ip(bitness, source.bytes, source.start, DecoderOptions::NONE);
    let mut decoded: Vec<(Instruction, Class)> = Vec::with_capacity(16);
    let mut uses_fpu = false;
    let mut side_exits = 0;
    // a branch beyond the code segment is for `legacy` to see
    let limited = source.mode.legacy.is_some_and(|l| l.code_limit != u32::MAX);
    let limit = if source.mode.single || source.crossing {
        1
    } else {
        MAX_INSTRUCTIONS
    };
    while decoded.len() < limit && decoder.can_decode() {
        let instruction = decoder.decode();
        if instruction.is_invalid() && decoder.last_error() == iced_x86::DecoderError::NoMoreBytes {
            break;
        }
        let mut class = classify(&instruction, offered);
        if bitness != 64
            && let Some(other) = legacy::classify(&instruction)
        {
            class = other;
        }
        let need = extended_state(&instruction);
        if class == Class::Plain && need != Extended::No {
            if (need as u8) > source.mode.extended {
                class = Class::System;
            } else {
                uses_fpu = true;
            }
        }
        decoded.push((instruction, class));
        let conditional = instruction.is_jcc_short_or_near();
        side_exits += usize::from(conditional);
        let goes_on = conditional && side_exits <= MAX_SIDE_EXITS && !limited;
        let ends = matches!(class, Class::System | Class::Branch | Class::Transfer);
        if ends && !goes_on {
            break;
        }
    }
    if let Some((instruction, class)) = decoded.last_mut()
        && instruction.mnemonic() == Mnemonic::Sti
    {
        // its shadow has to reach into another block
        *class = Class::System;
    }
    let last = decoded.last()?.0;
    let mut lower = Lower::new(tools, thunks, host, source, numbers);
    lower.begin(uses_fpu);
    let mut end = None;
    let roles = lower.find_spans(&decoded);
    for (i, ((instruction, class), role)) in decoded.iter().zip(roles).enumerate() {
        if lower.instruction(instruction, *class, role, i + 1 == decoded.len()) {
            end = Some(*instruction);
            break;
        }
    }
    let last = end.unwrap_or(last);
    if end.is_none() {
        lower.fall_through(last.next_ip());
    }
    Some(Translated {
        lowered: lower.finish(),
        length: last.next_ip().wrapping_sub(source.start) as u32,
    })
}
