//! RDMSR and WRMSR (Intel SDM vol. 4, AMD APM vol. 2 appendix A). What belongs to the
//! machine (APIC, timers, clocks) goes to the bus.

use super::Done;
use super::control::require_cpl0;
use super::cpuid::Vendor;
use crate::bus::Bus;
use crate::exception::Exception;
use crate::mmu::Core;
use crate::state::{cr0, efer, gpr};

const TSC: u32 = 0x10;
const PLATFORM_ID: u32 = 0x17;
const SPEC_CTRL: u32 = 0x48;
const PRED_CMD: u32 = 0x49;
const BIOS_SIGN_ID: u32 = 0x8b;
const MTRRCAP: u32 = 0xfe;
const ARCH_CAPABILITIES: u32 = 0x10a;
const SYSENTER_CS: u32 = 0x174;
const SYSENTER_ESP: u32 = 0x175;
const SYSENTER_EIP: u32 = 0x176;
const MISC_ENABLE: u32 = 0x1a0;
const DEBUGCTL: u32 = 0x1d9;
const PAT: u32 = 0x277;
const MTRR_DEF_TYPE: u32 = 0x2ff;
const TSC_DEADLINE: u32 = 0x6e0;
const EFER: u32 = 0xc000_0080;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const CSTAR: u32 = 0xc000_0083;
const FMASK: u32 = 0xc000_0084;
const FS_BASE: u32 = 0xc000_0100;
const GS_BASE: u32 = 0xc000_0101;
const KERNEL_GS_BASE: u32 = 0xc000_0102;
const TSC_AUX: u32 = 0xc000_0103;
const SYSCFG: u32 = 0xc001_0010;
const HWCR: u32 = 0xc001_0015;
const NB_CFG: u32 = 0xc001_001f;
const PATCH_LOADER: u32 = 0xc001_0020;
const DE_CFG: u32 = 0xc001_1029;

/// No variable ranges, no fixed ranges, write combining.
const MTRRCAP_VALUE: u64 = 1 << 10;
/// What firmware leaves in `IA32_MTRR_DEF_TYPE`: enabled, write-back. The state holds the
/// difference to it, so that a state that starts with zeros starts as firmware leaves it.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;
/// `IA32_MISC_ENABLE` bits that read as one: fast strings, no BTS, no PEBS.
const MISC_ENABLE_FIXED: u64 = 1 | 1 << 11 | 1 << 12;
/// Core performance counters run at P0 frequency: the TSC does.
const HWCR_TSC_FREQ_SEL: u64 = 1 << 24;
/// LFENCE serialises.
const DE_CFG_LFENCE: u64 = 1 << 1;
const NB_CFG_ENABLE_CF8_EXT: u64 = 1 << 46;
/// IBRS, STIBP, SSBD.
const SPEC_CTRL_BITS: u64 = 0b111;

/// What `IA32_ARCH_CAPABILITIES` says does not concern this CPU, so that the guest takes no
/// precautions: `RDCL_NO`, `IBRS_ALL`, `SKIP_L1DFL_VMENTRY`, `SSB_NO`, `MDS_NO`,
/// `IF_PSCHANGE_MC_NO`, `TAA_NO`, `SBDR_SSDP_NO`, `FBSDP_NO`, `PSDP_NO`, `BHI_NO`,
/// `PBRSB_NO`, `GDS_NO`, `RFDS_NO`, `ITS_NO`. The guest runs translated: the host's kernel
/// guards the process it is.
const ARCH_CAPABILITIES_VALUE: u64 = 1
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;

fn fault<T>() -> Result<T, Exception> {
    Err(Exception::general_protection(0))
}

/// Whether an MSR belongs to the machine: `IA32_APIC_BASE`, x2APIC, KVM's clocks.
fn is_machine(msr: u32) -> bool {
    matches!(msr, 0x11 | 0x12 | 0x1b | 0x800..=0x8ff | 0x4b56_4d00..=0x4b56_4dff)
}

pub(super) fn rdmsr(core: &mut Core, bus: &dyn Bus) -> Done {
    require_cpl0(core)?;
    let msr = core.state.gpr[gpr::RCX] as u32;
    let value = read(core, bus, msr)?;
    core.set_edx_eax(value);
    Ok(())
}

pub(super) fn wrmsr(core: &mut Core, bus: &dyn Bus) -> Done {
    require_cpl0(core)?;
    let msr = core.state.gpr[gpr::RCX] as u32;
    let value = core.edx_eax();
    if is_machine(msr) {
        core.check_interrupts = true;
        return bus
            .msr_write(msr, value)
            .ok_or(Exception::general_protection(0));
    }
    if msr == TSC_DEADLINE {
        return write_deadline(core, bus, value);
    }
    if write_syscall(core, msr, value)? {
        return Ok(());
    }
    write(core, msr, value)
}

/// The bus counts deadlines in host TSC units; 0 means none in both.
fn write_deadline(core: &mut Core, bus: &dyn Bus, value: u64) -> Done {
    core.check_interrupts = true;
    let host = match value {
        0 => 0,
        // a deadline before the host's zero is in the past
        value => host_deadline(value, core.state.tsc_offset),
    };
    bus.msr_write(TSC_DEADLINE, host)
        .ok_or(Exception::general_protection(0))
}

fn host_deadline(guest: u64, offset: u64) -> u64 {
    let ahead = i128::from(guest) - i128::from(offset as i64);
    ahead.clamp(1, i128::from(u64::MAX)) as u64
}

fn read_deadline(core: &Core, bus: &dyn Bus) -> Option<u64> {
    let host = bus.msr_read(TSC_DEADLINE)?;
    Some(if host == 0 {
        0
    } else {
        host.wrapping_add(core.state.tsc_offset)
    })
}

fn read(core: &Core, bus: &dyn Bus, msr: u32) -> Result<u64, Exception> {
    let none = Exception::general_protection(0);
    if is_machine(msr) {
        return bus.msr_read(msr).ok_or(none);
    }
    let state = &core.state;
    let intel = core.cpuid.vendor() == Vendor::Intel;
    Ok(match msr {
        TSC => core.tsc(),
        TSC_DEADLINE => read_deadline(core, bus).ok_or(none)?,
        // the revision in the upper half on Intel, the whole on AMD
        BIOS_SIGN_ID => {
            if intel {
                1 << 32
            } else {
                0x0100_0065
            }
        }
        MTRRCAP => MTRRCAP_VALUE,
        MTRR_DEF_TYPE => state.msrs.mtrr_def_type ^ MTRR_WRITE_BACK,
        PAT => state.msrs.pat,
        SYSENTER_CS => state.msrs.sysenter_cs,
        SYSENTER_ESP => state.msrs.sysenter_esp,
        SYSENTER_EIP => state.msrs.sysenter_eip,
        MISC_ENABLE if intel => state.msrs.misc_enable | MISC_ENABLE_FIXED,
        SPEC_CTRL if intel => state.msrs.spec_ctrl,
        ARCH_CAPABILITIES if intel => ARCH_CAPABILITIES_VALUE,
        PLATFORM_ID if intel => 0,
        DEBUGCTL => 0,
        EFER => state.efer,
        STAR => state.msrs.star,
        LSTAR => state.msrs.lstar,
        CSTAR => state.msrs.cstar,
        FMASK => state.msrs.sfmask,
        FS_BASE => state.fs_base,
        GS_BASE => state.gs_base,
        KERNEL_GS_BASE => state.kernel_gs_base,
        TSC_AUX => state.msrs.tsc_aux,
        SYSCFG if !intel => 0,
        HWCR if !intel => HWCR_TSC_FREQ_SEL,
        DE_CFG if !intel => DE_CFG_LFENCE,
        // extended configuration access, which Linux switches on where it finds it off
        NB_CFG if !intel => NB_CFG_ENABLE_CF8_EXT,
        _ => return fault(),
    })
}

fn canonical(value: u64) -> Result<u64, Exception> {
    if Core::canonical(value) {
        Ok(value)
    } else {
        fault()
    }
}

/// Writes the MSRs of SYSCALL, SYSENTER and the segment bases. False: not one of them.
fn write_syscall(core: &mut Core, msr: u32, value: u64) -> Result<bool, Exception> {
    let state = &mut *core.state;
    match msr {
        STAR => state.msrs.star = value,
        LSTAR => state.msrs.lstar = canonical(value)?,
        CSTAR => state.msrs.cstar = canonical(value)?,
        FMASK => state.msrs.sfmask = value & 0xffff_ffff,
        FS_BASE => state.fs_base = canonical(value)?,
        GS_BASE => state.gs_base = canonical(value)?,
        KERNEL_GS_BASE => state.kernel_gs_base = canonical(value)?,
        SYSENTER_CS => state.msrs.sysenter_cs = value & 0xffff_ffff,
        SYSENTER_ESP => state.msrs.sysenter_esp = canonical(value)?,
        SYSENTER_EIP => state.msrs.sysenter_eip = canonical(value)?,
        _ => return Ok(false),
    }
    Ok(true)
}

fn write(core: &mut Core, msr: u32, value: u64) -> Done {
    let intel = core.cpuid.vendor() == Vendor::Intel;
    let state = &mut *core.state;
    match msr {
        EFER => return write_efer(core, value),
        TSC => core.set_tsc(value),
        TSC_AUX if value >> 32 == 0 => state.msrs.tsc_aux = value,
        PAT if valid_pat(value) => state.msrs.pat = value,
        // types 0, 1, 4, 5, 6; enable bits 10 and 11
        MTRR_DEF_TYPE if value & !0xcff == 0 && matches!(value & 0xff, 0 | 1 | 4..=6) => {
            state.msrs.mtrr_def_type = value ^ MTRR_WRITE_BACK;
        }
        MISC_ENABLE if intel => state.msrs.misc_enable = value & !MISC_ENABLE_FIXED,
        SPEC_CTRL if intel && value & !SPEC_CTRL_BITS == 0 => state.msrs.spec_ctrl = value,
        PRED_CMD if intel && value & !1 == 0 => {}
        // update signals and switches without effect here
        BIOS_SIGN_ID => {}
        DEBUGCTL if value & !3 == 0 => {}
        SYSCFG | HWCR | NB_CFG | PATCH_LOADER | DE_CFG if !intel => {}
        _ => return fault(),
    }
    Ok(())
}

/// Eight memory types: UC, WC, WT, WP, WB, UC-.
fn valid_pat(value: u64) -> bool {
    value
        .to_le_bytes()
        .iter()
        .all(|kind| matches!(kind, 0 | 1 | 4..=7))
}

fn write_efer(core: &mut Core, value: u64) -> Done {
    let mut known = efer::SCE | efer::LME | efer::LMA | efer::NXE;
    if core.cpuid.vendor() == Vendor::Amd {
        known |= efer::AUTOIBRS;
    }
    let old = core.state.efer;
    let changed = old ^ value;
    let paging = core.state.cr0 & cr0::PG != 0;
    if value & !known != 0 || (paging && changed & efer::LME != 0) {
        return fault();
    }
    // LMA follows CR0.PG alone
    core.state.efer = value & !efer::LMA | old & efer::LMA;
    if changed & efer::NXE != 0 {
        core.flush_all();
    }
    Ok(())
}
