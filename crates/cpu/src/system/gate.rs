//! Call gates, and the stacks that the task state segment holds for inner rings (Intel SDM
//! vol. 3A §5.8.3 to §5.8.5, §7.2). Hardware task switches are not done.

use super::segment::{self, Descriptor, is_null, selector_code};
use super::transfer::{checked_target, enter_code, push_return};
use super::{Flow, transfer};
use crate::bus::Bus;
use crate::exception::{Exception, vector};
use crate::mmu::{Core, Privilege};
use crate::state::{Segment, gpr, segment as index};

/// What the machine says when the guest wants a hardware task switch.
pub(super) const TASK_SWITCH: &str = "the guest asks for a hardware task switch, which is not done";

const TYPE_TSS_16: u8 = 1;
const TYPE_CALL_16: u8 = 4;
const TYPE_TASK_GATE: u8 = 5;
const TYPE_TSS: u8 = 9;
const TYPE_CALL: u8 = 12;

/// A call gate.
struct Gate {
    selector: u16,
    offset: u64,
    /// Bytes of a value on the stack: 2, 4 or 8.
    size: usize,
    /// Values copied from the outer stack.
    count: u64,
}

/// Whether the selector leads to a task switch outside of IA-32e mode.
fn is_task(core: &Core, found: Descriptor) -> bool {
    !core.state.is_long_mode() && matches!(found.kind(), TYPE_TSS_16 | TYPE_TASK_GATE | TYPE_TSS)
}

fn read(
    core: &mut Core,
    bus: &dyn Bus,
    selector: u16,
    found: Descriptor,
) -> Result<Gate, Exception> {
    let bad = Exception::general_protection(selector_code(selector));
    let long = core.state.is_long_mode();
    let size = match found.kind() {
        TYPE_CALL if long => 8,
        TYPE_CALL => 4,
        TYPE_CALL_16 if !long => 2,
        _ => return Err(bad),
    };
    if found.dpl() < core.state.cpl.max((selector & 3) as u8) {
        return Err(bad);
    }
    let mut offset = found.raw() & 0xffff;
    if size > 2 {
        offset |= found.raw() >> 32 & 0xffff_0000;
    }
    if long {
        let upper = segment::read_upper(core, bus, selector)?.ok_or(bad)?;
        if upper >> 40 & 0x1f != 0 {
            return Err(bad);
        }
        offset |= upper << 32;
    }
    if !found.present() {
        return Err(Exception::not_present(selector_code(selector)));
    }
    Ok(Gate {
        selector: (found.raw() >> 16) as u16,
        offset,
        size,
        count: if long { 0 } else { found.raw() >> 32 & 31 },
    })
}

/// The code segment that a gate leads to.
fn target(core: &mut Core, bus: &dyn Bus, gate: &Gate) -> Result<Descriptor, Exception> {
    if is_null(gate.selector) {
        return Err(Exception::general_protection(0));
    }
    let bad = Exception::general_protection(selector_code(gate.selector));
    let code = segment::read_descriptor(core, bus, gate.selector)?.ok_or(bad)?;
    let wrong_mode = core.state.is_long_mode() && !code.is_64_bit();
    if !code.is_code() || code.dpl() > core.state.cpl || wrong_mode {
        return Err(bad);
    }
    if !code.present() {
        return Err(Exception::not_present(selector_code(gate.selector)));
    }
    Ok(code)
}

/// JMP through a gate.
pub(super) fn jump(
    core: &mut Core,
    bus: &dyn Bus,
    selector: u16,
    found: Descriptor,
) -> Result<Flow, Exception> {
    if is_task(core, found) {
        return Ok(Flow::Fatal(TASK_SWITCH.into()));
    }
    let gate = read(core, bus, selector, found)?;
    let code = target(core, bus, &gate)?;
    let cpl = core.state.cpl;
    if !code.is_conforming() && code.dpl() != cpl {
        return Err(Exception::general_protection(selector_code(gate.selector)));
    }
    let rip = checked_target(core, code, gate.offset, 0)?;
    let code = code.mark_accessed(core, bus)?;
    enter_code(core, code, gate.selector, cpl, rip);
    Ok(Flow::Jump)
}

/// CALL through a gate.
pub(super) fn call(
    core: &mut Core,
    bus: &dyn Bus,
    selector: u16,
    found: Descriptor,
    next_ip: u64,
) -> Result<Flow, Exception> {
    if is_task(core, found) {
        return Ok(Flow::Fatal(TASK_SWITCH.into()));
    }
    let gate = read(core, bus, selector, found)?;
    let code = target(core, bus, &gate)?;
    let cpl = core.state.cpl;
    let rip = checked_target(core, code, gate.offset, 0)?;
    if code.is_conforming() || code.dpl() == cpl {
        let code = code.mark_accessed(core, bus)?;
        // a gate of 8-byte values from compatibility mode pushes them there too
        push_return(core, bus, next_ip, gate.size)?;
        transfer::enter_code(core, code, gate.selector, cpl, rip);
        return Ok(Flow::Jump);
    }
    let new_cpl = code.dpl();
    let stack = inner_stack(core, bus, new_cpl, 0)?;
    let values = frame(core, bus, &gate, next_ip)?;
    let code = code.mark_accessed(core, bus)?;
    let pointer = push(core, bus, &stack, &values, gate.size)?;
    core.state.segments[index::SS] = stack.segment;
    enter_code(core, code, gate.selector, new_cpl, rip);
    if gate.size == 8 {
        core.state.gpr[gpr::RSP] = pointer;
    } else {
        core.set_stack_pointer(pointer);
    }
    Ok(Flow::Jump)
}

/// What a call to an inner ring leaves on the new stack, the last pushed first.
fn frame(core: &mut Core, bus: &dyn Bus, gate: &Gate, next_ip: u64) -> Result<Vec<u64>, Exception> {
    let mut values = vec![next_ip, u64::from(core.state.segments[index::CS].selector)];
    for at in 0..gate.count {
        values.push(core.peek(bus, at, gate.size)?);
    }
    values.push(core.state.gpr[gpr::RSP]);
    values.push(u64::from(core.state.segments[index::SS].selector));
    Ok(values)
}

/// A stack of an inner ring.
pub(super) struct Stack {
    pub(super) segment: Segment,
    pub(super) pointer: u64,
}

/// The stack for ring `cpl` from the task state segment. `ext` goes into error codes.
pub(super) fn inner_stack(
    core: &mut Core,
    bus: &dyn Bus,
    cpl: u8,
    ext: u32,
) -> Result<Stack, Exception> {
    let tr = core.state.tr;
    let bad = Exception::invalid_tss(u32::from(tr.selector & !3) | ext);
    let ring = u64::from(cpl);
    let at = |offset: u64, size: u64| {
        if offset + size - 1 > u64::from(tr.limit) {
            Err(bad)
        } else {
            Ok(tr.base.wrapping_add(offset))
        }
    };
    if core.state.is_long_mode() {
        let at = at(4 + ring * 8, 8)?;
        let pointer = core.read_u64(bus, at, Privilege::Supervisor)?;
        if !Core::canonical(pointer) {
            return Err(Exception::stack_fault(ext));
        }
        return Ok(Stack {
            segment: Segment::null_stack(cpl),
            pointer,
        });
    }
    // TSS types 9 and 11 have 32 bits
    let (pointer, selector) = if tr.attributes & 8 != 0 {
        let at = at(4 + ring * 8, 6)?;
        let raw = core.read_u64(bus, at, Privilege::Supervisor)?;
        (raw & 0xffff_ffff, (raw >> 32) as u16)
    } else {
        let at = at(2 + ring * 4, 4)?;
        let raw = u32::from_le_bytes(core.read_bytes(bus, at, Privilege::Supervisor)?);
        (u64::from(raw & 0xffff), (raw >> 16) as u16)
    };
    let segment = segment::checked_stack(core, bus, selector, cpl).map_err(|e| {
        let code = selector_code(selector) | ext;
        match e.vector {
            vector::GP => Exception::invalid_tss(code),
            vector::SS => Exception::stack_fault(code),
            _ => e,
        }
    })?;
    Ok(Stack { segment, pointer })
}

/// Writes `values`, the lowest first, below the top of an inner stack with the supervisor's
/// rights. Returns the new stack pointer.
pub(super) fn push(
    core: &mut Core,
    bus: &dyn Bus,
    stack: &Stack,
    values: &[u64],
    size: usize,
) -> Result<u64, Exception> {
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|value| value.to_le_bytes().into_iter().take(size))
        .collect();
    let length = bytes.len() as u64;
    if size == 8 {
        let pointer = stack.pointer.wrapping_sub(length);
        core.write_linear(bus, pointer, &bytes, Privilege::Supervisor)
            .map_err(|e| {
                if e == Exception::general_protection(0) {
                    Exception::stack_fault(0)
                } else {
                    e
                }
            })?;
        return Ok(pointer);
    }
    let mask = stack.segment.stack_mask();
    let pointer = stack.pointer.wrapping_sub(length) & mask;
    let error = Exception::stack_fault(selector_code(stack.segment.selector));
    let linear = stack.segment.linear(pointer, length, true).ok_or(error)?;
    core.write_linear(bus, linear, &bytes, Privilege::Supervisor)?;
    Ok(pointer)
}
