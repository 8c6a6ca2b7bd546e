//! The vCPU seam: what a machine may ask of a virtual CPU, whichever backend runs it.
//!
//! ```text
//!   vmm ── Processor::run(stop, bus) ──► soft (crate cpu)      later: kvm
//!    ▲                                     │
//!    └──────── Bus: ports, MMIO, LAPIC ◄───┘
//! ```
//!
//! The backend calls [`Bus`] in place for every port and MMIO access and returns only for
//! what the machine alone can settle: a [`Halt`]. Architectural state ([`state`]) is the
//! same for every backend.

pub mod soft;
pub mod state;

use std::sync::atomic::AtomicBool;

pub use strata_cpu::{Bus, Signal, Statistics, Waker};

/// Why a vCPU stopped running. The vCPU can be run again except after `Fatal`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Halt {
    /// `stop` was set and the vCPU was woken.
    Stopped,
    /// A triple fault: the CPU is in shutdown (Intel SDM vol. 3A §6.15, #DF).
    TripleFault,
    /// The guest did what this backend cannot run; the text says what, with RIP.
    Fatal(String),
}

/// Why a vCPU could not be made or its state not be set.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The software CPU refused.
    #[error("the software CPU cannot be set up")]
    Soft(#[from] strata_cpu::Error),
}

/// One virtual CPU. It can be made on one thread and handed to the one that runs it.
pub trait Processor: Send {
    /// Runs the guest until a [`Halt`]. Set `stop`, then [`Waker::wake`], to end it from
    /// another thread. `HLT` waits inside.
    fn run(&mut self, stop: &AtomicBool, bus: &dyn Bus) -> Halt;
    /// A handle to interrupt this vCPU with.
    fn waker(&self) -> Waker;
    /// What was translated; `None` where nothing is.
    fn statistics(&self) -> Option<Statistics> {
        None
    }
    /// The architectural state.
    fn registers(&self) -> state::Registers;
    /// Replaces the architectural state.
    fn set_registers(&mut self, registers: &state::Registers) -> Result<(), Error>;
}
