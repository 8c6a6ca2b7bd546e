//! `strata stats`: what machines use, of this host and as their guests see it.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, IsTerminal};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;
use strata_machines::Machine;
use strata_protocol::{Reply, Request, Statistics};

use super::agent::Agent;
use super::{Fault, find, registry};
use crate::cli::OutputForm;
use crate::exit::End;
use crate::report;
use crate::streams::Stream;
use crate::units::display_size;

/// Time between two looks.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long a guest may take to tell.
const PATIENCE: Duration = Duration::from_secs(2);
/// What `/proc/PID/stat` counts processor time in, hundredths of a second on x86-64.
const TICKS: f64 = 100.0;
/// Moves a terminal's cursor to the top, and clears what is below.
const CLEAR: &str = "\x1b[H\x1b[J";

/// Arguments of `strata stats`.
#[derive(Debug, Args)]
pub(crate) struct StatsArgs {
    /// Once instead of every second; so it is where standard output is no terminal
    #[arg(long)]
    no_stream: bool,

    /// Form of the figures
    #[arg(long, value_enum, default_value_t = OutputForm::Text)]
    output: OutputForm,

    /// Machines: names, or first digits of IDs; all that run where none is given
    #[arg(value_name = "MACHINE")]
    machines: Vec<String>,
}

/// What one machine uses.
#[derive(Debug, Serialize)]
struct Usage {
    name: String,
    /// Processors of this host that its process kept busy: 1.0 is one of them.
    cpu: f64,
    /// This host's memory that its process holds, the guest's included, bytes.
    host_memory: u64,
    /// As the guest sees it; not there where it has no agent.
    #[serde(skip_serializing_if = "Option::is_none")]
    guest: Option<Guest>,
}

#[derive(Debug, Serialize)]
struct Guest {
    /// Bytes.
    memory_total: u64,
    memory_available: u64,
    /// Bytes since boot.
    network_received: u64,
    network_sent: u64,
    disk_read: u64,
    disk_written: u64,
    processes: u32,
    /// Seconds since boot.
    cpu_busy: f64,
    load: f64,
}

impl From<Statistics> for Guest {
    fn from(of: Statistics) -> Self {
        Self {
            memory_total: of.memory_total,
            memory_available: of.memory_available,
            network_received: of.received,
            network_sent: of.sent,
            disk_read: of.read,
            disk_written: of.written,
            processes: of.processes,
            cpu_busy: of.busy.as_secs_f64(),
            load: f64::from(of.load) / 100.0,
        }
    }
}

/// Tells what machines use.
pub(crate) fn stats(args: &StatsArgs) -> Result<End, Fault> {
    let again = !args.no_stream && args.output == OutputForm::Text && io::stdout().is_terminal();
    let mut before = BTreeMap::new();
    look(&machines(args)?, &mut before);
    loop {
        thread::sleep(INTERVAL);
        let usages = look(&machines(args)?, &mut before);
        let text = match args.output {
            OutputForm::Json => report::json(&usages),
            OutputForm::Text => {
                let rows: Vec<[String; 7]> = usages.iter().map(row).collect();
                let head = [
                    "NAME",
                    "CPU",
                    "HOST MEMORY",
                    "GUEST MEMORY",
                    "NETWORK IN/OUT",
                    "DISK READ/WRITTEN",
                    "PROCESSES",
                ];
                report::table(head, &rows)
            }
        };
        let text = if again {
            CLEAR.to_owned() + &text
        } else {
            text
        };
        match Stream::Stdout.write(text.as_bytes()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                return Err(Fault::host("write standard output")(error));
            }
            Ok(()) if again => {}
            _ => return Ok(End::Done),
        }
    }
}

fn machines(args: &StatsArgs) -> Result<Vec<Machine>, Fault> {
    if args.machines.is_empty() {
        return Ok(registry()?.list()?.into_iter().flatten().collect());
    }
    args.machines
        .iter()
        .map(|name| {
            let machine = find(name)?;
            if machine.state()?.is_running() {
                return Ok(machine);
            }
            Err(strata_machines::Error::NotRunning(machine.name().to_owned()).into())
        })
        .collect()
}

/// A look at a process: when, and how much processor time it has had, seconds.
type Seen = BTreeMap<u32, (Instant, f64)>;

/// What those use that run; `before` is the last look, and then this one.
fn look(machines: &[Machine], before: &mut Seen) -> Vec<Usage> {
    let mut seen = Seen::new();
    let mut usages = Vec::new();
    for machine in machines {
        let Some(pid) = machine.state().ok().and_then(|state| state.pid()) else {
            continue;
        };
        let now = Instant::now();
        let time = processor_time(pid);
        let cpu = before.get(&pid).map_or(0.0, |(then, spent)| {
            (time - spent) / now.duration_since(*then).as_secs_f64()
        });
        seen.insert(pid, (now, time));
        let is_first = !before.contains_key(&pid);
        usages.push(Usage {
            name: machine.name().to_owned(),
            cpu,
            host_memory: resident(pid),
            // The first look is only for the time.
            guest: if is_first { None } else { ask(machine) },
        });
    }
    *before = seen;
    usages
}

fn ask(machine: &Machine) -> Option<Guest> {
    let reply = Agent::ask_within(machine, &Request::Measure, PATIENCE).and_then(|mut agent| {
        agent.wait_for(Some(PATIENCE))?;
        agent.reply()
    });
    match reply {
        Ok(Reply::Statistics(statistics)) => Some(statistics.into()),
        Ok(_) => None,
        Err(fault) => {
            tracing::info!("{}: {fault}", machine.name());
            None
        }
    }
}

/// Seconds of processor time that a process has had (proc_pid_stat(5), utime and stime).
fn processor_time(pid: u32) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The program's name is in brackets, and may hold anything.
    let rest = text.rsplit_once(") ").map_or("", |(_, rest)| rest);
    let ticks: f64 = rest
        .split(' ')
        .skip(11)
        .take(2)
        .filter_map(|number| number.parse::<f64>().ok())
        .sum();
    ticks / TICKS
}

/// Bytes of memory that a process holds (proc_pid_statm(5)).
fn resident(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    let pages = text
        .split(' ')
        .nth(1)
        .and_then(|pages| pages.parse::<u64>().ok());
    pages.unwrap_or(0) * rustix::param::page_size() as u64
}

fn row(usage: &Usage) -> [String; 7] {
    let cpu = format!("{:.1} %", usage.cpu * 100.0);
    let memory = display_size(usage.host_memory);
    let name = usage.name.clone();
    let Some(guest) = &usage.guest else {
        let dash = || "-".to_owned();
        return [name, cpu, memory, dash(), dash(), dash(), dash()];
    };
    let pair = |a, b| format!("{} / {}", display_size(a), display_size(b));
    let used = guest.memory_total.saturating_sub(guest.memory_available);
    [
        name,
        cpu,
        memory,
        pair(used, guest.memory_total),
        pair(guest.network_received, guest.network_sent),
        pair(guest.disk_read, guest.disk_written),
        guest.processes.to_string(),
    ]
}
