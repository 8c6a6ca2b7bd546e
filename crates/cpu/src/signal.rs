//! Host faults in translated code: division errors, misaligned SSE operands, unmasked
//! floating-point exceptions. The handler only redirects the thread to a thunk; what the
//! fault means for the guest is settled in `engine`.
//!
//! Faults anywhere else go to whoever handled the signal before.

use std::cell::Cell;
use std::sync::Once;

use crate::state::State;

/// Where this thread's translated code is.
#[derive(Clone, Copy)]
pub(crate) struct Window {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) thunk: u64,
    pub(crate) state: *mut State,
}

thread_local! {
    static WINDOW: Cell<Option<Window>> = const { Cell::new(None) };
}

const SIGNALS: [libc::c_int; 4] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL];

struct Previous(std::cell::UnsafeCell<[Option<libc::sigaction>; 4]>);

// SAFETY: written once under `INSTALL`, before any handler can read it.
unsafe impl Sync for Previous {}

static PREVIOUS: Previous = Previous(std::cell::UnsafeCell::new([None; 4]));
static INSTALL: Once = Once::new();

/// Declares which code this thread runs from now on; `None` ends it.
pub(crate) fn set_window(window: Option<Window>) {
    INSTALL.call_once(install);
    WINDOW.set(window);
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
