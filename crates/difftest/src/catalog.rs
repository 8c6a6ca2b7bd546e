//! Which instructions are tested: everything that iced-x86 can encode for a width of code, that
//! the guest's CPUID offers and the host has, and whose result depends on nothing but the
//! state that a case sets up.
//!
//! Used by `generate`, and to judge mutated encodings.

use std::arch::is_x86_feature_detected;
use std::sync::LazyLock;

use iced_x86::{Code, CpuidFeature, EncodingKind, Mnemonic, OpCodeOperandKind as Kind};

use crate::case::Width;

/// The testable instructions.
#[derive(Clone, Debug)]
pub struct Catalog {
    bits64: Codes,
    bits32: Codes,
    bits16: Codes,
    /// The host's kernel punishes locked accesses that straddle cache lines.
    aligns_locks: bool,
}

/// Those for one width of code.
#[derive(Clone, Debug)]
struct Codes {
    /// All of them.
    all: Vec<Code>,
    /// Which they are, by number.
    member: Vec<bool>,
}

impl Codes {
    fn new(width: Width) -> Self {
        let has_fsgsbase = crate::native::has_fsgsbase();
        let mut member = vec![false; Code::values().len()];
        let mut all = Vec::new();
        for code in Code::values() {
            if is_testable(code, width, has_fsgsbase) {
                member[code as usize] = true;
                all.push(code);
            }
        }
        Self { all, member }
    }
}

impl Catalog {
    /// The catalogue for this host, made once.
    pub fn shared() -> &'static Self {
        static SHARED: LazyLock<Catalog> = LazyLock::new(Catalog::for_this_host);
        &SHARED
    }

    fn for_this_host() -> Self {
        let aligns_locks = std::fs::read_to_string("/proc/cpuinfo")
            .is_ok_and(|text| text.contains("split_lock_detect"));
        Self {
            bits64: Codes::new(Width::Bits64),
            bits32: Codes::new(Width::Bits32),
            bits16: Codes::new(Width::Bits16),
            aligns_locks,
        }
    }

    /// Whether locked accesses must be aligned: where Linux detects split locks it slows
    /// them down a thousandfold, or ends them with #AC.
    pub fn aligns_locks(&self) -> bool {
        self.aligns_locks
    }

    fn of(&self, width: Width) -> &Codes {
        match width {
            Width::Bits64 => &self.bits64,
            Width::Bits32 => &self.bits32,
            Width::Bits16 => &self.bits16,
        }
    }

    /// All testable instructions of a width.
    pub fn codes(&self, width: Width) -> &[Code] {
        &self.of(width).all
    }

    /// Whether `code` is one of them.
    pub fn contains(&self, width: Width, code: Code) -> bool {
        self.of(width).member[code as usize]
    }
}

/// Whether there is the instruction, and AMD and Intel decode it alike: where they do not,
/// there is nothing to be right about.
fn exists(code: Code, width: Width) -> bool {
    let op_code = code.op_code();
    match width {
        Width::Bits64 => {
            op_code.mode64()
                && op_code.long_mode()
                && op_code.intel_decoder64()
                && op_code.amd_decoder64()
        }
        Width::Bits32 => {
            op_code.mode32()
                && op_code.compatibility_mode()
                && op_code.intel_decoder32()
                && op_code.amd_decoder32()
        }
        Width::Bits16 => {
            op_code.mode16()
                && op_code.compatibility_mode()
                && op_code.intel_decoder16()
                && op_code.amd_decoder16()
        }
    }
}

fn is_testable(code: Code, width: Width, has_fsgsbase: bool) -> bool {
    let op_code = code.op_code();
    op_code.is_instruction()
        && exists(code, width)
        && matches!(op_code.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
        && (code.cpuid_features().iter().all(|&f| is_offered(f, has_fsgsbase))
            // a NOP where CET is off, as it is on both sides; setjmp and longjmp use it
            || matches!(code, Code::Rdsspd_r32 | Code::Rdsspq_r64))
        && !op_code.is_reserved_nop()
        && !is_excluded(code)
        && op_code
            .op_kinds()
            .iter()
            .all(|&kind| is_operand_known(kind))
        // in wider code these cut RIP to where nothing is mapped
        && (width == Width::Bits16 || !has_short_branch(code))
}

fn has_short_branch(code: Code) -> bool {
    let kinds = code.op_code().op_kinds();
    kinds
        .iter()
        .any(|k| matches!(k, Kind::br16_1 | Kind::br16_2))
}

/// The features that the guest's CPUID offers, less those this host lacks.
fn is_offered(feature: CpuidFeature, has_fsgsbase: bool) -> bool {
    match feature {
        CpuidFeature::INTEL8086
        | CpuidFeature::INTEL186
        | CpuidFeature::INTEL286
        | CpuidFeature::INTEL386
        | CpuidFeature::INTEL486
        | CpuidFeature::X64
        | CpuidFeature::CX8
        | CpuidFeature::CMOV
        | CpuidFeature::CLFSH
        | CpuidFeature::FPU
        | CpuidFeature::FPU287
        | CpuidFeature::FPU387
        | CpuidFeature::FXSR
        | CpuidFeature::MMX
        | CpuidFeature::MSR
        | CpuidFeature::MULTIBYTENOP
        | CpuidFeature::PAUSE
        | CpuidFeature::PREFETCHW
        | CpuidFeature::SSE
        | CpuidFeature::SSE2
        | CpuidFeature::SYSCALL
        // a NOP where CET is off
        | CpuidFeature::CET_IBT => true,
        CpuidFeature::SSE3 => is_x86_feature_detected!("sse3"),
        CpuidFeature::SSSE3 => is_x86_feature_detected!("ssse3"),
        CpuidFeature::SSE4_1 => is_x86_feature_detected!("sse4.1"),
        CpuidFeature::SSE4_2 => is_x86_feature_detected!("sse4.2"),
        CpuidFeature::AVX => is_x86_feature_detected!("avx"),
        CpuidFeature::AVX2 => is_x86_feature_detected!("avx2"),
        CpuidFeature::FMA => is_x86_feature_detected!("fma"),
        CpuidFeature::F16C => is_x86_feature_detected!("f16c"),
        CpuidFeature::AES => is_x86_feature_detected!("aes"),
        CpuidFeature::PCLMULQDQ => is_x86_feature_detected!("pclmulqdq"),
        CpuidFeature::SHA => is_x86_feature_detected!("sha"),
        CpuidFeature::BMI1 => is_x86_feature_detected!("bmi1"),
        CpuidFeature::BMI2 => is_x86_feature_detected!("bmi2"),
        CpuidFeature::ADX => is_x86_feature_detected!("adx"),
        CpuidFeature::MOVBE => is_x86_feature_detected!("movbe"),
        CpuidFeature::POPCNT => is_x86_feature_detected!("popcnt"),
        CpuidFeature::LZCNT => is_x86_feature_detected!("lzcnt"),
        CpuidFeature::CLFLUSHOPT => leaf_7_ebx() & 1 << 23 != 0,
        CpuidFeature::CLWB => leaf_7_ebx() & 1 << 24 != 0,
        CpuidFeature::CMPXCHG16B => is_x86_feature_detected!("cmpxchg16b"),
        CpuidFeature::FSGSBASE => has_fsgsbase,
        _ => false,
    }
}

fn leaf_7_ebx() -> u32 {
    std::arch::x86_64::__cpuid_count(7, 0).ebx
}

/// What is left out although host and guest have it, and why.
#[expect(clippy::match_same_arms, reason = "each group has a reason of its own")]
fn is_excluded(code: Code) -> bool {
    match code.mnemonic() {
        // leave ring 3, or enter the host's kernel
        Mnemonic::Syscall | Mnemonic::Sysenter | Mnemonic::Int | Mnemonic::Int1 => true,
        // change CS or SS, to what the two machines need not agree on
        Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq | Mnemonic::Retf => true,
        // read what differs by nature: time, counters, identity, descriptor tables
        Mnemonic::Rdtsc
        | Mnemonic::Rdtscp
        | Mnemonic::Rdpmc
        | Mnemonic::Rdpid
        | Mnemonic::Cpuid
        | Mnemonic::Sgdt
        | Mnemonic::Sidt
        | Mnemonic::Sldt
        | Mnemonic::Str
        | Mnemonic::Smsw
        | Mnemonic::Lar
        | Mnemonic::Lsl
        | Mnemonic::Verr
        | Mnemonic::Verw => true,
        // store or load FOP, FIP and FDP, which depend on where code lies
        Mnemonic::Fnstenv | Mnemonic::Fnsave | Mnemonic::Fxsave | Mnemonic::Fxsave64 => true,
        Mnemonic::Fldenv | Mnemonic::Frstor | Mnemonic::Fxrstor | Mnemonic::Fxrstor64 => true,
        // privileged serialising or system-management instructions: hypervisors under the
        // host may intercept them before the privilege check
        Mnemonic::Rsm | Mnemonic::Invd | Mnemonic::Wbinvd | Mnemonic::Wbnoinvd => true,
        Mnemonic::Jmp | Mnemonic::Call => is_far(code),
        // how many bytes of them are fetched before they fault differs
        Mnemonic::Ud0 | Mnemonic::Ud1 => true,
        // load a segment register
        Mnemonic::Lss | Mnemonic::Lfs | Mnemonic::Lgs | Mnemonic::Lds | Mnemonic::Les => true,
        Mnemonic::Mov => {
            matches!(
                code,
                Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16
            )
        }
        Mnemonic::Pop => matches!(
            code.op_code().op0_kind(),
            Kind::es | Kind::cs | Kind::ss | Kind::ds | Kind::fs | Kind::gs
        ),
        // the forms with a WAIT in front are two instructions
        _ => code.op_code().fwait(),
    }
}

fn is_far(code: Code) -> bool {
    matches!(
        code,
        Code::Jmp_m1616
            | Code::Jmp_m1632
            | Code::Jmp_m1664
            | Code::Call_m1616
            | Code::Call_m1632
            | Code::Call_m1664
    )
}

/// Operand kinds that the generator can fill in.
fn is_operand_known(kind: Kind) -> bool {
    !matches!(
        kind,
        Kind::farbr2_2
            | Kind::farbr4_2
            | Kind::mem_mpx
            | Kind::mem_mib
            | Kind::mem_vsib32z
            | Kind::mem_vsib64z
            | Kind::r32_or_mem_mpx
            | Kind::r64_or_mem_mpx
            | Kind::zmm_or_mem
            | Kind::bnd_or_mem_mpx
            | Kind::k_or_mem
            | Kind::k_reg
            | Kind::kp1_reg
            | Kind::k_rm
            | Kind::k_vvvv
            | Kind::xmmp3_vvvv
            | Kind::zmm_reg
            | Kind::zmm_rm
            | Kind::zmm_vvvv
            | Kind::zmmp3_vvvv
            | Kind::tr_reg
            | Kind::bnd_reg
            | Kind::xbegin_2
            | Kind::xbegin_4
            | Kind::brdisp_2
            | Kind::brdisp_4
            | Kind::sibmem
            | Kind::tmm_reg
            | Kind::tmm_rm
            | Kind::tmm_vvvv
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_catalogue_holds_the_plain_instructions_and_none_that_leave_ring_3() {
        let catalog = Catalog::for_this_host();

        assert!(
            catalog.contains(Width::Bits64, Code::Add_rm32_r32)
                && catalog.contains(Width::Bits64, Code::Fadd_m64fp)
        );
        assert!(
            catalog.contains(Width::Bits64, Code::Retnq)
                && catalog.contains(Width::Bits64, Code::Jmp_rm64)
        );
        assert!(
            !catalog.contains(Width::Bits64, Code::Syscall)
                && !catalog.contains(Width::Bits64, Code::Iretq)
        );
        assert!(
            !catalog.contains(Width::Bits64, Code::INVALID)
                && !catalog.contains(Width::Bits64, Code::Vmcall)
        );
        assert!(catalog.codes(Width::Bits64).len() > 1000);
    }
}
