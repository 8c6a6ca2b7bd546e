use std::io::Write;

use linux_loader::bootparam::boot_params;
use tempfile::NamedTempFile;
use vm_memory::ByteValued;

use super::*;
use crate::error::KernelProblem;
use crate::testing::{CODE, ENTRY, Format, KERNEL_SIZE, bzimage, elf, pack};

const MEMORY: u64 = 64 << 20;

fn file(bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn read(kernel: &[u8], initrd: &[InitrdPart], memory: u64) -> Result<Loaded, Error> {
    let kernel = file(kernel);
    let source = Source {
        kernel: kernel.path(),
        initrd,
        modules: &[],
        command_line: Some("console=ttyS0 quiet"),
        cpus: 1,
    };
    Loaded::read(&source, memory)
}

struct Booted {
    memory: GuestMemory,
    registers: Registers,
    params: boot_params,
}

fn boot(kernel: &[u8], initrd: &[InitrdPart], size: u64) -> Booted {
    let memory = GuestMemory::new(size).unwrap();
    let registers = read(kernel, initrd, size)
        .unwrap()
        .install(&memory)
        .unwrap();
    let mut params = boot_params::default();
    memory
        .ram()
        .read_slice(params.as_mut_slice(), GuestAddress(registers.gpr[6]))
        .unwrap();
    Booted {
        memory,
        registers,
        params,
    }
}

impl Booted {
    fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory
            .ram()
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    fn word(&self, address: u64) -> u64 {
        self.memory.ram().read_obj(GuestAddress(address)).unwrap()
    }

    /// The physical address that the boot page tables map `address` to.
    fn translate(&self, address: u64) -> Option<u64> {
        let mut table = self.registers.cr3;
        for shift in [39, 30, 21] {
            let entry = self.word(table + (address >> shift & 0x1ff) * 8);
            if entry & 1 == 0 {
                return None;
            }
            table = entry & 0x000f_ffff_ffff_f000;
            if entry & 1 << 7 != 0 {
                return Some(table | address & ((1 << shift) - 1));
            }
        }
        None
    }
}

fn problem(kernel: &[u8]) -> KernelProblem {
    match read(kernel, &[], MEMORY) {
        Err(Error::Kernel { problem, .. }) => problem,
        Err(error) => panic!("another error: {error}"),
        Ok(_) => panic!("the kernel was taken"),
    }
}

#[test]
fn a_bzimage_in_every_format_is_unpacked_to_its_place() {
    use Format::{Bzip2, Gzip, Lz4, Lzma, None, Xz, Zstd};
    for format in [None, Gzip, Xz, Zstd, Bzip2, Lzma, Lz4] {
        let booted = boot(&bzimage(&pack(&elf(), format)), &[], MEMORY);

        assert_eq!(booted.bytes(ENTRY, CODE.len()), CODE, "{format:?}");
        assert_eq!(booted.registers.rip, ENTRY);
    }
}

#[test]
fn a_payload_of_several_lz4_blocks_is_put_together() {
    let mut elf = elf();
    elf.extend((0..20_000_000_u32).map(|i| (i / 3) as u8));

    let unpacked = unpack::unpack(&pack(&elf, Format::Lz4)).unwrap();

    assert!(unpacked == elf);
}

#[test]
fn an_elf_kernel_is_loaded_as_it_is() {
    let booted = boot(&elf(), &[], MEMORY);

    assert_eq!(booted.bytes(ENTRY, CODE.len()), CODE);
    let header = booted.params.hdr;
    let (magic, version) = (header.header, header.version);
    assert_eq!((magic, version), (0x5372_6448, 0x020f));
}

#[test]
fn the_kernel_is_entered_in_long_mode_with_low_memory_mapped_to_itself() {
    let booted = boot(&elf(), &[], MEMORY);
    let registers = &booted.registers;

    assert_eq!(registers.cr0 & 0x8000_0001, 0x8000_0001);
    assert_eq!((registers.cr4, registers.efer), (1 << 5, 0x500));
    assert_eq!(registers.rflags, 2);
    assert_eq!([1, 3].map(|i| registers.segments[i].selector), [0x10, 0x18]);
    for address in [0, ENTRY, 0x1234_5678, 0xffff_ffff] {
        assert_eq!(booted.translate(address), Some(address));
    }
    assert_eq!(booted.translate(1 << 32), None);
}

#[test]
fn the_gdt_in_memory_is_what_the_segment_registers_hold() {
    let booted = boot(&elf(), &[], MEMORY);
    let gdt = booted.registers.gdtr;

    assert_eq!(gdt.limit, 0x1f);
    assert_eq!(booted.word(gdt.base + 0x10), 0x00af_9b00_0000_ffff);
    assert_eq!(booted.word(gdt.base + 0x18), 0x00cf_9300_0000_ffff);
}

#[test]
fn boot_params_tell_of_command_line_loader_and_acpi() {
    let booted = boot(&bzimage(&pack(&elf(), Format::Gzip)), &[], MEMORY);
    let header = booted.params.hdr;
    let (loader, flags, line) = (header.type_of_loader, header.loadflags, header.cmd_line_ptr);
    let acpi = booted.params.acpi_rsdp_addr;

    assert_eq!((loader, flags), (0xff, 1));
    assert_eq!(booted.bytes(line.into(), 20), b"console=ttyS0 quiet\0");
    assert_eq!(booted.bytes(acpi, 8), b"RSD PTR ");
    let (image, size) = (header.ramdisk_image, header.ramdisk_size);
    assert_eq!((image, size), (0, 0));
}

#[test]
fn the_memory_map_covers_ram_and_reserves_the_tables() {
    let ram = [(0, 0xc000_0000), (0x1_0000_0000, 0x4000_0000)];

    let map: Vec<_> = params::memory_map(&ram)
        .iter()
        .map(|entry| (entry.addr, entry.addr + entry.size, entry.r#type))
        .collect();

    assert_eq!(
        map,
        [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0xa_0000, 2),
            (0xe_0000, 0x10_0000, 2),
            (0x10_0000, 0xc000_0000, 1),
            (0xe000_0000, 0xe010_0000, 2),
            (0x1_0000_0000, 0x1_4000_0000, 1),
        ]
    );
}

#[test]
fn initrd_parts_are_padded_and_placed_as_high_as_memory_goes() {
    let part = file(b"first");
    let parts = [
        InitrdPart::File(part.path().into()),
        InitrdPart::Bytes(b"second".into()),
    ];

    let booted = boot(&elf(), &parts, MEMORY);

    let header = booted.params.hdr;
    let (address, size) = (header.ramdisk_image, header.ramdisk_size);
    assert_eq!((u64::from(address), size), (MEMORY - 0x1000, 16));
    assert_eq!(booted.bytes(address.into(), 16), b"first\0\0\0second\0\0");
}

#[test]
fn an_initrd_larger_than_memory_is_refused() {
    let parts = [InitrdPart::Bytes(vec![1; 60 << 20])];

    let Err(Error::InitrdTooLarge { size, room }) = read(&elf(), &parts, MEMORY) else {
        panic!("not refused")
    };

    assert!(size == 60 << 20 && room < size && room > 40 << 20);
}

#[test]
fn an_initrd_file_larger_than_memory_is_refused_unread() {
    let huge = file(b"");
    huge.as_file().set_len(1 << 40).unwrap();
    let parts = [InitrdPart::File(huge.path().into())];

    assert!(matches!(
        read(&elf(), &parts, MEMORY),
        Err(Error::InitrdTooLarge { .. })
    ));
}

#[test]
fn an_initrd_without_an_end_is_refused() {
    let parts = [InitrdPart::File("/dev/zero".into())];

    assert!(matches!(
        read(&elf(), &parts, MEMORY),
        Err(Error::InitrdTooLarge { .. })
    ));
}

#[test]
fn too_little_memory_is_refused_with_a_minimum_that_is_enough() {
    let Err(Error::TooLittleMemory { minimum, .. }) = read(&elf(), &[], 8 << 20) else {
        panic!("not refused")
    };

    assert!(minimum >= ENTRY + KERNEL_SIZE);
    assert!(read(&elf(), &[], minimum).is_ok());
    assert!(read(&elf(), &[], minimum - 0x10_0000).is_err());
}

#[test]
fn missing_files_are_named() {
    let missing = Path::new("/nonexistent/vmlinuz");
    let source = Source {
        kernel: missing,
        initrd: &[],
        modules: &[],
        command_line: Some(""),
        cpus: 1,
    };
    let error = Loaded::read(&source, MEMORY).err().unwrap();
    assert_eq!(
        error.to_string(),
        "cannot read the kernel /nonexistent/vmlinuz"
    );

    let parts = [InitrdPart::File("/nonexistent/initrd".into())];
    let error = read(&elf(), &parts, MEMORY).err().unwrap();
    assert_eq!(
        error.to_string(),
        "cannot read the initial RAM disk /nonexistent/initrd"
    );
}

#[test]
fn a_truncated_kernel_is_said_to_be_truncated() {
    let image = bzimage(&pack(&elf(), Format::Lz4));
    for length in [image.len() - 1, 1100, 1024, 0x280] {
        let found = problem(&image[..length]);
        assert!(
            matches!(found, KernelProblem::Truncated { .. }),
            "{length}: {found}"
        );
    }
    let elf = elf();
    for length in [elf.len() - 1, 100, 64, 20] {
        let found = problem(&elf[..length]);
        assert!(
            matches!(found, KernelProblem::Truncated { .. }),
            "{length}: {found}"
        );
    }
}

#[test]
fn a_damaged_payload_is_said_to_be_damaged() {
    use Format::{Bzip2, Gzip, Lz4, Lzma, Xz, Zstd};
    for format in [Gzip, Xz, Zstd, Bzip2, Lzma, Lz4] {
        let mut payload = pack(&elf(), format);
        let at = payload.len() / 2;
        payload.drain(at..at + 8);
        let found = problem(&bzimage(&payload));
        assert!(
            matches!(found, KernelProblem::Damaged(_)),
            "{format:?}: {found}"
        );
    }
    assert!(matches!(
        problem(&bzimage(&[7; 100])),
        KernelProblem::Damaged(_)
    ));
    assert!(matches!(problem(&bzimage(&[])), KernelProblem::Damaged(_)));
    let lzo = problem(&bzimage(b"\x89LZO\0\x0d\x0a\x1a\x0a----"));
    assert_eq!(lzo, KernelProblem::Compression("LZO"));
}

#[test]
fn a_kernel_for_another_machine_is_refused() {
    let mut arm = elf();
    arm[18] = 183;
    assert_eq!(problem(&arm), KernelProblem::WrongMachine("64-bit ARM"));
    let mut old = bzimage(&pack(&elf(), Format::Gzip));
    old[0x236] = 0;
    assert_eq!(problem(&old), KernelProblem::WrongMachine("32-bit x86"));
    old[0x206..0x208].copy_from_slice(&0x0203_u16.to_le_bytes());
    assert_eq!(problem(&old), KernelProblem::OldProtocol(0x0203));
}

#[test]
fn an_ordinary_program_is_not_taken_for_a_kernel() {
    let own = std::env::current_exe().unwrap();
    let source = Source {
        kernel: &own,
        initrd: &[],
        modules: &[],
        command_line: Some(""),
        cpus: 1,
    };

    let error = Loaded::read(&source, MEMORY).err().unwrap().to_string();

    assert!(
        error.contains("not a Linux kernel but a program"),
        "{error}"
    );
}

#[test]
fn segments_outside_memory_are_refused() {
    const ADDRESS: usize = 64 + 24;
    const FILE_SIZE: usize = 64 + 32;
    const MEMORY_SIZE: usize = 64 + 40;
    for (at, value) in [
        (ADDRESS, u64::MAX),
        (ADDRESS, 0xffff_f000),
        (MEMORY_SIZE, u64::MAX),
        (FILE_SIZE, u64::MAX),
        (24, 0x200_0000),
    ] {
        let mut kernel = elf();
        kernel[at..at + 8].copy_from_slice(&value.to_le_bytes());
        problem(&kernel);
    }
}

#[test]
fn no_single_damaged_byte_of_a_kernel_panics_the_loader() {
    let image = bzimage(&pack(&elf(), Format::Lz4));
    for at in 0x1f1..image.len() {
        for value in [0, 0x7f, 0xff] {
            let mut damaged = image.clone();
            damaged[at] = value;
            if let Ok(loaded) = read(&damaged, &[], MEMORY) {
                let _ = loaded.install(&GuestMemory::new(MEMORY).unwrap());
            }
        }
    }
}

#[test]
fn a_command_line_that_the_kernel_would_cut_off_is_refused() {
    let kernel = file(&bzimage(&pack(&elf(), Format::Gzip)));
    let try_line = |line: &str| {
        let source = Source {
            kernel: kernel.path(),
            initrd: &[],
            modules: &[],
            command_line: Some(line),
            cpus: 1,
        };
        Loaded::read(&source, MEMORY).err()
    };

    assert!(try_line(&"x".repeat(255)).is_none());
    let error = try_line(&"x".repeat(256));
    assert!(matches!(
        error,
        Some(Error::CommandLineTooLong {
            length: 256,
            limit: 255
        })
    ));
    assert!(matches!(try_line("a\0b"), Some(Error::CommandLineNul)));
}
