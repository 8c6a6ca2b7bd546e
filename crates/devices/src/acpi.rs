//! The ACPI tables of the machine (ACPI 6.5), built once at boot.
//!
//! Called by the machine, which says where things are and writes the result into guest
//! memory. The platform is hardware-reduced: no SCI, no PM1 blocks, no 8259, no 8254; it is
//! turned off by the sleep control register and reset by the reset register
//! (see [`crate::pm`]).

use std::ops::Range;

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name,
    Package, Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::fadt::{FADT, FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace as RegisterSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use crate::ioapic::IOAPIC_BASE;
use crate::lapic::LAPIC_BASE;
use crate::pm::{RESET_PORT, RESET_VALUE, SLEEP_PORT, SLEEP_TYPE_S5, TIMER_PORT};
use crate::pvpanic::PVPANIC_PORT;
use crate::rtc::{CENTURY, RTC_PORT};
use crate::serial::{COM1_GSI, COM1_PORT, PORTS as SERIAL_PORTS};

const OEM_ID: [u8; 6] = *b"STRATA";
const OEM_TABLE_ID: [u8; 8] = *b"STRATAVM";
const OEM_REVISION: u32 = 1;
/// `IAPC_BOOT_ARCH` bit 2: no VGA to probe for. The bits for an 8042 and other legacy
/// devices stay clear.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
/// Revision 2 makes AML integers 64 bits wide.
const DSDT_REVISION: u8 = 2;
/// Tables begin at multiples of this.
const ALIGNMENT: u64 = 16;

/// What the tables tell of the machine.
#[derive(Clone, Debug)]
pub struct Platform {
    /// Number of CPUs; APIC IDs are 0 to `cpus - 1`.
    pub cpus: u8,
    /// Start of memory-mapped PCI configuration space for bus 0.
    pub pci_ecam: u64,
    /// Size of it in bytes.
    pub pci_ecam_size: u64,
    /// The window for PCI BARs below 4 GiB.
    pub pci_window: Range<u64>,
    /// The window for 64-bit PCI BARs.
    pub pci_window_64: Range<u64>,
}

struct Bytes(Vec<u8>);

impl AmlSink for Bytes {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
    fn vec(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }
}

fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut sink = Bytes(Vec::new());
    aml.to_aml_bytes(&mut sink);
    sink.0
}

/// All tables, to be written to guest memory at `address`, a multiple of 16. The RSDP is
/// first; it and everything after is found from there.
pub fn tables(platform: &Platform, address: u64) -> Vec<u8> {
    let mut image = vec![0; Rsdp::len().next_multiple_of(ALIGNMENT as usize)];
    let mut place = |table: Vec<u8>| {
        let at = address + image.len() as u64;
        image.extend(table);
        image.resize(image.len().next_multiple_of(ALIGNMENT as usize), 0);
        at
    };
    let dsdt = place(dsdt(platform));
    let described = [bytes(&fadt(dsdt)), bytes(&madt(platform.cpus)), bytes(&mcfg(platform))];
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in described {
        xsdt.add_entry(place(table));
    }
    let xsdt = place(bytes(&xsdt));
    let rsdp = bytes(&Rsdp::new(OEM_ID, xsdt));
    image[..rsdp.len()].copy_from_slice(&rsdp);
    image
}

/// A register in I/O space.
fn port(port: u16, bits: u8, size: AccessSize) -> GAS {
    GAS::new(RegisterSpace::SystemIo, bits, 0, size, port.into())
}

fn fadt(dsdt: u64) -> FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Wbinvd);
    fadt.iapc_boot_arch = BOOT_ARCH_NO_VGA.into();
    fadt.century = CENTURY;
    fadt.reset_reg = port(RESET_PORT, 8, AccessSize::ByteAccess);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_PORT, 8, AccessSize::ByteAccess);
    fadt.sleep_status_reg = port(SLEEP_PORT + 1, 8, AccessSize::ByteAccess);
    fadt.pm_tmr_blk = u32::from(TIMER_PORT).into();
    fadt.pm_tmr_len = 4;
    fadt.x_pm_tmr_blk = port(TIMER_PORT, 32, AccessSize::DwordAccess);
    fadt.finalize()
}

/// No PCAT_COMPAT flag (there is no 8259) and no overrides: global system interrupts are
/// the I/O APIC's pins, edge-triggered and active high as the DSDT says.
fn madt(cpus: u8) -> MADT {
    let controller = LocalInterruptController::Address(LAPIC_BASE as u32);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, controller);
    for id in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC_BASE as u32, 0));
    madt
}

fn mcfg(platform: &Platform) -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(platform.pci_ecam, 0, 0, 0);
    mcfg
}

fn dsdt(platform: &Platform) -> Vec<u8> {
    let mut dsdt =
        Sdt::new(*b"DSDT", 36, DSDT_REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let mut aml = Vec::new();
    let sleep_type = Package::new(vec![&SLEEP_TYPE_S5, &ZERO, &ZERO, &ZERO]);
    aml.extend(bytes(&Name::new(Path::new("_S5_"), &sleep_type)));
    aml.extend(system_bus(platform));
    dsdt.append_slice(&aml);
    dsdt.as_slice().to_vec()
}

fn system_bus(platform: &Platform) -> Vec<u8> {
    let mut scope = Vec::new();
    scope.extend(pci_host(platform));
    scope.extend(motherboard(platform));
    scope.extend(device("COM1", "PNP0501", &[
        &IO::new(COM1_PORT, COM1_PORT, 1, SERIAL_PORTS as u8),
        &Interrupt::new(true, true, false, false, u32::from(COM1_GSI)),
    ]));
    // No interrupt: the clock has none, and Linux then offers no alarm.
    scope.extend(device("RTC_", "PNP0B00", &[&IO::new(RTC_PORT, RTC_PORT, 1, 2)]));
    let pvpanic = ResourceTemplate::new(vec![&IO_PVPANIC]);
    scope.extend(bytes(&Device::new(Path::new("PVPN"), vec![
        &Name::new(Path::new("_HID"), &"QEMU0001"),
        // Present, enabled, working, and not to be shown to users.
        &Name::new(Path::new("_STA"), &0x0b_u8),
        &Name::new(Path::new("_CRS"), &pvpanic),
    ])));
    Scope::raw(Path::new("_SB_"), scope)
}
