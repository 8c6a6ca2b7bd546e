//! Decides whether two machines agree on a case, and says where they do not.
//!
//! Called by `runner`. The masks here are the only differences that are forgiven; each has
//! its reason beside it.

use std::fmt::Write as _;

use iced_x86::{Instruction, InstructionInfoFactory, Mnemonic, OpAccess, Register, RflagsBits};

use crate::case::{Case, End, HEADER_OFFSET, Line, Outcome, Xsave};
use crate::generate::state::rflags;
use crate::layout::{IMAGES, IMAGES_SIZE};
use crate::program;

/// What is not compared.
#[derive(Clone, Copy, Debug, Default)]
struct Mask {
    /// RFLAGS bits.
    rflags: u64,
    /// Vector registers, as bits by number.
    vectors: u16,
    /// The pages of saved extended state.
    images: bool,
    /// CR2.
    cr2: bool,
    /// General registers.
    registers: bool,
}

/// The first line of what differs, and all of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// One line per thing that differs: its name, then `host` and `guest`.
    pub lines: Vec<String>,
}

/// Which machines are compared, for the text.
#[derive(Clone, Copy, Debug)]
pub struct Names(pub &'static str, pub &'static str);

/// What the outcomes disagree on, or None.
pub fn compare(
    case: &Case,
    host: &Outcome,
    guest: &Outcome,
    names: Names,
    strict: bool,
) -> Option<Difference> {
    let mut report = Report {
        names,
        lines: Vec::new(),
    };
    if host.end != guest.end {
        report.note(
            "end",
            &format!("{:?}", host.end),
            &format!("{:?}", guest.end),
        );
        return report.finish();
    }
    if host.end != End::Exception {
        return None;
    }
    if is_up_to_the_host(case, host, guest) {
        return None;
    }
    let mask = mask_for(case, host, strict);
    report.number("vector", host.vector.into(), guest.vector.into());
    report.number("rip", host.registers.rip, guest.registers.rip);
    compare_codes(&mut report, host, guest, mask.cr2);
    report.number(
        "rflags",
        host.registers.rflags & !mask.rflags,
        guest.registers.rflags & !mask.rflags,
    );
    for (n, name) in GPR_NAMES.iter().enumerate() {
        // what 32-bit code leaves in the upper halves is undefined
        let seen = if n < 8 { case.width.mask() } else { u64::MAX };
        if mask.registers {
            continue;
        }
        report.number(
            name,
            host.registers.gpr[n] & seen,
            guest.registers.gpr[n] & seen,
        );
    }
    report.number("fs_base", host.fs_base, guest.fs_base);
    report.number("gs_base", host.gs_base, guest.gs_base);
    compare_extended(&mut report, &host.xsave, &guest.xsave, mask.vectors);
    compare_memory(&mut report, host, guest, mask.images);
    report.finish()
}

/// Linux's `TASK_SIZE_MAX` with four-level paging.
const END_OF_USER_SPACE: u64 = 0x7fff_ffff_f000;

/// Names of the general registers in encoding order.
pub(crate) const GPR_NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

fn compare_codes(report: &mut Report, host: &Outcome, guest: &Outcome, any_address: bool) {
    if !any_address {
        report.number("cr2", host.cr2, guest.cr2);
    }
    // beyond the end of user space the host's kernel sets P in what it reports, so as not
    // to tell where it has mapped something
    let hidden = u64::from(host.vector == 14 && host.cr2 >= END_OF_USER_SPACE);
    report.number(
        "error_code",
        host.error_code & !hidden,
        guest.error_code & !hidden,
    );
}

fn compare_extended(report: &mut Report, host: &Xsave, guest: &Xsave, forgiven: u16) {
    let half =
        |area: &Xsave, at: usize| u64::from(u16::from_le_bytes([area.0[at], area.0[at + 1]]));
    report.number("mxcsr", host.mxcsr().into(), guest.mxcsr().into());
    report.number("fcw", half(host, 0), half(guest, 0));
    report.number("fsw", half(host, 2), half(guest, 2));
    report.number("ftw", host.0[4].into(), guest.0[4].into());
    for n in 0..8 {
        let at = crate::case::ST_OFFSET + 16 * n;
        report.bytes(
            &format!("st{n}"),
            &host.0[at..at + 10],
            &guest.0[at..at + 10],
        );
    }
    for n in (0..16).filter(|n| forgiven & 1 << n == 0) {
        report.bytes(&format!("ymm{n}"), &host.ymm(n), &guest.ymm(n));
    }
}

fn compare_memory(report: &mut Report, host: &Outcome, guest: &Outcome, images: bool) {
    if host.changes.count == guest.changes.count && host.changes.hash == guest.changes.hash {
        return;
    }
    let counted = |line: &&Line| !images || !(IMAGES..IMAGES + IMAGES_SIZE).contains(&line.address);
    let hosts: Vec<&Line> = host.changes.recorded().iter().filter(counted).collect();
    let guests: Vec<&Line> = guest.changes.recorded().iter().filter(counted).collect();
    for line in &hosts {
        match guests.iter().find(|l| l.address == line.address) {
            Some(other) => {
                for (at, (a, b)) in line
                    .bytes
                    .chunks(16)
                    .zip(other.bytes.chunks(16))
                    .enumerate()
                {
                    report.bytes(&format!("[{:#x}]", line.address + 16 * at as u64), a, b);
                }
            }
            None => report.note(&format!("[{:#x}]", line.address), "changed", "unchanged"),
        }
    }
    for line in &guests {
        if !hosts.iter().any(|l| l.address == line.address) {
            report.note(&format!("[{:#x}]", line.address), "unchanged", "changed");
        }
    }
    if !images {
        report.number("changed lines", host.changes.count, guest.changes.count);
        report.number("hash of memory", host.changes.hash, guest.changes.hash);
    }
}

/// What this case leaves undefined, by the decoder's word.
fn mask_for(case: &Case, host: &Outcome, strict: bool) -> Mask {
    let mut mask = Mask::default();
    let mut info = InstructionInfoFactory::new();
    let instructions = program::decode(case);
    let branches = has_branches(&instructions);
    for instruction in &instructions {
        // images hold FOP, FIP and FDP, which follow where code lies, and components that
        // may or may not count as initial
        mask.images |= instruction.code().op_code().is_save_restore() || is_x87_save(instruction);
        if !strict {
            let undefined = undefined_flags(instruction);
            let defined = instruction.rflags_written()
                | instruction.rflags_cleared()
                | instruction.rflags_set();
            // with branches, any of the instructions may be the last one to have run
            if !branches {
                mask.rflags &= !rflags_of(defined);
            }
            mask.rflags |= rflags_of(undefined);
        }
        let faulted = host.registers.rip == instruction.ip() && host.vector != 1;
        // large operands are probed at either end first
        mask.cr2 |=
            faulted && (instruction.code().op_code().is_save_restore() || is_x87_save(instruction));
        // what POPA popped before it faulted may be in its registers already
        mask.registers |=
            faulted && matches!(instruction.mnemonic(), Mnemonic::Popa | Mnemonic::Popad);
        if faulted && is_repeated_comparison(instruction) {
            // Intel restores the flags to those before the instruction, AMD leaves those of
            // the last comparison; continuing it sets them again
            mask.rflags |= rflags::STATUS;
        }
        if faulted && instruction.is_vsib() {
            // which elements a faulting gather has loaded is up to the implementation
            for used in info.info(instruction).used_registers() {
                if used.register().is_vector_register() && used.access() != OpAccess::Read {
                    mask.vectors |= 1 << (used.register().number() % 16);
                }
            }
        }
        if faulted && !branches {
            break;
        }
    }
    mask
}

fn has_branches(instructions: &[Instruction]) -> bool {
    instructions
        .iter()
        .any(|i| i.flow_control() != iced_x86::FlowControl::Next)
}

fn is_x87_save(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Fnsave | Mnemonic::Fnstenv)
}

fn is_repeated_comparison(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    (instruction.has_rep_prefix() || instruction.has_repne_prefix())
        && matches!(
            instruction.mnemonic(),
            M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq | M::Scasb | M::Scasw | M::Scasd | M::Scasq
        )
}

/// Whether the manuals let implementations choose between these two ends, or hosts differ.
fn is_up_to_the_host(case: &Case, host: &Outcome, guest: &Outcome) -> bool {
    use Mnemonic as M;
    let is_memory_fault = |o: &Outcome| matches!(o.vector, 12..=14);
    program::decode(case).iter().any(|i| {
        // a trap between two elements
        if i.is_vsib() && host.vector == 1 && host.registers.rip == i.ip() {
            return true;
        }
        let ends = [host, guest].map(|o| o.registers.rip == i.ip() && is_memory_fault(o));
        if ends == [false, false] {
            return false;
        }
        match i.mnemonic() {
            // whether a store that its mask suppresses entirely faults, and where
            M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => true,
            // which operand is read first
            M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => ends == [true, true],
            // whether the port is checked when there is nothing to transfer
            M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd => {
                i.has_rep_prefix() || i.has_repne_prefix()
            }
            // whether the target or the push is checked first
            M::Call => host.vector != guest.vector,
            // an image may name components that only the host has
            M::Xrstor | M::Xrstor64 => ends[0] || names_other_components(i, guest),
            // whether alignment or the segment is checked first, and whether the whole image
            // is probed or only what is to be stored
            _ if i.code().op_code().is_save_restore() => ends[0],
            // AMD does not demand alignment of SHA's operands
            M::Sha1msg1
            | M::Sha1msg2
            | M::Sha1nexte
            | M::Sha1rnds4
            | M::Sha256msg1
            | M::Sha256msg2
            | M::Sha256rnds2 => ends[0] != ends[1] || host.vector != guest.vector,
            // AMD raises #GP for a non-canonical offset even if adding the base makes it
            // canonical
            _ => {
                ends[0]
                    && host.vector == 13
                    && matches!(guest.vector, 14 | 17)
                    && matches!(i.segment_prefix(), Register::FS | Register::GS)
            }
        }
    })
}

/// Whether the image that `instruction` loads, in the state it faulted with, has components
/// beyond x87, SSE and AVX in its `XSTATE_BV`.
fn names_other_components(instruction: &Instruction, outcome: &Outcome) -> bool {
    let image = instruction.virtual_address(0, 0, |register, _, _| match register {
        Register::FS => Some(outcome.fs_base),
        Register::GS => Some(outcome.gs_base),
        r if r.is_gpr() => Some(outcome.registers.gpr[r.full_register().number()]),
        _ => Some(0),
    });
    let header = image.unwrap_or(0).wrapping_add(HEADER_OFFSET as u64);
    memory_after(outcome, header).is_none_or(|components| components & !7 != 0)
}

/// The word at linear `address` after a case, if it is known.
fn memory_after(outcome: &Outcome, address: u64) -> Option<u64> {
    let lines = outcome.changes.recorded();
    let line = lines
        .iter()
        .find(|l| address >= l.address && address - l.address <= 56)?;
    let at = (address - line.address) as usize;
    Some(u64::from_le_bytes(*line.bytes[at..].first_chunk()?))
}

/// The flags an instruction leaves undefined, more exactly than by its opcode alone.
fn undefined_flags(instruction: &Instruction) -> u32 {
    let count_decides = matches!(
        instruction.mnemonic(),
        Mnemonic::Shl
            | Mnemonic::Shr
            | Mnemonic::Sar
            | Mnemonic::Sal
            | Mnemonic::Shld
            | Mnemonic::Shrd
            | Mnemonic::Rol
            | Mnemonic::Ror
            | Mnemonic::Rcl
            | Mnemonic::Rcr
    );
    let mut undefined = instruction.rflags_undefined();
    if count_decides {
        // OF is defined for counts of one, CF not for counts beyond the operand
        undefined |= RflagsBits::OF;
        if matches!(
            instruction.mnemonic(),
            Mnemonic::Shl | Mnemonic::Shr | Mnemonic::Sal | Mnemonic::Shld | Mnemonic::Shrd
        ) {
            undefined |= RflagsBits::CF;
        }
    }
    undefined
}

fn rflags_of(bits: u32) -> u64 {
    [
        (RflagsBits::OF, 1 << 11),
        (RflagsBits::SF, 1 << 7),
        (RflagsBits::ZF, 1 << 6),
        (RflagsBits::AF, 1 << 4),
        (RflagsBits::CF, 1),
        (RflagsBits::PF, 1 << 2),
        (RflagsBits::DF, rflags::DF),
        (RflagsBits::AC, rflags::AC),
    ]
    .iter()
    .filter(|&&(bit, _)| bits & bit != 0)
    .fold(0, |all, &(_, flag)| all | flag)
}

struct Report {
    names: Names,
    lines: Vec<String>,
}

impl Report {
    fn number(&mut self, what: &str, host: u64, guest: u64) {
        if host != guest {
            self.note(what, &format!("{host:#x}"), &format!("{guest:#x}"));
        }
    }

    fn bytes(&mut self, what: &str, host: &[u8], guest: &[u8]) {
        if host != guest {
            self.note(what, &hex(host), &hex(guest));
        }
    }

    fn note(&mut self, what: &str, host: &str, guest: &str) {
        let Names(first, second) = self.names;
        self.lines
            .push(format!("{what}: {first} {host}, {second} {guest}"));
    }

    fn finish(self) -> Option<Difference> {
        (!self.lines.is_empty()).then_some(Difference { lines: self.lines })
    }
}

/// Bytes in memory order.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, b| {
        let _ = write!(text, "{b:02x}");
        text
    })
}
