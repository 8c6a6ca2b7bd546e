//! Saving and restoring extended state (Intel SDM vol. 1 chapters 10.5 and 13), and what
//! an instruction raises when the unit it needs is not to be had.
//!
//! Works on `state.xsave`, in the standard format. The x87 instruction and data pointers
//! in there are the host's: they are never shown to the guest.

use std::sync::OnceLock;

use iced_x86::{CpuidFeature, Instruction, Mnemonic};

use super::memory::Address;
use super::{Done, fpu_env};
use crate::bus::Bus;
use crate::exception::{Exception, vector};
use crate::mmu::Core;
use crate::state::{State, XSAVE_AVX_OFFSET, XSAVE_HEADER_OFFSET, XSAVE_SIZE, cr0, cr4};

/// State components.
pub(super) const X87: u64 = 1;
pub(super) const SSE: u64 = 2;
pub(super) const AVX: u64 = 4;

const MXCSR_OFFSET: usize = 24;
const X87_REGISTERS: usize = 32;
const XMM_REGISTERS: usize = 160;
const XMM_END: usize = 416;
const MXCSR_INITIAL: u32 = 0x1f80;
/// `XCOMP_BV`: compacted format.
const COMPACTED: u64 = 1 << 63;
const FCW_INITIAL: [u8; 2] = [0x7f, 0x03];

/// Which instruction of the XSAVE family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Plain,
    Optimized,
    Compacted,
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes([
        bytes[offset],
        bytes[offset + 1],
        bytes[offset + 2],
        bytes[offset + 3],
    ])
}

pub(super) fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from(u32_at(bytes, offset)) | u64::from(u32_at(bytes, offset + 4)) << 32
}

/// The bits of MXCSR that the host has.
fn mxcsr_mask() -> u32 {
    static MASK: OnceLock<u32> = OnceLock::new();
    *MASK.get_or_init(|| {
        #[repr(C, align(16))]
        struct Image([u8; 512]);
        let mut image = Image([0; 512]);
        // SAFETY: FXSAVE64 writes 512 bytes to a 16-byte aligned buffer of that size.
        unsafe { std::arch::x86_64::_fxsave64(image.0.as_mut_ptr()) };
        match u32_at(&image.0, MXCSR_OFFSET + 4) {
            0 => 0xffbf,
            mask => mask,
        }
    })
}

impl State {
    /// Whether the saved x87 state has an unmasked exception pending.
    pub(crate) fn x87_pending(&self) -> bool {
        self.in_use() & X87 != 0 && self.xsave.0[2] & 0x80 != 0
    }

    /// Components that may not be in their initial configuration: the host's guess, which
    /// depends on how often they were loaded and saved.
    pub(super) fn in_use(&self) -> u64 {
        u64_at(&self.xsave.0, XSAVE_HEADER_OFFSET) & (X87 | SSE | AVX)
    }

    /// Components that are not in their initial configuration, as the guest sees `XINUSE`:
    /// it follows from what the guest did alone. Their bytes have to mean what they say.
    fn changed(&self) -> u64 {
        let area = &self.xsave.0;
        let zero = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
        let control = area[..2] == FCW_INITIAL && zero(&area[2..5]);
        let mut changed = 0;
        if !control || !zero(&area[X87_REGISTERS..XMM_REGISTERS]) {
            changed |= X87;
        }
        if !zero(&area[XMM_REGISTERS..XMM_END]) {
            changed |= SSE;
        }
        if !zero(&area[XSAVE_AVX_OFFSET..]) {
            changed |= AVX;
        }
        changed
    }

    fn set_in_use(&mut self, components: u64) {
        self.xsave.0[XSAVE_HEADER_OFFSET..XSAVE_HEADER_OFFSET + 8]
            .copy_from_slice(&components.to_le_bytes());
        self.xsave.0[XSAVE_HEADER_OFFSET + 8..XSAVE_AVX_OFFSET].fill(0);
    }

    pub(super) fn mxcsr(&self) -> u32 {
        u32_at(&self.xsave.0, MXCSR_OFFSET)
    }

    fn set_mxcsr(&mut self, value: u32) {
        self.xsave.0[MXCSR_OFFSET..MXCSR_OFFSET + 4].copy_from_slice(&value.to_le_bytes());
    }

    /// Writes the initial configuration where a component is in it, so that its bytes mean
    /// what they say; marks `components` as in use.
    pub(super) fn materialize(&mut self, components: u64) {
        let in_use = self.in_use();
        for component in [X87, SSE, AVX] {
            if in_use & component == 0 {
                self.initialize(component);
            }
        }
        self.set_in_use(in_use | components);
    }

    /// Puts the bytes of a component into the initial configuration.
    fn initialize(&mut self, component: u64) {
        let area = &mut self.xsave.0;
        match component {
            X87 => {
                area[..MXCSR_OFFSET].fill(0);
                area[..2].copy_from_slice(&FCW_INITIAL);
                area[X87_REGISTERS..XMM_REGISTERS].fill(0);
            }
            SSE => area[XMM_REGISTERS..XMM_END].fill(0),
            _ => area[XSAVE_AVX_OFFSET..XSAVE_SIZE].fill(0),
        }
    }

    /// The first 416 bytes as FXSAVE and XSAVE store them.
    fn legacy_image(&mut self) -> [u8; XMM_END] {
        self.materialize(0);
        let mut image = [0; XMM_END];
        image.copy_from_slice(&self.xsave.0[..XMM_END]);
        // FOP, FIP, FDP
        image[6..MXCSR_OFFSET].fill(0);
        image[MXCSR_OFFSET + 4..X87_REGISTERS].copy_from_slice(&mxcsr_mask().to_le_bytes());
        image
    }

    /// Loads the x87 part of a legacy image.
    fn load_x87(&mut self, image: &[u8; XMM_END]) {
        self.xsave.0[..6].copy_from_slice(&image[..6]);
        fpu_env::settle_control(self);
        self.xsave.0[6..MXCSR_OFFSET].fill(0);
        self.xsave.0[X87_REGISTERS..XMM_REGISTERS]
            .copy_from_slice(&image[X87_REGISTERS..XMM_REGISTERS]);
    }
}

/// What an instruction on extended state raises if its unit is not available, in the
/// manual's order (Intel SDM vol. 3A §2.5, tables of exception classes in vol. 2A §2.4,
/// §2.7): #UD before #NM. #UD too if nothing is wrong with the unit.
pub(crate) fn fpu_exception(core: &Core, instr: &Instruction) -> Exception {
    let state = &core.state;
    let em = state.cr0 & cr0::EM != 0;
    let ts = state.cr0 & cr0::TS != 0;
    let not_available = Exception::new(vector::NM);
    if instr.mnemonic() == Mnemonic::Wait {
        return if ts && state.cr0 & cr0::MP != 0 {
            not_available
        } else {
            Exception::undefined()
        };
    }
    let Some(unit) = unit_of(instr) else {
        return Exception::undefined();
    };
    let undefined = match unit {
        Unit::X87 => {
            return if em || ts {
                not_available
            } else {
                Exception::undefined()
            };
        }
        Unit::Mmx => em,
        Unit::Sse => em || state.cr4 & cr4::OSFXSR == 0,
        Unit::Avx => avx_undefined(core),
    };
    if !undefined && ts {
        not_available
    } else {
        Exception::undefined()
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Unit {
    X87,
    Mmx,
    Sse,
    Avx,
}

fn unit_of(instr: &Instruction) -> Option<Unit> {
    use CpuidFeature as F;
    let unit = |feature: &CpuidFeature| match feature {
        F::FPU | F::FPU287 | F::FPU287XL_ONLY | F::FPU387 | F::FPU387SL_ONLY => Some(Unit::X87),
        F::MMX => Some(Unit::Mmx),
        F::SSE
        | F::SSE2
        | F::SSE3
        | F::SSSE3
        | F::SSE4_1
        | F::SSE4_2
        | F::AES
        | F::PCLMULQDQ
        | F::SHA => Some(Unit::Sse),
        F::AVX | F::AVX2 | F::FMA | F::F16C => Some(Unit::Avx),
        _ => None,
    };
    instr.cpuid_features().iter().filter_map(unit).max()
}

fn avx_undefined(core: &Core) -> bool {
    core.state.cr4 & cr4::OSXSAVE == 0 || core.state.xcr0 & (SSE | AVX) != SSE | AVX
}

/// Raises what a VEX-encoded instruction does when AVX is not available.
pub(super) fn require_avx(core: &Core) -> Done {
    if avx_undefined(core) {
        return Err(Exception::undefined());
    }
    require_no_ts(core)
}

/// Raises what an SSE instruction does when SSE is not available.
pub(super) fn require_sse(core: &Core) -> Done {
    if core.state.cr0 & cr0::EM != 0 || core.state.cr4 & cr4::OSFXSR == 0 {
        return Err(Exception::undefined());
    }
    require_no_ts(core)
}

/// #NM when CR0.TS is set.
pub(super) fn require_no_ts(core: &Core) -> Done {
    if core.state.cr0 & cr0::TS != 0 {
        Err(Exception::new(vector::NM))
    } else {
        Ok(())
    }
}

/// #NM when CR0.EM or CR0.TS is set.
pub(super) fn require_x87(core: &Core) -> Done {
    if core.state.cr0 & (cr0::EM | cr0::TS) != 0 {
        Err(Exception::new(vector::NM))
    } else {
        Ok(())
    }
}

/// Behind the last XMM register in an FXSAVE image that the running code sees: outside of
/// 64-bit mode it sees eight.
fn xmm_end(core: &Core) -> usize {
    if core.state.is_long_code() {
        XMM_END
    } else {
        XMM_REGISTERS + 8 * 16
    }
}

fn aligned(core: &Core, instr: &Instruction, alignment: u64) -> Result<Address, Exception> {
    // AMD asks for four bytes' alignment here, and lets that #AC go before this #GP
    let address = Address::of(core, instr).aligned(core, 4)?;
    if !address.linear.is_multiple_of(alignment) {
        return Err(Exception::general_protection(0));
    }
    Ok(address)
}

pub(super) fn fxsave(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    require_x87(core)?;
    let address = aligned(core, instr, 16)?;
    address.probe_write(core, 512)?;
    let image = core.state.legacy_image();
    address.write(core, bus, &image[..xmm_end(core)])
}

pub(super) fn fxrstor(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    require_x87(core)?;
    let address = aligned(core, instr, 16)?;
    let whole: [u8; 512] = address.read(core, bus)?;
    let mut image = [0; XMM_END];
    image.copy_from_slice(&whole[..XMM_END]);
    let mxcsr = checked_mxcsr(&image)?;
    let end = xmm_end(core);
    let state = &mut *core.state;
    state.materialize(X87 | SSE);
    state.load_x87(&image);
    state.set_mxcsr(mxcsr);
    state.xsave.0[XMM_REGISTERS..end].copy_from_slice(&image[XMM_REGISTERS..end]);
    Ok(())
}

fn checked_mxcsr(image: &[u8]) -> Result<u32, Exception> {
    let value = u32_at(image, MXCSR_OFFSET);
    if value & !mxcsr_mask() != 0 {
        return Err(Exception::general_protection(0));
    }
    Ok(value)
}

/// The checks that all of the XSAVE family share; returns the requested-feature bitmap.
fn requested(core: &Core) -> Result<u64, Exception> {
    if core.state.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::undefined());
    }
    require_no_ts(core)?;
    Ok(core.edx_eax() & core.state.xcr0)
}

pub(super) fn xsave(core: &mut Core, bus: &dyn Bus, instr: &Instruction, form: Form) -> Done {
    let rfbm = requested(core)?;
    let address = aligned(core, instr, 64)?;
    let size = if rfbm & AVX != 0 {
        XSAVE_SIZE
    } else {
        XSAVE_AVX_OFFSET
    };
    address.probe_write(core, size as u64)?;
    let image = core.state.legacy_image();
    let mut in_use = core.state.changed();
    if form == Form::Compacted && core.state.mxcsr() != MXCSR_INITIAL {
        in_use |= SSE;
    }
    let header = address.plus(XSAVE_HEADER_OFFSET as u64);
    let old = if form == Form::Compacted {
        0
    } else {
        header.read_uint(core, bus, 8)?
    };

    let written = if form == Form::Plain {
        rfbm
    } else {
        rfbm & in_use
    };
    let xmm_end = xmm_end(core);
    let mut put = |from: usize, bytes: &[u8]| address.plus(from as u64).write(core, bus, bytes);
    if written & X87 != 0 {
        put(0, &image[..MXCSR_OFFSET])?;
        put(X87_REGISTERS, &image[X87_REGISTERS..XMM_REGISTERS])?;
    }
    // MXCSR belongs to SSE in the compacted form, else to SSE and AVX both
    let with_mxcsr = if form == Form::Compacted {
        written & SSE
    } else {
        rfbm & (SSE | AVX)
    };
    if with_mxcsr != 0 {
        put(MXCSR_OFFSET, &image[MXCSR_OFFSET..X87_REGISTERS])?;
    }
    if written & SSE != 0 {
        put(XMM_REGISTERS, &image[XMM_REGISTERS..xmm_end])?;
    }
    if written & AVX != 0 {
        let mut high = [0; XSAVE_SIZE - XSAVE_AVX_OFFSET];
        high.copy_from_slice(&core.state.xsave.0[XSAVE_AVX_OFFSET..]);
        address
            .plus(XSAVE_AVX_OFFSET as u64)
            .write(core, bus, &high[..xmm_end - XMM_REGISTERS])?;
    }
    let bv = old & !rfbm | rfbm & in_use;
    header.write(core, bus, &bv.to_le_bytes())?;
    if form == Form::Compacted {
        header
            .plus(8)
            .write(core, bus, &(rfbm | COMPACTED).to_le_bytes())?;
    }
    Ok(())
}

/// The header of an XSAVE area, checked for XRSTOR: `XSTATE_BV`, and whether it is compacted.
fn checked_header(core: &Core, header: &[u8; 64]) -> Result<(u64, bool), Exception> {
    let bv = u64_at(header, 0);
    let comp = u64_at(header, 8);
    let compacted = comp & COMPACTED != 0;
    let allowed = if compacted {
        comp & !COMPACTED
    } else {
        core.state.xcr0
    };
    let reserved = if compacted {
        &header[16..]
    } else {
        &header[8..24]
    };
    if bv & !allowed != 0 || allowed & !core.state.xcr0 != 0 || reserved.iter().any(|b| *b != 0) {
        return Err(Exception::general_protection(0));
    }
    Ok((bv, compacted))
}

pub(super) fn xrstor(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    let rfbm = requested(core)?;
    let address = aligned(core, instr, 64)?;
    let header: [u8; 64] = address.plus(XSAVE_HEADER_OFFSET as u64).read(core, bus)?;
    let (bv, compacted) = checked_header(core, &header)?;
    let loaded = rfbm & bv;
    let mxcsr_wanted = if compacted {
        loaded & SSE
    } else {
        rfbm & (SSE | AVX)
    };

    // everything that can fault comes before the first change
    let mut image = [0; XMM_END];
    if loaded & (X87 | SSE) != 0 || mxcsr_wanted != 0 {
        address.read_into(core, bus, &mut image)?;
    }
    let mut high = [0; XSAVE_SIZE - XSAVE_AVX_OFFSET];
    if loaded & AVX != 0 {
        address
            .plus(XSAVE_AVX_OFFSET as u64)
            .read_into(core, bus, &mut high)?;
    }
    let mxcsr = if mxcsr_wanted != 0 {
        checked_mxcsr(&image)?
    } else if compacted && rfbm & SSE != 0 {
        MXCSR_INITIAL
    } else {
        core.state.mxcsr()
    };

    let end = xmm_end(core);
    let vectors = end - XMM_REGISTERS;
    let state = &mut *core.state;
    state.materialize(0);
    state.set_mxcsr(mxcsr);
    if rfbm & !bv & X87 != 0 {
        state.initialize(X87);
    }
    if rfbm & !bv & SSE != 0 {
        state.xsave.0[XMM_REGISTERS..end].fill(0);
    }
    if rfbm & !bv & AVX != 0 {
        state.xsave.0[XSAVE_AVX_OFFSET..][..vectors].fill(0);
    }
    if loaded & X87 != 0 {
        state.load_x87(&image);
    }
    if loaded & SSE != 0 {
        state.xsave.0[XMM_REGISTERS..end].copy_from_slice(&image[XMM_REGISTERS..end]);
    }
    if loaded & AVX != 0 {
        state.xsave.0[XSAVE_AVX_OFFSET..][..vectors].copy_from_slice(&high[..vectors]);
    }
    // registers that 32-bit code does not see are as they were
    let kept = if end == XMM_END {
        !rfbm
    } else {
        !rfbm | SSE | AVX
    };
    let in_use = state.in_use() & kept | loaded;
    state.set_in_use(in_use);
    Ok(())
}
