//! Whole-system tests: real guests, booted through the `strata` binary as a user would.
//!
//! They need what `cargo xtask test` installs: gcc, strace, e2fsprogs, iproute2, setpriv, xz and zstd.
//! All share the user's cached appliance. No test asserts a time.
#![forbid(unsafe_code)]

mod boots;
mod commands;
mod console;
mod cpus;
mod disks;
mod endings;
mod guest;
mod host;
mod kernels;
mod memory;
mod multiboot;
mod namespaces;
mod network;
mod programs;
mod pty;
mod sandbox;
mod terminal;
