//! SYSCALL, SYSRET, SYSENTER, SYSEXIT, SWAPGS and the FS and GS bases.

use iced_x86::{Code, Instruction, Mnemonic};

use super::control::require_cpl0;
use super::cpuid::Vendor;
use super::{Done, Flow, flags};
use crate::exception::Exception;
use crate::mmu::Core;
use crate::state::{Segment, cr4, efer, gpr, rflags, segment as index};

/// What SYSRET may set in RFLAGS: all but VM, RF and reserved bits (Intel SDM vol. 2B).
const SYSRET_FLAGS: u64 = 0x3c_7fd7;

/// Descriptor attributes of the flat segments that these instructions load.
fn flat_code(selector: u16, cpl: u8) -> Segment {
    // execute, read, accessed; S, P; L, G
    Segment {
        base: 0,
        limit: u32::MAX,
        selector,
        attributes: 0xa09b | u16::from(cpl) << 5,
    }
}

fn flat_stack(selector: u16, cpl: u8) -> Segment {
    // read, write, accessed; S, P; B, G
    Segment {
        base: 0,
        limit: u32::MAX,
        selector,
        attributes: 0xc093 | u16::from(cpl) << 5,
    }
}

pub(super) fn syscall(core: &mut Core, instr: &Instruction) -> Result<Flow, Exception> {
    let state = &mut *core.state;
    if state.efer & efer::SCE == 0 {
        return Err(Exception::undefined());
    }
    let image = state.rflags() & !rflags::RF;
    state.gpr[gpr::RCX] = instr.next_ip();
    state.gpr[gpr::R11] = image;
    state.rip = state.msrs.lstar;
    let new = image & !state.msrs.sfmask;
    state.set_rflags(new);
    let selector = (state.msrs.star >> 32) as u16 & !3;
    state.segments[index::CS] = flat_code(selector, 0);
    state.segments[index::SS] = flat_stack(selector.wrapping_add(8), 0);
    state.cpl = 0;
    Ok(Flow::Jump)
}

pub(super) fn sysret(core: &mut Core, instr: &Instruction) -> Result<Flow, Exception> {
    if core.state.efer & efer::SCE == 0 {
        return Err(Exception::undefined());
    }
    require_cpl0(core)?;
    if !matches!(instr.code(), Code::Sysretq) {
        // to compatibility mode, which is not run
        return Err(Exception::general_protection(0));
    }
    let rip = core.state.gpr[gpr::RCX];
    // Intel faults here, at CPL 0; AMD when it fetches, at CPL 3
    if core.cpuid.vendor() == Vendor::Intel && !Core::canonical(rip) {
        return Err(Exception::general_protection(0));
    }
    let image = core.state.gpr[gpr::R11] & SYSRET_FLAGS;
    let star = (core.state.msrs.star >> 48) as u16;
    core.state.segments[index::CS] = flat_code(star.wrapping_add(16) | 3, 3);
    core.state.segments[index::SS] = flat_stack(star.wrapping_add(8) | 3, 3);
    core.state.cpl = 3;
    core.state.rip = rip;
    flags::set(core, image, u64::MAX);
    Ok(Flow::Jump)
}

/// SYSENTER. AMD has none in long mode.
pub(super) fn sysenter(core: &mut Core) -> Result<Flow, Exception> {
    if core.cpuid.vendor() == Vendor::Amd {
        return Err(Exception::undefined());
    }
    let state = &mut *core.state;
    let selector = state.msrs.sysenter_cs as u16 & !3;
    if selector == 0 {
        return Err(Exception::general_protection(0));
    }
    state.system_flags &= !(rflags::VM | rflags::IF | rflags::RF);
    state.gpr[gpr::RSP] = state.msrs.sysenter_esp;
    state.rip = state.msrs.sysenter_eip;
    state.segments[index::CS] = flat_code(selector, 0);
    state.segments[index::SS] = flat_stack(selector.wrapping_add(8), 0);
    state.cpl = 0;
    Ok(Flow::Jump)
}

pub(super) fn sysexit(core: &mut Core, instr: &Instruction) -> Result<Flow, Exception> {
    if core.cpuid.vendor() == Vendor::Amd {
        return Err(Exception::undefined());
    }
    let selector = core.state.msrs.sysenter_cs as u16 & !3;
    if selector == 0 || core.state.cpl != 0 {
        return Err(Exception::general_protection(0));
    }
    let rip = core.state.gpr[gpr::RDX];
    let rsp = core.state.gpr[gpr::RCX];
    // without REX.W to compatibility mode, which is not run
    if instr.code() != Code::Sysexitq || !Core::canonical(rip) || !Core::canonical(rsp) {
        return Err(Exception::general_protection(0));
    }
    let state = &mut *core.state;
    state.gpr[gpr::RSP] = rsp;
    state.rip = rip;
    state.segments[index::CS] = flat_code(selector.wrapping_add(32) | 3, 3);
    state.segments[index::SS] = flat_stack(selector.wrapping_add(40) | 3, 3);
    state.cpl = 3;
    Ok(Flow::Jump)
}

pub(super) fn swapgs(core: &mut Core) -> Done {
    require_cpl0(core)?;
    let state = &mut *core.state;
    std::mem::swap(&mut state.gs_base, &mut state.kernel_gs_base);
    Ok(())
}

fn require_fsgsbase(core: &Core) -> Done {
    if core.state.cr4 & cr4::FSGSBASE == 0 {
        return Err(Exception::undefined());
    }
    Ok(())
}

/// RDFSBASE, RDGSBASE.
pub(super) fn read_base(core: &mut Core, instr: &Instruction) -> Done {
    require_fsgsbase(core)?;
    let fs = instr.mnemonic() == Mnemonic::Rdfsbase;
    let base = if fs {
        core.state.fs_base
    } else {
        core.state.gs_base
    };
    core.set_gpr(instr.op0_register(), base);
    Ok(())
}

/// WRFSBASE, WRGSBASE.
pub(super) fn write_base(core: &mut Core, instr: &Instruction) -> Done {
    require_fsgsbase(core)?;
    let base = core.gpr(instr.op0_register());
    if !Core::canonical(base) {
        return Err(Exception::general_protection(0));
    }
    if instr.mnemonic() == Mnemonic::Wrfsbase {
        core.state.fs_base = base;
    } else {
        core.state.gs_base = base;
    }
    Ok(())
}
