//! What the C library's allocator keeps of freed memory. Called once, when a process starts.

/// From this size on a block is a mapping of its own, in bytes: glibc's default.
const LARGE: libc::c_int = 128 << 10;

/// Has every large block given back to the host when it is freed. Left to itself, glibc takes
/// the first large block that is freed (a kernel that was unpacked) for a sign that such blocks
/// come and go, and from then on keeps them.
pub fn give_back_large_blocks() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt(3) sets a number in the allocator, under its lock.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
    }
}
