//! FNSTENV, FNSAVE, FLDENV, FRSTOR in their 14- and 28-byte forms (Intel SDM vol. 1
//! §8.1.10). Works on `state.xsave`; instruction and data pointers are stored as zero.

use iced_x86::{Code, Instruction, Mnemonic};

use super::Done;
use super::fpu::{X87, require_x87};
use super::memory::Address;
use crate::bus::Bus;
use crate::exception::{Exception, vector};
use crate::mmu::Core;
use crate::state::State;

const FCW: usize = 0;
const FSW: usize = 2;
const FTW: usize = 4;
const REGISTERS: usize = 32;
const FCW_INITIAL: u16 = 0x037f;
/// FSW: error summary and busy.
const FSW_SUMMARY: u16 = 0x8080;

/// The x87 control words.
struct Environment {
    fcw: u16,
    fsw: u16,
    /// Two bits a physical register.
    tags: u16,
}

fn word(state: &State, offset: usize) -> u16 {
    u16::from_le_bytes([state.xsave.0[offset], state.xsave.0[offset + 1]])
}

fn set_word(state: &mut State, offset: usize, value: u16) {
    state.xsave.0[offset..offset + 2].copy_from_slice(&value.to_le_bytes());
}

/// Where ST(i) lies in the XSAVE area.
fn slot(i: usize) -> usize {
    REGISTERS + 16 * (i & 7)
}

fn top(fsw: u16) -> usize {
    usize::from(fsw >> 11 & 7)
}

/// The full tag of a register: valid, zero, special or empty.
fn tag(image: &[u8]) -> u16 {
    let exponent = u16::from_le_bytes([image[8], image[9]]) & 0x7fff;
    let mantissa = image[..8]
        .iter()
        .rev()
        .fold(0_u64, |value, byte| value << 8 | u64::from(*byte));
    match (exponent, mantissa) {
        (0, 0) => 1,
        (0 | 0x7fff, _) => 2,
        (_, m) if m >> 63 == 0 => 2,
        _ => 0,
    }
}

fn environment(state: &State) -> Environment {
    let fsw = word(state, FSW);
    let present = state.xsave.0[FTW];
    let tags = (0..8).fold(0, |tags, physical: usize| {
        let st = physical.wrapping_sub(top(fsw)) & 7;
        let value = if present >> physical & 1 == 0 {
            3
        } else {
            tag(&state.xsave.0[slot(st)..][..10])
        };
        tags | value << (2 * physical)
    });
    Environment {
        fcw: word(state, FCW),
        fsw,
        tags,
    }
}

/// Sets TOP while the physical registers stay: ST(i) move to other slots.
pub(super) fn rotate_to(state: &mut State, new_top: usize) {
    let old = top(word(state, FSW));
    let mut registers = [[0; 16]; 8];
    for (i, register) in registers.iter_mut().enumerate() {
        register.copy_from_slice(&state.xsave.0[slot(i)..][..16]);
    }
    for i in 0..8 {
        let physical = (i + new_top) & 7;
        let from = registers[physical.wrapping_sub(old) & 7];
        state.xsave.0[slot(i)..][..16].copy_from_slice(&from);
    }
    let fsw = word(state, FSW) & !(7 << 11) | (new_top as u16 & 7) << 11;
    set_word(state, FSW, fsw);
}

/// Where the content of MMX register `i` lies, and after this TOP is 0 and all tags valid,
/// as every MMX instruction leaves them.
pub(super) fn mmx_slot(state: &mut State, i: usize) -> usize {
    state.materialize(X87);
    rotate_to(state, 0);
    state.xsave.0[FTW] = 0xff;
    slot(i)
}

/// Makes the control and status words what loading them makes of them: reserved bits of
/// FCW read as they must, and FSW's summary follows from its exceptions.
pub(super) fn settle_control(state: &mut State) {
    let (fcw, fsw) = (word(state, FCW), word(state, FSW));
    let pending = fsw & !fcw & 0x3f != 0;
    // bit 6 of FCW reads as one
    set_word(state, FCW, fcw & 0x1f3f | 0x40);
    let summary = if pending { FSW_SUMMARY } else { 0 };
    set_word(state, FSW, fsw & !FSW_SUMMARY | summary);
}

fn set_environment(state: &mut State, e: &Environment) {
    state.materialize(X87);
    rotate_to(state, top(e.fsw));
    set_word(state, FCW, e.fcw);
    set_word(state, FSW, e.fsw);
    settle_control(state);
    state.xsave.0[FTW] = (0..8).fold(0, |bits, i| {
        bits | u8::from(e.tags >> (2 * i) & 3 != 3) << i
    });
    state.xsave.0[6..24].fill(0);
}

/// Whether the operand has the 14-byte environment.
fn is_word(instr: &Instruction) -> bool {
    matches!(
        instr.code(),
        Code::Fnstenv_m14byte
            | Code::Fstenv_m14byte
            | Code::Fldenv_m14byte
            | Code::Fnsave_m94byte
            | Code::Fsave_m94byte
            | Code::Frstor_m94byte
    )
}

fn environment_size(instr: &Instruction) -> usize {
    if is_word(instr) { 14 } else { 28 }
}

/// The operand's address. Where alignment is checked, it is that of one word of the
/// environment.
fn environment_address(core: &Core, instr: &Instruction) -> Result<Address, Exception> {
    Address::of(core, instr).aligned(core, if is_word(instr) { 2 } else { 4 })
}

/// The stored environment; reserved halves are ones.
fn image(e: &Environment, word: bool) -> [u8; 28] {
    let mut bytes = [0; 28];
    for (i, value) in [e.fcw, e.fsw, e.tags].into_iter().enumerate() {
        if word {
            bytes[2 * i..2 * i + 2].copy_from_slice(&value.to_le_bytes());
        } else {
            let value = u32::from(value) | 0xffff_0000;
            bytes[4 * i..4 * i + 4].copy_from_slice(&value.to_le_bytes());
        }
    }
    if !word {
        bytes[26..].fill(0xff);
    }
    bytes
}

fn parse(bytes: &[u8], word: bool) -> Environment {
    let at = |i: usize| {
        let offset = if word { 2 * i } else { 4 * i };
        u16::from_le_bytes([bytes[offset], bytes[offset + 1]])
    };
    Environment {
        fcw: at(0),
        fsw: at(1),
        tags: at(2),
    }
}

/// #MF where an unmasked x87 exception is pending.
fn require_no_pending(state: &State) -> Done {
    if state.in_use() & X87 != 0 && word(state, FSW) & !word(state, FCW) & 0x3f != 0 {
        return Err(Exception::new(vector::MF));
    }
    Ok(())
}

/// FNSTENV, FSTENV.
pub(super) fn store_environment(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    require_x87(core)?;
    if instr.mnemonic() == Mnemonic::Fstenv {
        require_no_pending(&core.state)?;
    }
    core.state.materialize(X87);
    let e = environment(&core.state);
    let bytes = image(&e, is_word(instr));
    environment_address(core, instr)?.write(core, bus, &bytes[..environment_size(instr)])?;
    // all exceptions are masked afterwards
    set_word(&mut core.state, FCW, e.fcw | 0x3f);
    set_word(&mut core.state, FSW, e.fsw & !FSW_SUMMARY);
    Ok(())
}

/// FNSAVE, FSAVE.
pub(super) fn save(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    require_x87(core)?;
    if instr.mnemonic() == Mnemonic::Fsave {
        require_no_pending(&core.state)?;
    }
    core.state.materialize(X87);
    let head = environment_size(instr);
    let mut bytes = [0; 108];
    bytes[..head].copy_from_slice(&image(&environment(&core.state), is_word(instr))[..head]);
    for i in 0..8 {
        bytes[head + 10 * i..][..10].copy_from_slice(&core.state.xsave.0[slot(i)..][..10]);
    }
    environment_address(core, instr)?.write(core, bus, &bytes[..head + 80])?;
    // FNINIT keeps the registers' content and calls them empty
    let state = &mut *core.state;
    rotate_to(state, 0);
    set_word(state, FCW, FCW_INITIAL);
    set_word(state, FSW, 0);
    state.xsave.0[FTW] = 0;
    state.xsave.0[6..24].fill(0);
    Ok(())
}

/// FLDENV.
pub(super) fn load_environment(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    require_x87(core)?;
    require_no_pending(&core.state)?;
    let mut bytes = [0; 28];
    let size = environment_size(instr);
    environment_address(core, instr)?.read_into(core, bus, &mut bytes[..size])?;
    set_environment(&mut core.state, &parse(&bytes, is_word(instr)));
    Ok(())
}

/// FRSTOR.
pub(super) fn restore(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    require_x87(core)?;
    require_no_pending(&core.state)?;
    let mut bytes = [0; 108];
    let head = environment_size(instr);
    environment_address(core, instr)?.read_into(core, bus, &mut bytes[..head + 80])?;
    let state = &mut *core.state;
    set_environment(state, &parse(&bytes, is_word(instr)));
    for i in 0..8 {
        state.xsave.0[slot(i)..][..10].copy_from_slice(&bytes[head + 10 * i..][..10]);
        state.xsave.0[slot(i) + 10..][..6].fill(0);
    }
    Ok(())
}
