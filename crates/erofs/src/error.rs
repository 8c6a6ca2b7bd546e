//! The error type of this crate.

use std::io;

/// Why a layer cannot be written as a file system.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The tar stream cannot be read.
    #[error("cannot read the layer")]
    Read(#[source] io::Error),

    /// The blob cannot be written, or a temporary file beside it.
    #[error("cannot write the layer's file system")]
    Write(#[source] io::Error),

    /// What was read is no tar stream.
    #[error("the layer is not a well-formed tar archive: {0}")]
    Malformed(String),

    /// An entry that no layer can have.
    #[error("the layer's entry '{path}' is refused: {reason}")]
    BadEntry {
        /// Its path, as it is in the tar.
        path: String,
        /// What is wrong with it.
        reason: &'static str,
    },

    /// More than the file system, or memory, can hold.
    #[error("the layer is too large: it has more than {0}")]
    TooLarge(&'static str),
}

impl Error {
    pub(crate) fn bad_entry(path: &[u8], reason: &'static str) -> Self {
        Self::BadEntry {
            path: String::from_utf8_lossy(path).escape_debug().to_string(),
            reason,
        }
    }
}
