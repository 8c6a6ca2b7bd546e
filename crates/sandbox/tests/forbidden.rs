//! What a process can no longer do behind each layer alone: every test makes a process, locks it
//! up, and lets it try. Where the host does not give a layer, its tests say so and pass.

// The raw system calls of a process that was taken over.
#![allow(unsafe_code)]

mod common;

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd};
use std::process;
use std::ptr;
use std::thread;
use std::time::Duration;

use strata_machines::{Entry, LogReader, LogSize, LogWriter, Registry, Spec, State, Stream};
use strata_sandbox::{Layer, Role, enter};

use common::{End, error_of, open, told_as};

const PASSWD: &CStr = c"/etc/passwd";
/// Runs `attempt` behind `layers` in a process of its own. Gives how it ended and what it wrote
/// to standard error; `None` where the host does not give one of the layers.
fn told(layers: &[Layer], attempt: impl FnOnce() -> i32) -> Option<(End, String)> {
    told_as(Role::Machine, layers, attempt)
}

/// Whether the host gave the layers and the attempt ended in this way.
#[track_caller]
fn ends(layers: &[Layer], expected: &End, attempt: impl FnOnce() -> i32) {
    if let Some((end, text)) = told(layers, attempt) {
        assert_eq!(end, *expected, "{text}");
    }
}

#[track_caller]
fn fails(layer: Layer, error: i32, attempt: impl FnOnce() -> i32) {
    ends(&[layer], &End::Errno(error), attempt);
}

/// seccomp ends the process, and the message names the call.
#[track_caller]
fn is_stopped(name: &str, attempt: impl FnOnce() -> i32) {
    if let Some((end, text)) = told(&[Layer::Seccomp], attempt) {
        assert_eq!(end, End::Signal(libc::SIGSYS), "{text}");
        assert!(text.contains(&format!("({name})")), "{text}");
    }
}

fn kill(process: u32) -> i32 {
    // SAFETY: signal 0 only asks for the permission.
    error_of(unsafe { libc::kill(process as i32, 0) })
}

fn connect(address: SocketAddr) -> i32 {
    match TcpStream::connect(address) {
        Ok(_) => 0,
        Err(error) => error.raw_os_error().unwrap_or(-1),
    }
}

fn map(protection: i32) -> *mut libc::c_void {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping at no given address.
    unsafe { libc::mmap(ptr::null_mut(), 4096, protection, flags, -1, 0) }
}

/// Without a sandbox all the attempts below succeed, so that their failure says something.
#[test]
fn what_the_layers_forbid_works_without_them() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let parent = process::id();
    let directory = std::env::temp_dir().join(format!("strata-sandbox-{parent}"));
    let path = std::ffi::CString::new(directory.to_str().unwrap()).unwrap();
    ends(&[], &End::Errno(0), || open(PASSWD, libc::O_RDONLY));
    ends(&[], &End::Errno(0), || connect(address));
    ends(&[], &End::Errno(0), || kill(parent));
    ends(&[], &End::Errno(0), || {
        open(&path, libc::O_CREAT | libc::O_WRONLY)
    });
    std::fs::remove_file(directory).unwrap();
}

#[test]
fn a_process_with_threads_is_not_locked_up() {
    ends(&[], &End::Errno(0), || {
        thread::scope(|scope| {
            scope.spawn(|| thread::sleep(Duration::from_mins(1)));
            // SAFETY: ends the process with its thread.
            unsafe { libc::_exit(i32::from(enter(&[], Role::Machine).is_ok())) }
        })
    });
}

#[test]
fn inherited_descriptors_are_closed_and_those_of_rust_stay_open() {
    let own = File::open("/etc/passwd").unwrap();
    // SAFETY: a new descriptor, without close-on-exec as a careless parent leaves it.
    let inherited = unsafe { libc::dup(own.as_raw_fd()) };
    ends(&[], &End::Errno(libc::EBADF), || {
        let mut byte = [0];
        // SAFETY: room for one byte.
        let mut read =
            |from| error_of(unsafe { libc::read(from, byte.as_mut_ptr().cast(), 1) } as i64);
        assert_eq!(read(own.as_raw_fd()), 0);
        read(inherited)
    });
}

#[test]
fn the_inherited_environment_is_wiped() {
    // SAFETY: a string with NUL; nothing changes the environment meanwhile.
    let path = unsafe { libc::getenv(c"PATH".as_ptr()) };
    assert!(!path.is_null());
    ends(&[], &End::Errno(0), || {
        // SAFETY: still a string.
        let left = unsafe { libc::strlen(path) };
        i32::from(left != 0 || std::env::vars_os().next().is_some())
    });
}

#[test]
fn namespaces_have_no_files() {
    fails(Layer::Namespaces, libc::ENOENT, || {
        open(PASSWD, libc::O_RDONLY)
    });
    fails(Layer::Namespaces, libc::ENOENT, || {
        open(c"/proc/1/mem", libc::O_RDONLY)
    });
    fails(Layer::Namespaces, libc::EROFS, || {
        open(c"/new", libc::O_CREAT | libc::O_WRONLY)
    });
}

#[test]
fn namespaces_have_no_network() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    fails(Layer::Namespaces, libc::ENETUNREACH, || connect(address));
}

#[test]
fn without_privileges_nothing_can_be_mounted_or_unshared_again() {
    let layers = [Layer::Namespaces, Layer::Privileges];
    ends(&layers, &End::Errno(libc::EPERM), || {
        let (at, kind) = (c"/", c"tmpfs");
        // SAFETY: strings with NUL; no data.
        error_of(unsafe { libc::mount(kind.as_ptr(), at.as_ptr(), kind.as_ptr(), 0, ptr::null()) })
    });
    ends(&layers, &End::Errno(libc::EPERM), || {
        // SAFETY: a change of this process's namespace only.
        error_of(unsafe { libc::unshare(libc::CLONE_NEWNET) })
    });
}

#[test]
fn privileges_leave_no_capability_even_to_root() {
    fails(Layer::Privileges, 0, || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let left = ["CapInh", "CapPrm", "CapEff", "CapAmb"].map(|name| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            let (_, value) = line.split_once(':').unwrap();
            u64::from_str_radix(value.trim(), 16).unwrap()
        });
        i32::from(left != [0; 4])
    });
}

#[test]
fn privileges_make_a_process_opaque_to_others_of_its_user() {
    // As an ordinary user sees it: /proc/PID belongs to root.
    fails(Layer::Privileges, 0, || {
        // SAFETY: asks only.
        unsafe { libc::prctl(libc::PR_GET_DUMPABLE) }
    });
}

#[test]
fn privileges_limit_new_descriptors() {
    fails(Layer::Privileges, libc::EMFILE, || {
        (0..1000)
            .map(|_| open(PASSWD, libc::O_RDONLY))
            .find(|error| *error != 0)
            .unwrap_or(0)
    });
}

#[test]
fn landlock_gives_no_file() {
    fails(Layer::Landlock, libc::EACCES, || {
        open(PASSWD, libc::O_RDONLY)
    });
    fails(Layer::Landlock, libc::EACCES, || {
        open(c"/dev/null", libc::O_WRONLY)
    });
    fails(Layer::Landlock, libc::EACCES, || {
        open(c"/tmp/strata-sandbox-new", libc::O_CREAT | libc::O_WRONLY)
    });
    fails(Layer::Landlock, libc::EACCES, || {
        let (program, none) = (c"/bin/true", [ptr::null::<libc::c_char>()]);
        // SAFETY: a string with NUL, and lists that end with a null pointer.
        error_of(unsafe { libc::execve(program.as_ptr(), none.as_ptr(), none.as_ptr()) })
    });
}

/// The version of Landlock that the host has.
fn landlock_version() -> i64 {
    // SAFETY: LANDLOCK_CREATE_RULESET_VERSION takes no structure.
    unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, ptr::null::<u8>(), 0, 1) }
}

#[test]
fn landlock_gives_no_tcp_port() {
    if landlock_version() < 4 {
        eprintln!("skipped: this host's Landlock knows no ports");
        return;
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    fails(Layer::Landlock, libc::EACCES, || connect(address));
}

#[test]
fn landlock_lets_no_other_process_be_signalled() {
    if landlock_version() < 6 {
        eprintln!("skipped: this host's Landlock knows no signals");
        return;
    }
    let parent = process::id();
    fails(Layer::Landlock, libc::EPERM, || kill(parent));
    fails(Layer::Landlock, 0, || kill(process::id()));
}

#[test]
fn seccomp_refuses_to_open_files_without_ending_the_process() {
    fails(Layer::Seccomp, libc::EACCES, || {
        open(PASSWD, libc::O_RDONLY)
    });
}

#[test]
fn seccomp_stops_new_processes_and_programs() {
    is_stopped("fork", || {
        // SAFETY: a child, if there were one, would leave as its parent does.
        error_of(unsafe { libc::syscall(libc::SYS_fork) })
    });
    is_stopped("clone", || {
        let flags = libc::SIGCHLD;
        // SAFETY: as fork.
        error_of(unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) })
    });
    is_stopped("execve", || {
        let (program, none) = (c"/bin/true", [ptr::null::<libc::c_char>()]);
        // SAFETY: a string with NUL, and lists that end with a null pointer.
        error_of(unsafe { libc::execve(program.as_ptr(), none.as_ptr(), none.as_ptr()) })
    });
}

#[test]
fn seccomp_stops_sockets() {
    is_stopped("socket", || {
        // SAFETY: no pointers.
        error_of(unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0) })
    });
    is_stopped("socket", || {
        // SAFETY: no pointers.
        error_of(unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0) })
    });
}

#[test]
fn seccomp_stops_reaching_into_other_processes() {
    let parent = process::id();
    is_stopped("kill", || kill(parent));
    is_stopped("tgkill", || {
        // SAFETY: signal 0 only asks for the permission.
        error_of(unsafe { libc::syscall(libc::SYS_tgkill, parent, parent, 0) })
    });
    is_stopped("ptrace", || {
        // SAFETY: no pointers that are used.
        error_of(unsafe { libc::ptrace(libc::PTRACE_ATTACH, parent, 0, 0) })
    });
    is_stopped("process_vm_readv", || {
        let mut byte = 0_u8;
        let local = libc::iovec {
            iov_base: (&raw mut byte).cast(),
            iov_len: 1,
        };
        let remote = local;
        // SAFETY: the vectors are valid for the call.
        let result = unsafe {
            libc::process_vm_readv(parent as i32, &raw const local, 1, &raw const remote, 1, 0)
        };
        error_of(result as i64)
    });
}

#[test]
fn seccomp_stops_new_executable_memory() {
    let (read, write, exec) = (libc::PROT_READ, libc::PROT_WRITE, libc::PROT_EXEC);
    is_stopped("mmap", || map(read | write | exec) as i32);
    is_stopped("mmap", || map(read | exec) as i32);
    is_stopped("mprotect", || {
        let page = map(read | write);
        // SAFETY: a page of our own that nothing refers to.
        error_of(unsafe { libc::mprotect(page, 4096, read | exec) })
    });
    is_stopped("memfd_create", || {
        // SAFETY: a string with NUL.
        error_of(unsafe { libc::memfd_create(c"code".as_ptr(), 0) })
    });
}

#[test]
fn seccomp_stops_typing_into_the_terminal() {
    is_stopped("ioctl", || {
        let key = b'x';
        // SAFETY: TIOCSTI reads one byte.
        error_of(unsafe { libc::ioctl(0, libc::TIOCSTI, &raw const key) })
    });
}

#[test]
fn seccomp_stops_new_namespaces_and_further_filters() {
    is_stopped("unshare", || {
        // SAFETY: no pointers.
        error_of(unsafe { libc::unshare(libc::CLONE_NEWUSER) })
    });
    is_stopped("prctl", || {
        // SAFETY: no pointers.
        error_of(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1) })
    });
}

#[test]
fn seccomp_holds_for_threads_that_are_started_later() {
    is_stopped("socket", || {
        // SAFETY: no pointers.
        let socket = || unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0) };
        error_of(thread::spawn(socket).join().unwrap())
    });
}

/// What a running machine lives on.
#[test]
fn all_layers_leave_open_files_memory_threads_and_time() {
    let file = tempfile();
    ends(&Layer::ALL, &End::Errno(0), || {
        let work = move || {
            use std::os::unix::fs::FileExt;
            file.write_all_at(b"written", 4096).unwrap();
            file.sync_data().unwrap();
            thread::sleep(Duration::from_millis(1));
            let large = vec![1_u8; 8 << 20];
            i32::from(large.iter().map(|byte| u64::from(*byte)).sum::<u64>() != 8 << 20)
        };
        thread::Builder::new()
            .name("worker".into())
            .spawn(work)
            .unwrap()
            .join()
            .unwrap()
    });
}

/// What a call ends with in a machine to which others connect, or in one to which nobody does.
fn of_machine(listening: bool, call: impl FnOnce() -> i32) -> Option<(End, String)> {
    let role = if listening {
        Role::ListeningMachine
    } else {
        Role::Machine
    };
    told_as(role, &[Layer::Privileges, Layer::Seccomp], call)
}

#[test]
fn a_machine_lets_others_in_only_if_it_is_to() {
    let path = std::env::temp_dir().join(format!("strata-sandbox-{}.sock", process::id()));
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let _program = std::os::unix::net::UnixStream::connect(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    let number = listener.as_raw_fd();
    let accept = || {
        let (address, length) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: no address is asked for.
        error_of(unsafe { libc::accept4(number, address, length, libc::SOCK_CLOEXEC) })
    };
    if let Some((end, text)) = of_machine(true, accept) {
        assert_eq!(end, End::Errno(0), "{text}");
    }
    if let Some((end, text)) = of_machine(false, accept) {
        assert_eq!(end, End::Signal(libc::SIGSYS), "{text}");
        assert!(text.contains("(accept4)"), "{text}");
    }
}

#[test]
fn a_machine_that_lets_others_in_makes_and_connects_no_socket_itself() {
    let stopped = |name: &str, call: [i64; 4]| {
        let [number, a, b, c] = call;
        // SAFETY: none of these calls is given an address but NULL.
        let attempt = || error_of(unsafe { libc::syscall(number, a, b, c) });
        if let Some((end, text)) = of_machine(true, attempt) {
            assert_eq!(end, End::Signal(libc::SIGSYS), "{text}");
            assert!(text.contains(&format!("({name})")), "{text}");
        }
    };
    let stream = i64::from(libc::SOCK_STREAM);
    for family in [libc::AF_UNIX, libc::AF_INET, libc::AF_VSOCK] {
        stopped("socket", [libc::SYS_socket, family.into(), stream, 0]);
    }
    stopped("socketpair", [libc::SYS_socketpair, 1, stream, 0]);
    stopped("connect", [libc::SYS_connect, 0, 0, 0]);
    stopped("bind", [libc::SYS_bind, 0, 0, 0]);
    stopped("listen", [libc::SYS_listen, 0, 1, 0]);
    stopped("recvmsg", [libc::SYS_recvmsg, 0, 0, 0]);
}

fn tempfile() -> File {
    let directory = std::ffi::CString::new(std::env::temp_dir().to_str().unwrap()).unwrap();
    let flags = libc::O_TMPFILE | libc::O_RDWR | libc::O_CLOEXEC;
    // SAFETY: a string with NUL; the descriptor is owned from here on.
    unsafe {
        let file = libc::open(directory.as_ptr(), flags, 0o600);
        assert!(file >= 0, "{}", io::Error::last_os_error());
        mem::drop(directory);
        File::from_raw_fd(file)
    }
}

/// What a network's switch ends with, behind all layers that this host gives.
fn as_switch(attempt: impl Fn() -> i32) -> Option<(End, String)> {
    let given = |layer: &Layer| told_as(Role::Network, &[*layer], || 0).is_some();
    let layers: Vec<Layer> = Layer::ALL.into_iter().filter(given).collect();
    told_as(Role::Network, &layers, attempt)
}

#[test]
fn a_switch_makes_connections_and_opens_no_file() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (end, text) = as_switch(|| connect(address)).unwrap();
    assert_eq!(end, End::Errno(0), "{text}");
    let (end, text) = as_switch(|| open(PASSWD, libc::O_RDONLY)).unwrap();
    assert_ne!(end, End::Errno(0), "{text}");
}

#[test]
fn a_switch_is_stopped_at_other_sockets_threads_and_programs() {
    let stopped = |name: &str, call: [i64; 4]| {
        let [number, a, b, c] = call;
        // SAFETY: none of these calls is given an address but NULL.
        let attempt = || error_of(unsafe { libc::syscall(number, a, b, c) });
        let told = told_as(Role::Network, &[Layer::Seccomp], attempt);
        if let Some((end, text)) = told {
            assert_eq!(end, End::Signal(libc::SIGSYS), "{text}");
            assert!(text.contains(&format!("({name})")), "{text}");
        }
    };
    let stream = i64::from(libc::SOCK_STREAM);
    stopped(
        "socket",
        [libc::SYS_socket, i64::from(libc::AF_UNIX), stream, 0],
    );
    stopped(
        "socket",
        [libc::SYS_socket, i64::from(libc::AF_NETLINK), stream, 0],
    );
    stopped(
        "socket",
        [libc::SYS_socket, i64::from(libc::AF_PACKET), stream, 0],
    );
    stopped("clone", [libc::SYS_clone, i64::from(libc::SIGCHLD), 0, 0]);
    stopped("execve", [libc::SYS_execve, 0, 0, 0]);
    stopped("ptrace", [libc::SYS_ptrace, 0, 0, 0]);
}

#[test]
fn a_machine_keeps_its_log_and_says_how_it_ended() {
    let directory = tempfile::tempdir().unwrap();
    let machine = Registry::at(directory.path()).create(&Spec::default());
    let machine = machine.unwrap();
    let mut claim = machine.claim().unwrap();
    claim.started().unwrap();
    let size = LogSize {
        segments: 2,
        bytes: 256,
    };
    let mut log = LogWriter::open_sized(&machine.directory(), size).unwrap();

    let told = told(&Layer::ALL, move || {
        for number in 0..100 {
            let text = format!("line {number} of some that fill segments");
            if log.write(Stream::Console, text.as_bytes()).is_err() {
                return 1;
            }
        }
        let end = strata_machines::End::now(7, "exited");
        i32::from(claim.end(end).is_err())
    });

    let Some((end, text)) = told else { return };
    assert_eq!(end, End::Errno(0), "{text}");
    assert!(matches!(machine.state().unwrap(), State::Ended(end) if end.status == 7));
    let mut reader = LogReader::open(&machine.directory());
    let entries = std::iter::from_fn(|| reader.read().unwrap());
    let Some(Entry::Record(last)) = entries.last() else {
        panic!("the log is empty");
    };
    assert!(last.bytes.starts_with(b"line 99 "));
}
