//! What is compared of a vCPU's state: a list of words, each with a name.

use std::fmt;

use strata_cpu::state::{Segment, State};

/// Words that are compared.
const WORDS: usize = 151;
/// The first of them change with most instructions: general registers, RIP, RFLAGS.
pub(crate) const GENERAL: usize = 18;
/// Where in `GENERAL` RIP is.
const RIP: usize = 16;
const GPRS: [&str; 16] = [
    "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8", "R9", "R10", "R11", "R12", "R13",
    "R14", "R15",
];
const SEGMENTS: [&str; 6] = ["ES", "CS", "SS", "DS", "FS", "GS"];
const DEBUG: [&str; 6] = ["DR0", "DR1", "DR2", "DR3", "DR6", "DR7"];

/// A register's name: a word, and a number where there are several of the kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Name(&'static str, Option<usize>);

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.1 {
            Some(number) => write!(f, "{}{number}", self.0),
            None => f.write_str(self.0),
        }
    }
}

/// The state after a step.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Snapshot([u64; WORDS]);

/// The words that change with most instructions.
pub(crate) type General = [u64; GENERAL];

pub(crate) fn general(state: &State) -> General {
    let mut words = [0; GENERAL];
    words[..16].copy_from_slice(&state.gpr);
    words[RIP] = state.rip;
    words[RIP + 1] = state.rflags();
    words
}

/// The RIP among them.
pub(crate) fn rip(general: &General) -> u64 {
    general[RIP]
}

/// A register that two snapshots disagree in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Differing {
    pub(crate) name: Name,
    /// Its word, if it is among those of [`General`].
    pub(crate) general: Option<usize>,
    pub(crate) leader: u64,
    pub(crate) follower: u64,
}

impl Snapshot {
    pub(crate) fn of(state: &State) -> Self {
        let mut words = [0; WORDS];
        let mut places = words.iter_mut();
        each(state, |_, word| {
            *places.next().expect("WORDS is their number") = word;
        });
        assert!(places.next().is_none(), "WORDS is their number");
        Self(words)
    }

    pub(crate) fn rip(&self) -> u64 {
        self.0[RIP]
    }

    /// Where this, the leader's, differs from the follower's `state`.
    pub(crate) fn differing(&self, state: &State) -> Vec<Differing> {
        let mut found = Vec::new();
        let mut at = 0;
        each(state, |name, follower| {
            let leader = self.0[at];
            if leader != follower {
                found.push(Differing {
                    name,
                    general: (at < GENERAL).then_some(at),
                    leader,
                    follower,
                });
            }
            at += 1;
        });
        found
    }
}

/// Shows all that is compared. Not shown is what does not follow from the instructions alone:
/// of the x87 state the last instruction and operand, which are the host's, and of XSAVE's
/// header which components are in use, which is the host's guess. Of the state block not what
/// serves translated code alone.
fn each(state: &State, mut see: impl FnMut(Name, u64)) {
    for (i, word) in general(state).into_iter().enumerate() {
        let name = match i {
            0..RIP => GPRS[i],
            RIP => "RIP",
            _ => "RFLAGS",
        };
        see(Name(name, None), word);
    }
    for (name, segment) in SEGMENTS.into_iter().zip(&state.segments) {
        each_of_segment(name, segment, &mut see);
    }
    each_of_segment("LDTR", &state.ldtr, &mut see);
    each_of_segment("TR", &state.tr, &mut see);
    let msrs = &state.msrs;
    let system = [
        ("FS base", state.fs_base),
        ("GS base", state.gs_base),
        ("KERNEL_GS_BASE", state.kernel_gs_base),
        ("GDTR base", state.gdtr.base),
        ("GDTR limit", state.gdtr.limit.into()),
        ("IDTR base", state.idtr.base),
        ("IDTR limit", state.idtr.limit.into()),
        ("CPL", state.cpl.into()),
        ("CR0", state.cr0),
        ("CR2", state.cr2),
        ("CR3", state.cr3),
        ("CR4", state.cr4),
        ("XCR0", state.xcr0),
        ("EFER", state.efer),
        ("TSC offset", state.tsc_offset),
        ("STAR", msrs.star),
        ("LSTAR", msrs.lstar),
        ("CSTAR", msrs.cstar),
        ("FMASK", msrs.sfmask),
        ("SYSENTER_CS", msrs.sysenter_cs),
        ("SYSENTER_ESP", msrs.sysenter_esp),
        ("SYSENTER_EIP", msrs.sysenter_eip),
        ("TSC_AUX", msrs.tsc_aux),
        ("PAT", msrs.pat),
        ("SPEC_CTRL", msrs.spec_ctrl),
        ("MISC_ENABLE", msrs.misc_enable),
        ("MTRR_DEF_TYPE", msrs.mtrr_def_type),
        ("the shadow of STI or MOV SS", state.interrupt_shadow.into()),
        ("NMI blocking", state.nmi_blocked.into()),
    ];
    for (name, word) in system.into_iter().chain(DEBUG.into_iter().zip(state.dr)) {
        see(Name(name, None), word);
    }
    let area = &state.xsave.0;
    let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| area[at + i]));
    // control, status and tag words, less the last instruction's opcode
    see(
        Name("x87 control, status, tags", None),
        word(0) & 0xff_ffff_ffff,
    );
    see(Name("MXCSR", None), word(24) & 0xffff_ffff);
    // Intel SDM vol. 1 §13.4, table 13-1: ST, XMM, upper halves of YMM
    for (name, start, count) in [("ST", 32, 8), ("XMM", 160, 16), ("YMM", 576, 16)] {
        for at in 0..count * 2 {
            see(Name(name, Some(at / 2)), word(start + at * 8));
        }
    }
}

fn each_of_segment(name: &'static str, segment: &Segment, see: &mut impl FnMut(Name, u64)) {
    let visible = u64::from(segment.selector) << 48 | u64::from(segment.attributes) << 32;
    see(Name(name, None), visible | u64::from(segment.limit));
    see(Name(name, None), segment.base);
}
