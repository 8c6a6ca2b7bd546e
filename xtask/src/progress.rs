//! What is told while boot files are made. Called by the commands that boot something.

use strata_image::Progress;

/// Tells each step of a build on a line of its own.
pub(crate) struct Lines;

impl Progress for Lines {
    fn step(&mut self, what: &str, _total: Option<u64>) {
        eprintln!("{what}");
    }

    fn advance(&mut self, _position: u64) {}
}
