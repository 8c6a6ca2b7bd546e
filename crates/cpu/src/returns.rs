//! The return stacks of a vCPU: host addresses that guest calls come back to.
//!
//! A guest CALL is a host CALL and a guest RET a host RET, so that the processor predicts both.
//! Translated code runs with RSP on these stacks; nothing else but the thunks' few words lies
//! there. What an entry leads to compares where the guest really returns to, so an entry that is
//! lost or too many costs time only. An entry is good while the code is that calls lead to:
//! every way out of translated code empties the stacks.
//!
//! Each of supervisor and ring 3 has its own stack, so that one never returns into the other's
//! code. Below each is a page that cannot be touched; where it is met, the signal handler makes
//! room.
//!
//! ```text
//!   guard │ ◄─ calls ── ring 3 │ bottom │ guard │ ◄─ calls ── supervisor │ bottom │
//! ```

use std::io;

use crate::mmu::Rights;

const GUARD: usize = 4096;
/// Bytes of one stack.
const SIZE: usize = 32 << 10;
/// A stack and its guard.
const STRETCH: usize = GUARD + SIZE;
/// What is kept where a stack is full: more than thunks push.
const KEPT: usize = 256;

/// Number of a stack, by whose calls it is for.
pub(crate) const fn stack_number(rights: Rights) -> usize {
    matches!(rights, Rights::User) as usize
}

/// The memory of both stacks.
pub(crate) struct ReturnStacks {
    start: *mut u8,
}

// SAFETY: the mapping is owned by this value alone and moves with it.
unsafe impl Send for ReturnStacks {}

impl ReturnStacks {
    /// Stacks with nothing on them.
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: a fresh mapping; no address is given.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                2 * STRETCH,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let stacks = Self {
            start: start.cast(),
        };
        for number in 0..2 {
            // SAFETY: within the mapping just made, which nothing uses yet.
            let result = unsafe {
                let stack = start.byte_add(number * STRETCH + GUARD);
                libc::mprotect(stack, SIZE, libc::PROT_READ | libc::PROT_WRITE)
            };
            if result != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(stacks)
    }

    /// What RSP is while stack `number` is empty: where the address of its bottom lies.
    pub(crate) fn base(&self, number: usize) -> u64 {
        self.start as u64 + ((number + 1) * STRETCH - 16) as u64
    }

    /// Sets where a return leads for which stack `number` has no entry.
    pub(crate) fn set_bottom(&mut self, number: usize, code: u64) {
        // SAFETY: the last 16 bytes of a stack, which is mapped writable and aligned.
        unsafe { (self.base(number) as *mut u64).write(code) };
    }

    /// The stacks, for the signal handler.
    pub(crate) fn range(&self) -> Range {
        Range(self.start as usize)
    }
}

impl Drop for ReturnStacks {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this size; translated code does not run any more.
        unsafe { libc::munmap(self.start.cast(), 2 * STRETCH) };
    }
}

/// Where the stacks are.
#[derive(Clone, Copy)]
pub(crate) struct Range(usize);

impl Range {
    /// Makes room if an access to `address` met a guard because the stack that `rsp` points
    /// into is full: moves its newest entries to its bottom, the others are lost. Returns RSP
    /// for the access to be tried again with.
    ///
    /// # Safety
    /// The stacks are mapped, and only the calling thread uses them.
    pub(crate) unsafe fn make_room(self, address: u64, rsp: u64) -> Option<u64> {
        let from = (rsp as usize).checked_sub(self.0)?;
        let met = (address as usize).checked_sub(self.0)?;
        let full = from < 2 * STRETCH
            && (GUARD..GUARD + SIZE / 2).contains(&(from % STRETCH))
            && from / STRETCH == met / STRETCH
            && met % STRETCH < GUARD;
        if !full {
            return None;
        }
        let to = (from / STRETCH + 1) * STRETCH - 16 - KEPT;
        // SAFETY: `from` is in the lower half of a stack, `to` just below its end, both with
        // `KEPT` bytes before the end of the mapping.
        unsafe {
            std::ptr::copy((self.0 + from) as *const u8, (self.0 + to) as *mut u8, KEPT);
        }
        Some((self.0 + to) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fills stack `number` down to its guard with the numbers of its words.
    fn fill(stacks: &ReturnStacks, number: usize) -> u64 {
        let full = stacks.start as u64 + (number * STRETCH + GUARD) as u64;
        for word in 0..SIZE as u64 / 8 - 2 {
            // SAFETY: within the stack, which nothing else uses.
            unsafe { ((full + 8 * word) as *mut u64).write(word) };
        }
        full
    }

    #[test]
    fn the_newest_entries_survive_when_a_stack_is_full() {
        for number in 0..2 {
            let mut stacks = ReturnStacks::new().unwrap();
            stacks.set_bottom(number, 0x1234);
            let full = fill(&stacks, number);

            // SAFETY: the stacks live and nobody else uses them.
            let rsp = unsafe { stacks.range().make_room(full - 8, full) }.unwrap();

            // SAFETY: as above.
            let word = |at: u64| unsafe { *(at as *const u64) };
            for newest in 0..KEPT as u64 / 8 {
                assert_eq!(word(rsp + 8 * newest), newest);
            }
            assert_eq!(rsp + KEPT as u64, stacks.base(number));
            assert_eq!(word(stacks.base(number)), 0x1234);
        }
    }

    #[test]
    fn faults_elsewhere_are_not_for_the_stacks() {
        let stacks = ReturnStacks::new().unwrap();
        let range = stacks.range();
        let full = fill(&stacks, 1);
        for (address, rsp) in [
            (0, full),
            (full - 8, 0),
            (full - 8, stacks.base(1)),
            (full - 8, stacks.start as u64 + GUARD as u64),
            (full, full),
            (u64::MAX, full),
        ] {
            // SAFETY: as above.
            assert_eq!(unsafe { range.make_room(address, rsp) }, None);
        }
    }
}
