//! Wakes running vCPUs when their local APIC timer is due.
//!
//! One thread sleeps until the earliest deadline of all vCPUs. A vCPU that arms its timer
//! calls [`Timers::arm`], which costs a system call only if the new deadline comes before
//! what the thread has planned; a deadline that is gone by then costs a vain look. A
//! halted vCPU waits for its own deadline and needs nothing of this.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use crate::clock::{Clock, tsc, wake_on_time};
use crate::interrupts::Interrupts;
use crate::sync::lock;

/// No deadline.
const NEVER: u64 = u64::MAX;

struct Shared {
    /// TSC at which each vCPU's timer is due.
    deadlines: Vec<AtomicU64>,
    /// TSC at which the thread next looks. Written under `ended`'s lock.
    planned: AtomicU64,
    ended: Mutex<bool>,
    changed: Condvar,
}

/// The timers of a machine. Clones are the same timers.
#[derive(Clone)]
pub(crate) struct Timers(Arc<Shared>);

impl Timers {
    pub(crate) fn new(vcpus: u8) -> Self {
        Self(Arc::new(Shared {
            deadlines: (0..vcpus).map(|_| AtomicU64::new(NEVER)).collect(),
            planned: AtomicU64::new(NEVER),
            ended: Mutex::new(false),
            changed: Condvar::new(),
        }))
    }

    /// vCPU `index` has its next deadline at this TSC, or none.
    pub(crate) fn arm(&self, index: usize, deadline: Option<u64>) {
        let Some(slot) = self.0.deadlines.get(index) else {
            return;
        };
        let deadline = deadline.unwrap_or(NEVER);
        slot.store(deadline, Ordering::SeqCst);
        if deadline < self.0.planned.load(Ordering::SeqCst) {
            // Taking the lock makes sure that the thread is waiting, or has yet to look.
            let _ended = lock(&self.0.ended);
            self.0.changed.notify_one();
        }
    }

    /// Starts the thread.
    pub(crate) fn start(&self, clock: Clock, interrupts: Interrupts) -> io::Result<JoinHandle<()>> {
        let timers = self.clone();
        thread::Builder::new()
            .name("timer".into())
            .spawn(move || timers.run(&clock, &interrupts))
    }

    /// Ends the thread.
    pub(crate) fn stop(&self) {
        *lock(&self.0.ended) = true;
        self.0.changed.notify_one();
    }

    fn run(&self, clock: &Clock, interrupts: &Interrupts) {
        wake_on_time();
        let mut ended = lock(&self.0.ended);
        while !*ended {
            let now = tsc();
            let mut next = NEVER;
            for (index, slot) in self.0.deadlines.iter().enumerate() {
                let deadline = slot.load(Ordering::SeqCst);
                if deadline > now {
                    next = next.min(deadline);
                    continue;
                }
                // Expired: not looked at again, unless it was armed anew meanwhile.
                let _ = slot.compare_exchange(deadline, NEVER, Ordering::SeqCst, Ordering::SeqCst);
                interrupts.wake(index);
            }
            self.0.planned.store(next, Ordering::SeqCst);
            if self.earliest() < next {
                continue;
            }
            ended = if next == NEVER {
                self.0
                    .changed
                    .wait(ended)
                    .unwrap_or_else(PoisonError::into_inner)
            } else {
                let limit = clock.duration(next.saturating_sub(tsc()));
                let waited = self.0.changed.wait_timeout(ended, limit);
                waited.unwrap_or_else(PoisonError::into_inner).0
            };
        }
    }

    fn earliest(&self) -> u64 {
        self.0
            .deadlines
            .iter()
            .map(|d| d.load(Ordering::SeqCst))
            .min()
            .unwrap_or(NEVER)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;
    use crate::clock::Calibration;

    const LONG: Duration = Duration::from_secs(20);

    struct Running {
        timers: Timers,
        clock: Clock,
        woken: mpsc::Receiver<usize>,
        thread: JoinHandle<()>,
    }

    fn running() -> Running {
        let clock = Clock {
            tsc_khz: Calibration::start().finish(),
            start_tsc: tsc(),
        };
        let interrupts = Interrupts::new(2, &clock);
        let (sender, woken) = mpsc::channel();
        for index in 0..2 {
            let sender = sender.clone();
            interrupts.attach(index, Box::new(move || sender.send(index).unwrap()));
        }
        let timers = Timers::new(2);
        let thread = timers.start(clock, interrupts).unwrap();
        Running {
            timers,
            clock,
            woken,
            thread,
        }
    }

    impl Running {
        fn after_ms(&self, ms: u64) -> u64 {
            tsc() + ms * self.clock.tsc_khz
        }

        fn end(self) {
            self.timers.stop();
            self.thread.join().unwrap();
        }
    }

    #[test]
    fn a_vcpu_is_woken_no_sooner_than_its_deadline() {
        let running = running();
        let deadline = running.after_ms(5);
        running.timers.arm(1, Some(deadline));

        assert_eq!(running.woken.recv_timeout(LONG), Ok(1));

        assert!(tsc() >= deadline);
        running.end();
    }

    #[test]
    fn an_earlier_deadline_overtakes_a_later_one() {
        let running = running();
        running.timers.arm(0, Some(running.after_ms(60_000)));
        thread::sleep(Duration::from_millis(2));
        running.timers.arm(1, Some(running.after_ms(1)));

        assert_eq!(running.woken.recv_timeout(LONG), Ok(1));
        running.end();
    }

    #[test]
    fn a_disarmed_deadline_wakes_nobody() {
        let running = running();
        running.timers.arm(0, Some(running.after_ms(10)));
        running.timers.arm(0, None);

        assert!(
            running
                .woken
                .recv_timeout(Duration::from_millis(40))
                .is_err()
        );
        running.end();
    }

    #[test]
    fn a_deadline_in_the_past_wakes_at_once() {
        let running = running();
        running.timers.arm(0, Some(1));

        assert_eq!(running.woken.recv_timeout(LONG), Ok(0));
        running.end();
    }
}
