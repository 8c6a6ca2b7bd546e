//! The guest's serial console on this process's terminal or pipes.
//!
//! ```text
//!  stdin ── keys (terminal only) ── gate ──> Input ──> ttyS0
//!  ttyS0 ──> Output ──> stdout or stderr, log file, the tail kept for error reports
//!                └──> opens the gate when the guest's shell greets
//! ```
//!
//! Both ends run on the machine's I/O threads, never on the one of a vCPU.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use strata_machines::{LogWriter, Stream as LogStream};

use crate::keys::{Key, Keys, Subject};
use crate::report::Stderr;
use crate::streams::{Queue, Stream, read_stdin};
use crate::supervisor::{Stop, Stopper};

/// How much of the console's output is kept for error reports, bytes.
const TAIL_BYTES: usize = 64 << 10;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One stream of what is kept of a machine in the background.
#[derive(Clone)]
pub(crate) struct Ring {
    log: Arc<Mutex<LogWriter>>,
    stream: LogStream,
}

impl Ring {
    /// Keeps the console in `log`.
    pub(crate) fn new(log: LogWriter) -> Self {
        Self {
            log: Arc::new(Mutex::new(log)),
            stream: LogStream::Console,
        }
    }

    /// The same log for another stream.
    pub(crate) fn of(&self, stream: LogStream) -> Self {
        Self {
            log: Arc::clone(&self.log),
            stream,
        }
    }

    fn keep(&mut self, bytes: &[u8]) {
        // A full disk takes the words, and not the machine.
        if let Err(error) = lock(&self.log).write(self.stream, bytes) {
            tracing::debug!(%error, "the log");
        }
    }
}

impl Write for Ring {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.keep(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The last output of the console.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tail(Arc<Mutex<VecDeque<u8>>>);

impl Tail {
    fn add(&self, bytes: &[u8]) {
        let mut kept = lock(&self.0);
        let bytes = &bytes[bytes.len().saturating_sub(TAIL_BYTES)..];
        let excess = (kept.len() + bytes.len()).saturating_sub(TAIL_BYTES);
        kept.drain(..excess);
        kept.extend(bytes);
    }

    /// The last `count` lines, without carriage returns.
    pub(crate) fn lines(&self, count: usize) -> Vec<String> {
        let bytes: Vec<u8> = lock(&self.0).iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<String> = text
            .lines()
            .map(|line| line.trim_end_matches('\r').to_owned())
            .collect();
        lines[lines.len().saturating_sub(count)..].to_vec()
    }
}

/// Where the console's output is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Show {
    /// On standard output: the console is what the run is about.
    Stdout,
    /// On standard error: boot messages beside a command's output.
    Stderr,
    /// Nowhere.
    Hidden,
}

/// Lets input through once the guest is ready for it.
#[derive(Debug, Clone)]
pub(crate) struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    fn new(open: bool) -> Self {
        Self(Arc::new((Mutex::new(open), Condvar::new())))
    }

    fn open(&self) {
        *lock(&self.0.0) = true;
        self.0.1.notify_all();
    }

    fn wait(&self) {
        let is_shut = |open: &mut bool| !*open;
        drop(self.0.1.wait_while(lock(&self.0.0), is_shut));
    }
}

/// What the guest writes on its serial console. Never fails: a lost reader stops the machine.
pub(crate) struct Output {
    show: Show,
    log: Option<File>,
    ring: Option<Ring>,
    tail: Tail,
    gate: Gate,
    /// Text that opens the gate, and how much of it has just been seen.
    greeting: &'static [u8],
    seen: usize,
    stopper: Stopper,
}

impl Output {
    /// `greeting` is the text after which input may go to the guest; at once if empty.
    pub(crate) fn new(
        show: Show,
        log: Option<File>,
        ring: Option<Ring>,
        greeting: &'static str,
        stopper: Stopper,
    ) -> Self {
        Self {
            show,
            log,
            ring,
            tail: Tail::default(),
            gate: Gate::new(greeting.is_empty()),
            greeting: greeting.as_bytes(),
            seen: 0,
            stopper,
        }
    }

    pub(crate) fn tail(&self) -> Tail {
        self.tail.clone()
    }

    pub(crate) fn gate(&self) -> Gate {
        self.gate.clone()
    }

    fn look_for_greeting(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if self.seen == self.greeting.len() {
                return;
            }
            // Enough for a greeting whose first letter does not occur again in it.
            self.seen = if *byte == self.greeting[self.seen] {
                self.seen + 1
            } else {
                usize::from(*byte == self.greeting[0])
            };
            if self.seen == self.greeting.len() {
                self.gate.open();
            }
        }
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.tail.add(bytes);
        self.look_for_greeting(bytes);
        if let Some(log) = &mut self.log
            && let Err(error) = log.write_all(bytes)
        {
            self.log = None;
            self.stopper
                .stop(Stop::OutputFailed("the console log", error));
        }
        if let Some(ring) = &mut self.ring {
            ring.keep(bytes);
        }
        let shown = match self.show {
            Show::Stdout => Stream::Stdout.write(bytes),
            Show::Stderr => Stderr.write_all(bytes),
            Show::Hidden => Ok(()),
        };
        if let Err(error) = shown {
            self.show = Show::Hidden;
            self.stopper.stop(output_lost("the console", error));
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The reason to stop when an output cannot be written.
pub(crate) fn output_lost(what: &'static str, error: io::Error) -> Stop {
    if error.kind() == ErrorKind::BrokenPipe {
        Stop::ReaderGone
    } else {
        Stop::OutputFailed(what, error)
    }
}

/// Standard input for a console that is not on a terminal: all bytes as they are.
pub(crate) struct PipeInput {
    gate: Gate,
}

impl PipeInput {
    pub(crate) fn new(gate: Gate) -> Self {
        Self { gate }
    }
}

impl Read for PipeInput {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.gate.wait();
        Ok(read_stdin(buffer))
    }
}

/// What is typed on the terminal, less the console's own keys.
pub(crate) struct KeyInput {
    gate: Gate,
    typed: Queue,
}

/// What will read the terminal for a [`KeyInput`].
pub(crate) struct Typist {
    stopper: Stopper,
    typed: Sender<Vec<u8>>,
}

impl Typist {
    /// Begins to read the terminal, so that Ctrl-A x works before the guest listens.
    pub(crate) fn start(self) -> io::Result<()> {
        let Self { stopper, typed } = self;
        thread::Builder::new()
            .name("keys".to_owned())
            .spawn(move || {
                let mut keys = Keys::new(Subject::Console);
                let mut buffer = [0; 1024];
                loop {
                    let count = read_stdin(&mut buffer);
                    if count == 0 {
                        return;
                    }
                    let mut send = Vec::with_capacity(count);
                    for byte in &buffer[..count] {
                        match keys.feed(*byte) {
                            Key::Send(byte) => send.push(byte),
                            Key::Leave => stopper.stop(Stop::Quit),
                            Key::Help => {
                                let help = Subject::Console.help();
                                drop(Stream::Stderr.write(help.as_bytes()));
                            }
                            Key::Nothing => {}
                        }
                    }
                    if !send.is_empty() && typed.send(send).is_err() {
                        return;
                    }
                }
            })
            .map(drop)
    }
}

impl KeyInput {
    /// The input, and what is to be started for it.
    pub(crate) fn new(gate: Gate, stopper: Stopper) -> (Self, Typist) {
        let (sender, typed) = mpsc::channel();
        let typist = Typist {
            stopper,
            typed: sender,
        };
        let typed = Queue::from(typed);
        (Self { gate, typed }, typist)
    }
}

impl Read for KeyInput {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.gate.wait();
        self.typed.read(buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervisor::Supervisor;

    fn output(greeting: &'static str) -> Output {
        Output::new(
            Show::Hidden,
            None,
            None,
            greeting,
            Supervisor::new().stopper(),
        )
    }

    fn is_open(gate: &Gate) -> bool {
        *lock(&gate.0.0)
    }

    #[test]
    fn the_gate_opens_at_the_greeting_even_in_pieces() {
        let mut output = output("Strata guest");
        let gate = output.gate();
        output.write_all(b"[ 0.1] boot SStra").unwrap();
        assert!(!is_open(&gate));
        output.write_all(b"ta guest: hello").unwrap();
        assert!(is_open(&gate));
    }

    #[test]
    fn without_a_greeting_the_gate_is_open() {
        assert!(is_open(&output("").gate()));
    }

    #[test]
    fn the_greeting_suits_the_simple_search() {
        let (first, rest) = strata_protocol::GREETING.as_bytes().split_first().unwrap();
        assert!(!rest.contains(first));
    }

    #[test]
    fn the_tail_keeps_the_last_lines_only() {
        let mut output = output("");
        let tail = output.tail();
        for number in 0..20_000 {
            writeln!(output, "line {number}\r").unwrap();
        }
        assert_eq!(tail.lines(2), ["line 19998", "line 19999"]);
        assert!(lock(&tail.0).len() <= TAIL_BYTES);
    }
}
