//! The machines that are compared, and what is done with one: a boot, or the rows.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::Side;
use super::parts::{ASLEEP, AWAKE, DONE, PARALLEL, Parts, ROWS, SCRIPT, SLEEPS, STARTED};
use crate::process::{self, Limits, Measured};
use crate::{Error, checks};

/// A machine that has booted says so at once, and the rows come one by one.
pub(super) const LIMITS: Limits = Limits {
    silence: Duration::from_mins(1),
    total: Duration::from_mins(20),
};
/// How often the peer may fail to boot.
const ATTEMPTS: u32 = 5;

/// A machine to measure.
pub(crate) trait Guest {
    fn side(&self) -> Side;
    /// The command that boots `parts` with `words` added to the kernel's command line and one
    /// CPU, and ends when the guest reboots.
    fn command(&self, parts: &Parts, words: &str) -> Command;
}

/// Strata, as built from this tree.
#[derive(Clone)]
pub(crate) struct Strata {
    program: PathBuf,
}

impl Strata {
    /// A program that is there.
    pub(crate) fn at(program: &Path) -> Self {
        Self {
            program: program.to_owned(),
        }
    }

    /// The program.
    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    /// Builds the program.
    pub(crate) fn build() -> Result<Self, Error> {
        Ok(Self {
            program: checks::build_strata()?,
        })
    }
}

impl Guest for Strata {
    fn side(&self) -> Side {
        Side::Strata
    }

    fn command(&self, parts: &Parts, words: &str) -> Command {
        self.with_cpus(1, parts, words)
    }
}

impl Strata {
    fn with_cpus(&self, cpus: u32, parts: &Parts, words: &str) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(["run", "--accel", "soft", "--memory", &parts.memory])
            .args(["--cpus", &cpus.to_string()])
            .arg("--stats=json")
            .arg("--kernel")
            .arg(&parts.kernel)
            .arg("--initrd")
            .arg(&parts.initrd)
            .args(["--append", &command_line(words)]);
        command
    }
}

/// QEMU's lightest machine on its translator.
pub(crate) struct Tcg {
    program: PathBuf,
}

impl Tcg {
    pub(crate) fn new(program: PathBuf) -> Self {
        Self { program }
    }
}

impl Guest for Tcg {
    fn side(&self) -> Side {
        Side::Tcg
    }

    fn command(&self, parts: &Parts, words: &str) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(["-M", "microvm", "-accel", "tcg", "-cpu", "max"])
            .args(["-smp", "1", "-m", &parts.memory])
            .args(["-nodefaults", "-no-user-config", "-nographic"])
            .args(["-serial", "stdio", "-no-reboot"])
            .arg("-kernel")
            .arg(&parts.kernel)
            .arg("-initrd")
            .arg(&parts.initrd)
            // microvm has no reset device that Linux tries by itself: a triple fault resets
            // it. Its TSC is the host's, but on a busy host Linux fails to measure it, or
            // gives it up for jiffies.
            .args([
                "-append",
                &format!(
                    "{} reboot=t tsc=reliable tsc_early_khz={}",
                    command_line(words),
                    parts.tsc_khz
                ),
            ]);
        command
    }
}

fn command_line(words: &str) -> String {
    format!("console=ttyS0 quiet panic=-1 rdinit={SCRIPT} {words}")
}

/// A boot up to the first process, and the reboot that it asks for at once.
pub(crate) struct Boot {
    /// Wall time of the whole process, in seconds.
    pub(crate) seconds: f64,
    /// Host memory that it held at the end beyond the guest's own, in KiB, if it tells.
    pub(crate) held: Option<u64>,
}

/// Boots the guest.
pub(crate) fn boot(guest: &dyn Guest, parts: &Parts) -> Result<Boot, Error> {
    let done = run(guest, parts, "")?;
    Ok(Boot {
        seconds: done.wall.as_secs_f64(),
        held: held(&done.errors),
    })
}

/// The total of the memory that `strata run --stats=json` tells of.
fn held(errors: &str) -> Option<u64> {
    let line = errors.lines().rfind(|line| line.starts_with('{'))?;
    let stats: serde_json::Value = serde_json::from_str(line).ok()?;
    stats["memory_kib"]["total"].as_u64()
}

/// Runs the guest to its end, which must come after the script's own.
fn run(guest: &dyn Guest, parts: &Parts, words: &str) -> Result<Measured, Error> {
    let what = format!("{:?}", guest.side());
    let mut attempt = 1;
    loop {
        match process::measure(&what, &mut guest.command(parts, words), LIMITS) {
            // On a busy host its kernel may spin before it says anything. That is not what
            // is measured here.
            Err(_) if guest.side() == Side::Tcg && attempt < ATTEMPTS => {
                eprintln!("{what} did not boot; once more");
                attempt += 1;
            }
            done => {
                let done = done?;
                complete(&what, &done.output)?;
                return Ok(done);
            }
        }
    }
}

/// The rows as measured inside the guest, in seconds.
pub(crate) fn rows(guest: &dyn Guest, parts: &Parts) -> Result<Vec<(String, f64)>, Error> {
    let done = run(guest, parts, ROWS)?;
    parse(&format!("{:?}", guest.side()), &done.output)
}

/// Wall time of the load for two CPUs, on this many, as measured inside the guest.
pub(crate) fn parallel(strata: &Strata, parts: &Parts, cpus: u32) -> Result<f64, Error> {
    let mut command = strata.with_cpus(cpus, parts, PARALLEL);
    let done = process::measure("Strata", &mut command, LIMITS)?;
    complete("Strata", &done.output)?;
    parse_parallel("Strata", &done.output)
}

/// The same on this host, on this many of its CPUs.
pub(crate) fn native_parallel(parts: &Parts, cpus: usize) -> Result<f64, Error> {
    let failed = |source: rustix::io::Errno| Error::Start {
        what: "parallel".to_owned(),
        source: source.into(),
    };
    // children inherit it
    let all = sched_getaffinity(None).map_err(failed)?;
    let mut some = CpuSet::new();
    for cpu in (0..CpuSet::MAX_CPU)
        .filter(|cpu| all.is_set(*cpu))
        .take(cpus)
    {
        some.set(cpu);
    }
    sched_setaffinity(None, &some).map_err(failed)?;
    let done = process::measure("parallel", &mut Command::new(&parts.parallel), LIMITS);
    sched_setaffinity(None, &all).map_err(failed)?;
    parse_parallel("parallel", &done?.output)
}

fn parse_parallel(what: &str, output: &str) -> Result<f64, Error> {
    let seconds = output.lines().find_map(|line| {
        line.split_once("PARALLEL ")?
            .1
            .split(' ')
            .next()?
            .parse()
            .ok()
    });
    seconds.ok_or_else(|| Error::Output(format!("{what} printed no time, but:\n{output}")))
}

/// How a guest slept, as the host saw it.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub(crate) struct Slept {
    /// How long, in seconds.
    pub(crate) seconds: f64,
    /// Processor time that the machine took meanwhile, in seconds.
    pub(crate) busy: f64,
}

/// Has a guest sleep for [`SLEEP`](super::parts::SLEEP) seconds.
pub(crate) fn sleep(strata: &Strata, parts: &Parts) -> Result<Slept, Error> {
    let (mut asleep, mut awake) = (None, None);
    let mut command = strata.with_cpus(1, parts, SLEEPS);
    let done = process::follow("Strata", &mut command, LIMITS, |id, said| {
        let said = String::from_utf8_lossy(said);
        for (mark, at) in [(ASLEEP, &mut asleep), (AWAKE, &mut awake)] {
            if at.is_none() && said.contains(mark) {
                *at = processor_time(id).map(|busy| (Instant::now(), busy));
            }
        }
    })?;
    let (Some((from, before)), Some((to, after))) = (asleep, awake) else {
        let said = done.output;
        return Err(Error::Output(format!(
            "Strata did not sleep, but said:\n{said}"
        )));
    };
    Ok(Slept {
        seconds: (to - from).as_secs_f64(),
        busy: after - before,
    })
}

/// Processor time of all threads of a process, in seconds: fields 14 and 15 of proc_pid_stat(5).
fn processor_time(id: u32) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let ticks = fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?;
    #[expect(clippy::cast_precision_loss, reason = "a hundred or a thousand")]
    let rate = rustix::param::clock_ticks_per_second() as f64;
    Some(ticks / rate)
}

/// The rows on this host.
pub(crate) fn native_rows(parts: &Parts) -> Result<Vec<(String, f64)>, Error> {
    let mut command = Command::new(&parts.program);
    let done = process::measure("guest-bench", &mut command, LIMITS)?;
    parse("guest-bench", &done.output)
}

fn complete(what: &str, output: &str) -> Result<(), Error> {
    for marker in [STARTED, DONE] {
        if !output.contains(marker) {
            return Err(Error::Output(format!(
                "{what} ended without {marker}; its console said:\n{output}"
            )));
        }
    }
    Ok(())
}

/// Finds the lines `ROW name seconds`, also behind other console output.
fn parse(what: &str, output: &str) -> Result<Vec<(String, f64)>, Error> {
    let rows: Vec<(String, f64)> = output
        .lines()
        .filter_map(|line| {
            let mut words = line[line.find("ROW ")?..].split_ascii_whitespace().skip(1);
            Some((words.next()?.to_owned(), words.next()?.parse().ok()?))
        })
        .collect();
    if rows.is_empty() {
        return Err(Error::Output(format!(
            "{what} printed no rows, but:\n{output}"
        )));
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_found_in_a_serial_console_log() {
        let log = "BENCH-STARTED\r\nROW sieve 0.5\r\n[ 1.0] ROW crc 1.25\r\nROW torn\r\n";
        let rows = parse("x", log).unwrap();
        assert_eq!(rows, [("sieve".to_owned(), 0.5), ("crc".to_owned(), 1.25)]);
    }

    #[test]
    fn what_a_guest_held_is_found_behind_other_messages() {
        let errors = "strata: x\n{\"memory_kib\":{\"code_cache\":1,\"total\":9}}\n";
        assert_eq!(held(errors), Some(9));
        assert_eq!(held("strata: x\n"), None);
    }

    #[test]
    fn the_time_of_a_parallel_load_is_found() {
        let time = parse_parallel("x", "[ 1.0] x\r\nPARALLEL 0.5 sum 7\r\n").unwrap();
        assert!((time - 0.5).abs() < 1e-12);
        assert!(parse_parallel("x", "PARALLEL").is_err());
    }

    #[test]
    fn processor_time_grows_with_work() {
        let id = std::process::id();
        let before = processor_time(id).unwrap();
        let mut sum = 0_u64;
        while processor_time(id).unwrap() <= before {
            sum = (0..1_000_000).fold(sum, |sum, i| std::hint::black_box(sum ^ i));
        }
    }

    #[test]
    fn a_guest_that_did_not_finish_is_an_error() {
        assert!(complete("x", "BENCH-STARTED").is_err());
        assert!(parse("x", "Kernel panic").is_err());
    }
}
