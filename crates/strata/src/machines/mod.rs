//! Machines that are known by name: listed, stopped, started, looked into, removed.
//!
//! ```text
//!   run -d, start ── spawns ──► strata machine ID ── is ──► the machine (run.rs)
//!   ps, rm, wait, logs ───────► the registry's files (crate machines)
//!   exec, attach, cp, stop ────► the machine's vsock socket ──► the agent in the guest
//! ```

mod agent;
mod attach;
mod copy;
mod detach;
mod exec;
mod logs;
mod proxy;
mod ps;
mod remove;
mod stats;
mod stop;

use std::io;

use clap::Parser;
use strata_machines::{Machine, Registry};
use strata_protocol::FailureKind;

pub(crate) use self::attach::{AttachArgs, attach};
pub(crate) use self::copy::{CopyArgs, copy};
pub(crate) use self::detach::{MACHINE, become_machine, run_detached, spec, start, tell_started};
pub(crate) use self::exec::{ExecArgs, exec};
pub(crate) use self::logs::{LogsArgs, logs};
pub(crate) use self::ps::{PsArgs, ps};
pub(crate) use self::remove::{RemoveArgs, remove};
pub(crate) use self::stats::{StatsArgs, stats};
pub(crate) use self::stop::{KillArgs, StopArgs, WaitArgs, kill, stop, wait};

use crate::cli::{Cli, Command, RunArgs};
use crate::exit::End;
use crate::report;

/// The machine's vsock socket, in its directory.
pub(crate) const SOCKET: &str = "vsock.sock";
/// Where the machine's log is, in its directory.
pub(crate) const LOG: &str = "log";

/// Why something cannot be done with a machine.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    /// The registry does not give it.
    #[error(transparent)]
    Registry(#[from] strata_machines::Error),

    /// The guest says no.
    #[error("{message}")]
    Guest {
        /// What it does not have or do.
        kind: FailureKind,
        /// In its words.
        message: String,
    },

    /// Its agent cannot be reached.
    #[error("the guest of '{name}' does not answer: {reason}")]
    NoAgent {
        /// The machine.
        name: String,
        /// Why, as far as it is known.
        reason: String,
    },

    /// The conversation with the guest ended too early.
    #[error("the connection to the guest broke; it may have ended")]
    Broken(#[source] strata_protocol::Error),

    /// Something of this host's cannot be used.
    #[error("cannot {action}")]
    Host {
        /// To be read after "cannot".
        action: String,
        /// What the host said.
        source: io::Error,
    },

    /// What is to be run cannot be.
    #[error(transparent)]
    Run(#[from] Box<crate::run::Fault>),

    /// The machine could not be started; it has said why.
    #[error("the machine '{0}' was not started")]
    NotStarted(String),

    /// The arguments make no sense together.
    #[error("{0}")]
    Usage(String),
}

impl Fault {
    fn host<E: Into<io::Error>>(action: impl Into<String>) -> impl FnOnce(E) -> Self {
        let action = action.into();
        move |source| Self::Host {
            action,
            source: source.into(),
        }
    }

    /// What to do about it, where the error does not say.
    fn advice(&self) -> Option<String> {
        use strata_machines::Error;
        match self {
            Self::Registry(Error::NoSuchMachine(_)) => {
                Some("'strata ps -a' lists the machines that there are".to_owned())
            }
            Self::Registry(Error::NotRunning(name)) => {
                Some(format!("'strata start {name}' starts it"))
            }
            Self::Registry(Error::StillRunning(name)) => Some(format!(
                "'strata stop {name}' stops it; 'strata rm -f {name}' does not ask"
            )),
            Self::Run(fault) => fault.advice().map(str::to_owned),
            _ => None,
        }
    }
}

/// Says what went wrong; gives the end that tells of it.
pub(crate) fn say(fault: &Fault) -> End {
    report::say_error(fault);
    if let Some(advice) = fault.advice() {
        report::say(&advice);
    }
    match fault {
        // As shells tell of programs.
        Fault::Guest {
            kind: FailureKind::NotFound,
            ..
        } => End::Command(127),
        Fault::Guest {
            kind: FailureKind::NotPossible,
            ..
        } => End::Command(126),
        Fault::NotStarted(_) | Fault::Run(_) => End::NotStarted,
        _ => End::Failed,
    }
}

fn registry() -> Result<Registry, Fault> {
    Ok(Registry::of_user()?)
}

fn find(name: &str) -> Result<Machine, Fault> {
    Ok(registry()?.find(name)?)
}

/// The arguments that the machine is run with.
fn arguments(machine: &Machine) -> Result<RunArgs, Fault> {
    let words = std::iter::once("strata".to_owned()).chain(machine.asked().arguments.clone());
    match Cli::try_parse_from(words).map(|cli| cli.command) {
        Ok(Command::Run(args)) => Ok(*args),
        Ok(_) => Err(Fault::Usage(format!(
            "what the machine '{}' is run with is no run",
            machine.name()
        ))),
        Err(error) => Err(Fault::Usage(format!(
            "this version of Strata does not understand what the machine '{}' is run with: {error}",
            machine.name()
        ))),
    }
}

/// Does `act` with each of the machines named; what goes wrong with one is said, and the others
/// still get their turn.
fn each(names: &[String], mut act: impl FnMut(&Machine) -> Result<(), Fault>) -> End {
    let mut end = End::Done;
    for name in names {
        if let Err(fault) = find(name).and_then(|machine| act(&machine)) {
            end = say(&fault);
        }
    }
    end
}

/// Names and manifests of the images that machines in the background run.
pub(crate) fn pinned_images() -> Vec<(String, String)> {
    let machines = Registry::of_user().and_then(|registry| registry.list());
    machines
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|machine| machine.asked().image.clone())
        .map(|image| (image.name, image.id))
        .collect()
}
