//! Mismatches as text that a person can act on.

use std::fmt;

use crate::case::{Case, Outcome, Xsave};
use crate::compare::{GPR_NAMES, hex};
use crate::program::{decode, format};
use crate::runner::{Mismatch, Summary};

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "=== case {} (seen {} times): {}",
            self.index, self.seen, self.kind
        )?;
        write_code(f, &self.case)?;
        write_state(f, &self.case)?;
        for line in &self.difference.lines {
            writeln!(f, "  DIFFERS {line}")?;
        }
        if let Some(trouble) = &self.trouble {
            writeln!(f, "  guest: {trouble}")?;
        }
        write_end(f, "host ", &self.host)?;
        write_end(f, "guest", &self.guest)
    }
}

fn write_code(f: &mut fmt::Formatter<'_>, case: &Case) -> fmt::Result {
    for instruction in decode(case) {
        let start = (instruction.ip() - case.ip()) as usize;
        let bytes = &case.code[start..start + instruction.len()];
        writeln!(
            f,
            "  {:#x}  {:<30}  {}",
            instruction.ip(),
            hex(bytes),
            format(&instruction)
        )?;
    }
    Ok(())
}

fn write_state(f: &mut fmt::Formatter<'_>, case: &Case) -> fmt::Result {
    write!(f, "  with rflags={:#x}", case.registers.rflags)?;
    for (name, value) in GPR_NAMES.iter().zip(case.registers.gpr) {
        if value != 0 {
            write!(f, " {name}={value:#x}")?;
        }
    }
    writeln!(f)?;
    for patch in case.patches.iter().take(case.patch_count as usize) {
        let bytes = &patch.bytes[..patch.length as usize];
        writeln!(f, "  with [{:#x}]={}", patch.address, hex(bytes))?;
    }
    write_extended(f, &case.xsave)
}

fn write_extended(f: &mut fmt::Formatter<'_>, area: &Xsave) -> fmt::Result {
    let initial = Xsave::initial();
    if area.mxcsr() != initial.mxcsr() {
        writeln!(f, "  with mxcsr={:#x}", area.mxcsr())?;
    }
    if area.0[..5] != initial.0[..5] {
        writeln!(f, "  with fcw:fsw:ftw={}", hex(&area.0[..5]))?;
    }
    for n in 0..8 {
        let at = crate::case::ST_OFFSET + 16 * n;
        let value = &area.0[at..at + 10];
        if value.iter().any(|&b| b != 0) {
            writeln!(f, "  with st{n}={}", hex(value))?;
        }
    }
    for n in 0..16 {
        let value = area.ymm(n);
        if value != [0; 32] {
            writeln!(f, "  with ymm{n}={}", hex(&value))?;
        }
    }
    Ok(())
}

fn write_end(f: &mut fmt::Formatter<'_>, name: &str, outcome: &Outcome) -> fmt::Result {
    writeln!(
        f,
        "  {name}: {:?}, vector {}, error code {:#x}, cr2 {:#x}, rip {:#x}, rflags {:#x}, fcw:fsw:ftw {}",
        outcome.end,
        outcome.vector,
        outcome.error_code,
        outcome.cr2,
        outcome.registers.rip,
        outcome.registers.rflags,
        hex(&outcome.xsave.0[..5]),
    )
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for mismatch in &self.mismatches {
            writeln!(f, "{mismatch}")?;
        }
        writeln!(
            f,
            "{} cases compared, {} mismatches; not compared: {} timed out, {} lost, {} unstable",
            self.compared,
            self.mismatches.len(),
            self.timeouts,
            self.lost,
            self.unstable,
        )?;
        writeln!(f, "cases by vector: {:?}", self.vectors)
    }
}
