//! The forked process: sets itself up, then lives inside its signal handler.
//!
//! Every case begins with the handler's return (the kernel loads all registers from the
//! signal frame) and ends with a signal (the kernel stores them there). Runs after a fork
//! of a threaded process and with a test's own FS base, so: no allocation, no locks, no
//! thread-local storage, no libc wrapper that sets `errno`.

use std::arch::{asm, naked_asm};
use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use super::Channel;
use crate::case::{Case, End, HEADER_OFFSET, Outcome, Width, YMM_OFFSET, has_error_code};
use crate::layout::{self, Access, FS_BASE, GS_BASE, PAGE, PAGES};
use crate::pages::{self, Store};

const PAGE_BYTES: usize = PAGE as usize;
const SIGNAL_STACK: usize = 256 * 1024;
/// How often a case's time is looked at, in microseconds of its CPU time.
const TICK_MICROSECONDS: i64 = 4_000;
/// Bytes of the signal frame's FXSAVE image that are the test's; what follows is the
/// kernel's own description of the frame.
const LEGACY_BYTES: usize = 416;

const SIGNALS: [c_int; 6] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGTRAP,
    libc::SIGVTALRM,
];

/// What the handler knows. One per process; the handler has no other way to find it.
struct Server {
    channel: *mut Channel,
    pristine: *const [u8; PAGE_BYTES],
    pages: MappedPages,
    /// Index of the case that is running, if one is.
    running: Option<u32>,
    /// Batches taken so far.
    batch: u32,
    /// The case seen by the last tick.
    ticked: Option<u32>,
    has_fsgsbase: bool,
}

static SERVER: AtomicPtr<Server> = AtomicPtr::new(std::ptr::null_mut());

/// What an exit status of the process means.
pub(super) fn step_name(step: c_int) -> &'static str {
    match step {
        1 => "map the test pages",
        2 => "install its signal handlers",
        3 => "set its FS and GS bases",
        4 => "make segments for FS and GS",
        5 => "lock itself in with seccomp",
        _ => "start",
    }
}

/// Runs the process until it is killed.
///
/// # Safety
/// Only in a freshly forked process. `channel` must stay mapped, `pristine` must hold one
/// page for each of [`PAGES`], and both must outlive the process.
pub(super) unsafe fn main(channel: *mut Channel, pristine: &[[u8; PAGE_BYTES]]) -> ! {
    let mut server = Server {
        channel,
        pristine: pristine.as_ptr(),
        pages: MappedPages,
        running: None,
        batch: 0,
        ticked: None,
        has_fsgsbase: has_fsgsbase(),
    };
    // SAFETY: single-threaded process; each step affects this process alone.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let no_core = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        libc::setrlimit(libc::RLIMIT_CORE, &raw const no_core);
        require(1, map_pages(pristine));
        require(2, install_handlers());
        SERVER.store(&raw mut server, Ordering::Release);
        require(3, set_bases());
        require(4, !server.has_fsgsbase || set_segments());
        require(5, lock_in());
        // enters the handler for the first time, which never comes back here
        asm!("ud2", options(noreturn));
    }
}

fn require(step: c_int, done: bool) {
    if !done {
        // SAFETY: exits without running anything of the parent's.
        unsafe { libc::_exit(step) };
    }
}

/// Whether ring 3 may use WRFSBASE and its kin (`HWCAP2_FSGSBASE`).
pub(crate) fn has_fsgsbase() -> bool {
    // SAFETY: reads the auxiliary vector.
    unsafe { libc::getauxval(libc::AT_HWCAP2) & 2 != 0 }
}

fn map_pages(pristine: &[[u8; PAGE_BYTES]]) -> bool {
    const READ_WRITE: c_int = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the name is a NUL-terminated literal.
    let code = unsafe { libc::memfd_create(c"code".as_ptr(), libc::MFD_CLOEXEC) };
    // SAFETY: `code` is ours; a failure shows in the mappings below.
    if unsafe { libc::ftruncate(code, layout::CODE_SIZE as i64) } != 0 {
        return false;
    }
    PAGES
        .iter()
        .zip(pristine)
        .all(|(&(address, access), contents)| {
            let (protection, file) = match access {
                Access::ReadOnly => (libc::PROT_READ, None),
                Access::Writable => (READ_WRITE, None),
                Access::Code => (READ_WRITE | libc::PROT_EXEC, Some(code)),
            };
            let offset = address.wrapping_sub(layout::CODE);
            // SAFETY: `map_page` mapped the page for writing; the copy stays within it.
            unsafe {
                map_page(address, file, offset)
                    && (file.is_none() || map_page(layout::ALIAS + offset, file, offset))
                    && {
                        (address as *mut [u8; PAGE_BYTES]).copy_from_nonoverlapping(contents, 1);
                        libc::mprotect(address as *mut c_void, PAGE_BYTES, protection) == 0
                    }
            }
        })
}

/// Maps a page of `file`, or a fresh one, readable and writable at an address not in use.
fn map_page(address: u64, file: Option<c_int>, offset: u64) -> bool {
    let (flags, fd, offset) = match file {
        Some(fd) => (libc::MAP_SHARED, fd, offset),
        None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0),
    };
    // SAFETY: MAP_FIXED_NOREPLACE takes no address that is in use.
    let page = unsafe {
        libc::mmap(
            address as *mut c_void,
            PAGE_BYTES,
            libc::PROT_READ | libc::PROT_WRITE,
            flags | libc::MAP_FIXED_NOREPLACE,
            fd,
            offset as i64,
        )
    };
    page as u64 == address
}

/// # Safety
/// Only in a process of our own: its signal handlers are replaced.
unsafe fn install_handlers() -> bool {
    // SAFETY: the alternate stack is a mapping that is never freed; `entry` is a handler of
    // the SA_SIGINFO form; the structures are zeroed plain data filled in by field.
    unsafe {
        let stack = libc::mmap(
            std::ptr::null_mut(),
            SIGNAL_STACK,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE,
            -1,
            0,
        );
        if stack == libc::MAP_FAILED {
            return false;
        }
        let alternate = libc::stack_t {
            ss_sp: stack,
            ss_flags: 0,
            ss_size: SIGNAL_STACK,
        };
        if libc::sigaltstack(&raw const alternate, std::ptr::null_mut()) != 0 {
            return false;
        }
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = entry as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        for signal in SIGNALS {
            libc::sigaddset(&raw mut action.sa_mask, signal);
        }
        let tick = libc::timeval {
            tv_sec: 0,
            tv_usec: TICK_MICROSECONDS,
        };
        let timer = libc::itimerval {
            it_interval: tick,
            it_value: tick,
        };
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        SIGNALS
            .iter()
            .all(|&s| libc::sigaction(s, &raw const action, std::ptr::null_mut()) == 0)
            && libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()) == 0
            && libc::setitimer(libc::ITIMER_VIRTUAL, &raw const timer, std::ptr::null_mut()) == 0
    }
}

/// # Safety
/// Nothing that uses thread-local storage may run in this process afterwards.
unsafe fn set_bases() -> bool {
    const ARCH_SET_GS: u64 = 0x1001;
    const ARCH_SET_FS: u64 = 0x1002;
    // SAFETY: the caller's promise.
    unsafe {
        system_call(libc::SYS_arch_prctl, ARCH_SET_GS, GS_BASE, 0, 0) == 0
            && system_call(libc::SYS_arch_prctl, ARCH_SET_FS, FS_BASE, 0, 0) == 0
    }
}

/// Loads FS and GS from descriptors of their own, and sets their bases again.
///
/// # Safety
/// As for `set_bases`, and the kernel must allow WRFSBASE.
unsafe fn set_segments() -> bool {
    // struct user_desc: number, base, limit in pages, flags: 32-bit writable data
    const FLAT: u32 = 0x51;
    // the same of 16 bits, in bytes; code is contents 2
    const SMALL: u32 = 0x40;
    const CODE: u32 = 0x44;
    const WRITE: u64 = 0x11;
    let flat =
        [(0, FS_BASE), (1, GS_BASE)].map(|(number, base)| [number, base as u32, 0xf_ffff, FLAT]);
    let small = layout::SEGMENTS_16.map(|s| {
        let flags = if s.code { CODE } else { SMALL };
        [u32::from(s.selector >> 3), s.base as u32, s.limit, flags]
    });
    let described = flat.iter().chain(&small).all(|description| {
        let pointer = description.as_ptr() as u64;
        let size = size_of_val(description) as u64;
        // SAFETY: the description outlives the call, which only reads it.
        unsafe { system_call(libc::SYS_modify_ldt, WRITE, pointer, size, 0) == 0 }
    });
    if described {
        // SAFETY: the caller's promise; the selectors were just described.
        unsafe {
            asm!("mov fs, {:x}", in(reg) layout::FS_SELECTOR, options(nostack));
            asm!("mov gs, {:x}", in(reg) layout::GS_SELECTOR, options(nostack));
            asm!("wrfsbase {}", in(reg) FS_BASE, options(nostack));
            asm!("wrgsbase {}", in(reg) GS_BASE, options(nostack));
        }
    }
    described
}

/// Leaves this process nothing but returning from signals, waiting and exiting, and not
/// even that from generated code.
///
/// # Safety
/// Only in a process of our own: there is no way back.
unsafe fn lock_in() -> bool {
    const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
    // offsets into struct seccomp_data
    const NUMBER: u32 = 0;
    const ARCH: u32 = 4;
    const RIP_LOW: u32 = 8;
    const RIP_HIGH: u32 = 12;
    let load = |offset| filter(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset);
    let equal =
        |value, yes, no| filter(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, yes, no, value);
    let verdict = |value| filter(libc::BPF_RET | libc::BPF_K, 0, 0, value);
    let mut program = [
        load(ARCH),
        equal(AUDIT_ARCH_X86_64, 0, 10),
        load(RIP_HIGH),
        equal(0, 0, 3),
        load(RIP_LOW),
        filter(
            libc::BPF_ALU | libc::BPF_AND | libc::BPF_K,
            0,
            0,
            0xffff_0000,
        ),
        equal(layout::CODE as u32, 5, 0),
        load(NUMBER),
        equal(libc::SYS_rt_sigreturn as u32, 2, 0),
        equal(libc::SYS_futex as u32, 1, 0),
        equal(libc::SYS_exit_group as u32, 0, 1),
        verdict(libc::SECCOMP_RET_ALLOW),
        verdict(libc::SECCOMP_RET_KILL_PROCESS),
    ];
    let filters = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    let filters = &raw const filters as u64;
    // SAFETY: `program` is alive during the calls, which copy it.
    unsafe {
        system_call(libc::SYS_prctl, libc::PR_SET_NO_NEW_PRIVS as u64, 1, 0, 0) == 0
            && system_call(
                libc::SYS_prctl,
                libc::PR_SET_SECCOMP as u64,
                u64::from(libc::SECCOMP_MODE_FILTER),
                filters,
                0,
            ) == 0
    }
}

fn filter(code: u32, yes: u8, no: u8, value: u32) -> libc::sock_filter {
    libc::sock_filter {
        code: code as u16,
        jt: yes,
        jf: no,
        k: value,
    }
}

/// A system call without libc's `errno`. The fifth and later arguments are zero.
///
/// # Safety
/// As the system call itself demands.
unsafe fn system_call(number: i64, a: u64, b: u64, c: u64, d: u64) -> i64 {
    let result;
    // SAFETY: the kernel's calling convention: RCX and R11 are lost, the rest is kept; the
    // call's own conditions are the caller's.
    unsafe {
        asm!(
            "syscall",
            inout("rax") number => result,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") 0, in("r9") 0,
            lateout("rcx") _, lateout("r11") _,
        );
    }
    result
}

/// Where the kernel enters: a test may have set AC, NT or ID, which the kernel leaves set.
#[unsafe(naked)]
unsafe extern "C" fn entry(_signal: c_int, _info: *mut libc::siginfo_t, _context: *mut c_void) {
    naked_asm!(
        "push 0x202",
        "popfq",
        "jmp {handler}",
        handler = sym on_signal,
    )
}

unsafe extern "C" fn on_signal(
    signal: c_int,
    _info: *mut libc::siginfo_t,
    context: *mut libc::ucontext_t,
) {
    // SAFETY: `main` stored a server that is never freed, in the one thread there is, with
    // all these signals blocked while a handler runs; the kernel passes a valid context.
    let (server, context) = unsafe { (&mut *SERVER.load(Ordering::Acquire), &mut *context) };
    if let Some(index) = server.running {
        if signal == libc::SIGVTALRM && server.ticked != Some(index) {
            server.ticked = Some(index);
            return;
        }
        server.record(index, signal, context);
        server.ticked = None;
    } else if signal == libc::SIGVTALRM {
        return;
    }
    server.load_next(context);
}

impl Server {
    fn channel(&self) -> &Channel {
        // SAFETY: shared with the parent and never unmapped; only atomics are used here.
        unsafe { &*self.channel }
    }

    fn pristine(&self) -> &'static [[u8; PAGE_BYTES]] {
        // SAFETY: `main`'s caller promised one page for each of PAGES, for good.
        unsafe { std::slice::from_raw_parts(self.pristine, PAGES.len()) }
    }

    /// Stores what the signal frame and the pages say as the outcome of case `index`.
    fn record(&mut self, index: u32, signal: c_int, context: &libc::ucontext_t) {
        // SAFETY: `index` is below the batch's count, which the parent keeps within BATCH;
        // the parent reads an outcome only after the response.
        let outcome: &mut Outcome = unsafe {
            &mut *(&raw mut (*self.channel).outcomes)
                .cast::<Outcome>()
                .add(index as usize)
        };
        let registers = &context.uc_mcontext.gregs;
        let greg = |n: c_int| registers[n as usize] as u64;
        for (slot, n) in outcome.registers.gpr.iter_mut().zip(GREGS) {
            *slot = greg(n);
        }
        outcome.registers.rip = greg(libc::REG_RIP);
        outcome.registers.rflags = greg(libc::REG_EFL);
        outcome.end = if signal == libc::SIGVTALRM {
            End::Timeout
        } else {
            End::Exception
        };
        outcome.vector = greg(libc::REG_TRAPNO) as u32;
        outcome.error_code = if has_error_code(outcome.vector) {
            greg(libc::REG_ERR)
        } else {
            0
        };
        outcome.cr2 = if outcome.vector == 14 {
            greg(libc::REG_CR2)
        } else {
            0
        };
        (outcome.fs_base, outcome.gs_base) = self.take_bases();
        let frame = context.uc_mcontext.fpregs.cast::<u8>();
        // SAFETY: on an AVX host the kernel stores an XSAVE image in standard format, whose
        // AVX part ends at XSAVE_SIZE; the two memories are apart.
        unsafe {
            frame.copy_to_nonoverlapping(outcome.xsave.0.as_mut_ptr(), outcome.xsave.0.len());
        };
        outcome.xsave.normalise();
        let pristine = self.pristine();
        pages::take_changes(&mut self.pages, pristine, &mut outcome.changes);
    }

    /// Reads FS and GS bases and puts the tests' own ones back.
    fn take_bases(&self) -> (u64, u64) {
        if !self.has_fsgsbase {
            return (FS_BASE, GS_BASE);
        }
        let (fs, gs);
        // SAFETY: the kernel allows these instructions (AT_HWCAP2); nothing in this process
        // uses thread-local storage.
        unsafe {
            asm!("rdfsbase {}", out(reg) fs, options(nostack, nomem));
            asm!("rdgsbase {}", out(reg) gs, options(nostack, nomem));
            asm!("wrfsbase {}", in(reg) FS_BASE, options(nostack));
            asm!("wrgsbase {}", in(reg) GS_BASE, options(nostack));
        }
        (fs, gs)
    }

    /// Makes the signal frame the start of the next case, waiting for one if need be.
    fn load_next(&mut self, context: &mut libc::ucontext_t) {
        let next = match self.running {
            Some(index) if index + 1 < self.channel().count.load(Ordering::Relaxed) => index + 1,
            _ => {
                self.next_batch();
                0
            }
        };
        self.running = Some(next);
        self.channel().current.store(next, Ordering::Release);
        // SAFETY: `next` is below the batch's count; the parent does not write cases while
        // a batch runs.
        let case: &Case = unsafe {
            &*(&raw const (*self.channel).cases)
                .cast::<Case>()
                .add(next as usize)
        };
        let code = &case.code[..case.code.len().min(case.code_length as usize)];
        pages::write(&mut self.pages, case.code_address, code);
        for patch in case.patches.iter().take(case.patch_count as usize) {
            let length = patch.bytes.len().min(patch.length as usize);
            pages::write(&mut self.pages, patch.address, &patch.bytes[..length]);
        }
        let registers = &mut context.uc_mcontext.gregs;
        for (value, n) in case.registers.gpr.iter().zip(GREGS) {
            registers[n as usize] = *value as i64;
        }
        registers[libc::REG_RIP as usize] = case.registers.rip as i64;
        registers[libc::REG_EFL as usize] = case.registers.rflags as i64;
        set_selectors(registers, case.width);
        let frame = context.uc_mcontext.fpregs.cast::<u8>();
        let source = case.xsave.0.as_ptr();
        // SAFETY: as in `record`; the kernel's own fields behind the legacy image and in
        // the rest of the header stay as the kernel wrote them.
        unsafe {
            frame.copy_from_nonoverlapping(source, LEGACY_BYTES);
            frame.add(HEADER_OFFSET).cast::<u64>().write_unaligned(7);
            frame
                .add(YMM_OFFSET)
                .copy_from_nonoverlapping(source.add(YMM_OFFSET), 256);
        }
    }

    /// Reports the last batch as done and waits for another.
    fn next_batch(&mut self) {
        let channel = self.channel();
        channel.response.store(self.batch, Ordering::Release);
        futex_wake(&channel.response);
        while channel.request.load(Ordering::Acquire) == self.batch {
            futex_wait(&channel.request, self.batch);
        }
        self.batch = channel.request.load(Ordering::Acquire);
    }
}

/// Sets CS and SS, the lowest and highest of the four selectors that share a slot of the
/// frame, and loads DS and ES, which are in no frame and which 64-bit code does without.
fn set_selectors(registers: &mut [libc::greg_t; 23], width: Width) {
    let (code, stack, data) = match width {
        Width::Bits64 => (
            layout::CODE_SELECTOR,
            layout::STACK_SELECTOR,
            layout::STACK_SELECTOR,
        ),
        Width::Bits32 => (
            layout::CODE_32_SELECTOR,
            layout::STACK_SELECTOR,
            layout::STACK_SELECTOR,
        ),
        Width::Bits16 => (
            layout::CODE_16.selector,
            layout::STACK_16.selector,
            layout::DATA_16.selector,
        ),
    };
    let slot = &mut registers[libc::REG_CSGSFS as usize];
    let kept = *slot as u64 & 0x0000_ffff_ffff_0000;
    *slot = (kept | u64::from(code) | u64::from(stack) << 48) as i64;
    // SAFETY: `set_segments` made the selectors; 64-bit code uses neither DS nor ES.
    unsafe {
        asm!("mov ds, {0:x}", "mov es, {0:x}", in(reg) data, options(nostack));
    }
}

/// Where the general registers are in a signal frame, in encoding order.
const GREGS: [c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

fn futex_wake(word: &AtomicU32) {
    // SAFETY: FUTEX_WAKE uses the address as a key only.
    unsafe {
        system_call(
            libc::SYS_futex,
            word.as_ptr() as u64,
            libc::FUTEX_WAKE as u64,
            1,
            0,
        )
    };
}

fn futex_wait(word: &AtomicU32, seen: u32) {
    // SAFETY: `word` is alive during the call; a null timeout waits for good.
    unsafe {
        system_call(
            libc::SYS_futex,
            word.as_ptr() as u64,
            libc::FUTEX_WAIT as u64,
            u64::from(seen),
            0,
        );
    }
}

/// The pages at the addresses where tests see them.
struct MappedPages;

impl Store for MappedPages {
    fn page(&self, index: usize) -> &[u8; PAGE_BYTES] {
        // SAFETY: `map_pages` mapped a readable page there; no test runs while a handler,
        // the only caller, does.
        unsafe { &*(PAGES[index].0 as *const [u8; PAGE_BYTES]) }
    }

    fn write(&mut self, index: usize, offset: usize, bytes: &[u8]) {
        let (page, access) = PAGES[index];
        if access == Access::ReadOnly || offset + bytes.len() > PAGE_BYTES {
            return;
        }
        // SAFETY: the range lies within a page that is mapped writable.
        unsafe {
            ((page as usize + offset) as *mut u8)
                .copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        }
    }
}
