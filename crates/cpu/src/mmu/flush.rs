//! Which address space is current, and the emptying of what the vCPU remembers of mappings:
//! TLBs, windows and jump caches. Called by `system` and `engine`.

use strata_memory::PAGE_SIZE;

use super::Core;
use super::space::{Rights, window_kind};
use crate::state::{Window, cr4};

/// Which windows to empty.
#[derive(Clone, Copy)]
enum Forget {
    All,
    /// Those of the page at a linear address.
    Page(u64),
    /// Those for stores to a page at a host address.
    Stores(u64),
}

impl Core {
    /// Makes the address space of CR3 current, after CR3 or CR4 were set. `keep`: entries
    /// it may hold from before stay valid (CR3 bit 63 with CR4.PCIDE).
    pub(crate) fn select_space(&mut self, keep: bool) {
        self.forget_windows(Forget::All);
        let pcid = if self.state.cr4 & cr4::PCIDE == 0 {
            0
        } else {
            self.state.cr3 & 0xfff
        };
        self.selections += 1;
        let found = self.spaces.iter().position(|s| s.pcid == Some(pcid));
        let index = found.unwrap_or_else(|| self.free_space());
        let space = &mut self.spaces[index];
        if found.is_none() {
            space.flush(false);
        } else if !keep {
            space.flush(true);
        }
        space.pcid = Some(pcid);
        space.last_used = self.selections;
        self.state.space = space;
    }

    fn free_space(&mut self) -> usize {
        if let Some(new) = self.spaces.add() {
            return new;
        }
        let oldest = self
            .spaces
            .iter()
            .enumerate()
            .min_by_key(|(_, s)| s.last_used);
        oldest.map_or(0, |(index, _)| index)
    }

    /// Empties windows, which hold what TLBs do.
    fn forget_windows(&mut self, which: Forget) {
        match which {
            Forget::All => self.forget_wide_windows(),
            Forget::Page(page) => self.forget_wide_windows_of(page),
            // they know where in guest memory they lead
            Forget::Stores(_) => {}
        }
        let state = &mut *self.state;
        for (kind, used) in state.windows_used.iter_mut().enumerate() {
            let stores = [Rights::Supervisor, Rights::User]
                .iter()
                .any(|rights| window_kind(*rights, true) == Some(kind));
            if matches!(which, Forget::Stores(_)) && !stores {
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
        for space in self.spaces.iter_mut() {
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
        for space in self.spaces.iter_mut() {
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
        for space in self.spaces.iter_mut() {
            space.forget_jump(pc);
        }
    }

    /// Empties all jump caches, when blocks went away.
    pub(crate) fn flush_jumps(&mut self) {
        for space in self.spaces.iter_mut() {
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
        self.forget_wide_stores(physical);
        for space in self.spaces.iter_mut() {
            space.revoke_stores(host as u64);
        }
        self.memory.code().disclaim_stores(cpu, physical);
    }
}
