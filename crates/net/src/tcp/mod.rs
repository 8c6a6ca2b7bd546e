//! TCP through the NAT: each connection of a guest is spliced to one of the host's.
//!
//! ```text
//!   guest ══ segments, TSO ══► Flow ── receive ring, mostly empty ──► host socket
//!         ◄═ segments, TSO ═══      ◄── send ring: until the guest has acknowledged ──
//! ```
//!
//! The host's kernel does what is hard about TCP: the network, congestion, its timers. Between
//! guest and switch there is a local socket, which loses nothing and keeps the order, so a flow
//! has sequence numbers and windows only. A guest may all the same drop what it was given; then
//! all that it has not acknowledged is sent again ("go back N").
//!
//! Nothing is acknowledged to one side but what is in the host kernel's hands or in a ring whose
//! room was announced. A side that does not read stops the other by its window, so what a flow
//! holds is bounded.

mod flow;
mod segment;

pub(crate) use flow::{Flow, Link, Verdict};
pub(crate) use segment::{Outgoing, Path, Segment, flag};
