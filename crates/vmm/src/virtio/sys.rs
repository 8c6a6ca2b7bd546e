//! The system calls that move data between sockets and guest memory without a copy. Called by
//! [`super::net`] and [`super::share`].

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use strata_memory::vm_memory::VolatileSlice;
use strata_memory::vm_memory::bitmap::BitmapSlice;

/// The most buffers the kernel takes in one call (`UIO_MAXIOV`).
const MAX_BUFFERS: usize = 1024;

/// Fills `buffers` in order with the next message of `socket`, whose rest is lost if it is longer,
/// and tells the memory's bitmap. Returns the bytes of the message, 0 if there will be no more.
pub(super) fn receive<B: BitmapSlice>(
    socket: &OwnedFd,
    buffers: &[VolatileSlice<'_, B>],
) -> io::Result<usize> {
    let descriptor = socket.as_raw_fd();
    fill(buffers, |vectors| {
        // SAFETY: `fill` hands over vectors that the kernel may write to.
        unsafe { libc::readv(descriptor, vectors.as_ptr(), vectors.len() as i32) }
    })
}

/// Lets `call` fill `buffers`, and tells the memory's bitmap what was filled.
fn fill<B: BitmapSlice>(
    buffers: &[VolatileSlice<'_, B>],
    call: impl FnOnce(&[libc::iovec]) -> isize,
) -> io::Result<usize> {
    let buffers = &buffers[..buffers.len().min(MAX_BUFFERS)];
    // Each vector is a mapped, writable range of guest memory that `buffers` borrows and `guards`
    // keep mapped during the call; nobody holds Rust references into guest memory. There are at
    // most MAX_BUFFERS vectors.
    let guards: Vec<_> = buffers.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let vectors: Vec<_> = guards
        .iter()
        .map(|g| libc::iovec {
            iov_base: g.as_ptr().cast(),
            iov_len: g.len(),
        })
        .collect();
    let done = usize::try_from(call(&vectors)).map_err(|_| io::Error::last_os_error())?;
    let mut left = done;
    for buffer in buffers {
        let length = buffer.len().min(left);
        if length == 0 {
            break;
        }
        buffer.bitmap().mark_dirty(0, length);
        left -= length;
    }
    Ok(done)
}

/// Sends `buffers` in order as one message to `socket`.
pub(super) fn send<B: BitmapSlice>(
    socket: &OwnedFd,
    buffers: &[VolatileSlice<'_, B>],
) -> io::Result<usize> {
    let descriptor = socket.as_raw_fd();
    empty(buffers, |vectors| {
        // SAFETY: `empty` hands over vectors that the kernel may read.
        unsafe { libc::writev(descriptor, vectors.as_ptr(), vectors.len() as i32) }
    })
}

/// Sends `head` and then `buffers` in order to a stream; returns how many bytes it took.
pub(super) fn send_behind<B: BitmapSlice>(
    socket: &OwnedFd,
    head: &[u8],
    buffers: &[VolatileSlice<'_, B>],
) -> io::Result<usize> {
    let descriptor = socket.as_raw_fd();
    empty(buffers, |vectors| {
        let head = libc::iovec {
            iov_base: head.as_ptr().cast_mut().cast(),
            iov_len: head.len(),
        };
        let vectors = &vectors[..vectors.len().min(MAX_BUFFERS - 1)];
        let vectors: Vec<_> = [&[head], vectors].concat();
        // SAFETY: `empty` hands over vectors that the kernel may read, and `head` is borrowed.
        unsafe { libc::writev(descriptor, vectors.as_ptr(), vectors.len() as i32) }
    })
}

/// Lets `call` read `buffers`.
fn empty<B: BitmapSlice>(
    buffers: &[VolatileSlice<'_, B>],
    call: impl FnOnce(&[libc::iovec]) -> isize,
) -> io::Result<usize> {
    let buffers = &buffers[..buffers.len().min(MAX_BUFFERS)];
    // Each vector is a mapped range of guest memory that `buffers` borrows and `guards` keep
    // mapped during the call; the kernel only reads it. There are at most MAX_BUFFERS vectors.
    let guards: Vec<_> = buffers.iter().map(VolatileSlice::ptr_guard).collect();
    let vectors: Vec<_> = guards
        .iter()
        .map(|g| libc::iovec {
            iov_base: g.as_ptr().cast_mut().cast(),
            iov_len: g.len(),
        })
        .collect();
    usize::try_from(call(&vectors)).map_err(|_| io::Error::last_os_error())
}
