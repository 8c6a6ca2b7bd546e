//! Puts a kernel into guest memory so that a vCPU can be started in it: Linux by its 64-bit
//! boot protocol, or any kernel by the Multiboot specification.
//!
//! ```text
//!   kernel file ─┬► kernel (bzImage, ELF) ─► unpack ─► elf ─┐
//!   initrd parts ┼──────────────────────────────────────────┼─ linux ──────┐
//!   command line ┤  params: memory map ─────────────────────┘              ├─► guest memory
//!   modules ─────┼──────────────────────────────────────────┬─ multiboot ──┤
//!                └► multiboot::header ─► image ─► elf ──────┘              │
//!   ACPI tables ───────────────────────────────────────────────────────────┘
//!   entry (GDT, page tables, registers) ◄── where to start
//! ```
//!
//! Called once by the machine before any vCPU runs. What it reads are files of unknown
//! origin: nothing in them is believed before it is checked.

mod elf;
mod entry;
mod files;
mod initrd;
mod kernel;
mod linux;
mod multiboot;
mod params;
#[cfg(test)]
mod tests;
mod unpack;

use std::path::Path;

use strata_devices::acpi::{self, Platform};
use strata_devices::pci::PciLayout;
use strata_hypervisor::state::Registers;
use strata_memory::{Bytes, GuestAddress, GuestMemory};

use crate::config::{BootModule, InitrdPart};
use crate::error::{Error, KernelProblem};
use crate::layout;
use linux::Linux;
use multiboot::Multiboot;
use multiboot::header::{self, Header};

/// Memory that Linux needs beside its image and initial RAM disk, at the very least.
const WORKING_MEMORY: u64 = 16 << 20;
const MIB: u64 = 1 << 20;
/// More than any kernel has, with all its debugging information.
const KERNEL_FILE_MAX: u64 = 2 << 30;

/// What is booted.
pub(crate) struct Source<'a> {
    pub(crate) kernel: &'a Path,
    pub(crate) initrd: &'a [InitrdPart],
    pub(crate) modules: &'a [BootModule],
    pub(crate) command_line: Option<&'a str>,
    pub(crate) cpus: u8,
}

impl Source<'_> {
    fn kernel_problem(&self, problem: KernelProblem) -> Error {
        Error::Kernel {
            path: self.kernel.to_owned(),
            problem,
        }
    }

    fn read_kernel(&self) -> Result<Vec<u8>, Error> {
        let mut file = Vec::new();
        let read = files::append(self.kernel, KERNEL_FILE_MAX, &mut file);
        read.map_err(|source| Error::Read {
            what: "kernel",
            path: self.kernel.to_owned(),
            source,
        })?;
        Ok(file)
    }
}

/// Puts a kernel, its RAM disk and command line into the memory of a machine with one vCPU,
/// and returns the registers to enter it with. For a machine that is not a
/// [`Machine`](crate::Machine).
pub fn load(
    kernel: &Path,
    initrd: &[InitrdPart],
    command_line: &str,
    memory: &GuestMemory,
) -> Result<Registers, Error> {
    let source = Source {
        kernel,
        initrd,
        modules: &[],
        command_line: Some(command_line),
        cpus: 1,
    };
    Loaded::read(&source, memory.size())?.install(memory)
}

/// Files that were read and checked, before there is memory to put them in.
pub(crate) enum Loaded {
    Linux(Box<Linux>),
    Multiboot(Multiboot),
}

impl Loaded {
    /// Reads and checks everything for a machine with `memory` bytes.
    pub(crate) fn read(source: &Source, memory: u64) -> Result<Self, Error> {
        if source.command_line.is_some_and(|line| line.contains('\0')) {
            return Err(Error::CommandLineNul);
        }
        let file = source.read_kernel()?;
        let header = if kernel::is_bzimage(&file) {
            None
        } else {
            header::find(&file)
        };
        match header {
            Some(Ok(header)) => Self::multiboot(file, &header, source, memory),
            Some(Err(broken)) => {
                // The header's magic number may be there by accident.
                let linux = Self::linux(file, source, memory);
                linux.map_err(|error| match error {
                    Error::Kernel { .. } => source.kernel_problem(broken),
                    error => error,
                })
            }
            None => Self::linux(file, source, memory),
        }
    }

    fn linux(file: Vec<u8>, source: &Source, memory: u64) -> Result<Self, Error> {
        Ok(Self::Linux(Box::new(Linux::read(file, source, memory)?)))
    }

    fn multiboot(
        file: Vec<u8>,
        header: &Header,
        source: &Source,
        memory: u64,
    ) -> Result<Self, Error> {
        let loaded = Multiboot::read(file, header, source, memory)?;
        Ok(Self::Multiboot(loaded))
    }

    /// Writes everything to guest memory and returns the registers to enter the kernel
    /// with.
    pub(crate) fn install(&self, memory: &GuestMemory) -> Result<Registers, Error> {
        match self {
            Self::Linux(linux) => linux.install(memory),
            Self::Multiboot(multiboot) => multiboot.install(memory),
        }
    }
}

/// The ACPI tables of a machine with `memory` bytes, to be at [`layout::ACPI_TABLES`].
fn acpi_tables(cpus: u8, memory: u64) -> Vec<u8> {
    let platform = Platform {
        cpus,
        pci_ecam: layout::PCI_ECAM,
        pci_ecam_size: PciLayout::ECAM_SIZE,
        pci_window: layout::PCI_WINDOW,
        pci_window_64: layout::pci_window_64(memory),
    };
    acpi::tables(&platform, layout::ACPI_TABLES.start)
}

/// Writes to guest memory, which was checked to be large enough.
fn write(memory: &GuestMemory, address: u64, bytes: &[u8]) -> Result<(), Error> {
    let written = memory.ram().write_slice(bytes, GuestAddress(address));
    written.map_err(|_| Error::TooLittleMemory {
        size: memory.size(),
        minimum: (address + bytes.len() as u64 + WORKING_MEMORY).next_multiple_of(MIB),
    })
}
