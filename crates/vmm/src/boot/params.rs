//! `boot_params`, the "zero page": what the kernel is told at its entry
//! (Linux: Documentation/arch/x86/zero-page.rst).

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use strata_devices::pci::PciLayout;
use vm_memory::ByteValued;

use crate::layout;

/// `type_of_loader`: none that has a number.
const LOADER_UNDEFINED: u8 = 0xff;
/// `loadflags` bit 0: the kernel is above 1 MiB.
const LOADED_HIGH: u8 = 1 << 0;
/// `loadflags` bit 5: no message from early setup code.
const QUIET: u8 = 1 << 5;
/// Memory map types (ACPI 6.5 §15).
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// What goes into the zero page.
pub(super) struct BootParams {
    pub(super) header: setup_header,
    /// Address and size of the RAM disk.
    pub(super) initrd: Option<(u64, u64)>,
    /// Address of the command line.
    pub(super) command_line: u64,
    /// Address of the RSDP.
    pub(super) acpi: u64,
    pub(super) memory_map: Vec<boot_e820_entry>,
}

impl BootParams {
    /// The zero page.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut params = boot_params {
            hdr: self.header,
            ..boot_params::default()
        };
        params.hdr.type_of_loader = LOADER_UNDEFINED;
        params.hdr.loadflags = params.hdr.loadflags & QUIET | LOADED_HIGH;
        params.hdr.cmd_line_ptr = self.command_line as u32;
        if let Some((address, size)) = self.initrd {
            params.hdr.ramdisk_image = address as u32;
            params.hdr.ramdisk_size = size as u32;
        }
        params.acpi_rsdp_addr = self.acpi;
        let mut table = params.e820_table;
        for (slot, entry) in table.iter_mut().zip(&self.memory_map) {
            *slot = *entry;
            params.e820_entries += 1;
        }
        params.e820_table = table;
        params.as_slice().to_vec()
    }
}

/// The memory map of a machine whose RAM is at these `(start, size)` ranges, of which the
/// first begins at 0 and covers the first MiB.
pub(super) fn memory_map(ram: &[(u64, u64)]) -> Vec<boot_e820_entry> {
    let entry = |start: u64, end: u64, r#type| boot_e820_entry {
        addr: start,
        size: end.saturating_sub(start),
        r#type,
    };
    let firmware = layout::ACPI_TABLES;
    let mut map = vec![
        entry(0, layout::LOW_MEMORY_END, E820_RAM),
        entry(layout::LOW_MEMORY_END, layout::VIDEO_START, E820_RESERVED),
        entry(firmware.start, firmware.end, E820_RESERVED),
    ];
    for &(start, size) in ram {
        map.push(entry(
            start.max(layout::HIGH_MEMORY),
            start + size,
            E820_RAM,
        ));
    }
    map.push(entry(
        layout::PCI_ECAM,
        layout::PCI_ECAM + PciLayout::ECAM_SIZE,
        E820_RESERVED,
    ));
    map.sort_by_key(|entry| entry.addr);
    map
}
