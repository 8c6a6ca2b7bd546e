//! Instructions that 64-bit mode does not have (Intel SDM vol. 2): decimal adjustment,
//! BOUND, INTO, ARPL, PUSHA and POPA.

use iced_x86::{Code, Instruction, Mnemonic, Register};

use super::memory::Address;
use super::{Done, Flow, deliver};
use crate::bus::Bus;
use crate::exception::{Exception, vector};
use crate::mmu::Core;
use crate::state::{gpr, rflags};

/// The values of PUSHA in the order it pushes them.
const PUSHED: [usize; 8] = [
    gpr::RAX,
    gpr::RCX,
    gpr::RDX,
    gpr::RBX,
    gpr::RSP,
    gpr::RBP,
    gpr::RSI,
    gpr::RDI,
];

fn set_flags(core: &mut Core, values: u64, mask: u64) {
    let flags = core.state.rflags() & !mask | values & mask;
    core.state.set_rflags(flags);
}

fn flag(on: bool, flag: u64) -> u64 {
    if on { flag } else { 0 }
}

/// SF, ZF and PF of a byte.
fn byte_flags(value: u8) -> u64 {
    flag(value & 0x80 != 0, rflags::SF)
        | flag(value == 0, rflags::ZF)
        | flag(value.count_ones().is_multiple_of(2), rflags::PF)
}

/// AAA, AAS, AAD, AAM, DAA, DAS, SALC.
pub(super) fn adjust(core: &mut Core, instr: &Instruction) -> Done {
    let al = core.gpr(Register::AL) as u8;
    let ah = core.gpr(Register::AH) as u8;
    let flags = core.state.rflags();
    let carry = flags & rflags::CF != 0;
    let low = al & 0xf > 9 || flags & rflags::AF != 0;
    match instr.mnemonic() {
        Mnemonic::Aaa | Mnemonic::Aas => {
            let ax = core.gpr(Register::AX) as u16;
            let adjusted = match (low, instr.mnemonic()) {
                (false, _) => ax,
                (true, Mnemonic::Aaa) => ax.wrapping_add(0x106),
                _ => ax.wrapping_sub(0x106),
            };
            core.set_gpr(Register::AX, u64::from(adjusted & 0xff0f));
            let both = rflags::AF | rflags::CF;
            set_flags(core, flag(low, both), both);
        }
        Mnemonic::Daa | Mnemonic::Das => {
            let add = instr.mnemonic() == Mnemonic::Daa;
            let step = |value: u8, by: u8| {
                if add {
                    value.overflowing_add(by)
                } else {
                    value.overflowing_sub(by)
                }
            };
            let high = al > 0x99 || carry;
            let (first, wrapped) = if low { step(al, 6) } else { (al, false) };
            let last = if high { step(first, 0x60).0 } else { first };
            core.set_gpr(Register::AL, u64::from(last));
            // only subtraction can borrow where the high digit needs nothing
            let borrowed = !add && wrapped;
            let values = flag(high || borrowed, rflags::CF) | flag(low, rflags::AF);
            set_adjusted(core, last, values, rflags::CF | rflags::AF);
        }
        Mnemonic::Aam => {
            let base = instr.immediate8();
            if base == 0 {
                return Err(Exception::new(vector::DE));
            }
            core.set_gpr(
                Register::AX,
                u64::from(al / base) << 8 | u64::from(al % base),
            );
            set_adjusted(core, al % base, 0, 0);
        }
        Mnemonic::Aad => {
            let sum = al.wrapping_add(ah.wrapping_mul(instr.immediate8()));
            core.set_gpr(Register::AX, u64::from(sum));
            set_adjusted(core, sum, 0, 0);
        }
        _ => core.set_gpr(Register::AL, if carry { 0xff } else { 0 }),
    }
    Ok(())
}

fn set_adjusted(core: &mut Core, result: u8, values: u64, mask: u64) {
    let mask = mask | rflags::SF | rflags::ZF | rflags::PF;
    set_flags(core, byte_flags(result) | values, mask);
}

/// INTO.
pub(super) fn into(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Result<Flow, Exception> {
    if core.state.rflags() & rflags::OF == 0 {
        return Ok(Flow::Next);
    }
    deliver::software_interrupt(core, bus, vector::OF, instr.next_ip())
}

/// BOUND: both bounds are inclusive, and all values signed.
pub(super) fn bound(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    let size = instr.op0_register().size();
    let shift = 64 - 8 * size as u32;
    let signed = |value: u64| (value << shift) as i64 >> shift;
    let index = signed(core.gpr(instr.op0_register()));
    let address = Address::of(core, instr);
    let lower = signed(address.read_uint(core, bus, size)?);
    let upper = signed(address.plus(size as u64).read_uint(core, bus, size)?);
    if index < lower || index > upper {
        return Err(Exception::new(vector::BR));
    }
    Ok(())
}

/// ARPL.
pub(super) fn arpl(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    if core.state.is_real() {
        return Err(Exception::undefined());
    }
    let selector = core.read_operand(bus, instr, 0, 2)?;
    let rpl = core.gpr(instr.op1_register()) & 3;
    let lower = selector & 3 < rpl;
    if lower {
        let raised = selector & !3 | rpl;
        if instr.op0_kind() == iced_x86::OpKind::Register {
            let register = Register::AX + (instr.op0_register().number() as u32 & 7);
            core.set_gpr(register, raised);
        } else {
            core.write_word(bus, instr, raised)?;
        }
    }
    set_flags(core, flag(lower, rflags::ZF), rflags::ZF);
    Ok(())
}

/// PUSHA, PUSHAD.
pub(super) fn push_all(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    let size = if instr.code() == Code::Pushaw { 2 } else { 4 };
    let mut pointer = core.stack_pointer();
    for register in PUSHED {
        pointer = pointer.wrapping_sub(size as u64);
        let value = core.state.gpr[register].to_le_bytes();
        core.stack_at(pointer)
            .aligned(core, size)?
            .write(core, bus, &value[..size])?;
    }
    core.set_stack_pointer(pointer);
    Ok(())
}

/// POPA, POPAD.
pub(super) fn pop_all(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    let size = if instr.code() == Code::Popaw { 2 } else { 4 };
    let mut values = [0; 8];
    for (at, value) in (0..).zip(&mut values) {
        *value = core.peek(bus, at, size)?;
    }
    core.drop_stack(8 * size as u64);
    let first = if size == 2 {
        Register::AX
    } else {
        Register::EAX
    };
    for (value, register) in values.into_iter().zip(PUSHED.iter().rev()) {
        if *register != gpr::RSP {
            core.set_gpr(first + *register as u32, value);
        }
    }
    Ok(())
}
