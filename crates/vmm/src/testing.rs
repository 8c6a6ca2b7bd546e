//! Small kernels for tests: an ELF file, and bzImages around it in every format.

use std::io::Write;

/// Where the test kernel is loaded and entered.
pub(crate) const ENTRY: u64 = 0x100_0000;
/// What it consists of.
pub(crate) const CODE: &[u8] = b"\xf4 code of a kernel that is not one";
/// How much memory it takes, with its BSS.
pub(crate) const KERNEL_SIZE: u64 = 0x3000;

const ELF_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;

/// An x86-64 ELF executable with one segment: [`CODE`] at [`ENTRY`].
pub(crate) fn elf() -> Vec<u8> {
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    // Type, machine, version, entry, program headers.
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    elf.extend(ENTRY.to_le_bytes());
    elf.extend((ELF_HEADER as u64).to_le_bytes());
    // No sections, no flags; sizes and counts.
    elf.extend([0; 12]);
    for value in [ELF_HEADER, PROGRAM_HEADER, 1, 0, 0, 0] {
        elf.extend((value as u16).to_le_bytes());
    }
    // PT_LOAD, readable and executable.
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    let offset = (ELF_HEADER + PROGRAM_HEADER) as u64;
    let virtual_address = 0xffff_ffff_8000_0000 + ENTRY;
    let sizes = [CODE.len() as u64, KERNEL_SIZE, 0x1000];
    for value in [offset, virtual_address, ENTRY].into_iter().chain(sizes) {
        elf.extend(value.to_le_bytes());
    }
    elf.extend(CODE);
    elf
}

/// How a payload is packed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Format {
    None,
    Gzip,
    Xz,
    Zstd,
    Bzip2,
    Lzma,
    Lz4,
}

/// A payload as the kernel's build makes it: packed, with its unpacked size after it.
pub(crate) fn pack(data: &[u8], format: Format) -> Vec<u8> {
    let mut packed = match format {
        Format::None => return data.to_vec(),
        Format::Gzip => {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(data).unwrap();
            return encoder.finish().unwrap();
        }
        Format::Xz => {
            let mut options = lzma_rust2::XzOptions::with_preset(1);
            // The kernel's build asks for the x86 filter.
            options.prepend_pre_filter(lzma_rust2::FilterType::BcjX86, 0);
            let mut encoder = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
            encoder.write_all(data).unwrap();
            encoder.finish().unwrap()
        }
        Format::Zstd => {
            let level = ruzstd::encoding::CompressionLevel::Fastest;
            ruzstd::encoding::compress_to_vec(data, level)
        }
        Format::Bzip2 => {
            let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
            encoder.write_all(data).unwrap();
            encoder.finish().unwrap()
        }
        Format::Lzma => {
            let options = lzma_rust2::LzmaOptions::with_preset(1);
            let mut encoder =
                lzma_rust2::LzmaWriter::new_use_header(Vec::new(), &options, None).unwrap();
            encoder.write_all(data).unwrap();
            encoder.finish().unwrap()
        }
        Format::Lz4 => {
            let mut frame = b"\x02\x21\x4c\x18".to_vec();
            for block in data.chunks(8 << 20) {
                let packed = lz4_flex::block::compress(block);
                frame.extend((packed.len() as u32).to_le_bytes());
                frame.extend(packed);
            }
            frame
        }
    };
    packed.extend((data.len() as u32).to_le_bytes());
    packed
}

/// A bzImage (boot protocol 2.15, one setup sector) around `payload`.
pub(crate) fn bzimage(payload: &[u8]) -> Vec<u8> {
    const PAYLOAD_OFFSET: u32 = 0x40;
    let mut image = vec![0; 1024 + PAYLOAD_OFFSET as usize];
    let mut put = |offset: usize, bytes: &[u8]| {
        image[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    put(0x1f1, &[1]);
    put(0x1fe, &0xaa55_u16.to_le_bytes());
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x236, &1_u16.to_le_bytes());
    put(0x238, &255_u32.to_le_bytes());
    put(0x248, &PAYLOAD_OFFSET.to_le_bytes());
    put(0x24c, &(payload.len() as u32).to_le_bytes());
    put(0x260, &0x10_0000_u32.to_le_bytes());
    image.extend(payload);
    image
}
