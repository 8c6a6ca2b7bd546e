//! The host's end of a conversation with the agent in a guest.

use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::SocketType;
use strata_machines::Machine;
use strata_protocol::{AGENT_PORT, Error, Greeting, Reply, Request, read, write};

use super::{Fault, SOCKET, arguments};
use crate::sockets;

/// How long a guest may take to boot before it is taken for one without an agent.
const PATIENCE: Duration = Duration::from_mins(1);
const PAUSE: Duration = Duration::from_millis(20);
/// Longest answer to a CONNECT, bytes.
const MAX_LINE: usize = 64;

/// A conversation about one thing.
pub(super) struct Agent {
    to: UnixStream,
    from: BufReader<UnixStream>,
}

impl Agent {
    /// Asks the guest for something. Waits for a guest that is still being booted.
    pub(super) fn ask(machine: &Machine, request: &Request) -> Result<Self, Fault> {
        Self::ask_within(machine, request, PATIENCE)
    }

    /// The same, but waits no longer than `patience`.
    pub(super) fn ask_within(
        machine: &Machine,
        request: &Request,
        patience: Duration,
    ) -> Result<Self, Fault> {
        let none = |reason: &str| Fault::NoAgent {
            name: machine.name().to_owned(),
            reason: reason.to_owned(),
        };
        if arguments(machine)?.kernel.is_some() {
            return Err(none("it boots a kernel of its own, without Strata's agent"));
        }
        let path = machine.directory().join(SOCKET);
        let end = Instant::now() + patience;
        let stream = loop {
            match connect(&path, end) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() >= end => return Err(none(&error.to_string())),
                Err(_) => {}
            }
            if !machine.state()?.is_running() {
                return Err(strata_machines::Error::NotRunning(machine.name().to_owned()).into());
            }
            thread::sleep(PAUSE);
        };
        let mut from = BufReader::new(stream.try_clone().map_err(Fault::host("use a socket"))?);
        let mut to = stream;
        Greeting::OURS
            .send(&mut to)
            .map_err(Error::Io)
            .and_then(|()| Greeting::receive(&mut from))
            .and_then(|_| write(&mut to, request))
            .map_err(Fault::Broken)?;
        let agent = Self { to, from };
        agent.wait_for(None)?;
        Ok(agent)
    }

    /// Asks for something whose answer is one message.
    pub(super) fn get(machine: &Machine, request: &Request) -> Result<Reply, Fault> {
        Self::ask(machine, request)?.reply()
    }

    /// How long [`Self::reply`] waits: for ever where `None`.
    pub(super) fn wait_for(&self, time: Option<Duration>) -> Result<(), Fault> {
        let set = self.to.set_read_timeout(time);
        set.map_err(Fault::host("use a socket"))
    }

    /// The next message. What the guest refuses is an error.
    pub(super) fn reply(&mut self) -> Result<Reply, Fault> {
        match read(&mut self.from) {
            Ok(Some(Reply::Failed(failure))) => Err(Fault::Guest {
                kind: failure.kind,
                message: printable(&failure.message),
            }),
            Ok(Some(reply)) => Ok(reply),
            Ok(None) => Err(Fault::Broken(Error::Io(
                io::ErrorKind::UnexpectedEof.into(),
            ))),
            Err(error) => Err(Fault::Broken(error)),
        }
    }

    /// What can be written to, from any thread.
    pub(super) fn writer(&self) -> Result<UnixStream, Fault> {
        self.to.try_clone().map_err(Fault::host("use a socket"))
    }
}

/// Connects to the agent's port as hybrid vsock has it: a line each way, and then its bytes. A guest
/// that does nothing any more does not answer, so nothing is waited for beyond `end`.
fn connect(path: &Path, end: Instant) -> io::Result<UnixStream> {
    let mut stream = UnixStream::from(sockets::connect(path, SocketType::STREAM)?);
    let left = end.saturating_duration_since(Instant::now());
    stream.set_read_timeout(Some(left.max(PAUSE)))?;
    stream.write_all(format!("CONNECT {AGENT_PORT}\n").as_bytes())?;
    let mut line = Vec::new();
    // Byte by byte: what comes after the line is not ours to take.
    while line.len() < MAX_LINE {
        let mut byte = [0];
        if stream.read(&mut byte)? == 0 || byte == *b"\n" {
            break;
        }
        line.extend(byte);
    }
    if line.starts_with(b"OK ") {
        return Ok(stream);
    }
    let message = "nothing in it listens on the agent's port";
    Err(io::Error::new(io::ErrorKind::ConnectionRefused, message))
}

/// A guest's words, with nothing in them that a terminal would obey.
fn printable(text: &str) -> String {
    text.replace(|letter: char| letter.is_control(), "?")
}
