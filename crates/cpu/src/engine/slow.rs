//! The slow path of translated code's accesses: where one is done that is not in the TLB, or
//! cannot be done in place, and what it raises. Called by thunks while translated code runs.

use strata_memory::PAGE_SIZE;

use super::{Cpu, host_tsc};
use crate::blocks::Key;
use crate::bus::Bus;
use crate::exception::{Exception, vector};
use crate::mmu::{Core, Kind, Privilege, Rights, Target, tlb_number};
use crate::roaming::FILLS;
use crate::state::BOUNCE_SIZE;
use crate::translate::lower::meta;

/// As the length of what is to be written back: nothing, the store was done in place.
const DONE_IN_PLACE: u64 = u64::MAX;

/// How many fills of a window a miss of the TLB counts for: it takes as long, about.
const FILLS_OF_A_MISS: u32 = 16;

/// Where the two parts of an access are that has none.
pub(super) const NOWHERE: [(Target, usize); 2] = [(Target::Device(0), 0); 2];

impl Cpu {
    /// The slow path of an access by translated code: a host pointer to do it at, or
    /// `None` with `raised` set, or neither when the instruction must run alone.
    pub(super) fn slow_access(&mut self, address: u64, what: u32, from: u64) -> Option<*mut u8> {
        let size = u64::from(what & meta::SIZE);
        let store = what & meta::STORE != 0;
        let offset = from.wrapping_sub(self.cache.base()) as u32 - 1;
        let (number, site) = self.blocks.locate(offset)?;
        let key = self.blocks.key(number);
        let rip = key.rip.wrapping_add(u64::from(site.guest));
        let alone = key.mode.single || key.second.is_some();
        self.note_misses(address);
        self.note_fills(&key, site.guest, address, what);
        if what & meta::SPAN != 0 {
            let host = self.settle_span(address, size, store);
            if host.is_none() && what & meta::DRAFT != 0 {
                self.core.state.rip = rip;
                self.apart = true;
                return None;
            }
            self.core.state.bounced = u64::from(host.is_none());
            // translated code goes another way and makes no use of it
            return Some(host.unwrap_or(std::ptr::dangling_mut()));
        }
        let crosses = address % PAGE_SIZE + size > PAGE_SIZE;
        if store && what & meta::LOAD != 0 && crosses && !self.core.seat.may_be_atomic() {
            // it may be atomic: again, with all others stopped
            self.core.state.rip = rip;
            self.alone = true;
            self.exclusive = true;
            return None;
        }
        let result = self.settle_access(address, size, what, (!alone).then_some(number));
        let bounced = matches!(result, Ok(Some(Place::Bounced(_))));
        // a store in place that others wait for ends like one that was bounced
        let announced = store && !bounced && self.core.seat.is_storing();
        let result = match result {
            // there is no way back out of line: again, by itself
            Ok(Some(_)) if announced && what & meta::DRAFT != 0 => Ok(None),
            other => other,
        };
        self.core.state.bounced = u64::from(bounced || announced);
        self.core.state.commit_length = match (bounced && store, announced) {
            (true, _) => size,
            (_, true) => DONE_IN_PLACE,
            _ => 0,
        };
        if !matches!(result, Ok(Some(_))) {
            self.end_access();
        }
        match result {
            Ok(Some(Place::Direct(host) | Place::Bounced(host))) => return Some(host),
            Ok(None) => self.alone = true,
            Err(mut exception) => {
                if what & meta::STACK != 0 && exception.vector == vector::GP {
                    exception.vector = vector::SS;
                }
                if let Some(earlier) = earlier_fault(address, size, what) {
                    exception = earlier;
                }
                self.raised = Some(exception);
            }
        }
        self.core.state.rip = rip;
        None
    }

    /// Where a wide window was missed so often that translated code came here: sees to it.
    fn note_misses(&mut self, address: u64) {
        if let Some(window) = self.core.missed_wide_window() {
            self.core.fill_wide_window(window, address, host_tsc());
        }
    }

    /// Where a window was filled so often that the thunk came here, or would have been but for the
    /// TLB: if the place roams, its block is made anew without.
    fn note_fills(&mut self, key: &Key, guest: u16, address: u64, what: u32) {
        if !self.core.user() || key.second.is_some() {
            return;
        }
        let store = what & meta::STORE != 0;
        let number = (what >> meta::WINDOW_SHIFT) as usize;
        let stack = number == 0;
        if stack {
            return;
        }
        let state = &mut *self.core.state;
        let left = &mut state.window_fills[usize::from(store)][number];
        let missed = *left != 0;
        if missed {
            // a place that goes on from page to page misses the TLB too, but once a page
            let last = state.windows[tlb_number(Rights::User, store)][number].start;
            let distance = address.wrapping_sub(last).wrapping_add(PAGE_SIZE);
            if distance < 3 * PAGE_SIZE || what & meta::DRAFT != 0 {
                return;
            }
            *left = left.saturating_sub(FILLS_OF_A_MISS);
            if *left != 0 {
                return;
            }
        }
        *left = FILLS;
        let now = host_tsc();
        let place = key.physical.wrapping_add(guest.into());
        let fast = self.roaming.filled(number, store, now);
        let known = self.roaming.place(place);
        if !fast || known.is_some_and(Option::is_some) {
            return;
        }
        let is_new = known.is_none();
        let wide = self.core.wide_window_at(address, store, now);
        if wide.is_some() || is_new && !missed {
            self.roaming.add(place, wide);
            self.core.stale.push((place, 1));
            self.core.look_up();
        }
    }

    /// Host memory for the accesses of a span, `size` bytes in all, if they are within a
    /// page of RAM and none of them could fault.
    fn settle_span(&mut self, address: u64, size: u64, store: bool) -> Option<*mut u8> {
        if address % PAGE_SIZE + size > PAGE_SIZE {
            return None;
        }
        // a store that faults, or is never reached, must not change the page's entry
        if store && !self.core.may_store(address) {
            return None;
        }
        let kind = if store { Kind::Write } else { Kind::Read };
        let target = self.core.target(address, kind, Privilege::Current);
        match target.ok()? {
            Target::Ram(host) => Some(host),
            Target::Device(_) => None,
        }
    }

    fn settle_access(
        &mut self,
        address: u64,
        size: u64,
        what: u32,
        block: Option<u32>,
    ) -> Result<Option<Place>, Exception> {
        let store = what & meta::STORE != 0;
        let kind = if store { Kind::Write } else { Kind::Read };
        if !Core::canonical(address.wrapping_add(size.saturating_sub(1)))
            || what & meta::WRAPS == 0 && self.core.beyond_flat(address, size)
        {
            return Err(Exception::general_protection(0));
        }
        self.core.watch_data(address, size, store);
        self.core.check_alignment(address, size)?;
        let first = size.min(PAGE_SIZE - address % PAGE_SIZE);
        let parts = [
            (address, first),
            (self.core.wrap(address.wrapping_add(first)), size - first),
        ];
        let mut direct = None;
        let mut found = NOWHERE;
        for (&(at, length), found) in parts.iter().zip(&mut found).filter(|p| p.0.1 > 0) {
            let target = self.core.target(at, kind, Privilege::Current)?;
            if let Target::Ram(host) = target {
                direct = Some(host);
            } else {
                direct = None;
            }
            *found = (target, length as usize);
            if store && direct.is_some() {
                let told = self.core.stale.len();
                self.core.store_behind_tag(at, length, Privilege::Current)?;
                if self.writes_itself(block, told) {
                    self.core.stale.truncate(told);
                    return Ok(None);
                }
                self.drop_stale();
            }
        }
        if let (Some(host), true) = (direct, first == size) {
            return Ok(Some(Place::Direct(host)));
        }
        if what & meta::DRAFT != 0 {
            return Ok(None);
        }
        let offset = (address % 64) as usize;
        debug_assert!(offset + size as usize <= BOUNCE_SIZE);
        if !store || what & meta::LOAD != 0 {
            let mut data = [0; 512];
            let data = &mut data[..size as usize];
            let bus = self.current_bus();
            self.core
                .read_linear(bus, address, data, Privilege::Current)?;
            self.core.state.bounce.0[offset..offset + data.len()].copy_from_slice(data);
        }
        self.core.state.commit_address = address;
        self.bounced = found;
        let host = (&raw mut self.core.state.bounce.0[offset]).cast();
        Ok(Some(Place::Bounced(host)))
    }

    /// Whether one of the stale ranges after the first `told` is in the running block.
    fn writes_itself(&self, block: Option<u32>, told: usize) -> bool {
        block.is_some_and(|number| {
            self.core.stale[told..]
                .iter()
                .any(|&(address, length)| self.blocks.overlaps(number, address, length))
        })
    }

    pub(super) fn current_bus(&self) -> &'static dyn Bus {
        self.bus.expect("slow paths run inside Cpu::run")
    }

    /// Whatever an access that took the slow path had others do or wait for, it is over.
    pub(super) fn end_access(&mut self) {
        self.core.seat.end_store();
        self.core.seat.end_exclusive();
    }

    pub(super) fn commit_store(&mut self) {
        let length = std::mem::take(&mut self.core.state.commit_length);
        if length != DONE_IN_PLACE {
            self.write_back(length as usize);
        }
        self.end_access();
    }

    /// Does the store that an instruction did to the bounce buffer, where its pages were
    /// found before it ran: another vCPU may have changed the page tables since.
    fn write_back(&mut self, length: usize) {
        let offset = (self.core.state.commit_address % 64) as usize;
        let mut data = [0; 512];
        let data = &mut data[..length];
        data.copy_from_slice(&self.core.state.bounce.0[offset..offset + length]);
        let bus = self.current_bus();
        let mut rest = &*data;
        for (target, length) in self.bounced.into_iter().filter(|part| part.1 > 0) {
            let (part, after) = rest.split_at(length);
            self.core.store_at(bus, &target, part);
            rest = after;
        }
        self.drop_stale();
    }
}

/// Where a slow access is done.
enum Place {
    Direct(*mut u8),
    Bounced(*mut u8),
}

/// What an access that is going to fault anyway raises instead, because it is checked
/// before the address is translated.
fn earlier_fault(address: u64, size: u64, what: u32) -> Option<Exception> {
    if what & meta::WAITS != 0 && x87_exception_pending() {
        return Some(Exception::new(vector::MF));
    }
    (what & meta::ALIGNED != 0 && !address.is_multiple_of(size.max(1)))
        .then(|| Exception::general_protection(0))
}

/// Whether the guest's x87 state, which stays loaded in slow paths, has an unmasked
/// exception pending.
fn x87_exception_pending() -> bool {
    let status: u16;
    // SAFETY: FNSTSW only reads the x87 status word, and does not wait.
    unsafe { std::arch::asm!("fnstsw ax", out("ax") status, options(nomem, nostack)) };
    status & 0x80 != 0
}

/// Called by the slow thunks.
pub(super) extern "sysv64" fn access(cpu: *mut Cpu, address: u64, what: u32, from: u64) -> *mut u8 {
    // SAFETY: `runtime` is the Cpu inside whose `run` translated code executes; `run` does
    // not touch `self` while it does.
    let cpu = unsafe { &mut *cpu };
    cpu.slow_access(address, what, from)
        .unwrap_or(std::ptr::null_mut())
}

/// Called by the commit thunk.
pub(super) extern "sysv64" fn commit(cpu: *mut Cpu) {
    // SAFETY: as in `access`.
    unsafe { &mut *cpu }.commit_store();
}
