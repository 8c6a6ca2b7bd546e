//! A folder of the host, served to one machine: FUSE requests (the protocol of virtio-fs, virtio
//! 1.2 §5.11) come in on sockets, replies go out.
//!
//! ```text
//!   guest ─ virtqueue ─► machine's process ─ socket ─► Server ─► Folder ─► PassthroughFs ─► host
//!                            (vmm)           frames     │     (or Single-  (fuse-backend-rs)
//!                                                       │        File)
//!                                                one thread     what a guest may,
//!                                                each socket    and whose files are
//! ```
//!
//! A process of its own runs the [`Server`], locked up (crate `sandbox`) so that it can open
//! nothing but the folder. The machine's process has the sockets' other ends and no access to
//! files. Requests are a hostile guest's: names of one component only, nothing is followed out of
//! the folder, and no request panics. This crate must never know of virtio or of machines.

#![forbid(unsafe_code)]

mod file;
mod folder;
mod owners;
mod server;
mod wire;

pub use file::NAME;
pub use owners::Owners;
pub use server::Server;
pub use wire::{MAX_MESSAGE, Share, hand_over, is_ready, pair, say_ready, take_over};
