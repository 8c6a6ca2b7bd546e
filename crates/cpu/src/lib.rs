//! The x86-64 software CPU: a block translator that re-encodes harmless instructions and
//! emulates sensitive ones (Popek and Goldberg 1974, kept in user space).
//!
//! ```text
//!   engine ── finds, enters, settles ──► translate (decode, classify, lower, cache)
//!     │                                        │ emits code that uses
//!     ├─► system (CR, MSR, IRET, INT, strings) ▼
//!     └─► mmu (walk, TLB) ◄──slow path── translated code ──GS──► state
//! ```
//!
//! [`Cpu`] is one vCPU, [`Crew`] all of a machine; [`Bus`] is the machine around it. This crate does no I/O of its
//! own, knows of no device and never opens /dev/kvm.

mod blocks;
mod breakpoints;
mod bus;
mod crew;
mod engine;
mod exception;
mod hash;
mod memfd;
mod mmu;
mod paced;
mod returns;
mod roaming;
mod segmentation;
mod signal;
mod startup;
pub mod state;
mod system;
mod translate;
mod wanted;

pub use bus::{Bus, Signal, Waker};
pub use crew::Crew;
pub use engine::{Cpu, Exit, Statistics};
pub use exception::{Exception, vector};
pub use paced::Pace;

/// Why a vCPU could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host CPU lacks what translated code needs.
    #[error("this host's CPU lacks {0}, which the software CPU needs")]
    HostCpu(&'static str),
    /// Memory for the code cache could not be had.
    #[error("cannot map the code cache")]
    CodeCache(#[source] std::io::Error),
    /// Memory for the return stacks could not be had.
    #[error("cannot map the return stacks")]
    ReturnStacks(#[source] std::io::Error),
    /// Memory for the soft TLBs could not be had.
    #[error("cannot map the soft TLBs")]
    SoftTlbs(#[source] std::io::Error),
    /// The state asked for is one that this CPU does not run.
    #[error("{0}")]
    State(&'static str),
}
