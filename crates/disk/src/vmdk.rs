//! VMDK images in one file, sparse and stream-optimized: VMware's "Virtual Disk Format 5.0". Read
//! where they are, and written as a whole.

use std::io::Write;

use flate2::Compression;
use flate2::write::ZlibEncoder;

use crate::blocks::{BlockImage, MAX_BLOCKS, NOWHERE};
use crate::copy::each_block;
use crate::error::{Error, Result, damaged};
use crate::{Disk, HostFile, SECTOR_SIZE};

const MAGIC: &[u8; 4] = b"KDMV";
const HEADER: usize = 512;
/// In place of where the grain directory is: the header's copy at the end tells.
const AT_END: u64 = u64::MAX;
/// Flags: line ends can be checked, there is a second directory, an entry of 1 stands for zeroes,
/// grains are compressed, there are markers.
const LINE_ENDS: u32 = 1;
const REDUNDANT: u32 = 1 << 1;
const ZERO_GRAINS: u32 = 1 << 2;
const COMPRESSED: u32 = 1 << 16;
const MARKERS: u32 = 1 << 17;
/// Entries of a grain table.
const TABLE: u64 = 512;
/// Sectors of a grain, and of the descriptor, as they usually are.
const GRAIN: u64 = 128;
const DESCRIPTOR: u64 = 20;
/// Kinds of markers.
const MARK_END: u32 = 0;
const MARK_TABLE: u32 = 1;
const MARK_DIRECTORY: u32 = 2;
const MARK_FOOTER: u32 = 3;

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let bytes = &bytes[at..at + 4];
    bytes
        .iter()
        .rev()
        .fold(0, |all, byte| all << 8 | u32::from(*byte))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at + 4)) << 32 | u64::from(u32_at(bytes, at))
}

/// Whether a file begins like such an image.
pub(crate) fn is_vmdk(first: &[u8]) -> bool {
    first.starts_with(MAGIC)
}

/// Opens an image to be read.
pub(crate) fn open(file: HostFile) -> Result<BlockImage> {
    let mut header = [0; HEADER];
    file.read_bytes(0, &mut header)?;
    let flags = u32_at(&header, 8);
    if u64_at(&header, 56) == AT_END {
        // behind it there is one more marker
        let end = file.size()?.saturating_sub(2 * SECTOR_SIZE);
        file.read_bytes(end, &mut header)?;
    }
    if !is_vmdk(&header) || !(1..=3).contains(&u32_at(&header, 4)) {
        return Err(damaged("there is no header of a VMDK image"));
    }
    check_one_file(&file, &header)?;
    let packed = flags & COMPRESSED != 0;
    if packed && u32_at(&header, 77) & 0xffff != 1 {
        return Err(Error::Unsupported("a compression of VMDK's".to_owned()));
    }
    let sectors = u64_at(&header, 12);
    let grain = u64_at(&header, 20).saturating_mul(SECTOR_SIZE);
    let size = sectors.saturating_mul(SECTOR_SIZE);
    let usual = grain.is_power_of_two() && (4096..=64 << 20).contains(&grain);
    let count = size.checked_div(grain).unwrap_or(u64::MAX) + 1;
    if !usual
        || u64::from(u32_at(&header, 44)) != TABLE
        || size > i64::MAX as u64
        || count > MAX_BLOCKS
    {
        return Err(damaged("the header of the VMDK image"));
    }
    let blocks = grains(
        &file,
        &header,
        size.div_ceil(grain),
        flags & ZERO_GRAINS != 0,
    )?;
    let mut image = BlockImage::new(file, size, grain, blocks);
    image.packed = packed;
    Ok(image)
}

/// Where each grain is.
fn grains(file: &HostFile, header: &[u8], count: u64, zeroes: bool) -> Result<Vec<u64>> {
    let tables = count.div_ceil(TABLE);
    let mut directory = vec![0; tables as usize * 4];
    file.read_bytes(
        u64_at(header, 56).saturating_mul(SECTOR_SIZE),
        &mut directory,
    )?;
    let mut blocks = Vec::with_capacity(count as usize);
    let mut table = vec![0; TABLE as usize * 4];
    for entry in directory.chunks_exact(4) {
        table.fill(0);
        let at = u64::from(u32_at(entry, 0));
        if at != 0 {
            file.read_bytes(at * SECTOR_SIZE, &mut table)?;
        }
        blocks.extend(table.chunks_exact(4).map(|entry| match u32_at(entry, 0) {
            0 => NOWHERE,
            1 if zeroes => NOWHERE,
            sector => u64::from(sector) * SECTOR_SIZE,
        }));
    }
    blocks.truncate(count as usize);
    Ok(blocks)
}

/// Refuses images in several files, and those that are based on others.
fn check_one_file(file: &HostFile, header: &[u8]) -> Result<()> {
    let length = u64_at(header, 36).min(2048) * SECTOR_SIZE;
    let mut text = vec![0; length as usize];
    file.read_bytes(u64_at(header, 28).saturating_mul(SECTOR_SIZE), &mut text)?;
    let text = String::from_utf8_lossy(&text);
    let parent = text
        .lines()
        .find_map(|line| line.strip_prefix("parentCID="));
    let extents = text.lines().filter(|line| line.starts_with("RW ")).count();
    if parent.is_some_and(|parent| parent.trim() != "ffffffff") {
        return Err(Error::Unsupported("being based on another VMDK".to_owned()));
    }
    if extents > 1 {
        return Err(Error::Unsupported("VMDK in several files".to_owned()));
    }
    Ok(())
}

/// Writes what is on a disk to `file`, which is empty: as a sparse image, or stream-optimized, with
/// compressed grains.
pub(crate) fn write(
    file: &HostFile,
    from: &dyn Disk,
    stream: bool,
    progress: &dyn Fn(u64),
) -> Result<()> {
    let size = from.size();
    let grain = GRAIN * SECTOR_SIZE;
    let count = size.div_ceil(grain);
    if count >= MAX_BLOCKS {
        let what = "the disk is too large for a VMDK image".to_owned();
        return Err(Error::Invalid(what));
    }
    let tables = count.div_ceil(TABLE).max(1);
    let directory_sectors = (tables * 4).div_ceil(SECTOR_SIZE);
    let table_sectors = TABLE * 4 / SECTOR_SIZE;
    // a directory with its tables: one, or two, before the data; with a stream, behind it
    let group = directory_sectors + tables * table_sectors;
    let first = 1 + DESCRIPTOR;
    let groups = if stream { 0 } else { 2 };
    let mut end = (first + groups * group).next_multiple_of(GRAIN) * SECTOR_SIZE;
    let overhead = end / SECTOR_SIZE;
    let mut entries = vec![0_u32; (tables * TABLE) as usize];
    each_block(from, grain, progress, |number, bytes| {
        entries[number as usize] = sector(end)?;
        if stream {
            let mut packed = ZlibEncoder::new(Vec::new(), Compression::default());
            packed.write_all(bytes)?;
            let packed = packed.finish()?;
            let mut record = (number * GRAIN).to_le_bytes().to_vec();
            record.extend((packed.len() as u32).to_le_bytes());
            record.extend(packed);
            record.resize(record.len().next_multiple_of(SECTOR_SIZE as usize), 0);
            file.write_bytes(end, &record)?;
            end += record.len() as u64;
        } else {
            file.write_bytes(end, bytes)?;
            end += grain;
        }
        Ok(())
    })?;
    let mut header = Fields {
        flags: LINE_ENDS | REDUNDANT,
        version: 1,
        sectors: size.div_ceil(SECTOR_SIZE),
        second: first,
        directory: first + group,
        overhead,
    };
    if stream {
        header.flags = LINE_ENDS | COMPRESSED | MARKERS;
        header.version = 3;
        header.second = 0;
        end = write_tables_behind(file, end, &entries, &mut header)?;
        file.write_bytes(end, &mark(0, MARK_END))?;
        end += SECTOR_SIZE;
        header.directory = AT_END;
    } else {
        for start in [header.second, header.directory] {
            let tables_at = start + directory_sectors;
            let directory = (0..tables).map(|table| (tables_at + table * table_sectors) as u32);
            file.write_bytes(start * SECTOR_SIZE, &words(directory))?;
            file.write_bytes(tables_at * SECTOR_SIZE, &words(entries.iter().copied()))?;
        }
    }
    file.write_bytes(SECTOR_SIZE, descriptor(size, stream).as_bytes())?;
    file.write_bytes(0, &header.bytes())?;
    file.set_size(end.max(overhead * SECTOR_SIZE))?;
    Ok(())
}

/// Writes the tables that are not empty, the directory and the footer, each behind a marker, and
/// returns where they end.
fn write_tables_behind(
    file: &HostFile,
    mut end: u64,
    entries: &[u32],
    header: &mut Fields,
) -> Result<u64> {
    let mut directory = Vec::new();
    for table in entries.chunks_exact(TABLE as usize) {
        if table.iter().all(|entry| *entry == 0) {
            directory.push(0);
            continue;
        }
        let bytes = words(table.iter().copied());
        file.write_bytes(end, &mark(bytes.len() as u64 / SECTOR_SIZE, MARK_TABLE))?;
        file.write_bytes(end + SECTOR_SIZE, &bytes)?;
        directory.push(sector(end + SECTOR_SIZE)?);
        end += SECTOR_SIZE + bytes.len() as u64;
    }
    let mut bytes = words(directory.into_iter());
    bytes.resize(bytes.len().next_multiple_of(SECTOR_SIZE as usize), 0);
    file.write_bytes(end, &mark(bytes.len() as u64 / SECTOR_SIZE, MARK_DIRECTORY))?;
    file.write_bytes(end + SECTOR_SIZE, &bytes)?;
    header.directory = end / SECTOR_SIZE + 1;
    end += SECTOR_SIZE + bytes.len() as u64;
    file.write_bytes(end, &mark(1, MARK_FOOTER))?;
    file.write_bytes(end + SECTOR_SIZE, &header.bytes())?;
    Ok(end + 2 * SECTOR_SIZE)
}

/// A host offset as tables have it.
fn sector(at: u64) -> Result<u32> {
    let sector = u32::try_from(at / SECTOR_SIZE);
    sector.map_err(|_| Error::Invalid("a VMDK image has 2 TiB at most".to_owned()))
}

/// Numbers as they are in the file.
fn words(values: impl Iterator<Item = u32>) -> Vec<u8> {
    values.flat_map(u32::to_le_bytes).collect()
}

/// A marker: how many sectors come behind it, and what they are.
fn mark(sectors: u64, kind: u32) -> [u8; SECTOR_SIZE as usize] {
    let mut marker = [0; SECTOR_SIZE as usize];
    marker[..8].copy_from_slice(&sectors.to_le_bytes());
    marker[12..16].copy_from_slice(&kind.to_le_bytes());
    marker
}

/// What differs between headers. All in sectors.
struct Fields {
    version: u32,
    flags: u32,
    sectors: u64,
    second: u64,
    directory: u64,
    overhead: u64,
}

impl Fields {
    fn bytes(&self) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        let mut put = |at: usize, value: &[u8]| header[at..at + value.len()].copy_from_slice(value);
        put(0, MAGIC);
        put(4, &self.version.to_le_bytes());
        put(8, &self.flags.to_le_bytes());
        put(12, &self.sectors.to_le_bytes());
        put(20, &GRAIN.to_le_bytes());
        put(28, &1_u64.to_le_bytes());
        put(36, &DESCRIPTOR.to_le_bytes());
        put(44, &(TABLE as u32).to_le_bytes());
        put(48, &self.second.to_le_bytes());
        put(56, &self.directory.to_le_bytes());
        put(64, &self.overhead.to_le_bytes());
        // shut down cleanly; line ends that show whether somebody changed them
        put(73, b"\n \r\n");
        put(77, &u16::from(self.flags & COMPRESSED != 0).to_le_bytes());
        header
    }
}

fn descriptor(size: u64, stream: bool) -> String {
    let sectors = size.div_ceil(SECTOR_SIZE);
    let kind = if stream {
        "streamOptimized"
    } else {
        "monolithicSparse"
    };
    let cylinders = sectors.div_ceil(255 * 63);
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n\
         createType=\"{kind}\"\n\n# Extent description\n\
         RW {sectors} SPARSE \"disk.vmdk\"\n\n# The Disk Data Base\n#DDB\n\n\
         ddb.virtualHWVersion = \"4\"\nddb.geometry.cylinders = \"{cylinders}\"\n\
         ddb.geometry.heads = \"255\"\nddb.geometry.sectors = \"63\"\nddb.adapterType = \"lsilogic\"\n"
    )
}
