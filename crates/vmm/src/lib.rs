//!

pub mod virtio;
