//! Where things are in guest physical memory, and which interrupts they have.

use std::ops::Range;

use strata_devices::pci::PciLayout;

pub(crate) use strata_memory::{MMIO_HOLE_END, MMIO_HOLE_START};

/// The BIOS data area.
pub(crate) const BIOS_DATA: u64 = 0x400;
/// The boot GDT: four descriptors.
pub(crate) const BOOT_GDT: u64 = 0x500;
/// `boot_params`, the zero page.
pub(crate) const ZERO_PAGE: u64 = 0x7000;
/// A stack of one page, below this address, that nobody is expected to use.
pub(crate) const BOOT_STACK: u64 = 0x9000;
/// The boot page tables: a PML4, a PDPT and four page directories.
pub(crate) const BOOT_PAGE_TABLES: u64 = 0x9000;
/// The kernel command line.
pub(crate) const COMMAND_LINE: u64 = 0x20000;
/// Multiboot information, where there is room for it: above what kernels use to start further
/// processors from.
pub(crate) const BOOT_INFO: Range<u64> = 0x1_0000..LOW_MEMORY_END;
/// Where conventional memory ends and the extended BIOS data area would be.
pub(crate) const LOW_MEMORY_END: u64 = 0x9_fc00;
/// End of the 640 KiB; video memory would follow.
pub(crate) const VIDEO_START: u64 = 0xa_0000;
/// The ACPI tables, RSDP first: in the area that firmware is searched in.
pub(crate) const ACPI_TABLES: Range<u64> = 0xe_0000..0x10_0000;
/// Where memory goes on above the legacy area.
pub(crate) const HIGH_MEMORY: u64 = 0x10_0000;

/// What a kernel may choose for itself to be at.
pub(crate) const LOADABLE: [Range<u64>; 2] = [0x1000..LOW_MEMORY_END, HIGH_MEMORY..MMIO_HOLE_START];

/// The 32-bit window for PCI BARs.
pub(crate) const PCI_WINDOW: Range<u64> = MMIO_HOLE_START..0xe000_0000;
/// Memory-mapped PCI configuration space of bus 0.
pub(crate) const PCI_ECAM: u64 = 0xe000_0000;
/// Size of the 64-bit window for PCI BARs, which begins at a multiple of it above RAM.
pub(crate) const PCI_WINDOW_64_SIZE: u64 = 64 << 30;

/// The PCI bus's place.
pub(crate) fn pci() -> PciLayout {
    PciLayout {
        ecam: PCI_ECAM,
        window: PCI_WINDOW,
    }
}

/// The 64-bit PCI window of a machine with `memory` bytes of RAM.
pub(crate) fn pci_window_64(memory: u64) -> Range<u64> {
    let ram_end = MMIO_HOLE_END.saturating_add(memory.saturating_sub(MMIO_HOLE_START));
    let start = ram_end.next_multiple_of(PCI_WINDOW_64_SIZE);
    start..start + PCI_WINDOW_64_SIZE
}
