//! The agent: does in the guest what the host's `strata` asks for over vsock.
//!
//! Each connection is one operation, on a thread of its own (see the crate `protocol`). The agent
//! is a process beside process 1, so that what it starts is its own to wait for. Only the host
//! can reach it: it takes no connection from anybody else.

mod attach;
mod exec;
mod facts;
mod files;
mod proxy;

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use rustix::time::{ClockId, Timespec, clock_settime};
use strata_protocol::{
    AGENT_PORT, Error, Failure, FailureKind, Greeting, Reply, Request, Session, read, write,
};
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener, VsockStream};

use self::attach::MainInput;
use crate::init::main_command::PID_FILE;
use crate::init::{drivers, helper};
use crate::place::Place;
use crate::sys;

/// Connections at once; more wait to be accepted.
const MAX_CONNECTIONS: u32 = 512;
/// Stack of a connection's thread, bytes: all that is large is on the heap.
const STACK: usize = 256 << 10;

/// What all connections know.
struct Agent {
    session: Session,
    main_input: MainInput,
    /// Connections that are open.
    open: AtomicU32,
}

/// Serves the host until the machine ends.
pub(crate) fn run() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("strata: the agent ends: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> io::Result<()> {
    // What process 1 opened for us: the main command's input, modules, and the session.
    let mut given = helper::given();
    let main_input = given.next().flatten();
    for module in given.flatten() {
        drivers::insert(&module.into());
    }
    let mut session = Vec::new();
    io::stdin().read_to_end(&mut session)?;
    let session = strata_protocol::read_session(&session)
        .map_err(|error| io::Error::other(error.to_string()))?;
    let agent = Arc::new(Agent {
        session,
        main_input: MainInput::new(main_input),
        open: AtomicU32::new(0),
    });
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, AGENT_PORT)?;
    loop {
        let (stream, from) = match listener.accept() {
            Ok(accepted) => accepted,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        while agent.open.load(Ordering::Relaxed) >= MAX_CONNECTIONS {
            thread::sleep(Duration::from_millis(10));
        }
        if from.cid() != VMADDR_CID_HOST {
            continue;
        }
        agent.open.fetch_add(1, Ordering::Relaxed);
        let own = Arc::clone(&agent);
        let started = thread::Builder::new().stack_size(STACK).spawn(move || {
            // Who has gone needs no answer.
            let _ = own.answer(&stream);
            own.open.fetch_sub(1, Ordering::Relaxed);
        });
        if started.is_err() {
            agent.open.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// An answer, or why there is none.
type Answer = Result<Reply, Failure>;

/// To be used as `map_err(failed("do this"))`.
fn failed<E: Into<io::Error>>(action: impl Into<String>) -> impl FnOnce(E) -> Failure {
    let action = action.into();
    move |error| {
        let error = error.into();
        let kind = match error.kind() {
            io::ErrorKind::NotFound => FailureKind::NotFound,
            io::ErrorKind::PermissionDenied
            | io::ErrorKind::NotADirectory
            | io::ErrorKind::IsADirectory
            | io::ErrorKind::InvalidInput => FailureKind::NotPossible,
            _ => FailureKind::Other,
        };
        Failure {
            kind,
            message: format!("cannot {action}: {error}"),
        }
    }
}

impl Agent {
    /// The place of programs that the host starts.
    fn place(&self) -> Result<Place, Failure> {
        Place::of(&self.session).map_err(|message| Failure {
            kind: FailureKind::NotFound,
            message,
        })
    }

    fn answer(&self, stream: &VsockStream) -> Result<(), Error> {
        Greeting::OURS.send(&mut &*stream)?;
        Greeting::receive(&mut &*stream)?;
        // One reader for all that comes: what it has read ahead must not be lost.
        let mut from = BufReader::new(stream);
        let Some(request) = read(&mut from)? else {
            return Ok(());
        };
        let answer = match request {
            Request::Exec(exec) => self.exec(&exec, stream, from),
            Request::Attach => self.attach(stream, from),
            Request::CopyOut { path } => files::send(&path, stream),
            Request::CopyIn(copy) => files::receive(&copy, &mut from),
            Request::Inform => Ok(Reply::Information(facts::inform(
                self.open.load(Ordering::Relaxed),
            ))),
            Request::Measure => Ok(Reply::Statistics(facts::measure())),
            Request::Signal(number) => signal_main(number),
            Request::Stop => self.stop(),
            Request::SetClock { now } => set_clock(now),
            Request::Reseed { seed } => reseed(&seed),
        };
        write(&mut &*stream, &answer.unwrap_or_else(Reply::Failed))
    }

    /// Asks the main command to end; the guest itself where there is none.
    fn stop(&self) -> Answer {
        let container = self.session.container.as_ref();
        let own = container.and_then(|container| container.stop_signal);
        if main_command().is_ok() {
            return signal_main(own.unwrap_or(Signal::TERM.as_raw() as u8));
        }
        // SIGUSR2 is what powers off with Strata's init; systemd's is SIGRTMIN+4 and the image's
        // may be another.
        let default = match self.session.run {
            strata_protocol::Run::Init if is_systemd() => POWER_OFF_SYSTEMD,
            _ => Signal::USR2.as_raw() as u8,
        };
        send(Pid::INIT, own.unwrap_or(default))
    }
}

/// `SIGRTMIN+4`, on which systemd powers off (systemd(1)).
const POWER_OFF_SYSTEMD: u8 = 38;

fn is_systemd() -> bool {
    fs::metadata("/run/systemd/system").is_ok()
}

/// The main command's process.
fn main_command() -> Result<Pid, Failure> {
    let text = fs::read_to_string(PID_FILE).ok();
    let number = text.and_then(|text| text.trim().parse().ok());
    number.and_then(Pid::from_raw).ok_or_else(|| Failure {
        kind: FailureKind::NotFound,
        message: "the machine has no main command".to_owned(),
    })
}

fn signal_main(number: u8) -> Answer {
    send(main_command()?, number)
}

fn signal(number: u8) -> Result<Signal, Failure> {
    sys::signal(number).ok_or_else(|| Failure {
        kind: FailureKind::NotPossible,
        message: format!("there is no signal {number}"),
    })
}

fn send(to: Pid, number: u8) -> Answer {
    kill_process(to, signal(number)?).map_err(failed("send the signal"))?;
    Ok(Reply::Done)
}

fn set_clock(now: Duration) -> Answer {
    let time = Timespec {
        tv_sec: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: now.subsec_nanos().into(),
    };
    clock_settime(ClockId::Realtime, time).map_err(failed("set the clock"))?;
    Ok(Reply::Done)
}

fn reseed(seed: &[u8]) -> Answer {
    let mut random = File::options()
        .write(true)
        .open("/dev/urandom")
        .map_err(failed("open /dev/urandom"))?;
    // What does not fit into the kernel's request is mixed in first.
    if let Some(rest) = seed.get(sys::MAX_SEED..) {
        random
            .write_all(rest)
            .map_err(failed("add to the random numbers"))?;
    }
    sys::reseed(&random, seed).map_err(failed("seed the random numbers"))?;
    Ok(Reply::Done)
}
