//! What Strata on the host and its program in a guest say to each other.
//!
//! ```text
//!   host                                                          guest
//!   Session ──── a file of the initramfs ───────────────────────> init
//!
//!   Greeting, Request, Input... ── vsock, AGENT_PORT, frames ───> agent
//!   Greeting, Reply...          <────────────────────────────────
//!
//!   Input::{Signal, Resize} ──── virtio-console, CONTROL_PORT ───> init
//!   Reply::{Starting, Ended}    <────────────────────────────────
//! ```
//!
//! A [`Session`] says once, at boot, what the guest is to do. Everything later is an operation on
//! a connection of its own: both sides send a [`Greeting`], the host one [`Request`], and then
//! each what the request calls for, in frames: a length of four bytes, least significant first,
//! and a message in [postcard](https://postcard.jamesmunns.com/wire-format).
//!
//! The main command has a way of its own, which needs no agent and is there before one runs: the
//! [`CONTROL_PORT`], with the same frames.
//!
//! Both ends use this crate; it knows no sockets, only [`std::io::Read`] and [`std::io::Write`].
//! Neither side may trust the other: what is read is checked, and bounded by [`MAX_FRAME`].
#![forbid(unsafe_code)]

mod files;
mod frame;
mod message;
mod session;

pub use files::{Joined, Pieces, pack, unpack};
pub use frame::{Error, Greeting, MAX_FRAME, read, read_session, write, write_session};
pub use message::{
    Copy, Exec, Failure, FailureKind, Information, Input, Reply, Request, Size, Statistics, Status,
    Stream,
};
pub use session::{CONTROL_PORT, Container, Mount, Network, Run, STREAM_PORTS, Session, Streams};

/// The vsock port on which the guest's agent listens.
pub const AGENT_PORT: u32 = 1024;

/// The version of the protocol that this crate speaks.
pub const VERSION: u16 = 2;

/// Where the guest finds its [`Session`].
pub const SESSION_PATH: &str = "strata/session";

/// What the guest's shell writes first on its console. All before it is boot messages.
pub const GREETING: &str = "Strata guest: Linux ";

/// Largest piece of data in one message, bytes.
pub const MAX_DATA: usize = 64 << 10;

/// How much of a program's input may be on its way at once, bytes.
pub const WINDOW: usize = 4 * MAX_DATA;
