//! Runs cases on both machines and collects what they disagree on.
//!
//! Called by the tests and the command line.

use std::collections::BTreeMap;

use crate::case::{Case, End, Outcome};
use crate::catalog::Catalog;
use crate::compare::{Difference, Names, compare};
use crate::generate;
use crate::guest::{Guest, GuestError};
use crate::native::{BATCH, Native, NativeError};
use crate::program::{Program, decode};
use crate::rng::Rng;
use crate::shrink::shrink;

const NAMES: Names = Names("host", "guest");

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// What everything follows from.
    pub seed: u64,
    /// Number of the first case.
    pub first: u64,
    /// How many cases.
    pub cases: u64,
    /// Whether flags that the manual leaves undefined have to agree as well.
    pub strict: bool,
    /// Distinct mismatches after which to stop.
    pub mismatch_limit: usize,
}

impl Options {
    /// `cases` cases, as the environment has it: `STRATA_DIFF_SEED` (default: a fixed
    /// one), `STRATA_DIFF_CASES`, `STRATA_DIFF_FIRST`, `STRATA_DIFF_STRICT`.
    pub fn from_environment(cases: u64) -> Self {
        let number = |name: &str| std::env::var(name).ok().and_then(|text| parse(&text));
        Self {
            seed: number("STRATA_DIFF_SEED").unwrap_or(0x57ba_7a00),
            first: number("STRATA_DIFF_FIRST").unwrap_or(0),
            cases: number("STRATA_DIFF_CASES").unwrap_or(cases),
            strict: number("STRATA_DIFF_STRICT").unwrap_or(0) != 0,
            mismatch_limit: number("STRATA_DIFF_LIMIT").unwrap_or(10) as usize,
        }
    }
}

fn parse(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// A case that the machines disagree on, made as small as it goes.
#[derive(Clone, Debug)]
pub struct Mismatch {
    /// Number of the case it was found in.
    pub index: u64,
    /// Instructions and what differs, to tell mismatches apart.
    pub kind: String,
    /// The program.
    pub case: Case,
    /// What the host makes of it.
    pub host: Outcome,
    /// What the guest makes of it.
    pub guest: Outcome,
    /// Where they differ.
    pub difference: Difference,
    /// What the guest said where it did not get to an exception.
    pub trouble: Option<String>,
    /// How often this kind was seen.
    pub seen: u64,
}

/// What came of a run.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Cases compared.
    pub compared: u64,
    /// Cases the host did not finish.
    pub timeouts: u64,
    /// Cases the host's process died on.
    pub lost: u64,
    /// Cases the host itself gave two answers to.
    pub unstable: u64,
    /// Cases by the vector they ended with.
    pub vectors: BTreeMap<u32, u64>,
    /// Distinct mismatches.
    pub mismatches: Vec<Mismatch>,
}

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host's side failed.
    #[error(transparent)]
    Native(#[from] NativeError),
    /// The guest's side failed.
    #[error(transparent)]
    Guest(#[from] GuestError),
}

/// Both machines.
pub struct Pair {
    native: Native,
    guest: Guest,
    options: Options,
    outcomes: Vec<Outcome>,
}

impl Pair {
    /// Starts both machines.
    pub fn new(options: Options) -> Result<Self, Error> {
        // the host's process first: it must not inherit the CPU's signal handlers
        let native = Native::new()?;
        Ok(Self {
            native,
            guest: Guest::new()?,
            options,
            outcomes: Vec::new(),
        })
    }

    fn on_host(&mut self, case: &Case) -> Result<Outcome, Error> {
        let mut outcomes = Vec::with_capacity(1);
        self.native.run(std::slice::from_ref(case), &mut outcomes)?;
        Ok(outcomes.pop().unwrap_or_else(Outcome::lost))
    }

    /// Runs one case on both. None where they agree, or the host has no answer.
    pub fn check(&mut self, index: u64, case: &Case) -> Result<Option<Mismatch>, Error> {
        let host = self.on_host(case)?;
        Ok(if host.end == End::Exception {
            self.against(index, case, &host)
        } else {
            None
        })
    }

    fn against(&mut self, index: u64, case: &Case, host: &Outcome) -> Option<Mismatch> {
        let (guest, trouble) = self.guest.run(case);
        if guest.end == End::Lost
            && let Ok(fresh) = Guest::new()
        {
            self.guest = fresh;
        }
        let difference = compare(case, host, &guest, NAMES, self.options.strict)?;
        let kind = kind(case, host, &difference);
        Some(Mismatch {
            index,
            kind,
            case: *case,
            host: *host,
            guest,
            difference,
            trouble,
            seen: 1,
        })
    }

    /// The smallest mismatch that `program` can be brought down to; None if the host does
    /// not give the same answer twice.
    fn reduce(
        &mut self,
        index: u64,
        program: &Program,
        found: Mismatch,
    ) -> Result<Option<Mismatch>, Error> {
        let again = self.on_host(&found.case)?;
        if compare(&found.case, &found.host, &again, NAMES, true).is_some() {
            return Ok(None);
        }
        let mut failure = None;
        let smallest = shrink(program, |candidate| {
            failure.is_none()
                && candidate
                    .assemble()
                    .is_some_and(|case| match self.check(index, &case) {
                        Ok(mismatch) => mismatch.is_some(),
                        Err(error) => {
                            failure = Some(error);
                            false
                        }
                    })
        });
        if let Some(error) = failure {
            return Err(error);
        }
        let reduced = match smallest.assemble() {
            Some(case) => self.check(index, &case)?,
            None => None,
        };
        // gone when run again: it depends on what ran before, so show it as it was
        Ok(Some(reduced.unwrap_or(found)))
    }
}

/// What tells one mismatch from another: the instructions and what they got wrong.
fn kind(case: &Case, host: &Outcome, difference: &Difference) -> String {
    let instructions = decode(case);
    let culprit = instructions
        .iter()
        .find(|i| i.ip() == host.registers.rip && host.vector != 3);
    let mut names: Vec<String> = if instructions.len() > 4 {
        instructions
            .iter()
            .last()
            .map(|i| format!("{:?}", i.code()))
            .into_iter()
            .collect()
    } else {
        instructions
            .iter()
            .map(|i| format!("{:?}", i.code()))
            .collect()
    };
    if let Some(culprit) = culprit {
        names = vec![format!("{:?}", culprit.code())];
    }
    let first = difference
        .lines
        .first()
        .map_or("", |l| l.split(':').next().unwrap_or(""));
    let what = if first.starts_with('[') {
        "memory"
    } else {
        first
    };
    let what = what.trim_end_matches(|c: char| c.is_ascii_digit());
    format!("{} #{} {what}", names.join("; "), host.vector)
}

/// Runs cases until they are all done or too many kinds of mismatch were found.
pub fn run(options: &Options) -> Result<Summary, Error> {
    let catalog = Catalog::shared();
    let mut pair = Pair::new(*options)?;
    let mut summary = Summary::default();
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    let trace = std::env::var_os("STRATA_DIFF_TRACE").is_some();
    let end = options.first + options.cases;
    for start in (options.first..end).step_by(BATCH) {
        let batch: Vec<_> = (start..end.min(start + BATCH as u64))
            .map(|i| generate::program(catalog, &mut Rng::new(options.seed, i), i))
            .collect();
        let cases: Vec<Case> = batch.iter().map(|(_, case)| *case).collect();
        let mut outcomes = std::mem::take(&mut pair.outcomes);
        pair.native.run(&cases, &mut outcomes)?;
        for ((index, (program, case)), host) in (start..).zip(&batch).zip(&outcomes) {
            match host.end {
                End::Lost => summary.lost += 1,
                End::Timeout => summary.timeouts += 1,
                End::Exception => *summary.vectors.entry(host.vector).or_default() += 1,
            }
            if host.end != End::Exception {
                continue;
            }
            if trace {
                eprintln!("case {index}");
            }
            summary.compared += 1;
            let Some(found) = pair.against(index, case, host) else {
                continue;
            };
            if let Some(&known) = kinds.get(&found.kind) {
                summary.mismatches[known].seen += 1;
                continue;
            }
            let raw = found.kind.clone();
            let Some(mismatch) = pair.reduce(index, program, found)? else {
                summary.unstable += 1;
                continue;
            };
            let known = kinds.get(&mismatch.kind).copied();
            let position = known.unwrap_or(summary.mismatches.len());
            kinds.insert(raw, position);
            kinds.insert(mismatch.kind.clone(), position);
            if known.is_some() {
                summary.mismatches[position].seen += 1;
            } else {
                summary.mismatches.push(mismatch);
            }
            if summary.mismatches.len() >= options.mismatch_limit {
                return Ok(summary);
            }
        }
        pair.outcomes = outcomes;
    }
    Ok(summary)
}
