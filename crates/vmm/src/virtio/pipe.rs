//! A bounded queue of bytes between a device's worker and a thread that reads or writes a
//! host stream.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::sync::lock;

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    /// No more will be put in.
    ended: bool,
    /// No more will be taken out.
    abandoned: bool,
}

/// The queue. One side puts, the other takes.
#[derive(Debug)]
pub(super) struct Pipe {
    state: Mutex<State>,
    changed: Condvar,
    limit: usize,
}

impl Pipe {
    /// A queue for about `limit` bytes.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            limit,
        }
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that may be put in without waiting.
    pub(super) fn room(&self) -> usize {
        self.limit.saturating_sub(lock(&self.state).bytes.len())
    }

    /// Puts bytes in, over the limit if need be.
    pub(super) fn put(&self, bytes: &[u8]) {
        let mut state = lock(&self.state);
        if !state.abandoned {
            state.bytes.extend_from_slice(bytes);
        }
        self.changed.notify_all();
    }

    /// Waits for room, then puts bytes in. False if nobody will take them.
    pub(super) fn put_waiting(&self, bytes: &[u8]) -> bool {
        let mut state = lock(&self.state);
        while state.bytes.len() >= self.limit && !state.abandoned {
            state = self.wait(state);
        }
        if state.abandoned {
            return false;
        }
        state.bytes.extend_from_slice(bytes);
        self.changed.notify_all();
        true
    }

    /// Takes all there is, at once.
    pub(super) fn take(&self) -> Vec<u8> {
        let bytes = std::mem::take(&mut lock(&self.state).bytes);
        self.changed.notify_all();
        bytes
    }

    /// Waits for bytes and takes them; `None` when they have ended.
    pub(super) fn take_waiting(&self) -> Option<Vec<u8>> {
        let mut state = lock(&self.state);
        while state.bytes.is_empty() {
            if state.ended {
                return None;
            }
            state = self.wait(state);
        }
        self.changed.notify_all();
        Some(std::mem::take(&mut state.bytes))
    }

    /// No more bytes will be put in.
    pub(super) fn end(&self) {
        lock(&self.state).ended = true;
        self.changed.notify_all();
    }

    /// No more bytes will be taken out; those inside, and all that come, are dropped.
    pub(super) fn abandon(&self) {
        let mut state = lock(&self.state);
        state.abandoned = true;
        state.bytes = Vec::new();
        self.changed.notify_all();
    }

    /// Whether all bytes that will ever come have been taken.
    pub(super) fn drained(&self) -> bool {
        let state = lock(&self.state);
        state.ended && state.bytes.is_empty()
    }

    /// Waits until there is room, or nobody takes any more.
    pub(super) fn wait_for_room(&self) {
        let mut state = lock(&self.state);
        while state.bytes.len() >= self.limit && !state.abandoned {
            state = self.wait(state);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    #[test]
    fn a_full_pipe_holds_its_writer_and_loses_nothing() {
        let pipe = Arc::new(Pipe::new(4));
        let writer = Arc::clone(&pipe);
        let thread = thread::spawn(move || {
            for byte in 0..100 {
                assert!(writer.put_waiting(&[byte]));
            }
            writer.end();
        });

        let mut seen = Vec::new();
        while let Some(bytes) = pipe.take_waiting() {
            assert!(bytes.len() <= 4);
            seen.extend(bytes);
        }

        thread.join().unwrap();
        assert_eq!(seen, (0..100).collect::<Vec<_>>());
        assert!(pipe.drained());
    }

    #[test]
    fn an_abandoned_pipe_lets_its_writer_go() {
        let pipe = Pipe::new(1);
        pipe.put(b"xx");

        pipe.abandon();

        assert!(!pipe.put_waiting(b"y"));
        pipe.wait_for_room();
    }
}
