//! CLI, STI, PUSHF, POPF.

use iced_x86::Instruction;

use super::memory::stack_operand_size;
use super::{Done, real};
use crate::bus::Bus;
use crate::exception::Exception;
use crate::mmu::Core;
use crate::state::rflags;

/// The flags that POPF and IRET may set at any privilege level.
pub(super) const FREE: u64 =
    rflags::STATUS | rflags::TF | rflags::DF | rflags::NT | rflags::AC | rflags::ID;

/// The flags that POPF and IRET may change now.
pub(super) fn changeable(core: &Core) -> u64 {
    let mut mask = FREE;
    if core.io_allowed_by_iopl() {
        mask |= rflags::IF;
    }
    if core.state.cpl == 0 {
        mask |= rflags::IOPL;
    }
    mask
}

/// Sets the flags in `mask` from `value` and clears RF. Interrupts that were held back by IF
/// are still noted in [`Core::check_interrupts`].
pub(super) fn set(core: &mut Core, value: u64, mask: u64) {
    let old = core.state.rflags();
    let new = (old & !mask | value & mask) & !rflags::RF;
    core.state.set_rflags(new);
}

/// RF as IRET with `size` bytes loads it: it holds off the instruction breakpoint of the next
/// instruction, and is kept only where there may be one.
pub(super) fn set_resume(core: &mut Core, value: u64, size: usize) {
    if size > 2 && core.breakpoints_enabled() {
        core.state.system_flags |= value & rflags::RF;
    }
}

impl Core {
    /// Whether CPL is at most IOPL.
    pub(super) fn io_allowed_by_iopl(&self) -> bool {
        u64::from(self.state.cpl) <= (self.state.system_flags & rflags::IOPL) >> 12
    }
}

pub(super) fn cli(core: &mut Core) -> Done {
    if !core.io_allowed_by_iopl() {
        return Err(Exception::general_protection(0));
    }
    core.state.system_flags &= !rflags::IF;
    Ok(())
}

pub(super) fn sti(core: &mut Core) -> Done {
    if !core.io_allowed_by_iopl() {
        return Err(Exception::general_protection(0));
    }
    if core.state.system_flags & rflags::IF == 0 {
        core.state.system_flags |= rflags::IF;
        core.state.interrupt_shadow = true;
    }
    Ok(())
}

/// STAC, CLAC.
pub(super) fn set_ac(core: &mut Core, on: bool) -> Done {
    if core.state.cpl != 0 || core.state.is_virtual_8086() {
        return Err(Exception::undefined());
    }
    if on {
        core.state.system_flags |= rflags::AC;
    } else {
        core.state.system_flags &= !rflags::AC;
    }
    Ok(())
}

pub(super) fn pushf(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    real::require_iopl(core)?;
    let image = core.state.rflags() & !(rflags::VM | rflags::RF);
    let size = stack_operand_size(instr, 1);
    core.push_values(bus, &image.to_le_bytes()[..size], size)
}

pub(super) fn popf(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    real::require_iopl(core)?;
    let size = stack_operand_size(instr, 1);
    let value = core.peek(bus, 0, size)?;
    let width = if size == 2 { 0xffff } else { u64::MAX };
    core.drop_stack(size as u64);
    let mask = changeable(core) & width;
    set(core, value, mask);
    Ok(())
}
