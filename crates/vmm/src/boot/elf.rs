//! ELF executables as kernels come in: 64-bit or 32-bit, with segments that go to physical
//! addresses. Called by the loaders, which know what addresses are theirs to give.
//!
//! Nothing in the file is believed before it is checked: offsets and sizes that are handed on
//! lie in the file.

use object::elf::{
    EM_386, EM_AARCH64, EM_RISCV, EM_X86_64, ET_DYN, ET_EXEC, FileType, Machine, PT_INTERP, PT_LOAD,
};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{Endian, Endianness};

use crate::error::KernelProblem;

/// What an ELF file begins with.
pub(super) const MAGIC: &[u8] = b"\x7fELF";
/// What an ELF file is that asks for an interpreter, or for the first MiB without knowing it.
pub(super) const USER_PROGRAM: &str = "a program or shared library (ELF)";

/// Class, data encoding, type and machine in the header; both classes have them there.
const CLASS: usize = 4;
const CLASS_64: u8 = 2;
const ENCODING: usize = 5;
const LITTLE_ENDIAN: u8 = 1;
const TYPE: usize = 16;
const MACHINE: usize = 18;
/// Bytes in the header of a 32-bit file.
const HEADER_MIN: usize = 52;

/// Which header a file has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ElfMachine {
    /// 64-bit headers, for x86-64.
    X86_64,
    /// 32-bit headers, for i386 or x86-64.
    I386,
}

/// A part of the file and where it goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    /// Physical address.
    pub(super) address: u64,
    /// Where the code believes to be once it has paging.
    pub(super) virtual_address: u64,
    /// Bytes of the file.
    pub(super) offset: usize,
    pub(super) file_size: usize,
    /// Bytes of memory, no fewer than of the file; what is more is zero.
    pub(super) memory_size: u64,
}

impl Segment {
    /// The first address after it.
    pub(super) fn end(&self) -> u64 {
        self.address.saturating_add(self.memory_size)
    }

    pub(super) fn contains(&self, address: u64) -> bool {
        (self.address..self.end()).contains(&address)
    }

    /// What of `file` goes there.
    pub(super) fn bytes<'a>(&self, file: &'a [u8]) -> &'a [u8] {
        &file[self.offset..self.offset + self.file_size]
    }
}

/// What is read of a file.
#[derive(Debug)]
pub(super) struct Elf {
    /// The entry point, as the file has it.
    pub(super) entry: u64,
    pub(super) segments: Vec<Segment>,
}

/// Which kind of x86 an ELF file is an executable for.
pub(super) fn machine(elf: &[u8]) -> Result<ElfMachine, KernelProblem> {
    if elf.len() < HEADER_MIN {
        return Err(truncated(elf, HEADER_MIN as u64));
    }
    let half = |at: usize| u16::from_le_bytes([elf[at], elf[at + 1]]);
    if elf[ENCODING] != LITTLE_ENDIAN {
        return Err(KernelProblem::WrongMachine("a big-endian machine"));
    }
    let machine = match Machine(half(MACHINE)) {
        EM_X86_64 if elf[CLASS] == CLASS_64 => ElfMachine::X86_64,
        EM_X86_64 | EM_386 => ElfMachine::I386,
        EM_AARCH64 => return Err(KernelProblem::WrongMachine("64-bit ARM")),
        EM_RISCV => return Err(KernelProblem::WrongMachine("RISC-V")),
        _ => return Err(KernelProblem::WrongMachine("another kind of CPU")),
    };
    match FileType(half(TYPE)) {
        ET_EXEC | ET_DYN => Ok(machine),
        _ => Err(KernelProblem::NotAKernel(
            "an object file or core dump (ELF)",
        )),
    }
}

/// Entry point and loadable segments of a file with headers `H`.
pub(super) fn read<H: FileHeader<Endian = Endianness>>(elf: &[u8]) -> Result<Elf, KernelProblem> {
    let endian = Endianness::Little;
    if elf.len() < size_of::<H>() {
        return Err(truncated(elf, size_of::<H>() as u64));
    }
    let header =
        H::parse(elf).map_err(|_| KernelProblem::Damaged("its ELF header is not valid".into()))?;
    let table = header.program_headers(endian, elf).map_err(|_| {
        let size = u64::from(header.e_phentsize(endian)) * u64::from(header.e_phnum(endian));
        truncated(elf, header.e_phoff(endian).into().saturating_add(size))
    })?;
    if table.iter().any(|entry| entry.p_type(endian) == PT_INTERP) {
        return Err(KernelProblem::NotAKernel(USER_PROGRAM));
    }
    let loaded = table.iter().filter(|entry| entry.p_type(endian) == PT_LOAD);
    let segments: Result<_, _> = loaded.map(|entry| segment(elf, entry, endian)).collect();
    Ok(Elf {
        entry: header.e_entry(endian).into(),
        segments: segments?,
    })
}

fn segment<E: Endian, P: ProgramHeader<Endian = E>>(
    elf: &[u8],
    entry: &P,
    endian: E,
) -> Result<Segment, KernelProblem> {
    let (offset, file_size): (u64, u64) =
        (entry.p_offset(endian).into(), entry.p_filesz(endian).into());
    let end = offset.saturating_add(file_size);
    if end > elf.len() as u64 {
        return Err(truncated(elf, end));
    }
    Ok(Segment {
        address: entry.p_paddr(endian).into(),
        virtual_address: entry.p_vaddr(endian).into(),
        offset: offset as usize,
        file_size: file_size as usize,
        memory_size: entry.p_memsz(endian).into().max(file_size),
    })
}

/// `elf` should have `expected` bytes at least.
fn truncated(elf: &[u8], expected: u64) -> KernelProblem {
    KernelProblem::Truncated {
        length: elf.len() as u64,
        expected,
    }
}
