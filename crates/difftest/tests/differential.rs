//! The software CPU and the host agree on generated programs.
//!
//! `STRATA_DIFF_SEED` and `STRATA_DIFF_CASES` choose others; `STRATA_DIFF_FIRST` starts at
//! a case that a report names.

use strata_difftest::runner::{Options, run};

#[test]
fn the_software_cpu_agrees_with_the_host() {
    let options = Options::from_environment(200_000);
    eprintln!(
        "seed {:#x}, {} cases from {}",
        options.seed, options.cases, options.first
    );

    let summary = run(&options).unwrap();

    eprintln!("{summary}");
    assert!(
        summary.mismatches.is_empty(),
        "the software CPU and the host disagree"
    );
    assert!(
        summary.compared > options.cases * 9 / 10,
        "too few cases had an answer"
    );
}
