//! `strata attach`: the main command of a machine in the background, as if it ran here.
//!
//! What it prints comes from the machine's log, so that those who are attached never hold it up.
//! Input, signals and sizes go to the agent.

use std::thread;

use clap::Args;
use signal_hook::consts::{SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;
use strata_machines::{Machine, State};
use strata_protocol::{FailureKind, Input, Reply, Request, Size};

use super::agent::Agent;
use super::proxy::{Proxy, leave, make_raw, size};
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
    let run = arguments(&machine)?;
    let takes_input = run.interactive || run.tty;
    if args.end_input && !takes_input {
        return Err(Fault::Usage(format!(
            "the command of '{}' takes no input: it was run without -i and -t; leave out --end-input",
            machine.name()
        )));
    }
    // From here on, whatever the guest has to be waited for.
    let output = logs::Following::begin(&machine)?;
    let raw = if run.has_main_command() {
        match take_part(&machine, args, &run) {
            Ok(raw) => raw,
            // A short one has ended meanwhile, or is about to: what it printed is there.
            Err(fault) if machine.state()?.is_running() && !is_about_to_end(&fault) => {
                return Err(fault);
            }
            Err(_) => None,
        }
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

/// Whether a guest that goes down is the likely reason.
fn is_about_to_end(fault: &Fault) -> bool {
    let is_gone = FailureKind::NotFound;
    matches!(fault, Fault::Broken(_))
        || matches!(fault, Fault::Guest { kind, .. } if *kind == is_gone)
}

/// Gives the main command what this process has for it.
fn take_part(
    machine: &Machine,
    args: &AttachArgs,
    run: &RunArgs,
) -> Result<Option<RawMode>, Fault> {
    let mut agent = Agent::ask(machine, &Request::Attach)?;
    while !matches!(agent.reply()?, Reply::Started { .. }) {}
    let proxy = Proxy::of(&agent)?;
    let takes_input = (run.interactive || run.tty) && !args.no_input;
    let raw = if takes_input && run.tty {
        make_raw()?
    } else {
        None
    };
    listen(agent, proxy.clone())?;
    if raw.is_some() {
        // What fills the screen draws it anew when its size is another.
        let now = size();
        let rows = now.rows.saturating_add(1);
        proxy.send(&Input::Resize(Size { rows, ..now }));
        proxy.send(&Input::Resize(now));
        proxy.pass_signals(&[], true)?;
    } else {
        leave_on_quit()?;
        if !args.no_signals {
            // A hang-up is not passed on: the machine outlives terminals.
            proxy.pass_signals(&[SIGINT, SIGTERM, SIGUSR1, SIGUSR2], false)?;
        }
    }
    if takes_input {
        let mut keys = raw.is_some().then(|| Keys::new(Subject::Attached));
        let ends = args.end_input;
        let way = proxy.clone();
        proxy.pass_input(move |input| match (input, &mut keys) {
            (Input::Data(typed), Some(keys)) => type_in(keys, &typed, &way),
            (Input::End, _) if !ends => None,
            (input, _) => Some(input),
        })?;
    }
    Ok(raw)
}

/// Hears how much of the input was taken, until the agent has nothing more to say.
fn listen(mut agent: Agent, proxy: Proxy) -> Result<(), Fault> {
    let hear = move || {
        while let Ok(reply) = agent.reply() {
            match reply {
                Reply::Taken(count) => proxy.taken(count),
                Reply::Done => break,
                _ => {}
            }
        }
        proxy.close();
    };
    let started = thread::Builder::new().name("agent".to_owned()).spawn(hear);
    started.map(drop).map_err(Fault::host("start a thread"))
}

/// Ctrl-\ leaves where no other key is ours.
fn leave_on_quit() -> Result<(), Fault> {
    let mut signals = Signals::new([SIGQUIT]).map_err(Fault::host("watch for signals"))?;
    let wait = move || {
        if signals.forever().next().is_some() {
            detach();
        }
    };
    let started = thread::Builder::new().name("quit".to_owned()).spawn(wait);
    started.map(drop).map_err(Fault::host("start a thread"))
}

/// Obeys the keys that are for us; gives the others.
fn type_in(keys: &mut Keys, typed: &[u8], proxy: &Proxy) -> Option<Input> {
    let mut send = Vec::with_capacity(typed.len());
    for byte in typed {
        match keys.feed(*byte) {
            Key::Send(byte) => send.push(byte),
            Key::Leave => {
                proxy.send(&Input::Data(send));
                detach();
            }
            Key::Help => drop(Stream::Stderr.write(Subject::Attached.help().as_bytes())),
            Key::Nothing => {}
        }
    }
    (!send.is_empty()).then_some(Input::Data(send))
}

fn detach() -> ! {
    terminal::restore();
    eprintln!();
    report::say("detached; the machine goes on");
    leave(0)
}
