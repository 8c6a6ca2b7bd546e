//! Watches over a running machine: signals, the timeout, the user's quit, a closed output.
//!
//! The first of these stops the machine and is remembered as the reason. One thread takes the
//! events; another turns signals into events.

use std::io;
use std::process;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use signal_hook::consts::{
    SIGCONT, SIGHUP, SIGINT, SIGPIPE, SIGQUIT, SIGTERM, SIGTSTP, SIGUSR1, SIGUSR2, SIGWINCH,
};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

use crate::command::Control;
use crate::exit::End;
use crate::report;
use crate::terminal;

/// How long a stopped machine may take to end before the process ends without it.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why a machine is to be stopped from outside.
#[derive(Debug)]
pub(crate) enum Stop {
    /// Ctrl-A x.
    Quit,
    /// A signal to this process.
    Signal(i32),
    /// The time of `--timeout` is over.
    Timeout(Duration),
    /// Whoever read our output has gone, as in `strata run | head`.
    ReaderGone,
    /// Output could not be written: what, and why.
    OutputFailed(&'static str, io::Error),
}

impl Stop {
    /// How a run that ends for this reason ends.
    pub(crate) fn end(&self) -> End {
        match self {
            Self::Quit => End::Done,
            Self::Signal(number) => End::Signal(*number),
            Self::Timeout(_) => End::Timeout,
            // What a program gets that does not catch the signal.
            Self::ReaderGone => End::Signal(SIGPIPE),
            Self::OutputFailed(..) => End::MachineFailed,
        }
    }

    /// What to tell the user, where there is something to tell.
    pub(crate) fn message(&self) -> Option<String> {
        match self {
            Self::Timeout(time) => Some(format!(
                "the machine was stopped: the {time:?} of --timeout are over"
            )),
            Self::OutputFailed(what, error) => Some(format!(
                "the machine was stopped: cannot write {what}: {error}"
            )),
            Self::Quit | Self::Signal(_) | Self::ReaderGone => None,
        }
    }
}

/// Gives reasons to stop to the [`Supervisor`]. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Stopper(Sender<Stop>);

impl Stopper {
    /// Asks for the machine to be stopped. Later reasons are ignored.
    pub(crate) fn stop(&self, reason: Stop) {
        // Nobody listens any more once the machine has ended.
        let _ = self.0.send(reason);
    }
}

/// Receives reasons to stop, before and while the machine runs.
#[derive(Debug)]
pub(crate) struct Supervisor {
    receiver: Receiver<Stop>,
    stopper: Stopper,
    reason: Arc<OnceLock<Stop>>,
}

impl Supervisor {
    pub(crate) fn new() -> Self {
        let (sender, receiver) = mpsc::channel();
        Self {
            receiver,
            stopper: Stopper(sender),
            reason: Arc::default(),
        }
    }

    pub(crate) fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// Catches signals, which wait until [`Caught::watch`] looks at them.
    pub(crate) fn catch_signals(&self, target: SignalTarget) -> io::Result<Caught> {
        let mut wanted = vec![SIGINT, SIGTERM, SIGHUP, SIGQUIT, END.as_raw()];
        match &target {
            SignalTarget::Terminal(_) => wanted.extend([SIGTSTP, SIGCONT, SIGWINCH]),
            SignalTarget::Command(_) => wanted.extend([SIGUSR1, SIGUSR2]),
            SignalTarget::Nobody => {}
        }
        Ok(Caught {
            signals: Signals::new(wanted)?,
            stopper: self.stopper(),
            target,
        })
    }

    /// Begins to act: calls `stop_machine` on the first reason, or when `timeout` is over. The
    /// result tells the reason later, if there was one.
    pub(crate) fn start(
        self,
        timeout: Option<Duration>,
        stop_machine: impl FnOnce() + Send + 'static,
    ) -> io::Result<Arc<OnceLock<Stop>>> {
        let reason = Arc::clone(&self.reason);
        let deadline = timeout.and_then(|time| Instant::now().checked_add(time));
        thread::Builder::new()
            .name("supervisor".to_owned())
            .spawn(move || {
                let first = match deadline {
                    None => self.receiver.recv().ok(),
                    Some(deadline) => {
                        let left = deadline.saturating_duration_since(Instant::now());
                        match self.receiver.recv_timeout(left) {
                            Ok(reason) => Some(reason),
                            Err(RecvTimeoutError::Timeout) => timeout.map(Stop::Timeout),
                            Err(RecvTimeoutError::Disconnected) => None,
                        }
                    }
                };
                let Some(first) = first else { return };
                let end = first.end();
                let _ = self.reason.set(first);
                stop_machine();
                thread::sleep(PATIENCE);
                terminal::restore();
                report::say("the machine did not stop when asked to; it is left behind");
                leave(end);
            })?;
        Ok(reason)
    }
}

/// Who is interested in signals beside the machine.
#[derive(Debug)]
pub(crate) enum SignalTarget {
    /// Nobody.
    Nobody,
    /// The command: it gets them as if it ran here.
    Command(Control),
    /// The terminal, which has to be in the right mode whenever the process runs; its size is the
    /// command's, if there is one.
    Terminal(Option<Control>),
}

impl SignalTarget {
    /// Tells the command what size the terminal has now.
    fn resize(&self) {
        if let (Self::Terminal(Some(control)), Some(size)) = (self, terminal::size()) {
            control.resize(size);
        }
    }
}

/// Signals that no longer do what they do by default.
#[derive(Debug)]
pub(crate) struct Caught {
    signals: Signals,
    stopper: Stopper,
    target: SignalTarget,
}

impl Caught {
    /// Passes signals on, or turns them into reasons to stop, those too that came before.
    pub(crate) fn watch(mut self) -> io::Result<()> {
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                let mut stopping = false;
                let mut insistence = Insistence::default();
                self.target.resize();
                for signal in &mut self.signals {
                    match (signal, &self.target) {
                        (SIGTSTP, _) => {
                            terminal::restore();
                            let _ = emulate_default_handler(SIGTSTP);
                        }
                        // The size may have changed while nobody looked.
                        (SIGCONT | SIGWINCH, target) => {
                            if signal == SIGCONT {
                                let _ = terminal::set_raw();
                            }
                            target.resize();
                        }
                        (SIGUSR1 | SIGUSR2, SignalTarget::Command(control)) => {
                            control.signal(signal);
                        }
                        // Who asks twice does not want to wait.
                        _ if stopping => leave(End::Signal(end_by(signal))),
                        (number, SignalTarget::Command(control))
                            if number != END.as_raw()
                                && !insistence.is_enough(number)
                                && control.signal(number) => {}
                        _ => {
                            stopping = true;
                            self.stopper.stop(Stop::Signal(end_by(signal)));
                        }
                    }
                }
            })
            .map(drop)
    }
}

/// What ends a machine whether its command would or not. Nobody else sends it.
pub(crate) const END: Signal = Signal::POWER;

/// By which signal a process ended that this one stopped.
fn end_by(signal: i32) -> i32 {
    if signal == END.as_raw() {
        SIGTERM
    } else {
        signal
    }
}

/// Signals that are to end a command come too close together to mean anything else.
const SOON: Duration = Duration::from_secs(2);

/// Remembers how often the command was told to end, and did not.
#[derive(Debug, Default)]
struct Insistence {
    last: Option<Instant>,
    times: u8,
}

impl Insistence {
    /// Whether a third such signal follows soon on two others. The second says so.
    fn is_enough(&mut self, signal: i32) -> bool {
        if !matches!(signal, SIGINT | SIGTERM) {
            return false;
        }
        let now = Instant::now();
        if self.last.is_none_or(|last| now.duration_since(last) > SOON) {
            self.times = 0;
        }
        self.last = Some(now);
        self.times += 1;
        if self.times == 2 {
            // Where nobody reads what is said, signals are looked at all the same.
            let say =
                || report::say("the command was told and goes on; once more ends the machine");
            let _ = thread::Builder::new().spawn(say);
        }
        self.times > 2
    }
}

/// Ends the process at once, the terminal restored.
fn leave(end: End) -> ! {
    terminal::restore();
    process::exit(i32::from(end.status()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a supervisor until it stops its machine; gives the reason.
    fn reason_of(timeout: Option<Duration>, reasons: Vec<Stop>) -> End {
        let supervisor = Supervisor::new();
        let stopper = supervisor.stopper();
        let (sender, stopped) = mpsc::channel();
        for reason in reasons {
            stopper.stop(reason);
        }
        let reason = supervisor
            .start(timeout, move || sender.send(()).unwrap())
            .unwrap();
        stopped.recv().unwrap();
        reason.get().unwrap().end()
    }

    #[test]
    fn the_first_reason_counts() {
        let reasons = vec![Stop::Signal(SIGTERM), Stop::Quit];
        assert_eq!(reason_of(None, reasons), End::Signal(SIGTERM));
    }

    #[test]
    fn the_machine_is_stopped_when_its_time_is_over() {
        let end = reason_of(Some(Duration::from_millis(5)), vec![]);
        assert_eq!(end, End::Timeout);
    }

    #[test]
    fn a_quit_before_the_timeout_is_no_timeout() {
        let end = reason_of(Some(Duration::from_hours(1)), vec![Stop::Quit]);
        assert_eq!(end, End::Done);
    }
}
