//! Linux, entered by its 64-bit boot protocol (Linux: Documentation/arch/x86/boot.rst).

use strata_hypervisor::state::Registers;
use strata_memory::GuestMemory;

use super::kernel::Kernel;
use super::{MIB, Source, WORKING_MEMORY, entry, initrd, params};
use crate::error::Error;
use crate::layout;

/// The command line where none was asked for: the console that there is, and no waiting after
/// a panic.
const DEFAULT_COMMAND_LINE: &str = "console=ttyS0 panic=-1";

/// A kernel and all that goes with it, read and checked.
pub(crate) struct Linux {
    kernel: Kernel,
    initrd: Vec<u8>,
    command_line: Vec<u8>,
    cpus: u8,
}

impl Linux {
    /// Checks `file`, reads the RAM disk, and sees whether both fit into `memory` bytes.
    pub(super) fn read(file: Vec<u8>, source: &Source, memory: u64) -> Result<Self, Error> {
        let kernel = Kernel::parse(file).map_err(|problem| source.kernel_problem(problem))?;
        if !source.modules.is_empty() {
            return Err(Error::ModulesForLinux(source.kernel.to_owned()));
        }
        let initrd = initrd::read(source.initrd, memory)?;
        let command_line = source.command_line.unwrap_or(DEFAULT_COMMAND_LINE);
        let command_line = command_line.as_bytes().to_vec();
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
    pub(super) fn install(&self, memory: &GuestMemory) -> Result<Registers, Error> {
        self.kernel.load(memory)?;
        let size = self.initrd.len() as u64;
        let initrd = self.initrd_limit(memory.size()).saturating_sub(size) & !0xfff;
        let tables = super::acpi_tables(self.cpus, memory.size());
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
            super::write(memory, address, bytes)?;
        }
        entry::long_mode(memory, self.kernel.entry())
    }
}
