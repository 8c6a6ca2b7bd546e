//! How a long build tells its caller where it is. The caller draws; this crate never does.

/// Receives the progress of a build. Called from the thread that asked for the build.
pub trait Progress {
    /// A new step begins. `total` is its size in bytes where that is known.
    fn step(&mut self, what: &str, total: Option<u64>);
    /// The current step has come to `position` bytes.
    fn advance(&mut self, position: u64);
}

/// Throws all progress away.
#[derive(Debug, Default, Clone, Copy)]
pub struct Silent;

impl Progress for Silent {
    fn step(&mut self, _what: &str, _total: Option<u64>) {}
    fn advance(&mut self, _position: u64) {}
}
