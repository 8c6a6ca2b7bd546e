//! Process 1: sets the guest up, runs what the session asks for, and ends the machine.

mod container;
mod drivers;
mod ending;
pub(crate) mod main_command;
mod mounts;
mod network;
mod streams;

use std::fmt::Display;
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use strata_protocol::{Run, SESSION_PATH, Session};

use self::ending::Ending;
use crate::AGENT;

/// Where the agent finds the session, within whichever root it gets.
pub(crate) const SESSION_COPY: &str = "/run/strata/session";

/// Why the guest cannot be set up.
#[derive(Debug)]
pub(crate) struct Fault(pub(crate) String);

impl Fault {
    /// To be used as `map_err(Fault::of("do this"))`.
    pub(crate) fn of<E: Display>(action: impl Into<String>) -> impl FnOnce(E) -> Self {
        let action = action.into();
        move |error| Self(format!("cannot {action}: {error}"))
    }
}

/// Does all that process 1 does; ends with the machine, or as the image's own init.
pub(crate) fn run() -> ! {
    let ending = match boot() {
        Ok(ending) => ending,
        Err(Fault(message)) => {
            eprintln!("strata: {message}");
            Ending::PowerOff
        }
    };
    ending::end(ending)
}

fn boot() -> Result<Ending, Fault> {
    mounts::first()?;
    let console = mounts::open_console();
    let session = read_session()?;
    drivers::load();
    mounts::devices();
    network::set_up(&session);
    if let Err(error) = console {
        // Only what is said on it is lost.
        eprintln!("strata: the console: {error}");
    }
    match &session.run {
        Run::Init => Err(become_init(&session)),
        _ => main_command::run(&session),
    }
}

fn read_session() -> Result<Session, Fault> {
    let path = Path::new("/").join(SESSION_PATH);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        // Booted without Strata: a shell is of most use.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Session::default()),
        Err(error) => return Err(Fault::of("read what the host asks for")(error)),
    };
    strata_protocol::read_session(&bytes).map_err(Fault::of("understand what the host asks for"))
}

/// Gives the machine to the init of the image, and returns only if that fails.
fn become_init(session: &Session) -> Fault {
    let prepared = session
        .container
        .as_ref()
        .ok_or_else(|| Fault("there is no image whose init could run".to_owned()))
        .and_then(|container| container::prepare(container, session));
    if let Err(fault) = prepared {
        return fault;
    }
    // A link may be one within the image, which only the new root can follow.
    if fs::symlink_metadata(Path::new(container::ROOT).join("sbin/init")).is_err() {
        return Fault("the image has no /sbin/init".to_owned());
    }
    if let Err(fault) = container::enter().and_then(|()| mounts::folders(&session.mounts)) {
        return fault;
    }
    start_agent(session);
    let error = Command::new("/sbin/init").exec();
    Fault(format!("/sbin/init of the image cannot run: {error}"))
}

/// Starts the agent, which outlives everything but the machine. A guest without one can do all
/// but what the agent does.
fn start_agent(session: &Session) {
    if !Path::new("/sys/module/vsock").exists() {
        return;
    }
    let result = strata_protocol::write_session(session)
        .map_err(io::Error::other)
        .and_then(|bytes| {
            fs::create_dir_all("/run/strata")?;
            fs::write(SESSION_COPY, bytes)?;
            Command::new("/proc/self/exe")
                .arg0(AGENT)
                .stdin(Stdio::null())
                .spawn()
        });
    if let Err(error) = result {
        eprintln!("strata: no agent: {error}");
    }
}
