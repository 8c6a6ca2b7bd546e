//! How a vCPU, or another thread, wakes a device's workers: one flag, and the threads that wait, or
//! the event of a worker that sleeps on file descriptors.
//!
//! Ringing is cheap (an atomic swap, and a system call only if a worker sleeps) and is never lost: a
//! ring while all workers are busy makes the next wait return at once.

use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Thread};

use crate::sync::lock;

/// The doorbell of one worker, or of several that do the same work.
#[derive(Debug, Default)]
pub(super) struct Doorbell {
    rung: AtomicBool,
    stopping: AtomicBool,
    waiting: Mutex<Vec<Thread>>,
    /// An eventfd that the only worker watches for each write to it.
    event: Option<OwnedFd>,
}

impl Doorbell {
    /// The doorbell of a worker that sleeps on file descriptors, `event`, an eventfd, among them.
    pub(super) fn of_event(event: OwnedFd) -> Self {
        Self {
            event: Some(event),
            ..Self::default()
        }
    }

    /// Writes to the event, if there is one; else wakes some of the threads that wait.
    fn wake(&self, some: impl FnOnce(&mut Vec<Thread>)) {
        match &self.event {
            // It fails when 2^64 writes have come before.
            Some(event) => _ = rustix::io::write(event, &1_u64.to_ne_bytes()),
            None => some(&mut lock(&self.waiting)),
        }
    }

    /// Wakes one worker.
    pub(super) fn ring(&self) {
        if !self.rung.swap(true, Ordering::SeqCst) {
            self.wake(|waiting| {
                if let Some(worker) = waiting.pop() {
                    worker.unpark();
                }
            });
        }
    }

    /// Tells the workers to finish.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.wake(|waiting| waiting.drain(..).for_each(|worker| worker.unpark()));
    }

    /// Forgets rings so far: to be called by a worker that sleeps on file descriptors, before it
    /// looks at what they were about.
    pub(super) fn answer(&self) {
        self.rung.store(false, Ordering::SeqCst);
    }

    /// Whether the workers are to finish.
    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// Waits for a ring, which one worker hears. Returns false when it is to finish.
    pub(super) fn wait(&self) -> bool {
        loop {
            if self.is_stopping() {
                return false;
            }
            if self.rung.swap(false, Ordering::SeqCst) {
                return true;
            }
            let this = thread::current();
            let mut waiting = lock(&self.waiting);
            // Whoever sets a flag looks for waiting threads afterwards.
            if !self.rung.load(Ordering::SeqCst) && !self.is_stopping() {
                waiting.push(this.clone());
                drop(waiting);
                thread::park();
                // It may have woken by itself.
                lock(&self.waiting).retain(|worker| worker.id() != this.id());
            }
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

    #[test]
    fn a_ring_wakes_one_of_several_workers_and_a_busy_one_keeps_nobody_waiting() {
        let bell = Arc::new(Doorbell::default());
        let (seen, rings) = mpsc::channel();
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let (bell, seen) = (Arc::clone(&bell), seen.clone());
                thread::spawn(move || {
                    while bell.wait() {
                        let (free, held) = mpsc::channel::<()>();
                        seen.send(free).unwrap();
                        // busy until the test lets go
                        let _ = held.recv();
                    }
                })
            })
            .collect();

        let busy: Vec<_> = (0..3)
            .map(|_| {
                bell.ring();
                rings.recv().unwrap()
            })
            .collect();
        bell.ring();
        drop(busy);
        drop(rings.recv().unwrap());

        bell.stop();
        for thread in threads {
            thread.join().unwrap();
        }
    }
}
