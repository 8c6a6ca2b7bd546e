//! The x86-64 software CPU.
mod bus;
mod exception;
mod hash;
mod mmu;
pub mod state;

pub use bus::{Bus, Waker};
pub use exception::{Exception, vector};

/// Why a vCPU could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host CPU lacks what translated code needs.
    #[error("this host's CPU lacks {0}, which the software CPU needs")]
    HostCpu(&'static str),
    /// Memory for the code cache could not be had.
    #[error("cannot map the code cache")]
    CodeCache(#[source] std::io::Error),
    /// The state asked for is one that this CPU does not run.
    #[error("{0}")]
    State(&'static str),
}
