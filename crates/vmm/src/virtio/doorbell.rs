//! How a vCPU, or another thread, wakes a device's worker: one flag and one thread.
//!
//! Ringing is cheap (an atomic swap, and a futex wake only if the worker sleeps) and is
//! never lost: a ring while the worker is busy makes its next wait return at once.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Thread};

/// One worker's doorbell.
#[derive(Debug, Default)]
pub(super) struct Doorbell {
    rung: AtomicBool,
    stopping: AtomicBool,
    worker: OnceLock<Thread>,
}

impl Doorbell {
    /// Names the thread that waits. What was rung before reaches it now.
    pub(super) fn attach(&self, worker: Thread) {
        worker.unpark();
        let _ = self.worker.set(worker);
    }

    /// Wakes the worker.
    pub(super) fn ring(&self) {
        if !self.rung.swap(true, Ordering::SeqCst)
            && let Some(worker) = self.worker.get()
        {
            worker.unpark();
        }
    }

    /// Tells the worker to finish.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        if let Some(worker) = self.worker.get() {
            worker.unpark();
        }
    }

    /// Whether the worker is to finish.
    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// Waits for a ring. Returns false when the worker is to finish. To be called by the
    /// attached thread alone.
    pub(super) fn wait(&self) -> bool {
        loop {
            if self.is_stopping() {
                return false;
            }
            if self.rung.swap(false, Ordering::SeqCst) {
                return true;
            }
            thread::park();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn rings_before_the_worker_exists_and_while_it_works_are_not_lost() {
        let bell = Arc::new(Doorbell::default());
        bell.ring();
        let (seen, rings) = mpsc::channel();
        let worker = Arc::clone(&bell);
        let thread = thread::spawn(move || {
            while worker.wait() {
                seen.send(()).unwrap();
            }
        });
        bell.attach(thread.thread().clone());

        rings.recv().unwrap();
        bell.ring();
        rings.recv().unwrap();

        bell.stop();
        thread.join().unwrap();
    }
}
