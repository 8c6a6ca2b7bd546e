//! Several disks as the partitions of one, which is only read: a GUID partition table (UEFI
//! Specification 2.10, chapter 5) is made in memory, and nothing is copied.
//!
//! ```text
//!   0      protective MBR, header, entries
//!   1 MiB  partition 1
//!   ...    partition 2, at the next MiB, and so forth
//!   end    entries, header
//! ```

use std::sync::Arc;

use crc::{CRC_32_ISO_HDLC, Crc};

use crate::error::{Error, Result};
use crate::{Buffers, Disk, Extent, ExtentKind, ReadOnlyDisk, SECTOR_SIZE};

const CRC: Crc<u32> = Crc::<u32>::new(&CRC_32_ISO_HDLC);
/// Partitions begin at multiples of it.
const ALIGNMENT: u64 = 1 << 20;
/// Bytes of an entry and of the header, §5.3.2.
const ENTRY: usize = 128;
const HEADER: usize = 92;
/// Entries there are at least: the space that tools expect.
const MIN_ENTRIES: usize = 128;
/// The most partitions; Linux has no numbers for more.
const MAX_PARTITIONS: usize = 255;
/// The longest name, in UTF-16 code units.
const MAX_NAME: usize = 36;
/// "Linux filesystem data", 0FC63DAF-8483-4772-8E79-3D69D8477DE4, as it is in the table.
const LINUX_DATA: [u8; 16] = [
    0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4,
];

/// See the module.
#[derive(Debug)]
pub struct Partitions {
    parts: Vec<Part>,
    size: u64,
}

/// Bytes of the disk from `start` on.
#[derive(Debug)]
struct Part {
    start: u64,
    size: u64,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Table(Vec<u8>),
    Disk(Arc<dyn Disk>),
}

impl Partitions {
    /// A disk with these as its partitions, in order, each with a name of at most 36 characters.
    /// Their sizes are multiples of [`SECTOR_SIZE`].
    pub fn new(disks: Vec<(String, Arc<dyn Disk>)>) -> Result<Self> {
        if disks.len() > MAX_PARTITIONS {
            let what = format!("{MAX_PARTITIONS} partitions at most can be on a disk");
            return Err(Error::Unsupported(what));
        }
        // a whole number of sectors
        let count = disks.len().max(MIN_ENTRIES).next_multiple_of(4);
        let mut entries = vec![0; count * ENTRY];
        let mut parts = Vec::with_capacity(disks.len() + 2);
        let mut start = ALIGNMENT;
        let slots = entries.chunks_exact_mut(ENTRY).zip(1_u16..);
        for ((name, disk), (entry, number)) in disks.into_iter().zip(slots) {
            let size = disk.size();
            if size == 0 || !size.is_multiple_of(SECTOR_SIZE) {
                let what = format!("a partition of {size} bytes");
                return Err(Error::Unsupported(what));
            }
            let end = start + size;
            write_entry(entry, number, &name, start..end);
            parts.push(Part {
                start,
                size,
                content: Content::Disk(disk),
            });
            start = end.next_multiple_of(ALIGNMENT);
        }
        // something is usable, also if there are no partitions
        start = start.max(2 * ALIGNMENT);
        let last = start + entries.len() as u64;
        let size = last + SECTOR_SIZE;
        let usable = (ALIGNMENT, start);
        let header = |here, other, table| header(here, other, usable, table, &entries);
        let mut front = vec![0; 2 * SECTOR_SIZE as usize];
        protective_mbr(&mut front, size);
        front[SECTOR_SIZE as usize..].copy_from_slice(&header(SECTOR_SIZE, last, 2 * SECTOR_SIZE));
        front.extend(&entries);
        let mut back = entries.clone();
        back.extend(header(last, SECTOR_SIZE, start));
        let table = |start, bytes: Vec<u8>| Part {
            start,
            size: bytes.len() as u64,
            content: Content::Table(bytes),
        };
        parts.insert(0, table(0, front));
        parts.push(table(start, back));
        Ok(Self { parts, size })
    }

    fn check(&self, offset: u64, length: u64) -> Result<()> {
        match offset.checked_add(length).filter(|end| *end <= self.size) {
            Some(_) => Ok(()),
            None => Err(Error::Invalid("beyond the end of the disk".to_owned())),
        }
    }

    /// The part that `offset` is in, or how far it is to the next.
    fn find(&self, offset: u64) -> Result<&Part, u64> {
        let next = self.parts.partition_point(|part| part.start <= offset);
        let part = &self.parts[next - 1];
        if offset - part.start < part.size {
            return Ok(part);
        }
        let end = self.parts.get(next).map_or(self.size, |part| part.start);
        Err(end - offset)
    }
}

/// Writes the entry of a partition of these bytes, §5.3.3.
fn write_entry(entry: &mut [u8], number: u16, name: &str, bytes: std::ops::Range<u64>) {
    entry[..16].copy_from_slice(&LINUX_DATA);
    entry[16..32].copy_from_slice(&guid(number));
    entry[32..40].copy_from_slice(&(bytes.start / SECTOR_SIZE).to_le_bytes());
    entry[40..48].copy_from_slice(&(bytes.end / SECTOR_SIZE - 1).to_le_bytes());
    let units = name.encode_utf16().take(MAX_NAME);
    for (place, unit) in entry[56..].chunks_exact_mut(2).zip(units) {
        place.copy_from_slice(&unit.to_le_bytes());
    }
}

/// The GUID of a partition, or with 0 of the disk: the same for the same disk, as it is made anew
/// each time (RFC 9562 §5.8, a version 8 UUID).
fn guid(number: u16) -> [u8; 16] {
    let mut guid = *b"Strata\x00\x80\x80layers\0";
    guid[14..].copy_from_slice(&number.to_be_bytes());
    guid
}

/// Writes the MBR that keeps tools which know no GPT from taking the disk for empty, §5.2.3.
fn protective_mbr(sector: &mut [u8], size: u64) {
    let sectors = u32::try_from(size / SECTOR_SIZE - 1).unwrap_or(u32::MAX);
    let record = &mut sector[446..462];
    // from cylinder 0, head 0, sector 2 to what cannot be said
    record[1..8].copy_from_slice(&[0x00, 0x02, 0x00, 0xee, 0xff, 0xff, 0xff]);
    record[8..12].copy_from_slice(&1_u32.to_le_bytes());
    record[12..16].copy_from_slice(&sectors.to_le_bytes());
    sector[510..512].copy_from_slice(&[0x55, 0xaa]);
}

/// The sector of a header at byte `here`, of which another is at `other` and the entries are at
/// `table`. What is `usable` ends before its second number. §5.3.2.
fn header(here: u64, other: u64, usable: (u64, u64), table: u64, entries: &[u8]) -> [u8; 512] {
    let mut sector = [0; SECTOR_SIZE as usize];
    let mut put = |at: usize, bytes: &[u8]| sector[at..at + bytes.len()].copy_from_slice(bytes);
    let block = |offset: u64| (offset / SECTOR_SIZE).to_le_bytes();
    put(0, b"EFI PART");
    // revision 1.0
    put(8, &0x0001_0000_u32.to_le_bytes());
    put(12, &(HEADER as u32).to_le_bytes());
    put(24, &block(here));
    put(32, &block(other));
    put(40, &block(usable.0));
    put(48, &block(usable.1 - SECTOR_SIZE));
    put(56, &guid(0));
    put(72, &block(table));
    put(80, &((entries.len() / ENTRY) as u32).to_le_bytes());
    put(84, &(ENTRY as u32).to_le_bytes());
    put(88, &CRC.checksum(entries).to_le_bytes());
    let sum = CRC.checksum(&sector[..HEADER]);
    sector[16..20].copy_from_slice(&sum.to_le_bytes());
    sector
}

impl ReadOnlyDisk for Partitions {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, mut offset: u64, mut buffers: Buffers) -> Result<()> {
        self.check(offset, buffers.len())?;
        while !buffers.is_empty() {
            let length = match self.find(offset) {
                Err(gap) => {
                    let part = buffers.take(gap);
                    part.clear();
                    part.len()
                }
                Ok(part) => {
                    let inside = offset - part.start;
                    let here = buffers.take(part.size - inside);
                    let length = here.len();
                    match &part.content {
                        Content::Table(bytes) => {
                            here.fill_from(&bytes[inside as usize..][..length as usize]);
                        }
                        Content::Disk(disk) => disk.read(inside, here)?,
                    }
                    length
                }
            };
            offset += length;
        }
        Ok(())
    }

    fn extent(&self, offset: u64, length: u64) -> Result<Extent> {
        self.check(offset, length)?;
        let (left, kind) = match self.find(offset) {
            Err(gap) => (gap, ExtentKind::Absent),
            Ok(part) => {
                let inside = offset - part.start;
                let left = part.size - inside;
                match &part.content {
                    // in no file, but not zeroes either
                    Content::Table(_) => (left, ExtentKind::Compressed),
                    Content::Disk(disk) => return disk.extent(inside, length.min(left)),
                }
            }
        };
        Ok(Extent {
            length: length.min(left),
            kind,
            depth: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::{HostFile, Raw};

    /// A disk of so many sectors, the first and last of which are `byte`.
    fn disk(sectors: u64, byte: u8) -> Arc<dyn Disk> {
        let file = HostFile::new(tempfile::tempfile().unwrap());
        file.set_size(sectors * SECTOR_SIZE).unwrap();
        file.write_bytes(0, &[byte; 512]).unwrap();
        file.write_bytes((sectors - 1) * SECTOR_SIZE, &[byte; 512])
            .unwrap();
        Arc::new(Raw::open(file, false).unwrap())
    }

    fn of(sizes: &[u64]) -> impl Disk + use<> {
        let disks = sizes.iter().zip(1_u8..);
        let disks = disks.map(|(sectors, byte)| (format!("layer-{byte}"), disk(*sectors, byte)));
        Partitions::new(disks.collect()).unwrap()
    }

    fn read(disk: &dyn Disk, offset: u64, length: u64) -> Vec<u8> {
        let mut bytes = vec![0x55; length as usize];
        disk.read(offset, Buffers::from(&mut bytes[..])).unwrap();
        bytes
    }

    #[test]
    fn partitions_are_where_the_table_says_and_hold_their_disks() {
        let disk = of(&[1, 2048, 2049]);
        let entries = read(&disk, 1024, 3 * 128);
        let blocks = |entry: usize, at: usize| {
            let at = entry * 128 + at;
            u64::from_le_bytes(entries[at..at + 8].try_into().unwrap())
        };
        let found: Vec<_> = (0..3).map(|n| (blocks(n, 32), blocks(n, 40))).collect();
        assert_eq!(found, [(2048, 2048), (4096, 6143), (6144, 8192)]);
        for ((first, last), byte) in found.into_iter().zip(1_u8..) {
            for block in [first, last] {
                assert_eq!(read(&disk, block * 512, 512), [byte; 512]);
            }
        }
        assert_eq!(&entries[56..70], b"l\0a\0y\0e\0r\0-\x001\0");
    }

    #[test]
    fn a_read_goes_across_tables_gaps_and_partitions() {
        let disk = of(&[1, 3]);
        let all = read(&disk, 0, disk.size());
        for (offset, length) in [(510, 4), (1 << 20, 4096), ((2 << 20) - 7, 2000)] {
            assert_eq!(
                read(&disk, offset, length),
                all[offset as usize..][..length as usize]
            );
        }
        assert!(
            disk.read(disk.size() - 1, Buffers::from(&mut [0; 2][..]))
                .is_err()
        );
    }

    #[test]
    fn holes_of_the_disks_and_between_them_are_told() {
        let disk = of(&[4096, 8]);
        let inside = disk.extent((1 << 20) + (1 << 19), 2 << 20).unwrap();
        assert!(inside.kind.is_zero());
        assert!(inside.length < 2 << 20);
        let gap = disk.extent((3 << 20) + 8 * 512, 1 << 10).unwrap();
        assert_eq!((gap.length, gap.kind), (1 << 10, ExtentKind::Absent));
        assert!(!disk.extent(0, 512).unwrap().kind.is_zero());
    }

    #[test]
    fn it_is_never_written() {
        let disk = of(&[8]);
        let write = disk.write(1 << 20, Buffers::from(&mut [0; 512][..]));
        assert!(matches!(write, Err(Error::ReadOnly)));
        assert!(matches!(
            disk.write_zeroes(0, 512, true),
            Err(Error::ReadOnly)
        ));
        assert!(matches!(disk.discard(0, 512), Err(Error::ReadOnly)));
    }

    #[test]
    fn fdisk_finds_nothing_wrong_and_all_partitions() {
        for count in [0, 1, 127, 200] {
            let disk = of(&vec![2049; count]);
            let file = tempfile::NamedTempFile::new().unwrap();
            let host = HostFile::new(file.reopen().unwrap());
            host.set_size(disk.size()).unwrap();
            let copy = Raw::open(host, true).unwrap();
            crate::copy(&disk, &copy, true, &|_| {}).unwrap();
            let sfdisk = |option: &str| {
                let mut sfdisk = Command::new("sfdisk");
                sfdisk.arg(option).arg(file.path()).env("LC_ALL", "C");
                sfdisk.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
                let done = sfdisk.output().expect("sfdisk, of Debian's fdisk");
                assert!(done.status.success(), "{count}: {done:?}");
                let all = [done.stdout, done.stderr].concat();
                String::from_utf8(all).unwrap()
            };
            let verdict = sfdisk("--verify");
            assert!(verdict.contains("No errors detected"), "{count}: {verdict}");
            assert!(!verdict.contains("corrupt"), "{count}: {verdict}");
            let dump = sfdisk("--dump");
            assert_eq!(dump.matches("name=\"layer-").count(), count);
            assert!(dump.contains("label: gpt"));
        }
    }
}
