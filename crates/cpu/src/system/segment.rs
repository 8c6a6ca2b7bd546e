//! Descriptors, segment registers and descriptor-table registers (Intel SDM vol. 3A §3.4,
//! §3.5, §5) as 64-bit mode has them.

use iced_x86::{Code, Instruction, Mnemonic, Register};

use super::control::{require_cpl0, require_no_umip};
use super::memory::{Address, stack_operand_size};
use super::{Done, real};
use crate::bus::Bus;
use crate::exception::Exception;
use crate::mmu::{Core, Privilege};
use crate::state::{DescriptorTable, Segment, rflags, segment as index};

const TYPE_TSS_16: u8 = 1;
const TYPE_LDT: u8 = 2;
const TYPE_TSS_16_BUSY: u8 = 3;
const TYPE_CALL_GATE_16: u8 = 4;
const TYPE_TASK_GATE: u8 = 5;
const TYPE_TSS_AVAILABLE: u8 = 9;
const TYPE_TSS_BUSY: u8 = 11;
const TYPE_CALL_GATE: u8 = 12;

impl Segment {
    /// SS after a change to `cpl` through a gate: null, which 64-bit mode can push with.
    pub(super) fn null_stack(cpl: u8) -> Self {
        Self {
            base: 0,
            limit: 0,
            selector: u16::from(cpl),
            attributes: u16::from(cpl) << 5,
        }
    }

    fn present(&self) -> bool {
        self.attributes & 0x80 != 0
    }
}

/// A descriptor of a code or data segment, or the lower half of a system descriptor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor {
    raw: u64,
    /// Linear address it was read from.
    address: u64,
}

impl Descriptor {
    fn access(self) -> u8 {
        (self.raw >> 40) as u8
    }

    pub(super) fn kind(self) -> u8 {
        self.access() & 0xf
    }

    pub(super) fn is_system(self) -> bool {
        self.access() & 0x10 == 0
    }

    pub(super) fn dpl(self) -> u8 {
        self.access() >> 5 & 3
    }

    pub(super) fn present(self) -> bool {
        self.access() & 0x80 != 0
    }

    pub(super) fn is_code(self) -> bool {
        !self.is_system() && self.kind() & 8 != 0
    }

    pub(super) fn is_conforming(self) -> bool {
        self.is_code() && self.kind() & 4 != 0
    }

    fn is_readable(self) -> bool {
        !self.is_system() && (self.kind() & 8 == 0 || self.kind() & 2 != 0)
    }

    pub(super) fn is_writable(self) -> bool {
        !self.is_system() && self.kind() & 0xa == 2
    }

    /// A code segment with L set and D clear.
    pub(super) fn is_64_bit(self) -> bool {
        self.raw >> 53 & 3 == 1
    }

    /// Whether this code segment runs 64-bit code now.
    pub(super) fn is_long(self, core: &Core) -> bool {
        core.state.is_long_mode() && self.is_64_bit()
    }

    fn base(self) -> u64 {
        self.raw >> 16 & 0xff_ffff | self.raw >> 32 & 0xff00_0000
    }

    pub(super) fn raw(self) -> u64 {
        self.raw
    }

    pub(super) fn limit(self) -> u32 {
        let limit = (self.raw & 0xffff | self.raw >> 32 & 0xf_0000) as u32;
        if self.raw >> 55 & 1 != 0 {
            limit << 12 | 0xfff
        } else {
            limit
        }
    }

    /// The segment register it makes, under `selector`.
    pub(super) fn segment(self, selector: u16) -> Segment {
        Segment {
            base: self.base(),
            limit: self.limit(),
            selector,
            attributes: (self.raw >> 40) as u16 & 0xf0ff,
        }
    }

    /// Sets the accessed bit, in memory too.
    pub(super) fn mark_accessed(self, core: &mut Core, bus: &dyn Bus) -> Result<Self, Exception> {
        if self.kind() & 1 != 0 {
            return Ok(self);
        }
        core.set_bits(bus, self.address.wrapping_add(5), 1)?;
        Ok(Self {
            raw: self.raw | 1 << 40,
            ..self
        })
    }
}

/// The error code that names a selector.
pub(super) fn selector_code(selector: u16) -> u32 {
    u32::from(selector & !3)
}

pub(super) fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

fn table_of(core: &Core, selector: u16) -> Option<(u64, u64)> {
    let state = &core.state;
    if selector & 4 == 0 {
        return Some((state.gdtr.base, u64::from(state.gdtr.limit)));
    }
    state
        .ldtr
        .present()
        .then_some((state.ldtr.base, u64::from(state.ldtr.limit)))
}

/// Reads the descriptor that a selector names. `None`: beyond the table's limit.
pub(super) fn read_descriptor(
    core: &mut Core,
    bus: &dyn Bus,
    selector: u16,
) -> Result<Option<Descriptor>, Exception> {
    let offset = u64::from(selector & !7);
    let Some((base, _)) = table_of(core, selector).filter(|t| offset + 7 <= t.1) else {
        return Ok(None);
    };
    let address = base.wrapping_add(offset);
    let raw = core.read_u64(bus, address, Privilege::Supervisor)?;
    Ok(Some(Descriptor { raw, address }))
}

/// The upper half of a 16-byte system descriptor. `None`: beyond the table's limit.
pub(super) fn read_upper(
    core: &mut Core,
    bus: &dyn Bus,
    selector: u16,
) -> Result<Option<u64>, Exception> {
    let offset = u64::from(selector & !7);
    let Some((base, _)) = table_of(core, selector).filter(|t| offset + 15 <= t.1) else {
        return Ok(None);
    };
    core.read_u64(bus, base.wrapping_add(offset + 8), Privilege::Supervisor)
        .map(Some)
}

/// Refuses a code segment that is both 64-bit and 32-bit.
pub(super) fn require_runnable(core: &Core, code: Descriptor, selector: u16) -> Done {
    if core.state.is_long_mode() && code.raw >> 53 & 3 == 3 {
        return Err(Exception::general_protection(selector_code(selector)));
    }
    Ok(())
}

pub(super) fn register_index(register: Register) -> usize {
    match register {
        Register::ES => index::ES,
        Register::CS => index::CS,
        Register::SS => index::SS,
        Register::FS => index::FS,
        Register::GS => index::GS,
        _ => index::DS,
    }
}

/// SS as MOV, POP and LSS load it at the current privilege level.
fn stack_segment(core: &mut Core, bus: &dyn Bus, selector: u16) -> Result<Segment, Exception> {
    let cpl = core.state.cpl;
    if is_null(selector) {
        if cpl == 3 || !core.state.is_long_code() || (selector & 3) as u8 != cpl {
            return Err(Exception::general_protection(0));
        }
        return Ok(Segment::null_stack(cpl));
    }
    checked_stack(core, bus, selector, cpl)
}

/// A stack segment for code at `cpl` (Intel SDM vol. 3A §5.7).
pub(super) fn checked_stack(
    core: &mut Core,
    bus: &dyn Bus,
    selector: u16,
    cpl: u8,
) -> Result<Segment, Exception> {
    let bad = Exception::general_protection(selector_code(selector));
    let descriptor = read_descriptor(core, bus, selector)?.ok_or(bad)?;
    if (selector & 3) as u8 != cpl || !descriptor.is_writable() || descriptor.dpl() != cpl {
        return Err(bad);
    }
    if !descriptor.present() {
        return Err(Exception::stack_fault(selector_code(selector)));
    }
    Ok(descriptor.mark_accessed(core, bus)?.segment(selector))
}

fn data_segment(core: &mut Core, bus: &dyn Bus, selector: u16) -> Result<Segment, Exception> {
    if is_null(selector) {
        return Ok(Segment {
            selector,
            ..Segment::default()
        });
    }
    let bad = Exception::general_protection(selector_code(selector));
    let descriptor = read_descriptor(core, bus, selector)?.ok_or(bad)?;
    let rpl = (selector & 3) as u8;
    let too_low = rpl > descriptor.dpl() || core.state.cpl > descriptor.dpl();
    if !descriptor.is_readable() || (!descriptor.is_conforming() && too_low) {
        return Err(bad);
    }
    if !descriptor.present() {
        return Err(Exception::not_present(selector_code(selector)));
    }
    Ok(descriptor.mark_accessed(core, bus)?.segment(selector))
}

/// Finds what loading a segment register gives, changing nothing but the accessed bit.
fn lookup(
    core: &mut Core,
    bus: &dyn Bus,
    register: Register,
    selector: u16,
) -> Result<Segment, Exception> {
    match register {
        Register::CS => Err(Exception::undefined()),
        _ if core.state.is_real() => Ok(real::segment(core, register_index(register), selector)),
        Register::SS => stack_segment(core, bus, selector),
        _ => data_segment(core, bus, selector),
    }
}

fn install(core: &mut Core, register: Register, segment: Segment) {
    install_number(core, register_index(register), segment);
}

/// Sets a segment register with its base.
pub(super) fn install_number(core: &mut Core, number: usize, segment: Segment) {
    match number {
        index::FS => core.state.fs_base = segment.base,
        index::GS => core.state.gs_base = segment.base,
        _ => {}
    }
    core.state.segments[number] = segment;
}

/// MOV to a segment register.
pub(super) fn mov_to(core: &mut Core, bus: &dyn Bus, instr: &Instruction, to: Register) -> Done {
    if to == Register::CS {
        return Err(Exception::undefined());
    }
    let selector = core.read_operand(bus, instr, 1, 2)? as u16;
    let segment = lookup(core, bus, to, selector)?;
    install(core, to, segment);
    if to == Register::SS {
        core.state.interrupt_shadow = true;
    }
    Ok(())
}

/// MOV from a segment register.
pub(super) fn mov_from(
    core: &mut Core,
    bus: &dyn Bus,
    instr: &Instruction,
    from: Register,
) -> Done {
    let selector = core.state.segments[register_index(from)].selector;
    core.write_word(bus, instr, u64::from(selector))
}

/// PUSH FS, PUSH GS.
pub(super) fn push(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    let register = instr.op0_register();
    if !register.is_segment_register() {
        return Err(Exception::undefined());
    }
    let selector = u64::from(core.state.segments[register_index(register)].selector);
    let size = stack_operand_size(instr, 1);
    core.push_values(bus, &selector.to_le_bytes()[..size], size)
}

/// POP FS, POP GS.
pub(super) fn pop(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    let register = instr.op0_register();
    if !register.is_segment_register() {
        return Err(Exception::undefined());
    }
    let size = stack_operand_size(instr, 1);
    let selector = core.peek(bus, 0, size)? as u16;
    let segment = lookup(core, bus, register, selector)?;
    install(core, register, segment);
    core.drop_stack(size as u64);
    Ok(())
}

/// LFS, LGS, LSS, LDS, LES.
pub(super) fn load_far_pointer(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    let segment_register = match instr.mnemonic() {
        Mnemonic::Lfs => Register::FS,
        Mnemonic::Lgs => Register::GS,
        Mnemonic::Lds => Register::DS,
        Mnemonic::Les => Register::ES,
        _ => Register::SS,
    };
    let to = instr.op0_register();
    let address = Address::of(core, instr);
    let offset = address.read_uint(core, bus, to.size())?;
    let selector = address.plus(to.size() as u64).read_uint(core, bus, 2)? as u16;
    let segment = lookup(core, bus, segment_register, selector)?;
    install(core, segment_register, segment);
    core.set_gpr(to, offset);
    Ok(())
}

/// LGDT, LIDT.
pub(super) fn load_table(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    require_cpl0(core)?;
    let mut image = [0; 16];
    let size = table_size(core);
    Address::of(core, instr).read_into(core, bus, &mut image[..size])?;
    let mut raw = u128::from_le_bytes(image);
    if matches!(instr.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16) {
        // a base of 24 bits
        raw &= 0xff_ffff_ffff;
    }
    let table = DescriptorTable {
        limit: raw as u16,
        base: (raw >> 16) as u64,
    };
    if !Core::canonical(table.base) {
        return Err(Exception::general_protection(0));
    }
    if instr.mnemonic() == Mnemonic::Lgdt {
        core.state.gdtr = table;
    } else {
        core.state.idtr = table;
    }
    Ok(())
}

/// SGDT, SIDT.
pub(super) fn store_table(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    require_no_umip(core)?;
    let table = if instr.mnemonic() == Mnemonic::Sgdt {
        core.state.gdtr
    } else {
        core.state.idtr
    };
    let mut image = [0; 10];
    image[..2].copy_from_slice(&table.limit.to_le_bytes());
    image[2..].copy_from_slice(&table.base.to_le_bytes());
    let size = table_size(core);
    Address::of(core, instr).write(core, bus, &image[..size])
}

/// Bytes of a descriptor-table register in memory.
fn table_size(core: &Core) -> usize {
    if core.state.is_long_code() { 10 } else { 6 }
}

/// LLDT, LTR, SLDT, STR, LAR, LSL, VERR, VERW do not exist in real and virtual-8086 mode.
fn require_protected(core: &Core) -> Done {
    if core.state.is_real() {
        Err(Exception::undefined())
    } else {
        Ok(())
    }
}

/// SLDT, STR.
pub(super) fn store_selector(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    require_protected(core)?;
    require_no_umip(core)?;
    let register = if instr.mnemonic() == Mnemonic::Sldt {
        core.state.ldtr
    } else {
        core.state.tr
    };
    core.write_word(bus, instr, u64::from(register.selector))
}

/// Reads an LDT or TSS descriptor for LLDT and LTR: 16 bytes in IA-32e mode, else 8.
fn system_segment(
    core: &mut Core,
    bus: &dyn Bus,
    selector: u16,
    kinds: &[u8],
) -> Result<(Descriptor, Segment), Exception> {
    let bad = Exception::general_protection(selector_code(selector));
    if selector & 4 != 0 {
        return Err(bad);
    }
    let descriptor = read_descriptor(core, bus, selector)?.ok_or(bad)?;
    if !descriptor.is_system() || !kinds.contains(&descriptor.kind()) {
        return Err(bad);
    }
    if !core.state.is_long_mode() {
        if !descriptor.present() {
            return Err(Exception::not_present(selector_code(selector)));
        }
        return Ok((descriptor, descriptor.segment(selector)));
    }
    let upper = read_upper(core, bus, selector)?.ok_or(bad)?;
    if !descriptor.present() {
        return Err(Exception::not_present(selector_code(selector)));
    }
    let mut segment = descriptor.segment(selector);
    segment.base |= upper << 32;
    // bits 12:8 of the last word would be a type
    if upper >> 40 & 0x1f != 0 || !Core::canonical(segment.base) {
        return Err(bad);
    }
    Ok((descriptor, segment))
}

pub(super) fn lldt(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    require_protected(core)?;
    require_cpl0(core)?;
    let selector = core.read_operand(bus, instr, 0, 2)? as u16;
    core.state.ldtr = if is_null(selector) {
        Segment {
            selector,
            ..Segment::default()
        }
    } else {
        system_segment(core, bus, selector, &[TYPE_LDT])?.1
    };
    Ok(())
}

pub(super) fn ltr(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    require_protected(core)?;
    require_cpl0(core)?;
    let selector = core.read_operand(bus, instr, 0, 2)? as u16;
    if is_null(selector) {
        return Err(Exception::general_protection(0));
    }
    let kinds: &[u8] = if core.state.is_long_mode() {
        &[TYPE_TSS_AVAILABLE]
    } else {
        &[TYPE_TSS_AVAILABLE, TYPE_TSS_16]
    };
    let (descriptor, mut segment) = system_segment(core, bus, selector, kinds)?;
    // available to busy
    core.set_bits(bus, descriptor.address.wrapping_add(5), 2)?;
    segment.attributes |= 2;
    core.state.tr = segment;
    Ok(())
}

fn set_zf(core: &mut Core, on: bool) {
    let flags = core.state.rflags() & !rflags::ZF;
    core.state
        .set_rflags(if on { flags | rflags::ZF } else { flags });
}

/// Reads the selector operand of LAR, LSL, VERR, VERW and finds its descriptor. `None`
/// where the instruction clears ZF.
fn examined(
    core: &mut Core,
    bus: &dyn Bus,
    instr: &Instruction,
    operand: u32,
) -> Result<Option<(u16, Descriptor)>, Exception> {
    require_protected(core)?;
    let selector = core.read_operand(bus, instr, operand, 2)? as u16;
    if is_null(selector) {
        return Ok(None);
    }
    let Some(descriptor) = read_descriptor(core, bus, selector)? else {
        return Ok(None);
    };
    let rpl = (selector & 3) as u8;
    let visible = descriptor.is_conforming() || descriptor.dpl() >= rpl.max(core.state.cpl);
    Ok(visible.then_some((selector, descriptor)))
}

/// LAR, LSL.
pub(super) fn lar_lsl(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    let lar = instr.mnemonic() == Mnemonic::Lar;
    let long = core.state.is_long_mode();
    let found = examined(core, bus, instr, 1)?.filter(|(_, d)| {
        let system = match d.kind() {
            TYPE_LDT | TYPE_TSS_AVAILABLE | TYPE_TSS_BUSY => true,
            TYPE_CALL_GATE => lar,
            TYPE_TSS_16 | TYPE_TSS_16_BUSY => !long,
            TYPE_CALL_GATE_16 | TYPE_TASK_GATE => lar && !long,
            _ => false,
        };
        !d.is_system() || system
    });
    if let Some((_, descriptor)) = found {
        let value = if lar {
            descriptor.raw >> 32 & 0x00f0_ff00
        } else {
            u64::from(descriptor.limit())
        };
        core.set_gpr(instr.op0_register(), value);
    }
    set_zf(core, found.is_some());
    Ok(())
}

/// VERR, VERW.
pub(super) fn verify(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    let found = examined(core, bus, instr, 0)?.is_some_and(|(_, d)| {
        if instr.mnemonic() == Mnemonic::Verr {
            d.is_readable()
        } else {
            d.is_writable()
        }
    });
    set_zf(core, found);
    Ok(())
}

/// After a return to a lower privilege: segments that its code may not use become null
/// (Intel SDM vol. 2A, IRET, "RETURN-TO-OUTER-PRIVILEGE-LEVEL").
pub(super) fn drop_privileged(core: &mut Core) {
    let cpl = core.state.cpl;
    for at in [index::ES, index::DS, index::FS, index::GS] {
        let segment = &mut core.state.segments[at];
        let access = segment.attributes as u8;
        let conforming = access & 0xc == 0xc;
        if segment.present() && !conforming && (access >> 5 & 3) < cpl {
            *segment = Segment {
                base: segment.base,
                ..Segment::default()
            };
        }
    }
}
