//! Files to boot from, which may be pipes or devices and have no size. Read by the loaders;
//! never to an end that a limit does not set.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// Appends a file to `bytes`, but no more of it than makes `bytes` longer than `limit` by one.
pub(super) fn append(path: &Path, limit: u64, bytes: &mut Vec<u8>) -> io::Result<()> {
    let left = (limit + 1).saturating_sub(bytes.len() as u64);
    File::open(path)?.take(left).read_to_end(bytes)?;
    Ok(())
}
