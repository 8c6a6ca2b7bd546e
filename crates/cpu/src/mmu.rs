//! Paging: the walk (Intel SDM vol. 3A §4.5), the soft TLBs and linear memory access for
//! Rust code. Translated code reads the same TLB entries inline.
//!
//! An [`AddressSpace`] is one TLB context: one per PCID, swapped by pointer on MOV CR3. It has
//! tables for loads and others for stores, so that a store to a page that is clean, read-only or
//! holds translated code leaves the fast path.

mod flush;
mod legacy;
mod space;
mod spaces;
mod store;
#[cfg(test)]
mod tests_jumps;
mod wide;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use strata_memory::{GuestMemory, PAGE_SIZE};

use crate::Error;
use crate::bus::{Bus, Waker};
use crate::crew::{Crew, Seat};
use crate::exception::Exception;
use crate::state::{State, StateRef, cr0, cr4, efer, rflags};

#[cfg(test)]
pub(crate) use space::JUMP_TABLES;
pub(crate) use space::{
    AddressSpace, JUMP_ENTRIES, JUMP_HASH, JUMP_NEIGHBOUR, JUMP_SHIFT, JumpEntry, Rights,
    TLB_ENTRIES, TLBS, TlbEntry, WINDOW_KINDS, apart_table, jump_entries, jump_index, jump_table,
    tlb_number, window_kind,
};
use space::{Filled, GLOBAL, LineInfo, invalid_tag, large_key, tlb_index};
use spaces::Spaces;
pub(crate) use wide::Wide;

/// Physical address width that CPUID reports and the walk enforces, in bits.
pub(crate) const PHYSICAL_BITS: u32 = 46;

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
    /// As `Read`, but whether it is read at all is open.
    Look,
}

impl Kind {
    /// What a walk sets in the entry of the page.
    fn marks(self) -> u64 {
        match self {
            Self::Read | Self::Fetch => PTE_A,
            Self::Write => PTE_A | PTE_D,
            Self::Look => 0,
        }
    }
}

/// Whose right counts for an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Privilege {
    /// The current privilege level's: explicit accesses.
    Current,
    /// The supervisor's: descriptor tables, TSS, interrupt stacks.
    Supervisor,
}

/// What a walk found.
struct Mapping {
    physical: u64,
    page_shift: u32,
    global: bool,
    /// Its entry says that it was accessed.
    accessed: bool,
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
    spaces: Spaces,
    rows: wide::Rows,
    /// Counts selections of an address space.
    selections: u64,
    /// What counts instead of the host's time stamp counter.
    pub(crate) clock: Option<Box<dyn Fn() -> u64 + Send>>,
}

impl Core {
    pub(crate) fn new(crew: &Arc<Crew>, index: u32, tsc_khz: u32) -> Result<Self, Error> {
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
            spaces: Spaces::new().map_err(Error::SoftTlbs)?,
            rows: wide::Rows::default(),
            selections: 0,
            clock: None,
        };
        core.select_space(false);
        Ok(core)
    }

    pub(crate) fn user(&self) -> bool {
        self.state.cpl == 3
    }

    pub(crate) fn space(&mut self) -> &mut AddressSpace {
        // SAFETY: `state.space` always points into `self.spaces` (select_space),
        // which is never shrunk; `&mut self` makes the borrow exclusive.
        unsafe { &mut *self.state.space }
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
        let index = tlb_index(linear);
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

    /// Whether a store by the current privilege level to the page of `linear` would change no
    /// more of its entry than a load, and will not before this vCPU has left its block.
    pub(crate) fn may_store(&mut self, linear: u64) -> bool {
        if !Self::canonical(linear) {
            return false;
        }
        let mapping = self.walk(linear, Kind::Look, self.rights(Privilege::Current));
        let cpu = self.seat.index();
        mapping.is_ok_and(|m| m.writable && self.memory.code().claim_stores(cpu, m.physical))
    }

    /// Enters a page into the TLB that missed, and into its sibling if the line is free.
    fn fill(&mut self, linear: u64, host: *mut u8, rights: Rights, kind: Kind, mapping: &Mapping) {
        let page = linear & !(PAGE_SIZE - 1);
        let index = tlb_index(linear);
        let code = self.memory.code();
        let writable = mapping.writable && code.claim_stores(self.seat.index(), mapping.physical);
        let space = self.space();
        if space.tlb_filled.iter().any(Filled::crowded) {
            space.flush_tlb(false);
        }
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

    /// As `fetch_address`, for whichever ring may fetch from there.
    pub(crate) fn any_fetch_address(&self, linear: u64) -> Option<u64> {
        let fetch = |rights| self.walk(linear, Kind::Fetch, rights).ok();
        Self::canonical(linear)
            .then(|| Rights::ALL.into_iter().find_map(fetch))?
            .map(|mapping| mapping.physical)
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
                accessed: true,
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
                let wanted = value | kind.marks();
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
                    accessed: wanted & PTE_A != 0,
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
        let entry = self.space().tlb[tlb_number(rights, true)][tlb_index(linear)];
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
