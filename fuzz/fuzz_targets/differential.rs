//! Endless differential test: the fuzzer's bytes decide what the generator makes, coverage
//! of the software CPU decides which bytes are kept.
//!
//! ```text
//! cargo install cargo-fuzz
//! cargo +nightly fuzz run differential --sanitizer none
//! ```
//!
//! Without a sanitizer, because translated code is not instrumented and the CPU has signal
//! handlers of its own.
#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::{Corpus, fuzz_target};
use strata_difftest::catalog::Catalog;
use strata_difftest::generate;
use strata_difftest::rng::Rng;
use strata_difftest::runner::{Options, Pair};

thread_local! {
    static PAIR: RefCell<Option<Pair>> = const { RefCell::new(None) };
}

fuzz_target!(|data: &[u8]| -> Corpus {
    // the first two bytes choose the instruction, or, where odd, a sequence
    let Some((index, choices)) = data.split_first_chunk::<2>() else {
        return Corpus::Reject;
    };
    let index = u64::from(u16::from_le_bytes(*index));
    let mut rng = Rng::from_bytes(choices);
    let (_, case) = generate::program(Catalog::shared(), &mut rng, index);
    PAIR.with_borrow_mut(|pair| {
        let pair = pair.get_or_insert_with(|| {
            Pair::new(Options::from_environment(1)).expect("both machines start")
        });
        if let Some(mismatch) = pair.check(index, &case).expect("both machines run") {
            panic!("the software CPU and the host disagree\n{mismatch}");
        }
    });
    Corpus::Keep
});
