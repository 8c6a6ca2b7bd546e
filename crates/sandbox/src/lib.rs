//! Locks a process up before it runs a hostile guest: what it does not need of the host any
//! more, the host no longer gives it.
//!
//! ```text
//!   strata run ── all is open, no thread is started ──► enter ──► Report ──► threads, guest
//!                                                         │
//!        namespaces ─► privileges ─► Landlock ─► seccomp ─┘  each forbids what set up the last
//! ```
//!
//! Every layer alone keeps a process that was taken over from files, networks and other
//! processes; a host may lack any of them. Called once, by whoever owns the process and has
//! opened all that it will use. This crate must never know what runs in the process; which
//! system calls that needs is the list in `syscalls`.

mod files;
mod inherited;
mod namespaces;
mod privileges;
mod syscalls;
mod violation;

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::RawFd;
use std::path::Path;

/// What the process does, and so what it must keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role<'a> {
    /// It runs a machine: all is open, threads are to come.
    Machine,
    /// It runs a machine, and other programs may connect to sockets that it listens on already.
    ListeningMachine,
    /// It is the switch of a network: it makes sockets of the internet, and has one thread.
    Network,
    /// It serves the files of one folder, or a single file: it opens what is in there, and threads
    /// are to come.
    Files(Folder<'a>),
}

/// The folder that a process serves. It has to be its working directory, and stays so. Or a single
/// file in the working directory, which afterwards holds nothing else where there are namespaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Folder<'a> {
    /// Where it is, without symbolic links.
    pub path: &'a Path,
    /// It is a single file, and known by its name in the working directory.
    pub file: Option<&'a str>,
    /// Whether nothing in it is to be changed.
    pub read_only: bool,
    /// An open `/proc/self/fd`, which is to lead nowhere else in `/proc`.
    pub descriptors: Option<RawFd>,
}

/// One layer of the sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// User, mount, network, IPC, UTS and cgroup namespaces of its own, with an empty root
    /// directory and no network device that is up. A network's switch keeps the host's network; to
    /// a server of files the folder is the root directory, and root stays in the host's users.
    Namespaces,
    /// No capabilities and no way to gain any, no core dumps, no tracing by the same user; few
    /// file descriptors for a machine. A server of files that is root keeps root's rights to files.
    Privileges,
    /// Landlock: no access to any file but those that are served, no signals to other processes;
    /// TCP ports for a switch alone.
    Landlock,
    /// Only the system calls of a running machine, of a switch, or of a server of files.
    Seccomp,
}

impl Layer {
    /// All layers, in the order in which they can be entered.
    pub const ALL: [Self; 4] = [
        Self::Namespaces,
        Self::Privileges,
        Self::Landlock,
        Self::Seccomp,
    ];

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Namespaces => "namespaces",
            Self::Privileges => "privileges",
            Self::Landlock => "Landlock",
            Self::Seccomp => "seccomp",
        }
    }

    /// Enters the layer. Returns what to say of it, or why the host does not give it.
    fn enter(self, role: Role<'_>) -> Result<String, String> {
        match self {
            Self::Namespaces => namespaces::enter(role),
            Self::Privileges => privileges::enter(role),
            Self::Landlock => files::enter(role),
            Self::Seccomp => syscalls::enter(role),
        }
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What became of each layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report(Vec<(Layer, Result<String, String>)>);

impl Report {
    /// The layers in the order in which they were entered: with details of one that holds, with
    /// the reason for one that the host does not give.
    pub fn layers(&self) -> impl Iterator<Item = (Layer, Result<&str, &str>)> {
        self.0.iter().map(|(layer, state)| match state {
            Ok(detail) => (*layer, Ok(detail.as_str())),
            Err(reason) => (*layer, Err(reason.as_str())),
        })
    }

    /// The layers that the host does not give, and why.
    pub fn missing(&self) -> impl Iterator<Item = (Layer, &str)> {
        self.layers()
            .filter_map(|(layer, state)| Some((layer, state.err()?)))
    }
}

/// Why a process was not locked up at all.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Some layers hold for the calling thread and its children only.
    #[error("the process has {0} threads already; it must be locked up before it starts any")]
    Threads(usize),
    /// It is not known which threads and file descriptors there are.
    #[error("cannot look at this process in /proc/self")]
    Proc(#[source] io::Error),
}

/// Locks the calling process up, for good, as far as the host allows: gives up, layer by layer,
/// whatever `layers` take away from a process of this `role`. To be called before the process starts a second thread.
///
/// All file descriptors without close-on-exec are closed, except the standard streams: they came
/// from whoever started the process. So did the environment, which is wiped.
///
/// Later, a system call that is forbidden ends the process with SIGSYS and a message on standard
/// error; those that libraries try and can do without (opening files above all) fail with EACCES.
pub fn enter(layers: &[Layer], role: Role<'_>) -> Result<Report, Error> {
    match fs::read_dir("/proc/self/task")
        .map_err(Error::Proc)?
        .count()
    {
        1 => {}
        threads => return Err(Error::Threads(threads)),
    }
    inherited::close_descriptors().map_err(Error::Proc)?;
    inherited::wipe_environment();
    let report = layers.iter().map(|layer| (*layer, layer.enter(role)));
    Ok(Report(report.collect()))
}
