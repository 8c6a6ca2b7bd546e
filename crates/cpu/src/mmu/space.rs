//! One TLB context: soft TLBs and jump caches, and what empties them. Translated code reads
//! their lines itself; `mmu` fills the TLBs, `engine` the jump caches.

use std::collections::HashSet;

use strata_memory::PAGE_SIZE;

use crate::hash::BuildFast;

/// Entries of one direct-mapped TLB.
pub(crate) const TLB_ENTRIES: usize = 4096;
/// Entries of one jump cache, at most; see [`jump_entries`].
pub(crate) const JUMP_ENTRIES: usize = 16384;
/// Jump caches of an address space; see [`jump_table`].
pub(crate) const JUMP_TABLES: usize = 8;
/// How many entries of a jump cache are used: the rest of it is never touched. The kernel's code
/// is in every address space; code between STAC and CLAC is short, and blocks that check every
/// access by itself are few.
pub(crate) const fn jump_entries(table: usize) -> usize {
    if table == jump_table(Rights::User, false) {
        JUMP_ENTRIES / 2
    } else if table >= jump_table(Rights::Open, false) {
        JUMP_ENTRIES / 16
    } else {
        JUMP_ENTRIES
    }
}

/// What a linear address is multiplied with to find its line in a jump cache.
pub(crate) const JUMP_HASH: u32 = 0x5bd1_e995;
/// An address whose line is another's is looked for in the line with this bit changed.
pub(crate) const JUMP_NEIGHBOUR: usize = 1;
/// How far the product is then shifted right.
pub(crate) const JUMP_SHIFT: u8 = 18;

/// One line of a soft TLB. The tag is a page's linear address, or [`invalid_tag`].
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct TlbEntry {
    pub(crate) tag: u64,
    /// Host address of the page less its linear address.
    pub(crate) delta: u64,
}

/// Beside a line: log2 of the page size that the guest mapped, and [`GLOBAL`].
pub(super) type LineInfo = u16;

/// The page is global.
pub(super) const GLOBAL: LineInfo = 1 << 8;

/// Whose rights to pages an access has. The number is that of its TLBs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rights {
    /// The supervisor's, less ring 3's pages where SMAP protects them.
    Supervisor = 0,
    /// Ring 3's.
    User = 1,
    /// The supervisor's under SMAP, with RFLAGS.AC set: ring 3's pages too.
    Open = 2,
}

impl Rights {
    /// All of them.
    pub(crate) const ALL: [Self; 3] = [Self::Supervisor, Self::User, Self::Open];

    pub(super) fn is_user(self) -> bool {
        self == Self::User
    }
}

/// The TLBs of an address space.
pub(crate) const TLBS: usize = 6;
/// Kinds of windows: for loads and for stores, of the supervisor and of ring 3.
pub(crate) const WINDOW_KINDS: usize = 4;

/// Which of a space's TLBs serves an access.
pub(crate) const fn tlb_number(rights: Rights, store: bool) -> usize {
    (rights as usize) << 1 | store as usize
}

/// Which windows serve an access, if any.
pub(crate) const fn window_kind(rights: Rights, store: bool) -> Option<usize> {
    match rights {
        Rights::Open => None,
        _ => Some(tlb_number(rights, store)),
    }
}

/// Which of a space's jump caches leads to blocks with these rights, of 64-bit code or not.
pub(crate) const fn jump_table(rights: Rights, legacy: bool) -> usize {
    match (rights, legacy) {
        (Rights::Open, false) => 4,
        (Rights::User, _) => (legacy as usize) << 1 | 1,
        _ => (legacy as usize) << 1,
    }
}

/// As [`jump_table`], for blocks of 64-bit code that check every access by itself.
pub(crate) const fn apart_table(rights: Rights) -> usize {
    5 + rights as usize
}

/// A tag that no address with the given index can match.
pub(super) fn invalid_tag(index: usize) -> u64 {
    if index == 0 { PAGE_SIZE } else { 0 }
}

/// One line of a jump cache: where the block for a linear address is.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct JumpEntry {
    pub(crate) pc: u64,
    pub(crate) code: u64,
}

/// Which lines of a table are in use, so that a flush costs what was filled.
#[derive(Default)]
pub(super) struct Filled {
    /// Lines that only an explicit or global flush empties.
    global: Vec<u16>,
    local: Vec<u16>,
}

impl Filled {
    pub(super) fn note(&mut self, index: usize, global: bool) {
        let list = if global {
            &mut self.global
        } else {
            &mut self.local
        };
        list.push(index as u16);
    }

    /// All lines that may be in use.
    pub(super) fn lines(&self) -> impl Iterator<Item = usize> {
        self.global
            .iter()
            .chain(&self.local)
            .map(|&i| usize::from(i))
    }

    /// No line is in use.
    pub(super) fn is_empty(&self) -> bool {
        self.global.is_empty() && self.local.is_empty()
    }

    /// Lines are listed again when their pages change between global and local; this is
    /// when a flush is cheaper than longer lists.
    pub(super) fn crowded(&self) -> bool {
        self.global.len() + self.local.len() > 4 * JUMP_ENTRIES
    }
}

/// The TLBs and jump caches of one address space, each once for the supervisor and once
/// for ring 3; the TLBs apart for loads and stores, so that a copy between two places at an
/// unlucky distance does not fight over lines.
#[repr(C, align(4096))]
pub(crate) struct AddressSpace {
    pub(crate) tlb: [[TlbEntry; TLB_ENTRIES]; TLBS],
    pub(crate) jumps: [[JumpEntry; JUMP_ENTRIES]; JUMP_TABLES],
    pub(super) info: [[LineInfo; TLB_ENTRIES]; TLBS],
    pub(super) tlb_filled: [Filled; TLBS],
    pub(super) jumps_filled: [Filled; JUMP_TABLES],
    pub(super) pcid: Option<u64>,
    pub(super) last_used: u64,
    /// Large pages that have entries, as `linear >> shift << 6 | shift`: local, global.
    pub(super) large: [PageSet; 2],
    /// Pages that have jump-cache entries.
    pub(super) jump_pages: PageSet,
}

pub(super) type PageSet = HashSet<u64, BuildFast>;

pub(super) fn large_key(linear: u64, shift: u32) -> u64 {
    linear >> shift << 6 | u64::from(shift)
}

/// The index of a linear address in a jump cache.
pub(crate) fn jump_index(table: usize, pc: u64) -> usize {
    (pc.wrapping_mul(JUMP_HASH.into()) >> JUMP_SHIFT) as usize & (jump_entries(table) - 1)
}

/// The index of a linear address in a TLB. It is folded: hot pages of the kernel (stacks,
/// per-CPU data) and arrays that a program walks through side by side often lie at distances
/// whose low bits are 0.
pub(super) fn tlb_index(linear: u64) -> usize {
    let page = linear / PAGE_SIZE;
    (page ^ page >> TLB_ENTRIES.trailing_zeros()) as usize % TLB_ENTRIES
}

fn invalid_jump(index: usize) -> JumpEntry {
    // address 0 may be in lines 0 and 1, whose empty entries need a pc that is in neither
    JumpEntry {
        pc: u64::from(index <= JUMP_NEIGHBOUR),
        code: 0,
    }
}

impl TlbEntry {
    /// Host address of the page.
    pub(super) fn host(&self) -> u64 {
        self.tag.wrapping_add(self.delta)
    }

    pub(super) fn invalid(index: usize) -> Self {
        Self {
            tag: invalid_tag(index),
            delta: 0,
        }
    }
}

impl AddressSpace {
    /// Makes zeroed memory an address space that holds nothing. What is never used of it stays
    /// untouched.
    ///
    /// # Safety
    /// `at` is valid and aligned for one, all zeroes, and nobody else's.
    pub(super) unsafe fn init(at: *mut Self) {
        // SAFETY: the tables are integers, for which zeroes are a value; every other field is
        // written before there is a reference to it.
        let space = unsafe {
            (&raw mut (*at).tlb_filled).write(Default::default());
            (&raw mut (*at).jumps_filled).write(Default::default());
            (&raw mut (*at).pcid).write(None);
            (&raw mut (*at).large).write(Default::default());
            (&raw mut (*at).jump_pages).write(PageSet::default());
            &mut *at
        };
        for table in &mut space.tlb {
            table[0] = TlbEntry::invalid(0);
        }
        for table in &mut space.jumps {
            table[0] = invalid_jump(0);
            table[JUMP_NEIGHBOUR] = invalid_jump(JUMP_NEIGHBOUR);
        }
    }

    pub(super) fn flush_tlb(&mut self, keep_global: bool) {
        for (table, filled) in self.tlb.iter_mut().zip(&mut self.tlb_filled) {
            let global = if keep_global {
                Vec::new()
            } else {
                std::mem::take(&mut filled.global)
            };
            for index in global.into_iter().chain(filled.local.drain(..)) {
                table[usize::from(index)] = TlbEntry::invalid(usize::from(index));
            }
        }
        self.large[0].clear();
        if !keep_global {
            self.large[1].clear();
        }
    }

    pub(super) fn flush_jumps_but(&mut self, keep_global: bool) {
        for (table, filled) in self.jumps.iter_mut().zip(&mut self.jumps_filled) {
            let global = if keep_global {
                Vec::new()
            } else {
                std::mem::take(&mut filled.global)
            };
            for index in global.into_iter().chain(filled.local.drain(..)) {
                table[usize::from(index)] = invalid_jump(usize::from(index));
            }
        }
        if !keep_global {
            self.jump_pages.clear();
        }
    }

    pub(crate) fn flush_jumps(&mut self) {
        self.flush_jumps_but(false);
    }

    pub(super) fn flush(&mut self, keep_global: bool) {
        self.flush_tlb(keep_global);
        self.flush_jumps_but(keep_global);
    }

    /// Drops a page. Returns true when it was part of a large one, which went with it.
    pub(super) fn flush_page(&mut self, linear: u64) -> bool {
        let page = linear & !(PAGE_SIZE - 1);
        let many = [21, 22, 30]
            .map(|shift| large_key(linear, shift))
            .iter()
            .any(|key| {
                self.large
                    .iter()
                    .any(|set| !set.is_empty() && set.contains(key))
            });
        let index = tlb_index(linear);
        for (table, filled) in self.tlb.iter_mut().zip(&self.tlb_filled) {
            if !filled.is_empty() && table[index].tag == page {
                table[index].tag = invalid_tag(index);
            }
        }
        if many {
            self.flush_large(linear);
        }
        if many || self.jump_pages.contains(&(linear / PAGE_SIZE)) {
            self.flush_jumps();
        }
        many
    }

    pub(super) fn flush_large(&mut self, linear: u64) {
        let tables = self.tlb.iter_mut().zip(&self.info);
        for ((table, info), filled) in tables.zip(&self.tlb_filled) {
            for index in filled.lines() {
                let (entry, shift) = (&mut table[index], info[index] & !GLOBAL);
                if shift > 12 && entry.tag >> shift == linear >> shift {
                    entry.tag = invalid_tag(index);
                }
            }
        }
    }

    /// Where the block for `pc` is, if the jump cache knows.
    pub(crate) fn jump(&self, table: usize, pc: u64) -> Option<u64> {
        let index = jump_index(table, pc);
        [index, index ^ JUMP_NEIGHBOUR]
            .map(|index| self.jumps[table][index])
            .into_iter()
            .find(|entry| entry.pc == pc && entry.code != 0)
            .map(|entry| entry.code)
    }

    /// Drops the lines of stores that lead to the host's page at `host`.
    pub(super) fn revoke_stores(&mut self, host: u64) {
        for table in Rights::ALL.map(|rights| tlb_number(rights, true)) {
            for index in self.tlb_filled[table].lines() {
                let entry = &mut self.tlb[table][index];
                if entry.host() == host {
                    entry.tag = invalid_tag(index);
                }
            }
        }
    }

    pub(super) fn forget_jump(&mut self, pc: u64) {
        let tables = self.jumps.iter_mut().zip(&self.jumps_filled);
        for (number, (table, filled)) in tables.enumerate() {
            let index = jump_index(number, pc);
            for index in [index, index ^ JUMP_NEIGHBOUR] {
                if !filled.is_empty() && table[index].pc == pc {
                    table[index] = invalid_jump(index);
                }
            }
        }
    }

    /// Enters into a jump cache where the block for `pc` is. What was in its line moves to
    /// the neighbour. `first` and `last` are the
    /// linear addresses of its first and last byte, `global` tells that its page is.
    pub(crate) fn insert_jump(
        &mut self,
        table: usize,
        entry: JumpEntry,
        (first, last): (u64, u64),
        global: bool,
    ) {
        if self.jumps_filled[table].crowded() {
            self.flush_jumps();
        }
        self.jump_pages.insert(first / PAGE_SIZE);
        self.jump_pages.insert(last / PAGE_SIZE);
        let index = jump_index(table, entry.pc);
        let old = self.jumps[table][index];
        if old.code != 0 && old.pc != entry.pc {
            let neighbour = index ^ JUMP_NEIGHBOUR;
            self.jumps_filled[table].note(neighbour, false);
            self.jumps[table][neighbour] = old;
        }
        // a line that was global may now be local: it is then on both lists
        self.jumps_filled[table].note(index, global);
        self.jumps[table][index] = entry;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_that_lie_a_power_of_two_apart_share_no_line() {
        let size = TLB_ENTRIES as u64 * PAGE_SIZE;
        for distance in [size, 2 * size, 4 * size, 64 * size] {
            for page in 0..8 {
                let first = 0x7f00_0000_0000 + page * PAGE_SIZE;
                assert_ne!(tlb_index(first), tlb_index(first + distance));
            }
        }
    }
}
