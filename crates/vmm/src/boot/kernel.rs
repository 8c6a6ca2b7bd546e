//! A kernel file: a bzImage whose payload is unpacked here, or an ELF `vmlinux`.

use linux_loader::bootparam::setup_header;
use object::Endianness;
use object::elf::FileHeader64;
use strata_memory::GuestMemory;
use vm_memory::ByteValued;

use super::elf::{self, Elf, ElfMachine, Segment};
use super::unpack;
use crate::error::{Error, KernelProblem};
use crate::layout;

/// Where the setup header is in a bzImage.
const HEADER_OFFSET: usize = 0x1f1;
/// Bytes that any bzImage has: boot sector and the first setup sector.
const BZIMAGE_MIN: usize = 1024;
/// `boot_flag`.
const BOOT_FLAG: u16 = 0xaa55;
/// `header`: `HdrS`.
const HEADER_MAGIC: u32 = 0x5372_6448;
/// The first boot protocol that tells where the payload is.
const MIN_PROTOCOL: u16 = 0x0208;
/// The boot protocol that `xloadflags` came with.
const XLOADFLAGS_PROTOCOL: u16 = 0x020c;
/// `xloadflags` bit 0: there is a 64-bit entry point.
const XLF_KERNEL_64: u16 = 1 << 0;
const SECTOR: usize = 512;
/// `setup_sects` 0 stands for this.
const DEFAULT_SETUP_SECTORS: usize = 4;

/// What is assumed of an ELF file, which has no setup header: that of Linux 2.6.26 and
/// later.
const ELF_PROTOCOL: u16 = 0x020f;
const ELF_COMMAND_LINE_SIZE: u32 = 2047;
const ELF_INITRD_MAX: u32 = 0x7fff_ffff;
const ELF_ALIGNMENT: u32 = 0x20_0000;

/// A kernel that was read, unpacked and checked, ready to be loaded.
pub(super) struct Kernel {
    header: setup_header,
    elf: Vec<u8>,
    entry: u64,
    segments: Vec<Segment>,
}

impl Kernel {
    /// Unpacks and checks a file.
    pub(super) fn parse(file: Vec<u8>) -> Result<Self, KernelProblem> {
        let (header, elf) = match setup_header_of(&file)? {
            Some(header) => (header, unpack_payload(&header, &file)?),
            None if file.starts_with(elf::MAGIC) => (elf_setup_header(), file),
            None => return Err(KernelProblem::NotAKernel(looks_like(&file))),
        };
        let (entry, segments) = segments(&elf)?;
        Ok(Self {
            header,
            elf,
            entry,
            segments,
        })
    }

    /// The setup header, as the file has it.
    pub(super) fn header(&self) -> setup_header {
        self.header
    }

    /// The physical address of the 64-bit entry point.
    pub(super) fn entry(&self) -> u64 {
        self.entry
    }

    /// The longest command line, in bytes, that the kernel reads whole.
    pub(super) fn command_line_limit(&self) -> usize {
        self.header.cmdline_size as usize
    }

    /// The highest address that a byte of the RAM disk may have.
    pub(super) fn initrd_address_max(&self) -> u32 {
        self.header.initrd_addr_max
    }

    /// The end of the memory that the kernel takes before it knows of any other.
    pub(super) fn memory_end(&self) -> u64 {
        let ends = self.segments.iter().map(Segment::end);
        let start = self.segments.iter().map(|s| s.address).min().unwrap_or(0);
        let with_heap = start.saturating_add(self.header.init_size.into());
        ends.max().unwrap_or(0).max(with_heap)
    }

    /// Copies the segments to guest memory, which is zero elsewhere.
    pub(super) fn load(&self, memory: &GuestMemory) -> Result<(), Error> {
        for segment in &self.segments {
            super::write(memory, segment.address, segment.bytes(&self.elf))?;
        }
        Ok(())
    }
}

/// Whether `file` is a bzImage, sound or not.
pub(super) fn is_bzimage(file: &[u8]) -> bool {
    !matches!(setup_header_of(file), Ok(None))
}

/// The setup header, if `file` is a bzImage.
fn setup_header_of(file: &[u8]) -> Result<Option<setup_header>, KernelProblem> {
    let mut header = setup_header::default();
    let size = size_of::<setup_header>();
    let Some(bytes) = file.get(HEADER_OFFSET..HEADER_OFFSET + size) else {
        return Ok(None);
    };
    header.as_mut_slice().copy_from_slice(bytes);
    let (flag, magic) = (header.boot_flag, header.header);
    if flag != BOOT_FLAG || magic != HEADER_MAGIC {
        return Ok(None);
    }
    if file.len() < BZIMAGE_MIN {
        let (length, expected) = (file.len() as u64, BZIMAGE_MIN as u64);
        return Err(KernelProblem::Truncated { length, expected });
    }
    let (version, flags) = (header.version, header.xloadflags);
    if version < MIN_PROTOCOL {
        return Err(KernelProblem::OldProtocol(version));
    }
    if version >= XLOADFLAGS_PROTOCOL && flags & XLF_KERNEL_64 == 0 {
        return Err(KernelProblem::WrongMachine("32-bit x86"));
    }
    Ok(Some(header))
}

/// What stands for the setup header of a kernel that has none.
fn elf_setup_header() -> setup_header {
    setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        version: ELF_PROTOCOL,
        initrd_addr_max: ELF_INITRD_MAX,
        kernel_alignment: ELF_ALIGNMENT,
        cmdline_size: ELF_COMMAND_LINE_SIZE,
        ..setup_header::default()
    }
}

/// The ELF file inside a bzImage.
fn unpack_payload(header: &setup_header, file: &[u8]) -> Result<Vec<u8>, KernelProblem> {
    let sectors = match header.setup_sects {
        0 => DEFAULT_SETUP_SECTORS,
        count => count.into(),
    };
    let start = (sectors + 1) * SECTOR + header.payload_offset as usize;
    let end = start + header.payload_length as usize;
    let Some(payload) = file.get(start..end) else {
        let (length, expected) = (file.len() as u64, end as u64);
        return Err(KernelProblem::Truncated { length, expected });
    };
    let elf = unpack::unpack(payload)?;
    if !elf.starts_with(elf::MAGIC) {
        return Err(KernelProblem::Damaged(
            "what it unpacks to is no ELF file".into(),
        ));
    }
    Ok(elf)
}

/// The entry point and loadable segments of an x86-64 ELF file.
fn segments(elf: &[u8]) -> Result<(u64, Vec<Segment>), KernelProblem> {
    let damaged = |what: &str| KernelProblem::Damaged(what.into());
    match elf::machine(elf)? {
        ElfMachine::X86_64 => {}
        ElfMachine::I386 => return Err(KernelProblem::WrongMachine("32-bit x86")),
    }
    let Elf { entry, segments } = elf::read::<FileHeader64<Endianness>>(elf)?;
    for segment in &segments {
        if segment.address < layout::HIGH_MEMORY {
            return Err(KernelProblem::NotAKernel(elf::USER_PROGRAM));
        }
        if segment.end() > layout::MMIO_HOLE_START {
            return Err(damaged("it wants to be at addresses that are not memory"));
        }
    }
    if !segments.iter().any(|segment| segment.contains(entry)) {
        return Err(damaged("its entry point is in none of its segments"));
    }
    Ok((entry, segments))
}

/// What a file that is no kernel seems to be, by how it begins.
fn looks_like(file: &[u8]) -> &'static str {
    const ARM64_MAGIC: Option<&[u8]> = Some(b"ARM\x64");
    let kinds: [(&[u8], &'static str); 18] = [
        (b"\x1f\x8b", "a gzip-compressed file"),
        (b"\xfd7zXZ\0", "an xz-compressed file"),
        (b"\x28\xb5\x2f\xfd", "a zstd-compressed file"),
        (b"\x02\x21\x4c\x18", "an LZ4-compressed file"),
        (b"\x04\x22\x4d\x18", "an LZ4-compressed file"),
        (b"BZh", "a bzip2-compressed file"),
        (b"070701", "a cpio archive (an initial RAM disk?)"),
        (b"070702", "a cpio archive (an initial RAM disk?)"),
        (b"\xc7\x71", "a cpio archive (an initial RAM disk?)"),
        (b"!<arch>\n", "a Debian package or ar archive"),
        (b"\xed\xab\xee\xdb", "an RPM package"),
        (b"QFI\xfb", "a qcow2 disk image"),
        (b"PK\x03\x04", "a zip archive"),
        (b"hsqs", "a squashfs image"),
        (b"#!", "a script"),
        (b"<", "a web page or XML file"),
        (b"\xd0\x0d\xfe\xed", "a device tree or FIT image"),
        (b"MZ", "an EFI program or Windows executable"),
    ];
    if file.is_empty() {
        return "an empty file";
    }
    if file.get(0x38..0x3c) == ARM64_MAGIC {
        return "a kernel for 64-bit ARM";
    }
    if let Some((_, kind)) = kinds.iter().find(|(magic, _)| file.starts_with(magic)) {
        return kind;
    }
    if file.get(257..262) == Some(b"ustar") {
        return "a tar archive";
    }
    if file.get(510..512) == Some(b"\x55\xaa") {
        return "a disk image or boot sector";
    }
    let start = &file[..file.len().min(512)];
    if start
        .iter()
        .all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace())
    {
        return "a text file";
    }
    if start.iter().all(|byte| *byte == 0) {
        return "a file that begins with zeros";
    }
    "a file of an unknown kind"
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn a_file_that_is_no_kernel_is_named_by_what_it_looks_like() {
        let mut arm = vec![0; 64];
        arm[0x38..0x3c].copy_from_slice(b"ARM\x64");
        for (file, kind) in [
            (&b""[..], "an empty file"),
            (b"\x1f\x8b\x08", "a gzip-compressed file"),
            (b"070701000", "a cpio archive (an initial RAM disk?)"),
            (b"hello\n", "a text file"),
            (&[0; 2048], "a file that begins with zeros"),
            (&arm, "a kernel for 64-bit ARM"),
            (&[0x80, 0x90], "a file of an unknown kind"),
        ] {
            assert_eq!(looks_like(file), kind);
        }
    }
}
