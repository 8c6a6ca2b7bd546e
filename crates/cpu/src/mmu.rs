//! Paging: the walk (Intel SDM vol. 3A §4.5), the soft TLBs and linear memory access for
//! Rust code. Translated code reads the same TLB entries inline.
//!
//! An [`AddressSpace`] is one TLB context: one per PCID, swapped by pointer on MOV CR3. An
//! entry holds two tags, one for loads and one for stores, so that a store to a page that
//! is clean, read-only or holds translated code leaves the fast path.

mod legacy;
mod store;
#[cfg(test)]
mod tests_jumps;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use strata_memory::{GuestMemory, PAGE_SIZE};

use crate::bus::{Bus, Waker};
use crate::crew::{Crew, Seat};
use crate::exception::Exception;
use crate::hash::BuildFast;
use crate::state::{State, StateRef, Window, cr0, cr4, efer, rflags};

/// Physical address width that CPUID reports and the walk enforces, in bits.
pub(crate) const PHYSICAL_BITS: u32 = 46;
/// Entries of one direct-mapped TLB.
pub(crate) const TLB_ENTRIES: usize = 4096;
/// Entries of one jump cache.
pub(crate) const JUMP_ENTRIES: usize = 16384;
/// Jump caches of an address space; see [`jump_table`].
pub(crate) const JUMP_TABLES: usize = 8;
/// What a linear address is multiplied with to find its line in a jump cache.
pub(crate) const JUMP_HASH: u32 = 0x5bd1_e995;
/// An address whose line is another's is looked for in the line with this bit changed.
pub(crate) const JUMP_NEIGHBOUR: usize = 1;
/// How far the product is then shifted right.
pub(crate) const JUMP_SHIFT: u8 = 18;
/// Address spaces kept; Linux uses six PCIDs and two for flushes.
const SPACES: usize = 10;

const PTE_P: u64 = 1;
const PTE_W: u64 = 1 << 1;
const PTE_U: u64 = 1 << 2;
const PTE_A: u64 = 1 << 5;
const PTE_D: u64 = 1 << 6;
const PTE_PS: u64 = 1 << 7;
const PTE_G: u64 = 1 << 8;
const PTE_NX: u64 = 1 << 63;
const PTE_ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Page-fault error code bits (Intel SDM vol. 3A §4.7).
mod pf {
    pub(super) const P: u32 = 1;
    pub(super) const W: u32 = 1 << 1;
    pub(super) const U: u32 = 1 << 2;
    pub(super) const RSVD: u32 = 1 << 3;
    pub(super) const I: u32 = 1 << 4;
}

/// What is done with a linear address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Fetch,
}

/// Whose right counts for an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Privilege {
    /// The current privilege level's: explicit accesses.
    Current,
    /// The supervisor's: descriptor tables, TSS, interrupt stacks.
    Supervisor,
}

/// One line of a soft TLB. The tag is a page's linear address, or [`invalid_tag`].
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct TlbEntry {
    pub(crate) tag: u64,
    /// Host address of the page less its linear address.
    pub(crate) delta: u64,
}

/// Which windows to empty.
#[derive(Clone, Copy)]
enum Forget {
    All,
    /// Those of the page at a linear address.
    Page(u64),
    /// Those for stores to a page at a host address.
    Stores(u64),
}

/// Beside a line: log2 of the page size that the guest mapped, and [`GLOBAL`].
type LineInfo = u16;

/// The page is global.
const GLOBAL: LineInfo = 1 << 8;

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

    fn is_user(self) -> bool {
        self == Self::User
    }
}

/// The TLBs of an address space, and the kinds of windows.
pub(crate) const TLBS: usize = 6;

/// Which of a space's TLBs serves an access.
pub(crate) const fn tlb_number(rights: Rights, store: bool) -> usize {
    (rights as usize) << 1 | store as usize
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
fn invalid_tag(index: usize) -> u64 {
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
struct Filled {
    /// Lines that only an explicit or global flush empties.
    global: Vec<u16>,
    local: Vec<u16>,
}

impl Filled {
    fn note(&mut self, index: usize, global: bool) {
        let list = if global {
            &mut self.global
        } else {
            &mut self.local
        };
        list.push(index as u16);
    }

    /// Lines are listed again when their pages change between global and local; this is
    /// when a flush is cheaper than longer lists.
    fn crowded(&self) -> bool {
        self.global.len() + self.local.len() > 4 * JUMP_ENTRIES
    }
}

/// The TLBs and jump caches of one address space, each once for the supervisor and once
/// for ring 3; the TLBs apart for loads and stores, so that a copy between two places at an
/// unlucky distance does not fight over lines.
#[repr(C, align(64))]
pub(crate) struct AddressSpace {
    pub(crate) tlb: [[TlbEntry; TLB_ENTRIES]; TLBS],
    pub(crate) jumps: [[JumpEntry; JUMP_ENTRIES]; JUMP_TABLES],
    info: [[LineInfo; TLB_ENTRIES]; TLBS],
    tlb_filled: [Filled; TLBS],
    jumps_filled: [Filled; JUMP_TABLES],
    pcid: Option<u64>,
    last_used: u64,
    /// Large pages that have entries, as `linear >> shift << 6 | shift`: local, global.
    large: [PageSet; 2],
    /// Pages that have jump-cache entries.
    jump_pages: PageSet,
}

type PageSet = HashSet<u64, BuildFast>;

fn large_key(linear: u64, shift: u32) -> u64 {
    linear >> shift << 6 | u64::from(shift)
}

/// The index of a linear address in a jump cache.
pub(crate) fn jump_index(pc: u64) -> usize {
    (pc.wrapping_mul(JUMP_HASH.into()) >> JUMP_SHIFT) as usize & (JUMP_ENTRIES - 1)
}

/// The index of a linear address in a TLB. The supervisor's is folded: its few hot pages
/// (stacks, per-CPU data, kernel data) lie in places whose low address bits often agree.
/// Ring 3 does without, where the two instructions more would be felt.
fn tlb_index(linear: u64, rights: Rights) -> usize {
    let page = linear / PAGE_SIZE;
    let folded = if rights.is_user() {
        page
    } else {
        page ^ page >> 12
    };
    folded as usize % TLB_ENTRIES
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
    fn host(&self) -> u64 {
        self.tag.wrapping_add(self.delta)
    }

    fn invalid(index: usize) -> Self {
        Self {
            tag: invalid_tag(index),
            delta: 0,
        }
    }
}

impl AddressSpace {
    fn new() -> Box<Self> {
        // SAFETY: the tables are integers, for which zeroes are a value; every other field
        // is written before the box is made.
        let mut space = unsafe {
            let layout = std::alloc::Layout::new::<Self>();
            let raw = std::alloc::alloc_zeroed(layout).cast::<Self>();
            if raw.is_null() {
                std::alloc::handle_alloc_error(layout);
            }
            (&raw mut (*raw).tlb_filled).write(Default::default());
            (&raw mut (*raw).jumps_filled).write(Default::default());
            (&raw mut (*raw).pcid).write(None);
            (&raw mut (*raw).large).write(Default::default());
            (&raw mut (*raw).jump_pages).write(PageSet::default());
            Box::from_raw(raw)
        };
        for table in &mut space.tlb {
            table[0] = TlbEntry::invalid(0);
        }
        for table in &mut space.jumps {
            table[0] = invalid_jump(0);
            table[JUMP_NEIGHBOUR] = invalid_jump(JUMP_NEIGHBOUR);
        }
        space
    }

    fn flush_tlb(&mut self, keep_global: bool) {
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

    fn flush_jumps_but(&mut self, keep_global: bool) {
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

    fn flush(&mut self, keep_global: bool) {
        self.flush_tlb(keep_global);
        self.flush_jumps_but(keep_global);
    }

    /// Drops a page. Returns true when it was part of a large one, which went with it.
    fn flush_page(&mut self, linear: u64) -> bool {
        let page = linear & !(PAGE_SIZE - 1);
        let many = [21, 22, 30]
            .map(|shift| large_key(linear, shift))
            .iter()
            .any(|key| {
                self.large
                    .iter()
                    .any(|set| !set.is_empty() && set.contains(key))
            });
        for (number, table) in self.tlb.iter_mut().enumerate() {
            let index = tlb_index(linear, Rights::ALL[number / 2]);
            if table[index].tag == page {
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

    fn flush_large(&mut self, linear: u64) {
        for (table, info) in self.tlb.iter_mut().zip(&self.info) {
            for (index, (entry, info)) in table.iter_mut().zip(info).enumerate() {
                let shift = info & !GLOBAL;
                if shift > 12 && entry.tag >> shift == linear >> shift {
                    entry.tag = invalid_tag(index);
                }
            }
        }
    }

    /// Where the block for `pc` is, if the jump cache knows.
    pub(crate) fn jump(&self, table: usize, pc: u64) -> Option<u64> {
        let index = jump_index(pc);
        [index, index ^ JUMP_NEIGHBOUR]
            .map(|index| self.jumps[table][index])
            .into_iter()
            .find(|entry| entry.pc == pc && entry.code != 0)
            .map(|entry| entry.code)
    }

    fn forget_jump(&mut self, pc: u64) {
        let index = jump_index(pc);
        for table in &mut self.jumps {
            for index in [index, index ^ JUMP_NEIGHBOUR] {
                if table[index].pc == pc {
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
        let index = jump_index(entry.pc);
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

/// What a walk found.
struct Mapping {
    physical: u64,
    page_shift: u32,
    global: bool,
    /// A store by the asking privilege would succeed without touching the tables again.
    writable: bool,
}

/// Where an access ends up.
#[derive(Clone, Copy)]
pub(crate) enum Target {
    Ram(*mut u8),
    /// Guest physical address of something that is not RAM.
    Device(u64),
}

/// One vCPU without its translator: state, memory, address spaces. System instructions
/// and fault delivery work on this.
pub(crate) struct Core {
    pub(crate) state: StateRef,
    pub(crate) memory: GuestMemory,
    /// TSC frequency that the guest is told, in kHz.
    pub(crate) tsc_khz: u32,
    pub(crate) cpuid: crate::system::cpuid::Table,
    /// Interrupts may be pending: ask the bus before running on.
    pub(crate) check_interrupts: bool,
    /// Physical ranges with translated code that were written and must be thrown away
    /// before the next block runs.
    pub(crate) stale: Vec<(u64, u64)>,
    /// All translated code must be.
    pub(crate) all_stale: bool,
    pub(crate) seat: Seat,
    /// Breakpoints that the current instruction hit: bits of DR6.
    pub(crate) debug_hits: u64,
    /// Set where the guest wants what this CPU does not do: says what.
    pub(crate) fatal: Option<&'static str>,
    spaces: Vec<Box<AddressSpace>>,
    clock: u64,
}

impl Core {
    pub(crate) fn new(crew: &Arc<Crew>, index: u32, tsc_khz: u32) -> Self {
        let state = StateRef::new();
        let seat = Seat::new(crew, index, Waker(Arc::clone(state.block())));
        let mut core = Self {
            state,
            memory: crew.memory().clone(),
            tsc_khz,
            cpuid: crate::system::cpuid::Table::from_host(tsc_khz, index, crew.cpus()),
            check_interrupts: true,
            stale: Vec::new(),
            all_stale: false,
            seat,
            debug_hits: 0,
            fatal: None,
            spaces: Vec::new(),
            clock: 0,
        };
        core.select_space(false);
        core
    }

    pub(crate) fn user(&self) -> bool {
        self.state.cpl == 3
    }

    pub(crate) fn space(&mut self) -> &mut AddressSpace {
        // SAFETY: `state.space` always points into a Box of `self.spaces` (select_space),
        // which is never shrunk; `&mut self` makes the borrow exclusive.
        unsafe { &mut *self.state.space }
    }

    /// Makes the address space of CR3 current, after CR3 or CR4 were set. `keep`: entries
    /// it may hold from before stay valid (CR3 bit 63 with CR4.PCIDE).
    pub(crate) fn select_space(&mut self, keep: bool) {
        self.forget_windows(Forget::All);
        let pcid = if self.state.cr4 & cr4::PCIDE == 0 {
            0
        } else {
            self.state.cr3 & 0xfff
        };
        self.clock += 1;
        let found = self.spaces.iter().position(|s| s.pcid == Some(pcid));
        let index = found.unwrap_or_else(|| self.free_space());
        let space = &mut self.spaces[index];
        if found.is_none() {
            space.flush(false);
        } else if !keep {
            space.flush(true);
        }
        space.pcid = Some(pcid);
        space.last_used = self.clock;
        self.state.space = &raw mut **space;
    }

    fn free_space(&mut self) -> usize {
        if self.spaces.len() < SPACES {
            self.spaces.push(AddressSpace::new());
            return self.spaces.len() - 1;
        }
        let oldest = self
            .spaces
            .iter()
            .enumerate()
            .min_by_key(|(_, s)| s.last_used);
        oldest.map_or(0, |(index, _)| index)
    }

    /// Empties windows, which hold what ring 3's TLBs do.
    fn forget_windows(&mut self, which: Forget) {
        let state = &mut *self.state;
        for (kind, used) in state.windows_used.iter_mut().enumerate() {
            if matches!(which, Forget::Stores(_)) && kind != usize::from(true) {
                continue;
            }
            for (word, bits) in used.iter_mut().enumerate() {
                let mut left = *bits;
                while left != 0 {
                    let bit = left & left.wrapping_neg();
                    left ^= bit;
                    let number = word * 64 + bit.trailing_zeros() as usize;
                    let window = &mut state.windows[kind][number];
                    let matches = match which {
                        Forget::All => true,
                        Forget::Page(page) => window.start == page,
                        Forget::Stores(host) => window.start.wrapping_add(window.delta) == host,
                    };
                    if matches {
                        *window = Window::NONE;
                        *bits ^= bit;
                    }
                }
            }
        }
    }

    /// Drops everything every TLB and jump cache holds.
    pub(crate) fn flush_all(&mut self) {
        self.forget_windows(Forget::All);
        for space in &mut self.spaces {
            space.flush(false);
        }
    }

    /// Drops what is held for one PCID, less global pages.
    pub(crate) fn flush_pcid(&mut self, pcid: u64) {
        self.forget_windows(Forget::All);
        for space in self.spaces.iter_mut().filter(|s| s.pcid == Some(pcid)) {
            space.flush(true);
        }
    }

    /// INVLPG: drops the page in all spaces, since it may be global.
    pub(crate) fn flush_page(&mut self, linear: u64) {
        let mut whole = Forget::Page(linear & !(PAGE_SIZE - 1));
        for space in &mut self.spaces {
            if space.flush_page(linear) {
                whole = Forget::All;
            }
        }
        self.forget_windows(whole);
    }

    /// Drops one page of one PCID.
    pub(crate) fn flush_page_of(&mut self, pcid: u64, linear: u64) {
        let mut whole = Forget::Page(linear & !(PAGE_SIZE - 1));
        for space in self.spaces.iter_mut().filter(|s| s.pcid == Some(pcid)) {
            if space.flush_page(linear) {
                whole = Forget::All;
            }
        }
        self.forget_windows(whole);
    }

    /// Drops what the jump caches know of `pc`, whose block went away.
    pub(crate) fn forget_jump(&mut self, pc: u64) {
        for space in &mut self.spaces {
            space.forget_jump(pc);
        }
    }

    /// Empties all jump caches, when blocks went away.
    pub(crate) fn flush_jumps(&mut self) {
        for space in &mut self.spaces {
            space.flush_jumps();
        }
    }

    /// Makes every store to the RAM page at `physical` take the slow path from now on.
    pub(crate) fn revoke_stores(&mut self, physical: u64) {
        let cpu = self.seat.index();
        if !self.memory.code().claims_stores(cpu, physical) {
            return;
        }
        let Some(host) = self.memory.host_ptr(physical & !(PAGE_SIZE - 1), PAGE_SIZE) else {
            return;
        };
        self.forget_windows(Forget::Stores(host as u64));
        for space in &mut self.spaces {
            for table in Rights::ALL.map(|rights| tlb_number(rights, true)) {
                for (index, entry) in space.tlb[table].iter_mut().enumerate() {
                    if entry.host() == host as u64 {
                        entry.tag = invalid_tag(index);
                    }
                }
            }
        }
        self.memory.code().disclaim_stores(cpu, physical);
    }

    /// Whether `linear` is canonical for 48-bit addresses.
    pub(crate) fn canonical(linear: u64) -> bool {
        ((linear as i64) << 16 >> 16) as u64 == linear
    }

    /// An access that leaves the canonical range is refused before its first page is looked
    /// at. The first byte is checked with its page.
    fn require_canonical_end(linear: u64, length: u64) -> Result<(), Exception> {
        if Self::canonical(linear.wrapping_add(length.max(1) - 1)) {
            return Ok(());
        }
        Err(Exception::general_protection(0))
    }

    /// Whether ring 3 has its accesses checked for alignment (Intel SDM vol. 3A §6.15, #AC).
    pub(crate) fn checks_alignment(&self) -> bool {
        self.user() && self.state.cr0 & cr0::AM != 0 && self.state.system_flags & rflags::AC != 0
    }

    /// Raises #AC for an operand of `size` bytes that is checked and not aligned.
    pub(crate) fn check_alignment(&self, linear: u64, size: u64) -> Result<(), Exception> {
        let unit = match size {
            2 | 4 | 8 | 16 => size,
            10 => 8,
            32 => 16,
            _ => return Ok(()),
        };
        let canonical = Self::canonical(linear) && Self::canonical(linear.wrapping_add(size - 1));
        if self.checks_alignment() && !linear.is_multiple_of(unit) && canonical {
            return Err(Exception::alignment_check());
        }
        Ok(())
    }

    /// Whose rights an access with this privilege has.
    fn rights(&self, privilege: Privilege) -> Rights {
        match privilege {
            Privilege::Current if self.user() => Rights::User,
            Privilege::Current if self.opens_user_pages() => Rights::Open,
            Privilege::Current | Privilege::Supervisor => Rights::Supervisor,
        }
    }

    /// Whose rights explicit accesses have now.
    pub(crate) fn current_rights(&self) -> Rights {
        self.rights(Privilege::Current)
    }

    /// Whether the supervisor may access ring 3's pages although CR4.SMAP is set.
    pub(crate) fn opens_user_pages(&self) -> bool {
        self.state.cr4 & cr4::SMAP != 0 && self.state.system_flags & rflags::AC != 0 && !self.user()
    }

    /// Finds where `linear` leads for an access that stays within one page, filling the
    /// TLB. Errors are #PF, or #GP(0) for a non-canonical address.
    pub(crate) fn target(
        &mut self,
        linear: u64,
        kind: Kind,
        privilege: Privilege,
    ) -> Result<Target, Exception> {
        let rights = self.rights(privilege);
        let page = linear & !(PAGE_SIZE - 1);
        let index = tlb_index(linear, rights);
        let entry = self.space().tlb[tlb_number(rights, kind == Kind::Write)][index];
        if kind != Kind::Fetch && entry.tag == page {
            return Ok(Target::Ram((entry.host() + (linear - page)) as *mut u8));
        }
        if !Self::canonical(linear) {
            return Err(Exception::general_protection(0));
        }
        let mapping = self.walk(linear, kind, rights)?;
        let physical_page = mapping.physical & !(PAGE_SIZE - 1);
        let Some(host) = self.memory.host_ptr(physical_page, PAGE_SIZE) else {
            return Ok(Target::Device(mapping.physical));
        };
        if kind != Kind::Fetch {
            self.fill(linear, host, rights, kind, &mapping);
        }
        // SAFETY: the offset is within the page that `host` maps.
        Ok(Target::Ram(unsafe { host.add((linear - page) as usize) }))
    }

    /// Whether a store by the current privilege level to the page of `linear`, which was
    /// just read, needs nothing of the page tables, and will not before this vCPU has left
    /// its block.
    pub(crate) fn may_store(&mut self, linear: u64) -> bool {
        let mapping = self.walk(linear, Kind::Read, self.rights(Privilege::Current));
        let cpu = self.seat.index();
        mapping.is_ok_and(|m| m.writable && self.memory.code().claim_stores(cpu, m.physical))
    }

    /// Enters a page into the TLB that missed, and into its sibling if the line is free.
    fn fill(&mut self, linear: u64, host: *mut u8, rights: Rights, kind: Kind, mapping: &Mapping) {
        let page = linear & !(PAGE_SIZE - 1);
        let index = tlb_index(linear, rights);
        let code = self.memory.code();
        let writable = mapping.writable && code.claim_stores(self.seat.index(), mapping.physical);
        let space = self.space();
        if mapping.page_shift > 12 {
            let set = &mut space.large[usize::from(mapping.global)];
            set.insert(large_key(linear, mapping.page_shift));
        }
        let info = mapping.page_shift as LineInfo | if mapping.global { GLOBAL } else { 0 };
        for store in [false, true] {
            if store && !writable {
                continue;
            }
            let table = tlb_number(rights, store);
            let old = space.tlb[table][index];
            if store != (kind == Kind::Write) && old.delta != 0 && old.tag != invalid_tag(index) {
                continue;
            }
            if old.delta == 0 || (space.info[table][index] ^ info) & GLOBAL != 0 {
                if space.tlb_filled[table].crowded() {
                    space.flush_tlb(false);
                }
                space.tlb_filled[table].note(index, mapping.global);
            }
            space.info[table][index] = info;
            space.tlb[table][index] = TlbEntry {
                tag: page,
                delta: (host as u64).wrapping_sub(page),
            };
        }
    }

    /// The physical address that an instruction fetch from `linear` reads, and whether the
    /// page is global.
    pub(crate) fn fetch_address(&mut self, linear: u64) -> Result<(u64, bool), Exception> {
        if !Self::canonical(linear) {
            return Err(Exception::general_protection(0));
        }
        let mapping = self.walk(linear, Kind::Fetch, self.rights(Privilege::Current))?;
        Ok((mapping.physical, mapping.global))
    }

    fn table_entry(&self, address: u64) -> Option<&AtomicU64> {
        let pointer = self.memory.host_ptr(address, 8)?.cast::<u64>();
        // SAFETY: eight bytes of guest RAM, aligned since table entries are, mapped for as
        // long as `self.memory` lives; shared with the guest, hence atomic.
        Some(unsafe { AtomicU64::from_ptr(pointer) })
    }

    /// SMEP and SMAP: whether the supervisor is kept from what it wants with a page of ring
    /// 3's.
    fn prevents_supervisor(&self, user_page: bool, kind: Kind, rights: Rights) -> bool {
        let bit = match (kind, rights) {
            (_, Rights::User) => return false,
            (Kind::Fetch, _) => cr4::SMEP,
            (_, Rights::Open) => return false,
            _ => cr4::SMAP,
        };
        user_page && self.state.cr4 & bit != 0
    }

    fn walk(&self, linear: u64, kind: Kind, asking: Rights) -> Result<Mapping, Exception> {
        let user = asking.is_user();
        let state: &State = &self.state;
        if state.cr0 & cr0::PG == 0 {
            return Ok(Mapping {
                physical: linear & 0xffff_ffff,
                page_shift: 12,
                global: false,
                writable: true,
            });
        }
        if !state.is_long_mode() {
            return self.walk_legacy(linear, kind, asking);
        }
        let nxe = state.efer & efer::NXE != 0;
        let mut code = 0;
        if kind == Kind::Write {
            code |= pf::W;
        }
        if user {
            code |= pf::U;
        }
        if kind == Kind::Fetch && (nxe || state.cr4 & cr4::SMEP != 0) {
            code |= pf::I;
        }
        let fault = |extra| Exception::page_fault(linear, code | extra);
        let reserved = PTE_ADDRESS & !((1 << PHYSICAL_BITS) - 1) | if nxe { 0 } else { PTE_NX };

        let mut table = state.cr3 & PTE_ADDRESS;
        let mut rights = PTE_W | PTE_U;
        let mut nx = false;
        let mut shift = 39;
        loop {
            let address = table + (linear >> shift & 0x1ff) * 8;
            let entry = self.table_entry(address).ok_or_else(|| fault(0))?;
            let mut value = entry.load(Ordering::Acquire);
            loop {
                if value & PTE_P == 0 {
                    return Err(fault(0));
                }
                let leaf = shift == 12 || (shift < 39 && value & PTE_PS != 0);
                let misplaced = match shift {
                    39 => value & PTE_PS,
                    30 | 21 if leaf => value & ((1 << shift) - 1) & !0x1fff,
                    _ => 0,
                };
                if value & reserved != 0 || misplaced != 0 {
                    return Err(fault(pf::P | pf::RSVD));
                }
                let all = rights & value;
                let no_execute = nx || value & PTE_NX != 0;
                if !leaf {
                    if value & PTE_A == 0
                        && let Err(now) = entry.compare_exchange(
                            value,
                            value | PTE_A,
                            Ordering::SeqCst,
                            Ordering::Acquire,
                        )
                    {
                        value = now;
                        continue;
                    }
                    rights = all;
                    nx = no_execute;
                    table = value & PTE_ADDRESS;
                    break;
                }
                let may_write = all & PTE_W != 0 || (!user && state.cr0 & cr0::WP == 0);
                let denied = (user && all & PTE_U == 0)
                    || (kind == Kind::Write && !may_write)
                    || (kind == Kind::Fetch && no_execute)
                    || self.prevents_supervisor(all & PTE_U != 0, kind, asking);
                if denied {
                    return Err(fault(pf::P));
                }
                let wanted = value | PTE_A | if kind == Kind::Write { PTE_D } else { 0 };
                if wanted != value
                    && let Err(now) =
                        entry.compare_exchange(value, wanted, Ordering::SeqCst, Ordering::Acquire)
                {
                    value = now;
                    continue;
                }
                let offset = (1_u64 << shift) - 1;
                return Ok(Mapping {
                    physical: wanted & PTE_ADDRESS & !offset | linear & offset,
                    page_shift: shift,
                    global: wanted & PTE_G != 0 && state.cr4 & cr4::PGE != 0,
                    writable: may_write && wanted & PTE_D != 0,
                });
            }
            shift -= 9;
        }
    }

    /// Reads guest memory at a linear address; may cross pages and go to devices.
    pub(crate) fn read_linear(
        &mut self,
        bus: &dyn Bus,
        linear: u64,
        data: &mut [u8],
        privilege: Privilege,
    ) -> Result<(), Exception> {
        Self::require_canonical_end(linear, data.len() as u64)?;
        if privilege == Privilege::Current {
            self.watch_data(linear, data.len() as u64, false);
        }
        let mut done = 0;
        while done < data.len() {
            let at = linear.wrapping_add(done as u64);
            let length = ((PAGE_SIZE - at % PAGE_SIZE) as usize).min(data.len() - done);
            let part = &mut data[done..done + length];
            match self.target(at, Kind::Read, privilege)? {
                Target::Ram(host) => copy_from_guest(host, part),
                Target::Device(physical) => bus.mmio_read(physical, part),
            }
            done += length;
        }
        Ok(())
    }

    /// Checks that `length` bytes at `linear` could be written, raising what a store would.
    pub(crate) fn probe_write(
        &mut self,
        linear: u64,
        length: u64,
        privilege: Privilege,
    ) -> Result<(), Exception> {
        Self::require_canonical_end(linear, length)?;
        let last = linear.wrapping_add(length.max(1) - 1);
        let mut at = linear;
        loop {
            self.target(at, Kind::Write, privilege)?;
            let next = (at | (PAGE_SIZE - 1)).wrapping_add(1);
            if last.wrapping_sub(linear) < next.wrapping_sub(linear) {
                return Ok(());
            }
            at = next;
        }
    }

    /// Writes guest memory at a linear address. All pages are checked before the first
    /// byte is written.
    pub(crate) fn write_linear(
        &mut self,
        bus: &dyn Bus,
        linear: u64,
        data: &[u8],
        privilege: Privilege,
    ) -> Result<(), Exception> {
        if linear % PAGE_SIZE + data.len() as u64 > PAGE_SIZE {
            self.probe_write(linear, data.len() as u64, privilege)?;
        }
        if privilege == Privilege::Current {
            self.watch_data(linear, data.len() as u64, true);
        }
        let mut done = 0;
        while done < data.len() {
            let at = linear.wrapping_add(done as u64);
            let length = ((PAGE_SIZE - at % PAGE_SIZE) as usize).min(data.len() - done);
            let part = &data[done..done + length];
            match self.target(at, Kind::Write, privilege)? {
                Target::Ram(host) => {
                    self.store_behind_tag(at, length as u64, privilege)?;
                    copy_to_guest(host, part);
                    self.seat.end_store();
                }
                Target::Device(physical) => bus.mmio_write(physical, part),
            }
            done += length;
        }
        Ok(())
    }

    /// After a store target was found: if its page has no store tag, it may hold code. To be
    /// followed by [`Seat::end_store`] once the store is done.
    pub(crate) fn store_behind_tag(
        &mut self,
        linear: u64,
        length: u64,
        privilege: Privilege,
    ) -> Result<(), Exception> {
        let rights = self.rights(privilege);
        let entry = self.space().tlb[tlb_number(rights, true)][tlb_index(linear, rights)];
        if entry.tag != linear & !(PAGE_SIZE - 1) {
            let physical = self.walk(linear, Kind::Write, rights)?.physical;
            self.note_store(physical, length);
        }
        Ok(())
    }

    /// Reads a little-endian integer of `N` bytes.
    pub(crate) fn read_bytes<const N: usize>(
        &mut self,
        bus: &dyn Bus,
        linear: u64,
        privilege: Privilege,
    ) -> Result<[u8; N], Exception> {
        let mut data = [0; N];
        self.read_linear(bus, linear, &mut data, privilege)?;
        Ok(data)
    }

    /// Reads eight bytes.
    pub(crate) fn read_u64(
        &mut self,
        bus: &dyn Bus,
        linear: u64,
        privilege: Privilege,
    ) -> Result<u64, Exception> {
        Ok(u64::from_le_bytes(self.read_bytes(bus, linear, privilege)?))
    }
}

/// Copies from guest RAM. Sizes of 1, 2, 4 and 8 are single loads, as the guest's would be.
fn copy_from_guest(host: *const u8, data: &mut [u8]) {
    // SAFETY: `host` points at `data.len()` mapped bytes of guest RAM within one page
    // (Core::target); the guest may change them at any time, hence volatile or raw copies.
    unsafe {
        match data.len() {
            1 => data[0] = host.read_volatile(),
            2 => data.copy_from_slice(&host.cast::<[u8; 2]>().read_volatile()),
            4 => data.copy_from_slice(&host.cast::<[u8; 4]>().read_volatile()),
            8 => data.copy_from_slice(&host.cast::<u64>().read_unaligned().to_ne_bytes()),
            n => std::ptr::copy_nonoverlapping(host, data.as_mut_ptr(), n),
        }
    }
}

/// Copies to guest RAM, as [`copy_from_guest`].
fn copy_to_guest(host: *mut u8, data: &[u8]) {
    // SAFETY: as for `copy_from_guest`; the page is writable for the guest, and RAM is
    // never the target of a Rust reference.
    unsafe {
        match *data {
            [a] => host.write_volatile(a),
            [a, b] => host
                .cast::<u16>()
                .write_unaligned(u16::from_ne_bytes([a, b])),
            [a, b, c, d] => host
                .cast::<u32>()
                .write_unaligned(u32::from_ne_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => host
                .cast::<u64>()
                .write_unaligned(u64::from_ne_bytes([a, b, c, d, e, f, g, h])),
            _ => std::ptr::copy_nonoverlapping(data.as_ptr(), host, data.len()),
        }
    }
}
