//! Container images, from registries and files, as file systems that guests mount.
//!
//! ```text
//!  docker://  ──(registry)──┐
//!  oci:       ──(layout)────┤  manifest, config        ┌─> blobs/   manifest and config, by digest
//!  docker-archive: (archive)┼──────────────────(pull)──┤
//!  rootfs:    ──(rootfs)────┘  layers, compressed      ├─> layers/  EROFS file systems, by diffID
//!                                 │                    └─> names/   what the user calls it
//!                                 └─ check size and digest ─ unpack ─ check diffID ─(strata-erofs)
//!
//!  store ──(export)──> an OCI layout, or what `docker load` reads
//! ```
//!
//! Protocol and documents are those of the OCI distribution and image specifications, and Docker's
//! older forms of them. Called by the `strata` binary.

mod archive;
mod credentials;
mod digest;
mod download;
mod error;
mod export;
mod layout;
mod pull;
mod registry;
mod scratch;
mod source;
mod store;
mod unpack;

pub use oci_spec::image::{Config, ImageConfiguration};

pub use digest::Digest;
pub use error::Error;
pub use export::export;
pub use pull::{Bars, pull};
pub use scratch::{scratch, scratch_at};
pub use source::{Name, Source};
pub use store::{Collected, Image, Layer, Lease, Store};
