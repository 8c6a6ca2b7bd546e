//! What a machine printed: a ring of files that the machine's process writes, and others read.
//!
//! ```text
//!   log.0  [header 3][record][record][record]..........[record]   complete
//!   log.1  [header 4][record][record]| what is left of segment 2
//!                                    ▲ here LogWriter goes on; LogReader waits for it
//! ```
//!
//! The segments are used in turn: when one is full, the oldest is written anew from its
//! beginning, with the next number. So the writer opens nothing, renames nothing and removes
//! nothing once it runs, and never needs more of the disk. The bytes of a segment that are older
//! than its header are no records, as the checksum of a record is also over the salt of the
//! segment, which is random and never printed.

mod bell;
mod format;
mod reader;
mod writer;

#[cfg(test)]
mod tests;

pub use format::Stream;
pub use reader::{Entry, LogReader, Record};
pub use writer::{LogSize, LogWriter};
