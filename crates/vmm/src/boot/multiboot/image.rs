//! The kernel itself: which bytes of its file go where, by its ELF headers or by the address
//! fields of its Multiboot header, and where it is entered.

use object::Endianness;
use object::elf::{FileHeader32, FileHeader64};
use strata_memory::GuestMemory;

use super::header::{Addresses, Header, problem};
use super::room::Room;
use super::sections::Sections;
use crate::boot::elf::{self, Elf, ElfMachine, Segment};
use crate::error::{Error, KernelProblem};
use crate::layout;

/// A kernel that was checked: its segments lie in memory that is theirs to take, and none
/// overlaps another.
pub(super) struct Image {
    file: Vec<u8>,
    segments: Vec<Segment>,
    entry: u32,
    sections: Option<Sections>,
}

impl Image {
    pub(super) fn parse(file: Vec<u8>, header: &Header) -> Result<Self, KernelProblem> {
        let mut sections = None;
        let (mut segments, entry) = if let Some(addresses) = header.addresses {
            let segment = by_addresses(&file, header.offset, addresses)?;
            (vec![segment], addresses.entry.into())
        } else if file.starts_with(elf::MAGIC) {
            let Elf { entry, segments } = match elf::machine(&file)? {
                ElfMachine::X86_64 => {
                    sections = Sections::read::<FileHeader64<Endianness>>(&file);
                    elf::read::<FileHeader64<Endianness>>(&file)?
                }
                ElfMachine::I386 => {
                    sections = Sections::read::<FileHeader32<Endianness>>(&file);
                    elf::read::<FileHeader32<Endianness>>(&file)?
                }
            };
            let entry = physical_entry(entry, &segments)?;
            (segments, entry)
        } else {
            return Err(problem(
                "it is no ELF file, and its header has no address fields",
            ));
        };
        segments.retain(|segment| segment.memory_size > 0);
        check(&segments)?;
        // All segments end below 4 GiB.
        let entry = segments
            .iter()
            .any(|segment| segment.contains(entry))
            .then_some(entry as u32)
            .ok_or_else(|| problem("its entry point is outside of what is loaded"))?;
        let image = Self {
            file,
            segments,
            entry,
            sections,
        };
        let mut room = Room::default();
        image.occupy(&mut room);
        if room.overlaps() {
            return Err(problem("parts of it overlap"));
        }
        Ok(image)
    }

    /// The physical address of the entry point.
    pub(super) fn entry(&self) -> u32 {
        self.entry
    }

    /// The ELF sections that are told to the kernel.
    pub(super) fn sections(&self) -> Option<&Sections> {
        self.sections.as_ref()
    }

    pub(super) fn file(&self) -> &[u8] {
        &self.file
    }

    /// The end of its highest part.
    pub(super) fn end(&self) -> u64 {
        self.segments.iter().map(Segment::end).max().unwrap_or(0)
    }

    /// Takes what the kernel needs of `room`.
    pub(super) fn occupy(&self, room: &mut Room) {
        for segment in &self.segments {
            room.take(segment.address..segment.end());
        }
    }

    /// Copies the segments to guest memory, which is zero elsewhere.
    pub(super) fn load(&self, memory: &GuestMemory) -> Result<(), Error> {
        for segment in &self.segments {
            crate::boot::write(memory, segment.address, segment.bytes(&self.file))?;
        }
        Ok(())
    }
}

/// What the address fields describe: text and data in one piece, then the BSS.
fn by_addresses(
    file: &[u8],
    header_offset: usize,
    addresses: Addresses,
) -> Result<Segment, KernelProblem> {
    let before_header = addresses.header.checked_sub(addresses.load);
    let offset = before_header
        .and_then(|before| header_offset.checked_sub(before as usize))
        .ok_or_else(|| problem("its address fields place it before the start of its file"))?;
    let file_size = match addresses.load_end {
        0 => file.len() - offset,
        end => end
            .checked_sub(addresses.load)
            .ok_or_else(|| problem("it ends before it begins (load_end_addr)"))?
            as usize,
    };
    let end = offset + file_size;
    if end > file.len() {
        return Err(KernelProblem::Truncated {
            length: file.len() as u64,
            expected: end as u64,
        });
    }
    let memory_size = match addresses.bss_end {
        0 => file_size as u64,
        end => {
            u64::from(end)
                .checked_sub(u64::from(addresses.load) + file_size as u64)
                .ok_or_else(|| problem("its BSS ends before it begins (bss_end_addr)"))?
                + file_size as u64
        }
    };
    Ok(Segment {
        address: addresses.load.into(),
        virtual_address: addresses.load.into(),
        offset,
        file_size,
        memory_size,
    })
}

/// Where an ELF file's entry point is in physical memory. Kernels that are linked to run
/// elsewhere have either address in their header.
fn physical_entry(entry: u64, segments: &[Segment]) -> Result<u64, KernelProblem> {
    if segments.iter().any(|segment| segment.contains(entry)) {
        return Ok(entry);
    }
    let inside = |segment: &Segment| {
        let offset = entry.checked_sub(segment.virtual_address)?;
        (offset < segment.memory_size).then(|| segment.address.saturating_add(offset))
    };
    segments
        .iter()
        .find_map(inside)
        .ok_or_else(|| problem("its entry point is in none of its segments"))
}

/// Whether every segment lies in memory that is not reserved.
fn check(segments: &[Segment]) -> Result<(), KernelProblem> {
    for segment in segments {
        let (start, end) = (segment.address, segment.end());
        let inside = |range: &std::ops::Range<u64>| range.start <= start && end <= range.end;
        if !layout::LOADABLE.iter().any(inside) {
            return Err(problem(format!(
                "it wants to be at {start:#x} to {end:#x}, which is reserved or no memory"
            )));
        }
    }
    Ok(())
}
