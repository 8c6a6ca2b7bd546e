//! What a machine boots from.
//!
//! The *default appliance*, Debian's own cloud kernel with a `BusyBox` user space, is built on
//! first use and kept in the user's cache. Container images are in [`oci`].
//!
//! ```text
//!  apt-get download ──> .deb files ──> vmlinuz ───────────────┐
//!       (apt)             (deb)        kernel modules (modules)│
//!                                      busybox                 ├──> cache directory
//!                                      guest scripts ──(cpio)──┘    vmlinuz, initramfs.cpio,
//!                                                                   manifest.json
//!  Network, Session (what this run wants) ──(cpio)──> a second, small initramfs segment
//! ```
//!
//! The `strata` binary calls it before it builds a machine. This crate must never know of
//! machines: it hands out paths and bytes, nothing more.
#![forbid(unsafe_code)]

mod appliance;
mod apt;
mod cache;
mod cpio;
mod deb;
mod error;
mod initramfs;
mod manifest;
mod modules;
pub mod oci;
mod progress;
mod session;

pub use appliance::Appliance;
pub use apt::apt_version;
pub use cache::{Cache, CacheState};
pub use cpio::Archive;
pub use error::Error;
pub use initramfs::GREETING;
pub use manifest::{FileRecord, Manifest, SourceRecord};
pub use progress::{Progress, Silent};
pub use session::{Container, Mount, Network, Ports, Session, Start};
