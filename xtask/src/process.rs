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

/// Runs `command` and gives its output and wall time. It is killed after `limit`; that, and
/// any other end but success, is an error with the last lines of its output.
pub(crate) fn measure(
    what: &str,
    command: &mut Command,
    limit: Duration,
) -> Result<Measured, Error> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let begin = Instant::now();
    let mut child = command.spawn().map_err(start(what))?;
    let (ended, end) = mpsc::channel::<()>();
    let watchdog = watch(&child, limit, end);
    let errors = child
        .stderr
        .take()
        .map(|pipe| thread::spawn(|| drain(pipe)));
    let output = child.stdout.take().map(drain).unwrap_or_default();
    let status = child.wait().map_err(start(what))?;
    let wall = begin.elapsed();
    drop(ended);
    let late = watchdog.join().unwrap_or(false);
    let errors = errors.map(|t| t.join().unwrap_or_default());
    if status.success() && !late {
        return Ok(Measured { wall, output });
    }
    let how = if late {
        format!("was not done after {} s", limit.as_secs())
    } else {
        format!("failed: {status}")
    };
    let said = output + &errors.unwrap_or_default();
    let lines: Vec<&str> = said.lines().collect();
    let tail = lines[lines.len().saturating_sub(20)..].join("\n");
    Err(Error::Ended {
        what: what.to_owned(),
        how: format!("{how}\n{tail}"),
    })
}

/// Kills `child` unless the sender of `end` is dropped within `limit`. Its thread says
/// whether it did.
fn watch(child: &Child, limit: Duration, end: mpsc::Receiver<()>) -> thread::JoinHandle<bool> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    thread::spawn(move || {
        let late = end.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout);
        if late && let Some(pid) = pid {
            // It is not waited for before its output ended, so the number is still its own.
            let _ = kill_process(pid, Signal::KILL);
        }
        late
    })
}

fn drain(mut pipe: impl Read) -> String {
    let mut bytes = Vec::new();
    let _ = pipe.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

fn start(what: &str) -> impl FnOnce(std::io::Error) -> Error {
    let what = what.to_owned();
    move |source| Error::Start { what, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_takes_too_long_is_killed_and_an_error() {
        let mut command = Command::new("sleep");
        let ended = measure("sleep", command.arg("600"), Duration::from_millis(50));
        assert!(matches!(ended, Err(Error::Ended { how, .. }) if how.contains("not done")));
    }

    #[test]
    fn the_error_of_a_failed_program_shows_what_it_said() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo why >&2; exit 3"]);
        let ended = measure("sh", &mut command, Duration::from_mins(1));
        assert!(matches!(ended, Err(Error::Ended { how, .. }) if how.contains("why")));
    }
}
