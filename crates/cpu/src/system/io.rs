//! IN and OUT, and who may use which port (Intel SDM vol. 1 §19.5).

use iced_x86::{Instruction, OpKind};

use super::Done;
use crate::bus::Bus;
use crate::exception::Exception;
use crate::mmu::{Core, Privilege};
use crate::state::gpr;

/// Offset in the 64-bit TSS of the I/O permission bitmap's offset.
const TSS_IO_BITMAP: u64 = 0x66;

/// Checks that the current privilege level may use `size` ports from `port`.
pub(super) fn require_ports(core: &mut Core, bus: &dyn Bus, port: u16, size: u8) -> Done {
    if core.io_allowed_by_iopl() {
        return Ok(());
    }
    let fault = Err(Exception::general_protection(0));
    let tr = core.state.tr;
    let limit = u64::from(tr.limit);
    if tr.attributes & 0x80 == 0 || limit < TSS_IO_BITMAP + 1 {
        return fault;
    }
    let field = tr.base.wrapping_add(TSS_IO_BITMAP);
    let bitmap = u16::from_le_bytes(core.read_bytes(bus, field, Privilege::Supervisor)?);
    let at = u64::from(bitmap) + u64::from(port / 8);
    // two bytes are always read, so the map ends with a byte of ones
    if at + 1 > limit {
        return fault;
    }
    let bits = u16::from_le_bytes(core.read_bytes(
        bus,
        tr.base.wrapping_add(at),
        Privilege::Supervisor,
    )?);
    let wanted = (1_u16 << size) - 1;
    if bits >> (port % 8) & wanted != 0 {
        return fault;
    }
    Ok(())
}

/// The port operand: an immediate or DX.
fn port_of(core: &Core, instr: &Instruction, operand: u32) -> u16 {
    if instr.op_kind(operand) == OpKind::Register {
        core.state.gpr[gpr::RDX] as u16
    } else {
        u16::from(instr.immediate8())
    }
}

pub(super) fn input(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    let to = instr.op0_register();
    let size = to.size() as u8;
    let port = port_of(core, instr, 1);
    require_ports(core, bus, port, size)?;
    core.watch_port(port, size);
    let value = bus.port_read(port, size);
    core.check_interrupts = true;
    core.set_gpr(to, u64::from(value));
    Ok(())
}

pub(super) fn output(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    let from = instr.op1_register();
    let size = from.size() as u8;
    let port = port_of(core, instr, 0);
    require_ports(core, bus, port, size)?;
    let value = core.gpr(from) as u32;
    core.watch_port(port, size);
    bus.port_write(port, size, value);
    core.check_interrupts = true;
    Ok(())
}
