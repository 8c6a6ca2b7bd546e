//! What the machine is there for: a command on the ports or the console, a shell, or nothing but
//! what is executed in it. Process 1 starts it, reaps what it leaves behind, and ends with it.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::process::{Command, Stdio};

use rustix::process::{Pid, WaitOptions, WaitStatus, wait};
use rustix::system::uname;
use rustix::termios::{Winsize, tcsetwinsize};
use signal_hook::consts::{SIGCHLD, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;
use strata_protocol::{GREETING, Run, Session, Size, Status};

use super::ending::{self, Ending};
use super::helper::Helper;
use super::mounts::{self, CONSOLE};
use super::streams::Ports;
use super::{Fault, container};
use crate::command::{self, Unable};
use crate::place::Place;

/// What a host's power fails with; see signal(7).
const SIGPWR: i32 = 30;

/// Where the agent finds the number of the main command's process.
pub(crate) const PID_FILE: &str = "/run/strata/main";

/// Sets the place up and runs what `session` asks for there; gives how the machine is to end.
pub(super) fn run(session: &Session, helper: Option<Helper>) -> Result<Ending, Fault> {
    // Before anything is started: nothing that ends may be missed.
    let mut signals = Signals::new([SIGCHLD, SIGINT, SIGTERM, SIGUSR1, SIGUSR2])
        .map_err(Fault::of("watch for signals"))?;
    let main = match &session.run {
        Run::Shell | Run::Init => shell(session, helper)?,
        Run::Wait => {
            enter(session)?;
            start(helper);
            None
        }
        Run::Command {
            words,
            on_console: true,
        } => on_console(session, words, helper)?,
        Run::Command {
            words,
            on_console: false,
        } => return on_ports(session, words, helper, &mut signals),
    };
    // A shell that could not be started has said so.
    if main.is_none() && session.run != Run::Wait {
        return Ok(Ending::PowerOff);
    }
    let (_, ending) = wait_for(main, &mut signals);
    Ok(ending)
}

/// Makes the image the root, if there is one, and the appliance's programs known if not.
fn enter(session: &Session) -> Result<Place, Fault> {
    if let Some(container) = &session.container {
        container::prepare(container, session)?;
        container::enter()?;
    } else {
        // All programs of the appliance are this one.
        let installed = Command::new("/bin/busybox")
            .args(["--install", "-s", "/bin"])
            .status();
        installed.map_err(Fault::of("install BusyBox"))?;
    }
    mounts::folders(&session.mounts)?;
    Place::of(session).map_err(Fault)
}

fn on_ports(
    session: &Session,
    words: &[Vec<u8>],
    helper: Option<Helper>,
    signals: &mut Signals,
) -> Result<Ending, Fault> {
    let mut ports = Ports::open()?;
    let place = enter(session);
    ports.tell("ready");
    // Asked for as the command itself, these need no detour.
    if session.container.is_none()
        && let [word] = words
        && let Some(ending) = Ending::of_word(word)
    {
        ports.tell("exit 0");
        return Ok(ending);
    }
    let started = place
        .map_err(|Fault(message)| Unable::guest(message))
        .and_then(|place| {
            let command = command::prepare(words, &place, false)?;
            let (streams, relays) = ports
                .pipes(place.identity.as_ref())
                .map_err(|error| Unable::guest(format!("no pipes: {error}")))?;
            let mut command = command;
            command
                .stdin(streams.stdin)
                .stdout(streams.stdout)
                .stderr(streams.stderr);
            let child = command
                .spawn()
                .map_err(|error| command::not_started(words, &error))?;
            Ok((child.id(), relays))
        });
    let (main, relays) = match started {
        Ok(started) => started,
        Err(Unable { status, message }) => {
            ports.complain(&message);
            ports.tell(&format!("exit {status}"));
            return Ok(Ending::PowerOff);
        }
    };
    announce(main);
    start(helper);
    let (status, ending) = wait_for(Some(main), signals);
    if let Some(status) = status {
        relays.finish();
        ports.tell(&format!("exit {}", status.code()));
    }
    Ok(ending)
}

fn shell(session: &Session, helper: Option<Helper>) -> Result<Option<u32>, Fault> {
    let place = enter(session)?;
    let words = [b"/bin/sh".to_vec(), b"-l".to_vec()];
    Ok(start_on_console(session, place, &words, helper))
}

fn on_console(
    session: &Session,
    words: &[Vec<u8>],
    helper: Option<Helper>,
) -> Result<Option<u32>, Fault> {
    let place = enter(session)?;
    Ok(start_on_console(session, place, words, helper))
}

/// Greets, and starts a command with the console as its terminal.
fn start_on_console(
    session: &Session,
    mut place: Place,
    words: &[Vec<u8>],
    helper: Option<Helper>,
) -> Option<u32> {
    let Size { rows, columns } = session.size.unwrap_or(Size {
        rows: 24,
        columns: 80,
    });
    // A known size also keeps line editors from asking the terminal for it.
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let _ = tcsetwinsize(rustix::stdio::stdin(), size);
    let release = uname().release().to_string_lossy().into_owned();
    println!("{GREETING}{release}. 'poweroff' or Ctrl-A x ends it.");
    if let Some(term) = &session.term {
        let term = crate::place::word(term).to_owned();
        place.environment.entry("TERM".into()).or_insert(term);
    }
    let started = command::prepare(words, &place, true).and_then(|mut command| {
        let console = || OpenOptions::new().read(true).write(true).open(CONSOLE);
        let open = || Ok((console()?, console()?, console()?));
        let (stdin, stdout, stderr) = open().map_err(|error: io::Error| {
            Unable::guest(format!("cannot open the console: {error}"))
        })?;
        command
            .stdin(Stdio::from(stdin))
            .stdout(Stdio::from(stdout))
            .stderr(Stdio::from(stderr))
            .spawn()
            .map_err(|error| command::not_started(words, &error))
    });
    let main = match started {
        Ok(child) => Some(child.id()),
        Err(Unable { message, .. }) => {
            eprintln!("strata: {message}");
            None
        }
    };
    main.into_iter().for_each(announce);
    start(helper);
    main
}

/// Starts the agent, now that what the machine is there for runs.
fn start(helper: Option<Helper>) {
    if let Some(helper) = helper {
        helper.start();
    }
}

/// Tells the agent which process is the main command.
fn announce(main: u32) {
    let result = std::fs::create_dir_all("/run/strata")
        .and_then(|()| mounts::put(PID_FILE, &main.to_string()));
    if let Err(error) = result {
        eprintln!("strata: {PID_FILE}: {error}");
    }
}

/// Reaps what ends until the main command does, or the guest is told to go down; gives the main
/// command's status if it has one.
fn wait_for(main: Option<u32>, signals: &mut Signals) -> (Option<Status>, Ending) {
    let is_main = |pid: Pid| main.is_some_and(|main| pid.as_raw_pid() as u32 == main);
    loop {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            if is_main(pid) {
                return (Some(status_of(status)), Ending::PowerOff);
            }
        }
        for signal in signals.wait() {
            // As BusyBox's init has them, whose programs send them.
            let ending = match signal {
                SIGUSR1 | SIGUSR2 | SIGPWR => Ending::PowerOff,
                SIGTERM | SIGINT => Ending::Reboot,
                _ => continue,
            };
            let _ = io::stdout().flush();
            ending::ask_all(|_, _| {});
            return (None, ending);
        }
    }
}

fn status_of(status: WaitStatus) -> Status {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(status), _) => Status::Exited(status as u8),
        (None, Some(signal)) => Status::Signal(signal as u8),
        (None, None) => Status::Exited(255),
    }
}
