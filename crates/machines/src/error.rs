//! The one error type of this crate.

use std::io;
use std::path::{Path, PathBuf};

/// What this crate's functions return.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong. The texts name the machine or the file, and say what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither `XDG_STATE_HOME` nor `HOME` names a directory.
    #[error(
        "no directory for machines: neither XDG_STATE_HOME nor HOME is set to an absolute path"
    )]
    NoStateDirectory,

    /// A file could not be read or written.
    #[error("{path}: cannot {action}")]
    Io {
        /// What was being done, to be read after "cannot".
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },

    /// It cannot be the name of a machine.
    #[error("'{0}' is no name: a name is of a-z, 0-9 and hyphens between them, at most 63")]
    BadName(String),

    /// Another machine has the name.
    #[error(
        "there is a machine named '{name}' already ({id}); choose another name, or stop and \
         remove that machine"
    )]
    NameTaken {
        /// The name.
        name: String,
        /// The machine that has it.
        id: String,
    },

    /// The directory that a machine is asked for in has no name in UTF-8.
    #[error("the directory {0:?} has a name that is not UTF-8; work in another one")]
    NotUtf8(PathBuf),

    /// Nothing is called so.
    #[error("there is no machine named '{0}', and none whose ID begins so")]
    NoSuchMachine(String),

    /// More than one machine is meant.
    #[error("'{text}' can be any of the machines {}; give more of the ID", ids.join(", "))]
    Ambiguous {
        /// What was looked for.
        text: String,
        /// IDs of those it fits.
        ids: Vec<String>,
    },

    /// Somebody has removed the machine meanwhile.
    #[error("the machine '{0}' has been removed")]
    Gone(String),

    /// A file is not what this crate wrote.
    #[error("{path} is damaged: {reason}; if the machine is not needed, remove its directory")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },

    /// A file is from the future.
    #[error("{path} is of version {version}, which a newer Strata wrote; use that one")]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u64,
    },

    /// The machine has a process already.
    #[error("the machine '{0}' is running already")]
    AlreadyRunning(String),

    /// A running machine cannot be removed.
    #[error("the machine '{0}' is running; stop it first")]
    StillRunning(String),

    /// The machine has no process.
    #[error("the machine '{0}' is not running")]
    NotRunning(String),

    /// The machine's process has a number that means nothing here.
    #[error("the machine '{0}' runs in another container or on another host; reach it from there")]
    Elsewhere(String),
}

impl Error {
    /// An adapter for `map_err`: `action` is read after "cannot".
    pub(crate) fn io<E: Into<io::Error>>(
        action: &'static str,
        path: &Path,
    ) -> impl FnOnce(E) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            action,
            path,
            source: source.into(),
        }
    }

    pub(crate) fn damaged(path: &Path, reason: impl Into<String>) -> Self {
        Self::Damaged {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }

    /// Whether a file or directory is not there.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}
