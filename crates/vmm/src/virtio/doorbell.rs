//! How a vCPU, or another thread, wakes a device's worker: one flag and one thread, or one event
//! of a worker that sleeps on file descriptors.
//!
//! Ringing is cheap (an atomic swap, and a system call only if the worker has seen the ring
//! before) and is never lost: a ring while the worker is busy makes its next wait return at once.

use std::os::fd::OwnedFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Thread};

/// How a worker is woken.
#[derive(Debug)]
enum Sleeper {
    Thread(Thread),
    /// An eventfd that the worker watches for each write to it.
    Event(OwnedFd),
}

impl Sleeper {
    fn wake(&self) {
        match self {
            Self::Thread(thread) => thread.unpark(),
            // It fails when 2^64 writes have come before.
            Self::Event(event) => _ = rustix::io::write(event, &1_u64.to_ne_bytes()),
        }
    }
}

/// One worker's doorbell.
#[derive(Debug, Default)]
pub(super) struct Doorbell {
    rung: AtomicBool,
    stopping: AtomicBool,
    worker: OnceLock<Sleeper>,
}

impl Doorbell {
    /// The doorbell of a worker that sleeps on file descriptors, `event`, an eventfd, among them.
    pub(super) fn of_event(event: OwnedFd) -> Self {
        Self {
            worker: Sleeper::Event(event).into(),
            ..Self::default()
        }
    }

    /// Names the thread that waits, if it does not wait for an event. What was rung before reaches
    /// it now.
    pub(super) fn attach(&self, worker: Thread) {
        self.worker.get_or_init(|| Sleeper::Thread(worker)).wake();
    }

    /// Wakes the worker.
    pub(super) fn ring(&self) {
        if !self.rung.swap(true, Ordering::SeqCst)
            && let Some(worker) = self.worker.get()
        {
            worker.wake();
        }
    }

    /// Tells the worker to finish.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        if let Some(worker) = self.worker.get() {
            worker.wake();
        }
    }

    /// Forgets rings so far: to be called by a worker that sleeps on file descriptors, before it
    /// looks at what they were about.
    pub(super) fn answer(&self) {
        self.rung.store(false, Ordering::SeqCst);
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

    #[test]
    fn an_event_comes_with_the_first_ring_after_an_answer() {
        use rustix::event::{EventfdFlags, eventfd};
        let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let bell = Doorbell::of_event(event.try_clone().unwrap());
        let events = || {
            let mut count = [0; 8];
            rustix::io::read(&event, &mut count).map(|_| u64::from_ne_bytes(count))
        };
        bell.ring();
        bell.ring();
        assert_eq!(events(), Ok(1));

        bell.answer();
        bell.ring();
        assert_eq!(events(), Ok(1));

        bell.stop();
        assert_eq!(events(), Ok(1));
        assert!(bell.is_stopping());
    }
}
