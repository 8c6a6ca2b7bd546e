//! The pages of the program's own file. Called once, when a process has started.

use std::ffi::{c_int, c_void};

use crate::PAGE_SIZE;

/// The segment may be written to (elf(5)).
const PF_W: u32 = 2;

/// Gives back the pages of the program and its libraries that were needed to start: tables for
/// the loader, the command line's code. Those that are needed again come back from the host's
/// page cache, which has them anyway.
pub fn give_back_program() {
    // SAFETY: the callback follows the protocol of dl_iterate_phdr(3) and takes no data.
    unsafe {
        libc::dl_iterate_phdr(Some(give_back), std::ptr::null_mut());
    }
}

/// Gives back the segments of one object that nobody can have written to.
unsafe extern "C" fn give_back(
    info: *mut libc::dl_phdr_info,
    _size: libc::size_t,
    _data: *mut c_void,
) -> c_int {
    // SAFETY: the loader hands over one object's description, with so many program headers,
    // which stay as they are during the call.
    let (base, headers) = unsafe {
        let info = &*info;
        let count = usize::from(info.dlpi_phnum);
        (
            info.dlpi_addr,
            std::slice::from_raw_parts(info.dlpi_phdr, count),
        )
    };
    for header in headers {
        // What was relocated is in segments that could be written to while that was done.
        if header.p_type != libc::PT_LOAD || header.p_flags & PF_W != 0 {
            continue;
        }
        let begin = (base + header.p_vaddr).next_multiple_of(PAGE_SIZE);
        let end = (base + header.p_vaddr + header.p_memsz) / PAGE_SIZE * PAGE_SIZE;
        if begin < end {
            // SAFETY: the whole pages of a segment that is mapped from its file, privately, and
            // was never written to, as linkers refuse relocations in text (`-z text`): reading
            // them again gives the same bytes. The kernel's own object, the vDSO, refuses, which
            // does no harm.
            unsafe {
                libc::madvise(
                    begin as *mut c_void,
                    (end - begin) as usize,
                    libc::MADV_DONTNEED,
                );
            }
        }
    }
    0
}
