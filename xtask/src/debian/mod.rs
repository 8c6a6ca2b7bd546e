//! `cargo xtask debian`: Debian's own user space on Strata, as on the host.
//!
//! ```text
//!   disk (mmdebstrap, ext4; kept) ──► guest (boot, login shell) ◄── checks, line by line
//! ```
//!
//! The guest is used as a person would use it: through the login shell on its serial console.
//! A check is a line of shell that ends with status 0 where all is well.

mod checks;
mod conversation;
mod disk;
mod guest;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::value_parser;

use crate::{Error, tell};
use checks::Check;
use guest::{Ended, Guest};

/// Arguments of `cargo xtask debian`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Numbers of vCPUs; each gets a machine
    #[arg(
        long,
        value_name = "N,...",
        value_delimiter = ',',
        default_value = "1,2"
    )]
    cpus: Vec<u32>,
    /// Only checks with this in their names
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Multiplies the time that a check may take, for a slow or busy host
    #[arg(long, value_name = "FACTOR", default_value_t = 1, value_parser = value_parser!(u32).range(1..=100))]
    patience: u32,
    /// A strata that is built already, instead of this tree's
    #[arg(long, value_name = "FILE")]
    strata: Option<PathBuf>,
}

/// Builds what is missing, boots and checks. Fails if a check does, after all of them.
pub(crate) fn run(args: &Args) -> Result<(), Error> {
    let checks = checks::chosen(args.only.as_deref());
    if checks.is_empty() {
        return Err(Error::Output("no check has a name like that".to_owned()));
    }
    let image = disk::provide()?;
    let strata = match &args.strata {
        Some(program) => program.clone(),
        None => crate::checks::build_strata()?,
    };
    let mut failed = 0;
    for cpus in &args.cpus {
        let machine = Machine {
            strata: &strata,
            image: &image,
            cpus: *cpus,
            patience: args.patience,
        };
        match machine.check(&checks) {
            Ok(count) => failed += count,
            Err(error) => {
                tell(&error);
                failed += 1;
            }
        }
    }
    if failed == 0 {
        return Ok(());
    }
    Err(Error::Output(format!("{failed} checks failed")))
}

/// One machine, from boot to power-off.
struct Machine<'a> {
    strata: &'a Path,
    image: &'a Path,
    cpus: u32,
    patience: u32,
}

impl Machine<'_> {
    /// Runs `checks` in it and gives how many failed; an error if it could not go on.
    fn check(&self, checks: &[Check]) -> Result<u32, Error> {
        let begin = Instant::now();
        let mut guest = Guest::boot(self.strata, self.image, self.cpus, self.patience)?;
        self.report("ok", begin.elapsed(), "boots to a login shell");
        let mut failed = 0;
        for check in checks {
            let begin = Instant::now();
            let ended = guest.run(&check.command, check.limit * self.patience)?;
            let verdict = match ended {
                Ended::Status(0, _) => "ok",
                Ended::Status(..) => "FAILED",
                Ended::Late(_) => "HUNG",
            };
            self.report(verdict, begin.elapsed(), &check.name);
            if let Some(said) = ended.complaint() {
                println!("{said}");
                failed += 1;
            }
            if verdict == "HUNG" {
                guest.interrupt()?;
            }
        }
        let begin = Instant::now();
        guest.power_off()?;
        self.report("ok", begin.elapsed(), "powers off");
        Ok(failed)
    }

    fn report(&self, verdict: &str, took: Duration, name: &str) {
        let (cpus, seconds) = (self.cpus, took.as_secs_f64());
        println!("{verdict:6} {seconds:6.1} s  {cpus} vCPU  {name}");
    }
}
