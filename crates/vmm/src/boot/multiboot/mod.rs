//! Kernels that follow the Multiboot specification, version 0.6.96: entered in 32-bit protected
//! mode, without paging, with what they are told at EBX.
//!
//! The kernel says where it goes. Modules come after it, then ELF sections that it has not
//! loaded itself; the information goes to low memory, if there is room, so that kernels which
//! map little of memory at first can read it.

pub(super) mod header;
mod image;
mod info;
mod room;
mod sections;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use linux_loader::bootparam::boot_e820_entry;
use strata_devices::serial::COM1_PORT;
use strata_hypervisor::state::Registers;
use strata_memory::{GuestMemory, PAGE_SIZE};

use super::{MIB, Source, entry, files, params};
use crate::config::InitrdPart;
use crate::error::Error;
use crate::layout;
use header::Header;
use image::Image;
use info::Info;
use room::Room;

/// EAX at the entry tells the kernel that a Multiboot loader has loaded it.
const LOADED_MAGIC: u32 = 0x2bad_b002;
/// Alignment of what is not a module.
const ALIGNMENT: u64 = 16;
const KIB: u64 = 1 << 10;

/// A kernel and all that goes with it, read and checked.
pub(crate) struct Multiboot {
    image: Image,
    modules: Vec<Module>,
    command_line: Vec<u8>,
    cpus: u8,
}

struct Module {
    content: Vec<u8>,
    /// What the kernel is told of it: the file's name and arguments.
    name: Vec<u8>,
}

/// Bytes and where they go.
type Piece<'a> = (u64, Cow<'a, [u8]>);

impl Multiboot {
    /// Checks the kernel in `file` and reads its modules, of which no more is read than fits
    /// into `memory` bytes.
    pub(super) fn read(
        file: Vec<u8>,
        header: &Header,
        source: &Source,
        memory: u64,
    ) -> Result<Self, Error> {
        let image = Image::parse(file, header).map_err(|problem| source.kernel_problem(problem))?;
        if header.video {
            tracing::warn!("the kernel asks for a video mode; this machine has no display");
        }
        Ok(Self {
            image,
            modules: read_modules(source, memory)?,
            command_line: named(source.kernel, source.command_line.unwrap_or("")),
            cpus: source.cpus,
        })
    }

    /// Writes everything to guest memory and returns the registers to enter the kernel with.
    pub(super) fn install(&self, memory: &GuestMemory) -> Result<Registers, Error> {
        let map = params::memory_map(&memory.ranges());
        let (info, pieces) = self.place(memory.size(), &map)?;
        let ends = pieces
            .iter()
            .map(|(start, bytes)| start + bytes.len() as u64);
        let end = ends.chain([self.image.end()]).max().unwrap_or(0);
        if end > memory.size() {
            return Err(Error::TooLittleMemory {
                size: memory.size(),
                minimum: end.next_multiple_of(MIB),
            });
        }
        self.image.load(memory)?;
        for (address, bytes) in &pieces {
            super::write(memory, *address, bytes)?;
        }
        entry::protected_mode(memory, self.image.entry(), LOADED_MAGIC, info as u32)
    }

    /// Where the information is, and all that goes to memory beside the kernel.
    fn place(&self, memory: u64, map: &[boot_e820_entry]) -> Result<(u64, Vec<Piece<'_>>), Error> {
        let mut room = Room::default();
        self.image.occupy(&mut room);
        let high = self.image.end().max(layout::HIGH_MEMORY)..layout::MMIO_HOLE_START;
        let acpi = super::acpi_tables(self.cpus, memory);
        let mut pieces = vec![
            (layout::ACPI_TABLES.start, Cow::from(acpi)),
            (layout::BIOS_DATA, bios_data().into()),
        ];

        let mut modules = Vec::new();
        for Module { content, name } in &self.modules {
            let size = content.len() as u64;
            let start = room
                .place(size, PAGE_SIZE, high.clone())
                .ok_or(Error::ModulesTooLarge)?;
            modules.push((start..start + size, &name[..]));
            pieces.push((start, Cow::from(content)));
        }

        let mut sections = None;
        if let Some((table, bytes)) = self.sections(&mut room, high.clone()) {
            sections = Some(table);
            pieces.push((table[2].into(), bytes.into()));
        }

        let below_hole = memory.min(layout::MMIO_HOLE_START);
        let upper = below_hole.saturating_sub(layout::HIGH_MEMORY);
        let info = Info {
            memory: [layout::LOW_MEMORY_END, upper].map(|bytes| (bytes / KIB) as u32),
            command_line: &self.command_line,
            modules,
            sections,
            memory_map: map,
        };
        let size = info.bytes(0).len() as u64;
        let place = room
            .place(size, ALIGNMENT, layout::BOOT_INFO)
            .or_else(|| room.place(size, ALIGNMENT, high))
            .ok_or(Error::ModulesTooLarge)?;
        pieces.push((place, info.bytes(place).into()));
        Ok((place, pieces))
    }

    /// The ELF sections, what is told of them and their place.
    fn sections(&self, room: &mut Room, within: Range<u64>) -> Option<([u32; 4], Vec<u8>)> {
        let sections = self.image.sections()?;
        let size = sections.bytes(self.image.file(), 0)?.len() as u64;
        let place = room.place(size, ALIGNMENT, within)?;
        let bytes = sections.bytes(self.image.file(), place)?;
        let [count, entry_size, names] =
            [sections.count, sections.entry_size, sections.names].map(u32::from);
        Some(([count, entry_size, place as u32, names], bytes))
    }
}

/// What kernels look up in the BIOS data area though there is no BIOS: some place code for
/// further processors just below the end of low memory, and take it from there.
fn bios_data() -> Vec<u8> {
    const COM1: usize = 0;
    const EXTENDED_AREA_SEGMENT: usize = 0xe;
    const MEMORY_KIB: usize = 0x13;
    let mut area = vec![0; MEMORY_KIB + 2];
    for (at, value) in [
        (COM1, COM1_PORT),
        (EXTENDED_AREA_SEGMENT, (layout::LOW_MEMORY_END >> 4) as u16),
        (MEMORY_KIB, (layout::LOW_MEMORY_END / KIB) as u16),
    ] {
        area[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    area
}

/// The initial RAM disk's parts, each a module, and the modules proper.
fn read_modules(source: &Source, memory: u64) -> Result<Vec<Module>, Error> {
    let mut modules: Vec<Module> = Vec::new();
    let mut left = memory;
    let initrd = source.initrd.iter().map(|part| match part {
        InitrdPart::File(path) => (Ok(&**path), ""),
        InitrdPart::Bytes(bytes) => (Err(bytes), ""),
    });
    let proper = source.modules.iter();
    let proper = proper.map(|module| (Ok(&*module.path), &*module.arguments));
    for (content, arguments) in initrd.chain(proper) {
        let module = match content {
            Ok(path) => Module {
                content: read_module(path, left)?,
                name: named(path, arguments),
            },
            Err(bytes) => Module {
                content: bytes.clone(),
                name: Vec::new(),
            },
        };
        let size = module.content.len() as u64;
        left = left.checked_sub(size).ok_or(Error::ModulesTooLarge)?;
        modules.push(module);
    }
    Ok(modules)
}

/// Reads a file, and not much more of it than `limit` bytes.
fn read_module(path: &Path, limit: u64) -> Result<Vec<u8>, Error> {
    let mut content = Vec::new();
    files::append(path, limit, &mut content).map_err(|source| Error::Read {
        what: "module",
        path: path.to_owned(),
        source,
    })?;
    Ok(content)
}

/// A file's name and what follows it, as loaders before this one have written it: kernels
/// take the first word for their own name.
fn named(path: &Path, arguments: &str) -> Vec<u8> {
    let mut text = path.as_os_str().as_bytes().to_vec();
    if !arguments.is_empty() {
        text.push(b' ');
        text.extend(arguments.bytes());
    }
    text
}
