//! Programs that the host starts in the guest: their streams, terminal, signals and end.

use std::io::BufReader;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::Child;
use std::sync::{Arc, Weak};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use strata_protocol::{Exec, Failure, FailureKind, MAX_DATA, Reply, Size, Status, Stream};
use vsock::VsockStream;

use super::proxy::{Proxy, wait_for};
use super::{Agent, Answer, failed};
use crate::command::{self, Unable};
use crate::place::{add_variables, word};
use crate::{sys, terminal};

impl Agent {
    /// Starts a program and serves it until its end.
    pub(super) fn exec(
        &self,
        exec: &Exec,
        stream: &VsockStream,
        from: BufReader<&VsockStream>,
    ) -> Answer {
        let (child, ends) = self.start(exec)?;
        let mut program = Program::new(child, ends, stream, from)?;
        program.proxy.tell(&Reply::Started {
            pid: program.child.id(),
        });
        program.serve()
    }

    fn start(&self, exec: &Exec) -> Result<(Child, Ends), Failure> {
        let mut place = self.place()?;
        if let Some(user) = &exec.user {
            place = place.for_user(user).map_err(|message| Failure {
                kind: FailureKind::NotFound,
                message,
            })?;
        }
        if let Some(directory) = &exec.directory {
            place.directory = place.directory.join(word(directory));
            place.make_directory = false;
            if !place.directory.is_dir() {
                let directory = place.directory.display();
                return Err(Failure {
                    kind: FailureKind::NotFound,
                    message: format!("there is no directory '{directory}' in the {}", place.name),
                });
            }
        }
        if exec.terminal.is_some() {
            place.set_default_terminal();
        }
        add_variables(&mut place.environment, &exec.environment);
        let unable = |Unable { status, message }| Failure {
            kind: match status {
                127 => FailureKind::NotFound,
                126 => FailureKind::NotPossible,
                _ => FailureKind::Other,
            },
            message,
        };
        let mut command =
            command::prepare(&exec.words, &place, exec.terminal.is_some()).map_err(unable)?;
        let (ends, [stdin, stdout, stderr]) = match exec.terminal {
            Some(size) => on_terminal(size),
            None => on_pipes(exec.input),
        }
        .map_err(failed("make streams for the program"))?;
        if let (
            Some(identity),
            Ends {
                terminal: false, ..
            },
        ) = (&place.identity, &ends)
        {
            sys::give([&stdin, &stdout, &stderr], identity);
        }
        let child = command
            .stdin(stdin)
            .stdout(stdout)
            .stderr(stderr)
            .spawn()
            .map_err(|error| unable(command::not_started(&exec.words, &error)))?;
        Ok((child, ends))
    }
}

/// The agent's ends of a program's streams.
struct Ends {
    /// Where its input goes, until that has ended.
    input: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    /// All of them are a terminal.
    terminal: bool,
}

type Streams = (Ends, [OwnedFd; 3]);

fn on_terminal(size: Size) -> Result<Streams, Errno> {
    let (master, terminal) = terminal::open(size)?;
    let copy = |of: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(of, 0);
    let ends = Ends {
        input: Some(copy(&master)?),
        stdout: Some(master),
        stderr: None,
        terminal: true,
    };
    Ok((ends, [copy(&terminal)?, copy(&terminal)?, terminal]))
}

fn on_pipes(input: bool) -> Result<Streams, Errno> {
    let (stdin, to) = pipe_with(PipeFlags::CLOEXEC)?;
    let (from_stdout, stdout) = pipe_with(PipeFlags::CLOEXEC)?;
    let (from_stderr, stderr) = pipe_with(PipeFlags::CLOEXEC)?;
    let ends = Ends {
        input: input.then_some(to),
        stdout: Some(from_stdout),
        stderr: Some(from_stderr),
        terminal: false,
    };
    Ok((ends, [stdin, stdout, stderr]))
}

/// How much of what a program wrote is still taken after its end, bytes: more than a pipe holds.
/// What it left running could go on for ever.
const LAST: usize = 1 << 20;

/// A program that runs.
struct Program<'a> {
    child: Child,
    /// Is readable when the program has ended.
    end: OwnedFd,
    has_ended: bool,
    has_hung_up: bool,
    proxy: Proxy<'a>,
    /// Keeps its input open.
    input: Option<Arc<OwnedFd>>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

impl<'a> Program<'a> {
    fn new(
        mut child: Child,
        ends: Ends,
        host: &'a VsockStream,
        from: BufReader<&'a VsockStream>,
    ) -> Result<Self, Failure> {
        let pid = Pid::from_child(&child);
        let input = ends.input.map(Arc::new);
        let to = input.as_ref().map_or_else(Weak::new, Arc::downgrade);
        let watch = || {
            for stream in [&ends.stdout, &ends.stderr].into_iter().flatten() {
                rustix::io::ioctl_fionbio(stream, true)?;
            }
            let proxy = Proxy::new(pid, to, ends.terminal, host, from)?;
            Ok::<_, Errno>((pidfd_open(pid, PidfdFlags::empty())?, proxy))
        };
        let (end, proxy) = watch()
            .map_err(failed("watch the program"))
            .inspect_err(|_| {
                let _ = child.kill();
                let _ = child.wait();
            })?;
        Ok(Self {
            child,
            end,
            has_ended: false,
            has_hung_up: false,
            proxy,
            input,
            stdout: ends.stdout,
            stderr: ends.stderr,
        })
    }

    /// Moves what comes and goes until the program has ended and all it wrote is sent.
    fn serve(&mut self) -> Answer {
        let mut piece = vec![0; MAX_DATA];
        let mut left = LAST;
        loop {
            // While the host does not take what it was sent, no more is read for it.
            let may_read = self.proxy.is_idle();
            let ready = self
                .wait(may_read)
                .map_err(failed("wait for the program"))?;
            let [stdout, stderr] = ready;
            let mut count = 0;
            if stdout {
                count += self.forward(Stream::Stdout, &mut piece);
            }
            if stderr {
                count += self.forward(Stream::Stderr, &mut piece);
            }
            if self.has_ended {
                left = left.saturating_sub(count);
                let is_quiet = may_read && !stdout && !stderr;
                if is_quiet || left == 0 {
                    break;
                }
            }
        }
        self.proxy.finish();
        let status = self
            .child
            .wait()
            .map_err(failed("learn how the program ended"))?;
        let status = match (status.code(), status.signal()) {
            (Some(code), _) => Status::Exited(code as u8),
            (None, signal) => Status::Signal(signal.unwrap_or(0) as u8),
        };
        Ok(Reply::Ended(status))
    }

    /// Waits for something to do, serves the host, and gives whether standard output and error have
    /// something.
    fn wait(&mut self, may_read: bool) -> Result<[bool; 2], Errno> {
        let [host, input] = self.proxy.waits_for();
        let to_read = |stream| may_read.then_some(stream).flatten();
        let watched = [
            Some((self.end.as_fd(), PollFlags::IN)).filter(|_| !self.has_ended),
            host,
            input,
            to_read(self.stdout.as_ref()).map(|stream: &OwnedFd| (stream.as_fd(), PollFlags::IN)),
            to_read(self.stderr.as_ref()).map(|stream: &OwnedFd| (stream.as_fd(), PollFlags::IN)),
        ];
        // After its end there is what there is.
        let is_done = self.has_ended && may_read;
        let ready = wait_for(watched, !is_done && !self.proxy.has_message())?;
        let [end, host, input, stdout, stderr] = ready;
        self.has_ended |= !end.is_empty();
        self.proxy.serve(host, input);
        if self.proxy.input_is_over() {
            self.input = None;
        }
        if self.proxy.is_gone() && !self.has_hung_up {
            self.hang_up();
        }
        Ok([!stdout.is_empty(), !stderr.is_empty()])
    }

    /// Sends the next piece of what the program wrote; gives its length.
    fn forward(&mut self, stream: Stream, piece: &mut [u8]) -> usize {
        let end = match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        };
        let Some(from) = end else { return 0 };
        match rustix::io::read(from, &mut *piece) {
            // A terminal that nobody has open any more is an error.
            Ok(0) | Err(Errno::IO) => {
                *end = None;
                0
            }
            Ok(count) => {
                self.proxy
                    .tell(&Reply::Output(stream, piece[..count].to_vec()));
                count
            }
            Err(_) => 0,
        }
    }

    /// The host has gone: the program learns of it as from a terminal.
    fn hang_up(&mut self) {
        self.has_hung_up = true;
        self.proxy.close();
        self.input = None;
        if self.proxy.terminal {
            self.stdout = None;
        }
        // What it still writes to pipes is thrown away: it may have last things to do, and would
        // end in a write to a pipe that nobody reads.
        for signal in [Signal::HUP, Signal::CONT] {
            let _ = kill_process_group(self.proxy.pid, signal);
        }
    }
}
