//! Vector instructions that fault element by element: gathers and masked moves (Intel SDM
//! vol. 2C). Works on `state.xsave`.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::Done;
use super::fpu::{AVX, SSE, require_avx, require_no_ts, require_sse};
use super::fpu_env::mmx_slot;
use super::memory::Address;
use crate::bus::Bus;
use crate::exception::{Exception, vector};
use crate::mmu::Core;
use crate::state::{State, XSAVE_AVX_OFFSET, cr0, gpr};

const XMM_REGISTERS: usize = 160;

type Ymm = [u8; 32];

impl State {
    fn ymm(&self, register: Register) -> Ymm {
        let n = register.number() & 15;
        let in_use = self.in_use();
        let mut value = [0; 32];
        if in_use & SSE != 0 {
            value[..16].copy_from_slice(&self.xsave.0[XMM_REGISTERS + 16 * n..][..16]);
        }
        if in_use & AVX != 0 {
            value[16..].copy_from_slice(&self.xsave.0[XSAVE_AVX_OFFSET + 16 * n..][..16]);
        }
        value
    }

    fn set_ymm(&mut self, register: Register, value: &Ymm) {
        let n = register.number() & 15;
        let high_used = value[16..].iter().any(|b| *b != 0);
        self.materialize(if high_used { SSE | AVX } else { SSE });
        self.xsave.0[XMM_REGISTERS + 16 * n..][..16].copy_from_slice(&value[..16]);
        self.xsave.0[XSAVE_AVX_OFFSET + 16 * n..][..16].copy_from_slice(&value[16..]);
    }
}

/// Whether the element's mask, its highest bit, is set.
fn masked_in(mask: &[u8], element: usize, size: usize) -> bool {
    mask[element * size + size - 1] & 0x80 != 0
}

fn element_size(mnemonic: Mnemonic) -> usize {
    use Mnemonic as M;
    match mnemonic {
        M::Vmaskmovps
        | M::Vpmaskmovd
        | M::Vgatherdps
        | M::Vgatherqps
        | M::Vpgatherdd
        | M::Vpgatherqd => 4,
        _ => 8,
    }
}

/// VMASKMOVPS, VMASKMOVPD, VPMASKMOVD, VPMASKMOVQ, both ways.
pub(super) fn masked_move(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    require_avx(core)?;
    let size = element_size(instr.mnemonic());
    let length = instr.op1_register().size();
    let mask = core.state.ymm(instr.op1_register());
    let address = Address::of(core, instr);
    let chosen = (0..length / size).filter(|i| masked_in(&mask, *i, size));
    if instr.op0_kind() == OpKind::Memory {
        let value = core.state.ymm(instr.op2_register());
        for i in chosen.clone() {
            address
                .plus((i * size) as u64)
                .probe_write(core, size as u64)?;
        }
        for i in chosen {
            address
                .plus((i * size) as u64)
                .write(core, bus, &value[i * size..][..size])?;
        }
        return Ok(());
    }
    let mut value = [0; 32];
    for i in chosen {
        address
            .plus((i * size) as u64)
            .read_into(core, bus, &mut value[i * size..][..size])?;
    }
    core.state.set_ymm(instr.op0_register(), &value);
    Ok(())
}

/// MASKMOVQ, MASKMOVDQU, VMASKMOVDQU: bytes to DS:rDI.
pub(super) fn masked_bytes(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    let (value, mask) = (instr.op1_register(), instr.op2_register());
    let (value, mask, length) = match instr.mnemonic() {
        Mnemonic::Maskmovq => {
            if core.state.cr0 & cr0::EM != 0 {
                return Err(Exception::undefined());
            }
            require_no_ts(core)?;
            // FSW.ES: an unmasked x87 exception is pending
            if core.state.xsave.0[2] & 0x80 != 0 {
                return Err(Exception::new(vector::MF));
            }
            (mm(core, value), mm(core, mask), 8)
        }
        Mnemonic::Maskmovdqu => {
            require_sse(core)?;
            (core.state.ymm(value), core.state.ymm(mask), 16)
        }
        _ => {
            require_avx(core)?;
            (core.state.ymm(value), core.state.ymm(mask), 16)
        }
    };
    let width = match instr.op0_kind() {
        OpKind::MemorySegEDI => 0xffff_ffff,
        OpKind::MemorySegDI => 0xffff,
        _ => u64::MAX,
    };
    let offset = core.state.gpr[gpr::RDI] & width;
    // whatever its length, and whatever the mask
    let address = Address::in_segment(core, instr.memory_segment(), offset).aligned(core, 8)?;
    let chosen = (0..length).filter(|i| masked_in(&mask, *i, 1));
    for i in chosen.clone() {
        address.plus(i as u64).probe_write(core, 1)?;
    }
    for i in chosen {
        address.plus(i as u64).write(core, bus, &value[i..=i])?;
    }
    Ok(())
}

/// An MMX register, after what every MMX instruction does to the x87 state.
fn mm(core: &mut Core, register: Register) -> Ymm {
    let at = mmx_slot(&mut core.state, register.number());
    let mut value = [0; 32];
    value[..8].copy_from_slice(&core.state.xsave.0[at..][..8]);
    value
}

/// The shape of a gather.
struct Gather {
    /// Bytes an element.
    size: usize,
    /// Bytes an index.
    index_size: usize,
    elements: usize,
    base: u64,
    stack: bool,
    scale: i64,
    narrow: bool,
    segment: Register,
}

impl Gather {
    fn new(core: &Core, instr: &Instruction) -> Self {
        use Mnemonic as M;
        let size = element_size(instr.mnemonic());
        let index_size = match instr.mnemonic() {
            M::Vgatherqps | M::Vgatherqpd | M::Vpgatherqd | M::Vpgatherqq => 8,
            _ => 4,
        };
        let data = instr.op0_register().size() / size;
        let indexes = instr.memory_index().size() / index_size;
        let base = instr.memory_base();
        let mut offset = instr.memory_displacement64();
        if base.is_gpr() {
            offset = offset.wrapping_add(core.gpr(base));
        }
        let segment = instr.memory_segment();
        let on_stack = matches!(base.full_register(), Register::RSP | Register::RBP)
            && !matches!(segment, Register::FS | Register::GS);
        Self {
            size,
            index_size,
            elements: data.min(indexes),
            base: offset,
            stack: on_stack,
            scale: i64::from(instr.memory_index_scale()),
            narrow: base.is_gpr32() || (base == Register::None && instr.memory_displ_size() == 4),
            segment,
        }
    }

    fn address(&self, core: &Core, indexes: &Ymm, element: usize) -> Address {
        let bytes = &indexes[element * self.index_size..][..self.index_size];
        let raw = bytes
            .iter()
            .rev()
            .fold(0_u64, |value, byte| value << 8 | u64::from(*byte));
        let index = if self.index_size == 4 {
            i64::from(raw as i32)
        } else {
            raw as i64
        };
        let mut offset = self
            .base
            .wrapping_add(index.wrapping_mul(self.scale) as u64);
        if self.narrow {
            offset &= 0xffff_ffff;
        }
        let mut address = Address::in_segment(core, self.segment, offset);
        address.stack |= self.stack;
        address
    }
}

/// VGATHER and VPGATHER of AVX2. After a fault, elements already loaded have their mask
/// cleared, so that the instruction can go on.
pub(super) fn gather(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    require_avx(core)?;
    let (to, indexes, mask) = (
        instr.op0_register(),
        instr.memory_index(),
        instr.op2_register(),
    );
    let numbers = [to.number(), indexes.number(), mask.number()];
    if numbers[0] == numbers[1] || numbers[0] == numbers[2] || numbers[1] == numbers[2] {
        return Err(Exception::undefined());
    }
    let gather = Gather::new(core, instr);
    let index_values = core.state.ymm(indexes);
    let mut masks = core.state.ymm(mask);
    let mut value = core.state.ymm(to);
    let size = gather.size;
    for i in 0..gather.elements {
        let all = if masked_in(&masks, i, size) { 0xff } else { 0 };
        masks[i * size..][..size].fill(all);
    }
    for i in 0..gather.elements {
        if !masked_in(&masks, i, size) {
            continue;
        }
        let mut element = [0; 8];
        if let Err(e) =
            gather
                .address(core, &index_values, i)
                .read_into(core, bus, &mut element[..size])
        {
            core.state.set_ymm(to, &value);
            core.state.set_ymm(mask, &masks);
            return Err(e);
        }
        value[i * size..][..size].copy_from_slice(&element[..size]);
        masks[i * size..][..size].fill(0);
    }
    value[gather.elements * size..].fill(0);
    core.state.set_ymm(to, &value);
    core.state.set_ymm(mask, &[0; 32]);
    Ok(())
}
