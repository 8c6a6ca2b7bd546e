//! Copying what is on one disk to another, leaving out what is zeroes.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use crate::error::{Error, Result};
use crate::{Buffers, Disk};

/// Bytes copied at once.
const PIECE: u64 = 2 << 20;
/// Zeroes in data are looked for in parts of so many bytes.
const GRAIN: usize = 4096;
/// Threads that copy.
const THREADS: usize = 4;

/// What a copy did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Bytes that were written.
    pub data: u64,
    /// Bytes that were left out or made zeroes.
    pub zeroes: u64,
}

/// Copies all of `from` to `to`, which is at least as large. What is `blank` on the other side is
/// zeroes already. `progress` is told how many bytes are done.
pub fn copy(
    from: &dyn Disk,
    to: &dyn Disk,
    blank: bool,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Copied> {
    let put = |at: u64, part: Part| match part {
        Part::Zeroes(_) if blank => Ok(()),
        Part::Zeroes(length) => to.write_zeroes(at, length, true),
        Part::Data(bytes) => to.write(at, Buffers::from(bytes)),
    };
    each_part(from, 0..from.size(), THREADS, progress, &put)
}

/// Bytes of a disk, as they are handed on.
pub(crate) enum Part<'a> {
    /// So many zeroes.
    Zeroes(u64),
    /// These.
    Data(&'a mut [u8]),
}

/// Reads a range of a disk and hands it on, in pieces that come in any order if there are several
/// threads. `progress` is told how many bytes of the range are done.
pub(crate) fn each_part(
    from: &dyn Disk,
    range: Range<u64>,
    threads: usize,
    progress: &(dyn Fn(u64) + Sync),
    put: &(dyn Fn(u64, Part) -> Result<()> + Sync),
) -> Result<Copied> {
    let (next, done) = (AtomicU64::new(range.start), AtomicU64::new(0));
    let (data, zeroes) = (AtomicU64::new(0), AtomicU64::new(0));
    let failed = AtomicBool::new(false);
    let error: Mutex<Option<Error>> = Mutex::new(None);
    let work = || {
        let mut bytes = vec![0; PIECE.min(range.end - range.start) as usize];
        while !failed.load(Ordering::Relaxed) {
            let start = next.fetch_add(PIECE, Ordering::Relaxed);
            if start >= range.end {
                break;
            }
            let end = range.end.min(start + PIECE);
            let counts = piece(from, start, end, &mut bytes, put);
            match counts {
                Ok(copied) => {
                    data.fetch_add(copied.data, Ordering::Relaxed);
                    zeroes.fetch_add(copied.zeroes, Ordering::Relaxed);
                    let before = done.fetch_add(end - start, Ordering::Relaxed);
                    progress(before + end - start);
                }
                Err(what) => {
                    failed.store(true, Ordering::Relaxed);
                    if let Ok(mut first) = error.lock() {
                        first.get_or_insert(what);
                    }
                }
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(work);
        }
        work();
    });
    if let Some(error) = error.into_inner().ok().flatten() {
        return Err(error);
    }
    Ok(Copied {
        data: data.into_inner(),
        zeroes: zeroes.into_inner(),
    })
}

fn piece(
    from: &dyn Disk,
    start: u64,
    end: u64,
    bytes: &mut [u8],
    put: &(dyn Fn(u64, Part) -> Result<()> + Sync),
) -> Result<Copied> {
    let mut copied = Copied::default();
    let mut at = start;
    while at < end {
        let extent = from.extent(at, end - at)?;
        let length = extent.length.min(end - at);
        if extent.kind.is_zero() {
            put(at, Part::Zeroes(length))?;
            copied.zeroes += length;
        } else {
            let bytes = &mut bytes[..length as usize];
            from.read(at, Buffers::from(&mut *bytes))?;
            let mut rest = bytes;
            let mut here = at;
            while !rest.is_empty() {
                let (is_zero, length) = run(rest);
                let (part, after) = rest.split_at_mut(length);
                if is_zero {
                    put(here, Part::Zeroes(length as u64))?;
                    copied.zeroes += length as u64;
                } else {
                    put(here, Part::Data(part))?;
                    copied.data += length as u64;
                }
                here += length as u64;
                rest = after;
            }
        }
        at += length;
    }
    Ok(copied)
}

/// Reads all blocks of a disk that are not zeroes, in order, and hands them on with their numbers.
/// The last is filled up with zeroes.
pub(crate) fn each_block(
    from: &dyn Disk,
    block: u64,
    progress: &dyn Fn(u64),
    mut put: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let size = from.size();
    let mut bytes = vec![0; block as usize];
    let mut at = 0;
    while at < size {
        let extent = from.extent(at, size - at)?;
        let skip = extent.length / block * block;
        if extent.kind.is_zero() && skip > 0 {
            at += skip;
        } else {
            let length = block.min(size - at);
            bytes.fill(0);
            from.read(at, Buffers::from(&mut bytes[..length as usize]))?;
            if run(&bytes) != (true, bytes.len()) {
                put(at / block, &bytes)?;
            }
            at += length;
        }
        progress(at.min(size));
    }
    Ok(())
}

/// Whether bytes begin with zeroes, and how far they go on like that, in whole grains.
fn run(bytes: &[u8]) -> (bool, usize) {
    let is_zero = |grain: &[u8]| {
        let (words, rest) = grain.as_chunks::<16>();
        words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|b| *b == 0)
    };
    let mut grains = bytes.chunks(GRAIN);
    let first = grains.next().is_some_and(is_zero);
    let same = grains.take_while(|grain| is_zero(grain) == first);
    let length = GRAIN + same.map(<[u8]>::len).sum::<usize>();
    (first, length.min(bytes.len()))
}
