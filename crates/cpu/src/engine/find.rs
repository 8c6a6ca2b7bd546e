//! Which block to go on with: found in the jump cache or among the blocks, or made.

use iced_x86::CpuidFeature;
use strata_memory::PAGE_SIZE;

use super::{CACHE_RESERVE, Cpu, MAX_INSTRUCTION, Shape};
use crate::blocks::Key;
use crate::exception::Exception;
use crate::mmu::{JumpEntry, apart_table, jump_table};
use crate::segmentation::Legacy;
use crate::state::{DRAFT_RUNS, cr0, cr4, draft_counter};
use crate::translate::lower::Mode;
use crate::translate::{Source, translate};

impl Cpu {
    pub(super) fn mode(&self, shape: Shape) -> Mode {
        let state = &self.core.state;
        let extended = if state.cr0 & (cr0::EM | cr0::TS) != 0 {
            0
        } else if state.cr4 & cr4::OSFXSR == 0 {
            1
        } else if state.cr4 & cr4::OSXSAVE == 0 || state.xcr0 & 6 != 6 {
            2
        } else {
            3
        };
        let own_tsc = self.core.clock.is_none();
        let tsc = own_tsc && (!self.core.user() || state.cr4 & cr4::TSD == 0);
        Mode {
            user: self.core.user(),
            extended,
            tsc,
            aligned: self.core.checks_alignment(),
            single: shape == Shape::Single,
            apart: shape == Shape::Apart,
            middle: matches!(state.cpl, 1 | 2),
            smap: state.cr4 & cr4::SMAP != 0,
            open: self.core.opens_user_pages(),
            legacy: None,
        }
    }

    /// As `mode`, outside of 64-bit mode.
    pub(super) fn legacy_mode(&mut self, shape: Shape) -> Option<Mode> {
        let legacy = self.core.state.legacy()?;
        let mut mode = Mode {
            legacy: Some(legacy),
            ..self.mode(shape)
        };
        if self.legacy_modes.len() >= usize::from(u16::MAX) {
            self.empty_cache();
        }
        let next = self.legacy_modes.len() as u16 + 1;
        let tag = *self.legacy_modes.entry(mode).or_insert(next);
        mode.legacy = Some(Legacy { tag, ..legacy });
        Some(mode)
    }

    /// Where to enter for where the guest is: from the jump cache, else `find_block`.
    pub(super) fn find_entry(&mut self, shape: Shape) -> Result<u64, Exception> {
        if !self.core.state.is_long_code() {
            return self.find_legacy_entry(shape);
        }
        let rights = self.core.current_rights();
        let state = &self.core.state;
        let aligned = self.core.checks_alignment();
        let controls = (
            state.cr0 & (cr0::EM | cr0::TS),
            state.cr4,
            state.xcr0,
            aligned,
            // these share the jump cache of ring 0
            matches!(state.cpl, 1 | 2),
        );
        if controls != self.controls {
            // blocks depend on these through their mode, which jump caches do not tell
            self.controls = controls;
            self.core.flush_jumps();
        }
        let rip = self.core.state.rip;
        match self.core.space().jump(jump_table(rights, false), rip) {
            Some(entry) if shape == Shape::Whole => Ok(entry),
            _ => Ok(self.find_block(shape)?.1),
        }
    }

    /// As `find_entry`, outside of 64-bit mode.
    pub(super) fn find_legacy_entry(&mut self, shape: Shape) -> Result<u64, Exception> {
        self.core.state.rip &= u64::from(u32::MAX);
        let rip = self.core.state.rip;
        let Some(mode) = self.legacy_mode(shape) else {
            return Ok(self.find_block(shape)?.1);
        };
        let known = mode.legacy.and_then(|legacy| {
            let space = self.core.space();
            space.jump(mode.jumps(), legacy.jump_key(rip))
        });
        match known {
            Some(entry) if shape == Shape::Whole => Ok(entry),
            _ => Ok(self.find_block_in(mode)?.1),
        }
    }

    /// The block for where the guest is, made if need be: its number and entry address.
    pub(super) fn find_block(&mut self, shape: Shape) -> Result<(u32, u64), Exception> {
        let mode = self.legacy_mode(shape).unwrap_or_else(|| self.mode(shape));
        self.find_block_in(mode)
    }

    pub(super) fn find_block_in(&mut self, mode: Mode) -> Result<(u32, u64), Exception> {
        let rip = self.core.state.rip;
        let first = mode.linear(rip);
        if mode.legacy.is_some_and(|l| rip > l.code_limit.into()) {
            return Err(Exception::general_protection(0));
        }
        let (physical, global) = self.core.fetch_address(first)?;
        let mut key = Key {
            physical,
            second: None,
            rip,
            mode,
        };
        let mut number = self.blocks.find(&key);
        if number.is_none() {
            number = Some(self.make_block(&mut key)?);
        }
        let number = number.unwrap_or_default();
        let entry = self.cache.base() + u64::from(self.blocks.entry(number));
        if !mode.single {
            let last = first.wrapping_add(self.blocks.length(number).max(1) - 1);
            let line = JumpEntry {
                pc: mode.jump_key(rip),
                code: entry,
            };
            let table = if mode.apart {
                apart_table(mode.rights())
            } else {
                mode.jumps()
            };
            self.core.space().insert_jump(
                table,
                line,
                (first, last),
                global && self.blocks.key(number).second.is_none(),
            );
        }
        Ok((number, entry))
    }

    /// The cache is full. Where the guest wants the same code again and again, more of it is
    /// used; else it is emptied.
    fn make_room(&mut self) {
        if !self.cache.is_grown() && self.wanted.mostly_again() {
            self.cache.grow();
            return;
        }
        self.empty_cache();
        self.wanted.turn();
    }

    pub(super) fn make_block(&mut self, key: &mut Key) -> Result<u32, Exception> {
        let mut bytes = [0; PAGE_SIZE as usize];
        let first = (PAGE_SIZE - key.physical % PAGE_SIZE) as usize;
        let allowed = key.mode.code_left(key.rip);
        let first = first.min(1024).min(allowed);
        self.fetch(key.physical, &mut bytes[..first]);
        if self.cache.free() < CACHE_RESERVE {
            self.make_room();
        }
        if let Some(number) = self.place(key, &bytes[..first]) {
            return Ok(number);
        }
        if first == allowed {
            // it reaches beyond the code segment
            return Err(Exception::general_protection(0));
        }
        // the first instruction goes on in the next page
        let next = key.mode.next_page(key.rip);
        let (second, _) = self.core.fetch_address(next)?;
        key.second = Some(second);
        if let Some(number) = self.blocks.find(key) {
            return Ok(number);
        }
        let end = allowed.min(first + MAX_INSTRUCTION);
        self.fetch(second, &mut bytes[first..end]);
        // sixteen bytes decide even an instruction that is too long
        self.place(key, &bytes[..end])
            .ok_or_else(|| Exception::general_protection(0))
    }

    pub(crate) fn fetch(&self, physical: u64, bytes: &mut [u8]) {
        match self.core.memory.host_ptr(physical, bytes.len() as u64) {
            // SAFETY: the range is guest RAM, mapped while `self.core.memory` lives.
            Some(host) => unsafe {
                std::ptr::copy_nonoverlapping(host, bytes.as_mut_ptr(), bytes.len());
            },
            // what a bus without a device reads as
            None => bytes.fill(0xff),
        }
    }

    pub(super) fn place(&mut self, key: &Key, bytes: &[u8]) -> Option<u32> {
        let ripe = self.ripe.take_if(|old| self.blocks.key(*old) == *key);
        let draft = self.drafts && ripe.is_none() && key.second.is_none() && key.mode.has_drafts();
        if !draft {
            // whole cache lines keep a block's patched entry in one of them
            let padding = (16 - self.cache.used() % 16) % 16;
            self.cache.append(&[0xcc; 16][..padding]);
        }
        let host = self.cache.base() + self.cache.used() as u64;
        let table = &self.core.cpuid;
        // whoever spins may be waiting for a vCPU that the host does not run
        let spins = !self.core.seat.is_single();
        // an instruction that crosses a page is a block of its own
        let crossing = key.second.is_some();
        let mode = Mode {
            single: key.mode.single || crossing && key.mode.legacy.is_some(),
            ..key.mode
        };
        let end = key.physical + bytes.len() as u64;
        let roaming = if mode.user {
            self.roaming.within(key.physical..end)
        } else {
            Vec::new()
        };
        let source = Source {
            start: key.rip,
            bytes,
            mode,
            crossing,
            draft,
            roaming: &roaming,
        };
        let translated = translate(
            &source,
            &mut self.tools,
            &self.thunks,
            host,
            &self.blocks.next(),
            |feature| table.offered(feature) && !(spins && feature == CpuidFeature::PAUSE),
        )?;
        let start = self.cache.append(&translated.lowered.code);
        self.statistics.guest_bytes += u64::from(translated.length);
        self.statistics.host_bytes += translated.lowered.code.len() as u64;
        let number = self.blocks.add(*key, draft, translated, start);
        self.wanted.note(key.physical ^ key.rip.rotate_left(32));
        if let Some(old) = ripe {
            self.blocks.adopt(&mut self.cache, old, number);
        }
        self.statistics.blocks += 1;
        self.mark_code(number, bytes);
        Some(number)
    }

    /// Has stores to the bytes of a new block noticed. If they are no longer those that it
    /// was made from, it is thrown away before the next block runs.
    pub(super) fn mark_code(&mut self, number: u32, bytes: &[u8]) {
        let ranges = self.blocks.ranges(number);
        for (address, size) in ranges.into_iter().filter(|r| r.1 > 0) {
            self.core.mark_code(address, size);
        }
        if self.core.seat.is_single() {
            return;
        }
        let mut made_from = bytes;
        for (address, size) in ranges.into_iter().filter(|r| r.1 > 0) {
            let mut now = [0; PAGE_SIZE as usize];
            let now = &mut now[..size as usize];
            self.fetch(address, now);
            let (before, rest) = made_from.split_at(size as usize);
            made_from = rest;
            if now != before {
                self.core.stale.push((address, size));
                self.core.look_up();
            }
        }
    }

    /// The address behind the look at the attention word of the block that begins at `entry`.
    pub(super) fn behind_check(&self, entry: u64) -> u64 {
        let offset = entry.wrapping_sub(self.cache.base()) as u32;
        let number = self.blocks.number_at(offset);
        number.map_or(entry, |number| {
            self.cache.base() + u64::from(self.blocks.behind_check(number))
        })
    }

    /// A draft was left where it begins. One that was counted out is thrown away, and made
    /// anew as a whole.
    pub(super) fn leave_draft(&mut self) {
        let address = self.core.state.temp[0];
        let offset = address.wrapping_sub(self.cache.base()) as u32;
        let Some(number) = self.blocks.number_at(offset.wrapping_sub(1)) else {
            return;
        };
        let key = self.blocks.key(number);
        self.core.state.rip = key.rip;
        if !self.blocks.is_alive(number) {
            self.blocks.unchain(&mut self.cache, number);
            return;
        }
        let counter = &mut self.core.state.drafts[draft_counter(address)];
        if *counter == 0 {
            *counter = DRAFT_RUNS;
            self.blocks.retire(&mut self.cache, number);
            self.core.forget_jump(key.rip);
            self.ripe = Some(number);
        }
    }

    /// Chains the exit that was just taken to the block for `rip`.
    pub(super) fn link(&mut self) {
        let stub = self.core.state.temp[0].wrapping_sub(self.cache.base());
        let Some(exit) = self.blocks.exit_at(stub as u32) else {
            return;
        };
        let flushes = self.statistics.flushes;
        // a fault is met again, and delivered, in the next round
        if let Ok((target, _)) = self.find_block(Shape::Whole)
            && flushes == self.statistics.flushes
            && self.blocks.exit_alive(exit)
        {
            let rights = self.core.current_rights();
            let thunk = self.thunks.unchained[rights as usize];
            let unchained = (thunk - self.cache.base()) as u32;
            let legacy = self.blocks.key(target).mode.legacy.is_some();
            let unchained = (!legacy).then_some(unchained);
            self.blocks.chain(&mut self.cache, exit, target, unchained);
        }
    }
}
