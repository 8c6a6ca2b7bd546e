//! Far control transfers: IRET, far JMP, CALL and RET (Intel SDM vol. 2A, vol. 3A §5.8).

use iced_x86::{Code, Instruction, Mnemonic};

use super::memory::Address;
use super::segment::{self, Descriptor, checked_stack, is_null, require_runnable, selector_code};
use super::{Flow, flags};
use crate::bus::Bus;
use crate::exception::Exception;
use crate::mmu::Core;
use crate::state::{Segment, gpr, rflags, segment as index};

/// Whether a JMP or CALL is far.
pub(super) fn is_far(instr: &Instruction) -> bool {
    matches!(
        instr.code(),
        Code::Jmp_m1616
            | Code::Jmp_m1632
            | Code::Jmp_m1664
            | Code::Call_m1616
            | Code::Call_m1632
            | Code::Call_m1664
    )
}

/// The code segment that IRET or RETF returns to.
fn return_code(core: &mut Core, bus: &dyn Bus, selector: u16) -> Result<Descriptor, Exception> {
    if is_null(selector) {
        return Err(Exception::general_protection(0));
    }
    let bad = Exception::general_protection(selector_code(selector));
    let code = segment::read_descriptor(core, bus, selector)?.ok_or(bad)?;
    let rpl = (selector & 3) as u8;
    let wrong_level = if code.is_conforming() {
        code.dpl() > rpl
    } else {
        code.dpl() != rpl
    };
    if !code.is_code() || rpl < core.state.cpl || wrong_level {
        return Err(bad);
    }
    if !code.present() {
        return Err(Exception::not_present(selector_code(selector)));
    }
    require_runnable(code, selector)?;
    Ok(code)
}

/// The stack segment that IRET or RETF to privilege `rpl` pops. 64-bit code below ring 3
/// may have a null one.
fn return_stack(
    core: &mut Core,
    bus: &dyn Bus,
    selector: u16,
    rpl: u8,
) -> Result<Segment, Exception> {
    if is_null(selector) {
        if rpl == 3 || (selector & 3) as u8 != rpl {
            return Err(Exception::general_protection(0));
        }
        return Ok(Segment::null_stack(rpl));
    }
    checked_stack(core, bus, selector, rpl)
}

fn enter_code(core: &mut Core, code: Descriptor, selector: u16, cpl: u8, rip: u64) {
    core.state.segments[index::CS] = code.segment(selector & !3 | u16::from(cpl));
    core.state.cpl = cpl;
    core.state.rip = rip;
}

/// IRET in 64-bit mode: always pops all five values.
pub(super) fn iret(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Result<Flow, Exception> {
    // even if it faults
    core.state.nmi_blocked = false;
    if core.state.system_flags & rflags::NT != 0 {
        return Err(Exception::general_protection(0));
    }
    let size = match instr.mnemonic() {
        Mnemonic::Iret => 2,
        Mnemonic::Iretd => 4,
        _ => 8,
    };
    let mut frame = [0; 40];
    let frame = &mut frame[..5 * size];
    Address::stack(core.state.gpr[gpr::RSP]).read_into(core, bus, frame)?;
    let value = |at: usize| {
        let bytes = &frame[at * size..][..size];
        bytes
            .iter()
            .rev()
            .fold(0_u64, |value, byte| value << 8 | u64::from(*byte))
    };
    let (rip, cs, image, rsp, ss) = (
        value(0),
        value(1) as u16,
        value(2),
        value(3),
        value(4) as u16,
    );

    let code = return_code(core, bus, cs)?;
    let rpl = (cs & 3) as u8;
    if !Core::canonical(rip) {
        return Err(Exception::general_protection(0));
    }
    let stack = return_stack(core, bus, ss, rpl)?;
    let code = code.mark_accessed(core, bus)?;

    let mut mask = flags::changeable(core);
    if size == 2 {
        mask &= 0xffff;
    }
    let outer = rpl > core.state.cpl;
    core.state.segments[index::SS] = stack;
    core.state.gpr[gpr::RSP] = rsp;
    enter_code(core, code, cs, rpl, rip);
    flags::set(core, image, mask);
    if outer {
        segment::drop_privileged(core);
    }
    Ok(Flow::Jump)
}

/// Size of the offset in a far pointer or far return.
fn far_size(code: Code) -> usize {
    match code {
        Code::Jmp_m1616 | Code::Call_m1616 | Code::Retfw | Code::Retfw_imm16 => 2,
        Code::Jmp_m1632 | Code::Call_m1632 | Code::Retfd | Code::Retfd_imm16 => 4,
        _ => 8,
    }
}

/// RETF, with or without an immediate.
pub(super) fn far_return(
    core: &mut Core,
    bus: &dyn Bus,
    instr: &Instruction,
) -> Result<Flow, Exception> {
    let size = far_size(instr.code());
    let release = if instr.op_count() == 1 {
        u64::from(instr.immediate16())
    } else {
        0
    };
    let rip = core.peek(bus, 0, size)?;
    let cs = core.peek(bus, 1, size)? as u16;
    let code = return_code(core, bus, cs)?;
    let rpl = (cs & 3) as u8;
    if !Core::canonical(rip) {
        return Err(Exception::general_protection(0));
    }
    let above = core.state.gpr[gpr::RSP]
        .wrapping_add(2 * size as u64)
        .wrapping_add(release);
    if rpl == core.state.cpl {
        let code = code.mark_accessed(core, bus)?;
        core.state.gpr[gpr::RSP] = above;
        enter_code(core, code, cs, rpl, rip);
        return Ok(Flow::Jump);
    }
    let rsp = Address::stack(above).read_uint(core, bus, size)?;
    let ss = Address::stack(above.wrapping_add(size as u64)).read_uint(core, bus, size)? as u16;
    let stack = return_stack(core, bus, ss, rpl)?;
    let code = code.mark_accessed(core, bus)?;
    core.state.segments[index::SS] = stack;
    core.state.gpr[gpr::RSP] = rsp.wrapping_add(release);
    enter_code(core, code, cs, rpl, rip);
    segment::drop_privileged(core);
    Ok(Flow::Jump)
}

/// Reads the far pointer of a JMP or CALL and checks the code segment it names. Call gates
/// are not run.
fn far_target(
    core: &mut Core,
    bus: &dyn Bus,
    instr: &Instruction,
) -> Result<(Descriptor, u16, u64), Exception> {
    let size = far_size(instr.code());
    let pointer = Address::of(core, instr);
    let rip = pointer.read_uint(core, bus, size)?;
    let selector = pointer.plus(size as u64).read_uint(core, bus, 2)? as u16;
    if is_null(selector) {
        return Err(Exception::general_protection(0));
    }
    let bad = Exception::general_protection(selector_code(selector));
    let code = segment::read_descriptor(core, bus, selector)?.ok_or(bad)?;
    let cpl = core.state.cpl;
    let allowed = if code.is_conforming() {
        code.dpl() <= cpl
    } else {
        (selector & 3) as u8 <= cpl && code.dpl() == cpl
    };
    if !code.is_code() || !allowed {
        return Err(bad);
    }
    if !code.present() {
        return Err(Exception::not_present(selector_code(selector)));
    }
    require_runnable(code, selector)?;
    if !Core::canonical(rip) {
        return Err(Exception::general_protection(0));
    }
    Ok((code, selector, rip))
}

pub(super) fn far_jump(
    core: &mut Core,
    bus: &dyn Bus,
    instr: &Instruction,
) -> Result<Flow, Exception> {
    let (code, selector, rip) = far_target(core, bus, instr)?;
    let code = code.mark_accessed(core, bus)?;
    let cpl = core.state.cpl;
    enter_code(core, code, selector, cpl, rip);
    Ok(Flow::Jump)
}

pub(super) fn far_call(
    core: &mut Core,
    bus: &dyn Bus,
    instr: &Instruction,
) -> Result<Flow, Exception> {
    let (code, selector, rip) = far_target(core, bus, instr)?;
    let code = code.mark_accessed(core, bus)?;
    let size = far_size(instr.code());
    let cs = u64::from(core.state.segments[index::CS].selector);
    let mut frame = [0; 16];
    frame[..size].copy_from_slice(&instr.next_ip().to_le_bytes()[..size]);
    frame[size..2 * size].copy_from_slice(&cs.to_le_bytes()[..size]);
    core.push_values(bus, &frame[..2 * size], size)?;
    let cpl = core.state.cpl;
    enter_code(core, code, selector, cpl, rip);
    Ok(Flow::Jump)
}
