//! Where blocks and single steps differ, as text that a person can act on.

use std::fmt;

use strata_cpu::{Cpu, Exit};

use crate::compare::Compared;
use crate::state::{self, Differing, General};

/// Instructions of a block that a report shows: the last ones.
const SHOWN: usize = 80;

/// What was found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// The follower came to where the leader left a block, and registers differ.
    Registers(Vec<Differing>),
    /// It did not come to this RIP having asked the machine the same.
    Elsewhere(u64),
    /// It asked the machine something else; says what.
    Asked(String),
    /// It ended.
    Ended(Exit),
    /// A word of memory, at this physical address: the leader's and the follower's.
    Memory(u64, u64, u64),
}

/// A difference, and how the follower came to it.
#[derive(Debug)]
pub(crate) struct Difference {
    pub(crate) what: What,
    compared: Compared,
    /// What the follower ran since the last state that agreed.
    lines: Vec<Line>,
}

/// An instruction that the follower ran.
#[derive(Debug)]
struct Line {
    address: u64,
    text: String,
    /// The registers that it changed in which the follower differs from the leader now, with
    /// what it made of them.
    changed: Vec<(String, u64)>,
}

impl Difference {
    /// `path` is the follower's state where both last agreed, and after each instruction since.
    pub(crate) fn new(what: What, compared: Compared, path: &[General], cpu: &Cpu) -> Self {
        let line = |pair: &[General]| Line {
            address: state::rip(&pair[0]),
            text: cpu
                .instruction_at(state::rip(&pair[0]))
                .map_or_else(|| "not mapped any more".into(), |i| i.to_string()),
            changed: what
                .registers()
                .iter()
                .filter_map(|differing| Some((differing, differing.general?)))
                .filter(|(_, word)| pair[0][*word] != pair[1][*word])
                .map(|(differing, word)| (differing.name.to_string(), pair[1][word]))
                .collect(),
        };
        let skipped = path.len().saturating_sub(SHOWN + 1);
        let lines = path[skipped..].windows(2).map(line).collect();
        Self {
            what,
            compared,
            lines,
        }
    }
}

impl What {
    fn registers(&self) -> &[Differing] {
        match self {
            Self::Registers(differing) => differing,
            _ => &[],
        }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Compared { instructions, .. } = self.compared;
        writeln!(
            f,
            "blocks and single steps differ after {instructions} instructions:"
        )?;
        match &self.what {
            What::Registers(all) => {
                for d in all {
                    let (name, leader, follower) = (d.name, d.leader, d.follower);
                    writeln!(
                        f,
                        "  {name} is {leader:#x} by the block, {follower:#x} one by one"
                    )?;
                }
            }
            What::Elsewhere(rip) => {
                writeln!(f, "  the block led to RIP {rip:#x}, one by one did not")?;
            }
            What::Asked(wrong) => writeln!(f, "  {wrong}")?,
            What::Ended(exit) => writeln!(f, "  one by one it ended: {exit:?}")?,
            What::Memory(address, leader, follower) => writeln!(
                f,
                "  memory at {address:#x} is {leader:#x} by blocks, {follower:#x} one by one"
            )?,
        }
        for line in &self.lines {
            write!(f, "  RIP {:#x}: {}", line.address, line.text)?;
            for (name, value) in &line.changed {
                write!(f, "  ; {name} = {value:#x}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}
