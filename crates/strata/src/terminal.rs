//! The terminal's mode: raw while a guest's console is on it, and restored on every way out.
//!
//! A process has one terminal, so the saved mode is the one global here. A panic hook and the
//! thread that handles signals reach it too; `guard` is for what neither can catch.

use std::io::{self, IsTerminal};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use strata_protocol::Size;

use crate::guard::Guard;

struct Modes {
    before: Termios,
    raw: Termios,
    is_raw: bool,
    /// Restores the terminal where this process cannot; not always there.
    guard: Option<Guard>,
}

impl Modes {
    fn change(&mut self, raw: bool) -> io::Result<()> {
        // The guard learns first of raw and last of restored, so that it never misses raw.
        if let Some(guard) = self.guard.as_mut().filter(|_| raw) {
            guard.mode_is(true);
        }
        let mode = if raw { &self.raw } else { &self.before };
        tcsetattr(io::stdin(), OptionalActions::Now, mode)?;
        if let Some(guard) = self.guard.as_mut().filter(|_| !raw) {
            guard.mode_is(false);
        }
        self.is_raw = raw;
        Ok(())
    }
}

static MODES: Mutex<Option<Modes>> = Mutex::new(None);

fn modes() -> MutexGuard<'static, Option<Modes>> {
    MODES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps the terminal raw; dropping it restores the terminal.
#[derive(Debug)]
pub(crate) struct RawMode(());

impl RawMode {
    /// Makes the terminal on standard input raw; `None` where that is no terminal.
    pub(crate) fn enter(guard: Option<Guard>) -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        *modes() = Some(Modes {
            before,
            raw,
            is_raw: false,
            guard,
        });
        set_raw()?;
        Ok(Some(Self(())))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Makes the terminal raw again after [`restore`], if it ever was.
pub(crate) fn set_raw() -> io::Result<()> {
    if let Some(modes) = &mut *modes() {
        modes.change(true)?;
    }
    Ok(())
}

/// Gives the terminal back as it was found. May be called at any time and more than once.
pub(crate) fn restore() {
    if let Some(modes) = &mut *modes()
        && modes.is_raw
    {
        // Nothing helps where this fails: the terminal is gone.
        let _ = modes.change(false);
    }
}

/// Whether a line feed needs a carriage return before it.
pub(crate) fn is_raw() -> bool {
    modes().as_ref().is_some_and(|modes| modes.is_raw)
}

/// Size of the terminal on standard output, where it is one and knows.
pub(crate) fn size() -> Option<Size> {
    let size = tcgetwinsize(io::stdout()).ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some(Size {
        rows: size.ws_row,
        columns: size.ws_col,
    })
}
