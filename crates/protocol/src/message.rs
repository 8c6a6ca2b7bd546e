//! Messages between the host and a guest's agent.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Rows and columns of a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Lines of text.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

impl Size {
    /// That of a terminal of which nobody knows it.
    pub const USUAL: Self = Self {
        rows: 24,
        columns: 80,
    };
}

/// What the host asks for: the first message on a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// What the guest is. Answered by [`Reply::Information`].
    Inform,
    /// A program is to run. The host goes on with [`Input::Data`] for its standard input,
    /// [`Input::End`], [`Input::Resize`] and [`Input::Signal`]; the guest answers
    /// [`Reply::Started`], [`Reply::Taken`], [`Reply::Output`] and at last [`Reply::Ended`]. The program gets SIGHUP
    /// when the connection goes before.
    Exec(Exec),
    /// The host takes part in the main command: it goes on with [`Input`], of which the data is for
    /// a command that [takes input from there](crate::Streams::takes_input). The guest answers
    /// [`Reply::Started`], [`Reply::Taken`], and [`Reply::Done`] when the command has ended. What
    /// it writes goes the way that it always goes. Several may be attached, and the connection may
    /// go at any time.
    Attach,
    /// A signal to the main command. Answered by [`Reply::Done`].
    Signal(u8),
    /// The main command is to end, and with it the machine: by the image's stop signal, or
    /// SIGTERM. Where there is none, the guest powers off. Answered by [`Reply::Done`] before.
    Stop,
    /// A file or directory of the guest's as a tar stream: [`Reply::Data`], then [`Reply::Done`].
    CopyOut {
        /// The path in the guest.
        path: Vec<u8>,
    },
    /// A tar stream is to be unpacked: the host sends [`Input::Data`] and [`Input::End`], the
    /// guest answers [`Reply::Done`].
    CopyIn(Copy),
    /// What the guest uses. Answered by [`Reply::Statistics`].
    Measure,
    /// The guest's clock is to be set. Answered by [`Reply::Done`].
    SetClock {
        /// Time since 1970.
        now: Duration,
    },
    /// The guest's random numbers are to begin anew, as after a snapshot. Answered by
    /// [`Reply::Done`].
    Reseed {
        /// Bytes that nobody else has.
        #[serde(with = "serde_bytes")]
        seed: Vec<u8>,
    },
}

/// A program to run in a guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// The program and its arguments.
    pub words: Vec<Vec<u8>>,
    /// `NAME=value`, each, beside those of the image.
    pub environment: Vec<Vec<u8>>,
    /// As whom, if not as the image says.
    pub user: Option<String>,
    /// Where, if not where the image says.
    pub directory: Option<Vec<u8>>,
    /// On a terminal of this size.
    pub terminal: Option<Size>,
    /// Standard input comes from the host; there is none otherwise.
    pub input: bool,
}

/// Where a tar stream goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copy {
    /// A path in the guest. What the stream holds goes into it where it is a directory, and
    /// becomes it where it is not there.
    pub path: Vec<u8>,
    /// Files belong to the user and group of the stream, rather than to root.
    pub keep_owner: bool,
}

/// What follows a request from the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Input {
    /// Bytes of standard input or of a tar stream, at most [`crate::MAX_DATA`]. Of standard input no more
    /// than [`crate::WINDOW`] is on its way: what the guest has not told as [`Reply::Taken`]. So a
    /// program that does not read holds up nothing but its input.
    Data(#[serde(with = "serde_bytes")] Vec<u8>),
    /// The end of those.
    End,
    /// The terminal has another size.
    Resize(Size),
    /// A signal to the program: to its whole process group if terminals send it for a key or when
    /// they go (SIGINT, SIGQUIT, SIGHUP), else to the program alone.
    Signal(u8),
}

/// One of a program's output streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stream {
    /// Standard output, or the terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

/// What a guest answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// It was done.
    Done,
    /// It cannot be done.
    Failed(Failure),
    /// The program is about to be started.
    Starting,
    /// The program runs.
    Started {
        /// Its process number in the guest.
        pid: u32,
    },
    /// The program has taken so many bytes of its standard input, or will never want them.
    Taken(u32),
    /// The program wrote this, at most [`crate::MAX_DATA`] bytes.
    Output(Stream, #[serde(with = "serde_bytes")] Vec<u8>),
    /// The program has ended, and all it wrote has been sent.
    Ended(Status),
    /// Bytes of a tar stream.
    Data(#[serde(with = "serde_bytes")] Vec<u8>),
    /// What the guest is.
    Information(Information),
    /// What it uses.
    Statistics(Statistics),
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Status {
    /// With this status.
    Exited(u8),
    /// By this signal.
    Signal(u8),
}

impl Status {
    /// As shells tell it: 128 and the signal's number.
    pub fn code(self) -> u8 {
        match self {
            Self::Exited(status) => status,
            Self::Signal(number) => 128_u8.saturating_add(number),
        }
    }
}

/// Why something cannot be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What a program would do differently about it.
    pub kind: FailureKind,
    /// For people.
    pub message: String,
}

/// Kinds of failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// There is no such file, program, user or process.
    NotFound,
    /// There is one, but it cannot be used so.
    NotPossible,
    /// The guest failed at it.
    Other,
}

/// What a guest is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Information {
    /// Version of Strata's program there.
    pub version: String,
    /// Release of its kernel.
    pub kernel: String,
    /// Time since it was booted.
    pub uptime: Duration,
    /// Programs that run through the agent.
    pub programs: u32,
}

/// What a guest uses.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// Memory that it has, bytes.
    pub memory_total: u64,
    /// Memory that could be had without swapping, bytes.
    pub memory_available: u64,
    /// Time that its processors were busy, all together, since boot.
    pub busy: Duration,
    /// Average length of the run queue over one minute, in hundredths.
    pub load: u32,
    /// Processes.
    pub processes: u32,
    /// Bytes that its network cards received and sent.
    pub received: u64,
    /// See `received`.
    pub sent: u64,
    /// Bytes that were read from its disks.
    pub read: u64,
    /// Bytes that were written to its disks.
    pub written: u64,
}
