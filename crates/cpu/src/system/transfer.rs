//! Far control transfers in protected mode, 64-bit mode and between them: IRET, far JMP,
//! CALL and RET (Intel SDM vol. 2A, vol. 3A §5.8). Gates are in `gate`, real and
//! virtual-8086 mode in `real`.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::memory::Address;
use super::segment::{self, Descriptor, checked_stack, is_null, require_runnable, selector_code};
use super::{Flow, flags, gate, real};
use crate::bus::Bus;
use crate::exception::Exception;
use crate::mmu::Core;
use crate::state::{Segment, rflags, segment as index};

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
            | Code::Jmp_ptr1616
            | Code::Jmp_ptr1632
            | Code::Call_ptr1616
            | Code::Call_ptr1632
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
    require_runnable(core, code, selector)?;
    Ok(code)
}

/// The stack segment that IRET or RETF to `code` at privilege `rpl` pops. 64-bit code below
/// ring 3 may have a null one.
fn return_stack(
    core: &mut Core,
    bus: &dyn Bus,
    selector: u16,
    code: Descriptor,
    rpl: u8,
) -> Result<Segment, Exception> {
    if is_null(selector) {
        if rpl == 3 || !code.is_long(core) || (selector & 3) as u8 != rpl {
            return Err(Exception::general_protection(0));
        }
        return Ok(Segment::null_stack(rpl));
    }
    checked_stack(core, bus, selector, rpl)
}

/// What RIP becomes when `code` is entered at `target`, which must lie in it.
pub(super) fn checked_target(
    core: &Core,
    code: Descriptor,
    target: u64,
    error: u32,
) -> Result<u64, Exception> {
    if code.is_long(core) {
        if Core::canonical(target) {
            return Ok(target);
        }
    } else if target & 0xffff_ffff <= u64::from(code.limit()) {
        return Ok(target & 0xffff_ffff);
    }
    Err(Exception::general_protection(error))
}

pub(super) fn enter_code(core: &mut Core, code: Descriptor, selector: u16, cpl: u8, rip: u64) {
    core.state.segments[index::CS] = code.segment(selector & !3 | u16::from(cpl));
    core.state.cpl = cpl;
    core.state.rip = rip;
}

/// What IRET pops in 64-bit mode always, else when it leaves its ring.
#[derive(Clone, Copy, Default)]
pub(super) struct Frame {
    pub(super) rip: u64,
    pub(super) cs: u16,
    pub(super) flags: u64,
    pub(super) rsp: u64,
    pub(super) ss: u16,
}

/// Reads `count` values from the top of the stack.
pub(super) fn read_frame(
    core: &mut Core,
    bus: &dyn Bus,
    size: usize,
    count: u64,
) -> Result<Frame, Exception> {
    let mut values = [0; 5];
    if core.state.is_long_code() {
        let mut bytes = [0; 40];
        let bytes = &mut bytes[..size * count as usize];
        core.stack_at(core.stack_pointer())
            .read_into(core, bus, bytes)?;
        for (value, part) in values.iter_mut().zip(bytes.chunks_exact(size)) {
            let mut whole = [0; 8];
            whole[..size].copy_from_slice(part);
            *value = u64::from_le_bytes(whole);
        }
    } else {
        read_values(core, bus, size, &mut values[..count as usize])?;
    }
    let [rip, cs, flags, rsp, ss] = values;
    Ok(Frame {
        rip,
        cs: cs as u16,
        flags,
        rsp,
        ss: ss as u16,
    })
}

/// Reads values one by one: a 16-bit stack may wrap between them.
pub(super) fn read_values(
    core: &mut Core,
    bus: &dyn Bus,
    size: usize,
    values: &mut [u64],
) -> super::Done {
    for (at, value) in (0..).zip(values) {
        *value = core.peek(bus, at, size)?;
    }
    Ok(())
}

/// The operand size of IRET.
pub(super) fn iret_size(instr: &Instruction) -> usize {
    match instr.mnemonic() {
        Mnemonic::Iret => 2,
        Mnemonic::Iretd => 4,
        _ => 8,
    }
}

/// IRET.
pub(super) fn iret(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Result<Flow, Exception> {
    let size = iret_size(instr);
    if core.state.is_real() {
        return real::iret(core, bus, size);
    }
    let long = core.state.is_long_mode();
    if core.state.system_flags & rflags::NT != 0 {
        core.state.nmi_blocked = false;
        if long {
            return Err(Exception::general_protection(0));
        }
        return Ok(Flow::Fatal(gate::TASK_SWITCH.into()));
    }
    let long_code = core.state.is_long_code();
    // even if it faults
    core.state.nmi_blocked = false;
    let mut frame = read_frame(core, bus, size, if long_code { 5 } else { 3 })?;
    if !long && core.state.cpl == 0 && size == 4 && frame.flags & rflags::VM != 0 {
        return real::iret_to_virtual_8086(core, bus, frame);
    }
    let code = return_code(core, bus, frame.cs)?;
    let rpl = (frame.cs & 3) as u8;
    let outer = rpl > core.state.cpl;
    if outer && !long_code {
        frame = read_frame(core, bus, size, 5)?;
    }
    let rip = checked_target(core, code, frame.rip, 0)?;
    let stack = if outer || long_code {
        Some(return_stack(core, bus, frame.ss, code, rpl)?)
    } else {
        None
    };
    let code = code.mark_accessed(core, bus)?;

    let mut mask = flags::changeable(core);
    if size == 2 {
        mask &= 0xffff;
    }
    if stack.is_none() {
        core.drop_stack(3 * size as u64);
    }
    enter_code(core, code, frame.cs, rpl, rip);
    if let Some(stack) = stack {
        core.state.segments[index::SS] = stack;
        core.set_stack_pointer(frame.rsp);
    }
    flags::set(core, frame.flags, mask);
    flags::set_resume(core, frame.flags, size);
    if outer {
        segment::drop_privileged(core);
    }
    Ok(Flow::Jump)
}

/// Size of the offset in a far pointer or far return.
pub(super) fn far_size(code: Code) -> usize {
    match code {
        Code::Jmp_m1616
        | Code::Call_m1616
        | Code::Retfw
        | Code::Retfw_imm16
        | Code::Jmp_ptr1616
        | Code::Call_ptr1616 => 2,
        Code::Jmp_m1632
        | Code::Call_m1632
        | Code::Retfd
        | Code::Retfd_imm16
        | Code::Jmp_ptr1632
        | Code::Call_ptr1632 => 4,
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
    if core.state.is_real() {
        real::enter(core, cs, rip)?;
        core.drop_stack(2 * size as u64 + release);
        return Ok(Flow::Jump);
    }
    let code = return_code(core, bus, cs)?;
    let rpl = (cs & 3) as u8;
    let target = checked_target(core, code, rip, 0)?;
    let dropped = 2 * size as u64 + release;
    if rpl == core.state.cpl {
        let code = code.mark_accessed(core, bus)?;
        core.drop_stack(dropped);
        enter_code(core, code, cs, rpl, target);
        return Ok(Flow::Jump);
    }
    let above = core.stack_pointer().wrapping_add(dropped);
    let rsp = core.stack_at(above).read_uint(core, bus, size)?;
    let above = above.wrapping_add(size as u64);
    let ss = core.stack_at(above).read_uint(core, bus, size)? as u16;
    let stack = return_stack(core, bus, ss, code, rpl)?;
    let code = code.mark_accessed(core, bus)?;
    enter_code(core, code, cs, rpl, target);
    core.state.segments[index::SS] = stack;
    core.set_stack_pointer(rsp.wrapping_add(release));
    segment::drop_privileged(core);
    Ok(Flow::Jump)
}

/// The far pointer of a JMP or CALL: selector and offset.
fn far_pointer(
    core: &mut Core,
    bus: &dyn Bus,
    instr: &Instruction,
) -> Result<(u16, u64), Exception> {
    match instr.op0_kind() {
        OpKind::FarBranch16 => Ok((instr.far_branch_selector(), u64::from(instr.far_branch16()))),
        OpKind::FarBranch32 => Ok((instr.far_branch_selector(), u64::from(instr.far_branch32()))),
        _ => {
            let size = far_size(instr.code());
            let pointer = Address::of(core, instr);
            let offset = pointer.read_uint(core, bus, size)?;
            let selector = pointer.plus(size as u64).read_uint(core, bus, 2)? as u16;
            Ok((selector, offset))
        }
    }
}

/// What the selector of a far JMP or CALL names.
enum Named {
    Code(Descriptor),
    System(Descriptor),
}

fn named(core: &mut Core, bus: &dyn Bus, selector: u16) -> Result<Named, Exception> {
    if is_null(selector) {
        return Err(Exception::general_protection(0));
    }
    let bad = Exception::general_protection(selector_code(selector));
    let found = segment::read_descriptor(core, bus, selector)?.ok_or(bad)?;
    if found.is_system() {
        return Ok(Named::System(found));
    }
    let cpl = core.state.cpl;
    let allowed = if found.is_conforming() {
        found.dpl() <= cpl
    } else {
        (selector & 3) as u8 <= cpl && found.dpl() == cpl
    };
    if !found.is_code() || !allowed {
        return Err(bad);
    }
    if !found.present() {
        return Err(Exception::not_present(selector_code(selector)));
    }
    require_runnable(core, found, selector)?;
    Ok(Named::Code(found))
}

pub(super) fn far_jump(
    core: &mut Core,
    bus: &dyn Bus,
    instr: &Instruction,
) -> Result<Flow, Exception> {
    let (selector, offset) = far_pointer(core, bus, instr)?;
    if core.state.is_real() {
        real::enter(core, selector, offset)?;
        return Ok(Flow::Jump);
    }
    let code = match named(core, bus, selector)? {
        Named::System(found) => return gate::jump(core, bus, selector, found),
        Named::Code(code) => code,
    };
    let rip = checked_target(core, code, offset, 0)?;
    let code = code.mark_accessed(core, bus)?;
    let cpl = core.state.cpl;
    enter_code(core, code, selector, cpl, rip);
    Ok(Flow::Jump)
}

/// Pushes CS and RIP as a far call of `size` bytes does.
pub(super) fn push_return(core: &mut Core, bus: &dyn Bus, rip: u64, size: usize) -> super::Done {
    let cs = u64::from(core.state.segments[index::CS].selector);
    let mut frame = [0; 16];
    frame[..size].copy_from_slice(&rip.to_le_bytes()[..size]);
    frame[size..2 * size].copy_from_slice(&cs.to_le_bytes()[..size]);
    core.push_values(bus, &frame[..2 * size], size)
}

pub(super) fn far_call(
    core: &mut Core,
    bus: &dyn Bus,
    instr: &Instruction,
) -> Result<Flow, Exception> {
    let size = far_size(instr.code());
    let (selector, offset) = far_pointer(core, bus, instr)?;
    if core.state.is_real() {
        real::check(core, offset)?;
        push_return(core, bus, instr.next_ip(), size)?;
        real::enter(core, selector, offset)?;
        return Ok(Flow::Jump);
    }
    let code = match named(core, bus, selector)? {
        Named::System(found) => {
            return gate::call(core, bus, selector, found, instr.next_ip());
        }
        Named::Code(code) => code,
    };
    let rip = checked_target(core, code, offset, 0)?;
    let code = code.mark_accessed(core, bus)?;
    push_return(core, bus, instr.next_ip(), size)?;
    let cpl = core.state.cpl;
    enter_code(core, code, selector, cpl, rip);
    Ok(Flow::Jump)
}
