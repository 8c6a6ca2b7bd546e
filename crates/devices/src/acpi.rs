//! The ACPI tables of the machine (ACPI 6.5), built once at boot.
//!
//! Called by the machine, which says where things are and writes the result into guest
//! memory. The platform has PM1 blocks but no SMI, no 8259 and no 8254; it is turned off by
//! PM1 control and reset by the reset register (see [`crate::pm`]).

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name,
    Package, Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::fadt::{FADT, FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace as RegisterSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use crate::ioapic::IOAPIC_BASE;
use crate::lapic::LAPIC_BASE;
use crate::pm::{
    CONTROL_LENGTH, CONTROL_PORT, EVENT_LENGTH, EVENT_PORT, RESET_PORT, RESET_VALUE, SCI_GSI,
    SLEEP_TYPE_S5, TIMER_PORT,
};
use crate::pvpanic::PVPANIC_PORT;
use crate::rtc::{CENTURY, PORTS as RTC_PORTS, RTC_PORT};
use crate::serial::{COM1_GSI, COM1_PORT, PORTS as SERIAL_PORTS};

const OEM_ID: [u8; 6] = *b"STRATA";
const OEM_TABLE_ID: [u8; 8] = *b"STRATAVM";
const OEM_REVISION: u32 = 1;
/// `IAPC_BOOT_ARCH` bit 2: no VGA to probe for. The bits for an 8042 and other legacy
/// devices stay clear.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
/// `_STA`: present, enabled and working, but not to be shown to users.
const STATUS_HIDDEN: u8 = 0x0b;
/// First of PCI's eight configuration ports.
const PCI_CONFIG_PORT: u16 = 0xcf8;
/// The ports, first and last, that PCI devices may be given.
const PCI_IO_WINDOW: (u16, u16) = (0x1000, 0xffff);
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

fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
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
    let described = [
        bytes(&fadt(dsdt)),
        bytes(&madt(platform.cpus)),
        bytes(&mcfg(platform)),
    ];
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
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Wbinvd);
    fadt.iapc_boot_arch = BOOT_ARCH_NO_VGA.into();
    fadt.century = CENTURY;
    fadt.reset_reg = port(RESET_PORT, 8, AccessSize::ByteAccess);
    fadt.reset_value = RESET_VALUE;
    fadt.sci_int = SCI_GSI.into();
    fadt.pm1a_evt_blk = u32::from(EVENT_PORT).into();
    fadt.pm1_evt_len = EVENT_LENGTH;
    fadt.x_pm1a_evt_blk = port(EVENT_PORT, 32, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(CONTROL_PORT).into();
    fadt.pm1_cnt_len = CONTROL_LENGTH;
    fadt.x_pm1a_cnt_blk = port(CONTROL_PORT, 16, AccessSize::WordAccess);
    fadt.pm_tmr_blk = u32::from(TIMER_PORT).into();
    fadt.pm_tmr_len = 4;
    fadt.x_pm_tmr_blk = port(TIMER_PORT, 32, AccessSize::DwordAccess);
    fadt.finalize()
}

/// No `PCAT_COMPAT` flag (there is no 8259) and no overrides: global system interrupts are
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
    let mut dsdt = Sdt::new(
        *b"DSDT",
        36,
        DSDT_REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    let mut aml = Vec::new();
    let sleep_type = Package::new(vec![&SLEEP_TYPE_S5, &ZERO, &ZERO, &ZERO]);
    aml.extend(bytes(&Name::new(Path::new("_S5_"), &sleep_type)));
    aml.extend(system_bus(platform));
    dsdt.append_slice(&aml);
    dsdt.as_slice().to_vec()
}

/// A device in the system bus's scope, by its EISA ID and resources.
fn device(name: &str, id: &str, resources: Vec<&dyn Aml>) -> Vec<u8> {
    bytes(&Device::new(
        Path::new(name),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new(id)),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(resources)),
        ],
    ))
}

fn system_bus(platform: &Platform) -> Vec<u8> {
    let mut scope = pci_host(platform);
    let ecam = Memory32Fixed::new(
        true,
        platform.pci_ecam as u32,
        platform.pci_ecam_size as u32,
    );
    // Linux believes in memory-mapped configuration only where it is reserved.
    scope.extend(device("MBRD", "PNP0C02", vec![&ecam]));
    let com1 = IO::new(COM1_PORT, COM1_PORT, 1, SERIAL_PORTS as u8);
    let com1_interrupt = Interrupt::new(true, true, false, false, COM1_GSI.into());
    scope.extend(device("COM1", "PNP0501", vec![&com1, &com1_interrupt]));
    // Without an interrupt: Linux then offers no alarm.
    let rtc = IO::new(RTC_PORT, RTC_PORT, 1, RTC_PORTS as u8);
    scope.extend(device("RTC_", "PNP0B00", vec![&rtc]));
    scope.extend(pvpanic());
    Scope::raw(Path::new("_SB_"), scope)
}

fn pvpanic() -> Vec<u8> {
    let port = IO::new(PVPANIC_PORT, PVPANIC_PORT, 1, 1);
    bytes(&Device::new(
        Path::new("PVPN"),
        vec![
            &Name::new(Path::new("_HID"), &"QEMU0001"),
            &Name::new(Path::new("_STA"), &STATUS_HIDDEN),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&port])),
        ],
    ))
}

/// Bus 0 with its windows. No `_PRT`: devices interrupt by MSI-X alone.
fn pci_host(platform: &Platform) -> Vec<u8> {
    let last = |range: &Range<u64>| range.end - 1;
    let uncached = AddressSpaceCacheable::NotCacheable;
    let (low, high) = (&platform.pci_window, &platform.pci_window_64);
    let buses = AddressSpace::<u16>::new_bus_number(0, 0);
    let config = IO::new(PCI_CONFIG_PORT, PCI_CONFIG_PORT, 1, 8);
    let ports = AddressSpace::<u16>::new_io(PCI_IO_WINDOW.0, PCI_IO_WINDOW.1, None);
    let low = AddressSpace::new_memory(uncached, true, low.start as u32, last(low) as u32, None);
    let high = AddressSpace::new_memory(uncached, true, high.start, last(high), None);
    let windows = ResourceTemplate::new(vec![&buses, &config, &ports, &low, &high]);
    bytes(&Device::new(
        Path::new("PCI0"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0A08")),
            &Name::new(Path::new("_CID"), &EISAName::new("PNP0A03")),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_SEG"), &ZERO),
            &Name::new(Path::new("_BBN"), &ZERO),
            &Name::new(Path::new("_CRS"), &windows),
        ],
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDRESS: u64 = 0xe_0000;

    fn platform(cpus: u8) -> Platform {
        Platform {
            cpus,
            pci_ecam: 0xe000_0000,
            pci_ecam_size: 1 << 20,
            pci_window: 0xc000_0000..0xe000_0000,
            pci_window_64: 0x10_0000_0000..0x20_0000_0000,
        }
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// The table at a guest address, checked.
    fn table(image: &[u8], address: u64) -> &[u8] {
        let start = (address - ADDRESS) as usize;
        let table = &image[start..start + u32_at(image, start + 4) as usize];
        assert_eq!(sum(table), 0);
        table
    }

    /// RSDP to XSDT to the table with `signature`.
    fn find(image: &[u8], signature: [u8; 4]) -> &[u8] {
        let xsdt = table(image, u64_at(image, 24));
        let entries = xsdt[36..]
            .chunks(8)
            .map(|entry| table(image, u64_at(entry, 0)));
        entries
            .into_iter()
            .find(|table| table[..4] == signature)
            .unwrap()
    }

    #[test]
    fn every_table_is_found_from_the_rsdp_with_a_right_checksum() {
        let image = tables(&platform(1), ADDRESS);

        assert_eq!(&image[..8], b"RSD PTR ");
        assert_eq!((sum(&image[..20]), sum(&image[..36])), (0, 0));
        for signature in [*b"FACP", *b"APIC", *b"MCFG"] {
            find(&image, signature);
        }
        let dsdt = table(&image, u64_at(find(&image, *b"FACP"), 140));
        assert_eq!(&dsdt[..4], b"DSDT");
    }

    #[test]
    fn the_fadt_tells_of_pm1_blocks_and_the_reset_register() {
        let image = tables(&platform(1), ADDRESS);
        let fadt = find(&image, *b"FACP");

        let flags = u32_at(fadt, 112);
        // A reset register, and not hardware-reduced.
        assert_eq!(flags & (1 << 20 | 1 << 10), 1 << 10);
        // Reset register: I/O space, 8 bits, port 0xcf9, value 6.
        assert_eq!(
            (fadt[116], fadt[117], u64_at(fadt, 120), fadt[128]),
            (1, 8, 0xcf9, 6)
        );
        // PM1a event and control blocks, with their lengths.
        assert_eq!((u32_at(fadt, 56), fadt[88]), (0x600, 4));
        assert_eq!((u32_at(fadt, 64), fadt[89]), (0x604, 2));
        assert_eq!((fadt[148], u64_at(fadt, 152)), (1, 0x600));
        assert_eq!((fadt[172], u64_at(fadt, 176)), (1, 0x604));
    }

    #[test]
    fn the_madt_lists_every_cpu_and_the_io_apic() {
        let image = tables(&platform(3), ADDRESS);
        let madt = find(&image, *b"APIC");

        assert_eq!(u32_at(madt, 36), 0xfee0_0000);
        let mut rest = &madt[44..];
        let mut entries = Vec::new();
        while let [kind, length, ..] = rest {
            entries.push((*kind, rest[3]));
            rest = &rest[usize::from(*length)..];
        }
        assert_eq!(entries, [(0, 0), (0, 1), (0, 2), (1, 0)]);
    }

    #[test]
    fn the_mcfg_tells_where_configuration_space_is() {
        let image = tables(&platform(1), ADDRESS);
        let mcfg = find(&image, *b"MCFG");

        assert_eq!(u64_at(mcfg, 44), 0xe000_0000);
        assert_eq!((mcfg[54], mcfg[55]), (0, 0));
    }

    #[test]
    fn the_tables_of_a_large_machine_fit_the_firmware_area() {
        assert!(tables(&platform(254), ADDRESS).len() < 0x1_0000);
    }

    /// Leaves the DSDT where an ACPI disassembler can be pointed at.
    #[test]
    #[ignore = "writes a file for inspection with iasl -d"]
    fn dump_the_dsdt() {
        std::fs::write(std::env::temp_dir().join("dsdt.aml"), dsdt(&platform(1))).unwrap();
    }
}
