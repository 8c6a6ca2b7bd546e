//! The blocks of one vCPU: where they are in the cache, which guest bytes they came from,
//! which jumps lead to them. Called by `engine`; knows nothing of how code is made or run.
//!
//! A booted guest has tens of thousands, so what is kept of one is small: lists go through the
//! entries themselves, modes and sites are kept apart.

mod sites;

use std::collections::HashMap;
use std::hash::BuildHasher;

use iced_x86::Instruction;
use strata_memory::PAGE_SIZE;

use crate::hash::BuildFast;
use crate::translate::Translated;
use crate::translate::cache::CodeCache;
use crate::translate::lower::{Mode, Numbers, Site, check_length};

/// Identifies what a block translates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) physical: u64,
    /// Physical page of the part beyond the first page's end, if there is one.
    pub(crate) second: Option<u64>,
    pub(crate) rip: u64,
    pub(crate) mode: Mode,
}

/// No block, no exit: the end of a list.
const NONE: u32 = u32::MAX;

/// One block of translated code.
struct Block {
    physical: u64,
    rip: u64,
    /// Offset of its first byte in the cache.
    start: u32,
    /// Offset of its packed sites, which end where the next block's begin.
    sites: u32,
    /// The first of the exits that are chained to it.
    incoming: u32,
    /// The next block in its row of the index.
    next: u32,
    /// Number of its mode.
    mode: u32,
    length: u16,
    /// Distance of the entry from the first byte.
    entry: u8,
    /// See [`is`].
    flags: u8,
}

/// What a block is.
mod is {
    pub(super) const ALIVE: u8 = 1;
    pub(super) const DRAFT: u8 = 1 << 1;
    /// Its last instruction lies in two pages.
    pub(super) const CROSSING: u8 = 1 << 2;
}

impl Block {
    fn is(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

struct Exit {
    /// Offset of the jump's displacement in the cache.
    jump: u32,
    /// Offset of the displacement of its stub's call.
    out: u32,
    /// The next exit that is chained to the same block.
    next: u32,
    /// Distance from the stub's start to `out`.
    stub: u8,
    chained: bool,
    calls: bool,
}

impl Exit {
    /// The offset of the stub.
    fn stub(&self) -> u32 {
        self.out - u32::from(self.stub)
    }
}

/// log2 of the bytes of a stretch of the cache.
const STRETCH_SHIFT: u32 = 10;

/// Rows of the index when there are few blocks.
const ROWS: usize = 1024;

/// Modes that are looked for one by one, before the map is.
const FEW_MODES: usize = 4;

/// All blocks and exits since the cache was last emptied.
#[derive(Default)]
pub(crate) struct Blocks {
    /// Offset in the cache of the thunk that drafts leave by.
    draft_out: u32,
    all: Vec<Block>,
    sites: Vec<u8>,
    exits: Vec<Exit>,
    systems: Vec<Instruction>,
    /// The first block of each row. Those that are alive are in the row of their key.
    index: Vec<u32>,
    /// Second pages of blocks that have one.
    seconds: HashMap<u32, u64, BuildFast>,
    modes: Vec<Mode>,
    mode_numbers: HashMap<Mode, u32, BuildFast>,
    by_page: HashMap<u64, Vec<u32>, BuildFast>,
    /// For each stretch of the cache, the first block that begins in it or behind it.
    by_offset: Vec<u32>,
}

impl Blocks {
    /// None yet. The way out of drafts is at offset `draft_out` of the cache.
    pub(crate) fn new(draft_out: u32) -> Self {
        Self {
            draft_out,
            index: vec![NONE; ROWS],
            ..Self::default()
        }
    }

    /// The live block with this key.
    pub(crate) fn find(&self, key: &Key) -> Option<u32> {
        let mode = self.mode_number(&key.mode)?;
        let mut number = self.index[self.row(key.physical, key.rip)];
        while let Some(block) = self.all.get(number as usize) {
            if block.physical == key.physical
                && block.rip == key.rip
                && block.mode == mode
                && self.second(number) == key.second
            {
                return Some(number);
            }
            number = block.next;
        }
        None
    }

    fn row(&self, physical: u64, rip: u64) -> usize {
        let hash = BuildFast::default().hash_one(physical ^ rip.rotate_left(32));
        hash as usize & (self.index.len() - 1)
    }

    fn mode_number(&self, mode: &Mode) -> Option<u32> {
        let few = self.modes.iter().take(FEW_MODES).position(|m| m == mode);
        few.map(|number| number as u32)
            .or_else(|| self.mode_numbers.get(mode).copied())
    }

    fn second(&self, number: u32) -> Option<u64> {
        if self.all[number as usize].is(is::CROSSING) {
            self.seconds.get(&number).copied()
        } else {
            None
        }
    }

    /// The key of a block.
    pub(crate) fn key(&self, number: u32) -> Key {
        let block = &self.all[number as usize];
        Key {
            physical: block.physical,
            second: self.second(number),
            rip: block.rip,
            mode: self.modes[block.mode as usize],
        }
    }

    /// Guest bytes that a block covers.
    pub(crate) fn length(&self, number: u32) -> u64 {
        self.all[number as usize].length.into()
    }

    /// Offset in the cache of a block's entry.
    pub(crate) fn entry(&self, number: u32) -> u32 {
        let block = &self.all[number as usize];
        block.start + u32::from(block.entry)
    }

    /// Offset in the cache of what follows the look at the attention word at a block's entry.
    pub(crate) fn behind_check(&self, number: u32) -> u32 {
        self.entry(number) + check_length(self.all[number as usize].is(is::DRAFT))
    }

    /// Whether a block was not thrown away.
    pub(crate) fn is_alive(&self, number: u32) -> bool {
        self.all[number as usize].is(is::ALIVE)
    }

    /// Physical ranges that a block covers, within pages.
    pub(crate) fn ranges(&self, number: u32) -> [(u64, u64); 2] {
        let block = &self.all[number as usize];
        let length = u64::from(block.length);
        let first = (PAGE_SIZE - block.physical % PAGE_SIZE).min(length);
        [
            (block.physical, first),
            (self.second(number).unwrap_or(0), length - first),
        ]
    }

    /// Whether a block covers any of `length` bytes at physical `address`.
    pub(crate) fn overlaps(&self, number: u32, address: u64, length: u64) -> bool {
        self.ranges(number)
            .iter()
            .any(|&(start, size)| size > 0 && address < start + size && start < address + length)
    }

    /// Numbers that the next block's parts will have.
    pub(crate) fn next(&self) -> Numbers {
        Numbers {
            first_system: self.systems.len() as u32,
        }
    }

    /// The system instruction with this number.
    pub(crate) fn system(&self, number: u64) -> Option<Instruction> {
        self.systems.get(number as usize).copied()
    }

    /// Adds a block whose code lies at `start` in the cache.
    pub(crate) fn add(
        &mut self,
        key: Key,
        draft: bool,
        translated: Translated,
        start: usize,
    ) -> u32 {
        let number = self.all.len() as u32;
        let start = start as u32;
        let lowered = translated.lowered;
        self.exits.extend(lowered.exits.iter().map(|e| Exit {
            jump: start + e.jump,
            out: start + e.out,
            next: NONE,
            stub: (e.out - e.stub) as u8,
            chained: false,
            calls: e.calls,
        }));
        self.systems.extend(lowered.systems);
        if let Some(second) = key.second {
            self.seconds.insert(number, second);
        }
        let block = Block {
            physical: key.physical,
            rip: key.rip,
            start,
            sites: self.sites.len() as u32,
            incoming: NONE,
            next: NONE,
            mode: self.intern(key.mode),
            length: translated.length as u16,
            entry: lowered.entry as u8,
            flags: is::ALIVE
                | if draft { is::DRAFT } else { 0 }
                | if key.second.is_some() {
                    is::CROSSING
                } else {
                    0
                },
        };
        sites::pack(&lowered.sites, &mut self.sites);
        let stretches = (start >> STRETCH_SHIFT) as usize + 1;
        if self.by_offset.len() < stretches {
            self.by_offset.resize(stretches, number);
        }
        self.all.push(block);
        self.enter(number);
        for (address, size) in self.ranges(number) {
            if size > 0 {
                self.by_page
                    .entry(address / PAGE_SIZE)
                    .or_default()
                    .push(number);
            }
        }
        number
    }

    /// The number of a mode, a new one if need be.
    fn intern(&mut self, mode: Mode) -> u32 {
        self.mode_number(&mode).unwrap_or_else(|| {
            let number = self.modes.len() as u32;
            self.modes.push(mode);
            self.mode_numbers.insert(mode, number);
            number
        })
    }

    /// Puts the newest block into its row; makes more rows where they have become long.
    fn enter(&mut self, number: u32) {
        let rows = self.index.len();
        if self.all.len() <= 2 * rows {
            self.put(number);
            return;
        }
        self.index = vec![NONE; 2 * rows];
        for number in 0..self.all.len() as u32 {
            if self.is_alive(number) {
                self.put(number);
            }
        }
    }

    fn put(&mut self, number: u32) {
        let block = &self.all[number as usize];
        let row = self.row(block.physical, block.rip);
        self.all[number as usize].next = std::mem::replace(&mut self.index[row], number);
    }

    /// Takes a block out of its row.
    fn take(&mut self, number: u32) {
        let block = &self.all[number as usize];
        let (row, next) = (self.row(block.physical, block.rip), block.next);
        let mut at = self.index[row];
        if at == number {
            self.index[row] = next;
            return;
        }
        while let Some(block) = self.all.get_mut(at as usize) {
            if block.next == number {
                block.next = next;
                return;
            }
            at = block.next;
        }
    }

    /// The block that the host address at `offset` of the cache belongs to.
    pub(crate) fn number_at(&self, offset: u32) -> Option<u32> {
        let stretch = (offset >> STRETCH_SHIFT) as usize;
        let first = self.by_offset.get(stretch).copied().unwrap_or(u32::MAX) as usize;
        let end = self.by_offset.get(stretch + 1).copied().unwrap_or(u32::MAX) as usize;
        let within = self
            .all
            .get(first..end.min(self.all.len()))
            .unwrap_or_default();
        let number = (first.min(self.all.len()) + within.partition_point(|b| b.start <= offset))
            .checked_sub(1)?;
        Some(number as u32)
    }

    /// As `number_at`, with the last site at or before it.
    pub(crate) fn locate(&self, offset: u32) -> Option<(u32, Site)> {
        let number = self.number_at(offset)?;
        let block = &self.all[number as usize];
        let next = self.all.get(number as usize + 1);
        let end = next.map_or(self.sites.len(), |next| next.sites as usize);
        let packed = &self.sites[block.sites as usize..end];
        Some((number, sites::find(packed, offset - block.start)?))
    }

    /// The exit whose stub ends at `offset` of the cache.
    pub(crate) fn exit_at(&self, offset: u32) -> Option<u32> {
        let number = self.exits.partition_point(|exit| exit.out + 4 < offset);
        let exit = self.exits.get(number)?;
        (exit.out + 4 == offset).then_some(number as u32)
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
        let from = self.block_of(number).map(|b| self.all[b as usize].rip);
        let Some((exit, from)) = self.exits.get_mut(number as usize).zip(from) else {
            return;
        };
        let to = &mut self.all[target as usize];
        if !to.is(is::ALIVE) || exit.chained {
            return;
        }
        if to.is(is::CROSSING) {
            if let Some(thunk) = unchained {
                let distance = thunk.wrapping_sub(exit.out + 4);
                // a jump instead of the call
                cache.patch(exit.out as usize - 1, &[0xe9]);
                cache.patch(exit.out as usize, &distance.to_le_bytes());
            }
            return;
        }
        // every loop has an edge that does not lead upwards, or is a recursion; drafts are
        // counted where that is looked at
        let upwards = to.rip > from && !exit.calls && !to.is(is::DRAFT);
        exit.next = std::mem::replace(&mut to.incoming, number);
        exit.chained = true;
        let jump = exit.jump;
        let entry = if upwards {
            self.behind_check(target)
        } else {
            self.entry(target)
        };
        let distance = entry.wrapping_sub(jump + 4);
        cache.patch(jump as usize, &distance.to_le_bytes());
    }

    /// The block that an exit leaves.
    fn block_of(&self, exit: u32) -> Option<u32> {
        self.number_at(self.exits.get(exit as usize)?.jump)
    }

    /// Throws away the blocks that cover any of `length` bytes at physical `address`.
    /// Returns what stands for them in jump caches.
    pub(crate) fn invalidate(
        &mut self,
        cache: &mut CodeCache,
        address: u64,
        length: u64,
    ) -> Vec<u64> {
        let Some(list) = self.by_page.get(&(address / PAGE_SIZE)) else {
            return Vec::new();
        };
        let hit: Vec<u32> = list
            .iter()
            .copied()
            .filter(|&n| self.overlaps(n, address, length))
            .collect();
        for &number in &hit {
            self.kill(cache, number);
        }
        hit.iter()
            .map(|&number| self.key(number))
            .map(|key| key.mode.jump_key(key.rip))
            .collect()
    }

    /// Bytes that this holds, about.
    pub(crate) fn bytes(&self) -> usize {
        fn list<T>(list: &[T]) -> usize {
            size_of_val(list)
        }
        fn map<K, V>(map: &HashMap<K, V, BuildFast>) -> usize {
            map.capacity() * (size_of::<(K, V)>() + 1)
        }
        let pages = self.by_page.values();
        list(&self.all)
            + list(&self.sites)
            + list(&self.exits)
            + list(&self.systems)
            + list(&self.index)
            + list(&self.modes)
            + list(&self.by_offset)
            + map(&self.seconds)
            + map(&self.mode_numbers)
            + map(&self.by_page)
            + pages
                .map(|l| l.capacity() * size_of::<u32>())
                .sum::<usize>()
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

    /// Throws a block away.
    pub(crate) fn kill(&mut self, cache: &mut CodeCache, number: u32) {
        self.retire(cache, number);
        self.unchain(cache, number);
    }

    /// Has the exits that are chained to a block go to their stubs again.
    pub(crate) fn unchain(&mut self, cache: &mut CodeCache, number: u32) {
        let block = &mut self.all[number as usize];
        let mut incoming = std::mem::replace(&mut block.incoming, NONE);
        while let Some(exit) = self.exits.get_mut(incoming as usize) {
            exit.chained = false;
            let distance = exit.stub().wrapping_sub(exit.jump + 4);
            cache.patch(exit.jump as usize, &distance.to_le_bytes());
            incoming = exit.next;
        }
    }

    /// Has the exits that are chained to `old`, which was retired, go to `new`.
    pub(crate) fn adopt(&mut self, cache: &mut CodeCache, old: u32, new: u32) {
        let mut incoming = std::mem::replace(&mut self.all[old as usize].incoming, NONE);
        while let Some(exit) = self.exits.get_mut(incoming as usize) {
            exit.chained = false;
            let next = exit.next;
            self.chain(cache, incoming, new, None);
            incoming = next;
        }
    }

    /// Throws a block away but for the exits that are chained to it.
    pub(crate) fn retire(&mut self, cache: &mut CodeCache, number: u32) {
        self.take(number);
        let entry = self.entry(number);
        let block = &mut self.all[number as usize];
        block.flags &= !is::ALIVE;
        if block.is(is::DRAFT) {
            // whoever still leads here calls the way out
            let distance = self.draft_out.wrapping_sub(entry + 5);
            cache.patch(entry as usize + 1, &distance.to_le_bytes());
        } else {
            // or meets a jump to the stub before the entry
            let back = -(i64::from(block.entry) + 2);
            cache.patch(entry as usize, &[0xeb, back as u8]);
        }
        for (address, size) in self.ranges(number) {
            if size > 0
                && let Some(list) = self.by_page.get_mut(&(address / PAGE_SIZE))
            {
                list.retain(|&n| n != number);
            }
        }
    }

    /// Whether the block that exit `number` leaves is alive.
    pub(crate) fn exit_alive(&self, number: u32) -> bool {
        self.block_of(number)
            .is_some_and(|block| self.is_alive(block))
    }

    /// Forgets all blocks; the cache keeps its thunks.
    pub(crate) fn clear(&mut self, cache: &mut CodeCache, thunks_end: usize) {
        *self = Self::new(self.draft_out);
        cache.truncate(thunks_end);
    }
}
