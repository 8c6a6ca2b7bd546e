//! Guest RAM between fences: pages that fault when they are touched, and beyond them pages
//! with a pattern. Used by `hostile`.

use std::ptr::NonNull;

use strata_memory::{GuestMemory, PAGE_SIZE};

use super::SceneError;

/// Bytes that fault, on either side of RAM: more than any access, or a vector with an index
/// scaled, is large.
const FENCE: usize = 64 << 10;
/// Bytes with the pattern, behind each fence.
const CANARY: usize = 4 * PAGE_SIZE as usize;
const PATTERN: u8 = 0xa5;
/// RAM is where the kernel puts it; if that is beside something else, another place is tried.
const ATTEMPTS: usize = 64;

/// Guest RAM with nothing but fences beside it.
pub(super) struct FencedMemory {
    memory: GuestMemory,
    below: Fence,
    above: Fence,
}

impl FencedMemory {
    pub(super) fn new(size: u64) -> Result<Self, SceneError> {
        // what lay badly is kept meanwhile, and the hole that room was found in filled, so that
        // the next ones lie elsewhere
        let mut kept = Vec::new();
        for _ in 0..ATTEMPTS {
            // room above, which the kernel fills downwards from
            let room = Fence::anywhere();
            let memory = GuestMemory::new(size)?;
            drop(room);
            let base = memory.host_ptr(0, size).ok_or(SceneError::Fences)? as usize;
            let below = base
                .checked_sub(FENCE + CANARY)
                .and_then(|start| Fence::at(start, 0));
            let above = Fence::at(base + size as usize, FENCE);
            if let (Some(below), Some(above)) = (below, above) {
                return Ok(Self {
                    memory,
                    below,
                    above,
                });
            }
            kept.push((memory, Fence::anywhere()));
        }
        Err(SceneError::Fences)
    }

    pub(super) fn guest(&self) -> &GuestMemory {
        &self.memory
    }

    /// Says so if something beside RAM was written to.
    pub(super) fn changed_outside(&self) -> Option<String> {
        let changed = self.below.is_changed() || self.above.is_changed();
        changed.then(|| "host memory beside guest RAM was written to".to_owned())
    }
}

/// [`FENCE`] bytes that fault and [`CANARY`] bytes with the pattern.
struct Fence {
    start: NonNull<u8>,
    canary: usize,
}

impl Fence {
    /// A fence wherever there is room.
    fn anywhere() -> Option<Self> {
        Self::map(0, 0, 0)
    }

    /// A fence at host address `start`, unless something is there. The pattern is `canary`
    /// bytes into it.
    fn at(start: usize, canary: usize) -> Option<Self> {
        Self::map(start, canary, libc::MAP_FIXED_NOREPLACE)
    }

    fn map(start: usize, canary: usize, flags: i32) -> Option<Self> {
        let size = FENCE + CANARY;
        let flags = flags | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: new memory, at a place where there is none.
        let got = unsafe { libc::mmap(start as *mut _, size, libc::PROT_NONE, flags, -1, 0) };
        if got == libc::MAP_FAILED {
            return None;
        }
        let fence = Self {
            start: NonNull::new(got.cast())?,
            canary,
        };
        if start != 0 && got as usize != start {
            return None;
        }
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: pages of the mapping just made, which nobody else knows.
        unsafe {
            let canary = fence.start.as_ptr().add(canary);
            if libc::mprotect(canary.cast(), CANARY, rights) != 0 {
                return None;
            }
            canary.write_bytes(PATTERN, CANARY);
        }
        Some(fence)
    }

    fn is_changed(&self) -> bool {
        // SAFETY: mapped and readable since `map`; whoever might write to it has stopped.
        let bytes =
            unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(self.canary), CANARY) };
        bytes.iter().any(|&byte| byte != PATTERN)
    }
}

impl Drop for Fence {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `map`, of this size.
        unsafe { libc::munmap(self.start.as_ptr().cast(), FENCE + CANARY) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_behind_the_fences_are_found() {
        let memory = FencedMemory::new(0x10000).unwrap();
        assert_eq!(memory.changed_outside(), None);

        // SAFETY: the pattern's last byte.
        unsafe { memory.above.start.as_ptr().add(FENCE + CANARY - 1).write(0) };

        assert!(memory.changed_outside().is_some());
    }
}
