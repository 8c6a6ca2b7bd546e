//! One machine: what was asked for, and what others do with it.
//!
//! ```text
//! machine.json    what was asked for; never changes
//! lock            locked with flock(2) by the machine's process, as long as it lives
//! run.json        the last run: its number, the process, when it began
//! end.json        how that run ended; empty before
//! ```

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use crate::claim::{self, Claim, Run};
use crate::error::{Error, Result};
use crate::files::{self, Outlives};
use crate::process::{self, Place, Process};
use crate::registry::Registry;

const ASKED: &str = "machine.json";

/// How long [`Machine::wait`] relies on a process alone; the lock may be given back earlier.
const LOOK: Duration = Duration::from_millis(100);
/// How long it sleeps where there is no process to wait for.
const PAUSE: Duration = Duration::from_millis(10);

/// A machine of a [`Registry`].
#[derive(Debug, Clone)]
pub struct Machine {
    registry: Registry,
    asked: Asked,
}

/// What was asked for when a machine was created.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// 12 hexadecimal digits.
    pub id: String,
    /// Its name, which no other machine has.
    pub name: String,
    /// When, in seconds since 1970.
    pub created: u64,
    /// The arguments it is run with.
    pub arguments: Vec<String>,
    /// The directory they were given in.
    pub directory: PathBuf,
    /// The image it runs.
    pub image: Option<Image>,
    /// Whether it vanishes when it ends.
    pub ephemeral: bool,
}

/// The image of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// What it was called.
    pub name: String,
    /// Which one that was.
    pub id: String,
}

/// What has become of a machine. Times are in seconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// It has never been run.
    Created,
    /// A process has claimed it and makes it ready.
    Starting {
        /// The process.
        pid: u32,
        /// When it claimed the machine.
        since: u64,
    },
    /// It runs.
    Running {
        /// The process.
        pid: u32,
        /// When it started.
        since: u64,
    },
    /// Its last run has ended.
    Ended(End),
    /// The process of its last run died without a word: it was killed, or the host went down.
    Lost {
        /// When that run began.
        since: u64,
    },
}

/// How a run of a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// When, in seconds since 1970.
    pub at: u64,
    /// An exit status.
    pub status: u8,
    /// What happened, in words such as `exited`, `stopped` or `kernel panic`.
    pub reason: String,
}

impl Asked {
    /// What its files have to outlive.
    pub(crate) fn outlives(&self) -> Outlives {
        if self.ephemeral {
            Outlives::Process
        } else {
            Outlives::Power
        }
    }
}

impl State {
    /// The process, if there is one.
    pub fn pid(&self) -> Option<u32> {
        match self {
            Self::Starting { pid, .. } | Self::Running { pid, .. } => Some(*pid),
            Self::Created | Self::Ended(_) | Self::Lost { .. } => None,
        }
    }

    /// Whether there is a process, be it that it only starts.
    pub fn is_running(&self) -> bool {
        self.pid().is_some()
    }
}

impl End {
    /// An end at this moment.
    pub fn now(status: u8, reason: impl Into<String>) -> Self {
        Self {
            at: now(),
            status,
            reason: reason.into(),
        }
    }
}

impl Machine {
    pub(crate) fn new(registry: &Registry, asked: Asked) -> Self {
        Self {
            registry: registry.clone(),
            asked,
        }
    }

    pub(crate) fn read(registry: &Registry, id: &str) -> Result<Self> {
        let path = registry.directory_of(id).join(ASKED);
        let asked: Asked = match files::read(&path) {
            Err(error) if error.is_not_found() => {
                return Err(Error::damaged(&path, "the file is missing"));
            }
            asked => asked?,
        };
        if asked.id != id {
            let reason = format!("it is of the machine {}", asked.id);
            return Err(Error::damaged(&path, reason));
        }
        Ok(Self::new(registry, asked))
    }

    /// Its ID: 12 hexadecimal digits.
    pub fn id(&self) -> &str {
        &self.asked.id
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.asked.name
    }

    /// What was asked for.
    pub fn asked(&self) -> &Asked {
        &self.asked
    }

    /// Its directory. Files of other names than this crate's may be kept there; they are deleted
    /// with the machine.
    pub fn directory(&self) -> PathBuf {
        self.registry.directory_of(self.id())
    }

    /// What has become of it.
    pub fn state(&self) -> Result<State> {
        let guard = self.registry.guard()?;
        self.check_there()?;
        let directory = self.directory();
        let is_held = claim::is_held(&guard, &directory)?;
        let Some(run) = Run::read(&directory)? else {
            return Ok(State::Created);
        };
        Ok(match (is_held, run.started) {
            (true, None) => State::Starting {
                pid: run.pid,
                since: run.claimed,
            },
            (true, Some(since)) => State::Running {
                pid: run.pid,
                since,
            },
            (false, _) => match run.end(&directory)? {
                Some(end) => State::Ended(end),
                None => State::Lost {
                    since: run.started.unwrap_or(run.claimed),
                },
            },
        })
    }

    /// Makes this process the machine. Fails with [`Error::AlreadyRunning`] if another one, or
    /// this one, is that already; does not wait.
    pub fn claim(&self) -> Result<Claim> {
        let guard = self.registry.guard()?;
        self.check_there()?;
        Claim::take(&guard, self)
    }

    /// Removes it with all files in its directory. Fails with [`Error::StillRunning`] if it runs.
    pub fn remove(&self) -> Result<()> {
        let guard = self.registry.guard()?;
        self.check_there()?;
        if claim::is_held(&guard, &self.directory())? {
            return Err(Error::StillRunning(self.name().to_owned()));
        }
        self.registry.discard(guard, self.id())
    }

    /// Sends a signal to its process, and never to another one. Fails with [`Error::NotRunning`]
    /// if it has none.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let not_running = || Error::NotRunning(self.name().to_owned());
        let failed = || Error::io("send a signal to the process of", Path::new(self.name()));
        let run = self.running()?.ok_or_else(not_running)?;
        if run.place != Place::here() {
            return Err(Error::Elsewhere(self.name().to_owned()));
        }
        let process = Process::open(run.pid).map_err(failed())?;
        let process = process.ok_or_else(not_running)?;
        // The process that claimed the machine for this run is still there, so the number was
        // still its own when it was opened.
        let again = self.running()?.ok_or_else(not_running)?;
        if (again.number, again.pid) != (run.number, run.pid) {
            return Err(not_running());
        }
        let is_sent = process.signal(signal).map_err(failed())?;
        is_sent.then_some(()).ok_or_else(not_running)
    }

    /// Waits until it no longer runs, but no longer than `timeout`. Returns its state then; `None`
    /// if it still runs. A machine that does not run is not waited for. An ephemeral one may have
    /// been removed already when it is looked at: [`Error::Gone`].
    pub fn wait(&self, timeout: Option<Duration>) -> Result<Option<State>> {
        let begin = Instant::now();
        loop {
            let state = self.state()?;
            if !state.is_running() {
                return Ok(Some(state));
            }
            let mut time = LOOK;
            if let Some(timeout) = timeout {
                time = time.min(timeout.saturating_sub(begin.elapsed()));
                if time.is_zero() {
                    return Ok(None);
                }
            }
            let run = self.running()?.filter(|run| run.place == Place::here());
            let pid = run.map(|run| run.pid);
            process::wait(pid, time, PAUSE)
                .map_err(Error::io("wait for the process of", Path::new(self.name())))?;
        }
    }

    /// The run that goes on.
    fn running(&self) -> Result<Option<Run>> {
        let guard = self.registry.guard()?;
        self.check_there()?;
        let directory = self.directory();
        if !claim::is_held(&guard, &directory)? {
            return Ok(None);
        }
        Run::read(&directory)
    }

    /// Fails if somebody has removed it.
    fn check_there(&self) -> Result<()> {
        let is_there = self.directory().exists();
        let gone = || Error::Gone(self.name().to_owned());
        is_there.then_some(()).ok_or_else(gone)
    }
}

/// Writes what was asked for.
pub(crate) fn write(directory: &Path, asked: &Asked) -> Result<()> {
    let path = directory.join(ASKED);
    files::write_whole(&path, &files::to_text(&path, asked)?, asked.outlives())?;
    Ok(())
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |time| time.as_secs())
}
