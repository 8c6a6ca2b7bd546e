//! The two system calls that move data between a file and guest memory without a copy.
//! The only `unsafe` code of the device glue; called by [`super::disk`].

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use strata_memory::vm_memory::VolatileSlice;
use strata_memory::vm_memory::bitmap::BitmapSlice;

/// The most buffers the kernel takes in one call (`UIO_MAXIOV`).
const MAX_BUFFERS: usize = 1024;

/// Fills `buffers` in order from byte `offset` of `file`, and tells the memory's bitmap.
/// Returns the bytes read: fewer than asked for at the end of the file or as the kernel
/// likes.
pub(super) fn read_at<B: BitmapSlice>(
    file: &File,
    buffers: &[VolatileSlice<'_, B>],
    offset: u64,
) -> io::Result<usize> {
    let buffers = &buffers[..buffers.len().min(MAX_BUFFERS)];
    let guards: Vec<_> = buffers.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let vectors: Vec<_> = guards
        .iter()
        .map(|g| libc::iovec {
            iov_base: g.as_ptr().cast(),
            iov_len: g.len(),
        })
        .collect();
    // SAFETY: each vector is a mapped, writable range of guest memory that `buffers`
    // borrows and `guards` keep mapped during the call; nobody holds Rust references into
    // guest memory. There are at most MAX_BUFFERS vectors.
    let done = unsafe {
        libc::preadv64(
            file.as_raw_fd(),
            vectors.as_ptr(),
            vectors.len() as i32,
            offset as i64,
        )
    };
    let done = usize::try_from(done).map_err(|_| io::Error::last_os_error())?;
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

/// Writes `buffers` in order to `file`, from byte `offset` on. Returns the bytes written,
/// maybe fewer than asked for.
pub(super) fn write_at<B: BitmapSlice>(
    file: &File,
    buffers: &[VolatileSlice<'_, B>],
    offset: u64,
) -> io::Result<usize> {
    let buffers = &buffers[..buffers.len().min(MAX_BUFFERS)];
    let guards: Vec<_> = buffers.iter().map(VolatileSlice::ptr_guard).collect();
    let vectors: Vec<_> = guards
        .iter()
        .map(|g| libc::iovec {
            iov_base: g.as_ptr().cast_mut().cast(),
            iov_len: g.len(),
        })
        .collect();
    // SAFETY: each vector is a mapped range of guest memory that `buffers` borrows and
    // `guards` keep mapped during the call; the kernel only reads it. There are at most
    // MAX_BUFFERS vectors.
    let done = unsafe {
        libc::pwritev64(
            file.as_raw_fd(),
            vectors.as_ptr(),
            vectors.len() as i32,
            offset as i64,
        )
    };
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}
