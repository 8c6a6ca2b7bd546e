//! `strata logs`: what a machine in the background printed.

use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use strata_machines::{Entry, LogReader, Machine, Record, Stream};

use super::{Fault, LOG, arguments, find};
use crate::exit::End;
use crate::report;
use crate::streams;
use crate::units;

/// How long a follower sleeps before it looks whether the machine still runs.
const LOOK: Duration = Duration::from_millis(250);

/// Arguments of `strata logs`.
#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// Go on with what is printed from now on, until the machine ends
    #[arg(short, long)]
    follow: bool,

    /// Only the last N lines
    #[arg(short = 'n', long, value_name = "N")]
    tail: Option<usize>,

    /// Only what was printed in this time before now, such as 10m or 24h
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    since: Option<Duration>,

    /// Begin each line with the time at which it was printed, in UTC
    #[arg(short, long)]
    timestamps: bool,

    /// What appeared on the serial console, where the kernel writes, instead of what the command
    /// wrote
    #[arg(long)]
    console: bool,

    /// The machine: its name, or the first digits of its ID
    #[arg(value_name = "MACHINE")]
    machine: String,
}

/// Prints the log.
pub(crate) fn logs(args: &LogsArgs) -> Result<End, Fault> {
    let machine = find(&args.machine)?;
    let mut reader = open(&machine)?;
    if let Some(time) = args.since {
        let from = SystemTime::now().checked_sub(time).unwrap_or(UNIX_EPOCH);
        reader.since(from);
    }
    if let Some(lines) = args.tail {
        reader.tail(lines)?;
    }
    let printer = Printer {
        console: args.console || is_console_all(&machine)?,
        timestamps: args.timestamps,
        at_start: true,
    };
    printer.print_all(&machine, &mut reader, args.follow)?;
    Ok(End::Done)
}

/// What a machine prints from some time on.
pub(super) struct Following<'a> {
    machine: &'a Machine,
    reader: LogReader,
    printer: Printer,
}

impl<'a> Following<'a> {
    /// From now on.
    pub(super) fn begin(machine: &'a Machine) -> Result<Self, Fault> {
        let mut reader = open(machine)?;
        reader.tail(0)?;
        let printer = Printer {
            console: is_console_all(machine)?,
            timestamps: false,
            at_start: true,
        };
        Ok(Self {
            machine,
            reader,
            printer,
        })
    }

    /// Prints it until the machine ends.
    pub(super) fn follow(mut self) -> Result<(), Fault> {
        self.printer.print_all(self.machine, &mut self.reader, true)
    }
}

fn open(machine: &Machine) -> Result<LogReader, Fault> {
    if machine.asked().ephemeral {
        return Err(Fault::Usage(format!(
            "the machine '{}' is not in the background: its output is where it was started",
            machine.name()
        )));
    }
    Ok(LogReader::open(&machine.directory().join(LOG)))
}

/// Whether all that happens is on the console: there is no command.
fn is_console_all(machine: &Machine) -> Result<bool, Fault> {
    Ok(!arguments(machine)?.has_main_command())
}

fn next(reader: &mut LogReader, follow: bool) -> Result<Option<Entry>, Fault> {
    Ok(if follow {
        reader.follow(LOOK)?
    } else {
        reader.read()?
    })
}

struct Printer {
    console: bool,
    timestamps: bool,
    /// A line begins.
    at_start: bool,
}

impl Printer {
    /// Prints all there is, and with `follow` all that comes until the machine ends.
    fn print_all(
        mut self,
        machine: &Machine,
        reader: &mut LogReader,
        follow: bool,
    ) -> Result<(), Fault> {
        loop {
            // Before the log: what it prints last must not be missed.
            let runs = follow && machine.state()?.is_running();
            while let Some(entry) = next(reader, runs)? {
                match entry {
                    Entry::Record(record) => match self.print(&record) {
                        Ok(()) => {}
                        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                        Err(error) => return Err(Fault::host("write the log")(error)),
                    },
                    Entry::Lost(bytes) => {
                        report::say(&format!("{bytes} bytes are not in the log any more"));
                    }
                }
            }
            if !runs {
                return Ok(());
            }
        }
    }

    fn print(&mut self, record: &Record) -> io::Result<()> {
        let is_console = record.stream == Stream::Console;
        if is_console != self.console {
            return Ok(());
        }
        let to = if record.stream == Stream::Stderr {
            streams::Stream::Stderr
        } else {
            streams::Stream::Stdout
        };
        if !self.timestamps {
            return to.write(&record.bytes);
        }
        let printed = UNIX_EPOCH + Duration::from_nanos(record.time);
        let mut text = Vec::new();
        for line in record.bytes.split_inclusive(|byte| *byte == b'\n') {
            if self.at_start {
                text.extend(units::display_time(printed).bytes());
                text.push(b' ');
            }
            text.extend_from_slice(line);
            self.at_start = line.ends_with(b"\n");
        }
        to.write(&text)
    }
}

/// What a machine said last on its log, for an error.
pub(super) fn last_lines(machine: &Machine, count: usize) -> Vec<String> {
    let mut reader = LogReader::open(&machine.directory().join(LOG));
    let mut text = Vec::new();
    if reader.tail(count).is_ok() {
        while let Ok(Some(Entry::Record(record))) = reader.read() {
            text.extend(record.bytes);
        }
    }
    let text = String::from_utf8_lossy(&text).into_owned();
    text.lines()
        .map(|line| line.replace(char::is_control, ""))
        .collect()
}
