//! Differential test of the software CPU against the host's own.
//!
//! ```text
//!   rng ─► generate ─► program ─► case ──► native (a forked process, ring 3) ──► outcome ─┐
//!                                     └──► guest  (the software CPU, ring 3) ──► outcome ─┴► compare
//! ```
//!
//! A case is a few instructions with complete initial state. Both machines run it up to an
//! exception and report registers, flags, extended state, memory, vector, error code and
//! CR2, which must agree. Everything follows from a printed seed.
//!
//! Beside it, [`hostile`] runs guests that have no right answer, and looks at the host.

pub mod case;
pub mod catalog;
pub mod compare;
pub mod generate;
pub mod guest;
pub mod hostile;
pub mod layout;
pub mod native;
mod pages;
pub mod program;
mod report;
pub mod rng;
pub mod runner;
mod shrink;
