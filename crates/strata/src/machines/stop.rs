//! `strata stop`, `kill` and `wait`: the ends of machines.

use std::time::Duration;

use clap::Args;
use strata_machines::{Machine, Signal, State};
use strata_protocol::Request;

use super::agent::Agent;
use super::{Fault, each, find};
use crate::exit::End;
use crate::units;
use crate::{report, supervisor};

/// How long a guest may take to hear that it is to stop.
const HEARING: Duration = Duration::from_secs(2);

/// How long a machine's process may take to end.
const LAST_WORDS: Duration = Duration::from_secs(6);

/// Arguments of `strata stop`.
#[derive(Debug, Args)]
pub(crate) struct StopArgs {
    /// How long the guest may take before it is ended without asking
    #[arg(short, long, value_name = "TIME", default_value = "10s", value_parser = units::duration)]
    time: Duration,

    /// The machines: names, or first digits of IDs
    #[arg(required = true, value_name = "MACHINE")]
    machines: Vec<String>,
}

/// Arguments of `strata kill`.
#[derive(Debug, Args)]
pub(crate) struct KillArgs {
    /// Send this signal to the machine's main command, by name or number, instead of ending the
    /// machine
    #[arg(short, long, value_name = "SIGNAL", value_parser = units::signal)]
    signal: Option<u8>,

    /// The machines: names, or first digits of IDs
    #[arg(required = true, value_name = "MACHINE")]
    machines: Vec<String>,
}

/// Arguments of `strata wait`.
#[derive(Debug, Args)]
pub(crate) struct WaitArgs {
    /// The machine: its name, or the first digits of its ID
    #[arg(value_name = "MACHINE")]
    machine: String,
}

/// Stops machines: asks the main command by the image's stop signal or SIGTERM, and ends the
/// machine if that does not in its time. Those that do not run are left so.
pub(crate) fn stop(args: &StopArgs) -> End {
    each(&args.machines, |machine| stop_one(machine, args.time))
}

fn stop_one(machine: &Machine, time: Duration) -> Result<(), Fault> {
    if !machine.state()?.is_running() {
        return Ok(());
    }
    let asked =
        Agent::ask_within(machine, &Request::Stop, HEARING.min(time)).and_then(|mut agent| {
            agent.wait_for(Some(HEARING))?;
            agent.reply()
        });
    match asked {
        // It may go down before it has answered.
        Ok(_) | Err(Fault::Broken(_)) => {
            if is_gone(machine, time)? {
                return Ok(());
            }
            report::say(&format!(
                "'{}' did not stop in {time:?} and is ended",
                machine.name()
            ));
        }
        Err(fault) => tracing::info!("'{}' cannot be asked: {fault}", machine.name()),
    }
    end(machine)
}

/// Ends a machine without asking its guest: its process still says how it ended, if it can.
pub(super) fn end(machine: &Machine) -> Result<(), Fault> {
    for signal in [supervisor::END, Signal::KILL] {
        match machine.signal(signal) {
            Err(strata_machines::Error::NotRunning(_) | strata_machines::Error::Gone(_)) => {
                return Ok(());
            }
            other => other?,
        }
        if is_gone(machine, LAST_WORDS)? {
            return Ok(());
        }
    }
    Err(Fault::Usage(format!(
        "the machine '{}' does not end",
        machine.name()
    )))
}

fn is_gone(machine: &Machine, time: Duration) -> Result<bool, Fault> {
    match machine.wait(Some(time)) {
        Ok(state) => Ok(state.is_some()),
        Err(strata_machines::Error::Gone(_)) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// Ends machines at once, or sends their main commands a signal.
pub(crate) fn kill(args: &KillArgs) -> End {
    each(&args.machines, |machine| match args.signal {
        Some(number) => Agent::get(machine, &Request::Signal(number)).map(drop),
        None => end(machine),
    })
}

/// Waits until a machine has ended; gives its status.
pub(crate) fn wait(args: &WaitArgs) -> Result<End, Fault> {
    let machine = find(&args.machine)?;
    match machine.wait(None)? {
        Some(State::Ended(end)) => Ok(End::Command(end.status)),
        Some(State::Lost { .. }) => Err(Fault::Usage(format!(
            "the process of '{}' died without a word: nobody knows its status",
            machine.name()
        ))),
        _ => Ok(End::Done),
    }
}
