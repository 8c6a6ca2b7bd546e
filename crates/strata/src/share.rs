//! Folders and single files of this host that a machine shares: for each, a process that serves it, locked up so
//! that it reaches nothing else.
//!
//! ```text
//!   strata run ── sockets, one for each request under way ──► strata share-server ──► the folder
//!        └─ standard input: hands the sockets over, hears when it is locked up ─┘
//! ```
//!
//! The server ends when nobody is at the other ends of its sockets any more.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use strata_sandbox::{Folder, Role};
use strata_share::{Owners, Server, Share};

use crate::cli::{RunArgs, ShareArgs};
use crate::exit::End;
use crate::report;
use crate::sandbox;
use crate::units::Volume;

/// Name of the hidden subcommand.
pub(crate) const SUBCOMMAND: &str = "share-server";
/// Requests that a server works on at the same time, beside one that must not wait.
const WORKERS: usize = 4;

/// Why a folder is not shared.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    /// There is none, or it cannot be looked at.
    #[error("cannot share '{}'", path.display())]
    Path {
        /// As it was given.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// It is something else.
    #[error("cannot share '{}': it is neither a folder nor a file", .0.display())]
    NoFolder(PathBuf),
    /// It is a file with a name that cannot be handed on.
    #[error("cannot share '{}': its name is not UTF-8", .0.display())]
    Name(PathBuf),
    /// The host does not give what a server needs.
    #[error("cannot start the server of '{}'", path.display())]
    Start {
        /// As it was given.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// It has said why.
    #[error("the server of '{}' ended before it served", .0.display())]
    Ended(PathBuf),
}

impl Fault {
    /// What to do about it.
    pub(crate) fn advice(&self) -> Option<&'static str> {
        match self {
            Self::Path { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                Some("make the folder or file first; -v HOST:GUEST makes none on this host")
            }
            Self::NoFolder(_) | Self::Name(_) => Some("share the folder that it is in"),
            _ => None,
        }
    }
}

/// The tag of the machine's share of this number, counted from 0.
pub(crate) fn tag(number: usize) -> String {
    format!("share{number}")
}

/// What a share of a single file calls that; `None` where it is of a folder.
pub(crate) fn file_in(volume: &Volume) -> Option<String> {
    let is_file = volume.host.is_file();
    is_file.then(|| strata_share::NAME.to_owned())
}

/// Starts the servers of all the folders that the machine shares.
pub(crate) fn open(args: &RunArgs) -> Result<Vec<Share>, Fault> {
    let start = |(volume, number)| {
        let sockets = start(args, volume)?;
        let tag = tag(number);
        tracing::info!("share: {tag} is '{}'", volume.host.display());
        Ok(Share { tag, sockets })
    };
    args.volumes.iter().zip(0..).map(start).collect()
}

/// Starts the server of one folder; gives the machine's ends of its sockets.
fn start(args: &RunArgs, volume: &Volume) -> Result<Vec<OwnedFd>, Fault> {
    let failed = |source| Fault::Path {
        path: volume.host.clone(),
        source,
    };
    let path = volume.host.canonicalize().map_err(failed)?;
    let kind = path.metadata().map_err(failed)?.file_type();
    if !kind.is_dir() && !kind.is_file() {
        return Err(Fault::NoFolder(volume.host.clone()));
    }
    let not_started = |source| Fault::Start {
        path: volume.host.clone(),
        source,
    };
    let (theirs, control) = strata_share::pair().map_err(not_started)?;
    let pairs: io::Result<Vec<_>> = (0..=WORKERS).map(|_| strata_share::pair()).collect();
    let (sockets, ours): (Vec<_>, Vec<_>) = pairs.map_err(not_started)?.into_iter().unzip();
    let mut command = Command::new("/proc/self/exe");
    command.arg(SUBCOMMAND).arg(path);
    command.args(volume.read_only.then_some("--read-only"));
    command.args(["--sandbox", args.sandbox.name()]);
    // Of its own group, since what the terminal sends is for the machine.
    command
        .process_group(0)
        .stdin(theirs)
        .stdout(Stdio::null())
        .spawn()
        .map_err(not_started)?;
    // The command holds the server's end of it open.
    drop(command);
    strata_share::hand_over(&control, &sockets).map_err(not_started)?;
    drop(sockets);
    if !strata_share::is_ready(&control).map_err(not_started)? {
        return Err(Fault::Ended(volume.host.clone()));
    }
    Ok(ours)
}

/// What the hidden subcommand does: serves a folder until its machine has gone. The sockets come
/// on standard input.
pub(crate) fn server(args: &ShareArgs) -> End {
    match serve(args) {
        Ok(()) => End::Done,
        Err(error) => {
            report::say_error(error.as_ref());
            End::NotStarted
        }
    }
}

fn serve(args: &ShareArgs) -> Result<(), Box<dyn std::error::Error>> {
    let control = io::stdin().as_fd().try_clone_to_owned()?;
    let sockets = strata_share::take_over(&control)?;
    let path = &args.folder;
    let owners = Owners::of_this_process();
    let file = enter(path)?;
    let server = match file {
        Some(name) => Server::of_file(name, args.read_only, owners)?,
        None => Server::new(args.read_only, owners)?,
    };
    let role = Role::Files(Folder {
        path,
        file,
        read_only: args.read_only,
        descriptors: server.descriptors(),
    });
    sandbox::lock_up(args.sandbox, role)?;
    strata_share::say_ready(&control)?;
    server.serve(sockets)?;
    Ok(())
}

/// Makes the folder the working directory, which is what is served; or the one that a single file
/// is in, and gives the file's name.
fn enter(path: &Path) -> Result<Option<&str>, Fault> {
    let failed = |source| Fault::Path {
        path: path.to_path_buf(),
        source,
    };
    let is_file = path.symlink_metadata().map_err(failed)?.is_file();
    let (folder, name) = match (path.parent(), path.file_name()) {
        (Some(folder), Some(name)) if is_file => {
            let name = name.to_str();
            (folder, Some(name.ok_or_else(|| Fault::Name(path.into()))?))
        }
        _ => (path, None),
    };
    std::env::set_current_dir(folder).map_err(failed)?;
    Ok(name)
}
