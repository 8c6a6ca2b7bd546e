//! VHD images, fixed and dynamic: Microsoft's "Virtual Hard Disk Image Format Specification", 1.0.
//! Read where they are, and written as a whole.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::blocks::{BlockImage, MAX_BLOCKS, NOWHERE};
use crate::copy::each_block;
use crate::error::{Error, Result, damaged};
use crate::{Disk, HostFile, SECTOR_SIZE};

const COOKIE: &[u8; 8] = b"conectix";
const SPARSE_COOKIE: &[u8; 8] = b"cxsparse";
const FOOTER: usize = 512;
const HEADER: usize = 1024;
/// Where the checksums are.
const FOOTER_SUM: usize = 64;
const HEADER_SUM: usize = 36;
/// Disk types.
const FIXED: u32 = 2;
const DYNAMIC: u32 = 3;
const DIFFERENCING: u32 = 4;
/// No such block.
const NONE: u32 = u32::MAX;
/// Bytes of a block, as they usually are.
const BLOCK: u64 = 2 << 20;
/// Bytes of the largest disk.
const MAX_SIZE: u64 = 2040 << 30;
/// Sectors of the largest geometry; larger disks go by their size.
const MAX_CHS: u64 = 65535 * 16 * 255;
/// Seconds from 1970 to 2000, which times count from.
const EPOCH: u64 = 946_684_800;

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let bytes = &bytes[at..at + 4];
    bytes
        .iter()
        .fold(0, |all, byte| all << 8 | u32::from(*byte))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) << 32 | u64::from(u32_at(bytes, at + 4))
}

/// The ones' complement of the sum of all bytes but the four at `at`.
fn checksum(bytes: &[u8], at: usize) -> u32 {
    let sum = |bytes: &[u8]| bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>();
    !(sum(bytes) - sum(&bytes[at..at + 4]))
}

/// The footer of a file, at its end or, if that was cut off, at its beginning.
fn footer(file: &HostFile) -> Result<Option<[u8; FOOTER]>> {
    let mut footer = [0; FOOTER];
    let Some(last) = file.size()?.checked_sub(FOOTER as u64) else {
        return Ok(None);
    };
    for at in [last, 0] {
        file.read_bytes(at, &mut footer)?;
        if footer.starts_with(COOKIE) {
            return Ok(Some(footer));
        }
    }
    Ok(None)
}

/// Whether a file is such an image.
pub(crate) fn is_vhd(file: &HostFile) -> Result<bool> {
    Ok(footer(file)?.is_some())
}

/// Opens an image to be read.
pub(crate) fn open(file: HostFile) -> Result<BlockImage> {
    let footer = footer(&file)?.filter(|f| u32_at(f, FOOTER_SUM) == checksum(f, FOOTER_SUM));
    let footer = footer.ok_or_else(|| damaged("there is no footer of a VHD image"))?;
    let size = disk_size(&footer);
    if size > MAX_SIZE || size == 0 || !size.is_multiple_of(SECTOR_SIZE) {
        return Err(damaged(format!("a disk of {size} bytes")));
    }
    match u32_at(&footer, 60) {
        FIXED => {
            let blocks = (0..size.div_ceil(BLOCK)).map(|number| number * BLOCK);
            Ok(BlockImage::new(file, size, BLOCK, blocks.collect()))
        }
        DYNAMIC => {
            let (block, blocks) = table(&file, &footer, size)?;
            Ok(BlockImage::new(file, size, block, blocks))
        }
        DIFFERENCING => Err(Error::Unsupported("being based on another VHD".to_owned())),
        other => Err(damaged(format!("disk type {other}"))),
    }
}

/// Programs that only know geometries have disks that end with the last cylinder.
fn disk_size(footer: &[u8]) -> u64 {
    let by_geometry = [&b"vpc "[..], b"vs  ", b"qemu"].contains(&&footer[28..32]);
    let cylinders = u64::from(u32_at(footer, 56) >> 16);
    let sectors = cylinders * u64::from(footer[58]) * u64::from(footer[59]);
    if by_geometry && sectors > 0 && sectors < MAX_CHS {
        sectors * SECTOR_SIZE
    } else {
        u64_at(footer, 48)
    }
}

/// Bytes of a block, and where each block's data is.
fn table(file: &HostFile, footer: &[u8], size: u64) -> Result<(u64, Vec<u64>)> {
    let mut header = [0; HEADER];
    file.read_bytes(u64_at(footer, 16), &mut header)?;
    if !header.starts_with(SPARSE_COOKIE)
        || u32_at(&header, HEADER_SUM) != checksum(&header, HEADER_SUM)
    {
        return Err(damaged("there is no header of a dynamic VHD image"));
    }
    let block = u64::from(u32_at(&header, 32));
    if !block.is_power_of_two() || !(SECTOR_SIZE..=1 << 30).contains(&block) {
        return Err(damaged(format!("blocks of {block} bytes")));
    }
    let count = size.div_ceil(block);
    if count > MAX_BLOCKS || count > u64::from(u32_at(&header, 28)) {
        return Err(damaged("the block table is too short for the disk"));
    }
    let mut entries = vec![0; count as usize * 4];
    file.read_bytes(u64_at(&header, 16), &mut entries)?;
    let place = |entry: &[u8]| match u32_at(entry, 0) {
        NONE => NOWHERE,
        sector => u64::from(sector) * SECTOR_SIZE + bitmap_size(block),
    };
    Ok((block, entries.chunks_exact(4).map(place).collect()))
}

/// Bytes before a block's data, which tell which of its sectors were written. Those that were not
/// are zeroes in the data too.
fn bitmap_size(block: u64) -> u64 {
    (block / SECTOR_SIZE)
        .div_ceil(8)
        .next_multiple_of(SECTOR_SIZE)
}

/// Writes what is on a disk to `file`, which is empty, as a dynamic image.
pub(crate) fn write(file: &HostFile, from: &dyn Disk, progress: &dyn Fn(u64)) -> Result<()> {
    let size = from.size();
    if size > MAX_SIZE {
        let what = "a VHD image has 2040 GiB at most; use another format".to_owned();
        return Err(Error::Invalid(what));
    }
    let count = size.div_ceil(BLOCK);
    let table_at = (FOOTER + HEADER) as u64;
    let mut table = vec![0xff; (count as usize * 4).next_multiple_of(FOOTER)];
    let mut end = table_at + table.len() as u64;
    let bitmap = vec![0xff; bitmap_size(BLOCK) as usize];
    each_block(from, BLOCK, progress, |number, bytes| {
        let sector = (end / SECTOR_SIZE) as u32;
        table[number as usize * 4..][..4].copy_from_slice(&sector.to_be_bytes());
        file.write_bytes(end, &bitmap)?;
        file.write_bytes(end + bitmap.len() as u64, bytes)?;
        end += bitmap.len() as u64 + BLOCK;
        Ok(())
    })?;
    let footer = new_footer(size);
    file.write_bytes(table_at, &table)?;
    file.write_bytes(FOOTER as u64, &new_header(table_at, count))?;
    file.write_bytes(0, &footer)?;
    file.write_bytes(end, &footer)?;
    Ok(())
}

fn new_footer(size: u64) -> [u8; FOOTER] {
    let mut footer = [0; FOOTER];
    let mut put = |at: usize, value: &[u8]| footer[at..at + value.len()].copy_from_slice(value);
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let seconds = now.as_secs().saturating_sub(EPOCH) as u32;
    put(0, COOKIE);
    // reserved, and always set
    put(8, &2_u32.to_be_bytes());
    put(12, &0x0001_0000_u32.to_be_bytes());
    put(16, &(FOOTER as u64).to_be_bytes());
    put(24, &seconds.to_be_bytes());
    // what all readers take the size and not the geometry of
    put(28, b"win ");
    put(32, &0x0006_0001_u32.to_be_bytes());
    put(36, b"Wi2k");
    put(40, &size.to_be_bytes());
    put(48, &size.to_be_bytes());
    let (cylinders, heads, sectors) = geometry(size / SECTOR_SIZE);
    put(56, &cylinders.to_be_bytes());
    put(58, &[heads, sectors]);
    put(60, &DYNAMIC.to_be_bytes());
    put(68, &now.as_nanos().to_be_bytes());
    let sum = checksum(&footer, FOOTER_SUM);
    footer[FOOTER_SUM..FOOTER_SUM + 4].copy_from_slice(&sum.to_be_bytes());
    footer
}

fn new_header(table: u64, count: u64) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    let mut put = |at: usize, value: &[u8]| header[at..at + value.len()].copy_from_slice(value);
    put(0, SPARSE_COOKIE);
    put(8, &u64::MAX.to_be_bytes());
    put(16, &table.to_be_bytes());
    put(24, &0x0001_0000_u32.to_be_bytes());
    put(28, &(count as u32).to_be_bytes());
    put(32, &(BLOCK as u32).to_be_bytes());
    let sum = checksum(&header, HEADER_SUM);
    header[HEADER_SUM..HEADER_SUM + 4].copy_from_slice(&sum.to_be_bytes());
    header
}

/// Cylinders, heads and sectors: the calculation of the specification's appendix.
fn geometry(total: u64) -> (u16, u8, u8) {
    let total = total.min(MAX_CHS);
    let (mut sectors, mut heads, mut tracks);
    if total >= 65535 * 16 * 63 {
        sectors = 255;
        heads = 16;
        tracks = total / sectors;
    } else {
        sectors = 17;
        tracks = total / sectors;
        heads = tracks.div_ceil(1024).max(4);
        if tracks >= heads * 1024 || heads > 16 {
            sectors = 31;
            heads = 16;
            tracks = total / sectors;
        }
        if tracks >= heads * 1024 {
            sectors = 63;
            heads = 16;
            tracks = total / sectors;
        }
    }
    ((tracks / heads) as u16, heads as u8, sectors as u8)
}
