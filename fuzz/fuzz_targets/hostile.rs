//! Endless hostile guests: the fuzzer's bytes decide what tables, code and vCPUs a scene has.
//!
//! ```text
//! cargo +nightly fuzz run hostile --sanitizer none
//! ```
//!
//! `cargo xtask fuzz` runs the same scenes from seeds, without a fuzzer.
#![no_main]

use libfuzzer_sys::fuzz_target;
use strata_difftest::hostile;
use strata_difftest::rng::Rng;

fuzz_target!(|data: &[u8]| {
    let outcome = hostile::run(&mut Rng::from_bytes(data)).expect("the scene can be set");
    if let Some(harm) = outcome.harm {
        panic!("the host was harmed: {harm}");
    }
});
