//! Unpacks a kernel's payload, in each of the formats that Linux is built with.
//!
//! The kernel's build appends the unpacked size, 4 bytes, to every format; gzip's own
//! trailer serves as that.

use std::io::Read;

use crate::error::KernelProblem;

/// The most that a kernel may unpack to.
const SIZE_MAX: u64 = 1 << 30;
/// Bytes of the appended size.
const TRAILER: usize = 4;
/// The most that a block of an LZ4 legacy frame unpacks to (the `lz4` tool's format).
const LZ4_BLOCK: usize = 8 << 20;
const LZ4_MAGIC: &[u8] = b"\x02\x21\x4c\x18";

/// Unpacks `payload`, or returns it as it is if it is an ELF file.
pub(super) fn unpack(payload: &[u8]) -> Result<Vec<u8>, KernelProblem> {
    let Some((body, trailer)) = payload.split_last_chunk::<TRAILER>() else {
        return Err(KernelProblem::Damaged("its payload is empty".into()));
    };
    let size = u32::from_le_bytes(*trailer);
    let unpacked = if payload.starts_with(b"\x7fELF") {
        return Ok(payload.to_vec());
    } else if payload.starts_with(b"\x1f\x8b") {
        read_all("gzip", size, flate2::read::GzDecoder::new(payload))
    } else if body.starts_with(b"\xfd7zXZ\0") {
        read_all("xz", size, lzma_rust2::XzReader::new(body, false))
    } else if body.starts_with(b"\x28\xb5\x2f\xfd") {
        let decoder = ruzstd::decoding::StreamingDecoder::new(body);
        read_all(
            "zstd",
            size,
            decoder.map_err(|error| damaged("zstd", &error))?,
        )
    } else if body.starts_with(b"BZh") {
        read_all("bzip2", size, bzip2::read::BzDecoder::new(body))
    } else if body.starts_with(b"\x5d\0\0") {
        let limit_kib = (SIZE_MAX >> 10) as u32;
        let decoder = lzma_rust2::LzmaReader::new_mem_limit(body, limit_kib, None);
        read_all(
            "lzma",
            size,
            decoder.map_err(|error| damaged("lzma", &error))?,
        )
    } else if let Some(blocks) = body.strip_prefix(LZ4_MAGIC) {
        lz4(blocks, size)
    } else if body.starts_with(b"\x89LZO") {
        return Err(KernelProblem::Compression("LZO"));
    } else {
        return Err(KernelProblem::Damaged(
            "its payload is in no known format".into(),
        ));
    }?;
    if unpacked.len() as u64 != u64::from(size) {
        let text = format!(
            "its payload unpacks to {} bytes, not {size}",
            unpacked.len()
        );
        return Err(KernelProblem::Damaged(text));
    }
    Ok(unpacked)
}

fn damaged(format: &str, error: &dyn std::fmt::Display) -> KernelProblem {
    KernelProblem::Damaged(format!("its {format} payload does not unpack ({error})"))
}

/// `size` is only a claim: memory is taken as the data comes.
fn read_all(format: &str, size: u32, decoder: impl Read) -> Result<Vec<u8>, KernelProblem> {
    let mut unpacked = Vec::with_capacity((size as usize).min(64 << 20));
    let limit = u64::from(size).min(SIZE_MAX) + 1;
    let read = decoder.take(limit).read_to_end(&mut unpacked);
    read.map_err(|error| damaged(format, &error))?;
    Ok(unpacked)
}

/// Blocks of an LZ4 legacy frame: each has its packed size before it.
fn lz4(mut blocks: &[u8], size: u32) -> Result<Vec<u8>, KernelProblem> {
    if u64::from(size) > SIZE_MAX {
        return Err(damaged("LZ4", &"it claims to be too large"));
    }
    let mut unpacked = vec![0; size as usize];
    let mut filled = 0;
    while let Some((packed_size, rest)) = blocks.split_first_chunk::<4>() {
        let packed_size = u32::from_le_bytes(*packed_size) as usize;
        let Some((packed, rest)) = rest.split_at_checked(packed_size) else {
            return Err(damaged("LZ4", &"a block ends too early"));
        };
        let end = unpacked.len().min(filled + LZ4_BLOCK);
        let target = &mut unpacked[filled..end];
        let written = lz4_flex::block::decompress_into(packed, target);
        filled += written.map_err(|error| damaged("LZ4", &error))?;
        blocks = rest;
    }
    unpacked.truncate(filled);
    Ok(unpacked)
}
