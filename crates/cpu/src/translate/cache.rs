//! Memory for translated code: one memfd mapped twice, writable here and executable there,
//! so no address is ever both.

use std::io;

/// The code cache of one vCPU.
pub(crate) struct CodeCache {
    write: *mut u8,
    execute: *mut u8,
    size: usize,
    used: usize,
}

// SAFETY: the two mappings are owned by this value alone and move with it.
unsafe impl Send for CodeCache {}

impl CodeCache {
    /// Reserves `size` bytes; pages are taken as they are used.
    pub(crate) fn new(size: usize) -> io::Result<Self> {
        // SAFETY: the name is a NUL-terminated literal.
        let fd = unsafe { libc::memfd_create(c"strata-code".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let map = |protection| {
            // SAFETY: a fresh mapping of a file that this function owns; no address is given.
            let at = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    size,
                    protection,
                    libc::MAP_SHARED,
                    fd,
                    0,
                )
            };
            if at == libc::MAP_FAILED {
                Err(io::Error::last_os_error())
            } else {
                Ok(at.cast::<u8>())
            }
        };
        // SAFETY: `fd` is ours; it is closed once, after both mappings were tried.
        let result = unsafe {
            if libc::ftruncate(fd, size as libc::off_t) == 0 {
                map(libc::PROT_READ | libc::PROT_WRITE)
                    .and_then(|w| Ok((w, map(libc::PROT_READ | libc::PROT_EXEC)?)))
            } else {
                Err(io::Error::last_os_error())
            }
        };
        // SAFETY: as above.
        unsafe { libc::close(fd) };
        let (write, execute) = result?;
        Ok(Self {
            write,
            execute,
            size,
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
        self.size - self.used
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
