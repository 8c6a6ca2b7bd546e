//! `strata attach`: the main command of a machine in the background, as if it ran here.

use std::thread;

use clap::Args;
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;
use strata_machines::{Machine, State};
use strata_protocol::Request;

use super::agent::Agent;
use super::{Fault, find, logs};
use crate::exit::End;
use crate::report;

/// Arguments of `strata attach`.
#[derive(Debug, Args)]
pub(crate) struct AttachArgs {
    /// Leave signals, and so Ctrl-C, to this process instead of passing them on
    #[arg(long)]
    no_signals: bool,

    /// The machine: its name, or the first digits of its ID
    #[arg(value_name = "MACHINE")]
    machine: String,
}

/// Prints what it prints until it ends; gives its end as this process's.
pub(crate) fn attach(args: &AttachArgs) -> Result<End, Fault> {
    let machine = find(&args.machine)?;
    if !machine.state()?.is_running() {
        return Err(strata_machines::Error::NotRunning(machine.name().to_owned()).into());
    }
    if !args.no_signals {
        pass_signals(machine.clone())?;
    }
    logs::follow(&machine)?;
    Ok(match machine.state()? {
        State::Ended(end) => End::Command(end.status),
        // Whoever read this has gone, and the machine goes on.
        state if state.is_running() => End::Done,
        _ => End::Failed,
    })
}

/// Passes signals on to the main command. A hang-up is not: the machine outlives terminals.
fn pass_signals(machine: Machine) -> Result<(), Fault> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGUSR1, SIGUSR2])
        .map_err(Fault::host("watch for signals"))?;
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            for signal in &mut signals {
                if let Err(fault) = Agent::get(&machine, &Request::Signal(signal as u8)) {
                    report::say_error(&fault);
                }
            }
        })
        .map_err(Fault::host("start a thread"))?;
    Ok(())
}
