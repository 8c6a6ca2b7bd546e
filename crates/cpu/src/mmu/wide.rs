//! Wide windows: rows of large pages that places which roam in ring 3's code reach by one distance
//! from guest to host, as if the host had mapped them where the guest has them.
//!
//! Wherever the pages of a row are in guest RAM, they are mapped a second time, side by side. That
//! costs a system call a page and the host's page faults, so it happens seldom. Flushes of TLBs empty
//! the windows, which hold what TLBs do; what is mapped stays, for when the row is found again.
//!
//! Called by `engine::slow` and `flush`.

use strata_memory::{PAGE_SIZE, Stretch};

use super::{Core, Kind, Rights};
use crate::state::{WIDE_MISSES, WIDE_WINDOWS, WideWindow};

/// log2 of the bytes of a piece of a row. Of pages that are larger each part is a piece.
const PIECE_SHIFT: u32 = 21;
const PIECE: u64 = 1 << PIECE_SHIFT;
/// Pieces of a row, at most.
const MOST: usize = 128;
/// What mapping a piece costs, in cycles of the TSC, with the host's page faults.
const COST: u64 = 200_000;
/// A window moves to another row when it was where it is for so much longer than the move takes.
const STAY: u64 = 16;

/// Which window: whether for stores, and its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wide {
    pub(crate) store: bool,
    pub(crate) number: u8,
}

impl Wide {
    fn all() -> impl Iterator<Item = Self> {
        (0..2 * WIDE_WINDOWS).map(|n| Self {
            store: n >= WIDE_WINDOWS,
            number: (n % WIDE_WINDOWS) as u8,
        })
    }

    fn index(self) -> (usize, usize) {
        (usize::from(self.store), usize::from(self.number))
    }
}

/// What is mapped for a window.
#[derive(Default)]
pub(super) struct Row {
    /// Guest physical addresses of the pieces.
    pieces: Vec<u64>,
    stretch: Option<Stretch>,
    /// When the window may move: TSC of the host.
    until: u64,
}

/// The rows, in the order of [`Wide::all`].
pub(super) type Rows = [Row; 2 * WIDE_WINDOWS];

impl Core {
    fn wide_window(&mut self, which: Wide) -> &mut WideWindow {
        let (store, number) = which.index();
        &mut self.state.wide[store][number]
    }

    /// The window that was missed so often that Rust is to look at it, if there is one.
    pub(crate) fn missed_wide_window(&mut self) -> Option<Wide> {
        Wide::all().find(|&which| self.wide_window(which).misses == 0)
    }

    /// Puts a window that was missed at `linear` where it is of more use.
    pub(crate) fn fill_wide_window(&mut self, which: Wide, linear: u64, now: u64) {
        let window = self.wide_window(which);
        window.misses = WIDE_MISSES;
        let is_empty = window.limit == 0;
        let (store, number) = which.index();
        let index = store * WIDE_WINDOWS + number;
        let may_move = now >= self.rows[index].until;
        if !is_empty && !may_move {
            return;
        }
        let (start, pieces) = self.row(linear, which.store);
        if pieces.is_empty() {
            return;
        }
        if pieces != self.rows[index].pieces {
            if !may_move {
                return;
            }
            let until = now + COST * STAY * pieces.len() as u64;
            self.forget_wide_window(which);
            let row = &mut self.rows[index];
            row.until = until;
            row.pieces.clear();
            if row.stretch.is_none() {
                row.stretch = Stretch::new(&self.memory, PIECE, MOST).ok();
            }
            let Some(Ok(())) = row.stretch.as_mut().map(|s| s.map(&pieces)) else {
                // the host has no addresses left: places do without
                return;
            };
            row.pieces = pieces;
        }
        let row = &self.rows[index];
        if let Some(stretch) = &row.stretch {
            let size = row.pieces.len() as u64 * PIECE;
            let host = stretch.start() as u64;
            let window = self.wide_window(which);
            window.start = start;
            window.delta = host.wrapping_sub(start);
            window.limit = size - PAGE_SIZE;
        }
    }

    /// Whether a wide window could be at `linear`, or nearly there.
    pub(crate) fn is_near_large_page(&mut self, linear: u64) -> bool {
        [0, PIECE.wrapping_neg(), PIECE]
            .into_iter()
            .any(|distance| {
                let piece = linear.wrapping_add(distance);
                self.piece(piece, false).is_some()
            })
    }

    /// The row that `linear` is in: its first linear address and where its pieces are.
    fn row(&mut self, linear: u64, store: bool) -> (u64, Vec<u64>) {
        let mut start = linear >> PIECE_SHIFT << PIECE_SHIFT;
        let mut pieces: Vec<u64> = self.piece(start, store).into_iter().collect();
        if pieces.is_empty() {
            return (start, pieces);
        }
        while pieces.len() < MOST {
            let next = start.wrapping_add(pieces.len() as u64 * PIECE);
            let Some(piece) = self.piece(next, store) else {
                break;
            };
            pieces.push(piece);
        }
        let mut before = Vec::new();
        while before.len() + pieces.len() < MOST {
            let Some(piece) = self.piece(start.wrapping_sub(PIECE), store) else {
                break;
            };
            start = start.wrapping_sub(PIECE);
            before.push(piece);
        }
        before.reverse();
        before.append(&mut pieces);
        (start, before)
    }

    /// Where the large page at `linear` is, or the part of it of a piece's size, if ring 3 may access
    /// it without any change to the page tables and, for stores, without a look at what is stored to.
    fn piece(&mut self, linear: u64, store: bool) -> Option<u64> {
        let linear = linear >> PIECE_SHIFT << PIECE_SHIFT;
        if !self.state.is_long_mode() || !Self::canonical(linear) {
            return None;
        }
        let mapping = self.walk(linear, Kind::Look, Rights::User).ok()?;
        let large = mapping.page_shift >= PIECE_SHIFT && mapping.accessed;
        let physical = mapping.physical;
        let ram = large && self.memory.host_ptr(physical, PIECE).is_some();
        if !ram || !store {
            return ram.then_some(physical);
        }
        let cpu = self.seat.index();
        let code = self.memory.code();
        let claimed = mapping.writable
            && (0..PIECE / PAGE_SIZE)
                .all(|page| code.claim_stores(cpu, physical + page * PAGE_SIZE));
        claimed.then_some(physical)
    }

    fn forget_wide_window(&mut self, which: Wide) {
        let window = self.wide_window(which);
        *window = WideWindow {
            misses: window.misses,
            ..WideWindow::NONE
        };
    }

    /// Empties all windows.
    pub(super) fn forget_wide_windows(&mut self) {
        for which in Wide::all() {
            self.forget_wide_window(which);
        }
    }

    /// Empties those that may hold a part of the page, of whatever size, that `linear` is in.
    pub(super) fn forget_wide_windows_of(&mut self, linear: u64) {
        const LARGEST: u32 = 30;
        for which in Wide::all() {
            let window = self.wide_window(which);
            let last = window.start.wrapping_add(window.limit);
            if (window.start >> LARGEST..=last >> LARGEST).contains(&(linear >> LARGEST)) {
                self.forget_wide_window(which);
            }
        }
    }

    /// Empties those for stores to the RAM page at `physical`.
    pub(super) fn forget_wide_stores(&mut self, physical: u64) {
        for which in Wide::all().filter(|which| which.store) {
            let row = &self.rows[WIDE_WINDOWS + usize::from(which.number)];
            if row
                .pieces
                .contains(&(physical >> PIECE_SHIFT << PIECE_SHIFT))
            {
                self.forget_wide_window(which);
            }
        }
    }
}
