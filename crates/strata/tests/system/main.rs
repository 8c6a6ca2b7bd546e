//! Whole-system tests: real guests, booted through the `strata` binary as a user would.
//!
//! They need programs that `cargo xtask test` installs.
//! All share the user's cached appliance. No test asserts a time.
#![forbid(unsafe_code)]

mod attach;
mod boots;
mod bridges;
mod commands;
mod console;
mod cpus;
mod disks;
mod endings;
mod guest;
mod host;
mod images;
mod kernels;
mod life;
mod memory;
mod multiboot;
mod namespaces;
mod network;
mod programs;
mod pty;
mod qcow2;
mod sandbox;
mod shares;
mod terminal;
mod user;
mod vsock;
