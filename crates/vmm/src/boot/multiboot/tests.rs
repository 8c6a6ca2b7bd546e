//! What a Multiboot kernel is told, and which images are refused, without running one.

use std::io::Write;

use strata_memory::{Bytes, GuestAddress};
use tempfile::NamedTempFile;

use crate::boot::{Loaded, Source};
use crate::config::{BootModule, InitrdPart};
use crate::error::{Error, KernelProblem};
use strata_hypervisor::state::Registers;
use strata_memory::GuestMemory;

const MEMORY: u64 = 64 << 20;
const MAGIC: u32 = 0x1bad_b002;
const START: u32 = 0x10_0000;
const CODE: &[u8] = b"\xf4 code";
const MEMORY_SIZE: u32 = 0x3000;
const LINE: &str = "one  two";

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn header(flags: u32) -> Vec<u8> {
    words(&[MAGIC, flags, 0_u32.wrapping_sub(MAGIC.wrapping_add(flags))])
}

/// What a segment of [`elf`] is: physical and virtual address, size in memory.
type Place = (u32, u32, u32);

/// A 32-bit ELF file whose segments all have the same content: a Multiboot header, then
/// [`CODE`].
fn elf(flags: u32, entry: u32, places: &[Place]) -> Vec<u8> {
    let mut elf = b"\x7fELF\x01\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend([2, 0, 3, 0]);
    elf.extend(words(&[1, entry, 52, 0, 0]));
    for value in [52, 32, places.len() as u16, 40, 0, 0] {
        elf.extend(value.to_le_bytes());
    }
    let content = [header(flags), CODE.to_vec()].concat();
    let offset = (52 + 32 * places.len()) as u32;
    for &(address, virtual_address, size) in places {
        let length = content.len() as u32;
        elf.extend(words(&[
            1,
            offset,
            virtual_address,
            address,
            length,
            size,
            7,
            0x1000,
        ]));
    }
    elf.extend(content);
    elf
}

fn plain() -> Vec<u8> {
    elf(3, START + 12, &[(START, START, MEMORY_SIZE)])
}

/// The same as 64-bit ELF.
fn plain_64() -> Vec<u8> {
    let content = [header(3), CODE.to_vec()].concat();
    let longs = |longs: &[u64]| {
        longs
            .iter()
            .flat_map(|l| l.to_le_bytes())
            .collect::<Vec<_>>()
    };
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    elf.extend(longs(&[u64::from(START) + 12, 64, 0]));
    elf.extend([0; 4]);
    for value in [64_u16, 56, 1, 64, 0, 0] {
        elf.extend(value.to_le_bytes());
    }
    elf.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    let length = content.len() as u64;
    elf.extend(longs(&[
        120,
        START.into(),
        START.into(),
        length,
        MEMORY_SIZE.into(),
        0x1000,
    ]));
    elf.extend(content);
    elf
}

/// A file that is not ELF, with a header at `offset` that has these address fields.
fn flat(offset: usize, fields: [u32; 5]) -> Vec<u8> {
    let mut file = vec![0x90; offset];
    file.extend(header(1 << 16));
    file.extend(words(&fields));
    file.extend(CODE);
    file
}

fn file(bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// Reads a kernel with modules of these contents, called "a" and on.
fn read(kernel: &[u8], modules: &[&[u8]], memory: u64) -> Result<Loaded, Error> {
    let (kernel, files) = (file(kernel), modules.iter().map(|bytes| file(bytes)));
    let files: Vec<_> = files.collect();
    let modules: Vec<_> = files
        .iter()
        .map(|file| BootModule {
            path: file.path().into(),
            arguments: "x y".into(),
        })
        .collect();
    let source = Source {
        kernel: kernel.path(),
        initrd: &[],
        modules: &modules,
        command_line: Some(LINE),
        cpus: 2,
    };
    Loaded::read(&source, memory)
}

struct Booted {
    memory: GuestMemory,
    registers: Registers,
}

fn install(loaded: &Loaded, size: u64) -> Result<Booted, Error> {
    let memory = GuestMemory::new(size).unwrap();
    let registers = loaded.install(&memory)?;
    Ok(Booted { memory, registers })
}

fn boot(kernel: &[u8], modules: &[&[u8]]) -> Booted {
    install(&read(kernel, modules, MEMORY).unwrap(), MEMORY).unwrap()
}

impl Booted {
    fn bytes(&self, address: u32, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let address = GuestAddress(address.into());
        self.memory.ram().read_slice(&mut bytes, address).unwrap();
        bytes
    }

    fn word(&self, address: u32) -> u32 {
        u32::from_le_bytes(self.bytes(address, 4).try_into().unwrap())
    }

    /// A field of the information.
    fn info(&self, offset: u32) -> u32 {
        self.word(self.registers.gpr[3] as u32 + offset)
    }

    fn string(&self, address: u32) -> String {
        let bytes = (address..).map(|at| self.bytes(at, 1)[0]);
        String::from_utf8(bytes.take_while(|byte| *byte != 0).collect()).unwrap()
    }

    /// Start, end and text of every module.
    fn modules(&self) -> Vec<(u32, u32, String)> {
        let entries = (0..self.info(20)).map(|index| self.info(24) + index * 16);
        entries
            .map(|at| {
                (
                    self.word(at),
                    self.word(at + 4),
                    self.string(self.word(at + 8)),
                )
            })
            .collect()
    }

    /// Start, end and type of every entry of the memory map.
    fn memory_map(&self) -> Vec<(u64, u64, u32)> {
        let long = |at| u64::from(self.word(at)) | u64::from(self.word(at + 4)) << 32;
        let (start, end) = (self.info(48), self.info(48) + self.info(44));
        let mut map = Vec::new();
        let mut at = start;
        while at < end {
            map.push((
                long(at + 4),
                long(at + 4) + long(at + 12),
                self.word(at + 20),
            ));
            at += self.word(at) + 4;
        }
        map
    }
}

fn problem(kernel: &[u8]) -> KernelProblem {
    match read(kernel, &[], MEMORY) {
        Err(Error::Kernel { problem, .. }) => problem,
        Err(error) => panic!("another error: {error}"),
        Ok(_) => panic!("the kernel was taken"),
    }
}

#[track_caller]
fn refused_for(kernel: &[u8], why: &str) {
    let text = problem(kernel).to_string();
    assert!(text.contains(why), "{text}");
}

#[test]
fn a_kernel_is_entered_as_the_specification_asks() {
    let booted = boot(&plain(), &[]);
    let registers = &booted.registers;

    assert_eq!(registers.gpr[0], 0x2bad_b002);
    assert_eq!(registers.rip, u64::from(START) + 12);
    assert_eq!(registers.cr0 & 0x8000_0001, 1);
    assert_eq!(registers.efer, 0);
    assert_eq!(registers.rflags & (1 << 9 | 1 << 17), 0);
    for segment in registers.segments {
        assert_eq!((segment.base, segment.limit), (0, u32::MAX));
        // 32-bit, not 64-bit
        assert_eq!(segment.attributes & 0x6000, 0x4000);
    }
    // CS is code, the others are data.
    let kinds = registers
        .segments
        .map(|segment| segment.attributes & 8 != 0);
    assert_eq!(kinds, [false, true, false, false, false, false]);
}

#[test]
fn elf_files_of_both_classes_and_flat_files_are_put_where_they_say() {
    let fields = [START, START, 0, START + MEMORY_SIZE, START + 32];
    for (kernel, code) in [(plain(), 12), (plain_64(), 12), (flat(0, fields), 32)] {
        let booted = boot(&kernel, &[]);

        assert_eq!(booted.bytes(START + code, CODE.len()), CODE);
        assert_eq!(booted.registers.rip, u64::from(START + code));
    }
}

#[test]
fn address_fields_count_rather_than_elf_headers() {
    // the header is behind 84 bytes of ELF headers, at 2 MiB + 84
    let load = 0x20_0000;
    let mut kernel = elf(0, 0, &[(START, START, MEMORY_SIZE)]);
    kernel.truncate(84);
    kernel.extend(header(1 << 16));
    kernel.extend(words(&[
        load + 84,
        load,
        load + 90,
        load + 0x1000,
        load + 80,
    ]));

    let booted = boot(&kernel, &[]);

    assert_eq!(booted.registers.rip, u64::from(load) + 80);
    assert_eq!(booted.bytes(load, 90), kernel[..90]);
    assert_eq!(booted.bytes(load + 90, 4), [0; 4], "after load_end_addr");
}

#[test]
fn an_entry_point_may_be_a_virtual_address() {
    let kernel = elf(3, 0xc010_000c, &[(START, 0xc010_0000, MEMORY_SIZE)]);

    assert_eq!(boot(&kernel, &[]).registers.rip, u64::from(START) + 12);
}

#[test]
fn a_header_is_found_up_to_its_last_possible_place() {
    let place = |offset| {
        let fields = [START, START, 0, 0, START + 32];
        read(&flat(offset, fields), &[], MEMORY).err()
    };

    assert!(place(8192 - 32).is_none());
    assert!(place(8192 - 28).is_some());
    assert!(place(8192).is_some());
    assert!(place(30).is_some(), "not aligned");
}

#[test]
fn the_command_line_follows_the_kernels_name() {
    let booted = boot(&plain(), &[]);
    let line = booted.string(booted.info(16));

    let (name, arguments) = line.split_once(' ').unwrap();
    assert!(name.starts_with('/'));
    assert_eq!(arguments, LINE);
}

#[test]
fn what_is_told_is_flagged_and_nothing_else() {
    let booted = boot(&plain(), &[]);

    assert_eq!(booted.info(0), 0x24d);
    assert_eq!(booted.string(booted.info(64)), "Strata");
    assert_eq!(booted.info(4), 639);
    assert_eq!(u64::from(booted.info(8)), (MEMORY >> 10) - 1024);
}

#[test]
fn modules_are_whole_in_order_on_pages_and_after_the_kernel() {
    let large = vec![7; 5000];
    let booted = boot(&plain(), &[b"first", &large, b"", b"last"]);
    let modules = booted.modules();

    let contents = [b"first".to_vec(), large, Vec::new(), b"last".to_vec()];
    assert_eq!(modules.len(), contents.len());
    let mut free = START + MEMORY_SIZE;
    for ((start, end, text), content) in modules.iter().zip(contents) {
        assert!(start % 4096 == 0 && *start >= free, "{start:#x} {free:#x}");
        assert_eq!(booted.bytes(*start, (end - start) as usize), content);
        assert!(text.starts_with('/') && text.ends_with(" x y"), "{text}");
        free = *end;
    }
}

#[test]
fn parts_of_the_initial_ram_disk_are_the_first_modules() {
    let (kernel, disk, module) = (file(&plain()), file(b"disk"), file(b"module"));
    let modules = [BootModule {
        path: module.path().into(),
        arguments: String::new(),
    }];
    let source = Source {
        kernel: kernel.path(),
        initrd: &[InitrdPart::File(disk.path().into())],
        modules: &modules,
        command_line: None,
        cpus: 1,
    };
    let booted = install(&Loaded::read(&source, MEMORY).unwrap(), MEMORY).unwrap();

    let contents = booted.modules();
    let contents = contents
        .iter()
        .map(|m| booted.bytes(m.0, (m.1 - m.0) as usize));
    assert_eq!(contents.collect::<Vec<_>>(), [&b"disk"[..], b"module"]);
    let line = booted.string(booted.info(16));
    assert_eq!(line, kernel.path().to_str().unwrap());
}

#[test]
fn the_memory_map_has_all_ram_and_reserves_the_acpi_tables() {
    let booted = boot(&plain(), &[]);
    let map = booted.memory_map();

    assert!(map.contains(&(0, 0x9_fc00, 1)), "{map:x?}");
    assert!(map.contains(&(0x10_0000, MEMORY, 1)), "{map:x?}");
    let holds = |entry: &&(u64, u64, u32)| entry.0 <= 0xe_0000 && 0xf_ffff < entry.1;
    assert_eq!(map.iter().find(holds).unwrap().2, 2);
    assert_eq!(booted.bytes(0xe_0000, 8), b"RSD PTR ");
}

#[test]
fn the_bios_data_area_tells_where_low_memory_ends() {
    let booted = boot(&plain(), &[]);

    assert_eq!(booted.bytes(0x400, 2), 0x3f8_u16.to_le_bytes());
    assert_eq!(booted.bytes(0x40e, 2), 0x9fc0_u16.to_le_bytes());
    assert_eq!(booted.bytes(0x413, 2), 639_u16.to_le_bytes());
}

#[test]
fn the_information_evades_a_kernel_in_low_memory() {
    for (low, high) in [(0x1_0000, 0x2000), (0x1000, 0x9_e000)] {
        let kernel = elf(3, low + 12, &[(low, low, high)]);
        let booted = boot(&kernel, &[b"module"]);

        let info = booted.registers.gpr[3] as u32;
        assert!(info >= low + high, "{info:#x}");
        assert_eq!(booted.bytes(low + 12, CODE.len()), CODE);
        assert_eq!(booted.modules()[0].1 - booted.modules()[0].0, 6);
    }
}

#[test]
fn broken_headers_are_refused_with_the_reason() {
    let mut checksum = plain();
    let at = checksum.len() - CODE.len() - 4;
    checksum[at] ^= 1;
    refused_for(&checksum, "checksum");
    refused_for(&elf(1 << 3, START, &[(START, START, 64)]), "0x8");
    refused_for(&header(3), "no ELF file");
    refused_for(&[vec![0; 8180], header(1 << 16)].concat(), "8192");
}

#[test]
fn address_fields_without_sense_are_refused_with_the_reason() {
    let sound = [START, START, 0, 0, START + 32];
    assert!(read(&flat(0, sound), &[], MEMORY).is_ok());
    let with = |field: usize, value: u32| {
        let mut fields = sound;
        fields[field] = value;
        flat(0, fields)
    };
    refused_for(&with(0, START - 1), "before the start");
    refused_for(&with(0, START + 4), "before the start");
    refused_for(&with(1, START - 4), "before the start");
    refused_for(&with(2, START - 4), "load_end_addr");
    refused_for(&with(2, START + 0x1000), "truncated");
    refused_for(&with(3, START + 4), "bss_end_addr");
    refused_for(&with(4, START + 0x1000), "entry point");
}

#[test]
fn parts_that_are_not_memory_or_reserved_or_overlap_are_refused() {
    let at = |start: u32, size| elf(3, start + 12, &[(start, start, size)]);
    for (start, size) in [
        (0, 0x100),
        (0x9_f000, 0x1000),
        (0xb_8000, 0x100),
        (0xe_0000, 0x100),
        (0xb_ffff_f000_u64 as u32, 0x1000),
        (0xffff_f000, 0x1000),
        (START, u32::MAX),
    ] {
        refused_for(&at(start, size), "reserved or no memory");
    }
    let places = [(START, START, 0x1000), (START + 0xfff, START, 0x1000)];
    refused_for(&elf(3, START + 12, &places), "overlap");
    refused_for(&elf(3, START + 0x3000, &places[..1]), "entry point");
    refused_for(&elf(3, START + 12, &[]), "entry point");
}

#[test]
fn too_little_memory_is_refused_with_a_minimum_that_is_enough() {
    let module = vec![1; 3 << 20];
    let try_size = |size| install(&read(&plain(), &[&module], size)?, size);

    let Err(Error::TooLittleMemory { minimum, .. }) = try_size(4 << 20) else {
        panic!("not refused")
    };

    assert!(try_size(minimum).is_ok());
    assert!(try_size(minimum - 0x10_0000).is_err());
}

#[test]
fn modules_larger_than_memory_are_not_read_to_their_end() {
    let endless = BootModule {
        path: "/dev/zero".into(),
        arguments: String::new(),
    };
    let kernel = file(&plain());
    let source = Source {
        kernel: kernel.path(),
        initrd: &[],
        modules: &[endless],
        command_line: None,
        cpus: 1,
    };

    let error = Loaded::read(&source, MEMORY).err();

    assert!(matches!(error, Some(Error::ModulesTooLarge)));
}

#[test]
fn modules_for_linux_are_refused() {
    let error = read(&crate::testing::elf(), &[b"module"], MEMORY).err();

    assert!(matches!(error, Some(Error::ModulesForLinux(_))));
}

#[test]
fn linux_with_the_magic_number_by_accident_is_linux() {
    let mut kernel = crate::testing::elf();
    kernel.resize(kernel.len().next_multiple_of(4), 0);
    kernel.extend(words(&[MAGIC, 1, 2]));

    assert!(matches!(read(&kernel, &[], MEMORY), Ok(Loaded::Linux(_))));
}

#[test]
fn sections_that_are_not_loaded_are_told_with_their_addresses() {
    let mut kernel = plain();
    kernel.resize(kernel.len().next_multiple_of(4), 0);
    let names = kernel.len() as u32;
    kernel.extend(b"\0.names\0\0");
    kernel.resize(kernel.len().next_multiple_of(4), 0);
    let table = kernel.len() as u32;
    kernel.extend(words(&[0; 10]));
    // name, type (string table), flags, address, offset, size
    kernel.extend(words(&[1, 3, 0, 0, names, 8, 0, 0, 1, 0]));
    // one that is loaded already
    kernel.extend(words(&[1, 1, 2, START, 84, 12, 0, 0, 1, 0]));
    // one that is not in the file
    kernel.extend(words(&[1, 1, 0, 0, 1 << 30, 12, 0, 0, 1, 0]));
    kernel[32..36].copy_from_slice(&table.to_le_bytes());
    kernel[48..50].copy_from_slice(&4_u16.to_le_bytes());
    kernel[50..52].copy_from_slice(&1_u16.to_le_bytes());

    let booted = boot(&kernel, &[b"module"]);

    assert_eq!(booted.info(0) & 1 << 5, 1 << 5);
    assert_eq!([28, 32, 40].map(|at| booted.info(at)), [4, 40, 1]);
    let address = |section: u32| booted.word(booted.info(36) + section * 40 + 12);
    assert_eq!(booted.bytes(address(1), 8), b"\0.names\0");
    assert_eq!([address(2), address(3)], [START, 0]);
}

#[test]
fn no_single_damaged_byte_of_a_kernel_panics_the_loader() {
    for kernel in [
        plain(),
        plain_64(),
        flat(0, [START, START, 0, 0, START + 32]),
    ] {
        for at in 0..kernel.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut damaged = kernel.clone();
                damaged[at] = value;
                // The checksum holds for whatever the flags are.
                if let Some(start) = damaged.windows(4).position(|w| w == MAGIC.to_le_bytes()) {
                    let flags = damaged[start + 4..start + 8].try_into().unwrap();
                    let header = header(u32::from_le_bytes(flags));
                    damaged[start..start + 12].copy_from_slice(&header);
                }
                if let Ok(loaded) = read(&damaged, &[], MEMORY) {
                    let _ = install(&loaded, MEMORY);
                }
            }
        }
    }
}
