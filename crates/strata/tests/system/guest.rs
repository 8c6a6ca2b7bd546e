//! Running `strata` and looking at what came of it. At most two guests run at once in one
//! test process; under nextest its own test group sees to that.

use std::ffi::OsStr;
use std::io::Write;
use std::path::Path;
use std::process::{self, Command, Output, Stdio};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;

/// Guests that may run at once.
const SLOTS: usize = 2;

static FREE: Mutex<usize> = Mutex::new(SLOTS);
static FREED: Condvar = Condvar::new();

/// The right to run one guest, until dropped.
pub(crate) struct Slot;

impl Slot {
    pub(crate) fn take() -> Self {
        let free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        let mut free = FREED
            .wait_while(free, |free| *free == 0)
            .unwrap_or_else(PoisonError::into_inner);
        *free -= 1;
        Self
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        *FREE.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        FREED.notify_one();
    }
}

/// The binary under test.
pub(crate) const STRATA: &str = env!("CARGO_BIN_EXE_strata");

/// No guest of these tests takes this long; one that hangs fails instead of hanging CI.
const LIMIT: &str = "300s";

/// What a run left.
#[derive(Debug)]
pub(crate) struct Ended {
    /// Exit status of `strata`; `None` if a signal ended it.
    pub(crate) status: Option<i32>,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

impl Ended {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Panics with all that is known unless the status is `expected`.
    #[track_caller]
    pub(crate) fn expect(self, expected: i32) -> Self {
        assert_eq!(
            self.status,
            Some(expected),
            "status {:?}\nstdout: {}\nstderr: {}",
            self.status,
            self.text(),
            self.stderr
        );
        self
    }
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        Self {
            status: output.status.code(),
            stdout: output.stdout,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// Runs `command` as a guest among others, with `input` on its standard input.
pub(crate) fn feed(mut command: Command, input: &[u8]) -> Ended {
    let _slot = Slot::take();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    let mut stdin = child.stdin.take().expect("stdin is a pipe");
    let input = input.to_vec();
    let writer = thread::spawn(move || {
        // A guest may end without reading all of it.
        let _ = stdin.write_all(&input);
    });
    let output = child
        .wait_with_output()
        .expect("the guest can be waited for");
    writer.join().expect("the writer does not panic");
    output.into()
}

/// `strata run` with `options`, among machines of this test's own.
pub(crate) fn run<S: AsRef<OsStr>>(options: &[S]) -> Command {
    let mut command = Command::new(STRATA);
    let state = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("state-{}", process::id()));
    command.env("XDG_STATE_HOME", state);
    command.args(["run", "--accel", "soft"]);
    if !options.iter().any(|o| o.as_ref() == "--timeout") {
        command.args(["--timeout", LIMIT]);
    }
    command.args(options);
    command
}

/// Runs a command in the guest.
pub(crate) fn guest(words: &[&str]) -> Ended {
    guest_with(&[] as &[&str], words, b"")
}

/// Runs a line of shell in the guest.
pub(crate) fn shell(line: &str) -> Ended {
    guest(&["sh", "-c", line])
}

/// Runs a command in the guest with options of `strata run` and input.
pub(crate) fn guest_with<S: AsRef<OsStr>>(options: &[S], words: &[&str], input: &[u8]) -> Ended {
    let mut command = run(options);
    command.arg("--").args(words);
    feed(command, input)
}
