//! Process 1: sets the guest up, runs what the session asks for, and ends the machine.

mod container;
mod control;
pub(crate) mod drivers;
mod ending;
pub(crate) mod helper;
pub(crate) mod main_command;
mod mounts;
mod network;
mod streams;

use std::fmt::Display;
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use strata_protocol::{Run, SESSION_PATH, Session};

use self::ending::Ending;
use self::helper::Helper;

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
    let helper = Helper::prepare(&session);
    mounts::devices();
    network::set_up(&session);
    if let Err(error) = console {
        // Only what is said on it is lost.
        eprintln!("strata: the console: {error}");
    }
    match &session.run {
        Run::Init => Err(become_init(&session, helper)),
        _ => main_command::run(&session, helper),
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
fn become_init(session: &Session, helper: Option<Helper>) -> Fault {
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
    if let Some(helper) = helper {
        helper.start(None);
    }
    let error = Command::new("/sbin/init").exec();
    Fault(format!("/sbin/init of the image cannot run: {error}"))
}
