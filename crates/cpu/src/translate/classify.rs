//! Which instructions run as they are, and which do not. The boundary rests on this: only
//! what is listed here as harmless is ever copied into the cache.

use iced_x86::{Code, CpuidFeature, FlowControl, Instruction, Mnemonic, OpKind, Register};

use super::privileged::reads_special_register;
use super::repeat::is_repeat;

/// What the translator does with an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// Re-encoded with its registers and memory operand replaced.
    Plain,
    /// A stack operation, spelled out.
    Stack,
    /// A branch, spelled out.
    Branch,
    /// No effect that the guest can see.
    Nop,
    /// Short sequences of their own: LEA, XLAT, CLI, STI, SWAPGS, RDTSC and the like.
    Special,
    /// A change of privilege that has a short form, and ends the block.
    Transfer,
    /// For `system::execute`.
    System,
}

/// Instructions that look plain but read or write state that is not the guest's.
#[expect(clippy::too_many_lines, reason = "one list, a name a line")]
fn is_sensitive(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        instruction.mnemonic(),
        M::Cpuid
            | M::Rdpmc
            | M::Rdpid
            | M::Rdpru
            | M::Sgdt
            | M::Sidt
            | M::Sldt
            | M::Str
            | M::Smsw
            | M::Lar
            | M::Lsl
            | M::Verr
            | M::Verw
            | M::Xgetbv
            | M::Xsetbv
            | M::Pushf
            | M::Popf
            | M::Popfq
            | M::In
            | M::Out
            | M::Insb
            | M::Insw
            | M::Insd
            | M::Outsb
            | M::Outsw
            | M::Outsd
            | M::Movsb
            | M::Movsw
            | M::Stosb
            | M::Stosw
            | M::Stosd
            | M::Stosq
            | M::Movsq
            | M::Lodsb
            | M::Lodsw
            | M::Lodsd
            | M::Lodsq
            | M::Scasb
            | M::Scasw
            | M::Scasd
            | M::Scasq
            | M::Cmpsb
            | M::Cmpsw
            | M::Cmpsq
            | M::Rdfsbase
            | M::Rdgsbase
            | M::Wrfsbase
            | M::Wrgsbase
            | M::Fxsave
            | M::Fxsave64
            | M::Fxrstor
            | M::Fxrstor64
            | M::Xsave
            | M::Xsave64
            | M::Xsavec
            | M::Xsavec64
            | M::Xsaveopt
            | M::Xsaveopt64
            | M::Xsaves
            | M::Xsaves64
            | M::Xrstor
            | M::Xrstor64
            | M::Xrstors
            | M::Xrstors64
            | M::Fnstenv
            | M::Fstenv
            | M::Fldenv
            | M::Fnsave
            | M::Fsave
            | M::Frstor
            | M::Maskmovq
            | M::Maskmovdqu
            | M::Vmaskmovdqu
            | M::Vmaskmovps
            | M::Vmaskmovpd
            | M::Vpmaskmovd
            | M::Vpmaskmovq
            | M::Vgatherdps
            | M::Vgatherdpd
            | M::Vgatherqps
            | M::Vgatherqpd
            | M::Vpgatherdd
            | M::Vpgatherdq
            | M::Vpgatherqd
            | M::Vpgatherqq
            | M::Clflush
            | M::Clflushopt
            | M::Clwb
            | M::Clzero
            | M::Monitor
            | M::Mwait
            | M::Enter
            | M::Lds
            | M::Les
            | M::Lfs
            | M::Lgs
            | M::Lss
            | M::Into
            | M::Bound
            | M::Ud0
            | M::Ud1
            | M::Ud2
            | M::Sysenter
            | M::Sysexit
            | M::Vmcall
            | M::Vmmcall
    ) || (instruction.is_string_instruction()
        && !matches!(instruction.mnemonic(), M::Movsd if instruction.op0_kind() == OpKind::Register))
        || (matches!(instruction.mnemonic(), M::Movsd | M::Cmpsd)
            && instruction.is_string_instruction())
}

fn has_special_register(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).any(|i| {
        instruction.op_kind(i) == OpKind::Register && {
            let r = instruction.op_register(i);
            r.is_segment_register()
                || r.is_cr()
                || r.is_dr()
                || r.is_tr()
                || r.is_bnd()
                || r.is_k()
                || r.is_zmm()
                || r.is_tmm()
                || vector_number(r).is_some_and(|n| n > 15)
        }
    })
}

fn vector_number(register: Register) -> Option<usize> {
    register.is_vector_register().then(|| register.number())
}

fn is_prefetch(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Prefetch
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Prefetchnta
            | M::Prefetchw
            | M::Prefetchwt1
    )
}

/// What to do with `instruction`, given which CPUID features the guest is offered.
pub(crate) fn classify(instruction: &Instruction, offered: impl Fn(CpuidFeature) -> bool) -> Class {
    use Mnemonic as M;
    if instruction.is_invalid() || !instruction.cpuid_features().iter().all(|&f| offered(f)) {
        return Class::System;
    }
    match instruction.mnemonic() {
        M::Nop | M::Endbr64 | M::Endbr32 | M::Pause | M::Reservednop | M::Cldemote => {
            return Class::Nop;
        }
        m if is_prefetch(m) => return Class::Nop,
        M::Lea
        | M::Xlatb
        | M::Cli
        | M::Sti
        | M::Cld
        | M::Std
        | M::Swapgs
        | M::Stac
        | M::Clac
        | M::Pushfq
        | M::Rdtsc
        | M::Rdtscp => return Class::Special,
        M::Leave => return Class::Stack,
        M::Syscall | M::Sysretq | M::Iretq | M::Serialize => return Class::Transfer,
        M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase | M::Popfq => {
            return Class::Special;
        }
        _ => {}
    }
    if is_repeat(instruction) || reads_special_register(instruction) {
        return Class::Special;
    }
    if has_special_register(instruction) || is_sensitive(instruction) {
        return Class::System;
    }
    if instruction.is_privileged() || instruction.is_vsib() {
        return Class::System;
    }
    match instruction.flow_control() {
        FlowControl::Next => {}
        FlowControl::ConditionalBranch
        | FlowControl::UnconditionalBranch
        | FlowControl::IndirectBranch
        | FlowControl::Call
        | FlowControl::IndirectCall
        | FlowControl::Return => {
            return if near_branch(instruction) {
                Class::Branch
            } else {
                Class::System
            };
        }
        _ => return Class::System,
    }
    if matches!(instruction.mnemonic(), M::Push | M::Pop) {
        return Class::Stack;
    }
    if instruction.is_stack_instruction() {
        return Class::System;
    }
    Class::Plain
}

/// A near branch with 64-bit operand size.
fn near_branch(instruction: &Instruction) -> bool {
    let code = instruction.code();
    instruction.is_jcc_short_or_near()
        || instruction.is_jmp_short_or_near()
        || instruction.is_call_near()
        || instruction.is_jcx_short()
        || instruction.is_loop()
        || instruction.is_loopcc()
        || matches!(
            code,
            Code::Jmp_rm64 | Code::Call_rm64 | Code::Retnq | Code::Retnq_imm16
        )
}

/// Which extended state an instruction needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Extended {
    /// None.
    No,
    /// x87 or MMX.
    X87,
    /// XMM registers or MXCSR.
    Sse,
    /// YMM registers, or VEX-encoded vector instructions.
    Avx,
}

/// Which extended state `instruction` needs.
pub(crate) fn extended_state(instruction: &Instruction) -> Extended {
    use CpuidFeature as F;
    use Mnemonic as M;
    if matches!(
        instruction.mnemonic(),
        M::Movnti | M::Lfence | M::Sfence | M::Mfence | M::Crc32 | M::Pause
    ) {
        return Extended::No;
    }
    let mut need = if instruction.mnemonic() == M::Wait {
        Extended::X87
    } else {
        Extended::No
    };
    for feature in instruction.cpuid_features() {
        let this = match feature {
            F::FPU | F::FPU287 | F::FPU287XL_ONLY | F::FPU387 | F::FPU387SL_ONLY | F::MMX => {
                Extended::X87
            }
            F::SSE
            | F::SSE2
            | F::SSE3
            | F::SSSE3
            | F::SSE4_1
            | F::SSE4_2
            | F::SSE4A
            | F::AES
            | F::PCLMULQDQ
            | F::SHA => Extended::Sse,
            F::AVX | F::AVX2 | F::FMA | F::F16C => Extended::Avx,
            _ => Extended::No,
        };
        need = need.max(this);
    }
    need
}
