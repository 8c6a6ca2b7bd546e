//! What happens on a forbidden system call: a message that names it, and the end by SIGSYS.
//!
//! The kernel has refused the call before the handler runs. A process that was taken over may
//! block or replace the handler; blocked, the signal kills without a message, and a handler of
//! its own gains nothing.

// A signal handler.
#![allow(unsafe_code)]

use std::io;
use std::ptr;

/// System calls that a process which has been taken over would try first.
const NAMES: &[(i64, &str)] = &[
    (libc::SYS_accept4, "accept4"),
    (libc::SYS_bind, "bind"),
    (libc::SYS_bpf, "bpf"),
    (libc::SYS_clone, "clone"),
    (libc::SYS_connect, "connect"),
    (libc::SYS_dup3, "dup3"),
    (libc::SYS_execve, "execve"),
    (libc::SYS_execveat, "execveat"),
    (libc::SYS_fcntl, "fcntl"),
    (libc::SYS_fork, "fork"),
    (libc::SYS_io_uring_setup, "io_uring_setup"),
    (libc::SYS_ioctl, "ioctl"),
    (libc::SYS_kill, "kill"),
    (libc::SYS_listen, "listen"),
    (libc::SYS_memfd_create, "memfd_create"),
    (libc::SYS_mmap, "mmap"),
    (libc::SYS_mount, "mount"),
    (libc::SYS_mprotect, "mprotect"),
    (libc::SYS_perf_event_open, "perf_event_open"),
    (libc::SYS_pidfd_open, "pidfd_open"),
    (libc::SYS_prctl, "prctl"),
    (libc::SYS_process_vm_readv, "process_vm_readv"),
    (libc::SYS_process_vm_writev, "process_vm_writev"),
    (libc::SYS_ptrace, "ptrace"),
    (libc::SYS_recvmsg, "recvmsg"),
    (libc::SYS_sendto, "sendto"),
    (libc::SYS_setns, "setns"),
    (libc::SYS_socket, "socket"),
    (libc::SYS_socketpair, "socketpair"),
    (libc::SYS_tgkill, "tgkill"),
    (libc::SYS_tkill, "tkill"),
    (libc::SYS_unlink, "unlink"),
    (libc::SYS_unlinkat, "unlinkat"),
    (libc::SYS_unshare, "unshare"),
    (libc::SYS_userfaultfd, "userfaultfd"),
    (libc::SYS_vfork, "vfork"),
];

/// Makes SIGSYS tell what was called and end the process.
pub(crate) fn report_and_die() -> io::Result<()> {
    // SAFETY: all zeroes is a valid sigaction, completed below; the handler calls only what is
    // async-signal-safe, and with SA_RESETHAND runs once.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags =
            libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER | libc::SA_RESETHAND;
        libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut())
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// `si_code` of a signal by seccomp (`asm-generic/siginfo.h`); others were sent by somebody.
const SYS_SECCOMP: i32 = 1;

extern "C" fn handler(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes valid structures to an SA_SIGINFO handler. After SIGSYS by
    // seccomp RAX is the number of the system call, which was not carried out.
    let (code, number) = unsafe {
        let registers = &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        ((*info).si_code, registers[libc::REG_RAX as usize])
    };
    if code == SYS_SECCOMP {
        report(number);
    }
    // SAFETY: async-signal-safe. The handler has been reset and the signal is not blocked, so
    // it ends the process here.
    unsafe { libc::raise(libc::SIGSYS) };
}

/// Says which system call it was.
fn report(number: i64) {
    let mut message = Message::default();
    message.add(b"strata: the sandbox stopped this process at system call ");
    message.add_number(number.unsigned_abs());
    if let Some((_, name)) = NAMES.iter().find(|(known, _)| *known == number) {
        message.add(b" (");
        message.add(name.as_bytes());
        message.add(b")");
    }
    message.add(b"; it has ended\n");
    // SAFETY: async-signal-safe; the buffer is valid for its length.
    unsafe { libc::write(2, message.bytes.as_ptr().cast(), message.length) };
}

/// Text that is put together without allocating.
struct Message {
    bytes: [u8; 128],
    length: usize,
}

impl Default for Message {
    fn default() -> Self {
        Self {
            bytes: [0; 128],
            length: 0,
        }
    }
}

impl Message {
    fn add(&mut self, text: &[u8]) {
        for byte in text {
            if let Some(place) = self.bytes.get_mut(self.length) {
                *place = *byte;
                self.length += 1;
            }
        }
    }

    fn add_number(&mut self, number: u64) {
        if number >= 10 {
            self.add_number(number / 10);
        }
        self.add(&[b'0' + (number % 10) as u8]);
    }
}
