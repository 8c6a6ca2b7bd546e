//! Host faults in translated code: division errors, misaligned SSE operands, unmasked
//! floating-point exceptions. The handler only redirects the thread to a thunk; what the
//! fault means for the guest is settled in `engine`.
//!
//! A return stack that is full is a fault too, which only has room made. Faults anywhere else go to
//! whoever handled the signal before.

use std::cell::Cell;
use std::sync::Once;

use crate::returns;
use crate::state::State;

/// Where this thread's translated code is.
#[derive(Clone, Copy)]
pub(crate) struct Window {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) thunk: u64,
    pub(crate) state: *mut State,
    pub(crate) returns: returns::Range,
}

thread_local! {
    static WINDOW: Cell<Option<Window>> = const { Cell::new(None) };
    /// The thread's signal mask outside of windows.
    static MASK: Cell<Option<libc::sigset_t>> = const { Cell::new(None) };
}

const SIGNALS: [libc::c_int; 4] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL];

struct Previous(std::cell::UnsafeCell<[Option<libc::sigaction>; 4]>);

// SAFETY: written once under `INSTALL`, before any handler can read it.
unsafe impl Sync for Previous {}

static PREVIOUS: Previous = Previous(std::cell::UnsafeCell::new([None; 4]));
static INSTALL: Once = Once::new();

/// Declares which code this thread runs from now on; `None` ends it. In between the thread gets
/// no signals but those of its own faults: other handlers may need more stack than translated
/// code has.
pub(crate) fn set_window(window: Option<Window>) {
    INSTALL.call_once(install);
    if let Some(mask) = MASK.take() {
        // SAFETY: a mask that `pthread_sigmask` returned.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const mask, std::ptr::null_mut()) };
    }
    WINDOW.set(window);
    if window.is_some() {
        MASK.set(Some(block_others()));
    }
}

/// Blocks all signals but those handled here. Returns the mask from before.
fn block_others() -> libc::sigset_t {
    // SAFETY: both sets are this function's own; a zeroed one may be passed to `sigfillset`.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        let mut old: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut set);
        for signal in SIGNALS {
            libc::sigdelset(&raw mut set, signal);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const set, &raw mut old);
        old
    }
}

fn install() {
    for (index, &signal) in SIGNALS.iter().enumerate() {
        // SAFETY: both structures are valid for the call; the handler is async-signal-safe
        // (it reads a const-initialised thread-local and writes its own context).
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
            let mut old: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(signal, &raw const action, &raw mut old) == 0 {
                (*PREVIOUS.0.get())[index] = Some(old);
            }
        }
    }
}

extern "C" fn handler(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid ucontext to an SA_SIGINFO handler.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let rip = registers[libc::REG_RIP as usize] as u64;
    if let Some(window) = WINDOW.get()
        && (window.start..window.end).contains(&rip)
    {
        let address = registers[libc::REG_CR2 as usize] as u64;
        let rsp = registers[libc::REG_RSP as usize] as u64;
        if signal == libc::SIGSEGV {
            // SAFETY: the return stacks are mapped while the window is set, and this thread's.
            if let Some(rsp) = unsafe { window.returns.make_room(address, rsp) } {
                registers[libc::REG_RSP as usize] = rsp as i64;
                return;
            }
        }
        // SAFETY: the window's state is alive while it is set, and this thread is in
        // translated code, so no Rust reference to it is in use.
        let fault = unsafe { &mut (*window.state).host_fault };
        fault.trap = registers[libc::REG_TRAPNO as usize] as u64;
        fault.rip = rip;
        fault.rflags = registers[libc::REG_EFL as usize] as u64;
        fault.rax = registers[libc::REG_RAX as usize] as u64;
        registers[libc::REG_RIP as usize] = window.thunk as i64;
        return;
    }
    forward(signal, info, context);
}

fn forward(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let index = SIGNALS.iter().position(|&s| s == signal).unwrap_or(0);
    // SAFETY: written once before this handler was installed.
    let previous = unsafe { (*PREVIOUS.0.get())[index] };
    // SAFETY: the handlers are what was installed before with these very flags; with the
    // default action restored, returning repeats the fault and ends the process.
    unsafe {
        match previous {
            Some(old) if old.sa_sigaction > 1 && old.sa_flags & libc::SA_SIGINFO != 0 => {
                let call: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                    std::mem::transmute(old.sa_sigaction);
                call(signal, info, context);
            }
            Some(old) if old.sa_sigaction > 1 => {
                let call: extern "C" fn(libc::c_int) = std::mem::transmute(old.sa_sigaction);
                call(signal);
            }
            _ => {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(signal, &raw const action, std::ptr::null_mut());
            }
        }
    }
}
