//! Strata's program in a guest: process 1 of the appliance, and the agent beside it.
//!
//! ```text
//!   kernel ──> init ──> mounts, modules, network, the image's layers
//!                │
//!                ├──> the command, on ports or the console ── its status ──> power off
//!                └──> agent ── vsock ── exec, cp, stats, stop of the host's `strata`
//! ```
//!
//! It is linked statically and needs nothing of the file system that it finds, so that it works
//! in every container image. Built by the crate `image`, which puts it into the initramfs.

mod agent;
mod command;
mod init;
mod place;
mod sys;
mod terminal;

use std::process::{self, ExitCode};

/// As what the agent starts this program again.
const AGENT: &str = "strata-agent";

fn main() -> ExitCode {
    if process::id() == 1 {
        init::run()
    }
    if std::env::args().next().as_deref() == Some(AGENT) {
        return agent::run();
    }
    eprintln!("this program is process 1 of a guest of Strata's, and of no use elsewhere");
    ExitCode::FAILURE
}
