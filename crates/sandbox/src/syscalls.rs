//! seccomp: the system calls of a running machine, of a network's switch, or of a server of files,
//! and no others.
//!
//! Three filters, of which the strictest answer counts: what is not on the list ends the process
//! (see `violation`), what libraries try and can do without fails with an error.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

use crate::{Role, violation};

/// `arch_prctl(2)`: sets the GS base, where a vCPU's state block is (`asm/prctl.h`).
const ARCH_SET_GS: u64 = 0x1001;

/// Allowed to a machine with any arguments.
const MACHINE: &[i64] = &[
    // Descriptors that are open: streams, disks, the pipe for signals.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_recvfrom,
    libc::SYS_shutdown,
    libc::SYS_close,
    // Memory; mapping it is below.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // Threads; starting them is below.
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_membarrier,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    // Signals to this process, and its own number to send one.
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    // Time and random numbers.
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_nanosleep,
    libc::SYS_getrandom,
];

/// Allowed besides to a machine to which others connect: to let them in, and to wait for them.
const LISTENING: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_wait,
];

/// Allowed to a switch with any arguments.
const NETWORK: &[i64] = &[
    // Sockets; making them is below.
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_close,
    libc::SYS_connect,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_listen,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_write,
    libc::SYS_writev,
    // Waiting for them; the lock of whoever comes in.
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_wait,
    libc::SYS_flock,
    // Memory; mapping it is below.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // The end of the process, and signals.
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    // Time and random numbers.
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
];

/// Allowed to a server of files beside what a machine may; making files is below.
const FILES: &[i64] = &[
    // From an open directory, by a name in it.
    libc::SYS_linkat,
    libc::SYS_newfstatat,
    libc::SYS_readlinkat,
    libc::SYS_renameat2,
    libc::SYS_statx,
    libc::SYS_symlinkat,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
    libc::SYS_fchownat,
    // What is open.
    libc::SYS_dup,
    libc::SYS_fstatfs,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_umask,
    // In whose name files are made, where the server is root; of one thread.
    libc::SYS_setresgid,
    libc::SYS_setresuid,
];

/// Fail with EACCES. The allocator looks for settings of the kernel, a panic for debug symbols,
/// the standard library for the size of a file; each has an answer of its own where it finds none.
const REFUSED: &[i64] = &[
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_getcwd,
    libc::SYS_lstat,
    libc::SYS_newfstatat,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_stat,
    libc::SYS_statx,
];

/// Fails with ENOSYS: its flags are in memory, where a filter cannot look. The C library then
/// calls clone(2).
const UNKNOWN: &[i64] = &[libc::SYS_clone3];

pub(crate) fn enter(role: Role<'_>) -> Result<String, String> {
    let programs = programs(role).map_err(|error| error.to_string())?;
    violation::report_and_die().map_err(|error| format!("cannot handle SIGSYS: {error}"))?;
    for program in &programs {
        seccompiler::apply_filter_all_threads(program)
            .map_err(|error| format!("the host refuses the filter: {error}"))?;
    }
    let count = allowed(role).map_err(|error| error.to_string())?.len();
    Ok(format!("{count} system calls"))
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// The filters. The last one to be applied is the one that forbids applying more.
fn programs(role: Role<'_>) -> Result<[BpfProgram; 3], BackendError> {
    let compile = |rules, otherwise, action| {
        SeccompFilter::new(rules, otherwise, action, TargetArch::x86_64)?.try_into()
    };
    let fail = |numbers, error: i32| {
        let action = SeccompAction::Errno(error as u32);
        compile(any(numbers), SeccompAction::Allow, action)
    };
    let mut rules = allowed(role)?;
    let refused: Vec<i64> = REFUSED
        .iter()
        .filter(|number| !rules.contains_key(number))
        .copied()
        .collect();
    rules.extend(any(&refused));
    rules.extend(any(UNKNOWN));
    Ok([
        fail(&refused, libc::EACCES)?,
        fail(UNKNOWN, libc::ENOSYS)?,
        compile(rules, SeccompAction::Trap, SeccompAction::Allow)?,
    ])
}

/// Rules that match whatever the arguments are.
fn any(numbers: &[i64]) -> Rules {
    numbers.iter().map(|number| (*number, Vec::new())).collect()
}

/// What is allowed, and with which arguments.
fn allowed(role: Role<'_>) -> Result<Rules, BackendError> {
    let mut rules = match role {
        Role::Machine => allowed_to_machine()?,
        Role::ListeningMachine => {
            let mut rules = allowed_to_machine()?;
            rules.extend(any(LISTENING));
            rules
        }
        Role::Network => allowed_to_network()?,
        Role::Files(_) => allowed_to_server()?,
    };
    // Memory that can be executed was all mapped before, and none is ever added.
    let no_exec = vec![bits(2, libc::PROT_EXEC as u64, 0)?];
    rules.insert(libc::SYS_mmap, no_exec.clone());
    rules.insert(libc::SYS_mprotect, no_exec);
    // A signal to ourselves: suspending with Ctrl-Z, aborting.
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, one_of(0, &[own])?);
    let mut flags = vec![libc::F_GETFD as u64, libc::F_GETFL as u64];
    if matches!(role, Role::Files(_)) {
        // A guest may make an open file one that appends.
        flags.push(libc::F_SETFL as u64);
    }
    rules.insert(libc::SYS_fcntl, one_of(1, &flags)?);
    Ok(rules)
}

fn allowed_to_network() -> Result<Rules, BackendError> {
    let mut rules = any(NETWORK);
    // The internet's, and no others: no Unix sockets, netlink, or raw packets.
    let families = [libc::AF_INET, libc::AF_INET6].map(|family| family as u64);
    rules.insert(libc::SYS_socket, one_of(0, &families)?);
    // Connected to itself and nobody else.
    let unix = libc::AF_UNIX as u64;
    rules.insert(libc::SYS_socketpair, one_of(0, &[unix])?);
    Ok(rules)
}

fn allowed_to_server() -> Result<Rules, BackendError> {
    let mut rules = allowed_to_machine()?;
    rules.extend(any(FILES));
    // It has no terminal, and no pipe for signals.
    for number in [libc::SYS_ioctl, libc::SYS_sendto, libc::SYS_arch_prctl] {
        rules.remove(&number);
    }
    // No file is made, or made to be, set-user-ID or set-group-ID, nor a device.
    let set_ids = u64::from(libc::S_ISUID | libc::S_ISGID);
    rules.insert(libc::SYS_fchmod, vec![bits(1, set_ids, 0)?]);
    rules.insert(libc::SYS_fchmodat, vec![bits(2, set_ids, 0)?]);
    rules.insert(libc::SYS_mkdirat, vec![bits(2, set_ids, 0)?]);
    // What open(2) is told of a mode counts only where it makes a file.
    let makes = (libc::O_CREAT | libc::O_TMPFILE & !libc::O_DIRECTORY) as u64;
    let opens = vec![bits(2, makes, 0)?, bits(3, set_ids, 0)?];
    rules.insert(libc::SYS_openat, opens);
    let kinds = [0, libc::S_IFREG, libc::S_IFIFO, libc::S_IFSOCK].map(u64::from);
    let mask = set_ids | u64::from(libc::S_IFMT);
    let nodes = kinds.iter().map(|kind| bits(2, mask, *kind));
    rules.insert(libc::SYS_mknodat, nodes.collect::<Result<_, _>>()?);
    Ok(rules)
}

fn allowed_to_machine() -> Result<Rules, BackendError> {
    let mut rules = any(MACHINE);
    // Threads, but no processes and no namespaces.
    let thread = (libc::CLONE_THREAD | libc::CLONE_VM) as u64;
    let namespaces = libc::CLONE_NEWUSER
        | libc::CLONE_NEWNS
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP;
    let mask = thread | namespaces as u64;
    rules.insert(libc::SYS_clone, vec![bits(0, mask, thread)?]);
    // A byte into the pipe for signals, which is connected: no address.
    let no_address = condition(4, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?;
    rules.insert(libc::SYS_sendto, vec![SeccompRule::new(vec![no_address])?]);
    // The terminal's mode and size. TIOCSTI, which types into it, is what must not be here.
    let terminal = [
        libc::TCGETS,
        libc::TCSETS,
        libc::TCGETS2,
        libc::TCSETS2,
        libc::TIOCGWINSZ,
        // What a tap device leaves to the guest.
        libc::TUNSETOFFLOAD,
    ];
    rules.insert(
        libc::SYS_ioctl,
        one_of(1, &terminal.map(|request| request))?,
    );
    let names_and_timers = [libc::PR_SET_NAME, libc::PR_SET_TIMERSLACK].map(|option| option as u64);
    rules.insert(libc::SYS_prctl, one_of(0, &names_and_timers)?);
    rules.insert(libc::SYS_arch_prctl, one_of(0, &[ARCH_SET_GS])?);
    Ok(rules)
}

fn condition(
    argument: u8,
    length: SeccompCmpArgLen,
    operator: SeccompCmpOp,
    value: u64,
) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, length, operator, value)
}

/// An argument of 32 bits that has one of these values.
fn one_of(argument: u8, values: &[u64]) -> Result<Vec<SeccompRule>, BackendError> {
    let rule = |value: &u64| {
        let equal = condition(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, *value)?;
        SeccompRule::new(vec![equal])
    };
    values.iter().map(rule).collect()
}

/// An argument of 64 bits whose bits under `mask` are `value`.
fn bits(argument: u8, mask: u64, value: u64) -> Result<SeccompRule, BackendError> {
    let operator = SeccompCmpOp::MaskedEq(mask);
    SeccompRule::new(vec![condition(
        argument,
        SeccompCmpArgLen::Qword,
        operator,
        value,
    )?])
}
