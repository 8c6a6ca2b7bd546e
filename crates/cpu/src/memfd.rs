//! Memory without a file's name, whose own name the kernel tells in `/proc/PID/maps`. Called by the
//! code cache and by the soft TLBs, both before the process is locked up; maps nothing itself.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;

/// A memfd of `size` bytes, all zeroes, of which pages are taken as they are used.
pub(crate) fn memfd(name: &CStr, size: usize) -> io::Result<File> {
    // SAFETY: the name is NUL-terminated.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just made and is nobody else's.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size as u64)?;
    Ok(file)
}
