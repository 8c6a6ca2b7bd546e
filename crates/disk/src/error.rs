//! What can be wrong with a disk image.

use std::io;
use std::path::PathBuf;

/// Why something with a disk image failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host said so.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The image is not what its format says; what is wrong.
    #[error("the image is damaged: {0}; look at it with: strata disk check")]
    Damaged(String),
    /// The image needs what Strata does not do.
    #[error("the image uses {0}, which is not supported")]
    Unsupported(String),
    /// What was asked for makes no sense for this image.
    #[error("{0}")]
    Invalid(String),
    /// It was opened to be read.
    #[error("the image was opened read-only")]
    ReadOnly,
    /// It is encrypted, and opened without a passphrase.
    #[error("the image is encrypted; name the file that has its passphrase: --key-file FILE")]
    Locked,
    /// It is encrypted with another passphrase.
    #[error(
        "the passphrase is not the image's; all of the key file counts, also the end of its last line"
    )]
    WrongPassphrase,
    /// The image that this one is based on cannot be used.
    #[error("its backing image {} cannot be used", path.display())]
    Backing {
        /// Which.
        path: PathBuf,
        /// Why.
        source: Box<Error>,
    },
}

/// What operations on images give.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// [`Error::Damaged`], with what is wrong.
pub(crate) fn damaged(what: impl Into<String>) -> Error {
    Error::Damaged(what.into())
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Io(error) => error,
            other => io::Error::other(other),
        }
    }
}
