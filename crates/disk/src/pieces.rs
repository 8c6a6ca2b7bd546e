//! A range of a disk, handed out in pieces to the threads that copy it.
//!
//! Two threads do for data that is only moved: one reads while the other writes, and a third would
//! wait for its turn to write. What has to be unpacked, or packed,
//! is worth a thread for each CPU.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, Scope};

use crate::copy::Copied;
use crate::error::{Error, Result};
use crate::{Disk, ExtentKind};

/// Bytes of a piece, at least: a large page of x86, written whole at a multiple of its size, so that the
/// host's page cache can take one such page for it and not many small ones.
const PIECE: u64 = 2 << 20;
/// How far ahead it is asked at once what there is.
const AHEAD: u64 = 1 << 30;
/// The most threads.
const MOST: usize = 8;

/// How many threads copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Crew {
    /// This one alone: the pieces come in order.
    One,
    /// Two, and more for what is compressed.
    Two,
    /// As many as there are CPUs.
    All,
}

impl Crew {
    /// At first, and at most.
    fn sizes(self) -> (usize, usize) {
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        let all = cpus.clamp(2, MOST);
        match self {
            Self::One => (1, 1),
            Self::Two => (2, all),
            Self::All => (all, all),
        }
    }
}

/// Some bytes of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Which.
    pub(crate) range: Range<u64>,
    /// What they are; none, if they are of several kinds.
    pub(crate) kind: Option<ExtentKind>,
}

/// Hands out all of `range` in pieces that begin at multiples of their size: of `unit` or of several
/// such units. Zeroes come in one, however many they are. Each piece is given to `copy` with a buffer
/// that is at least as large, unless it is zeroes; `progress` is told how many bytes of the range are
/// done.
pub(crate) fn each_piece(
    from: &dyn Disk,
    range: Range<u64>,
    unit: u64,
    crew: Crew,
    progress: &(dyn Fn(u64) + Sync),
    copy: &(dyn Fn(&Piece, &mut [u8]) -> Result<Copied> + Sync),
) -> Result<Copied> {
    let (first, most) = crew.sizes();
    let length = range.end.saturating_sub(range.start);
    let work = Work {
        from,
        size: PIECE.next_multiple_of(unit),
        end: range.end,
        cursor: Mutex::new(Cursor {
            at: range.start,
            known: range.start,
            kind: ExtentKind::Absent,
        }),
        buffer: PIECE.next_multiple_of(unit).min(length),
        most,
        threads: AtomicUsize::new(first),
        done: AtomicU64::new(0),
        data: AtomicU64::new(0),
        zeroes: AtomicU64::new(0),
        failed: AtomicBool::new(false),
        error: Mutex::new(None),
        progress,
        copy,
    };
    thread::scope(|scope| {
        for _ in 1..first {
            scope.spawn(|| work.run(scope));
        }
        work.run(scope);
    });
    let error = work.error.into_inner();
    if let Some(error) = error.unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    Ok(Copied {
        data: work.data.into_inner(),
        zeroes: work.zeroes.into_inner(),
    })
}

/// What the threads have in common.
struct Work<'a> {
    from: &'a dyn Disk,
    size: u64,
    end: u64,
    cursor: Mutex<Cursor>,
    buffer: u64,
    most: usize,
    threads: AtomicUsize,
    done: AtomicU64,
    data: AtomicU64,
    zeroes: AtomicU64,
    failed: AtomicBool,
    error: Mutex<Option<Error>>,
    progress: &'a (dyn Fn(u64) + Sync),
    copy: &'a (dyn Fn(&Piece, &mut [u8]) -> Result<Copied> + Sync),
}

/// How far pieces are handed out.
struct Cursor {
    at: u64,
    /// Up to here all is of one kind.
    known: u64,
    kind: ExtentKind,
}

impl Work<'_> {
    fn run<'s>(&'s self, scope: &'s Scope<'s, '_>) {
        let mut bytes = vec![0; self.buffer as usize];
        while !self.failed.load(Ordering::Relaxed) {
            let copied = match self.next() {
                Ok(None) => break,
                Ok(Some(piece)) => {
                    if piece.kind == Some(ExtentKind::Compressed) {
                        self.call_help(scope);
                    }
                    let length = piece.range.end - piece.range.start;
                    (self.copy)(&piece, &mut bytes).map(|copied| (copied, length))
                }
                Err(error) => Err(error),
            };
            match copied {
                Ok((copied, length)) => {
                    self.data.fetch_add(copied.data, Ordering::Relaxed);
                    self.zeroes.fetch_add(copied.zeroes, Ordering::Relaxed);
                    let before = self.done.fetch_add(length, Ordering::Relaxed);
                    (self.progress)(before + length);
                }
                Err(error) => {
                    self.failed.store(true, Ordering::Relaxed);
                    let mut first = self.error.lock().unwrap_or_else(PoisonError::into_inner);
                    first.get_or_insert(error);
                }
            }
        }
    }

    /// One thread more, if there may be.
    fn call_help<'s>(&'s self, scope: &'s Scope<'s, '_>) {
        let more = |threads| (threads < self.most).then_some(threads + 1);
        let called = self
            .threads
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        if called.is_ok() {
            scope.spawn(|| self.run(scope));
        }
    }

    fn next(&self) -> Result<Option<Piece>> {
        let mut cursor = self.cursor.lock().unwrap_or_else(PoisonError::into_inner);
        let at = cursor.at;
        if at >= self.end {
            return Ok(None);
        }
        if at >= cursor.known {
            let extent = self.from.extent(at, (self.end - at).min(AHEAD))?;
            cursor.known = (at + extent.length).min(self.end);
            cursor.kind = extent.kind;
        }
        let whole = (at / self.size + 1) * self.size;
        let (end, kind) = if cursor.kind.is_zero() && whole < cursor.known {
            let rest = if cursor.known == self.end {
                0
            } else {
                cursor.known % self.size
            };
            (cursor.known - rest, Some(cursor.kind))
        } else {
            let end = whole.min(self.end);
            (end, (end <= cursor.known).then_some(cursor.kind))
        };
        cursor.at = end;
        Ok(Some(Piece {
            range: at..end,
            kind,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{HostFile, Raw};

    fn pieces(disk: &Raw, unit: u64) -> Vec<Piece> {
        let all = Mutex::new(Vec::new());
        let take = |piece: &Piece, bytes: &mut [u8]| {
            let length = (piece.range.end - piece.range.start) as usize;
            assert!(piece.kind.is_some_and(ExtentKind::is_zero) || bytes.len() >= length);
            all.lock().unwrap().push(piece.clone());
            Ok(Copied::default())
        };
        each_piece(disk, 0..disk.size(), unit, Crew::One, &|_| {}, &take).unwrap();
        all.into_inner().unwrap()
    }

    #[test]
    fn zeroes_come_at_once_and_data_in_pieces_at_their_multiples() {
        let file = HostFile::new(tempfile::tempfile().unwrap());
        let end = 8 * PIECE + 4096;
        file.set_size(end).unwrap();
        file.write_bytes(3 * PIECE + 8192, &vec![1; PIECE as usize])
            .unwrap();
        let disk = Raw::open(file, false).unwrap();

        let found = pieces(&disk, 4096);

        let ends: Vec<u64> = found.iter().map(|piece| piece.range.end).collect();
        assert_eq!(ends, [3 * PIECE, 4 * PIECE, 5 * PIECE, end]);
        let zero: Vec<bool> = found.iter().map(|piece| piece.kind.is_some()).collect();
        assert_eq!(zero, [true, false, false, true]);
        assert_eq!(pieces(&disk, 4 * PIECE).len(), 3);
    }
}
