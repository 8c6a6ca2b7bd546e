//! Runs a vCPU in steps that can be looked at, with time that can be given again: how the
//! translator is compared with itself, instruction by instruction.
//!
//! Called by tests alone. Translated code is what it always is, but for the time stamp
//! counter; a block just never goes on to the next by itself.

use std::sync::atomic::AtomicBool;

use iced_x86::{Decoder, DecoderOptions, Instruction};
use strata_memory::PAGE_SIZE;

use crate::bus::Bus;
use crate::engine::{Cpu, Exit, MAX_INSTRUCTION};
use crate::segmentation::attribute::BIG;
use crate::state::{State, segment};

/// How far one step goes, at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// To the end of a block.
    Block,
    /// One instruction, as under the trap flag.
    Instruction,
}

impl Cpu {
    /// Makes the guest's time stamp counter count what `clock` returns, and takes random
    /// numbers away, so that what the guest does follows from `clock` and the bus alone.
    /// Before it first runs.
    pub fn make_repeatable(&mut self, clock: impl Fn() -> u64 + Send + 'static) {
        self.core.clock = Some(Box::new(clock));
        self.core.cpuid.withdraw_random();
        self.reset_translations();
    }

    /// As [`Cpu::run`], in steps: `after` sees the state after each and tells whether to go
    /// on. Before each step the bus is asked for interrupts, if the guest takes any.
    pub fn run_paced(
        &mut self,
        pace: Pace,
        stop: &AtomicBool,
        bus: &dyn Bus,
        mut after: impl FnMut(&State) -> bool,
    ) -> Exit {
        self.pace = Some(pace);
        self.begin(bus);
        let exit = loop {
            self.core.look_up();
            if let Some(exit) = self.step(stop, bus) {
                break exit;
            }
            // an instruction that is to be run again by itself belongs to this step
            let again = self.alone || self.apart;
            if !again && !after(&self.core.state) {
                break Exit::Stopped;
            }
        };
        self.end();
        self.pace = None;
        exit
    }

    /// The instruction at `rip` in the current code segment, for reports. `None` if nothing is
    /// mapped there. May set accessed bits of page tables.
    pub fn instruction_at(&self, rip: u64) -> Option<Instruction> {
        let state = &self.core.state;
        let base = state.code_address().wrapping_sub(state.rip);
        let address = base.wrapping_add(rip);
        let mut bytes = [0; MAX_INSTRUCTION];
        let first = (PAGE_SIZE - address % PAGE_SIZE).min(MAX_INSTRUCTION as u64) as usize;
        let (first, second) = bytes.split_at_mut(first);
        self.fetch(self.core.any_fetch_address(address)?, first);
        let next = address.wrapping_add(first.len() as u64);
        if let Some(physical) = self.core.any_fetch_address(next) {
            self.fetch(physical, second);
        }
        let bits = match state.segments[segment::CS].attributes & BIG {
            _ if state.is_long_code() => 64,
            0 => 16,
            _ => 32,
        };
        Some(Decoder::with_ip(bits, &bytes, rip, DecoderOptions::NONE).decode())
    }
}
