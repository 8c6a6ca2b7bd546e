//! Boots in a row: what fails once in many does not hide. `cargo xtask long` does more.

use crate::guest::guest;

/// How many, unless the environment says otherwise.
const BOOTS: u32 = 3;

#[test]
fn boots_in_a_row_all_succeed() {
    let boots = std::env::var("STRATA_TEST_BOOTS").map_or(BOOTS, |n| n.parse().unwrap());
    for boot in 1..=boots {
        let ended = guest(&[
            "sh",
            "-c",
            "dmesg | grep -ci -e warning: -e bug: -e oops; uname -m",
        ]);
        assert_eq!(
            (ended.status, ended.text().as_str()),
            (Some(0), "0\nx86_64\n"),
            "boot {boot} of {boots}: {}",
            ended.stderr
        );
        eprintln!("boot {boot} of {boots}");
    }
}
