//! `cargo xtask bench`: native, Strata and QEMU TCG side by side, in one run.
//!
//! ```text
//!   parts (guest-bench, kernel, one initramfs) ──► guests (native, Strata, TCG) ──► report
//! ```
//!
//! Both machines boot the same kernel and initramfs with the same memory and one CPU. Runs
//! are interleaved, so that a busy host slows all sides alike; what counts is the ratios.

mod disk;
mod guests;
mod net;
mod parts;
mod report;

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::ValueEnum;

use crate::{Error, packages};
use guests::{Guest, Strata, Tcg};
use parts::{Parts, SLEEP};
use report::{Report, Row};

/// Arguments of `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How often each is measured; the median counts. A row is the best of three in itself
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Memory of the guests; up to 512M Linux leaves programs without large pages
    #[arg(long, value_name = "SIZE", default_value = "1G")]
    memory: String,
    /// Measure only this, instead of all
    #[arg(long, value_enum, value_name = "PART")]
    only: Vec<Part>,
    /// Sides to leave out, for work on the others
    #[arg(long, value_enum)]
    skip: Vec<Side>,
    /// A strata that is built already, instead of this tree's
    #[arg(long, value_name = "FILE")]
    strata: Option<PathBuf>,
    /// Form of the report
    #[arg(long, value_enum, default_value_t = Form::Text)]
    output: Form,
}

/// Who is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Side {
    /// This host, without a machine
    Native,
    /// Strata
    Strata,
    /// QEMU's TCG
    Tcg,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// A whole boot to the first process, and what memory it holds
    Boot,
    /// The rows of the benchmark program
    Rows,
    /// What a second CPU brings; of Strata and the host
    Cpus,
    /// How a guest sleeps, and what that costs; of Strata
    Sleep,
    /// The network, between guest and host; of Strata and TCG
    Net,
    /// Converting disk images; of Strata and qemu-img
    Disk,
}

/// Form of the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Form {
    /// For people
    Text,
    /// For programs
    Json,
}

/// Measured times in seconds, by row and side.
#[derive(Debug, Default)]
struct Times(BTreeMap<(String, Side), Vec<f64>>);

impl Times {
    fn add(&mut self, row: &str, side: Side, seconds: f64) {
        self.0
            .entry((row.to_owned(), side))
            .or_default()
            .push(seconds);
    }

    fn median(&self, row: &str, side: Side) -> Option<f64> {
        let mut times = self.0.get(&(row.to_owned(), side))?.clone();
        times.sort_by(f64::total_cmp);
        let middle = times.len() / 2;
        Some(if times.len().is_multiple_of(2) {
            f64::midpoint(times[middle - 1], times[middle])
        } else {
            times[middle]
        })
    }

    fn row(&self, name: &str) -> Row {
        Row {
            name: name.to_owned(),
            native: self.median(name, Side::Native),
            strata: self.median(name, Side::Strata),
            tcg: self.median(name, Side::Tcg),
        }
    }
}

/// Measures and prints.
pub(crate) fn run(args: &Args) -> Result<(), Error> {
    let measured = |part| args.only.is_empty() || args.only.contains(&part);
    let mut report = Report::default();
    if args.only.iter().any(|part| *part != Part::Disk) || args.only.is_empty() {
        machines(args, measured, &mut report)?;
    }
    if measured(Part::Disk) {
        let strata = match &args.strata {
            Some(program) => Strata::at(program),
            None => Strata::build()?,
        };
        report.disk = Some(disk::measure(strata.program(), args.runs)?);
    }
    match args.output {
        Form::Text => print!("{report}"),
        Form::Json => println!("{}", report.json()),
    }
    Ok(())
}

/// Measures what takes a machine.
fn machines(
    args: &Args,
    measured: impl Fn(Part) -> bool,
    report: &mut Report,
) -> Result<(), Error> {
    let wanted = |side| !args.skip.contains(&side);
    let mut guests: Vec<Box<dyn Guest>> = Vec::new();
    if wanted(Side::Tcg) {
        guests.push(Box::new(Tcg::new(packages::QEMU.require()?)));
    }
    let parts = Parts::make(&args.memory)?;
    let strata = if wanted(Side::Strata) {
        let strata = match &args.strata {
            Some(program) => Strata::at(program),
            None => Strata::build()?,
        };
        guests.insert(0, Box::new(strata.clone()));
        Some(strata)
    } else {
        None
    };
    if measured(Part::Boot) {
        let (row, held) = boots(&guests, &parts, args.runs)?;
        (report.boot, report.held) = (Some(row), held);
    }
    if measured(Part::Rows) {
        report.rows = rows(&guests, &parts, args.runs, wanted(Side::Native))?;
    }
    if measured(Part::Cpus) {
        let native = wanted(Side::Native);
        report.parallel = Some(parallel(strata.as_ref(), &parts, args.runs, native)?);
    }
    if let (true, Some(strata)) = (measured(Part::Sleep), &strata) {
        eprintln!("sleep of {SLEEP} s");
        report.slept = Some(guests::sleep(strata, &parts)?);
    }
    if measured(Part::Net) {
        let qemu = wanted(Side::Tcg).then(|| packages::QEMU.require());
        let program = strata.as_ref().map(Strata::program);
        let net = net::measure(
            program,
            qemu.transpose()?.as_deref(),
            &args.memory,
            args.runs,
        )?;
        report.net = Some(net);
    }
    Ok(())
}

/// Runs the load for two CPUs on one and on two, of the guest and of the host, in turn.
fn parallel(
    strata: Option<&Strata>,
    parts: &Parts,
    runs: u32,
    native: bool,
) -> Result<[Row; 2], Error> {
    let names = ["on one CPU", "on two CPUs"];
    let mut times = Times::default();
    for run in 1..=runs {
        for (cpus, name) in (1..).zip(names) {
            eprintln!("parallel load {run}/{runs} {name}");
            if native {
                let seconds = guests::native_parallel(parts, cpus as usize)?;
                times.add(name, Side::Native, seconds);
            }
            if let Some(strata) = strata {
                times.add(name, Side::Strata, guests::parallel(strata, parts, cpus)?);
            }
        }
    }
    Ok(names.map(|name| times.row(name)))
}

/// Boots every machine `runs` times, in turn. Also gives the most that Strata held of the host's
/// memory, in KiB.
fn boots(guests: &[Box<dyn Guest>], parts: &Parts, runs: u32) -> Result<(Row, Option<u64>), Error> {
    let name = "boot to init";
    let mut times = Times::default();
    let mut most = None;
    for run in 1..=runs {
        for guest in guests {
            let guests::Boot { seconds, held } = guests::boot(&**guest, parts)?;
            eprintln!("boot {run}/{runs} {:?}: {seconds:.2} s", guest.side());
            times.add(name, guest.side(), seconds);
            most = most.max(held);
        }
    }
    Ok((times.row(name), most))
}

/// Runs the rows on every side, in turn.
fn rows(
    guests: &[Box<dyn Guest>],
    parts: &Parts,
    runs: u32,
    native: bool,
) -> Result<Vec<Row>, Error> {
    let mut names: Vec<String> = Vec::new();
    let mut times = Times::default();
    let mut note = |side, results: Vec<(String, f64)>| {
        for (name, seconds) in results {
            if !names.contains(&name) {
                names.push(name.clone());
            }
            times.add(&name, side, seconds);
        }
    };
    for run in 1..=runs {
        if native {
            eprintln!("rows {run}/{runs} Native");
            note(Side::Native, guests::native_rows(parts)?);
        }
        for guest in guests {
            eprintln!("rows {run}/{runs} {:?}", guest.side());
            note(guest.side(), guests::rows(&**guest, parts)?);
        }
    }
    Ok(names.iter().map(|name| times.row(name)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_not_moved_by_one_slow_run() {
        let mut times = Times::default();
        for seconds in [1.0, 9.0, 1.2, 1.1] {
            times.add("x", Side::Tcg, seconds);
        }
        assert_eq!(times.median("x", Side::Tcg), Some(1.15));
        times.add("x", Side::Tcg, 1.2);
        assert_eq!(times.median("x", Side::Tcg), Some(1.2));
        assert_eq!(times.median("x", Side::Strata), None);
    }
}
