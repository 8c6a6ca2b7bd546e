//! The end of the machine: everything else first, file systems clean, then the power.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::sync;
use rustix::mount::{MountFlags, mount_remount};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, wait};
use rustix::system::{RebootCommand, reboot};

use super::container;

/// How long programs have that were asked to end, when the machine goes down under them.
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(5);

/// What comes after the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    PowerOff,
    Reboot,
}

impl Ending {
    /// What the word of a command asks for, if it is one of those for that.
    pub(super) fn of_word(word: &[u8]) -> Option<Self> {
        match word {
            b"poweroff" | b"halt" => Some(Self::PowerOff),
            b"reboot" => Some(Self::Reboot),
            _ => None,
        }
    }
}

/// Ends the machine.
pub(super) fn end(how: Ending) -> ! {
    signal_all(Signal::KILL);
    clean_disks();
    let command = match how {
        Ending::PowerOff => RebootCommand::PowerOff,
        Ending::Reboot => RebootCommand::Restart,
    };
    let error = reboot(command);
    eprintln!("strata: the machine cannot be ended: {error:?}");
    loop {
        thread::park();
    }
}

/// Asks all programs to end, and waits a while for them. `ended` learns of each.
pub(super) fn ask_all(mut ended: impl FnMut(Pid, WaitStatus)) {
    // Shells that talk to people end at the hang-up; the stopped have to go on to hear of it.
    for signal in [Signal::TERM, Signal::HUP, Signal::CONT] {
        signal_all(signal);
    }
    let end = Instant::now() + PATIENCE;
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) => ended(pid, status),
            Ok(None) if Instant::now() < end => thread::sleep(PAUSE),
            // Nobody is left, or nobody more wants to go.
            _ => return,
        }
    }
}

/// To every process but this one and the kernel's.
fn signal_all(signal: Signal) {
    crate::sys::signal_all(signal);
}

/// Makes every file system on a disk read-only, which writes all of it. Their order does not
/// matter: nobody writes any more.
fn clean_disks() {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    sync();
    container::finish();
    for line in mounts.lines() {
        let mut words = line.split(' ');
        let (Some(device), Some(path), Some(kind)) = (words.next(), words.next(), words.next())
        else {
            continue;
        };
        if device.starts_with("/dev/") || kind == "virtiofs" {
            let path = unescape(path);
            let _ = mount_remount(path.as_str(), MountFlags::RDONLY, c"");
        }
    }
}

/// The kernel writes blanks in paths as octal numbers.
fn unescape(path: &str) -> String {
    [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ]
    .iter()
    .fold(path.to_owned(), |path, (from, to)| path.replace(from, to))
}
