//! The blocks of one vCPU: where they are in the cache, which guest bytes they came from,
//! which jumps lead to them. Called by `engine`; knows nothing of how code is made or run.

use std::collections::HashMap;

use iced_x86::Instruction;
use strata_memory::PAGE_SIZE;

use crate::hash::BuildFast;
use crate::translate::Translated;
use crate::translate::cache::CodeCache;
use crate::translate::lower::{ATTENTION_CHECK, Mode, Numbers, Site};

/// Identifies what a block translates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) physical: u64,
    /// Physical page of the part beyond the first page's end, if there is one.
    pub(crate) second: Option<u64>,
    pub(crate) rip: u64,
    pub(crate) mode: Mode,
}

/// One block of translated code.
pub(crate) struct Block {
    pub(crate) key: Key,
    pub(crate) length: u32,
    /// Offset of its first byte in the cache.
    pub(crate) start: u32,
    pub(crate) entry: u32,
    pub(crate) sites: Box<[Site]>,
    /// Exits chained to this block.
    incoming: Vec<u32>,
    pub(crate) alive: bool,
}

impl Block {
    /// Physical ranges that it covers, within pages.
    pub(crate) fn ranges(&self) -> [(u64, u64); 2] {
        let first = (PAGE_SIZE - self.key.physical % PAGE_SIZE).min(u64::from(self.length));
        [
            (self.key.physical, first),
            (self.key.second.unwrap_or(0), u64::from(self.length) - first),
        ]
    }

    pub(crate) fn overlaps(&self, address: u64, length: u64) -> bool {
        self.ranges()
            .iter()
            .any(|&(start, size)| size > 0 && address < start + size && start < address + length)
    }
}

struct Exit {
    block: u32,
    /// Offset of the jump's displacement in the cache.
    jump: u32,
    stub: u32,
    /// Offset of the displacement of the stub's jump.
    out: u32,
    chained: bool,
    calls: bool,
}

/// log2 of the bytes of a stretch of the cache.
const STRETCH_SHIFT: u32 = 10;

/// All blocks and exits since the cache was last emptied.
#[derive(Default)]
pub(crate) struct Blocks {
    pub(crate) all: Vec<Block>,
    exits: Vec<Exit>,
    systems: Vec<Instruction>,
    by_key: HashMap<Key, u32, BuildFast>,
    by_page: HashMap<u64, Vec<u32>, BuildFast>,
    /// For each stretch of the cache, the first block that begins in it or behind it.
    by_offset: Vec<u32>,
}

impl Blocks {
    pub(crate) fn find(&self, key: &Key) -> Option<u32> {
        self.by_key.get(key).copied()
    }

    /// Numbers that the next block's first exit and first system instruction will have.
    pub(crate) fn next(&self) -> Numbers {
        Numbers {
            first_system: self.systems.len() as u32,
            first_exit: self.exits.len() as u32,
        }
    }

    /// The system instruction with this number.
    pub(crate) fn system(&self, number: u64) -> Option<Instruction> {
        self.systems.get(number as usize).copied()
    }

    /// Adds a block whose code lies at `start` in the cache.
    pub(crate) fn add(&mut self, key: Key, translated: Translated, start: usize) -> u32 {
        let number = self.all.len() as u32;
        let start = start as u32;
        let lowered = translated.lowered;
        self.exits.extend(lowered.exits.iter().map(|e| Exit {
            block: number,
            jump: start + e.jump,
            stub: start + e.stub,
            out: start + e.out,
            chained: false,
            calls: e.calls,
        }));
        self.systems.extend(lowered.systems);
        let block = Block {
            key,
            length: translated.length,
            start,
            entry: start + lowered.entry,
            sites: lowered.sites.into_boxed_slice(),
            incoming: Vec::new(),
            alive: true,
        };
        for (address, size) in block.ranges() {
            if size > 0 {
                self.by_page
                    .entry(address / PAGE_SIZE)
                    .or_default()
                    .push(number);
            }
        }
        let stretches = (start >> STRETCH_SHIFT) as usize + 1;
        if self.by_offset.len() < stretches {
            self.by_offset.resize(stretches, number);
        }
        self.all.push(block);
        self.by_key.insert(key, number);
        number
    }

    /// The block that the host address at `offset` of the cache belongs to, with the last
    /// site at or before it.
    pub(crate) fn locate(&self, offset: u32) -> Option<(u32, Site)> {
        let stretch = (offset >> STRETCH_SHIFT) as usize;
        let first = self.by_offset.get(stretch).copied().unwrap_or(u32::MAX) as usize;
        let end = self.by_offset.get(stretch + 1).copied().unwrap_or(u32::MAX) as usize;
        let within = self
            .all
            .get(first..end.min(self.all.len()))
            .unwrap_or_default();
        let number = (first.min(self.all.len()) + within.partition_point(|b| b.start <= offset))
            .checked_sub(1)?;
        let block = &self.all[number];
        let inside = offset - block.start;
        let site = block
            .sites
            .partition_point(|s| s.host <= inside)
            .checked_sub(1)?;
        Some((number as u32, block.sites[site]))
    }

    /// Makes exit `number` jump straight to `target`. If the target's second page may be
    /// mapped anew it goes through the jump cache, whose thunk is at offset `unchained`.
    pub(crate) fn chain(
        &mut self,
        cache: &mut CodeCache,
        number: u32,
        target: u32,
        unchained: Option<u32>,
    ) {
        let Some(exit) = self.exits.get_mut(number as usize) else {
            return;
        };
        let from = self.all[exit.block as usize].key.rip;
        let to = &mut self.all[target as usize];
        if !to.alive || exit.chained {
            return;
        }
        if to.key.second.is_some() {
            if let Some(thunk) = unchained {
                let distance = thunk.wrapping_sub(exit.out + 4);
                cache.patch(exit.out as usize, &distance.to_le_bytes());
            }
            return;
        }
        // every loop has an edge that does not lead upwards, or is a recursion
        let upwards = to.key.rip > from && !exit.calls;
        let entry = to.entry + if upwards { ATTENTION_CHECK as u32 } else { 0 };
        to.incoming.push(number);
        exit.chained = true;
        let distance = entry.wrapping_sub(exit.jump + 4);
        cache.patch(exit.jump as usize, &distance.to_le_bytes());
    }

    /// Throws away the blocks that cover any of `length` bytes at physical `address`.
    /// Returns what stands for them in jump caches.
    pub(crate) fn invalidate(
        &mut self,
        cache: &mut CodeCache,
        address: u64,
        length: u64,
    ) -> Vec<u64> {
        let page = address / PAGE_SIZE;
        let Some(list) = self.by_page.get(&page) else {
            return Vec::new();
        };
        let hit: Vec<u32> = list
            .iter()
            .copied()
            .filter(|&n| self.all[n as usize].overlaps(address, length))
            .collect();
        for &number in &hit {
            self.kill(cache, number);
        }
        hit.iter()
            .map(|&n| &self.all[n as usize].key)
            .map(|key| key.mode.jump_key(key.rip))
            .collect()
    }

    /// Bytes that this holds, about.
    pub(crate) fn bytes(&self) -> usize {
        fn map<K, V>(map: &HashMap<K, V, BuildFast>) -> usize {
            map.capacity() * (size_of::<(K, V)>() + 1)
        }
        let lists = self.all.iter().map(|block| {
            block.sites.len() * size_of::<Site>() + block.incoming.capacity() * size_of::<u32>()
        });
        let pages = self
            .by_page
            .values()
            .map(|list| list.capacity() * size_of::<u32>());
        self.all.capacity() * size_of::<Block>()
            + self.exits.capacity() * size_of::<Exit>()
            + self.systems.capacity() * size_of::<Instruction>()
            + self.by_offset.capacity() * size_of::<u32>()
            + map(&self.by_key)
            + map(&self.by_page)
            + lists.chain(pages).sum::<usize>()
    }

    /// Numbers of all pages that blocks had bytes in.
    pub(crate) fn pages(&self) -> impl Iterator<Item = u64> {
        self.by_page.keys().copied()
    }

    /// Whether any live block has bytes in the page.
    pub(crate) fn page_in_use(&self, address: u64) -> bool {
        self.by_page
            .get(&(address / PAGE_SIZE))
            .is_some_and(|l| !l.is_empty())
    }

    fn kill(&mut self, cache: &mut CodeCache, number: u32) {
        let block = &mut self.all[number as usize];
        block.alive = false;
        // whoever still leads here meets a jump to the stub before the entry
        let back = block.start as i64 - (i64::from(block.entry) + 2);
        cache.patch(block.entry as usize, &[0xeb, back as u8]);
        let incoming = std::mem::take(&mut block.incoming);
        let key = block.key;
        let ranges = block.ranges();
        for exit in incoming {
            let exit = &mut self.exits[exit as usize];
            exit.chained = false;
            let distance = exit.stub.wrapping_sub(exit.jump + 4);
            cache.patch(exit.jump as usize, &distance.to_le_bytes());
        }
        if self.by_key.get(&key) == Some(&number) {
            self.by_key.remove(&key);
        }
        for (address, size) in ranges {
            if size > 0
                && let Some(list) = self.by_page.get_mut(&(address / PAGE_SIZE))
            {
                list.retain(|&n| n != number);
            }
        }
    }

    /// Whether the block that exit `number` leaves is alive.
    pub(crate) fn exit_alive(&self, number: u32) -> bool {
        self.exits
            .get(number as usize)
            .is_some_and(|e| self.all[e.block as usize].alive)
    }

    /// Forgets all blocks; the cache keeps its thunks.
    pub(crate) fn clear(&mut self, cache: &mut CodeCache, thunks_end: usize) {
        *self = Self::default();
        cache.truncate(thunks_end);
    }
}
