//! SYSCALL, SYSRET, SYSENTER, SYSEXIT, SWAPGS and the FS and GS bases.

use iced_x86::{Code, Instruction, Mnemonic};

use super::control::require_cpl0;
use super::cpuid::Vendor;
use super::{Done, Flow, flags};
use crate::exception::Exception;
use crate::mmu::Core;
use crate::state::{Segment, cr0, cr4, efer, gpr, rflags, segment as index};

/// What SYSRET may set in RFLAGS: all but VM, RF and reserved bits (Intel SDM vol. 2B).
pub(crate) const SYSRET_FLAGS: u64 = 0x3c_7fd7;

/// Descriptor attributes of the flat code segment that these instructions load, for ring 0:
/// execute, read, accessed; S, P; L, G.
pub(crate) const FLAT_CODE: u16 = 0xa09b;
/// The same of the stack segment: read, write, accessed; S, P; B, G.
pub(crate) const FLAT_STACK: u16 = 0xc093;

fn flat_code(selector: u16, cpl: u8) -> Segment {
    Segment {
        base: 0,
        limit: u32::MAX,
        selector,
        attributes: FLAT_CODE | u16::from(cpl) << 5,
    }
}

fn flat_stack(selector: u16, cpl: u8) -> Segment {
    Segment {
        base: 0,
        limit: u32::MAX,
        selector,
        attributes: FLAT_STACK | u16::from(cpl) << 5,
    }
}

/// Flat segments of 32-bit code and data.
fn flat_code_32(selector: u16, cpl: u8) -> Segment {
    Segment {
        attributes: 0xc09b | u16::from(cpl) << 5,
        ..flat_code(selector, cpl)
    }
}

/// SYSCALL. Outside of 64-bit mode only AMD has it.
pub(super) fn syscall(core: &mut Core, instr: &Instruction) -> Result<Flow, Exception> {
    let long_code = core.state.is_long_code();
    let amd = core.cpuid.vendor() == Vendor::Amd;
    let state = &mut *core.state;
    if state.efer & efer::SCE == 0 || !long_code && (!amd || state.is_real()) {
        return Err(Exception::undefined());
    }
    let selector = (state.msrs.star >> 32) as u16 & !3;
    state.gpr[gpr::RCX] = instr.next_ip();
    if state.is_long_mode() {
        let image = state.rflags() & !rflags::RF;
        state.gpr[gpr::R11] = image;
        state.rip = if long_code {
            state.msrs.lstar
        } else {
            state.msrs.cstar
        };
        let new = image & !state.msrs.sfmask;
        state.set_rflags(new);
        state.segments[index::CS] = flat_code(selector, 0);
    } else {
        state.rip = state.msrs.star & 0xffff_ffff;
        state.system_flags &= !(rflags::IF | rflags::VM | rflags::RF);
        state.segments[index::CS] = flat_code_32(selector, 0);
    }
    state.segments[index::SS] = flat_stack(selector.wrapping_add(8), 0);
    state.cpl = 0;
    Ok(Flow::Jump)
}

/// SYSRET, to 64-bit code or to 32-bit code.
pub(super) fn sysret(core: &mut Core, instr: &Instruction) -> Result<Flow, Exception> {
    let long_code = core.state.is_long_code();
    let intel = core.cpuid.vendor() == Vendor::Intel;
    if core.state.efer & efer::SCE == 0 || !long_code && (intel || core.state.is_real()) {
        return Err(Exception::undefined());
    }
    require_cpl0(core)?;
    let star = (core.state.msrs.star >> 48) as u16;
    let wide = instr.code() == Code::Sysretq;
    let mut rip = core.state.gpr[gpr::RCX];
    // Intel faults here, at CPL 0; AMD when it fetches, at CPL 3
    if wide && intel && !Core::canonical(rip) {
        return Err(Exception::general_protection(0));
    }
    let image = core.state.gpr[gpr::R11] & SYSRET_FLAGS;
    core.state.segments[index::CS] = if wide {
        flat_code(star.wrapping_add(16) | 3, 3)
    } else {
        rip &= 0xffff_ffff;
        flat_code_32(star | 3, 3)
    };
    core.state.segments[index::SS] = flat_stack(star.wrapping_add(8) | 3, 3);
    core.state.cpl = 3;
    core.state.rip = rip;
    if core.state.is_long_mode() {
        flags::set(core, image, u64::MAX);
    } else {
        core.state.system_flags |= rflags::IF;
    }
    Ok(Flow::Jump)
}

/// SYSENTER. AMD has none in long mode.
pub(super) fn sysenter(core: &mut Core) -> Result<Flow, Exception> {
    let long = core.state.is_long_mode();
    if core.cpuid.vendor() == Vendor::Amd && long {
        return Err(Exception::undefined());
    }
    let state = &mut *core.state;
    let selector = state.msrs.sysenter_cs as u16 & !3;
    if selector == 0 || state.cr0 & cr0::PE == 0 {
        return Err(Exception::general_protection(0));
    }
    state.system_flags &= !(rflags::VM | rflags::IF | rflags::RF);
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    state.gpr[gpr::RSP] = state.msrs.sysenter_esp & mask;
    state.rip = state.msrs.sysenter_eip & mask;
    state.segments[index::CS] = if long {
        flat_code(selector, 0)
    } else {
        flat_code_32(selector, 0)
    };
    state.segments[index::SS] = flat_stack(selector.wrapping_add(8), 0);
    state.cpl = 0;
    Ok(Flow::Jump)
}

/// SYSEXIT, to 64-bit code or to 32-bit code.
pub(super) fn sysexit(core: &mut Core, instr: &Instruction) -> Result<Flow, Exception> {
    if core.cpuid.vendor() == Vendor::Amd && core.state.is_long_mode() {
        return Err(Exception::undefined());
    }
    let selector = core.state.msrs.sysenter_cs as u16 & !3;
    if selector == 0 || core.state.cpl != 0 || core.state.is_real() {
        return Err(Exception::general_protection(0));
    }
    let rip = core.state.gpr[gpr::RDX];
    let rsp = core.state.gpr[gpr::RCX];
    let wide = instr.code() == Code::Sysexitq;
    if wide && !(Core::canonical(rip) && Core::canonical(rsp)) {
        return Err(Exception::general_protection(0));
    }
    let state = &mut *core.state;
    if wide {
        state.gpr[gpr::RSP] = rsp;
        state.rip = rip;
        state.segments[index::CS] = flat_code(selector.wrapping_add(32) | 3, 3);
        state.segments[index::SS] = flat_stack(selector.wrapping_add(40) | 3, 3);
    } else {
        state.gpr[gpr::RSP] = rsp & 0xffff_ffff;
        state.rip = rip & 0xffff_ffff;
        state.segments[index::CS] = flat_code_32(selector.wrapping_add(16) | 3, 3);
        state.segments[index::SS] = flat_stack(selector.wrapping_add(24) | 3, 3);
    }
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
