//! Puts Linux into guest memory so that it can be entered by the 64-bit boot protocol
//! (Linux: Documentation/arch/x86/boot.rst).
//!
//! ```text
//!   kernel file ─► kernel (bzImage, ELF) ─► unpack ─► ELF segments ─┐
//!   initrd parts ───────────────────────────────────────────────────┼─► guest memory
//!   command line, memory map, ACPI ─► params ───────────────────────┘
//!   entry (GDT, page tables, registers) ◄── where to start
//! ```
//!
//! Called once by the machine before any vCPU runs. What it reads are files of unknown
//! origin: nothing in them is believed before it is checked.

mod entry;
mod initrd;
mod kernel;
mod params;
#[cfg(test)]
mod tests;
mod unpack;

use std::path::Path;

use strata_devices::acpi::{self, Platform};
use strata_devices::pci::PciLayout;
use strata_hypervisor::state::Registers;
use strata_memory::{Bytes, GuestAddress, GuestMemory};

use crate::config::InitrdPart;
use crate::error::Error;
use crate::layout;
use kernel::Kernel;

/// Memory that Linux needs beside its image and initial RAM disk, at the very least.
const WORKING_MEMORY: u64 = 16 << 20;
const MIB: u64 = 1 << 20;

/// What is booted.
pub(crate) struct Source<'a> {
    pub(crate) kernel: &'a Path,
    pub(crate) initrd: &'a [InitrdPart],
    pub(crate) command_line: &'a str,
    pub(crate) cpus: u8,
}

/// Files that were read and checked, before there is memory to put them in.
pub(crate) struct Loaded {
    kernel: Kernel,
    initrd: Vec<u8>,
    command_line: Vec<u8>,
    cpus: u8,
}

impl Loaded {
    /// Reads and checks everything for a machine with `memory` bytes.
    pub(crate) fn read(source: &Source, memory: u64) -> Result<Self, Error> {
        let kernel = Kernel::read(source.kernel)?;
        let initrd = initrd::read(source.initrd, memory)?;
        let command_line = source.command_line.as_bytes().to_vec();
        if command_line.contains(&0) {
            return Err(Error::CommandLineNul);
        }
        let limit = kernel.command_line_limit();
        if command_line.len() > limit {
            return Err(Error::CommandLineTooLong {
                length: command_line.len(),
                limit,
            });
        }
        let loaded = Self {
            kernel,
            initrd,
            command_line,
            cpus: source.cpus,
        };
        loaded.check_size(memory)?;
        Ok(loaded)
    }

    /// Whether kernel and RAM disk fit into `memory` bytes.
    fn check_size(&self, memory: u64) -> Result<(), Error> {
        let kernel_end = self.kernel.memory_end();
        let initrd = (self.initrd.len() as u64).next_multiple_of(strata_memory::PAGE_SIZE);
        let minimum = (kernel_end + WORKING_MEMORY + initrd).next_multiple_of(MIB);
        let room = self.initrd_limit(memory).saturating_sub(kernel_end);
        if memory >= minimum && initrd <= room {
            return Ok(());
        }
        if memory >= kernel_end + WORKING_MEMORY && initrd > room {
            return Err(Error::InitrdTooLarge { size: initrd, room });
        }
        Err(Error::TooLittleMemory {
            size: memory,
            minimum,
        })
    }

    /// The address that the RAM disk must end at or below.
    fn initrd_limit(&self, memory: u64) -> u64 {
        let addressable = u64::from(self.kernel.initrd_address_max()) + 1;
        memory.min(layout::MMIO_HOLE_START).min(addressable)
    }

    /// Writes everything to guest memory and returns the registers to enter the kernel
    /// with.
    pub(crate) fn install(&self, memory: &GuestMemory) -> Result<Registers, Error> {
        self.kernel.load(memory)?;
        let size = self.initrd.len() as u64;
        let initrd = self.initrd_limit(memory.size()).saturating_sub(size) & !0xfff;
        let tables = acpi::tables(&self.platform(memory.size()), layout::ACPI_TABLES.start);
        let params = params::BootParams {
            header: self.kernel.header(),
            initrd: (!self.initrd.is_empty()).then_some((initrd, size)),
            command_line: layout::COMMAND_LINE,
            acpi: layout::ACPI_TABLES.start,
            memory_map: params::memory_map(&memory.ranges()),
        };
        let mut command_line = self.command_line.clone();
        command_line.push(0);
        let pieces: [(u64, &[u8]); 4] = [
            (layout::ACPI_TABLES.start, &tables),
            (layout::COMMAND_LINE, &command_line),
            (layout::ZERO_PAGE, &params.bytes()),
            (initrd, &self.initrd),
        ];
        for (address, bytes) in pieces {
            write(memory, address, bytes)?;
        }
        entry::prepare(memory, self.kernel.entry())
    }

    fn platform(&self, memory: u64) -> Platform {
        Platform {
            cpus: self.cpus,
            pci_ecam: layout::PCI_ECAM,
            pci_ecam_size: PciLayout::ECAM_SIZE,
            pci_window: layout::PCI_WINDOW,
            pci_window_64: layout::pci_window_64(memory),
        }
    }
}

/// Writes to guest memory, which was checked to be large enough.
fn write(memory: &GuestMemory, address: u64, bytes: &[u8]) -> Result<(), Error> {
    let written = memory.ram().write_slice(bytes, GuestAddress(address));
    written.map_err(|_| Error::TooLittleMemory {
        size: memory.size(),
        minimum: (address + bytes.len() as u64 + WORKING_MEMORY).next_multiple_of(MIB),
    })
}
