//! Instructions that translated code leaves to Rust, and the delivery of exceptions and
//! interrupts: one implementation of each, for the translator and the single-step path.
//!
//! ```text
//!   engine ── execute ──► control, msr, segment, transfer, syscall, fpu, io, string, vector
//!     └────── deliver_* ─► deliver ──► IDT, TSS, stacks
//! ```
//!
//! Nothing here decodes, translates or loops over instructions. When an instruction
//! returns an exception, the state is as before it, but for what the manual lets a repeated
//! or gathering instruction keep.

mod control;
pub(crate) mod cpuid;
mod deliver;
mod deliver_legacy;
mod flags;
mod fpu;
mod fpu_env;
mod gate;
mod io;
mod legacy;
mod memory;
mod msr;
mod real;
mod segment;
mod string;
mod syscall;
mod transfer;
mod vector;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_control;
#[cfg(test)]
mod tests_deliver;
#[cfg(test)]
mod tests_extended;
#[cfg(test)]
mod tests_returns;
#[cfg(test)]
mod tests_segment;
#[cfg(test)]
mod tests_string;
#[cfg(test)]
mod tests_transfer;
#[cfg(test)]
mod tests_translated;
#[cfg(test)]
mod tests_wide;

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::bus::Bus;
use crate::exception::Exception;
use crate::mmu::Core;

pub(crate) use deliver::{TripleFault, deliver_debug_trap, deliver_exception, deliver_interrupt};
pub(crate) use fpu::fpu_exception;
pub(crate) use syscall::{FLAT_CODE, FLAT_STACK, SYSRET_FLAGS};

/// What the caller of [`execute`] does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    /// Sets RIP to the next instruction.
    Next,
    /// Goes on at RIP, which was set, or is unchanged because a repeated instruction has
    /// iterations left.
    Jump,
    /// Waits for an interrupt. HLT has retired: RIP is behind it.
    Halt,
    /// Lets others run: PAUSE, of one vCPU among several.
    Pause,
    /// Stops: the guest wants what this CPU does not do.
    #[allow(dead_code)]
    Fatal(String),
}

/// Bytes of the longest instruction.
const MAX_LENGTH: usize = 15;

/// The result of an instruction that falls through to the next.
type Done = Result<(), Exception>;

/// Executes one instruction that translated code does not. `state.rip` is its address, and
/// `state.xsave` holds the extended state, which the caller loads again afterwards.
pub(crate) fn execute(
    core: &mut Core,
    bus: &dyn Bus,
    instr: &Instruction,
) -> Result<Flow, Exception> {
    use Mnemonic as M;
    if instr.is_invalid() && instr.len() >= MAX_LENGTH {
        // too long to be an instruction at all (Intel SDM vol. 3A §6.15, #GP)
        return Err(Exception::general_protection(0));
    }
    if instr.is_invalid() || instr.has_lock_prefix() {
        return Err(Exception::undefined());
    }
    if instr.is_string_instruction() {
        return string::execute(core, bus, instr);
    }
    match instr.mnemonic() {
        M::Iret | M::Iretd | M::Iretq => transfer::iret(core, bus, instr),
        M::Syscall => syscall::syscall(core, instr),
        M::Sysret | M::Sysretq => syscall::sysret(core, instr),
        M::Sysenter => syscall::sysenter(core),
        M::Sysexit | M::Sysexitq => syscall::sysexit(core, instr),
        M::Int => deliver::software_interrupt(core, bus, instr.immediate8(), instr.next_ip()),
        M::Int3 => deliver::software_interrupt(core, bus, 3, instr.next_ip()),
        M::Int1 => deliver::int1(core, bus, instr.next_ip()),
        M::Jmp if transfer::is_far(instr) => transfer::far_jump(core, bus, instr),
        M::Call if transfer::is_far(instr) => transfer::far_call(core, bus, instr),
        M::Retf => transfer::far_return(core, bus, instr),
        M::Hlt => control::hlt(core, instr),
        M::Pause => Ok(Flow::Pause),
        M::Into => legacy::into(core, bus, instr),
        _ => sequential(core, bus, instr).map(|()| Flow::Next),
    }
}

/// Instructions after which the next one in memory follows.
fn sequential(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    use Mnemonic as M;
    match instr.mnemonic() {
        M::Mov => mov(core, bus, instr),
        M::Cli => flags::cli(core),
        M::Sti => flags::sti(core),
        M::Stac | M::Clac => flags::set_ac(core, instr.mnemonic() == M::Stac),
        M::Pushf | M::Pushfd | M::Pushfq => flags::pushf(core, bus, instr),
        M::Popf | M::Popfd | M::Popfq => flags::popf(core, bus, instr),
        M::Cpuid => {
            control::cpuid(core);
            Ok(())
        }
        M::Rdtsc => control::rdtsc(core),
        M::Rdtscp => control::rdtscp(core),
        M::Rdpmc => Err(Exception::general_protection(0)),
        M::Rdmsr => msr::rdmsr(core, bus),
        M::Wrmsr => msr::wrmsr(core, bus),
        M::Clts => control::clts(core),
        M::Lmsw => control::lmsw(core, bus, instr),
        M::Smsw => control::smsw(core, bus, instr),
        M::Xgetbv => control::xgetbv(core),
        M::Xsetbv => control::xsetbv(core),
        M::Invlpg => control::invlpg(core, instr),
        M::Invpcid => control::invpcid(core, bus, instr),
        M::Invd | M::Wbinvd | M::Wbnoinvd => control::require_cpl0(core),
        M::Clflush | M::Clflushopt | M::Clwb => control::flush_line(core, instr),
        M::Vmcall | M::Vmmcall => control::hypercall(core),
        // NOPs on a CPU without shadow stacks, bounds or these hints, and which makes the next
        // block from what memory holds
        M::Serialize
        | M::Rdsspd
        | M::Rdsspq
        | M::Prefetchit0
        | M::Prefetchit1
        | M::Prefetchwt1
        | M::Bndmk
        | M::Bndmov
        | M::Bndcl
        | M::Bndcu
        | M::Bndcn
        | M::Bndldx
        | M::Bndstx => Ok(()),
        M::Swapgs => syscall::swapgs(core),
        M::Rdfsbase | M::Rdgsbase => syscall::read_base(core, instr),
        M::Wrfsbase | M::Wrgsbase => syscall::write_base(core, instr),
        M::Push => segment::push(core, bus, instr),
        M::Pop => segment::pop(core, bus, instr),
        M::Lfs | M::Lgs | M::Lss | M::Lds | M::Les => segment::load_far_pointer(core, bus, instr),
        M::Lgdt | M::Lidt => segment::load_table(core, bus, instr),
        M::Sgdt | M::Sidt => segment::store_table(core, bus, instr),
        M::Lldt => segment::lldt(core, bus, instr),
        M::Ltr => segment::ltr(core, bus, instr),
        M::Sldt | M::Str => segment::store_selector(core, bus, instr),
        M::Lar | M::Lsl => segment::lar_lsl(core, bus, instr),
        M::Verr | M::Verw => segment::verify(core, bus, instr),
        M::In => io::input(core, bus, instr),
        M::Out => io::output(core, bus, instr),
        M::Aaa | M::Aas | M::Aad | M::Aam | M::Daa | M::Das | M::Salc => {
            legacy::adjust(core, instr)
        }
        M::Bound => legacy::bound(core, bus, instr),
        M::Arpl => legacy::arpl(core, bus, instr),
        M::Pusha | M::Pushad => legacy::push_all(core, bus, instr),
        M::Popa | M::Popad => legacy::pop_all(core, bus, instr),
        M::Enter => memory::enter(core, bus, instr),
        M::Leave => memory::leave(core, bus, instr),
        _ => extended(core, bus, instr),
    }
}

/// Instructions on extended state.
fn extended(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    use Mnemonic as M;
    match instr.mnemonic() {
        M::Fxsave | M::Fxsave64 => fpu::fxsave(core, bus, instr),
        M::Fxrstor | M::Fxrstor64 => fpu::fxrstor(core, bus, instr),
        M::Xsave | M::Xsave64 => fpu::xsave(core, bus, instr, fpu::Form::Plain),
        M::Xsaveopt | M::Xsaveopt64 => fpu::xsave(core, bus, instr, fpu::Form::Optimized),
        M::Xsavec | M::Xsavec64 => fpu::xsave(core, bus, instr, fpu::Form::Compacted),
        M::Xrstor | M::Xrstor64 => fpu::xrstor(core, bus, instr),
        M::Fnstenv | M::Fstenv => fpu_env::store_environment(core, bus, instr),
        M::Fnsave | M::Fsave => fpu_env::save(core, bus, instr),
        M::Fldenv => fpu_env::load_environment(core, bus, instr),
        M::Frstor => fpu_env::restore(core, bus, instr),
        M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq => {
            vector::masked_move(core, bus, instr)
        }
        M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => vector::masked_bytes(core, bus, instr),
        M::Vgatherdps
        | M::Vgatherdpd
        | M::Vgatherqps
        | M::Vgatherqpd
        | M::Vpgatherdd
        | M::Vpgatherdq
        | M::Vpgatherqd
        | M::Vpgatherqq => vector::gather(core, bus, instr),
        _ => Err(fpu_exception(core, instr)),
    }
}

/// MOV with a control, debug or segment register.
fn mov(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    let register =
        |operand| (instr.op_kind(operand) == OpKind::Register).then(|| instr.op_register(operand));
    let (to, from) = (register(0), register(1));
    match (to, from) {
        (Some(to), _) if to.is_segment_register() => segment::mov_to(core, bus, instr, to),
        (_, Some(from)) if from.is_segment_register() => segment::mov_from(core, bus, instr, from),
        (Some(to), Some(from)) if to.is_cr() => control::mov_to_cr(core, bus, to, from),
        (Some(to), Some(from)) if from.is_cr() => control::mov_from_cr(core, bus, to, from),
        (Some(to), Some(from)) if to.is_dr() => control::mov_to_dr(core, to, from),
        (Some(to), Some(from)) if from.is_dr() => control::mov_from_dr(core, to, from),
        _ => Err(Exception::undefined()),
    }
}
