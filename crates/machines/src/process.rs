//! The process of a machine, as others see it.

use std::os::fd::OwnedFd;
use std::time::Duration;
use std::{fs, process, thread};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// Where a number of a process means something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Place {
    /// `/proc/sys/kernel/random/boot_id`; empty if it cannot be read.
    boot: String,
    /// What `/proc/self/ns/pid` leads to; empty if it cannot be read.
    namespace: String,
}

impl Place {
    /// This process's.
    pub(crate) fn here() -> Self {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let namespace = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
        Self {
            boot: boot.trim_end().to_owned(),
            namespace: namespace.to_string_lossy().into_owned(),
        }
    }
}

/// Number of this process.
pub(crate) fn own_pid() -> u32 {
    process::id()
}

/// A process that cannot be mistaken for a later one of the same number (`pidfd_open(2)`).
pub(crate) struct Process(OwnedFd);

impl Process {
    /// The process of this number; `None` if there is none.
    pub(crate) fn open(pid: u32) -> Result<Option<Self>, Errno> {
        let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
            return Ok(None);
        };
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Some(Self(pidfd))),
            Err(Errno::SRCH) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sends a signal; false if the process has ended.
    pub(crate) fn signal(&self, signal: Signal) -> Result<bool, Errno> {
        match pidfd_send_signal(&self.0, signal) {
            Ok(()) => Ok(true),
            Err(Errno::SRCH) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Waits until the process has ended, or for this time. Whether it has ended.
    pub(crate) fn wait(&self, time: Duration) -> Result<bool, Errno> {
        let timeout = Timespec::try_from(time).ok();
        let mut polled = [PollFd::new(&self.0, PollFlags::IN)];
        match poll(&mut polled, timeout.as_ref()) {
            Ok(count) => Ok(count > 0),
            Err(Errno::INTR) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Waits for the process of this number to end, but no longer than `time`; and `pause` at least
/// where there is none to wait for.
pub(crate) fn wait(pid: Option<u32>, time: Duration, pause: Duration) -> Result<(), Errno> {
    let process = pid.map(Process::open).transpose()?.flatten();
    let is_over = match process {
        Some(process) => process.wait(time)?,
        None => true,
    };
    if is_over {
        thread::sleep(pause.min(time));
    }
    Ok(())
}
