//! The machines that are compared, and what is done with one: a boot, or the rows.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::Side;
use super::parts::{DONE, Parts, ROWS, SCRIPT, STARTED};
use crate::process::{self, Limits, Measured};
use crate::{Error, checks};

/// Guest memory on both sides.
const MEMORY: &str = "512M";
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
    /// The command that boots `parts` with `words` added to the kernel's command line, and
    /// ends when the guest reboots.
    fn command(&self, parts: &Parts, words: &str) -> Command;
}

/// Strata, as built from this tree.
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
        let mut command = Command::new(&self.program);
        command
            .args(["run", "--accel", "soft", "--cpus", "1", "--memory", MEMORY])
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
            .args(["-smp", "1", "-m", MEMORY])
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
    fn a_guest_that_did_not_finish_is_an_error() {
        assert!(complete("x", "BENCH-STARTED").is_err());
        assert!(parse("x", "Kernel panic").is_err());
    }
}
