//! The Multiboot information: what a kernel is told at its entry (Multiboot specification
//! 0.6.96 §3.3), with all that it points to, in one piece.

use std::ops::Range;

use linux_loader::bootparam::boot_e820_entry;

/// Its name, as the kernel is told it.
const LOADER: &[u8] = b"Strata";

/// Which fields are valid.
const FLAG_MEMORY: u32 = 1 << 0;
const FLAG_COMMAND_LINE: u32 = 1 << 2;
const FLAG_MODULES: u32 = 1 << 3;
const FLAG_ELF_SECTIONS: u32 = 1 << 5;
const FLAG_MEMORY_MAP: u32 = 1 << 6;
const FLAG_LOADER: u32 = 1 << 9;

/// Offsets of the fields.
const FLAGS: usize = 0;
const MEMORY_LOWER: usize = 4;
const COMMAND_LINE: usize = 16;
const MODULES: usize = 20;
const ELF_SECTIONS: usize = 28;
const MEMORY_MAP: usize = 44;
const LOADER_NAME: usize = 64;
/// Bytes up to the end of the framebuffer's fields, padded.
const SIZE: usize = 120;
/// `size` of an entry of the memory map does not count itself.
const MAP_ENTRY_SIZE: u32 = 20;
/// What is pointed to begins at multiples of this.
const ALIGNMENT: usize = 8;

/// What is told.
pub(super) struct Info<'a> {
    /// KiB of memory from 0, and from 1 MiB to the first hole.
    pub(super) memory: [u32; 2],
    pub(super) command_line: &'a [u8],
    /// Where modules are and what they are called.
    pub(super) modules: Vec<(Range<u64>, &'a [u8])>,
    /// Count, entry size, address and index of the names.
    pub(super) sections: Option<[u32; 4]>,
    pub(super) memory_map: &'a [boot_e820_entry],
}

impl Info<'_> {
    /// The information, to be at `base`, which changes no sizes. Addresses are below 4 GiB.
    pub(super) fn bytes(&self, base: u64) -> Vec<u8> {
        let mut block = Block {
            base,
            bytes: vec![0; SIZE],
        };
        let mut flags = FLAG_MEMORY | FLAG_COMMAND_LINE | FLAG_MODULES;
        block.set(MEMORY_LOWER, &self.memory);

        let command_line = block.add_string(self.command_line);
        block.set(COMMAND_LINE, &[command_line]);

        let mut list = Vec::new();
        for (place, name) in &self.modules {
            let name = block.add_string(name);
            list.extend([place.start as u32, place.end as u32, name, 0]);
        }
        let list = block.add_words(&list);
        block.set(MODULES, &[self.modules.len() as u32, list]);

        if let Some(sections) = self.sections {
            flags |= FLAG_ELF_SECTIONS;
            block.set(ELF_SECTIONS, &sections);
        }

        let mut map = Vec::new();
        for entry in self.memory_map {
            let halves = |value: u64| [value as u32, (value >> 32) as u32];
            map.push(MAP_ENTRY_SIZE);
            map.extend(halves(entry.addr));
            map.extend(halves(entry.size));
            map.push(entry.r#type);
        }
        let place = block.add_words(&map);
        block.set(MEMORY_MAP, &[map.len() as u32 * 4, place]);

        let loader = block.add_string(LOADER);
        block.set(LOADER_NAME, &[loader]);
        block.set(FLAGS, &[flags | FLAG_MEMORY_MAP | FLAG_LOADER]);
        block.bytes
    }
}

/// Bytes that will be at `base`.
struct Block {
    base: u64,
    bytes: Vec<u8>,
}

impl Block {
    fn set(&mut self, at: usize, words: &[u32]) {
        for (index, word) in words.iter().enumerate() {
            self.bytes[at + index * 4..][..4].copy_from_slice(&word.to_le_bytes());
        }
    }

    /// Appends bytes and gives their address.
    fn add(&mut self, bytes: impl IntoIterator<Item = u8>) -> u32 {
        let length = self.bytes.len().next_multiple_of(ALIGNMENT);
        self.bytes.resize(length, 0);
        self.bytes.extend(bytes);
        (self.base + length as u64) as u32
    }

    fn add_string(&mut self, string: &[u8]) -> u32 {
        self.add(string.iter().copied().chain([0]))
    }

    fn add_words(&mut self, words: &[u32]) -> u32 {
        self.add(words.iter().flat_map(|word| word.to_le_bytes()))
    }
}
