//! A process that is locked up and then tries something.

// fork(2), and the raw system calls of a process that was taken over.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd};

use strata_sandbox::{Layer, Role, enter};

/// Exit status of a child whose layer the host does not give.
const MISSING: i32 = 255;

/// How an attempt ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// With this error, or 0.
    Errno(i32),
    /// By this signal.
    Signal(i32),
}

/// Runs `attempt` behind `layers` in a process of its own, of this role. Gives how it ended and
/// what it wrote to standard error; `None` where the host does not give one of the layers.
pub(crate) fn told_as(
    role: Role<'_>,
    layers: &[Layer],
    attempt: impl FnOnce() -> i32,
) -> Option<(End, String)> {
    let mut pipe = [0; 2];
    // SAFETY: room for two descriptors, which are owned from here on.
    let (mut reader, writer) = unsafe {
        assert_eq!(libc::pipe2(pipe.as_mut_ptr(), libc::O_CLOEXEC), 0);
        (File::from_raw_fd(pipe[0]), File::from_raw_fd(pipe[1]))
    };
    // SAFETY: the child goes on with one thread and leaves by _exit; the C library keeps its
    // allocator usable across fork.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        // SAFETY: both descriptors are open.
        unsafe { libc::dup2(writer.as_raw_fd(), 2) };
        let status = match enter(layers, role) {
            Ok(report) if report.missing().next().is_none() => attempt(),
            Ok(report) => {
                let reasons: Vec<_> = report.missing().map(|(_, reason)| reason).collect();
                write_all(reasons.join(", ").as_bytes());
                MISSING
            }
            Err(_) => MISSING - 1,
        };
        // SAFETY: ends the child without running what the parent has registered.
        unsafe { libc::_exit(status) };
    }
    drop(writer);
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    let mut status = 0;
    // SAFETY: waits for our child; `status` is valid for the call.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    if libc::WIFSIGNALED(status) {
        return Some((End::Signal(libc::WTERMSIG(status)), text));
    }
    match libc::WEXITSTATUS(status) {
        MISSING => {
            eprintln!("skipped: {text}");
            None
        }
        status => Some((End::Errno(status), text)),
    }
}

fn write_all(text: &[u8]) {
    // SAFETY: the buffer is valid for its length.
    unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
}

fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// The error of a call that returned `result`, or 0.
pub(crate) fn error_of(result: impl Into<i64>) -> i32 {
    if result.into() < 0 { errno() } else { 0 }
}

pub(crate) fn open(path: &CStr, flags: i32) -> i32 {
    // SAFETY: a string with NUL.
    error_of(unsafe { libc::open(path.as_ptr(), flags, 0o600) })
}
