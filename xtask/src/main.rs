//! Work around the product, as `cargo xtask COMMAND`: benchmarks beside a peer, the tests,
//! and checks that take too long for every change. Nothing of the product depends on it.
#![forbid(unsafe_code)]

mod bench;
mod checks;
mod debian;
mod packages;
mod process;
mod progress;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Work around the product.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure native, Strata and QEMU TCG side by side, in one run
    Bench(bench::Args),
    /// Run all tests, whole-system ones included; as root, installs what they need
    Test {
        /// Passed on to the test runner, such as the name of a test
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Run the software CPU against the host on generated instruction sequences
    Difftest {
        /// Sequences to run
        #[arg(long, default_value_t = checks::DIFFTEST_CASES)]
        cases: u64,
        /// Where the random numbers start; the tests' own seed without it
        #[arg(long)]
        seed: Option<u64>,
    },
    /// Run hostile guests: random code, page tables and devices, in every mode
    Fuzz {
        /// How long, in minutes
        #[arg(long, default_value_t = checks::FUZZ_MINUTES)]
        minutes: u64,
        /// Where the random numbers start; a new one without it
        #[arg(long)]
        seed: Option<u64>,
        /// Run this scene of the seed only, as a report names it
        #[arg(long, requires = "seed")]
        scene: Option<u64>,
    },
    /// Boot Linux twice, by blocks and instruction by instruction, and compare all the way
    Lockstep {
        /// Instructions to compare; to the end of the boot without it
        #[arg(long, default_value_t = 0)]
        instructions: u64,
    },
    /// Boot Debian with systemd to its login shell and run its own programs and tests; as root,
    /// installs what that needs
    Debian(debian::Args),
    /// Run the long checks: a million differential cases, ten minutes of hostile guests, a boot in
    /// lockstep, fifty boots in a row with one, two and four vCPUs each, and ten thousand short
    /// connections through a port forward
    Long,
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
enum Error {
    /// A program cannot be found, and which Debian package has it.
    #[error("{program} is missing; install it with: apt-get install {package}")]
    Missing {
        program: &'static str,
        package: &'static str,
    },
    /// A program cannot be started.
    #[error("cannot run {what}")]
    Start {
        what: String,
        source: std::io::Error,
    },
    /// A program ended otherwise than it should.
    #[error("{what} {how}")]
    Ended { what: String, how: String },
    /// A file cannot be used.
    #[error("cannot {action} '{}'", path.display())]
    File {
        action: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    /// There is no appliance to boot.
    #[error("the default appliance cannot be built")]
    Appliance(#[from] strata_image::Error),
    /// What a benchmark printed is not what was expected.
    #[error("{0}")]
    Output(String),
}

impl Error {
    fn file(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File {
            action,
            path,
            source,
        }
    }
}

/// The workspace's directory.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask lies in the workspace")
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Bench(args) => bench::run(&args),
        Command::Test { arguments } => checks::test(&arguments),
        Command::Difftest { cases, seed } => checks::difftest(cases, seed),
        Command::Fuzz {
            minutes,
            seed,
            scene,
        } => checks::fuzz(minutes, seed, scene),
        Command::Lockstep { instructions } => checks::lockstep(instructions),
        Command::Debian(args) => debian::run(&args),
        Command::Long => checks::long(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tell(&error);
            ExitCode::FAILURE
        }
    }
}

/// Prints an error with all that caused it.
fn tell(error: &Error) {
    let mut line = format!("xtask: {error}");
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        line = format!("{line}: {error}");
        source = error.source();
    }
    eprintln!("{line}");
}
