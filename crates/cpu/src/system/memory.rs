//! Operands: registers, effective addresses, and the typed accesses that system
//! instructions make. Never bypasses [`Core`]'s checks.

use iced_x86::{Instruction, OpKind, Register};

use super::Done;
use crate::bus::Bus;
use crate::exception::{Exception, vector};
use crate::mmu::{Core, Kind, Privilege};
use crate::state::gpr;

/// A linear address that an instruction's operand names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) linear: u64,
    /// Relative to the stack segment: what would be #GP(0) is #SS(0).
    pub(super) stack: bool,
}

impl Address {
    /// An address relative to DS, or to FS or GS with its base already added.
    pub(super) fn data(linear: u64) -> Self {
        Self {
            linear,
            stack: false,
        }
    }

    /// An address relative to SS.
    pub(super) fn stack(linear: u64) -> Self {
        Self {
            linear,
            stack: true,
        }
    }

    /// The address of the instruction's memory operand.
    pub(super) fn of(core: &Core, instr: &Instruction) -> Self {
        let base = instr.memory_base();
        let index = instr.memory_index();
        let narrow = base.is_gpr32()
            || index.is_gpr32()
            || base == Register::EIP
            || (base == Register::None
                && index == Register::None
                && instr.memory_displ_size() == 4);
        let mut offset = instr.memory_displacement64();
        if base.is_gpr() {
            offset = offset.wrapping_add(core.gpr(base));
        }
        if index.is_gpr() {
            let scaled = core
                .gpr(index)
                .wrapping_mul(u64::from(instr.memory_index_scale()));
            offset = offset.wrapping_add(scaled);
        }
        if narrow {
            offset &= 0xffff_ffff;
        }
        let segment = instr.memory_segment();
        let overridden = matches!(segment, Register::FS | Register::GS);
        let on_stack = matches!(base.full_register(), Register::RSP | Register::RBP);
        Self {
            linear: core.segment_base(segment).wrapping_add(offset),
            stack: on_stack && !overridden,
        }
    }

    /// The address `bytes` further.
    pub(super) fn plus(self, bytes: u64) -> Self {
        Self {
            linear: self.linear.wrapping_add(bytes),
            ..self
        }
    }

    /// Turns the #GP(0) of a non-canonical address into #SS(0) where it must be.
    pub(super) fn fault(self, exception: Exception) -> Exception {
        if self.stack && exception == Exception::general_protection(0) {
            return Exception::with_code(vector::SS, 0);
        }
        exception
    }

    pub(super) fn read<const N: usize>(
        self,
        core: &mut Core,
        bus: &dyn Bus,
    ) -> Result<[u8; N], Exception> {
        core.read_bytes(bus, self.linear, Privilege::Current)
            .map_err(|e| self.fault(e))
    }

    pub(super) fn read_into(self, core: &mut Core, bus: &dyn Bus, data: &mut [u8]) -> Done {
        core.read_linear(bus, self.linear, data, Privilege::Current)
            .map_err(|e| self.fault(e))
    }

    /// Raises #AC where an operand of `size` bytes must be aligned and is not. Elements of
    /// gathers and masked moves need no such check.
    pub(super) fn aligned(self, core: &Core, size: usize) -> Result<Self, Exception> {
        core.check_alignment(self.linear, size as u64)?;
        Ok(self)
    }

    /// Reads a little-endian integer of `size` (1 to 8) bytes, aligned if it must be.
    pub(super) fn read_uint(
        self,
        core: &mut Core,
        bus: &dyn Bus,
        size: usize,
    ) -> Result<u64, Exception> {
        let mut data = [0; 8];
        self.aligned(core, size)?
            .read_into(core, bus, &mut data[..size.min(8)])?;
        Ok(u64::from_le_bytes(data))
    }

    pub(super) fn write(self, core: &mut Core, bus: &dyn Bus, data: &[u8]) -> Done {
        core.write_linear(bus, self.linear, data, Privilege::Current)
            .map_err(|e| self.fault(e))
    }

    /// Checks that `length` bytes could be written.
    pub(super) fn probe_write(self, core: &mut Core, length: u64) -> Done {
        core.probe_write(self.linear, length, Privilege::Current)
            .map_err(|e| self.fault(e))
    }

    /// Checks that a byte could be read.
    pub(super) fn probe_read(self, core: &mut Core) -> Done {
        core.target(self.linear, Kind::Read, Privilege::Current)
            .map(drop)
            .map_err(|e| self.fault(e))
    }
}

fn is_high_byte(register: Register) -> bool {
    matches!(
        register,
        Register::AH | Register::CH | Register::DH | Register::BH
    )
}

impl Core {
    /// The value of a general register of any width, zero-extended.
    pub(super) fn gpr(&self, register: Register) -> u64 {
        let value = self.state.gpr[register.full_register().number() & 15];
        match register.size() {
            1 if is_high_byte(register) => value >> 8 & 0xff,
            1 => value & 0xff,
            2 => value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        }
    }

    /// Sets a general register as an instruction does: 32-bit writes clear the upper half,
    /// narrower ones keep the rest.
    pub(super) fn set_gpr(&mut self, register: Register, value: u64) {
        let slot = &mut self.state.gpr[register.full_register().number() & 15];
        *slot = match register.size() {
            1 if is_high_byte(register) => *slot & !0xff00 | (value & 0xff) << 8,
            1 => *slot & !0xff | value & 0xff,
            2 => *slot & !0xffff | value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        };
    }

    /// EDX:EAX.
    pub(super) fn edx_eax(&self) -> u64 {
        self.state.gpr[gpr::RDX] << 32 | self.state.gpr[gpr::RAX] & 0xffff_ffff
    }

    pub(super) fn set_edx_eax(&mut self, value: u64) {
        self.state.gpr[gpr::RAX] = value & 0xffff_ffff;
        self.state.gpr[gpr::RDX] = value >> 32;
    }

    /// What a segment adds to an offset in 64-bit mode.
    pub(super) fn segment_base(&self, segment: Register) -> u64 {
        match segment {
            Register::FS => self.state.fs_base,
            Register::GS => self.state.gs_base,
            _ => 0,
        }
    }

    /// Reads an operand of `size` bytes from a register or memory.
    pub(super) fn read_operand(
        &mut self,
        bus: &dyn Bus,
        instr: &Instruction,
        operand: u32,
        size: usize,
    ) -> Result<u64, Exception> {
        if instr.op_kind(operand) == OpKind::Register {
            let value = self.gpr(instr.op_register(operand));
            return Ok(if size >= 8 {
                value
            } else {
                value & ((1 << (size * 8)) - 1)
            });
        }
        Address::of(self, instr).read_uint(self, bus, size)
    }

    /// Writes a selector or machine status word: 16 bits to memory, or zero-extended to the
    /// whole register operand.
    pub(super) fn write_word(&mut self, bus: &dyn Bus, instr: &Instruction, value: u64) -> Done {
        if instr.op0_kind() == OpKind::Register {
            self.set_gpr(instr.op0_register(), value);
            return Ok(());
        }
        Address::of(self, instr)
            .aligned(self, 2)?
            .write(self, bus, &(value as u16).to_le_bytes())
    }

    /// Pushes `data`, which is values of `size` bytes, and moves RSP.
    pub(super) fn push_values(&mut self, bus: &dyn Bus, data: &[u8], size: usize) -> Done {
        let rsp = self.state.gpr[gpr::RSP].wrapping_sub(data.len() as u64);
        Address::stack(rsp)
            .aligned(self, size)?
            .write(self, bus, data)?;
        self.state.gpr[gpr::RSP] = rsp;
        Ok(())
    }

    /// Reads the `index`th value of `size` bytes from the top of the stack.
    pub(super) fn peek(
        &mut self,
        bus: &dyn Bus,
        index: u64,
        size: usize,
    ) -> Result<u64, Exception> {
        let rsp = self.state.gpr[gpr::RSP].wrapping_add(index * size as u64);
        Address::stack(rsp).read_uint(self, bus, size)
    }
}

/// The operand size of an instruction that works on the stack, from the change it makes to
/// RSP per value: 2 with prefix 66, else 8.
pub(super) fn stack_operand_size(instr: &Instruction, values: i32) -> usize {
    if instr.stack_pointer_increment().abs() / values.max(1) == 2 {
        2
    } else {
        8
    }
}

/// LEAVE with operand size 16.
pub(super) fn leave_word(core: &mut Core, bus: &dyn Bus) -> Done {
    let frame = core.state.gpr[gpr::RBP];
    let value = Address::stack(frame).read_uint(core, bus, 2)?;
    core.state.gpr[gpr::RSP] = frame.wrapping_add(2);
    core.set_gpr(Register::BP, value);
    Ok(())
}

/// ENTER.
pub(super) fn enter(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    let word = instr.code() == iced_x86::Code::Enterw_imm16_imm8;
    let size: u64 = if word { 2 } else { 8 };
    let locals = u64::from(instr.immediate16());
    let level = u64::from(instr.immediate8_2nd() & 31);
    let rsp = core.state.gpr[gpr::RSP];
    let rbp = core.state.gpr[gpr::RBP];
    let frame = rsp.wrapping_sub(size);
    // each push is done before the next frame pointer is read, which may be the one pushed
    let mut top = rsp;
    let mut push = |core: &mut Core, value: u64| -> Done {
        top = top.wrapping_sub(size);
        Address::stack(top).aligned(core, size as usize)?.write(
            core,
            bus,
            &value.to_le_bytes()[..size as usize],
        )
    };
    push(core, rbp)?;
    for outer in 1..level {
        let at = Address::stack(rbp.wrapping_sub(outer * size));
        let value = at.read_uint(core, bus, size as usize)?;
        push(core, value)?;
    }
    if level > 0 {
        push(core, frame)?;
    }
    let last = top.wrapping_sub(locals);
    Address::stack(last)
        .aligned(core, size as usize)?
        .probe_write(core, 1)?;
    core.state.gpr[gpr::RSP] = last;
    let register = if word { Register::BP } else { Register::RBP };
    core.set_gpr(register, frame);
    Ok(())
}
