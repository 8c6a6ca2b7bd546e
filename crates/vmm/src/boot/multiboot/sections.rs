//! ELF section headers, and the sections that no segment loads (symbols, names, debugging
//! information): kernels find their own symbols by them.

use object::Endianness;
use object::elf::{SHT_NOBITS, SHT_NULL, SectionType};
use object::read::elf::FileHeader;

/// Fields of a section header, by offset: type in both classes, then address, file offset and
/// size of each class.
const TYPE: usize = 4;
const FIELDS_64: [usize; 3] = [16, 24, 32];
const FIELDS_32: [usize; 3] = [12, 16, 20];
/// Sections begin at multiples of this.
const ALIGNMENT: usize = 16;

/// Where the table is, and what its entries look like.
#[derive(Clone, Debug)]
pub(super) struct Sections {
    table: Vec<u8>,
    pub(super) count: u16,
    pub(super) entry_size: u16,
    /// Which section has the names of all.
    pub(super) names: u16,
    class_64: bool,
}

impl Sections {
    /// The section headers of a file, if it has any and they are sound. A kernel does well
    /// without.
    pub(super) fn read<H: FileHeader<Endian = Endianness>>(file: &[u8]) -> Option<Self> {
        let endian = Endianness::Little;
        let header = H::parse(file).ok()?;
        let (count, entry_size) = (header.e_shnum(endian), header.e_shentsize(endian));
        let class_64 = header.is_type_64();
        let least = if class_64 { 64 } else { 40 };
        if count == 0 || entry_size != least {
            return None;
        }
        let offset = usize::try_from(header.e_shoff(endian).into()).ok()?;
        let size = usize::from(count) * usize::from(entry_size);
        let table = file.get(offset..)?.get(..size)?.to_vec();
        Some(Self {
            table,
            count,
            entry_size,
            names: header.e_shstrndx(endian).0,
            class_64,
        })
    }

    /// The table, to be at `address`, with the sections after it that the segments lack, and
    /// the addresses that they then have. `None` if sections are in the file more than once.
    pub(super) fn bytes(&self, file: &[u8], address: u64) -> Option<Vec<u8>> {
        let mut bytes = self.table.clone();
        let mut left = file.len();
        for at in (0..self.table.len()).step_by(self.entry_size.into()) {
            let Some(content) = self.unloaded(file, at) else {
                continue;
            };
            left = left.checked_sub(content.len())?;
            bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
            let place = address + bytes.len() as u64;
            bytes.extend_from_slice(content);
            let [field, ..] = self.fields();
            let width = self.width();
            bytes[at + field..][..width].copy_from_slice(&place.to_le_bytes()[..width]);
        }
        Some(bytes)
    }

    /// What the section whose header is at `at` has in the file, if it has no address.
    fn unloaded<'a>(&self, file: &'a [u8], at: usize) -> Option<&'a [u8]> {
        let kind = u32::from_le_bytes(self.table.get(at + TYPE..)?.get(..4)?.try_into().ok()?);
        let [address, offset, size] = self.fields().map(|field| self.word(at + field));
        if matches!(SectionType(kind), SHT_NULL | SHT_NOBITS) || address? != 0 || size? == 0 {
            return None;
        }
        file.get(offset?..)?.get(..size?)
    }

    fn fields(&self) -> [usize; 3] {
        if self.class_64 { FIELDS_64 } else { FIELDS_32 }
    }

    /// Bytes in an address.
    fn width(&self) -> usize {
        if self.class_64 { 8 } else { 4 }
    }

    fn word(&self, at: usize) -> Option<usize> {
        let mut word = [0; 8];
        let width = self.width();
        word[..width].copy_from_slice(self.table.get(at..)?.get(..width)?);
        usize::try_from(u64::from_le_bytes(word)).ok()
    }
}
