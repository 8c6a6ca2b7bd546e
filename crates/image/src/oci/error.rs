//! The error type of container images.

use std::io;
use std::path::{Path, PathBuf};

use crate::oci::digest::Digest;

/// Why something with a container image could not be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What was given names no image.
    #[error("'{text}' names no image: {reason}")]
    BadName {
        /// What was given.
        text: String,
        /// What is wrong with it.
        reason: String,
    },

    /// The registry does not answer, or not in a way that can be understood.
    #[error("the registry {registry} cannot be reached")]
    Unreachable {
        /// Its host, and port if there is one.
        registry: String,
        /// What happened.
        #[source]
        source: Box<ureq::Error>,
    },

    /// The registry refuses.
    #[error("the registry {registry} refuses {what}: {detail}")]
    Refused {
        /// Its host, and port if there is one.
        registry: String,
        /// What was asked for.
        what: String,
        /// Its HTTP status, and what it said.
        detail: String,
    },

    /// The registry wants to know who asks, or does not let them.
    #[error("the registry {registry} lets nobody have {what} without other credentials: {detail}")]
    Denied {
        /// Its host, and port if there is one.
        registry: String,
        /// What was asked for.
        what: String,
        /// What it said, or which credentials there were.
        detail: String,
    },

    /// There is no such image at the source.
    #[error("there is no {what} {place}")]
    NotFound {
        /// What was asked for.
        what: String,
        /// Where, to be read after it.
        place: String,
    },

    /// Credentials are configured and cannot be read.
    #[error("credentials for {registry} cannot be read: {reason}")]
    Credentials {
        /// The registry's host.
        registry: String,
        /// What is wrong.
        reason: String,
    },

    /// The image is not one that can be run, or is damaged.
    #[error("the image is refused: {0}")]
    BadImage(String),

    /// A layer could not be fetched or is damaged.
    #[error("layer {layer}")]
    Layer {
        /// Its digest at the source, or its diffID.
        layer: Digest,
        /// What happened.
        source: Box<Error>,
    },

    /// What was read is not what was asked for.
    #[error(transparent)]
    Data(io::Error),

    /// A layer's contents are no layer.
    #[error(transparent)]
    FileSystem(#[from] strata_erofs::Error),

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

    /// The store has no image of this name.
    #[error("there is no image '{0}' here")]
    NoSuchImage(String),

    /// Several images have an ID that begins so.
    #[error("'{0}' may be any of several images")]
    Ambiguous(String),

    /// Another pull of the same was given up, because of an error elsewhere.
    #[error("given up")]
    GivenUp,

    /// There can be no disk for what an image writes.
    #[error("a scratch disk cannot be made: {reason}")]
    Scratch {
        /// Why not.
        reason: String,
    },

    /// Neither `XDG_DATA_HOME` nor `HOME` names a directory.
    #[error("no data directory: neither XDG_DATA_HOME nor HOME is set to an absolute path")]
    NoDataDirectory,
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

    pub(crate) fn bad_document(what: &str, error: impl std::fmt::Display) -> Self {
        Self::BadImage(format!("its {what} cannot be understood: {error}"))
    }

    /// What the user can do about it, where the error itself does not say.
    pub fn advice(&self) -> Option<&'static str> {
        match self {
            Self::BadName { .. } => Some(
                "name an image as docker://debian:bookworm, docker://HOST/PATH:TAG, oci:DIRECTORY, \
                 docker-archive:FILE or rootfs:FILE.tar",
            ),
            Self::Unreachable { .. } => {
                Some("look at the host's name and at HTTPS_PROXY; what was fetched is kept")
            }
            Self::Denied { .. } => Some(
                "'docker login HOST' or 'skopeo login HOST' writes credentials to \
                 ~/.docker/config.json, where strata looks for them; a name that does not exist \
                 may be refused in the same way",
            ),
            Self::NoSuchImage(_) => {
                Some("'strata image ls' lists what is here, 'strata image pull' fetches more")
            }
            Self::Scratch { .. } => Some(
                "install e2fsprogs, with which the first scratch disk of a size is made; or leave \
                 out --scratch and -d to write to memory",
            ),
            Self::NoDataDirectory => Some("set XDG_DATA_HOME to a directory for images"),
            Self::Layer { source, .. } => source.advice(),
            _ => None,
        }
    }
}
