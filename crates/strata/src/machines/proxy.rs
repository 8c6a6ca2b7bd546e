//! What this process gives a program in a guest: its input, its signals, its terminal's size.

use std::io::{self, IsTerminal};
use std::os::unix::net::UnixStream;
use std::process;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use signal_hook::consts::{SIGCONT, SIGTSTP, SIGWINCH};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;
use strata_protocol::{Input, MAX_DATA, Size, WINDOW, write};

use super::Fault;
use super::agent::Agent;
use crate::guard::Guard;
use crate::streams::read_stdin;
use crate::terminal::{self, RawMode};

/// The way to the program, for any thread.
#[derive(Debug, Clone)]
pub(super) struct Proxy(Arc<Way>);

#[derive(Debug)]
struct Way {
    to: Mutex<UnixStream>,
    /// How much input may still be sent, bytes; `None` when the guest takes no more of anything.
    window: Mutex<Option<usize>>,
    opened: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Proxy {
    pub(super) fn of(agent: &Agent) -> Result<Self, Fault> {
        Ok(Self(Arc::new(Way {
            to: Mutex::new(agent.writer()?),
            window: Mutex::new(Some(WINDOW)),
            opened: Condvar::new(),
        })))
    }

    /// Whether the other side is still there to hear it. Waits for room for input, and for nothing
    /// else.
    pub(super) fn send(&self, input: &Input) -> bool {
        if let Input::Data(data) = input {
            let is_full = |window: &mut Option<usize>| window.is_some_and(|left| left < data.len());
            let window = lock(&self.0.window);
            let mut window = self
                .0
                .opened
                .wait_while(window, is_full)
                .unwrap_or_else(PoisonError::into_inner);
            let Some(left) = &mut *window else {
                return false;
            };
            *left -= data.len();
        }
        let is_sent = write(&mut *lock(&self.0.to), input).is_ok();
        if !is_sent {
            self.close();
        }
        is_sent
    }

    /// The program has taken so many bytes of its input.
    pub(super) fn taken(&self, count: u32) {
        if let Some(left) = &mut *lock(&self.0.window) {
            *left = left.saturating_add(count as usize).min(WINDOW);
        }
        self.0.opened.notify_all();
    }

    /// The guest has gone: nothing is sent any more.
    pub(super) fn close(&self) {
        *lock(&self.0.window) = None;
        self.0.opened.notify_all();
    }

    /// Passes on the signals that are `wanted`; with `keep_terminal` the terminal's size instead of
    /// SIGWINCH, and its mode is right whenever this process runs. On a terminal that is raw the keys for
    /// signals are bytes like others.
    pub(super) fn pass_signals(&self, wanted: &[i32], keep_terminal: bool) -> Result<(), Fault> {
        let kept: &[i32] = if keep_terminal {
            &[SIGWINCH, SIGTSTP, SIGCONT]
        } else {
            &[]
        };
        let mut signals =
            Signals::new(wanted.iter().chain(kept)).map_err(Fault::host("watch for signals"))?;
        let proxy = self.clone();
        start("signals", move || {
            for signal in &mut signals {
                match signal {
                    SIGTSTP => {
                        terminal::restore();
                        let _ = emulate_default_handler(SIGTSTP);
                    }
                    SIGCONT | SIGWINCH => {
                        // It may have changed while nobody looked.
                        let _ = terminal::set_raw();
                        proxy.send(&Input::Resize(size()));
                    }
                    number => {
                        if !proxy.send(&Input::Signal(number as u8)) {
                            // There is nobody whose it could be but this process.
                            leave(128 + number);
                        }
                    }
                }
            }
        })
    }

    /// Passes standard input on, of which `choose` may keep some. That goes on when nothing can be
    /// sent any more.
    pub(super) fn pass_input(
        &self,
        mut choose: impl FnMut(Input) -> Option<Input> + Send + 'static,
    ) -> Result<(), Fault> {
        let proxy = self.clone();
        start("input", move || {
            let mut piece = vec![0; MAX_DATA];
            loop {
                let count = read_stdin(&mut piece);
                let input = match count {
                    0 => Input::End,
                    _ => Input::Data(piece[..count].to_vec()),
                };
                if let Some(input) = choose(input) {
                    proxy.send(&input);
                }
                if count == 0 {
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

/// Makes the terminal raw until what it gives is dropped, or this process has gone; `None` where
/// standard input is none.
pub(super) fn make_raw() -> Result<Option<RawMode>, Fault> {
    if !io::stdin().is_terminal() {
        return Ok(None);
    }
    let guard = Guard::start().ok();
    RawMode::enter(guard).map_err(Fault::host("make the terminal raw"))
}

/// Ends this process at once, the terminal restored.
pub(super) fn leave(status: i32) -> ! {
    terminal::restore();
    process::exit(status)
}

/// The terminal's size, or the usual one.
pub(super) fn size() -> Size {
    terminal::size().unwrap_or(Size::USUAL)
}
