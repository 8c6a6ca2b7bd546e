//! `strata attach`: the main command of a machine in the background, as if it ran here.
//!
//! What it prints comes from the machine's log, so that those who are attached never hold it up.
//! Input, signals and sizes go to the agent.

use std::process;

use clap::Args;
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};
use strata_machines::{Machine, State};
use strata_protocol::{Input, Reply, Request, Size};

use super::agent::Agent;
use super::outlet::{Outlet, make_raw, size};
use super::{Fault, arguments, find, logs};
use crate::cli::RunArgs;
use crate::exit::End;
use crate::keys::{Key, Keys, Subject};
use crate::report;
use crate::streams::Stream;
use crate::terminal::{self, RawMode};

/// Arguments of `strata attach`.
#[derive(Debug, Args)]
pub(crate) struct AttachArgs {
    /// Give it no input
    #[arg(long)]
    no_input: bool,

    /// End its input, for good, where this process's ends; it stays open for others otherwise
    #[arg(long, conflicts_with = "no_input")]
    end_input: bool,

    /// Leave signals, and so Ctrl-C, to this process instead of passing them on
    #[arg(long)]
    no_signals: bool,

    /// The machine: its name, or the first digits of its ID
    #[arg(value_name = "MACHINE")]
    machine: String,
}

/// Takes part until it ends; gives its end as this process's.
pub(crate) fn attach(args: &AttachArgs) -> Result<End, Fault> {
    let machine = find(&args.machine)?;
    if !machine.state()?.is_running() {
        return Err(strata_machines::Error::NotRunning(machine.name().to_owned()).into());
    }
    // From here on, whatever the guest has to be waited for.
    let output = logs::Following::begin(&machine)?;
    let run = arguments(&machine)?;
    let raw = if run.has_main_command() {
        take_part(&machine, args, &run)?
    } else {
        None
    };
    let followed = output.follow();
    drop(raw);
    followed?;
    Ok(match machine.state()? {
        State::Ended(end) => End::Command(end.status),
        // Whoever read this has gone, and the machine goes on.
        state if state.is_running() => End::Done,
        _ => End::Failed,
    })
}

/// Gives the main command what this process has for it.
fn take_part(
    machine: &Machine,
    args: &AttachArgs,
    run: &RunArgs,
) -> Result<Option<RawMode>, Fault> {
    let mut agent = Agent::ask(machine, &Request::Attach)?;
    while !matches!(agent.reply()?, Reply::Started { .. }) {}
    let outlet = Outlet::of(&agent)?;
    let takes_input = (run.interactive || run.tty) && !args.no_input;
    let raw = if takes_input && run.tty {
        make_raw()?
    } else {
        None
    };
    if raw.is_some() {
        // What fills the screen draws it anew when its size is another.
        let now = size();
        let rows = now.rows.saturating_add(1);
        outlet.send(&Input::Resize(Size { rows, ..now }));
        outlet.send(&Input::Resize(now));
        outlet.pass_signals(&[SIGWINCH])?;
    } else if !args.no_signals {
        // A hang-up is not passed on: the machine outlives terminals.
        outlet.pass_signals(&[SIGINT, SIGTERM, SIGUSR1, SIGUSR2])?;
    }
    if takes_input {
        let mut keys = raw.is_some().then(|| Keys::new(Subject::Attached));
        let ends = args.end_input;
        outlet.pass_input(move |input| match (input, &mut keys) {
            (Input::Data(typed), Some(keys)) => type_in(keys, &typed),
            (Input::End, _) if !ends => None,
            (input, _) => Some(input),
        })?;
    }
    Ok(raw)
}

/// Obeys the keys that are for us; gives the others.
fn type_in(keys: &mut Keys, typed: &[u8]) -> Option<Input> {
    let mut send = Vec::with_capacity(typed.len());
    for byte in typed {
        match keys.feed(*byte) {
            Key::Send(byte) => send.push(byte),
            Key::Leave => {
                terminal::restore();
                eprintln!();
                report::say("detached; the machine goes on");
                process::exit(0);
            }
            Key::Help => drop(Stream::Stderr.write(Subject::Attached.help().as_bytes())),
            Key::Nothing => {}
        }
    }
    (!send.is_empty()).then_some(Input::Data(send))
}
