//! Delivery of exceptions and interrupts outside of IA-32e mode: through 16- and 32-bit
//! gates in protected and virtual-8086 mode (Intel SDM vol. 3A §6.11, §6.12), through the
//! vector table in real mode. Called by `deliver` alone. Task gates end the machine.

use super::deliver::Event;
use super::gate::{self, Stack, TASK_SWITCH};
use super::segment::{self, Descriptor, selector_code};
use super::transfer::enter_code;
use super::{Done, real};
use crate::bus::Bus;
use crate::exception::Exception;
use crate::mmu::{Core, Privilege};
use crate::state::{Segment, cr0, rflags, segment as index};

const TASK_GATE: u8 = 5;

/// A 16- or 32-bit gate of the IDT.
struct Gate {
    selector: u16,
    offset: u64,
    /// Bytes of a value on the stack: 2 or 4.
    size: usize,
    interrupt: bool,
}

/// Enters the handler of `event`, or changes nothing.
pub(super) fn enter(core: &mut Core, bus: &dyn Bus, event: &Event) -> Done {
    if core.state.cr0 & cr0::PE == 0 {
        return real::interrupt(core, bus, event.vector, event.rip);
    }
    let ext = u32::from(!event.software);
    let gate = read_gate(core, bus, event, ext)?;
    let code = handler(core, bus, &gate, ext)?;
    if gate.offset > u64::from(code.limit()) {
        return Err(Exception::general_protection(ext));
    }
    let cpl = core.state.cpl;
    let inner = !code.is_conforming() && code.dpl() < cpl;
    let new_cpl = if inner { code.dpl() } else { cpl };
    let virtual_8086 = core.state.is_virtual_8086();
    if virtual_8086 && new_cpl != 0 {
        return Err(Exception::general_protection(
            selector_code(gate.selector) | ext,
        ));
    }
    let stack = if inner {
        gate::inner_stack(core, bus, new_cpl, ext)?
    } else {
        Stack {
            segment: core.state.segments[index::SS],
            pointer: core.stack_pointer(),
        }
    };
    let values = frame(core, event, inner);
    let code = code.mark_accessed(core, bus)?;
    let pointer = push(core, bus, &stack, &values, gate.size, inner)?;
    if inner {
        core.state.segments[index::SS] = stack.segment;
    }
    if virtual_8086 {
        for number in [index::ES, index::DS, index::FS, index::GS] {
            segment::install_number(core, number, Segment::default());
        }
    }
    core.state.system_flags &= !(rflags::TF | rflags::NT | rflags::RF | rflags::VM);
    if gate.interrupt {
        core.state.system_flags &= !rflags::IF;
    }
    enter_code(core, code, gate.selector, new_cpl, gate.offset);
    core.set_stack_pointer(pointer);
    core.state.interrupt_shadow = false;
    Ok(())
}

fn read_gate(core: &mut Core, bus: &dyn Bus, event: &Event, ext: u32) -> Result<Gate, Exception> {
    let error = u32::from(event.vector) << 3 | 2 | ext;
    let bad = Exception::general_protection(error);
    let offset = u64::from(event.vector) * 8;
    if offset + 7 > u64::from(core.state.idtr.limit) {
        return Err(bad);
    }
    let at = core.state.idtr.base.wrapping_add(offset) & 0xffff_ffff;
    let raw = core.read_u64(bus, at, Privilege::Supervisor)?;
    let access = (raw >> 40) as u8;
    let kind = access & 0x1f;
    if !matches!(kind, TASK_GATE | 6 | 7 | 0xe | 0xf) {
        return Err(bad);
    }
    if event.software && (access >> 5 & 3) < core.state.cpl {
        return Err(bad);
    }
    if access & 0x80 == 0 {
        return Err(Exception::not_present(error));
    }
    if kind == TASK_GATE {
        core.fatal = Some(TASK_SWITCH);
        return Err(bad);
    }
    let wide = kind & 8 != 0;
    let high = if wide { raw >> 32 & 0xffff_0000 } else { 0 };
    Ok(Gate {
        selector: (raw >> 16) as u16,
        offset: raw & 0xffff | high,
        size: if wide { 4 } else { 2 },
        interrupt: kind & 1 == 0,
    })
}

fn handler(core: &mut Core, bus: &dyn Bus, gate: &Gate, ext: u32) -> Result<Descriptor, Exception> {
    if segment::is_null(gate.selector) {
        return Err(Exception::general_protection(ext));
    }
    let error = selector_code(gate.selector) | ext;
    let bad = Exception::general_protection(error);
    let code = segment::read_descriptor(core, bus, gate.selector)?.ok_or(bad)?;
    if !code.is_code() || code.dpl() > core.state.cpl {
        return Err(bad);
    }
    if !code.present() {
        return Err(Exception::not_present(error));
    }
    Ok(code)
}

/// What the handler finds on its stack, the last pushed first.
fn frame(core: &Core, event: &Event, inner: bool) -> Vec<u64> {
    let state = &core.state;
    let selector = |number: usize| u64::from(state.segments[number].selector);
    let mut image = state.rflags();
    if event.resume {
        image |= rflags::RF;
    }
    let mut values = Vec::with_capacity(10);
    values.extend(event.error_code.map(u64::from));
    values.extend([event.rip, selector(index::CS), image]);
    if inner {
        values.extend([state.gpr[crate::state::gpr::RSP], selector(index::SS)]);
    }
    if state.is_virtual_8086() {
        values.extend([index::ES, index::DS, index::FS, index::GS].map(selector));
    }
    values
}

fn push(
    core: &mut Core,
    bus: &dyn Bus,
    stack: &Stack,
    values: &[u64],
    size: usize,
    inner: bool,
) -> Result<u64, Exception> {
    if inner {
        return gate::push(core, bus, stack, values, size);
    }
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|value| value.to_le_bytes().into_iter().take(size))
        .collect();
    let pointer = stack.pointer.wrapping_sub(bytes.len() as u64) & stack.segment.stack_mask();
    core.stack_at(pointer).write(core, bus, &bytes)?;
    Ok(pointer)
}
