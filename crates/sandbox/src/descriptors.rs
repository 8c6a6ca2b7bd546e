//! File descriptors that the process was handed when it was started.

// Descriptors that nobody in the process owns can be closed by number only.
#![allow(unsafe_code)]

use std::fs;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};

use rustix::io::{FdFlags, fcntl_getfd};

/// Closes what the process was handed when it was started: every descriptor without
/// close-on-exec, which Rust sets on all that it opens; the standard streams stay.
pub(crate) fn close_inherited() -> io::Result<()> {
    let mut inherited = Vec::new();
    for entry in fs::read_dir("/proc/self/fd")? {
        let name = entry?.file_name();
        let Some(number) = name.to_str().and_then(|name| name.parse::<RawFd>().ok()) else {
            continue;
        };
        if number <= libc::STDERR_FILENO {
            continue;
        }
        // SAFETY: listed as open, and no other thread is there to close it.
        let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
        if !fcntl_getfd(descriptor)?.contains(FdFlags::CLOEXEC) {
            inherited.push(number);
        }
    }
    for number in &inherited {
        // SAFETY: not opened by this process, so nothing in it owns the descriptor.
        unsafe { rustix::io::close(*number) };
    }
    Ok(())
}
