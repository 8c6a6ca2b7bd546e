//! What a CPU needs from the machine around it. Implemented by `vmm`, called by the
//! backends in place, from the vCPU's own thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::state::Block;

/// The machine as one vCPU sees it. An implementation belongs to one vCPU (it knows which
/// local APIC is meant), so several vCPUs hold several.
pub trait Bus {
    /// `IN`: reads `size` (1, 2 or 4) bytes from an I/O port. Nobody there: all ones.
    fn port_read(&self, port: u16, size: u8) -> u32;
    /// `OUT`: writes the low `size` (1, 2 or 4) bytes of `value` to an I/O port.
    fn port_write(&self, port: u16, size: u8, value: u32);
    /// A load from guest physical memory that is not RAM. Nobody there: all ones.
    fn mmio_read(&self, address: u64, data: &mut [u8]);
    /// A store to guest physical memory that is not RAM. Nobody there: ignored.
    fn mmio_write(&self, address: u64, data: &[u8]);
    /// `RDMSR` of an MSR that belongs to the machine, not the CPU: `IA32_APIC_BASE`,
    /// x2APIC (0x800 to 0x8ff), `IA32_TSC_DEADLINE`, KVM's clock MSRs. `None` raises #GP.
    fn msr_read(&self, msr: u32) -> Option<u64>;
    /// `WRMSR` of such an MSR. `None` raises #GP.
    fn msr_write(&self, msr: u32, value: u64) -> Option<()>;
    /// Whether the local APIC holds an interrupt above the processor priority. Expired
    /// timers count: this reads the clock.
    fn interrupt_pending(&self) -> bool;
    /// Takes that interrupt (IRR to ISR) and returns its vector.
    fn acknowledge_interrupt(&self) -> Option<u8>;
    /// CR8: bits 7:4 of the local APIC's task priority.
    fn task_priority(&self) -> u8;
    /// Sets CR8 (0 to 15).
    fn set_task_priority(&self, priority: u8);
    /// The host TSC value at which the local APIC timer fires next, for a halted vCPU to
    /// wait no longer than that.
    fn next_timer(&self) -> Option<u64>;
    /// Takes a signal that has come, in the order of their coming. Whoever sends one wakes
    /// the vCPU.
    fn take_signal(&self) -> Option<Signal> {
        None
    }
}

/// What a local APIC delivers to its CPU beside interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// Nonmaskable interrupt.
    Nmi,
    /// Reset to wait for a startup message.
    Init,
    /// Start in real mode at this page.
    Startup(u8),
}

/// The part of a vCPU that other threads touch: a word that translated code tests at
/// every block, and that a halted vCPU waits on.
#[derive(Debug, Default)]
#[repr(transparent)]
pub(crate) struct Attention(pub(crate) AtomicU32);

impl Attention {
    /// Waits until the word is set, or for `limit`.
    pub(crate) fn wait(&self, limit: Option<Duration>) {
        let time = limit.map(|d| libc::timespec {
            tv_sec: d.as_secs() as libc::time_t,
            tv_nsec: i64::from(d.subsec_nanos()),
        });
        let pointer = time.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: the word and the time are valid for the call; a spurious return is
        // allowed.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.0.as_ptr(),
                libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                0,
                pointer,
            );
        }
    }
}

/// Makes a vCPU look up from what it does: to take an interrupt, or to see that it is to
/// stop. Cheap to clone, callable from any thread, and never lost.
#[derive(Clone)]
pub struct Waker(pub(crate) Arc<Block>);

impl std::fmt::Debug for Waker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Waker").field(&self.0.attention.0).finish()
    }
}

impl Waker {
    /// Asks for attention. Returns at once; the vCPU reacts at its next block boundary, or
    /// now if it is halted.
    pub fn wake(&self) {
        if self.0.attention.0.swap(1, Ordering::SeqCst) == 0 {
            // SAFETY: FUTEX_WAKE only uses the address as a key; the Arc keeps it mapped.
            unsafe {
                libc::syscall(
                    libc::SYS_futex,
                    self.0.attention.0.as_ptr(),
                    libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
                    1,
                );
            }
        }
    }
}
