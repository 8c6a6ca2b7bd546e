//! VHDX images, dynamic and fixed: Microsoft's [MS-VHDX]. Read where they are, and written as a
//! whole. If the log has changes in it, they are read from there.

mod log;

use crc::{CRC_32_ISCSI, Crc};

use crate::blocks::{BlockImage, MAX_BLOCKS, NOWHERE};
use crate::copy::each_block;
use crate::error::{Error, Result, damaged};
use crate::{Disk, HostFile};

const CRC: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);
const MEBI: u64 = 1 << 20;
/// Where headers and region tables are, two of each, and how long they are.
const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
const HEADER: usize = 4096;
const REGIONS: [u64; 2] = [192 << 10, 256 << 10];
const REGION_TABLE: usize = 64 << 10;
/// What entries of these tables take, and where the first is.
const REGION_ENTRY: usize = 32;
const FIRST_REGION: usize = 16;
const FIRST_ITEM: usize = 32;
const MAX_ENTRIES: usize = 2047;
/// Bytes of the largest disk.
const MAX_SIZE: u64 = 64 << 40;
/// States of blocks that have data.
const PRESENT: u64 = 6;
const PARTLY: u64 = 7;

/// Regions and metadata items, as the specification writes them.
mod guid {
    pub(super) const BAT: u128 = 0x2dc2_7766_f623_4200_9d64_115e_9bfd_4a08;
    pub(super) const METADATA: u128 = 0x8b7c_a206_4790_4b9a_b8fe_575f_050f_886e;
    pub(super) const PARAMETERS: u128 = 0xcaa1_6737_fa36_4d43_b3b6_33f0_aa44_e76b;
    pub(super) const SIZE: u128 = 0x2fa5_4224_cd1b_4876_b211_5dbe_d83b_f4b8;
    pub(super) const ID: u128 = 0xbeca_12ab_b2e6_4523_93ef_c309_e000_c746;
    pub(super) const LOGICAL: u128 = 0x8141_bf1d_a96f_4709_ba47_f233_a8fa_ab5f;
    pub(super) const PHYSICAL: u128 = 0xcda3_48c7_445d_4471_9cc9_e988_5251_c556;
}

/// As a GUID is in the file: its first three fields are little-endian.
fn guid_bytes(value: u128) -> [u8; 16] {
    let mut bytes = value.to_be_bytes();
    bytes[..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    bytes
}

fn number(bytes: &[u8], at: usize, length: usize) -> u64 {
    let bytes = bytes.get(at..at + length).unwrap_or_default();
    bytes
        .iter()
        .rev()
        .fold(0, |all, byte| all << 8 | u64::from(*byte))
}

/// Whether the checksum, which is behind the signature, is right.
fn is_whole(bytes: &[u8]) -> bool {
    number(bytes, 4, 4) == u64::from(checksum(bytes))
}

fn checksum(bytes: &[u8]) -> u32 {
    let mut digest = CRC.digest();
    digest.update(&bytes[..4]);
    digest.update(&[0; 4]);
    digest.update(&bytes[8..]);
    digest.finalize()
}

/// Whether a file begins like such an image.
pub(crate) fn is_vhdx(first: &[u8]) -> bool {
    first.starts_with(b"vhdxfile")
}

/// Opens an image to be read.
pub(crate) fn open(mut file: HostFile) -> Result<BlockImage> {
    let header = newest_header(&file)?;
    let log = &header[48..64];
    if log.iter().any(|byte| *byte != 0) {
        let (length, at) = (number(&header, 68, 4), number(&header, 72, 8));
        let changes = log::replay(&file, log, at, length)?;
        file.show(changes);
    }
    let regions = region_table(&file)?;
    let find = |what: u128| {
        let entries = regions[FIRST_REGION..].chunks_exact(REGION_ENTRY);
        let count = (number(&regions, 8, 4) as usize).min(MAX_ENTRIES);
        let mut entries = entries.take(count);
        let found = entries.find(|entry| entry[..16] == guid_bytes(what));
        let found = found.ok_or_else(|| damaged("a region of the VHDX image is missing"))?;
        Ok::<_, Error>((number(found, 16, 8), number(found, 24, 4)))
    };
    let metadata = Metadata::read(&file, find(guid::METADATA)?.0)?;
    let (bat, length) = find(guid::BAT)?;
    let Metadata { size, block, .. } = metadata;
    let count = size.div_ceil(block);
    let ratio = metadata.ratio();
    // behind so many blocks each there is an entry for something else
    let entries = count + (count - 1) / ratio;
    if count > MAX_BLOCKS || entries * 8 > length {
        return Err(damaged("the block table is too short for the disk"));
    }
    let mut table = vec![0; entries as usize * 8];
    file.read_bytes(bat, &mut table)?;
    let mut blocks = Vec::with_capacity(count as usize);
    for block in 0..count {
        let entry = number(&table, (block + block / ratio) as usize * 8, 8);
        blocks.push(match entry & 7 {
            PRESENT => entry & !(MEBI - 1),
            PARTLY => return Err(Error::Unsupported("being based on another VHDX".to_owned())),
            _ => NOWHERE,
        });
    }
    Ok(BlockImage::new(file, size, block, blocks))
}

/// The header that was written last.
fn newest_header(file: &HostFile) -> Result<Vec<u8>> {
    let mut newest: Option<Vec<u8>> = None;
    for at in HEADERS {
        let mut header = vec![0; HEADER];
        file.read_bytes(at, &mut header)?;
        if header.starts_with(b"head") && is_whole(&header) {
            let sequence = |header: &[u8]| number(header, 8, 8);
            if newest
                .as_ref()
                .is_none_or(|last| sequence(last) < sequence(&header))
            {
                newest = Some(header);
            }
        }
    }
    newest.ok_or_else(|| damaged("there is no whole header of a VHDX image"))
}

fn region_table(file: &HostFile) -> Result<Vec<u8>> {
    for at in REGIONS {
        let mut table = vec![0; REGION_TABLE];
        file.read_bytes(at, &mut table)?;
        if table.starts_with(b"regi") && is_whole(&table) {
            return Ok(table);
        }
    }
    Err(damaged("there is no whole region table of a VHDX image"))
}

/// What the metadata says of the disk.
struct Metadata {
    size: u64,
    block: u64,
    sector: u64,
}

impl Metadata {
    fn read(file: &HostFile, at: u64) -> Result<Self> {
        let mut table = vec![0; REGION_TABLE];
        file.read_bytes(at, &mut table)?;
        if !table.starts_with(b"metadata") {
            return Err(damaged("there is no metadata in the VHDX image"));
        }
        let count = (number(&table, 10, 2) as usize).min(MAX_ENTRIES);
        let item = |what: u128| {
            let entries = table[FIRST_ITEM..].chunks_exact(REGION_ENTRY).take(count);
            let mut entries = entries.filter(|entry| entry[..16] == guid_bytes(what));
            let entry = entries.next();
            let entry = entry.ok_or_else(|| damaged("an item of the metadata is missing"))?;
            let mut bytes = [0; 8];
            file.read_bytes(at.saturating_add(number(entry, 16, 4)), &mut bytes)?;
            Ok::<_, Error>(bytes)
        };
        let parameters = item(guid::PARAMETERS)?;
        if parameters[4] & 2 != 0 {
            return Err(Error::Unsupported("being based on another VHDX".to_owned()));
        }
        let metadata = Self {
            size: number(&item(guid::SIZE)?, 0, 8),
            block: number(&parameters, 0, 4),
            sector: number(&item(guid::LOGICAL)?, 0, 4),
        };
        let right = metadata.block.is_power_of_two()
            && (MEBI..=256 * MEBI).contains(&metadata.block)
            && [512, 4096].contains(&metadata.sector)
            && (1..=MAX_SIZE).contains(&metadata.size);
        if right {
            Ok(metadata)
        } else {
            Err(damaged("the metadata of the VHDX image"))
        }
    }

    /// Blocks that an entry for a bitmap of sectors comes behind.
    fn ratio(&self) -> u64 {
        (self.sector << 23) / self.block
    }
}

/// Writes what is on a disk to `file`, which is empty, as a dynamic image.
pub(crate) fn write(file: &HostFile, from: &dyn Disk, progress: &dyn Fn(u64)) -> Result<()> {
    let metadata = Metadata {
        size: from.size(),
        // as others choose it: larger for larger disks
        block: if from.size() > 32 << 40 {
            64 * MEBI
        } else {
            32 * MEBI
        },
        sector: 512,
    };
    if metadata.size > MAX_SIZE {
        let what = "a VHDX image has 64 TiB at most".to_owned();
        return Err(Error::Invalid(what));
    }
    let ratio = metadata.ratio();
    let count = metadata.size.div_ceil(metadata.block);
    let entries = count + count.saturating_sub(1) / ratio;
    let length = (entries * 8).next_multiple_of(MEBI);
    // headers, an empty log, metadata, block table
    let (log, items, bat) = (MEBI, 2 * MEBI, 3 * MEBI);
    let mut end = bat + length;
    let mut table = vec![0; length as usize];
    each_block(from, metadata.block, progress, |number, bytes| {
        let at = (number + number / ratio) as usize * 8;
        table[at..at + 8].copy_from_slice(&(end | PRESENT).to_le_bytes());
        file.write_bytes(end, bytes)?;
        end += metadata.block;
        Ok(())
    })?;
    file.set_size(end)?;
    file.write_bytes(bat, &table)?;
    write_items(file, items, &metadata)?;
    let regions = [(guid::BAT, bat, length), (guid::METADATA, items, MEBI)];
    let table = region_bytes(&regions);
    for at in REGIONS {
        file.write_bytes(at, &table)?;
    }
    for (at, sequence) in HEADERS.into_iter().zip(1..) {
        file.write_bytes(at, &header_bytes(sequence, log))?;
    }
    let mut identifier = b"vhdxfile".to_vec();
    identifier.extend("Strata".encode_utf16().flat_map(u16::to_le_bytes));
    file.write_bytes(0, &identifier)?;
    Ok(())
}

fn header_bytes(sequence: u64, log: u64) -> Vec<u8> {
    let mut header = vec![0; HEADER];
    header[..4].copy_from_slice(b"head");
    header[8..16].copy_from_slice(&sequence.to_le_bytes());
    header[16..32].copy_from_slice(&some_guid(1));
    header[32..48].copy_from_slice(&some_guid(2));
    // no log GUID: the log is empty
    header[66..68].copy_from_slice(&1_u16.to_le_bytes());
    header[68..72].copy_from_slice(&(MEBI as u32).to_le_bytes());
    header[72..80].copy_from_slice(&log.to_le_bytes());
    sum(header)
}

fn region_bytes(regions: &[(u128, u64, u64)]) -> Vec<u8> {
    let mut table = vec![0; REGION_TABLE];
    table[..4].copy_from_slice(b"regi");
    table[8..12].copy_from_slice(&(regions.len() as u32).to_le_bytes());
    let entries = table[FIRST_REGION..].chunks_exact_mut(REGION_ENTRY);
    for (entry, (what, offset, length)) in entries.zip(regions) {
        entry[..16].copy_from_slice(&guid_bytes(*what));
        entry[16..24].copy_from_slice(&offset.to_le_bytes());
        entry[24..28].copy_from_slice(&(*length as u32).to_le_bytes());
        entry[28] = 1;
    }
    sum(table)
}

fn sum(mut bytes: Vec<u8>) -> Vec<u8> {
    let sum = checksum(&bytes);
    bytes[4..8].copy_from_slice(&sum.to_le_bytes());
    bytes
}

fn write_items(file: &HostFile, at: u64, metadata: &Metadata) -> Result<()> {
    const REQUIRED: u32 = 4;
    const OF_DISK: u32 = 2;
    let sector = (metadata.sector as u32).to_le_bytes().to_vec();
    let items = [
        (
            guid::PARAMETERS,
            metadata.block.to_le_bytes().to_vec(),
            REQUIRED,
        ),
        (
            guid::SIZE,
            metadata.size.to_le_bytes().to_vec(),
            REQUIRED | OF_DISK,
        ),
        (guid::ID, some_guid(3).to_vec(), REQUIRED | OF_DISK),
        (guid::LOGICAL, sector.clone(), REQUIRED | OF_DISK),
        (guid::PHYSICAL, sector, REQUIRED | OF_DISK),
    ];
    let mut table = vec![0; REGION_TABLE];
    table[..8].copy_from_slice(b"metadata");
    table[10..12].copy_from_slice(&(items.len() as u16).to_le_bytes());
    let mut data = Vec::new();
    let entries = table[FIRST_ITEM..].chunks_exact_mut(REGION_ENTRY);
    for (entry, (what, bytes, flags)) in entries.zip(items) {
        entry[..16].copy_from_slice(&guid_bytes(what));
        entry[16..20].copy_from_slice(&((REGION_TABLE + data.len()) as u32).to_le_bytes());
        entry[20..24].copy_from_slice(&(bytes.len() as u32).to_le_bytes());
        entry[24..28].copy_from_slice(&flags.to_le_bytes());
        data.extend(bytes);
        data.resize(data.len().next_multiple_of(16), 0);
    }
    file.write_bytes(at, &table)?;
    file.write_bytes(at + REGION_TABLE as u64, &data)?;
    Ok(())
}

/// A GUID that no other image has: of the time, and of what it is for.
fn some_guid(salt: u128) -> [u8; 16] {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let time = now.unwrap_or_default().as_nanos() ^ u128::from(std::process::id()) << 96;
    // version 4, variant 1
    let value = time << 8 | salt;
    guid_bytes(value & !(0xf << 76) & !(0x3 << 62) | 4 << 76 | 2 << 62)
}
