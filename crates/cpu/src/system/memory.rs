//! Operands: registers, effective addresses, and the typed accesses that system
//! instructions make. Never bypasses [`Core`]'s checks.

use iced_x86::{Code, Instruction, OpKind, Register};

use super::Done;
use super::segment::register_index;
use crate::bus::Bus;
use crate::exception::{Exception, vector};
use crate::mmu::{Core, Kind, Privilege};
use crate::state::{gpr, segment as index};

/// A linear address that an instruction's operand names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) linear: u64,
    /// Relative to the stack segment: what would be #GP(0) is #SS(0).
    pub(super) stack: bool,
    /// Outside of 64-bit mode: the segment register and the offset, which every access
    /// checks.
    segmented: Option<(usize, u32)>,
}

impl Address {
    /// An address relative to DS, or to FS or GS with its base already added.
    pub(super) fn data(linear: u64) -> Self {
        Self {
            linear,
            stack: false,
            segmented: None,
        }
    }

    /// An address relative to SS.
    pub(super) fn stack(linear: u64) -> Self {
        Self {
            linear,
            stack: true,
            segmented: None,
        }
    }

    /// An offset in a segment, outside of 64-bit mode.
    pub(super) fn segmented(core: &Core, number: usize, offset: u32) -> Self {
        Self {
            linear: core.linear_of(number, offset.into()),
            stack: number == index::SS,
            segmented: Some((number, offset)),
        }
    }

    /// A data operand in the segment of a register with the given offset, in any mode.
    pub(super) fn in_segment(core: &Core, segment: Register, offset: u64) -> Self {
        if core.state.is_long_code() {
            Self::data(core.segment_base(segment).wrapping_add(offset))
        } else {
            Self::segmented(core, register_index(segment), offset as u32)
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
        if base.size() == 2
            || index.size() == 2
            || (base == Register::None && index == Register::None && instr.memory_displ_size() == 2)
        {
            offset &= 0xffff;
        }
        let segment = instr.memory_segment();
        if !core.state.is_long_code() {
            return Self::segmented(core, register_index(segment), offset as u32);
        }
        let overridden = matches!(segment, Register::FS | Register::GS);
        let on_stack = matches!(base.full_register(), Register::RSP | Register::RBP);
        Self {
            linear: core.segment_base(segment).wrapping_add(offset),
            stack: on_stack && !overridden,
            segmented: None,
        }
    }

    /// The linear address of an access of `length` bytes, which the segment must allow.
    fn checked(self, core: &Core, length: usize, store: bool) -> Result<u64, Exception> {
        match self.segmented {
            None => Ok(self.linear),
            Some((number, offset)) => core.check_segment(number, offset, length as u64, store),
        }
    }

    /// The address `bytes` further.
    pub(super) fn plus(self, bytes: u64) -> Self {
        Self {
            linear: self.linear.wrapping_add(bytes),
            segmented: self
                .segmented
                .map(|(number, offset)| (number, offset.wrapping_add(bytes as u32))),
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
        let linear = self.checked(core, N, false)?;
        core.read_bytes(bus, linear, Privilege::Current)
            .map_err(|e| self.fault(e))
    }

    pub(super) fn read_into(self, core: &mut Core, bus: &dyn Bus, data: &mut [u8]) -> Done {
        let linear = self.checked(core, data.len(), false)?;
        core.read_linear(bus, linear, data, Privilege::Current)
            .map_err(|e| self.fault(e))
    }

    /// Raises #AC where an operand of `size` bytes must be aligned and is not. Elements of
    /// gathers and masked moves need no such check.
    pub(super) fn aligned(self, core: &Core, size: usize) -> Result<Self, Exception> {
        // the segment is checked before
        self.checked(core, size, false)?;
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
        let linear = self.checked(core, data.len(), true)?;
        core.write_linear(bus, linear, data, Privilege::Current)
            .map_err(|e| self.fault(e))
    }

    /// Checks that `length` bytes could be written.
    pub(super) fn probe_write(self, core: &mut Core, length: u64) -> Done {
        let linear = self.checked(core, length as usize, true)?;
        core.probe_write(linear, length, Privilege::Current)
            .map_err(|e| self.fault(e))
    }

    /// Checks that a byte could be read.
    pub(super) fn probe_read(self, core: &mut Core) -> Done {
        let linear = self.checked(core, 1, false)?;
        core.target(linear, Kind::Read, Privilege::Current)
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

    /// RSP, ESP or SP, as stack operations use it now.
    pub(super) fn stack_pointer(&self) -> u64 {
        self.state.gpr[gpr::RSP] & self.stack_mask()
    }

    /// The bits of RSP that stack operations use and change.
    pub(super) fn stack_mask(&self) -> u64 {
        if self.state.is_long_code() {
            u64::MAX
        } else if self.state.has_big_stack() {
            u32::MAX.into()
        } else {
            0xffff
        }
    }

    /// Sets RSP, ESP or SP.
    pub(super) fn set_stack_pointer(&mut self, value: u64) {
        let register = match self.stack_mask() {
            0xffff => Register::SP,
            u64::MAX => Register::RSP,
            _ => Register::ESP,
        };
        self.set_gpr(register, value);
    }

    /// The address of a stack pointer's value, which wraps as wide as the stack is.
    pub(super) fn stack_at(&self, pointer: u64) -> Address {
        if self.state.is_long_code() {
            return Address::stack(pointer);
        }
        Address::segmented(self, index::SS, (pointer & self.stack_mask()) as u32)
    }

    /// Pushes `data`, which is values of `size` bytes, and moves the stack pointer.
    pub(super) fn push_values(&mut self, bus: &dyn Bus, data: &[u8], size: usize) -> Done {
        let pointer = self.stack_pointer().wrapping_sub(data.len() as u64);
        self.stack_at(pointer)
            .aligned(self, size)?
            .write(self, bus, data)?;
        self.set_stack_pointer(pointer);
        Ok(())
    }

    /// Reads the `index`th value of `size` bytes from the top of the stack.
    pub(super) fn peek(
        &mut self,
        bus: &dyn Bus,
        index: u64,
        size: usize,
    ) -> Result<u64, Exception> {
        let pointer = self.stack_pointer().wrapping_add(index * size as u64);
        self.stack_at(pointer).read_uint(self, bus, size)
    }

    /// Moves the stack pointer up over what was popped.
    pub(super) fn drop_stack(&mut self, bytes: u64) {
        let pointer = self.stack_pointer().wrapping_add(bytes);
        self.set_stack_pointer(pointer);
    }
}

/// The operand size of an instruction that works on the stack, from the change it makes to
/// RSP per value: 2, 4 or 8.
pub(super) fn stack_operand_size(instr: &Instruction, values: i32) -> usize {
    match instr.stack_pointer_increment().abs() / values.max(1) {
        2 => 2,
        4 => 4,
        _ => 8,
    }
}

/// LEAVE in the forms that translated code leaves here.
pub(super) fn leave(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    let size = match instr.code() {
        Code::Leavew => 2,
        Code::Leaved => 4,
        _ => 8,
    };
    let frame = core.state.gpr[gpr::RBP] & core.stack_mask();
    let value = core.stack_at(frame).read_uint(core, bus, size)?;
    core.set_stack_pointer(frame.wrapping_add(size as u64));
    core.set_gpr(frame_pointer(size), value);
    Ok(())
}

/// RBP, EBP or BP.
fn frame_pointer(size: usize) -> Register {
    match size {
        2 => Register::BP,
        4 => Register::EBP,
        _ => Register::RBP,
    }
}

/// ENTER.
pub(super) fn enter(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    let size: u64 = match instr.code() {
        Code::Enterw_imm16_imm8 => 2,
        Code::Enterd_imm16_imm8 => 4,
        _ => 8,
    };
    let locals = u64::from(instr.immediate16());
    let level = u64::from(instr.immediate8_2nd() & 31);
    let pointer = core.stack_pointer();
    let rbp = core.state.gpr[gpr::RBP];
    // each push is done before the next frame pointer is read, which may be the one pushed
    let mut top = pointer;
    let mut push = |core: &mut Core, value: u64| -> Done {
        top = top.wrapping_sub(size);
        core.stack_at(top).aligned(core, size as usize)?.write(
            core,
            bus,
            &value.to_le_bytes()[..size as usize],
        )
    };
    // what the stack's width leaves of RSP goes into the frame pointer too
    let mask = core.stack_mask();
    let frame = core.state.gpr[gpr::RSP] & !mask | pointer.wrapping_sub(size) & mask;
    push(core, rbp)?;
    for outer in 1..level {
        let at = core.stack_at(rbp.wrapping_sub(outer * size));
        let value = at.read_uint(core, bus, size as usize)?;
        push(core, value)?;
    }
    if level > 0 {
        push(core, frame)?;
    }
    let last = top.wrapping_sub(locals);
    core.stack_at(last)
        .aligned(core, size as usize)?
        .probe_write(core, 1)?;
    core.set_stack_pointer(last);
    core.set_gpr(frame_pointer(size as usize), frame);
    Ok(())
}
