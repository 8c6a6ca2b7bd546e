//! The host CPU as the oracle: a forked process that runs cases in ring 3.
//!
//! ```text
//!   this process                                 forked process (no threads, no allocation)
//!   Native::run ─ cases ──► shared memory ──► handler loads a case into the signal frame,
//!               ◄ outcomes ─               ◄── rt_sigreturn runs it, the signal it ends
//!                                              with brings the answer
//! ```
//!
//! Called by `runner`. The process is jailed by seccomp before it runs anything generated:
//! it can return from signals, wait and exit, and nothing else. When it dies all the same,
//! the case it died on is reported as lost and a new process takes over.

mod child;

pub(crate) use child::has_fsgsbase;

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::case::{Case, Outcome};
use crate::layout::{self, PAGE};

/// Cases handed over at once, so that waking the other process costs little per case.
pub const BATCH: usize = 256;

/// What both processes see.
#[repr(C)]
struct Channel {
    /// Counts batches handed over; the forked process waits on it.
    request: AtomicU32,
    /// Counts batches done; this process waits on it.
    response: AtomicU32,
    /// The case being run, for when the process dies.
    current: AtomicU32,
    /// Cases in the batch.
    count: AtomicU32,
    cases: [Case; BATCH],
    outcomes: [Outcome; BATCH],
}

/// Why the oracle cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum NativeError {
    /// Memory shared with the process could not be mapped.
    #[error("cannot map memory to share with the host-side process")]
    Map(#[source] io::Error),
    /// The host has no AVX, so the two machines' extended state cannot be the same.
    #[error("the differential test needs a host with AVX")]
    NoAvx,
    /// The process could not be started.
    #[error("cannot fork the host-side process")]
    Fork(#[source] io::Error),
    /// The process could not set itself up.
    #[error("the host-side process could not {0}")]
    Setup(&'static str),
}

/// The oracle. Belongs to the thread that made it: its process dies with that thread.
pub struct Native {
    channel: *mut Channel,
    pristine: Vec<[u8; PAGE as usize]>,
    process: libc::pid_t,
    /// Processes lost so far.
    deaths: u64,
}

impl Native {
    /// Forks the first process.
    pub fn new() -> Result<Self, NativeError> {
        if !std::arch::is_x86_feature_detected!("avx") {
            return Err(NativeError::NoAvx);
        }
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches no
        // memory that exists already.
        let channel = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<Channel>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if channel == libc::MAP_FAILED {
            return Err(NativeError::Map(io::Error::last_os_error()));
        }
        let channel = channel.cast::<Channel>();
        let mut native = Self {
            channel,
            pristine: layout::pristine(),
            process: 0,
            deaths: 0,
        };
        native.start()?;
        Ok(native)
    }

    /// How many processes died on a case so far.
    pub fn deaths(&self) -> u64 {
        self.deaths
    }

    /// Runs up to [`BATCH`] cases, and writes what came of them to the front of `outcomes`.
    pub fn run(&mut self, cases: &[Case], outcomes: &mut Vec<Outcome>) -> Result<(), NativeError> {
        outcomes.clear();
        for batch in cases.chunks(BATCH) {
            let mut done = 0;
            while done < batch.len() {
                done += self.run_batch(&batch[done..], outcomes)?;
            }
        }
        Ok(())
    }

    /// Runs cases up to and including the first that kills the process; returns how many.
    fn run_batch(
        &mut self,
        batch: &[Case],
        outcomes: &mut Vec<Outcome>,
    ) -> Result<usize, NativeError> {
        // SAFETY: the mapping lives as long as `self`; the other process reads `cases` only
        // after `request` has changed, below, and batches fit by the caller's chunking.
        unsafe {
            std::ptr::copy_nonoverlapping(
                batch.as_ptr(),
                (&raw mut (*self.channel).cases).cast::<Case>(),
                batch.len(),
            );
        }
        self.shared()
            .count
            .store(batch.len() as u32, Ordering::Relaxed);
        self.shared().current.store(0, Ordering::Relaxed);
        let request = self
            .shared()
            .request
            .load(Ordering::Relaxed)
            .wrapping_add(1);
        self.shared().request.store(request, Ordering::Release);
        wake(&self.shared().request);

        let alive = self.wait_for(request);
        let done = if alive {
            batch.len()
        } else {
            (self.shared().current.load(Ordering::Acquire) as usize).min(batch.len() - 1)
        };
        for index in 0..done {
            // SAFETY: the other process has written these outcomes and is waiting or dead;
            // `done` is at most BATCH.
            outcomes.push(unsafe {
                (&raw const (*self.channel).outcomes)
                    .cast::<Outcome>()
                    .add(index)
                    .read()
            });
        }
        if alive {
            return Ok(done);
        }
        self.deaths += 1;
        outcomes.push(Outcome::lost());
        self.start()?;
        Ok(done + 1)
    }

    fn shared(&self) -> &Channel {
        // SAFETY: the mapping lives as long as `self`. Only the atomics are used through
        // this reference; the arrays are reached by raw pointer.
        unsafe { &*self.channel }
    }

    /// Waits for `response` to reach `request`. False: the process has died.
    fn wait_for(&mut self, request: u32) -> bool {
        loop {
            let seen = self.shared().response.load(Ordering::Acquire);
            if seen == request {
                return true;
            }
            wait(&self.shared().response, seen);
            if self.shared().response.load(Ordering::Acquire) == request {
                return true;
            }
            let mut status = 0;
            // SAFETY: plain system call; `status` outlives it.
            if unsafe { libc::waitpid(self.process, &raw mut status, libc::WNOHANG) } != 0 {
                self.process = 0;
                return false;
            }
        }
    }

    fn start(&mut self) -> Result<(), NativeError> {
        self.shared().request.store(0, Ordering::Relaxed);
        self.shared().response.store(u32::MAX, Ordering::Relaxed);
        // SAFETY: the new process runs nothing but `child::main`, which makes only direct
        // system calls and allocates nothing, as a fork of a threaded process must.
        let process = unsafe { libc::fork() };
        match process {
            -1 => Err(NativeError::Fork(io::Error::last_os_error())),
            // SAFETY: this is the forked process; the channel is shared with its parent and
            // `pristine` is its own copy, neither of which goes away before it exits.
            0 => unsafe { child::main(self.channel, &self.pristine) },
            _ => {
                self.process = process;
                self.wait_until_ready()
            }
        }
    }

    fn wait_until_ready(&mut self) -> Result<(), NativeError> {
        loop {
            if self.shared().response.load(Ordering::Acquire) == 0 {
                return Ok(());
            }
            wait(&self.shared().response, u32::MAX);
            let mut status = 0;
            // SAFETY: plain system call; `status` outlives it.
            if unsafe { libc::waitpid(self.process, &raw mut status, libc::WNOHANG) } != 0 {
                self.process = 0;
                let step = if libc::WIFEXITED(status) {
                    libc::WEXITSTATUS(status)
                } else {
                    0
                };
                return Err(NativeError::Setup(child::step_name(step)));
            }
        }
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        if self.process > 0 {
            // SAFETY: `process` is our own child and has not been waited for.
            unsafe {
                libc::kill(self.process, libc::SIGKILL);
                libc::waitpid(self.process, std::ptr::null_mut(), 0);
            }
        }
        // SAFETY: this is the mapping made in `new`, of that size; nothing refers to it now.
        unsafe { libc::munmap(self.channel.cast(), size_of::<Channel>()) };
    }
}

fn wake(word: &AtomicU32) {
    // SAFETY: FUTEX_WAKE uses the address as a key only.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, 1) };
}

/// Waits until `word` is no longer `seen`, or a little while.
fn wait(word: &AtomicU32, seen: u32) {
    let timeout = libc::timespec {
        tv_sec: 0,
        tv_nsec: 20_000_000,
    };
    // SAFETY: `word` and `timeout` are alive during the call.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT,
            seen,
            &raw const timeout,
        )
    };
}
