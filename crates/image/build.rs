//! Builds Strata's program for guests, which the initramfs of every machine carries: the crate
//! `guest` of this workspace, linked statically, whatever this build is.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "x86_64-unknown-linux-gnu";
const PACKAGE: &str = "strata-guest";
const PROFILE: &str = "guest";

fn main() {
    let crates = Path::new(&variable("CARGO_MANIFEST_DIR")).join("..");
    for path in [
        "guest/src",
        "guest/Cargo.toml",
        "protocol/src",
        "protocol/Cargo.toml",
        "../Cargo.lock",
    ] {
        println!("cargo::rerun-if-changed={}", crates.join(path).display());
    }
    println!("cargo::rerun-if-changed=build.rs");

    let target = PathBuf::from(variable("OUT_DIR")).join("guest");
    let mut cargo = Command::new(variable("CARGO"));
    cargo
        .args([
            "build",
            "--locked",
            "--quiet",
            "--package",
            PACKAGE,
            "--bin",
            PACKAGE,
        ])
        .args(["--profile", PROFILE, "--target", TARGET, "--target-dir"])
        .arg(&target)
        .arg("--manifest-path")
        .arg(crates.join("guest/Cargo.toml"));
    // What shapes the build around this one is not for the guest.
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        let is_ours = name.starts_with("CARGO_PROFILE_")
            || name.starts_with("CARGO_TARGET_")
            || name.starts_with("CARGO_BUILD_")
            || name.ends_with("RUSTFLAGS")
            || name.contains("RUSTC_WRAPPER")
            || name.contains("WORKSPACE_WRAPPER");
        if is_ours {
            cargo.env_remove(name);
        }
    }
    cargo.env(
        "RUSTFLAGS",
        "-C target-feature=+crt-static -C relocation-model=static",
    );
    match cargo.status() {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("the program for guests cannot be built: cargo ended with {status}"),
        Err(error) => panic!("cargo cannot be run for the program for guests: {error}"),
    }
    let binary = target.join(TARGET).join(PROFILE).join(PACKAGE);
    println!("cargo::rustc-env=STRATA_GUEST={}", binary.display());
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("cargo sets {name} for build scripts"))
}
