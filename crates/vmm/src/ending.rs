//! How a machine ends: the first thing that ends it wins, and a guest that has panicked
//! ends by panic, however it goes down after.

use std::sync::{Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::sync::lock;

/// For how long a panicked guest is quiet before it is taken to have said all.
const QUIET: Duration = Duration::from_secs(2);
/// For how long a panicked guest may go on talking.
const LAST_WORDS: Duration = Duration::from_mins(1);

/// How a machine's life ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest turned its machine off.
    PowerOff,
    /// The guest reset its machine.
    Reset,
    /// The guest wrote this value to the debug-exit port.
    DebugExit(u32),
    /// The guest's kernel panicked.
    Panic,
    /// The guest's CPU could not deliver an exception and shut down.
    TripleFault,
    /// [`Control::stop`](crate::Control::stop) was called.
    Stopped,
    /// The machine cannot go on; the text says why.
    Failed(String),
}

#[derive(Debug, Default)]
struct State {
    outcome: Option<Outcome>,
    panic: Panic,
    panicked_at: Option<Instant>,
    last_output: Option<Instant>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Panic {
    #[default]
    None,
    /// The guest began to report one: if it goes down now, that is why.
    Begun,
    /// It has: nothing but last words is to come.
    Done,
}

/// Where everything that can end a machine reports to.
#[derive(Default)]
pub(crate) struct Ending {
    state: Mutex<State>,
    changed: Condvar,
    /// Keeps vCPUs from running on, before the owner of the machine hears of the end.
    halt: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl Ending {
    /// Sets what keeps the vCPUs from running on once the machine has ended.
    pub(crate) fn set_halt(&self, halt: Box<dyn Fn() + Send + Sync>) {
        let _ = self.halt.set(halt);
    }

    /// Ends the machine, if nothing has before.
    pub(crate) fn end(&self, outcome: Outcome) {
        let mut state = lock(&self.state);
        if state.outcome.is_some() {
            return;
        }
        let went_down = matches!(
            outcome,
            Outcome::PowerOff | Outcome::Reset | Outcome::TripleFault
        );
        let panicked = went_down && state.panic != Panic::None;
        state.outcome = Some(if panicked { Outcome::Panic } else { outcome });
        self.changed.notify_all();
        drop(state);
        if let Some(halt) = self.halt.get() {
            halt();
        }
    }

    /// The guest has begun to report a panic on its console.
    pub(crate) fn panic_begun(&self) {
        let mut state = lock(&self.state);
        if state.panic == Panic::None {
            state.panic = Panic::Begun;
        }
    }

    /// The guest has panicked. It is given time for its last words.
    pub(crate) fn panicked(&self) {
        let mut state = lock(&self.state);
        if state.panic != Panic::Done {
            state.panic = Panic::Done;
            state.panicked_at = Some(Instant::now());
            self.changed.notify_all();
        }
    }

    /// The guest panicked, but a crash kernel takes over.
    pub(crate) fn recovered(&self) {
        let mut state = lock(&self.state);
        state.panic = Panic::None;
        state.panicked_at = None;
    }

    /// The guest wrote to its console.
    pub(crate) fn output(&self) {
        let mut state = lock(&self.state);
        if state.panicked_at.is_some() {
            state.last_output = Some(Instant::now());
        }
    }

    /// Whether the machine has ended.
    pub(crate) fn is_over(&self) -> bool {
        lock(&self.state).outcome.is_some()
    }

    /// Waits for the end.
    pub(crate) fn wait(&self) -> Outcome {
        self.wait_with(QUIET)
    }

    fn wait_with(&self, quiet: Duration) -> Outcome {
        let mut state = lock(&self.state);
        loop {
            if let Some(outcome) = &state.outcome {
                return outcome.clone();
            }
            let Some(panicked_at) = state.panicked_at else {
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let last = state.last_output.unwrap_or(panicked_at).max(panicked_at);
            let until = (last + quiet).min(panicked_at + LAST_WORDS);
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                state.outcome = Some(Outcome::Panic);
                continue;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn the_first_end_wins_and_halts_the_vcpus() {
        let ending = Ending::default();
        let halts = Arc::new(AtomicU32::new(0));
        let counter = Arc::clone(&halts);
        ending.set_halt(Box::new(move || {
            counter.fetch_add(1, Ordering::Relaxed);
        }));
        ending.end(Outcome::Reset);
        ending.end(Outcome::PowerOff);

        assert_eq!(ending.wait(), Outcome::Reset);
        assert_eq!(halts.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_guest_that_goes_down_after_a_panic_panicked() {
        for outcome in [Outcome::PowerOff, Outcome::Reset, Outcome::TripleFault] {
            let ending = Ending::default();
            ending.panic_begun();
            ending.end(outcome);
            assert_eq!(ending.wait(), Outcome::Panic);
        }
    }

    #[test]
    fn a_stop_stays_a_stop_after_a_panic() {
        let ending = Ending::default();
        ending.panicked();
        ending.end(Outcome::Stopped);

        assert_eq!(ending.wait(), Outcome::Stopped);
    }

    #[test]
    fn a_panicked_guest_that_is_quiet_has_ended() {
        let ending = Ending::default();
        ending.panicked();

        assert_eq!(ending.wait_with(Duration::from_millis(1)), Outcome::Panic);
    }

    #[test]
    fn last_words_put_the_end_off() {
        let ending = Ending::default();
        let quiet = Duration::from_millis(200);
        ending.panicked();
        std::thread::sleep(quiet / 2);
        ending.output();
        let last = Instant::now();

        ending.wait_with(quiet);

        assert!(last.elapsed() >= quiet * 9 / 10);
    }

    #[test]
    fn a_crash_kernel_lifts_the_panic() {
        let ending = Ending::default();
        ending.panicked();
        ending.recovered();
        ending.end(Outcome::Reset);

        assert_eq!(ending.wait(), Outcome::Reset);
    }
}
