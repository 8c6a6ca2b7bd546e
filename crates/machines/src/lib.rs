//! What a host remembers of its machines, without a daemon: which there are, what became of
//! each, and what they printed.
//!
//! ```text
//!   run, start ──► Registry ──► Machine ──► Claim ── started ──► end
//!                                  │          │ holds the lock: that is what "running" means
//!   ps, stop, rm ── list, find ────┤          │
//!                                  ▼          ▼
//!                state, signal, wait       LogWriter ──► segments ──► LogReader ──► logs
//! ```
//!
//! A machine is a directory, and the process that holds its [`Claim`] is the machine. Other
//! processes learn from the lock whether that one lives, so nothing is to be repaired after a
//! kill or a power failure. This crate must never know what runs in the process, or of the
//! command line.
#![forbid(unsafe_code)]

mod claim;
mod error;
mod files;
mod log;
mod machine;
mod name;
mod process;
mod registry;

pub use claim::Claim;
pub use error::{Error, Result};
pub use log::{Entry, LogReader, LogSize, LogWriter, Record, Stream};
pub use machine::{Asked, End, Image, Machine, State};
pub use name::is_name;
pub use registry::{Registry, Spec};
pub use rustix::process::Signal;
