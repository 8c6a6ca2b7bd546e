//! What the machine is there for: a command on the ports or the console, a shell, or nothing but
//! what is executed in it. Process 1 starts it, reaps what it leaves behind, and ends with it.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};

use rustix::process::{Pid, WaitOptions, WaitStatus, wait};
use rustix::system::uname;
use signal_hook::consts::{SIGCHLD, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;
use strata_protocol::{GREETING, Reply, Run, Session, Size, Status, Streams};

use super::control::Control;
use super::ending::{self, Ending};
use super::helper::Helper;
use super::mounts::{self, CONSOLE};
use super::streams::{Ports, Relays};
use super::{Fault, container};
use crate::command::{self, Unable};
use crate::place::Place;
use crate::terminal;

/// What a host's power fails with; see signal(7).
const SIGPWR: i32 = 30;

/// Where the agent finds the number of the main command's process.
pub(crate) const PID_FILE: &str = "/run/strata/main";

/// A main command that runs.
struct Main {
    pid: u32,
    /// The terminal that it is on, if its size is that of one of the host's.
    terminal: Option<OwnedFd>,
    /// What it writes on its way to the ports.
    relays: Option<Relays>,
    /// Where its input goes, if that is for those who attach.
    input: Option<OwnedFd>,
}

/// Sets the place up and runs what `session` asks for there; gives how the machine is to end.
pub(super) fn run(session: &Session, helper: Option<Helper>) -> Result<Ending, Fault> {
    // Before anything is started: nothing that ends may be missed.
    let mut signals = Signals::new([SIGCHLD, SIGINT, SIGTERM, SIGUSR1, SIGUSR2])
        .map_err(Fault::of("watch for signals"))?;
    match &session.run {
        Run::Command { words, streams } => {
            let mut control = Control::open()?;
            let (status, ending) =
                run_command(session, words, *streams, helper, &mut control, &mut signals)?;
            if let Some(status) = status {
                control.tell(&Reply::Ended(status));
            }
            Ok(ending)
        }
        Run::Shell => {
            let place = enter(session)?;
            let words = [b"/bin/sh".to_vec(), b"-l".to_vec()];
            Ok(match on_console(session, place, &words) {
                Ok(main) => wait_for(Some(main.pid), &mut signals).1,
                Err(Unable { message, .. }) => {
                    eprintln!("strata: {message}");
                    Ending::PowerOff
                }
            })
        }
        Run::Wait | Run::Init => {
            enter(session)?;
            start(helper, None);
            Ok(wait_for(None, &mut signals).1)
        }
    }
}

/// Runs the main command to its end; gives its status if it had one.
fn run_command(
    session: &Session,
    words: &[Vec<u8>],
    streams: Streams,
    helper: Option<Helper>,
    control: &mut Control,
    signals: &mut Signals,
) -> Result<(Option<Status>, Ending), Fault> {
    let ports = match streams {
        Streams::Console => None,
        _ => Some(Ports::open()?),
    };
    let place = enter(session);
    control.tell(&Reply::Starting);
    // Asked for as the command itself, these need no detour.
    if session.container.is_none()
        && let [word] = words
        && let Some(ending) = Ending::of_word(word)
    {
        return Ok((Some(Status::Exited(0)), ending));
    }
    let started = place
        .map_err(|Fault(message)| Unable::guest(message))
        .and_then(|place| match &ports {
            None => on_console(session, place, words),
            Some(ports) => on_ports(ports, place, words, streams),
        });
    let main = match started {
        Ok(main) => main,
        Err(Unable { status, message }) => {
            match ports {
                Some(mut ports) => ports.complain(&message),
                None => eprintln!("strata: {message}"),
            }
            return Ok((Some(Status::Exited(status)), Ending::PowerOff));
        }
    };
    announce(main.pid);
    control.listen(main.pid, main.terminal);
    start(helper, main.input.as_ref());
    // The agent has it alone, so that it can end.
    drop(main.input);
    let (status, ending) = wait_for(Some(main.pid), signals);
    control.forget();
    if let (Some(relays), Some(_)) = (main.relays, status) {
        relays.finish();
    }
    Ok((status, ending))
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

/// Starts a command whose output goes to the ports.
fn on_ports(
    ports: &Ports,
    mut place: Place,
    words: &[Vec<u8>],
    streams: Streams,
) -> Result<Main, Unable> {
    let on_terminal = matches!(streams, Streams::Terminal(_));
    if on_terminal {
        place.set_default_terminal();
    }
    let mut command = command::prepare(words, &place, on_terminal)?;
    let made = ports.make(streams, place.identity.as_ref());
    let (ends, relays, input) =
        made.map_err(|error| Unable::guest(format!("no streams: {error}")))?;
    let [stdin, stdout, stderr] = ends;
    let child = command
        .stdin(stdin)
        .stdout(stdout)
        .stderr(stderr)
        .spawn()
        .map_err(|error| command::not_started(words, &error))?;
    Ok(Main {
        pid: child.id(),
        terminal: None,
        relays: Some(relays),
        input,
    })
}

/// Greets, and starts a command with the console as its terminal.
fn on_console(session: &Session, mut place: Place, words: &[Vec<u8>]) -> Result<Main, Unable> {
    // A known size also keeps line editors from asking the terminal for it.
    terminal::set_size(&rustix::stdio::stdin(), session.size.unwrap_or(Size::USUAL));
    let release = uname().release().to_string_lossy().into_owned();
    println!("{GREETING}{release}. 'poweroff' or Ctrl-A x ends it.");
    if let Some(term) = &session.term {
        let term = crate::place::word(term).to_owned();
        place.environment.entry("TERM".into()).or_insert(term);
    }
    let mut command = command::prepare(words, &place, true)?;
    let console = || OpenOptions::new().read(true).write(true).open(CONSOLE);
    let open = || Ok((console()?, console()?, console()?, console()?));
    let (stdin, stdout, stderr, terminal): (File, File, File, File) = open()
        .map_err(|error: io::Error| Unable::guest(format!("cannot open the console: {error}")))?;
    let child = command
        .stdin(Stdio::from(stdin))
        .stdout(Stdio::from(stdout))
        .stderr(Stdio::from(stderr))
        .spawn()
        .map_err(|error| command::not_started(words, &error))?;
    Ok(Main {
        pid: child.id(),
        terminal: Some(terminal.into()),
        relays: None,
        input: None,
    })
}

/// Starts the agent, now that what the machine is there for runs.
fn start(helper: Option<Helper>, main_input: Option<&OwnedFd>) {
    if let Some(helper) = helper {
        helper.start(main_input);
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
