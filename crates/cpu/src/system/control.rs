//! Control and debug registers, HLT, CPUID, the time stamp counter, TLB instructions and
//! XCR0 (Intel SDM vol. 3A §2.5, §2.8, §4.10, §17.2).

use iced_x86::{Instruction, Register};

use super::memory::Address;
use super::{Done, Flow, cpuid as table};
use crate::bus::Bus;
use crate::exception::{Exception, vector};
use crate::mmu::{Core, PHYSICAL_BITS};
use crate::state::{cr0, cr4, efer, gpr, segment as index};

/// The bits of CR0 that exist; writes to other low bits are ignored.
const CR0_BITS: u64 = cr0::PE
    | cr0::MP
    | cr0::EM
    | cr0::TS
    | cr0::ET
    | cr0::NE
    | cr0::WP
    | cr0::AM
    | cr0::NW
    | cr0::CD
    | cr0::PG;
/// The bits of CR4 that CPUID offers.
const CR4_BITS: u64 = cr4::TSD
    | cr4::DE
    | cr4::PSE
    | cr4::PAE
    | cr4::MCE
    | cr4::PGE
    | cr4::PCE
    | cr4::OSFXSR
    | cr4::OSXMMEXCPT
    | cr4::UMIP
    | cr4::FSGSBASE
    | cr4::PCIDE
    | cr4::OSXSAVE
    | cr4::SMEP
    | cr4::SMAP;
/// CR3: the TLB entries of the new PCID stay valid.
const CR3_KEEP: u64 = 1 << 63;
/// DR6: debug register access detected.
const DR6_BD: u64 = 1 << 13;
/// KVM's "no such hypercall".
const KVM_ENOSYS: i64 = -1000;

pub(super) fn require_cpl0(core: &Core) -> Done {
    if core.state.cpl == 0 {
        Ok(())
    } else {
        Err(Exception::general_protection(0))
    }
}

/// SGDT and friends outside ring 0.
pub(super) fn require_no_umip(core: &Core) -> Done {
    if core.state.cr4 & cr4::UMIP != 0 {
        require_cpl0(core)
    } else {
        Ok(())
    }
}

/// The host's time stamp counter.
fn host_tsc() -> u64 {
    // SAFETY: RDTSC reads a counter and touches nothing else; Linux leaves it enabled.
    unsafe { std::arch::x86_64::_rdtsc() }
}

impl Core {
    /// What the guest's time stamp counter is an offset from.
    fn base_tsc(&self) -> u64 {
        self.clock.as_ref().map_or_else(host_tsc, |clock| clock())
    }

    /// The guest's time stamp counter.
    pub(crate) fn tsc(&self) -> u64 {
        self.base_tsc().wrapping_add(self.state.tsc_offset)
    }

    pub(super) fn set_tsc(&mut self, value: u64) {
        self.state.tsc_offset = value.wrapping_sub(self.base_tsc());
    }
}

pub(super) fn hlt(core: &mut Core, instr: &Instruction) -> Result<Flow, Exception> {
    require_cpl0(core)?;
    core.state.rip = instr.next_ip();
    Ok(Flow::Halt)
}

pub(super) fn cpuid(core: &mut Core) {
    let leaf = core.state.gpr[gpr::RAX] as u32;
    let subleaf = core.state.gpr[gpr::RCX] as u32;
    let [eax, ebx, ecx, edx] = table::cpuid(core, leaf, subleaf);
    core.state.gpr[gpr::RAX] = u64::from(eax);
    core.state.gpr[gpr::RBX] = u64::from(ebx);
    core.state.gpr[gpr::RCX] = u64::from(ecx);
    core.state.gpr[gpr::RDX] = u64::from(edx);
}

fn require_tsc(core: &Core) -> Done {
    if core.state.cr4 & cr4::TSD != 0 {
        require_cpl0(core)
    } else {
        Ok(())
    }
}

pub(super) fn rdtsc(core: &mut Core) -> Done {
    require_tsc(core)?;
    let tsc = core.tsc();
    core.set_edx_eax(tsc);
    Ok(())
}

pub(super) fn rdtscp(core: &mut Core) -> Done {
    rdtsc(core)?;
    core.state.gpr[gpr::RCX] = core.state.msrs.tsc_aux & 0xffff_ffff;
    Ok(())
}

pub(super) fn clts(core: &mut Core) -> Done {
    require_cpl0(core)?;
    core.state.cr0 &= !cr0::TS;
    Ok(())
}

pub(super) fn lmsw(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    require_cpl0(core)?;
    let value = core.read_operand(bus, instr, 0, 2)?;
    let low = cr0::PE | cr0::MP | cr0::EM | cr0::TS;
    // PE can be set but not cleared
    let kept = core.state.cr0 & (!low | cr0::PE);
    set_cr0(core, kept | value & low)
}

pub(super) fn smsw(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    require_no_umip(core)?;
    let value = core.state.cr0;
    core.write_word(bus, instr, value)
}

/// A hypercall of the KVM interface, of which none are offered yet.
pub(super) fn hypercall(core: &mut Core) -> Done {
    if core.state.cpl != 0 {
        return Err(Exception::undefined());
    }
    core.state.gpr[gpr::RAX] = KVM_ENOSYS as u64;
    Ok(())
}

pub(super) fn mov_from_cr(core: &mut Core, bus: &dyn Bus, to: Register, from: Register) -> Done {
    let value = match from {
        Register::CR0 => core.state.cr0,
        Register::CR2 => core.state.cr2,
        Register::CR3 => core.state.cr3,
        Register::CR4 => core.state.cr4,
        Register::CR8 => u64::from(bus.task_priority()),
        _ => return Err(Exception::undefined()),
    };
    require_cpl0(core)?;
    core.set_gpr(to, value);
    Ok(())
}

pub(super) fn mov_to_cr(core: &mut Core, bus: &dyn Bus, to: Register, from: Register) -> Done {
    let value = core.gpr(from);
    if !matches!(
        to,
        Register::CR0 | Register::CR2 | Register::CR3 | Register::CR4 | Register::CR8
    ) {
        return Err(Exception::undefined());
    }
    require_cpl0(core)?;
    match to {
        Register::CR0 => set_cr0(core, value),
        Register::CR2 => {
            core.state.cr2 = value;
            Ok(())
        }
        Register::CR3 => set_cr3(core, value),
        Register::CR4 => set_cr4(core, value),
        _ => set_cr8(core, bus, value),
    }
}

fn set_cr0(core: &mut Core, value: u64) -> Done {
    let fault = Err(Exception::general_protection(0));
    let pdptes_valid = core.pdptes_are_valid();
    let state = &mut *core.state;
    let on = |bit| value & bit != 0;
    if value >> 32 != 0 || (on(cr0::PG) && !on(cr0::PE)) || (on(cr0::NW) && !on(cr0::CD)) {
        return fault;
    }
    let was_on = state.cr0 & cr0::PG != 0;
    let long_code = state.segments[index::CS].attributes & 0x2000 != 0;
    if was_on && !on(cr0::PG) && (state.is_long_code() || state.cr4 & cr4::PCIDE != 0) {
        return fault;
    }
    if !was_on && on(cr0::PG) && state.efer & efer::LME != 0 {
        if state.cr4 & cr4::PAE == 0 || long_code {
            return fault;
        }
        state.efer |= efer::LMA;
    } else if !was_on && on(cr0::PG) && state.cr4 & cr4::PAE != 0 && !pdptes_valid {
        return fault;
    } else if was_on && !on(cr0::PG) {
        state.efer &= !efer::LMA;
    }
    let new = value & CR0_BITS | cr0::ET;
    let changed = new ^ state.cr0;
    state.cr0 = new;
    if changed & cr0::PE != 0 {
        state.cpl = 0;
    }
    if changed & (cr0::PG | cr0::WP | cr0::PE) != 0 {
        core.flush_all();
    }
    Ok(())
}

fn set_cr3(core: &mut Core, value: u64) -> Done {
    let pcide = core.state.cr4 & cr4::PCIDE != 0;
    let keep = pcide && value & CR3_KEEP != 0;
    let value = if pcide { value & !CR3_KEEP } else { value };
    if value >> PHYSICAL_BITS != 0 {
        return Err(Exception::general_protection(0));
    }
    let old = std::mem::replace(&mut core.state.cr3, value);
    let pae = core.state.cr0 & cr0::PG != 0
        && core.state.cr4 & cr4::PAE != 0
        && !core.state.is_long_mode();
    if pae && !core.pdptes_are_valid() {
        core.state.cr3 = old;
        return Err(Exception::general_protection(0));
    }
    core.select_space(keep);
    Ok(())
}

fn set_cr4(core: &mut Core, value: u64) -> Done {
    let fault = Err(Exception::general_protection(0));
    let old = core.state.cr4;
    let changed = old ^ value;
    if value & !CR4_BITS != 0 {
        return fault;
    }
    let long = core.state.efer & efer::LMA != 0;
    if long && value & cr4::PAE == 0 {
        return fault;
    }
    if changed & value & cr4::PCIDE != 0 && (!long || core.state.cr3 & 0xfff != 0) {
        return fault;
    }
    core.state.cr4 = value;
    if changed & cr4::PCIDE != 0 {
        core.select_space(false);
    }
    if changed & (cr4::PSE | cr4::PAE | cr4::PGE | cr4::PCIDE | cr4::SMEP | cr4::SMAP) != 0 {
        core.flush_all();
    }
    Ok(())
}

fn set_cr8(core: &mut Core, bus: &dyn Bus, value: u64) -> Done {
    if value > 15 {
        return Err(Exception::general_protection(0));
    }
    bus.set_task_priority(value as u8);
    core.check_interrupts = true;
    Ok(())
}

/// The index in `state.dr` of DR0 to DR7.
fn debug_index(core: &mut Core, register: Register) -> Result<usize, Exception> {
    let number = register.number();
    if (number == 4 || number == 5) && core.state.cr4 & cr4::DE != 0 || number > 7 {
        return Err(Exception::undefined());
    }
    require_cpl0(core)?;
    if core.state.dr[5] & super::deliver::DR7_GD != 0 {
        core.state.dr[4] |= DR6_BD;
        return Err(Exception::new(vector::DB));
    }
    Ok(match number {
        0..=3 => number,
        4 | 6 => 4,
        _ => 5,
    })
}

pub(super) fn mov_from_dr(core: &mut Core, to: Register, from: Register) -> Done {
    let at = debug_index(core, from)?;
    let value = core.state.dr[at];
    core.set_gpr(to, value);
    Ok(())
}

pub(super) fn mov_to_dr(core: &mut Core, to: Register, from: Register) -> Done {
    let at = debug_index(core, to)?;
    let value = core.gpr(from);
    if at >= 4 && value >> 32 != 0 {
        return Err(Exception::general_protection(0));
    }
    core.state.dr[at] = match at {
        4 => value & 0xe00f | 0xffff_0ff0,
        5 => value & 0xffff_23ff | 0x400,
        _ => value,
    };
    Ok(())
}

fn require_xcr0(core: &Core) -> Done {
    if core.state.cr4 & cr4::OSXSAVE == 0 {
        Err(Exception::undefined())
    } else {
        Ok(())
    }
}

pub(super) fn xgetbv(core: &mut Core) -> Done {
    require_xcr0(core)?;
    if core.state.gpr[gpr::RCX] as u32 != 0 {
        return Err(Exception::general_protection(0));
    }
    let value = core.state.xcr0;
    core.set_edx_eax(value);
    Ok(())
}

pub(super) fn xsetbv(core: &mut Core) -> Done {
    require_xcr0(core)?;
    require_cpl0(core)?;
    let value = core.edx_eax();
    let avx_without_sse = value & 6 == 4;
    if core.state.gpr[gpr::RCX] as u32 != 0
        || value & 1 == 0
        || value & !core.cpuid.xcr0() != 0
        || avx_without_sse
    {
        return Err(Exception::general_protection(0));
    }
    core.state.xcr0 = value;
    Ok(())
}

pub(super) fn invlpg(core: &mut Core, instr: &Instruction) -> Done {
    require_cpl0(core)?;
    let linear = Address::of(core, instr).linear;
    if Core::canonical(linear) {
        core.flush_page(linear);
    }
    Ok(())
}

/// INVPCID (Intel SDM vol. 2A). Entries of global pages may go too.
pub(super) fn invpcid(core: &mut Core, bus: &dyn Bus, instr: &Instruction) -> Done {
    require_cpl0(core)?;
    let fault = Err(Exception::general_protection(0));
    let kind = core.gpr(instr.op0_register());
    let descriptor: [u8; 16] = Address::of(core, instr).read(core, bus)?;
    let raw = u128::from_le_bytes(descriptor);
    let (low, linear) = (raw as u64, (raw >> 64) as u64);
    if kind > 3 || low >> 12 != 0 {
        return fault;
    }
    if kind < 2 && core.state.cr4 & cr4::PCIDE == 0 && low != 0 {
        return fault;
    }
    match kind {
        0 if !Core::canonical(linear) => return fault,
        0 => core.flush_page_of(low, linear),
        1 => core.flush_pcid(low),
        _ => core.flush_all(),
    }
    Ok(())
}

/// CLFLUSH, CLFLUSHOPT, CLWB: nothing but a load's faults.
pub(super) fn flush_line(core: &mut Core, instr: &Instruction) -> Done {
    Address::of(core, instr).probe_read(core)
}
