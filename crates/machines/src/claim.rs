//! The hold that a process has on the machine it is.

use std::fs::{File, TryLockError};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files::{self, Outlives};
use crate::machine::{self, End, Machine};
use crate::process::{self, Place};
use crate::registry::Guard;

/// The file that is locked.
pub(crate) const LOCK: &str = "lock";
const RUN: &str = "run.json";
const END: &str = "end.json";

/// Longest reason of an end, bytes: so an end is one page of its file at most.
const MAX_REASON: usize = 1024;
/// Most that is read of the file of an end, bytes.
const MAX_END: u64 = 16 << 10;

/// The process that holds it is the machine. The kernel gives the hold back when the process
/// dies, however it does. One that is dropped without [`Claim::end`] looks like such a death.
///
/// The lock is of the open file, which programs that this process executes do not get
/// (`O_CLOEXEC`). A child that was forked and executes nothing does hold it, so claim a machine
/// after such a fork, in the process that is to be the machine: its number is written down.
#[derive(Debug)]
pub struct Claim {
    directory: PathBuf,
    outlives: Outlives,
    run: Run,
    /// Open for the end: a process that is locked up cannot open or rename files any more.
    end: File,
    _lock: File,
}

/// A run, as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Run {
    /// Counts the runs of the machine, from 1.
    #[serde(rename = "run")]
    pub(crate) number: u64,
    pub(crate) pid: u32,
    #[serde(flatten)]
    pub(crate) place: Place,
    /// When the process claimed the machine, in seconds since 1970.
    pub(crate) claimed: u64,
    /// When the machine had started, the same.
    pub(crate) started: Option<u64>,
}

/// The end of a run, as it is kept.
#[derive(Serialize, Deserialize)]
struct EndOfRun {
    #[serde(rename = "run")]
    number: u64,
    #[serde(flatten)]
    end: End,
}

impl Claim {
    /// Claims the machine, which is there.
    pub(crate) fn take(_: &Guard, machine: &Machine) -> Result<Self> {
        let directory = machine.directory();
        let outlives = machine.asked().outlives();
        let path = directory.join(LOCK);
        let lock = files::open_or_create(&path)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::AlreadyRunning(machine.name().to_owned()));
            }
            Err(TryLockError::Error(error)) => {
                return Err(Error::io("lock the file", &path)(error));
            }
        }
        let number = Run::read(&directory)?.map_or(0, |run| run.number);
        let run = Run {
            number: number.saturating_add(1),
            pid: process::own_pid(),
            place: Place::here(),
            claimed: machine::now(),
            started: None,
        };
        // In this order: an end without its run is that of the run before.
        run.write(&directory, outlives)?;
        let end = files::write_whole(&directory.join(END), b"", outlives)?;
        Ok(Self {
            directory,
            outlives,
            run,
            end,
            _lock: lock,
        })
    }

    /// Which run of the machine this is; the first is 1.
    pub fn run(&self) -> u64 {
        self.run.number
    }

    /// Says that the machine runs now. Opens and renames files: to be called before the process
    /// is locked up.
    pub fn started(&mut self) -> Result<()> {
        self.run.started = Some(machine::now());
        self.run.write(&self.directory, self.outlives)
    }

    /// Says how the machine ended, and gives the hold back. It needs no more than write, sync and
    /// close of files that are open, which a process that is locked up may do. Of a reason longer
    /// than 1024 bytes the beginning is kept.
    pub fn end(self, mut end: End) -> Result<()> {
        let reason = &mut end.reason;
        reason.truncate(reason.floor_char_boundary(MAX_REASON));
        let path = self.directory.join(END);
        let end = EndOfRun {
            number: self.run.number,
            end,
        };
        let text = files::to_text(&path, &end)?;
        self.end
            .write_all_at(&text, 0)
            .and_then(|()| self.end.sync_data())
            .map_err(Error::io("write the file", &path))
    }
}

impl Run {
    /// The last run of the machine in this directory.
    pub(crate) fn read(directory: &Path) -> Result<Option<Self>> {
        files::read_if_there(&directory.join(RUN))
    }

    /// How it ended; `None` if nobody said.
    pub(crate) fn end(&self, directory: &Path) -> Result<Option<End>> {
        let path = directory.join(END);
        let mut text = Vec::new();
        match File::open(&path).and_then(|file| file.take(MAX_END).read_to_end(&mut text)) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("read the file", &path)(error)),
        }
        // It is written in place. Without its last byte it was cut by a power failure.
        if !text.ends_with(b"\n") {
            return Ok(None);
        }
        let mut kept: EndOfRun = files::parse(&path, &text)?;
        // A machine that was taken over may have written it: nothing for a terminal to obey.
        kept.end.reason = kept.end.reason.replace(char::is_control, "?");
        Ok((kept.number == self.number).then_some(kept.end))
    }

    fn write(&self, directory: &Path, outlives: Outlives) -> Result<()> {
        let path = directory.join(RUN);
        files::write_whole(&path, &files::to_text(&path, self)?, outlives)?;
        Ok(())
    }
}

/// Whether a process holds the machine in this directory. Looking takes the lock for a moment,
/// which is why nobody may claim the machine meanwhile.
pub(crate) fn is_held(_: &Guard, directory: &Path) -> Result<bool> {
    let path = directory.join(LOCK);
    let lock = match File::open(&path) {
        Ok(lock) => lock,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(Error::io("open the file", &path)(error)),
    };
    match lock.try_lock_shared() {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(Error::io("lock the file", &path)(error)),
    }
}
