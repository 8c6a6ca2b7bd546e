//! Copying what is on one disk to another, leaving out what is zeroes.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crate::error::Result;
use crate::pieces::{Crew, Piece, each_piece};
use crate::{Buffers, Disk};

/// Zeroes in data are looked for in parts of so many bytes.
const GRAIN: usize = 4096;

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
    // The kernel has one write a file at a time; a thread that waits for its turn there spins, and
    // takes the CPU from the one that reads.
    let turn = Mutex::new(());
    let put = |at: u64, part: Part| match part {
        Part::Zeroes(_) if blank => Ok(()),
        Part::Zeroes(length) => to.write_zeroes(at, length, true),
        Part::Data(bytes) => {
            let _mine = turn.lock().unwrap_or_else(PoisonError::into_inner);
            to.write(at, Buffers::from(bytes))
        }
    };
    each_part(from, 0..from.size(), to.unit(), Crew::Two, progress, &put)
}

/// Bytes of a disk, as they are handed on.
pub(crate) enum Part<'a> {
    /// So many zeroes.
    Zeroes(u64),
    /// These.
    Data(&'a mut [u8]),
}

/// Reads a range of a disk and hands it on. The arguments are those of [`each_piece`].
pub(crate) fn each_part(
    from: &dyn Disk,
    range: Range<u64>,
    unit: u64,
    crew: Crew,
    progress: &(dyn Fn(u64) + Sync),
    put: &(dyn Fn(u64, Part) -> Result<()> + Sync),
) -> Result<Copied> {
    let copy = |piece: &Piece, bytes: &mut [u8]| {
        let Range { start, end } = piece.range;
        let mut copied = Copied::default();
        let mut at = start;
        while at < end {
            let (length, kind) = if let Some(kind) = piece.kind {
                (end - at, kind)
            } else {
                let extent = from.extent(at, end - at)?;
                (extent.length.min(end - at), extent.kind)
            };
            if kind.is_zero() {
                put(at, Part::Zeroes(length))?;
                copied.zeroes += length;
            } else {
                let bytes = &mut bytes[..length as usize];
                from.read(at, Buffers::from(&mut *bytes))?;
                split(at, bytes, &mut copied, put)?;
            }
            at += length;
        }
        Ok(copied)
    };
    each_piece(from, range, unit, crew, progress, &copy)
}

/// Hands on data, and what is zeroes in it.
fn split(
    mut at: u64,
    mut rest: &mut [u8],
    copied: &mut Copied,
    put: &(dyn Fn(u64, Part) -> Result<()> + Sync),
) -> Result<()> {
    while !rest.is_empty() {
        let (is_zero, length) = run(rest);
        let (part, after) = rest.split_at_mut(length);
        if is_zero {
            put(at, Part::Zeroes(length as u64))?;
            copied.zeroes += length as u64;
        } else {
            put(at, Part::Data(part))?;
            copied.data += length as u64;
        }
        at += length as u64;
        rest = after;
    }
    Ok(())
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
    let mut grains = bytes.chunks(GRAIN);
    let first = grains.next().is_some_and(is_zero);
    let same = grains.take_while(|grain| is_zero(grain) == first);
    let length = GRAIN + same.map(<[u8]>::len).sum::<usize>();
    (first, length.min(bytes.len()))
}

/// Whether all bytes are zeroes.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|b| *b == 0)
}
