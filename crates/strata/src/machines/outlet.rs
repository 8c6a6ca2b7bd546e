//! What this process gives a program in a guest: its input, its signals, its terminal's size.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use signal_hook::consts::SIGWINCH;
use signal_hook::iterator::Signals;
use strata_protocol::{Input, MAX_DATA, Size, write};

use super::Fault;
use super::agent::Agent;
use crate::guard::Guard;
use crate::streams::read_stdin;
use crate::terminal::{self, RawMode};

/// The way to the program, for any thread.
#[derive(Debug, Clone)]
pub(super) struct Outlet(Arc<Mutex<UnixStream>>);

impl Outlet {
    pub(super) fn of(agent: &Agent) -> Result<Self, Fault> {
        Ok(Self(Arc::new(Mutex::new(agent.writer()?))))
    }

    /// Whether the other side is still there to hear it.
    pub(super) fn send(&self, input: &Input) -> bool {
        let mut to = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        write(&mut *to, input).is_ok()
    }

    /// Passes on the signals that are `wanted`, and for SIGWINCH the terminal's size. On a terminal
    /// that is raw the keys for signals are bytes like others.
    pub(super) fn pass_signals(&self, wanted: &[i32]) -> Result<(), Fault> {
        let mut signals = Signals::new(wanted).map_err(Fault::host("watch for signals"))?;
        let outlet = self.clone();
        start("signals", move || {
            for signal in &mut signals {
                let input = match signal {
                    SIGWINCH => Input::Resize(size()),
                    number => Input::Signal(number as u8),
                };
                if !outlet.send(&input) {
                    return;
                }
            }
        })
    }

    /// Passes standard input on, of which `choose` may keep some.
    pub(super) fn pass_input(
        &self,
        mut choose: impl FnMut(Input) -> Option<Input> + Send + 'static,
    ) -> Result<(), Fault> {
        let outlet = self.clone();
        start("input", move || {
            let mut piece = vec![0; MAX_DATA];
            loop {
                let count = read_stdin(&mut piece);
                let input = match count {
                    0 => Input::End,
                    _ => Input::Data(piece[..count].to_vec()),
                };
                let is_heard = choose(input).is_none_or(|input| outlet.send(&input));
                if !is_heard || count == 0 {
                    return;
                }
            }
        })
    }
}

fn start(name: &str, act: impl FnOnce() + Send + 'static) -> Result<(), Fault> {
    let started = thread::Builder::new().name(name.to_owned()).spawn(act);
    started.map(drop).map_err(Fault::host("start a thread"))
}

/// Makes the terminal raw until what it gives is dropped, or this process has gone.
pub(super) fn make_raw() -> Result<Option<RawMode>, Fault> {
    let guard = Guard::start().ok();
    RawMode::enter(guard).map_err(Fault::host("make the terminal raw"))
}

/// The terminal's size, or the usual one.
pub(super) fn size() -> Size {
    terminal::size().unwrap_or(Size::USUAL)
}
