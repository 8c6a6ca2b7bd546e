//! `cargo xtask test`, `difftest`, `fuzz`, `lockstep` and `long`: what to run, and with what.
//! The checks themselves are tests of the crates.

use std::env;
use std::path::PathBuf;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::{Error, packages, process, root};

/// Cases of `cargo xtask difftest` unless told otherwise.
pub(crate) const DIFFTEST_CASES: u64 = 200_000;
/// Minutes of `cargo xtask fuzz` unless told otherwise.
pub(crate) const FUZZ_MINUTES: u64 = 10;
/// Cases of `cargo xtask long`, and boots with each number of vCPUs.
const LONG_CASES: u64 = 1_000_000;
const LONG_BOOTS: u32 = 50;
/// How often `cargo xtask long` kills a machine, or another writer to an image.
const LONG_KILLS: u32 = 200;
/// Connections through a forward of `cargo xtask long`.
const LONG_CONNECTIONS: u32 = 10_000;

/// Runs all tests, with nextest where it is installed.
pub(crate) fn test(arguments: &[String]) -> Result<(), Error> {
    packages::provide(packages::FOR_TESTS)?;
    let mut tests = cargo();
    if has_nextest() {
        // nextest does not run the examples in documentation
        if arguments.is_empty() {
            let mut doc = cargo();
            doc.args(["test", "--workspace", "--doc", "--quiet"]);
            process::succeed("cargo test --doc", &mut doc)?;
        }
        tests
            .args(["nextest", "run", "--workspace"])
            .args(arguments);
        return process::succeed("cargo nextest", &mut tests);
    }
    tests.args(["test", "--workspace"]).args(arguments);
    process::succeed("cargo test", &mut tests)
}

/// Runs the differential test alone.
pub(crate) fn difftest(cases: u64, seed: Option<u64>) -> Result<(), Error> {
    let mut run = cargo();
    run.args(["test", "--release", "--package", "strata-difftest"])
        .args(["--test", "differential", "--", "--nocapture"])
        .env("STRATA_DIFF_CASES", cases.to_string());
    if let Some(seed) = seed {
        run.env("STRATA_DIFF_SEED", seed.to_string());
    }
    process::succeed("the differential test", &mut run)
}

/// Runs hostile guests alone. Each run without a seed takes another one, which the test prints.
pub(crate) fn fuzz(minutes: u64, seed: Option<u64>, scene: Option<u64>) -> Result<(), Error> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let seed = seed.unwrap_or_else(|| now.map_or(0, |time| time.as_secs()));
    let mut run = cargo();
    run.args(["test", "--release", "--package", "strata-difftest"])
        .args(["--test", "hostile", "--", "--nocapture"])
        .env("STRATA_HOSTILE_SECONDS", (minutes * 60).to_string())
        .env("STRATA_HOSTILE_SEED", seed.to_string());
    if let Some(scene) = scene {
        run.env("STRATA_HOSTILE_SCENE", scene.to_string());
    }
    process::succeed("hostile guests", &mut run)
}

/// Compares blocks with single steps over the first `instructions` of a boot, or all of it if 0.
pub(crate) fn lockstep(instructions: u64) -> Result<(), Error> {
    packages::provide(packages::FOR_TESTS)?;
    let mut run = cargo();
    run.args(["test", "--release", "--package", "strata-difftest"])
        .args(["--test", "lockstep", "--", "--nocapture"])
        .env("STRATA_LOCKSTEP_INSTRUCTIONS", instructions.to_string());
    process::succeed("lockstep", &mut run)
}

/// Runs what takes too long for every change.
pub(crate) fn long() -> Result<(), Error> {
    difftest(LONG_CASES, None)?;
    fuzz(FUZZ_MINUTES, None, None)?;
    lockstep(0)?;
    packages::provide(packages::FOR_TESTS)?;
    let mut boots = cargo();
    boots
        .env("STRATA_TEST_BOOTS", LONG_BOOTS.to_string())
        .args([
            "test",
            "--release",
            "--package",
            "strata",
            "--test",
            "system",
        ])
        .args(["--", "boots_in_a_row", "--nocapture"]);
    process::succeed("boots in a row", &mut boots)?;
    let mut kills = cargo();
    kills
        .env("STRATA_TEST_KILLS", LONG_KILLS.to_string())
        .env("STRATA_DISK_KILLS", LONG_KILLS.to_string())
        .args(["test", "--release", "--package", "strata"])
        .args(["--package", "strata-disk", "--", "survive", "--nocapture"]);
    process::succeed("kills", &mut kills)?;
    let mut connections = cargo();
    connections
        .env("STRATA_TEST_CONNECTIONS", LONG_CONNECTIONS.to_string())
        .args([
            "test",
            "--release",
            "--package",
            "strata",
            "--test",
            "system",
        ])
        .args(["--", "short_connections", "--nocapture"]);
    process::succeed("short connections", &mut connections)
}

/// Builds the program as users do, and gives its path.
pub(crate) fn build_strata() -> Result<PathBuf, Error> {
    let mut build = cargo();
    build.args(["build", "--release", "--package", "strata"]);
    process::succeed("cargo build", &mut build)?;
    Ok(target().join("release/strata"))
}

/// Where cargo builds to.
pub(crate) fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// The cargo that runs us, in the workspace.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

fn has_nextest() -> bool {
    cargo()
        .args(["nextest", "--version"])
        .output()
        .is_ok_and(|output| output.status.success())
}
