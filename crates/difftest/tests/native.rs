//! The oracle by itself: the host must give the same answer twice.
//!
//! A case that fails here is not deterministic, or the oracle lets state leak from case to
//! case; either way it can be compared with nothing.

use strata_difftest::case::{Case, End};
use strata_difftest::catalog::Catalog;
use strata_difftest::compare::{Names, compare};
use strata_difftest::generate;
use strata_difftest::native::{BATCH, Native};
use strata_difftest::rng::Rng;

const SEED: u64 = 0x0dac_1e00;
const BATCHES: u64 = 80;

fn batch(number: u64) -> Vec<Case> {
    let size = BATCH as u64;
    (number * size..(number + 1) * size)
        .map(|i| generate::program(Catalog::shared(), &mut Rng::new(SEED, i), i).1)
        .collect()
}

#[test]
fn the_host_gives_the_same_answer_twice() {
    let mut native = Native::new().unwrap();
    let (mut first, mut second) = (Vec::new(), Vec::new());
    for number in 0..BATCHES {
        let cases = batch(number);

        native.run(&cases, &mut first).unwrap();
        native.run(&cases, &mut second).unwrap();

        for (case, (a, b)) in cases.iter().zip(first.iter().zip(&second)) {
            let difference = compare(case, a, b, Names("first", "second"), true);
            assert_eq!(difference, None, "{case:?}");
        }
    }
}

#[test]
fn nearly_every_case_ends_in_an_exception() {
    let mut native = Native::new().unwrap();
    let mut outcomes = Vec::new();
    let (mut all, mut ended) = (0, 0);
    for number in 0..BATCHES / 4 {
        native.run(&batch(number), &mut outcomes).unwrap();

        all += outcomes.len();
        ended += outcomes.iter().filter(|o| o.end == End::Exception).count();
    }
    assert!(ended * 100 > all * 99, "{ended} of {all}");
}

#[test]
fn a_case_that_calls_the_kernel_is_lost_and_the_next_one_is_not() {
    let mut native = Native::new().unwrap();
    let mut cases = batch(0);
    cases.truncate(2);
    // SYSCALL: kill(0, 0) if it were let through
    cases[0].code[..2].copy_from_slice(&[0x0f, 0x05]);
    cases[0].registers.rflags = 0x202;
    cases[0].registers.gpr = [0; 16];
    cases[0].registers.gpr[0] = 62;
    let mut outcomes = Vec::new();

    native.run(&cases, &mut outcomes).unwrap();

    assert_eq!(outcomes[0].end, End::Lost);
    assert_eq!(outcomes[1].end, End::Exception);
    assert_eq!(native.deaths(), 1);
}
