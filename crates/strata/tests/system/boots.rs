//! Boots in a row: what fails once in many does not hide. `cargo xtask long` does more.

use crate::guest::guest_with;

/// How many, unless the environment says otherwise.
const BOOTS: u32 = 3;

fn boot_in_a_row(cpus: u8) {
    let boots = std::env::var("STRATA_TEST_BOOTS").map_or(BOOTS, |n| n.parse().unwrap());
    for boot in 1..=boots {
        let options = ["--cpus", &cpus.to_string()];
        let script = "dmesg | grep -ci -e warning: -e bug: -e oops; nproc";
        let ended = guest_with(&options, &["sh", "-c", script], b"");
        assert_eq!(
            (ended.status, ended.text()),
            (Some(0), format!("0\n{cpus}\n")),
            "boot {boot} of {boots} with {cpus} vCPUs: {}",
            ended.stderr
        );
        eprintln!("boot {boot} of {boots} with {cpus} vCPUs");
    }
}

#[test]
fn boots_in_a_row_all_succeed() {
    boot_in_a_row(1);
}

#[test]
fn boots_in_a_row_with_two_vcpus_all_succeed() {
    boot_in_a_row(2);
}

#[test]
fn boots_in_a_row_with_four_vcpus_all_succeed() {
    boot_in_a_row(4);
}
