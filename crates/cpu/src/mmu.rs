//! Paging: the walk (Intel SDM vol. 3A §4.5), the soft TLBs and linear memory access for
//! Rust code. Translated code reads the same TLB entries inline.
//!
//! An [`AddressSpace`] is one TLB context: one per PCID, swapped by pointer on MOV CR3. An
//! entry holds two tags, one for loads and one for stores, so that a store to a page that
//! is clean, read-only or holds translated code leaves the fast path.

use std::sync::atomic::{AtomicU64, Ordering};

use strata_memory::{GuestMemory, PAGE_SIZE};

use crate::bus::Bus;
use crate::exception::Exception;
use crate::state::{State, StateRef, cr0, cr4, efer};

/// Physical address width that CPUID reports and the walk enforces, in bits.
pub(crate) const PHYSICAL_BITS: u32 = 46;
/// Entries of one direct-mapped TLB.
pub(crate) const TLB_ENTRIES: usize = 1024;
/// Entries of one jump cache.
pub(crate) const JUMP_ENTRIES: usize = 4096;
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

/// One line of a soft TLB. A tag is a page's linear address, or [`invalid_tag`].
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct TlbEntry {
    pub(crate) read: u64,
    pub(crate) write: u64,
    /// Host address of the page.
    pub(crate) host: u64,
    /// log2 of the page size that the guest mapped, for INVLPG.
    pub(crate) page_shift: u64,
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

/// The TLBs and jump caches of one address space, each once for the supervisor and once
/// for ring 3.
#[repr(C, align(64))]
pub(crate) struct AddressSpace {
    pub(crate) tlb: [[TlbEntry; TLB_ENTRIES]; 2],
    pub(crate) jumps: [[JumpEntry; JUMP_ENTRIES]; 2],
    pcid: Option<u64>,
    last_used: u64,
    /// Which 2 MiB stretches (hashed) have entries from larger pages.
    large: u64,
    /// Which pages (hashed) have jump-cache entries.
    jump_pages: u64,
}

fn hash64(number: u64) -> u64 {
    1 << (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 58)
}

/// The index of a linear address in a jump cache.
pub(crate) fn jump_index(pc: u64) -> usize {
    (pc as usize >> 12 ^ pc as usize) & (JUMP_ENTRIES - 1)
}

fn tlb_index(linear: u64) -> usize {
    (linear / PAGE_SIZE) as usize % TLB_ENTRIES
}

impl AddressSpace {
    fn new() -> Box<Self> {
        // SAFETY: all fields are integers or an Option<u64>; a zeroed allocation of the
        // type's own layout is a valid value for each (None for `pcid` is written below).
        let mut space = unsafe {
            let layout = std::alloc::Layout::new::<Self>();
            let raw = std::alloc::alloc_zeroed(layout).cast::<Self>();
            if raw.is_null() {
                std::alloc::handle_alloc_error(layout);
            }
            (&raw mut (*raw).pcid).write(None);
            Box::from_raw(raw)
        };
        space.flush_tlb();
        space.flush_jumps();
        space
    }

    fn flush_tlb(&mut self) {
        for table in &mut self.tlb {
            for (index, entry) in table.iter_mut().enumerate() {
                let tag = invalid_tag(index);
                *entry = TlbEntry { read: tag, write: tag, host: 0, page_shift: 0 };
            }
        }
        self.large = 0;
    }

    pub(crate) fn flush_jumps(&mut self) {
        if self.jump_pages != 0 {
            self.jumps = [[JumpEntry { pc: 0, code: 0 }; JUMP_ENTRIES]; 2];
        }
        for table in &mut self.jumps {
            // address 0 has index 0, so its empty entry needs a pc that has another
            table[0].pc = 1;
        }
        self.jump_pages = 0;
    }

    fn flush(&mut self) {
        self.flush_tlb();
        self.flush_jumps();
    }

    fn flush_page(&mut self, linear: u64) {
        let index = tlb_index(linear);
        let page = linear & !(PAGE_SIZE - 1);
        let many = self.large & hash64(linear >> 21) != 0;
        for table in &mut self.tlb {
            let tag = invalid_tag(index);
            let entry = &mut table[index];
            if entry.read == page || entry.write == page {
                entry.read = tag;
                entry.write = tag;
            }
            if many {
                Self::flush_large(table, linear);
            }
        }
        if many || self.jump_pages & hash64(linear / PAGE_SIZE) != 0 {
            self.flush_jumps();
        }
    }

    fn flush_large(table: &mut [TlbEntry; TLB_ENTRIES], linear: u64) {
        for (index, entry) in table.iter_mut().enumerate() {
            let shift = entry.page_shift;
            if shift > 12 && (entry.read >> shift == linear >> shift || entry.write >> shift == linear >> shift) {
                entry.read = invalid_tag(index);
                entry.write = invalid_tag(index);
            }
        }
    }

    /// Enters where the block for `pc` is. `last` is the last byte of the block.
    pub(crate) fn insert_jump(&mut self, user: bool, pc: u64, last: u64, code: u64) {
        self.jump_pages |= hash64(pc / PAGE_SIZE) | hash64(last / PAGE_SIZE);
        self.jumps[usize::from(user)][jump_index(pc)] = JumpEntry { pc, code };
    }
}

/// What a walk found.
struct Mapping {
    physical: u64,
    page_shift: u32,
    /// A store by the asking privilege would succeed without touching the tables again.
    writable: bool,
}

/// Where an access ends up.
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
    pub(crate) index: u32,
    /// TSC frequency that the guest is told, in kHz.
    pub(crate) tsc_khz: u32,
    pub(crate) cpuid: crate::system::cpuid::Table,
    /// Interrupts may be pending: ask the bus before running on.
    pub(crate) check_interrupts: bool,
    /// Physical ranges with translated code that were written and must be thrown away
    /// before the next block runs.
    pub(crate) stale: Vec<(u64, u64)>,
    spaces: Vec<Box<AddressSpace>>,
    clock: u64,
    /// One bit a page of RAM: some TLB may hold a store tag for it.
    stored: std::collections::HashSet<u64, crate::hash::BuildFast>,
}

impl Core {
    pub(crate) fn new(memory: GuestMemory, index: u32, tsc_khz: u32) -> Self {
        let mut core = Self {
            state: StateRef::new(),
            memory,
            index,
            tsc_khz,
            cpuid: crate::system::cpuid::Table::from_host(tsc_khz, index, 1),
            check_interrupts: true,
            stale: Vec::new(),
            spaces: Vec::new(),
            clock: 0,
            stored: std::collections::HashSet::default(),
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
        let pcid = if self.state.cr4 & cr4::PCIDE == 0 { 0 } else { self.state.cr3 & 0xfff };
        self.clock += 1;
        let found = self.spaces.iter().position(|s| s.pcid == Some(pcid));
        let index = found.unwrap_or_else(|| self.free_space());
        let space = &mut self.spaces[index];
        if found.is_none() || !keep {
            space.flush();
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
        let oldest = self.spaces.iter().enumerate().min_by_key(|(_, s)| s.last_used);
        oldest.map_or(0, |(index, _)| index)
    }

    /// Drops everything every TLB and jump cache holds.
    pub(crate) fn flush_all(&mut self) {
        for space in &mut self.spaces {
            space.flush();
        }
    }

    /// Drops what is held for one PCID.
    pub(crate) fn flush_pcid(&mut self, pcid: u64) {
        for space in self.spaces.iter_mut().filter(|s| s.pcid == Some(pcid)) {
            space.flush();
        }
    }

    /// INVLPG: drops the page in all spaces, since it may be global.
    pub(crate) fn flush_page(&mut self, linear: u64) {
        for space in &mut self.spaces {
            space.flush_page(linear);
        }
    }

    /// Drops one page of one PCID.
    pub(crate) fn flush_page_of(&mut self, pcid: u64, linear: u64) {
        for space in self.spaces.iter_mut().filter(|s| s.pcid == Some(pcid)) {
            space.flush_page(linear);
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
        if !self.stored.remove(&(physical / PAGE_SIZE)) {
            return;
        }
        let Some(host) = self.memory.host_ptr(physical & !(PAGE_SIZE - 1), PAGE_SIZE) else {
            return;
        };
        for table in self.spaces.iter_mut().flat_map(|s| &mut s.tlb) {
            for (index, entry) in table.iter_mut().enumerate() {
                if entry.host == host as u64 {
                    entry.write = invalid_tag(index);
                }
            }
        }
    }

    /// Whether `linear` is canonical for 48-bit addresses.
    pub(crate) fn canonical(linear: u64) -> bool {
        ((linear as i64) << 16 >> 16) as u64 == linear
    }

    fn is_user(&self, privilege: Privilege) -> bool {
        privilege == Privilege::Current && self.user()
    }

    /// Finds where `linear` leads for an access that stays within one page, filling the
    /// TLB. Errors are #PF, or #GP(0) for a non-canonical address.
    pub(crate) fn target(
        &mut self,
        linear: u64,
        kind: Kind,
        privilege: Privilege,
    ) -> Result<Target, Exception> {
        let user = self.is_user(privilege);
        let page = linear & !(PAGE_SIZE - 1);
        let index = tlb_index(linear);
        let entry = self.space().tlb[usize::from(user)][index];
        let tag = match kind {
            Kind::Read => entry.read,
            Kind::Write => entry.write,
            Kind::Fetch => invalid_tag(index),
        };
        if tag == page {
            return Ok(Target::Ram((entry.host + (linear - page)) as *mut u8));
        }
        if !Self::canonical(linear) {
            return Err(Exception::general_protection(0));
        }
        let mapping = self.walk(linear, kind, user)?;
        let physical_page = mapping.physical & !(PAGE_SIZE - 1);
        let Some(host) = self.memory.host_ptr(physical_page, PAGE_SIZE) else {
            return Ok(Target::Device(mapping.physical));
        };
        if kind != Kind::Fetch {
            self.fill(linear, host, user, &mapping);
        }
        // SAFETY: the offset is within the page that `host` maps.
        Ok(Target::Ram(unsafe { host.add((linear - page) as usize) }))
    }

    fn fill(&mut self, linear: u64, host: *mut u8, user: bool, mapping: &Mapping) {
        let page = linear & !(PAGE_SIZE - 1);
        let index = tlb_index(linear);
        let writable = mapping.writable && !self.memory.code().page_has_code(mapping.physical);
        if writable {
            self.stored.insert(mapping.physical / PAGE_SIZE);
        }
        let space = self.space();
        if mapping.page_shift > 12 {
            space.large |= if mapping.page_shift == 21 { hash64(linear >> 21) } else { u64::MAX };
        }
        space.tlb[usize::from(user)][index] = TlbEntry {
            read: page,
            write: if writable { page } else { invalid_tag(index) },
            host: host as u64,
            page_shift: u64::from(mapping.page_shift),
        };
    }

    /// The physical address that an instruction fetch from `linear` reads.
    pub(crate) fn fetch_address(&mut self, linear: u64) -> Result<u64, Exception> {
        if !Self::canonical(linear) {
            return Err(Exception::general_protection(0));
        }
        let user = self.user();
        Ok(self.walk(linear, Kind::Fetch, user)?.physical)
    }

    fn table_entry(&self, address: u64) -> Option<&AtomicU64> {
        let pointer = self.memory.host_ptr(address, 8)?.cast::<u64>();
        // SAFETY: eight bytes of guest RAM, aligned since table entries are, mapped for as
        // long as `self.memory` lives; shared with the guest, hence atomic.
        Some(unsafe { AtomicU64::from_ptr(pointer) })
    }

    fn walk(&self, linear: u64, kind: Kind, user: bool) -> Result<Mapping, Exception> {
        let state: &State = &self.state;
        if state.cr0 & cr0::PG == 0 {
            return Ok(Mapping { physical: linear & 0xffff_ffff, page_shift: 12, writable: true });
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
                        && let Err(now) = entry.compare_exchange(value, value | PTE_A, Ordering::SeqCst, Ordering::Acquire)
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
                    || (kind == Kind::Fetch
                        && (no_execute || (!user && all & PTE_U != 0 && state.cr4 & cr4::SMEP != 0)));
                if denied {
                    return Err(fault(pf::P));
                }
                let wanted = value | PTE_A | if kind == Kind::Write { PTE_D } else { 0 };
                if wanted != value
                    && let Err(now) = entry.compare_exchange(value, wanted, Ordering::SeqCst, Ordering::Acquire)
                {
                    value = now;
                    continue;
                }
                let offset = (1_u64 << shift) - 1;
                return Ok(Mapping {
                    physical: wanted & PTE_ADDRESS & !offset | linear & offset,
                    page_shift: shift,
                    writable: may_write && wanted & PTE_D != 0,
                });
            }
            shift -= 9;
        }
    }

    /// Notes a store of `length` bytes to RAM at `physical`, within a page, that did not go
    /// through a store tag.
    pub(crate) fn note_store(&mut self, physical: u64, length: u64) {
        if self.memory.code().overlaps(physical, length) {
            self.stale.push((physical, length));
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
        let mut done = 0;
        while done < data.len() {
            let at = linear.wrapping_add(done as u64);
            let length = ((PAGE_SIZE - at % PAGE_SIZE) as usize).min(data.len() - done);
            let part = &data[done..done + length];
            match self.target(at, Kind::Write, privilege)? {
                Target::Ram(host) => {
                    self.store_behind_tag(at, length as u64, privilege)?;
                    copy_to_guest(host, part);
                }
                Target::Device(physical) => bus.mmio_write(physical, part),
            }
            done += length;
        }
        Ok(())
    }

    /// After a store target was found: if its page has no store tag, it may hold code.
    pub(crate) fn store_behind_tag(
        &mut self,
        linear: u64,
        length: u64,
        privilege: Privilege,
    ) -> Result<(), Exception> {
        let user = self.is_user(privilege);
        let entry = self.space().tlb[usize::from(user)][tlb_index(linear)];
        if entry.write != linear & !(PAGE_SIZE - 1) {
            let physical = self.walk(linear, Kind::Write, user)?.physical;
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
    pub(crate) fn read_u64(&mut self, bus: &dyn Bus, linear: u64, privilege: Privilege) -> Result<u64, Exception> {
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
            [a, b] => host.cast::<u16>().write_unaligned(u16::from_ne_bytes([a, b])),
            [a, b, c, d] => host.cast::<u32>().write_unaligned(u32::from_ne_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => host
                .cast::<u64>()
                .write_unaligned(u64::from_ne_bytes([a, b, c, d, e, f, g, h])),
            _ => std::ptr::copy_nonoverlapping(data.as_ptr(), host, data.len()),
        }
    }
}
