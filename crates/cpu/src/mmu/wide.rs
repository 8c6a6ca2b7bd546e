//! Wide windows: rows of pages that places which roam in ring 3's code reach by one distance from
//! guest to host, as if the host had mapped them where the guest has them.
//!
//! Wherever the pages of a row are in guest RAM, they are mapped a second time, side by side. That
//! costs a system call for each run of pages that follow each other in RAM, and the host's page
//! faults, so it happens seldom. Flushes of TLBs empty the windows, which hold what TLBs do; what is
//! mapped stays, for when the row is found as it was.
//!
//! Called by `engine::slow` and `flush`.

use std::collections::VecDeque;
use std::ops::Range;

use strata_memory::{PAGE_SIZE, Stretch};

use super::{Core, Kind, Rights};
use crate::state::{WIDE_MISSES, WIDE_WINDOWS, WideWindow};

/// Bytes of a row, at most.
const MOST: u64 = 256 << 20;
/// Runs of pages in a row, at most.
const MOST_RUNS: usize = 2048;
/// log2 of the bytes of a page that are looked at together, at most.
const PIECE_SHIFT: u32 = 21;

/// What looking up a page costs, in cycles of the TSC.
const LOOK: u64 = 150;
/// What mapping a run costs, and the host's first page fault there.
const MAP: u64 = 12_000;
/// What its other page faults cost, for each page of the host.
const FAULT: u64 = 300;

/// When a window is put where it is missed.
struct Patience {
    /// Misses until Rust is asked.
    misses: u64,
    /// Bytes of a row, at least.
    least: u64,
    /// A window is left alone for so much longer than what was last done for it took.
    stay: u64,
}

impl Patience {
    const USUAL: Self = Self {
        misses: WIDE_MISSES,
        // less than this, the TLB holds anyway
        least: 1 << 20,
        stay: 16,
    };
    const NONE: Self = Self {
        misses: 1,
        least: 2 * PAGE_SIZE,
        stay: 0,
    };
}

/// Which window: whether for stores, and its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wide {
    pub(crate) store: bool,
    pub(crate) number: u8,
}

impl Wide {
    fn all() -> impl Iterator<Item = Self> {
        [false, true].into_iter().flat_map(Self::of_kind)
    }

    fn of_kind(store: bool) -> impl Iterator<Item = Self> {
        (0..WIDE_WINDOWS as u8).map(move |number| Self { store, number })
    }
}

/// What is mapped for each window, for loads and for stores.
pub(super) struct Rows {
    mapped: [[Mapped; WIDE_WINDOWS]; 2],
    patience: Patience,
}

impl Default for Rows {
    fn default() -> Self {
        Self {
            mapped: Default::default(),
            patience: Patience::USUAL,
        }
    }
}

/// What is mapped for a window.
#[derive(Default)]
struct Mapped {
    row: Row,
    stretch: Option<Stretch>,
    /// When pages may be looked up for it again: TSC of the host.
    look: u64,
    /// When it may move.
    shift: u64,
}

/// Pages that follow each other in linear memory.
#[derive(Default)]
struct Row {
    /// Linear address of the first.
    start: u64,
    /// Where they are in RAM.
    runs: VecDeque<Range<u64>>,
    /// Bytes of all.
    size: u64,
    /// log2 of the size of the largest page.
    page_shift: u32,
    /// How many were looked up.
    pieces: u64,
}

impl Row {
    /// Whether accesses may begin at `linear`. Their last bytes are inside, then.
    fn contains(&self, linear: u64) -> bool {
        let last = self.size.checked_sub(PAGE_SIZE);
        last.is_some_and(|last| linear.wrapping_sub(self.start) <= last)
    }

    /// What it takes to map it, in cycles of the TSC.
    fn cost(&self) -> u64 {
        self.runs.len() as u64 * MAP + self.size / PAGE_SIZE * FAULT
    }

    /// Adds what follows at the end, if there is room.
    fn append(&mut self, piece: &Piece) -> bool {
        let Range { start, end } = piece.physical;
        let is_full = self.runs.len() == MOST_RUNS;
        match self.runs.back_mut().filter(|run| run.end == start) {
            Some(run) => run.end = end,
            None if is_full => return false,
            None => self.runs.push_back(start..end),
        }
        self.note(piece);
        true
    }

    /// Adds what precedes the start, if there is room.
    fn prepend(&mut self, piece: &Piece) -> bool {
        let Range { start, end } = piece.physical;
        let is_full = self.runs.len() == MOST_RUNS;
        match self.runs.front_mut().filter(|run| run.start == end) {
            Some(run) => run.start = start,
            None if is_full => return false,
            None => self.runs.push_front(start..end),
        }
        self.start = piece.linear;
        self.note(piece);
        true
    }

    fn note(&mut self, piece: &Piece) {
        self.page_shift = self.page_shift.max(piece.page_shift);
        self.size += piece.size();
        self.pieces += 1;
    }
}

/// A page, or as much of a large one as is looked at together.
struct Piece {
    linear: u64,
    physical: Range<u64>,
    page_shift: u32,
}

impl Core {
    fn wide_window(&mut self, which: Wide) -> &mut WideWindow {
        &mut self.state.wide[usize::from(which.store)][usize::from(which.number)]
    }

    fn mapped(&mut self, which: Wide) -> &mut Mapped {
        &mut self.rows.mapped[usize::from(which.store)][usize::from(which.number)]
    }

    /// Has wide windows put at rows of any length whenever they are missed.
    pub(crate) fn set_impatient(&mut self, on: bool) {
        self.rows.patience = if on { Patience::NONE } else { Patience::USUAL };
        for which in Wide::all() {
            self.wide_window(which).misses = self.rows.patience.misses;
        }
    }

    /// The window that was missed so often that Rust is to look at it, if there is one.
    pub(crate) fn missed_wide_window(&mut self) -> Option<Wide> {
        Wide::all().find(|&which| self.wide_window(which).misses == 0)
    }

    /// A wide window for a place that roams and just was at `linear`, if one is of use there: that
    /// of others that roam there too, or the one that was there for longest.
    pub(crate) fn wide_window_at(&mut self, linear: u64, store: bool, now: u64) -> Option<Wide> {
        let shared = Wide::of_kind(store).find(|&which| self.mapped(which).row.contains(linear));
        if shared.is_some() {
            return shared;
        }
        let oldest = Wide::of_kind(store).min_by_key(|&which| self.mapped(which).shift)?;
        self.fill_wide_window(oldest, linear, now);
        self.mapped(oldest).row.contains(linear).then_some(oldest)
    }

    /// Puts a window that was missed at `linear` where it is of more use.
    pub(crate) fn fill_wide_window(&mut self, which: Wide, linear: u64, now: u64) {
        let Patience {
            misses,
            least,
            stay,
        } = self.rows.patience;
        let window = self.wide_window(which);
        window.misses = misses;
        let is_empty = window.limit == 0;
        if now < self.mapped(which).look {
            return;
        }
        if is_empty && self.mapped(which).row.contains(linear) {
            let row = std::mem::take(&mut self.mapped(which).row);
            let is_same = self.is_still(&row, which.store);
            let mapped = self.mapped(which);
            mapped.look = now + stay * LOOK * row.pieces;
            mapped.row = row;
            if is_same {
                self.open(which);
                return;
            }
        }
        if now < self.mapped(which).shift {
            return;
        }
        let mut row = self.row(linear, which.store);
        let mapped = self.mapped(which);
        mapped.look = now + stay * LOOK * row.pieces;
        if row.size < least {
            return;
        }
        self.forget_wide_window(which);
        let memory = self.memory.clone();
        let mapped = self.mapped(which);
        mapped.shift = now + stay * row.cost();
        mapped.row = Row::default();
        if mapped.stretch.is_none() {
            mapped.stretch = Stretch::new(&memory, MOST as usize).ok();
        }
        let runs = row.runs.make_contiguous();
        // where the host has no addresses left, places do without
        if let Some(Ok(())) = mapped.stretch.as_mut().map(|s| s.map(runs)) {
            mapped.row = row;
            self.open(which);
        }
    }

    /// Lets accesses to the row that is mapped through.
    fn open(&mut self, which: Wide) {
        let Mapped { row, stretch, .. } = self.mapped(which);
        if let Some(stretch) = stretch {
            let (start, limit) = (row.start, row.size - PAGE_SIZE);
            let delta = (stretch.start() as u64).wrapping_sub(start);
            let window = self.wide_window(which);
            *window = WideWindow {
                start,
                delta,
                limit,
                misses: window.misses,
            };
        }
    }

    /// The row that `linear` is in.
    fn row(&mut self, linear: u64, store: bool) -> Row {
        let mut row = Row::default();
        let Some(first) = self.piece(linear, store) else {
            return row;
        };
        row.start = first.linear;
        row.append(&first);
        while let Some(piece) = self.piece(row.start.wrapping_add(row.size), store) {
            if row.size + piece.size() > MOST || !row.append(&piece) {
                break;
            }
        }
        while let Some(piece) = self.piece(row.start.wrapping_sub(1), store) {
            if row.size + piece.size() > MOST || !row.prepend(&piece) {
                break;
            }
        }
        row
    }

    /// Whether its pages are where they were.
    fn is_still(&mut self, row: &Row, store: bool) -> bool {
        let mut linear = row.start;
        row.runs.iter().all(|run| {
            let mut physical = run.start;
            while physical < run.end {
                let Some(piece) = self.piece(linear, store) else {
                    return false;
                };
                let inside = linear - piece.linear;
                if piece.physical.start + inside != physical || piece.page_shift > row.page_shift {
                    return false;
                }
                physical += piece.size() - inside;
                linear = linear.wrapping_add(piece.size() - inside);
            }
            physical == run.end
        })
    }

    /// The page that `linear` is in, or the part of it that is looked at together, if ring 3 may
    /// access it without any change to the page tables and, for stores, without a look at what is
    /// stored to.
    fn piece(&mut self, linear: u64, store: bool) -> Option<Piece> {
        if !self.state.is_long_mode() || !Self::canonical(linear) {
            return None;
        }
        let mapping = self.walk(linear, Kind::Look, Rights::User).ok()?;
        if !mapping.accessed || store && !mapping.writable {
            return None;
        }
        let size = 1_u64 << mapping.page_shift.min(PIECE_SHIFT);
        let physical = mapping.physical & !(size - 1);
        self.memory.host_ptr(physical, size)?;
        let physical = physical..physical + size;
        let cpu = self.seat.index();
        let code = self.memory.code();
        let mut pages = physical.clone().step_by(PAGE_SIZE as usize);
        if store && !pages.all(|page| code.claim_stores(cpu, page)) {
            return None;
        }
        Some(Piece {
            linear: linear & !(size - 1),
            physical,
            page_shift: mapping.page_shift,
        })
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
        self.forget_wide_windows_if(Wide::all(), |row| {
            let page = |address: u64| address >> row.page_shift;
            let last = row.start.wrapping_add(row.size - 1);
            (page(row.start)..=page(last)).contains(&page(linear))
        });
    }

    /// Empties those for stores to the RAM page at `physical`.
    pub(super) fn forget_wide_stores(&mut self, physical: u64) {
        let is_there = |row: &Row| row.runs.iter().any(|run| run.contains(&physical));
        self.forget_wide_windows_if(Wide::of_kind(true), is_there);
    }

    fn forget_wide_windows_if(
        &mut self,
        windows: impl Iterator<Item = Wide>,
        gone: impl Fn(&Row) -> bool,
    ) {
        for which in windows {
            if self.wide_window(which).limit != 0 && gone(&self.mapped(which).row) {
                self.forget_wide_window(which);
            }
        }
    }
}

impl Piece {
    fn size(&self) -> u64 {
        self.physical.end - self.physical.start
    }
}
