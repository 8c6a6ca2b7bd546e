//! Real mode and virtual-8086 mode (Intel SDM vol. 3B §21.1, §21.2): segment registers that
//! hold paragraph numbers, far transfers without descriptors, interrupts through the vector
//! table.

use super::transfer::Frame;
use super::{Done, Flow, flags};
use crate::bus::Bus;
use crate::exception::Exception;
use crate::mmu::{Core, Privilege};
use crate::state::{Segment, rflags, segment as index};

/// Attributes of every segment in virtual-8086 mode: present, ring 3, writable data.
const VIRTUAL_8086: u16 = 0x00f3;
/// The flags that IRET changes in real mode, beside the 16-bit ones: AC, ID.
const HIGH_FLAGS: u64 = rflags::AC | rflags::ID;
/// The flags that 16-bit IRET and POPF change in real mode.
const LOW_FLAGS: u64 =
    rflags::STATUS | rflags::TF | rflags::IF | rflags::DF | rflags::IOPL | rflags::NT;

/// What loading `selector` makes of a segment register. Real mode keeps limit and rights
/// from before.
pub(super) fn segment(core: &Core, number: usize, selector: u16) -> Segment {
    let base = u64::from(selector) << 4;
    if core.state.is_virtual_8086() {
        return Segment {
            base,
            limit: 0xffff,
            selector,
            attributes: VIRTUAL_8086,
        };
    }
    Segment {
        base,
        selector,
        ..core.state.segments[number]
    }
}

/// Checks that code at `offset` lies within the code segment.
pub(super) fn check(core: &Core, offset: u64) -> Done {
    if offset > u64::from(core.state.segments[index::CS].limit) {
        return Err(Exception::general_protection(0));
    }
    Ok(())
}

/// Goes on at `selector:offset`.
pub(super) fn enter(core: &mut Core, selector: u16, offset: u64) -> Done {
    check(core, offset)?;
    core.state.segments[index::CS] = segment(core, index::CS, selector);
    core.state.rip = offset;
    Ok(())
}

/// Raises #GP(0) in virtual-8086 mode with IOPL below 3: CLI, STI, PUSHF, POPF, INT n, IRET.
pub(super) fn require_iopl(core: &Core) -> Done {
    let iopl = core.state.system_flags & rflags::IOPL;
    if core.state.is_virtual_8086() && iopl != rflags::IOPL {
        return Err(Exception::general_protection(0));
    }
    Ok(())
}

/// IRET in real mode or virtual-8086 mode.
pub(super) fn iret(core: &mut Core, bus: &dyn Bus, size: usize) -> Result<Flow, Exception> {
    require_iopl(core)?;
    core.state.nmi_blocked = false;
    let Frame { rip, cs, flags, .. } = super::transfer::read_frame(core, bus, size, 3)?;
    let mut mask = if size == 2 {
        LOW_FLAGS
    } else {
        LOW_FLAGS | HIGH_FLAGS
    };
    if core.state.is_virtual_8086() {
        mask &= !rflags::IOPL;
    }
    enter(core, cs, rip)?;
    core.drop_stack(3 * size as u64);
    flags::set(core, flags, mask);
    flags::set_resume(core, flags, size);
    Ok(Flow::Jump)
}

/// IRETD in ring 0 of protected mode with VM set in the image.
pub(super) fn iret_to_virtual_8086(
    core: &mut Core,
    bus: &dyn Bus,
    frame: Frame,
) -> Result<Flow, Exception> {
    let mut values = [0; 9];
    super::transfer::read_values(core, bus, 4, &mut values)?;
    if frame.rip > 0xffff {
        return Err(Exception::general_protection(0));
    }
    let [_, cs, image, esp, ss, es, ds, fs, gs] = values;
    let mask = flags::FREE | rflags::IF | rflags::IOPL;
    flags::set(core, image, mask);
    core.state.system_flags |= rflags::VM;
    core.state.cpl = 3;
    for (number, selector) in [
        (index::CS, cs),
        (index::SS, ss),
        (index::ES, es),
        (index::DS, ds),
        (index::FS, fs),
        (index::GS, gs),
    ] {
        let loaded = segment(core, number, selector as u16);
        super::segment::install_number(core, number, loaded);
    }
    core.state.gpr[crate::state::gpr::RSP] = esp;
    core.state.rip = frame.rip;
    Ok(Flow::Jump)
}

/// Enters the handler of an interrupt or exception in real mode; changes nothing if it
/// cannot.
pub(super) fn interrupt(core: &mut Core, bus: &dyn Bus, vector: u8, rip: u64) -> Done {
    let offset = u64::from(vector) * 4;
    let table = core.state.idtr;
    if offset + 3 > u64::from(table.limit) {
        return Err(Exception::general_protection(u32::from(vector) << 3 | 2));
    }
    let at = table.base.wrapping_add(offset) & 0xffff_ffff;
    let raw = u32::from_le_bytes(core.read_bytes(bus, at, Privilege::Supervisor)?);
    check(core, u64::from(raw & 0xffff))?;
    let image = core.state.rflags() as u16;
    let cs = core.state.segments[index::CS].selector;
    let mut frame = [0; 6];
    for (slot, value) in frame.chunks_exact_mut(2).zip([rip as u16, cs, image]) {
        slot.copy_from_slice(&value.to_le_bytes());
    }
    core.push_values(bus, &frame, 2)?;
    enter(core, (raw >> 16) as u16, u64::from(raw & 0xffff))?;
    let cleared = rflags::IF | rflags::TF | rflags::RF | rflags::AC;
    core.state.system_flags &= !cleared;
    core.state.interrupt_shadow = false;
    Ok(())
}
