//! Memory for translated code: one memfd mapped twice, writable here and executable there,
//! so no address is ever both.

use std::io;
use std::os::fd::AsRawFd;

use crate::memfd::memfd;

/// How much of a cache is used at first, in bytes.
const FIRST_LIMIT: usize = 6 << 20;

/// The code cache of one vCPU.
pub(crate) struct CodeCache {
    write: *mut u8,
    execute: *mut u8,
    size: usize,
    /// How much of it is used at most, for now.
    limit: usize,
    used: usize,
}

// SAFETY: the two mappings are owned by this value alone and move with it.
unsafe impl Send for CodeCache {}

impl CodeCache {
    /// Reserves `size` bytes; pages are taken as they are used.
    pub(crate) fn new(size: usize) -> io::Result<Self> {
        let file = memfd(c"strata-code", size)?;
        let map = |protection| {
            // SAFETY: a fresh mapping of a file that this function owns; no address is given.
            let at = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    size,
                    protection,
                    libc::MAP_SHARED,
                    file.as_raw_fd(),
                    0,
                )
            };
            if at == libc::MAP_FAILED {
                Err(io::Error::last_os_error())
            } else {
                Ok(at.cast::<u8>())
            }
        };
        let write = map(libc::PROT_READ | libc::PROT_WRITE)?;
        let execute = map(libc::PROT_READ | libc::PROT_EXEC)?;
        Ok(Self {
            write,
            execute,
            size,
            limit: size.min(FIRST_LIMIT),
            used: 0,
        })
    }

    /// Host address, for execution, of offset 0.
    pub(crate) fn base(&self) -> u64 {
        self.execute as u64
    }

    /// One past the last host address.
    pub(crate) fn end(&self) -> u64 {
        self.base() + self.size as u64
    }

    /// Bytes in use.
    pub(crate) fn used(&self) -> usize {
        self.used
    }

    /// Bytes left.
    pub(crate) fn free(&self) -> usize {
        self.limit.saturating_sub(self.used)
    }

    /// Lets twice as much be used, if there is as much.
    pub(crate) fn grow(&mut self) {
        self.limit = self.size.min(2 * self.limit);
    }

    /// Whether all of it may be used.
    pub(crate) fn is_grown(&self) -> bool {
        self.limit == self.size
    }

    /// Appends code, which must fit, and returns its offset.
    pub(crate) fn append(&mut self, code: &[u8]) -> usize {
        let at = self.used;
        assert!(code.len() <= self.free(), "the caller makes room first");
        // SAFETY: `at + code.len()` is within the writable mapping, checked above; translated
        // code does not run while `self` is borrowed mutably.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.write.add(at), code.len()) };
        self.used += code.len();
        at
    }

    /// Overwrites code at an offset that was appended before.
    pub(crate) fn patch(&mut self, at: usize, code: &[u8]) {
        assert!(at + code.len() <= self.used, "only written code is patched");
        // SAFETY: within the used part of the writable mapping, checked above.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.write.add(at), code.len()) };
    }

    /// Forgets all code from `offset` on.
    pub(crate) fn truncate(&mut self, offset: usize) {
        self.used = self.used.min(offset);
    }
}

impl Drop for CodeCache {
    fn drop(&mut self) {
        // SAFETY: both mappings were made in `new` with this size and nobody runs in them.
        unsafe {
            libc::munmap(self.write.cast(), self.size);
            libc::munmap(self.execute.cast(), self.size);
        }
    }
}
