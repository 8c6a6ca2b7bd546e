//! The networks of machines: starting the switch of one, which is a process of its own, and
//! getting a machine's place on it before the machine's process locks itself up.
//!
//! ```text
//!   strata run ── socket pair ──► strata network-switch          a network of the machine's own
//!   strata run ── NAME.sock ────► strata network-switch ◄── ...  one that several share
//!   strata run ── socket pair ──► strata network-warden          one on a bridge: see `bridge`
//! ```
//!
//! Who is first on a named network starts its switch, with NAME.lock held, so that there is one;
//! the switch ends when its last machine has gone and nobody holds the lock to come in.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::io::Errno;
use rustix::net::SocketType;
use strata_net::{Config, Hello, JoinError, Joined, Switch};
use strata_sandbox::Role;

use crate::bridge;
use crate::cli::{RunArgs, Sandbox, SwitchArgs};
use crate::exit::End;
use crate::report;
use crate::resolvers;
use crate::sandbox;
use crate::sockets;
use crate::units::{Network, Wire};

/// Name of the hidden subcommand.
pub(crate) const SUBCOMMAND: &str = "network-switch";

/// Why a machine has no network.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    /// The network does not take it.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// The host's bridge cannot be made.
    #[error(transparent)]
    Bridge(#[from] strata_net::BridgeError),
    /// The host does not give what a network needs.
    #[error("cannot {action}")]
    Host {
        /// To be read after "cannot".
        action: String,
        /// What the host said.
        source: io::Error,
    },
}

impl Fault {
    pub(crate) fn host<E: Into<io::Error>>(action: impl Into<String>) -> impl FnOnce(E) -> Self {
        let action = action.into();
        move |source| Self::Host {
            action,
            source: source.into(),
        }
    }
}

/// Gets the machine's place on the network that it is to have, under this name; `None` if it is to
/// have none.
pub(crate) fn join(args: &RunArgs, name: Option<String>) -> Result<Option<Joined>, Fault> {
    let network = args.network();
    let hello = Hello {
        name,
        forwards: args.forwards.clone(),
    };
    let joined = match &network.wire {
        Wire::None => return Ok(None),
        Wire::User => {
            let (theirs, ours) = strata_net::port_pair().map_err(Fault::host("make a socket"))?;
            start_switch(&options(&network), args.sandbox, theirs.into(), None)?;
            strata_net::join(ours, &hello)?
        }
        Wire::Named(name) => join_named(args, &network, name, &hello)?,
        Wire::Bridge(name) => {
            let (theirs, ours) = strata_net::port_pair().map_err(Fault::host("make a socket"))?;
            bridge::start_warden(name, &options(&network), args.sandbox, theirs.into())?;
            strata_net::join(ours, &hello)?
        }
    };
    tracing::info!(
        "network: {} {}",
        joined.addresses.ipv4,
        joined.addresses.mac
    );
    Ok(Some(joined))
}

/// The options of a network, for the processes that serve it.
fn options(network: &Network) -> Vec<&'static str> {
    let host = network.host.then_some("--host");
    host.into_iter()
        .chain(network.isolated.then_some("--isolated"))
        .collect()
}

fn start_switch(
    options: &[&str],
    sandbox: Sandbox,
    socket: Stdio,
    lock: Option<File>,
) -> Result<(), Fault> {
    let mut command = Command::new("/proc/self/exe");
    command.arg(SUBCOMMAND).args(options);
    command.args(["--sandbox", sandbox.name()]);
    // Of its own group, since what the terminal sends is for the machine.
    command.process_group(0).stdin(socket);
    if let Some(lock) = lock {
        // It outlives this process, and must not keep its streams open.
        command.arg("--door").stdout(lock).stderr(Stdio::null());
    } else {
        command.stdout(Stdio::null());
    }
    command
        .spawn()
        .map_err(Fault::host("start the network's switch"))?;
    Ok(())
}

fn join_named(
    args: &RunArgs,
    network: &Network,
    name: &str,
    hello: &Hello,
) -> Result<Joined, Fault> {
    let directory = runtime_directory()?;
    let path = directory.join(format!("{name}.sock"));
    let lock_path = directory.join(format!("{name}.lock"));
    let lock = Lock::take(&lock_path)?;
    let socket = connect_or_start(&path, &lock, &options(network), args.sandbox)?;
    // The lock is held until the switch has answered: it does not end before.
    Ok(strata_net::join(socket, hello)?)
}

/// A file that is locked by whoever comes into a network; free when dropped.
pub(crate) struct Lock {
    path: PathBuf,
    _held: File,
}

impl Lock {
    /// Waits for its turn.
    pub(crate) fn take(path: &Path) -> Result<Self, Fault> {
        let file = Self::open(path)?;
        file.lock()
            .map_err(Fault::host(format!("lock '{}'", path.display())))?;
        Ok(Self {
            path: path.to_owned(),
            _held: file,
        })
    }

    fn open(path: &Path) -> Result<File, Fault> {
        let mut options = OpenOptions::new();
        let options = options.create(true).truncate(false).write(true).mode(0o600);
        let action = format!("open '{}'", path.display());
        options.open(path).map_err(Fault::host(action))
    }
}

/// Connects to the switch that listens at `path`; starts one with `options` if none does.
pub(crate) fn connect_or_start(
    path: &Path,
    lock: &Lock,
    options: &[&str],
    sandbox: Sandbox,
) -> Result<OwnedFd, Fault> {
    match connect_to(path) {
        Ok(socket) => Ok(socket),
        // There is none, or what the last one left.
        Err(Errno::NOENT | Errno::CONNREFUSED) => {
            let action = || format!("make the network's socket '{}'", path.display());
            let listener = listen_at(path).map_err(Fault::host(action()))?;
            // A lock of its own: one that is handed down would be held by us too.
            let theirs = Lock::open(&lock.path)?;
            start_switch(options, sandbox, listener.into(), Some(theirs))?;
            connect_to(path).map_err(Fault::host(action()))
        }
        Err(error) => {
            let action = format!("reach the network's switch at '{}'", path.display());
            Err(Fault::host(action)(error))
        }
    }
}

fn connect_to(path: &Path) -> Result<OwnedFd, Errno> {
    sockets::connect(path, SocketType::SEQPACKET)
}

fn listen_at(path: &Path) -> Result<OwnedFd, Errno> {
    let _ = fs::remove_file(path);
    sockets::listen(path, SocketType::SEQPACKET)
}

/// The user's own directory for sockets: in XDG_RUNTIME_DIR, or one in /tmp that nobody else can
/// have made.
pub(crate) fn runtime_directory() -> Result<PathBuf, Fault> {
    let user = rustix::process::geteuid().as_raw();
    let path = match std::env::var_os("XDG_RUNTIME_DIR").filter(|path| !path.is_empty()) {
        Some(directory) => Path::new(&directory).join("strata"),
        None => std::env::temp_dir().join(format!("strata-{user}")),
    };
    private(path)
}

/// A directory that nobody else can write to; made if it is not there.
pub(crate) fn private(path: PathBuf) -> Result<PathBuf, Fault> {
    let user = rustix::process::geteuid().as_raw();
    let failed = || format!("use the directory '{}' for sockets", path.display());
    match DirBuilder::new().mode(0o700).create(&path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            return Err(Fault::host(failed())(error));
        }
        _ => {}
    }
    let metadata = fs::symlink_metadata(&path).map_err(Fault::host(failed()))?;
    if !metadata.is_dir() || metadata.uid() != user || metadata.mode() & 0o077 != 0 {
        let error = io::Error::new(ErrorKind::PermissionDenied, "others can write to it");
        return Err(Fault::host(failed())(error));
    }
    Ok(path)
}

/// What the hidden subcommand does: serves a network until its last machine has gone. Standard
/// input is the socket of its only machine; or with `--door`, where machines come in, and
/// standard output is the lock.
pub(crate) fn switch(args: &SwitchArgs) -> End {
    match serve(args) {
        Ok(()) => End::Done,
        Err(error) => {
            report::say_error(error.as_ref());
            End::NotStarted
        }
    }
}

fn serve(args: &SwitchArgs) -> Result<(), Box<dyn std::error::Error>> {
    let mut switch = Switch::new(Config {
        host: args.host,
        isolated: args.isolated,
        resolvers: resolvers::read(),
        ..Config::default()
    })?;
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    if !args.isolated {
        match resolvers::start() {
            Ok(socket) => switch.hear_resolvers(socket)?,
            Err(error) => tracing::warn!(%error, "changes of the name servers go unnoticed"),
        }
    }
    if let Some(bridge) = &args.bridge {
        switch.serve_bridge(bridge)?;
    }
    if args.door {
        switch.open_door(socket, io::stdout().as_fd().try_clone_to_owned()?)?;
    } else {
        // Ports of the host that only root may use are opened while there is a root.
        switch.add_first_port(socket)?;
    }
    sandbox::lock_up(args.sandbox, Role::Network)?;
    switch.run()?;
    Ok(())
}
