//! `strata ps`: the machines that there are.

use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;
use serde::Serialize;
use strata_machines::{Machine, State};

use super::{Fault, arguments, registry};
use crate::cli::{OutputForm, RunArgs};
use crate::report;
use crate::units::display_age;

/// Longest command that is shown, characters.
const COMMAND: usize = 30;

/// Arguments of `strata ps`.
#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    /// Those too that do not run
    #[arg(short, long)]
    all: bool,

    /// Names alone
    #[arg(short, long, conflicts_with = "output")]
    quiet: bool,

    /// Form of the list
    #[arg(long, value_enum, default_value_t = OutputForm::Text)]
    output: OutputForm,
}

/// A machine as programs are told of it. Times are in seconds since 1970.
#[derive(Debug, Serialize)]
struct Told {
    id: String,
    name: String,
    /// created, starting, running, exited, or lost: its process died without a word.
    state: &'static str,
    /// The process on this host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    /// Since when it is in this state, as far as that is known.
    since: u64,
    /// How it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    image: Option<String>,
    command: Vec<String>,
    ports: Vec<String>,
    created: u64,
    /// It runs in the foreground, and vanishes when it ends.
    ephemeral: bool,
    directory: String,
}

impl Told {
    fn of(machine: &Machine) -> Result<Self, Fault> {
        let asked = machine.asked();
        let state = machine.state()?;
        let (word, since, status, reason) = match &state {
            State::Created => ("created", asked.created, None, None),
            State::Starting { since, .. } => ("starting", *since, None, None),
            State::Running { since, .. } => ("running", *since, None, None),
            State::Ended(end) => ("exited", end.at, Some(end.status), Some(end.reason.clone())),
            State::Lost { since } => ("lost", *since, None, None),
        };
        let run = arguments(machine).ok();
        Ok(Self {
            id: machine.id().to_owned(),
            name: machine.name().to_owned(),
            state: word,
            pid: state.pid(),
            since,
            status,
            reason,
            image: asked.image.as_ref().map(|image| image.name.clone()),
            command: run.as_ref().map(command).unwrap_or_default(),
            ports: run.as_ref().map(ports).unwrap_or_default(),
            created: asked.created,
            ephemeral: asked.ephemeral,
            directory: machine.directory().display().to_string(),
        })
    }

    /// What has become of it, in words.
    fn state(&self, now: u64) -> String {
        let age = display_age(now.saturating_sub(self.since));
        match (self.state, self.status) {
            ("running", _) => format!("up {age}"),
            ("exited", Some(status)) => format!("exited ({status}) {age} ago"),
            // Its process was killed, or the host went down: nobody knows when.
            ("lost", _) => format!("lost, was up {age} ago"),
            (state, _) => state.to_owned(),
        }
    }
}

fn command(run: &RunArgs) -> Vec<String> {
    let words = run.command.iter();
    words
        .map(|word| word.to_string_lossy().into_owned())
        .collect()
}

fn ports(run: &RunArgs) -> Vec<String> {
    run.forwards.iter().map(ToString::to_string).collect()
}

/// Lists the machines.
pub(crate) fn ps(args: &PsArgs) -> Result<String, Fault> {
    let mut told = Vec::new();
    for machine in registry()?.list()? {
        match machine
            .map_err(Fault::from)
            .and_then(|machine| Told::of(&machine))
        {
            Ok(one) => told.push(one),
            // Removed since.
            Err(Fault::Registry(strata_machines::Error::Gone(_))) => {}
            Err(fault) => report::say_error(&fault),
        }
    }
    told.retain(|one| args.all || matches!(one.state, "running" | "starting"));
    if args.quiet {
        return Ok(told.iter().map(|one| one.name.clone() + "\n").collect());
    }
    match args.output {
        OutputForm::Json => Ok(report::json(&told)),
        OutputForm::Text => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            let now = now.map_or(0, |time| time.as_secs());
            let rows: Vec<[String; 6]> = told.iter().map(|one| row(one, now)).collect();
            Ok(report::table(
                ["NAME", "ID", "IMAGE", "COMMAND", "STATE", "PORTS"],
                &rows,
            ))
        }
    }
}

fn row(one: &Told, now: u64) -> [String; 6] {
    let mut command = one.command.join(" ").replace(char::is_control, "?");
    if command.chars().count() > COMMAND {
        command = command.chars().take(COMMAND - 1).collect::<String>() + "\u{2026}";
    }
    let or_dash = |text: String| {
        if text.is_empty() {
            "-".to_owned()
        } else {
            text
        }
    };
    [
        one.name.clone(),
        one.id.clone(),
        or_dash(one.image.clone().unwrap_or_default()),
        or_dash(command),
        one.state(now),
        or_dash(one.ports.join(", ")),
    ]
}
