//! What the process was handed when it was started: file descriptors and the environment.

// Descriptors that nobody in the process owns can be closed by number only, and the strings of
// the environment belong to nobody.
#![allow(unsafe_code)]

use std::fs;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::ptr;

use rustix::io::{FdFlags, fcntl_getfd};

/// Closes what the process was handed when it was started: every descriptor without
/// close-on-exec, which Rust sets on all that it opens; the standard streams stay.
pub(crate) fn close_descriptors() -> io::Result<()> {
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

unsafe extern "C" {
    /// The environment as the C library has it: strings, and a null pointer after the last.
    static environ: *mut *mut libc::c_char;
}

/// Overwrites the environment, where credentials often are, with empty strings.
pub(crate) fn wipe_environment() {
    // SAFETY: no other thread is there to change or read the list. Each string is writable
    // memory (of the process's stack, or allocated by setenv) and stays a string, an empty one,
    // for whoever has kept a pointer to it; Rust keeps no references into them.
    unsafe {
        let mut entry = environ;
        while !entry.is_null() && !(*entry).is_null() {
            let length = libc::strlen(*entry);
            ptr::write_bytes(*entry, 0, length);
            entry = entry.add(1);
        }
    }
}
