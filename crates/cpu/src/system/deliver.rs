//! Delivery of exceptions and interrupts through the 64-bit IDT (Intel SDM vol. 3A §6.14),
//! with double and triple faults (§6.15, #DF).
//!
//! Called by the engine between instructions and by INT n. An event that cannot be
//! delivered leaves the state as it was, but for CR2.

use super::segment::{self, Descriptor};
use super::{Flow, deliver_legacy, real};
use crate::bus::Bus;
use crate::exception::{Exception, vector};
use crate::mmu::{Core, Privilege};
use crate::state::{Segment, efer, gpr, rflags, segment as index};

/// A fault while delivering #DF: the CPU shuts down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TripleFault;

/// DR6.BS: single step.
const DR6_BS: u64 = 1 << 14;
/// DR7.GD: general detect.
pub(super) const DR7_GD: u64 = 1 << 13;

/// Something to deliver.
#[derive(Clone, Copy, Debug)]
pub(super) struct Event {
    pub(super) vector: u8,
    pub(super) error_code: Option<u32>,
    /// RIP to push.
    pub(super) rip: u64,
    /// INT n, INT3: the gate's DPL counts and the EXT bit does not.
    pub(super) software: bool,
    /// Push RF set: the instruction is to be restarted.
    pub(super) resume: bool,
}

/// A 64-bit gate of the IDT.
struct Gate {
    selector: u16,
    offset: u64,
    ist: u8,
    interrupt: bool,
}

/// Where an event goes, found before anything is changed.
struct Entry {
    code: Descriptor,
    selector: u16,
    cpl: u8,
    rsp: u64,
}

/// What comes of a fault during the delivery of another (Intel SDM vol. 3A, table 6-5).
fn combine(first: u8, second: Exception) -> Result<Exception, TripleFault> {
    let contributory = |v| {
        matches!(
            v,
            vector::DE | vector::TS | vector::NP | vector::SS | vector::GP
        )
    };
    if first == vector::DF {
        return Err(TripleFault);
    }
    let double = match first {
        vector::PF => second.vector == vector::PF || contributory(second.vector),
        first if contributory(first) => contributory(second.vector),
        _ => false,
    };
    Ok(if double {
        Exception::with_code(vector::DF, 0)
    } else {
        second
    })
}

fn is_fault(vector: u8) -> bool {
    !matches!(
        vector,
        vector::DB | vector::NMI | vector::BP | vector::OF | vector::DF
    )
}

fn deliver(core: &mut Core, bus: &dyn Bus, mut event: Event) -> Result<(), TripleFault> {
    loop {
        let Err(next) = enter(core, bus, &event) else {
            return Ok(());
        };
        if core.fatal.is_some() {
            return Err(TripleFault);
        }
        if let Some(address) = next.address {
            core.state.cr2 = address;
        }
        let next = combine(event.vector, next)?;
        event = Event {
            vector: next.vector,
            error_code: next.error_code,
            software: false,
            resume: is_fault(next.vector),
            ..event
        };
    }
}

/// Delivers an exception that the instruction at `state.rip` raised.
pub(crate) fn deliver_exception(
    core: &mut Core,
    bus: &dyn Bus,
    exception: Exception,
) -> Result<(), TripleFault> {
    if let Some(address) = exception.address {
        core.state.cr2 = address;
    }
    if exception.vector == vector::DB {
        core.state.dr[5] &= !DR7_GD;
    }
    let event = Event {
        vector: exception.vector,
        error_code: exception.error_code,
        rip: core.state.rip,
        software: false,
        resume: is_fault(exception.vector),
    };
    deliver(core, bus, event)
}

/// Delivers an external interrupt, or an NMI if `vector` is 2, between instructions.
pub(crate) fn deliver_interrupt(
    core: &mut Core,
    bus: &dyn Bus,
    vector: u8,
) -> Result<(), TripleFault> {
    if vector == vector::NMI {
        core.state.nmi_blocked = true;
    }
    let event = Event {
        vector,
        error_code: None,
        rip: core.state.rip,
        software: false,
        resume: false,
    };
    deliver(core, bus, event)
}

/// Delivers #DB after an instruction that hit the breakpoints in `hits` (bits of DR6), or,
/// if `step`, that ran with RFLAGS.TF set.
pub(crate) fn deliver_debug_trap(
    core: &mut Core,
    bus: &dyn Bus,
    hits: u64,
    step: bool,
) -> Result<(), TripleFault> {
    core.state.dr[4] |= hits | if step { DR6_BS } else { 0 };
    deliver_exception(core, bus, Exception::new(vector::DB))
}

/// INT n and INT3. A fault on the way is the instruction's own.
pub(super) fn software_interrupt(
    core: &mut Core,
    bus: &dyn Bus,
    vector: u8,
    next_ip: u64,
) -> Result<Flow, Exception> {
    let event = Event {
        vector,
        error_code: None,
        rip: next_ip,
        software: true,
        resume: false,
    };
    real::require_iopl(core).or_else(|e| if vector == 3 { Ok(()) } else { Err(e) })?;
    enter(core, bus, &event)?;
    Ok(Flow::Jump)
}

/// INT1: a #DB that no gate DPL stops and that DR6 does not tell of.
pub(super) fn int1(core: &mut Core, bus: &dyn Bus, next_ip: u64) -> Result<Flow, Exception> {
    let event = Event {
        vector: vector::DB,
        error_code: None,
        rip: next_ip,
        software: false,
        resume: false,
    };
    enter(core, bus, &event)?;
    core.state.dr[5] &= !DR7_GD;
    Ok(Flow::Jump)
}

fn read_gate(core: &mut Core, bus: &dyn Bus, event: &Event, ext: u32) -> Result<Gate, Exception> {
    let code = u32::from(event.vector) << 3 | 2 | ext;
    let offset = u64::from(event.vector) * 16;
    if offset + 15 > u64::from(core.state.idtr.limit) {
        return Err(Exception::general_protection(code));
    }
    let base = core.state.idtr.base.wrapping_add(offset);
    let raw = u128::from_le_bytes(core.read_bytes(bus, base, Privilege::Supervisor)?);
    let low = raw as u64;
    let attributes = (low >> 40) as u8;
    // S and type: 64-bit interrupt or trap gate
    if !matches!(attributes & 0x1f, 0xe | 0xf) {
        return Err(Exception::general_protection(code));
    }
    if event.software && (attributes >> 5 & 3) < core.state.cpl {
        return Err(Exception::general_protection(code));
    }
    if attributes & 0x80 == 0 {
        return Err(Exception::not_present(code));
    }
    Ok(Gate {
        selector: (low >> 16) as u16,
        offset: low & 0xffff | low >> 32 & 0xffff_0000 | (raw >> 64 << 32) as u64,
        ist: (low >> 32 & 7) as u8,
        interrupt: attributes & 1 == 0,
    })
}

/// Reads a stack pointer from the TSS.
fn tss_stack(core: &mut Core, bus: &dyn Bus, offset: u64, ext: u32) -> Result<u64, Exception> {
    let tr = core.state.tr;
    if offset + 7 > u64::from(tr.limit) {
        return Err(Exception::invalid_tss(u32::from(tr.selector & !3) | ext));
    }
    let rsp = core.read_u64(bus, tr.base.wrapping_add(offset), Privilege::Supervisor)?;
    if !Core::canonical(rsp) {
        return Err(Exception::stack_fault(ext));
    }
    Ok(rsp)
}

fn find_entry(core: &mut Core, bus: &dyn Bus, gate: &Gate, ext: u32) -> Result<Entry, Exception> {
    let bad = Exception::general_protection(u32::from(gate.selector & !3) | ext);
    if gate.selector & !3 == 0 {
        return Err(Exception::general_protection(ext));
    }
    let code = segment::read_descriptor(core, bus, gate.selector)?.ok_or(bad)?;
    let cpl = core.state.cpl;
    if !code.is_code() || code.dpl() > cpl || !code.is_64_bit() {
        return Err(bad);
    }
    if !code.present() {
        return Err(Exception::not_present(u32::from(gate.selector & !3) | ext));
    }
    let new_cpl = if code.is_conforming() {
        cpl
    } else {
        code.dpl()
    };
    let rsp = if gate.ist != 0 {
        tss_stack(core, bus, 0x24 + (u64::from(gate.ist) - 1) * 8, ext)?
    } else if new_cpl != cpl {
        tss_stack(core, bus, 4 + u64::from(new_cpl) * 8, ext)?
    } else {
        core.state.gpr[gpr::RSP]
    };
    if !Core::canonical(gate.offset) {
        return Err(Exception::general_protection(ext));
    }
    Ok(Entry {
        code,
        selector: gate.selector & !3 | u16::from(new_cpl),
        cpl: new_cpl,
        rsp: rsp & !15,
    })
}

/// Enters the handler of `event`, or changes nothing.
fn enter(core: &mut Core, bus: &dyn Bus, event: &Event) -> Result<(), Exception> {
    let ext = u32::from(!event.software);
    if core.state.efer & efer::LMA == 0 {
        return deliver_legacy::enter(core, bus, event);
    }
    let gate = read_gate(core, bus, event, ext)?;
    let entry = find_entry(core, bus, &gate, ext)?;

    // set only where IRET has set it for the next instruction
    let mut image = core.state.rflags();
    if event.resume {
        image |= rflags::RF;
    }
    let values = [
        u64::from(event.error_code.unwrap_or(0)),
        event.rip,
        u64::from(core.state.segments[index::CS].selector),
        image,
        core.state.gpr[gpr::RSP],
        u64::from(core.state.segments[index::SS].selector),
    ];
    let mut frame = [0; 48];
    for (slot, value) in frame.chunks_exact_mut(8).zip(values) {
        slot.copy_from_slice(&value.to_le_bytes());
    }
    let frame = if event.error_code.is_some() {
        &frame[..]
    } else {
        &frame[8..]
    };
    let rsp = entry.rsp.wrapping_sub(frame.len() as u64);
    let privilege = if entry.cpl == 3 {
        Privilege::Current
    } else {
        Privilege::Supervisor
    };
    let code = entry.code.mark_accessed(core, bus)?;
    core.write_linear(bus, rsp, frame, privilege).map_err(|e| {
        if e == Exception::general_protection(0) {
            Exception::stack_fault(ext)
        } else {
            e
        }
    })?;

    let state = &mut *core.state;
    if entry.cpl != state.cpl {
        state.segments[index::SS] = Segment::null_stack(entry.cpl);
    }
    state.segments[index::CS] = code.segment(entry.selector);
    state.cpl = entry.cpl;
    state.gpr[gpr::RSP] = rsp;
    state.rip = gate.offset;
    state.system_flags &= !(rflags::TF | rflags::NT | rflags::RF | rflags::VM);
    if gate.interrupt {
        state.system_flags &= !rflags::IF;
    }
    state.interrupt_shadow = false;
    Ok(())
}
