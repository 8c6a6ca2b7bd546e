//! Running other programs: to their end, with a limit on how long they take and their
//! wall time taken. Called by the commands.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::Error;

/// How a program that was measured ended.
pub(crate) struct Measured {
    /// Wall time of the whole process, from before its start until after its end.
    pub(crate) wall: Duration,
    /// What it wrote to standard output, control characters and all.
    pub(crate) output: String,
    /// What it wrote to standard error.
    pub(crate) errors: String,
}

/// Runs `command` with standard input empty and waits for success; its standard output and
/// error are ours.
pub(crate) fn succeed(what: &str, command: &mut Command) -> Result<(), Error> {
    let status = command.stdin(Stdio::null()).status().map_err(start(what))?;
    if status.success() {
        return Ok(());
    }
    Err(Error::Ended {
        what: what.to_owned(),
        how: format!("failed: {status}"),
    })
}

/// How long a program may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Until it writes something for the first time.
    pub(crate) silence: Duration,
    /// In all.
    pub(crate) total: Duration,
}

/// Runs `command` and gives its output and wall time. It is killed when it exceeds
/// `limits`; that, and any other end but success, is an error with the last lines of its
/// output.
pub(crate) fn measure(
    what: &str,
    command: &mut Command,
    limits: Limits,
) -> Result<Measured, Error> {
    follow(what, command, limits, |_, _| {})
}

/// As [`measure`], and calls `heard` with the process and all that it has written to standard
/// output so far, whenever that has grown.
pub(crate) fn follow(
    what: &str,
    command: &mut Command,
    limits: Limits,
    mut heard: impl FnMut(u32, &[u8]),
) -> Result<Measured, Error> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let begin = Instant::now();
    let mut child = command.spawn().map_err(start(what))?;
    let (signs, life) = mpsc::channel();
    let watchdog = watch(&child, limits, life);
    let errors = child.stderr.take();
    let errors = errors.map(|pipe| thread::spawn(move || drain(pipe, |_| {})));
    let id = child.id();
    let output = child.stdout.take().map(|pipe| {
        drain(pipe, |bytes| {
            heard(id, bytes);
            let _ = signs.send(());
        })
    });
    let output = output.unwrap_or_default();
    let status = child.wait().map_err(start(what))?;
    let wall = begin.elapsed();
    drop(signs);
    let late = watchdog.join().unwrap_or(false);
    let errors = errors.map_or_else(String::new, |t| t.join().unwrap_or_default());
    if status.success() && !late {
        return Ok(Measured {
            wall,
            output,
            errors,
        });
    }
    let how = if late {
        format!("took more than {limits:?}")
    } else {
        format!("failed: {status}")
    };
    let said = output + &errors;
    let lines: Vec<&str> = said.lines().collect();
    let tail = lines[lines.len().saturating_sub(20)..].join("\n");
    Err(Error::Ended {
        what: what.to_owned(),
        how: format!("{how}\n{tail}"),
    })
}

/// Kills `child` when it exceeds `limits`: `signs` of life come with its output, and its end
/// drops their sender. The thread says whether it did.
fn watch(child: &Child, limits: Limits, signs: mpsc::Receiver<()>) -> thread::JoinHandle<bool> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    thread::spawn(move || {
        let begin = Instant::now();
        let mut limit = limits.silence;
        let late = loop {
            match signs.recv_timeout(limit) {
                Ok(()) if begin.elapsed() >= limits.total => break true,
                Ok(()) => limit = limits.total.saturating_sub(begin.elapsed()),
                Err(reason) => break reason == mpsc::RecvTimeoutError::Timeout,
            }
        };
        if late && let Some(pid) = pid {
            // It is not waited for before its output ended, so the number is still its own.
            let _ = kill_process(pid, Signal::KILL);
        }
        late
    })
}

/// Reads to the end, calling `heard` with all that came so far.
fn drain(mut pipe: impl Read, mut heard: impl FnMut(&[u8])) -> String {
    let mut bytes = Vec::new();
    let mut part = [0; 4096];
    while let Ok(count @ 1..) = pipe.read(&mut part) {
        bytes.extend_from_slice(&part[..count]);
        heard(&bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn start(what: &str) -> impl FnOnce(std::io::Error) -> Error {
    let what = what.to_owned();
    move |source| Error::Start { what, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(silence: u64, total: u64) -> Limits {
        Limits {
            silence: Duration::from_millis(silence),
            total: Duration::from_millis(total),
        }
    }

    #[test]
    fn a_program_that_takes_too_long_is_killed_and_an_error() {
        let mut command = Command::new("sleep");
        let ended = measure("sleep", command.arg("600"), limits(50, 600_000));
        assert!(matches!(ended, Err(Error::Ended { how, .. }) if how.contains("more than")));
    }

    #[test]
    fn a_program_that_goes_on_for_ever_is_killed_although_it_talks() {
        let mut command = Command::new("yes");
        let ended = measure("yes", &mut command, limits(60_000, 50));
        assert!(matches!(ended, Err(Error::Ended { how, .. }) if how.contains("more than")));
    }

    #[test]
    fn the_error_of_a_failed_program_shows_what_it_said() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo why >&2; exit 3"]);
        let ended = measure("sh", &mut command, limits(60_000, 60_000));
        assert!(matches!(ended, Err(Error::Ended { how, .. }) if how.contains("why")));
    }
}
