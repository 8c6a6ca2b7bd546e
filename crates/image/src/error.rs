//! The one error type of this crate.

use std::io;
use std::path::{Path, PathBuf};

/// Why the default appliance could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither `XDG_CACHE_HOME` nor `HOME` names a directory.
    #[error("no cache directory: neither XDG_CACHE_HOME nor HOME is set to an absolute path")]
    NoCacheDirectory,

    /// A file of the cache could not be read or written.
    #[error("{path}: cannot {action}")]
    Io {
        /// What was being done, to be read after "cannot".
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },

    /// The host has no apt.
    #[error("'{program}' is not installed on this host, so Debian's packages cannot be fetched")]
    AptMissing {
        /// The program that was looked for.
        program: &'static str,
    },

    /// apt knows no such package, even after an update of its lists.
    #[error("apt finds no package '{package}' in this host's sources: {detail}")]
    PackageNotFound {
        /// The package's name.
        package: String,
        /// What apt said, or what is likely.
        detail: String,
    },

    /// apt could not fetch a package.
    #[error("apt could not fetch '{package}': {detail}")]
    Fetch {
        /// The package's name.
        package: String,
        /// The last lines apt wrote.
        detail: String,
    },

    /// A fetched package is not what was expected.
    #[error("{path}: {reason}")]
    BadPackage {
        /// The package file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

impl Error {
    /// An adapter for `map_err`: `action` is read after "cannot".
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }

    pub(crate) fn bad(path: &Path, reason: impl Into<String>) -> Self {
        Self::BadPackage {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }
}
