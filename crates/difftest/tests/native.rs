//! The oracle itself: the host must give the same answer twice.
//!
//! What fails here is not deterministic (or the oracle leaks state from case to case) and
//! cannot be compared with anything.

use strata_difftest::case::{End, Outcome};
use strata_difftest::catalog::Catalog;
use strata_difftest::compare::{Names, compare};
use strata_difftest::generate;
use strata_difftest::native::{BATCH, Native};
use strata_difftest::program::decode;
use strata_difftest::rng::Rng;

const SEED: u64 = 0x0dac_1e00;

#[test]
fn the_host_gives_the_same_answer_twice() {
    let cases: u64 = std::env::var("STRATA_DIFF_CASES")
        .ok()
        .and_then(|v| v.parse().ok())
        .unwrap_or(20_000);
    let seed: u64 = std::env::var("STRATA_DIFF_SEED")
        .ok()
        .and_then(|v| v.parse().ok())
        .unwrap_or(SEED);
    let catalog = Catalog::shared();
    let mut native = Native::new().unwrap();
    let (mut first, mut second) = (Vec::<Outcome>::new(), Vec::<Outcome>::new());
    let (mut lost, mut timeouts, mut vectors) = (0, 0, [0_u64; 32]);
    let mut differing = 0;
    let (mut t_gen, mut t_nat) = (std::time::Duration::ZERO, std::time::Duration::ZERO);
    for start in (0..cases).step_by(BATCH) {
        let t = std::time::Instant::now();
        let batch: Vec<_> = (start..(start + BATCH as u64).min(cases))
            .map(|i| generate::program(catalog, &mut Rng::new(seed, i), i).1)
            .collect();
        t_gen += t.elapsed();
        let t = std::time::Instant::now();
        native.run(&batch, &mut first).unwrap();
        t_nat += t.elapsed();
        native.run(&batch, &mut second).unwrap();
        for (index, (case, (a, b))) in batch.iter().zip(first.iter().zip(&second)).enumerate() {
            let show = || {
                for i in decode(case) {
                    eprintln!("   {:#x} {i:?} ", i.ip());
                }
            };
            match a.end {
                End::Exception => vectors[a.vector as usize % 32] += 1,
                End::Timeout => {
                    timeouts += 1;
                    eprintln!("timeout {}", start + index as u64);
                    show();
                }
                End::Lost => {
                    lost += 1;
                    eprintln!("lost {}", start + index as u64);
                    show();
                }
            }
            if let Some(difference) = compare(case, a, b, Names("first", "second"), true) {
                eprintln!("case {}: {:?}", start + index as u64, difference.lines);
                show();
                differing += 1;
            }
        }
    }
    eprintln!(
        "lost {lost}, timeouts {timeouts}, vectors {vectors:?} gen {t_gen:?} native {t_nat:?} codes {}",
        catalog.codes().len()
    );
    assert_eq!(differing, 0);
}
