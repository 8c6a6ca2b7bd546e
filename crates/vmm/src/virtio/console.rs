//! The threads of a virtio-console: a worker that moves bytes between the device and its
//! pipes, a reader for each host input, a writer for each host output.
//!
//! ```text
//!   host input ─► reader ─► Pipe ─► worker ◄─► Console        guest
//!   host output ◄─ writer ◄─ Pipe ◄─┘
//! ```

use std::io::{ErrorKind, Read, Write};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use strata_devices::virtio::Console;

use super::doorbell::Doorbell;
use super::pipe::Pipe;
use super::root::Shared;

/// Bytes that may wait between a host stream and the guest.
const PIPE_LIMIT: usize = 256 << 10;
/// Bytes read from a host input at a time.
const READ_SIZE: usize = 64 << 10;
/// How soon an input that has nothing, and will not wait, is asked again.
const RETRY: Duration = Duration::from_millis(10);

/// The host's ends of one port.
pub(super) struct Streams {
    input: Option<Input>,
    output: Option<Arc<Pipe>>,
}

struct Input {
    pipe: Arc<Pipe>,
    /// Taken from the pipe, offered to the guest from `given` on.
    bytes: Vec<u8>,
    given: usize,
    closed: bool,
}

/// A thread that writes a port's output, to be joined when all has been handed over.
pub(super) struct Writer {
    pipe: Arc<Pipe>,
    thread: JoinHandle<()>,
}

impl Writer {
    /// Waits until all output is written.
    pub(super) fn finish(self) {
        self.pipe.end();
        let _ = self.thread.join();
    }
}

impl Streams {
    pub(super) fn new() -> Self {
        Self {
            input: None,
            output: None,
        }
    }

    /// Reads `source` on a thread of its own. The thread ends with the input, or at the
    /// first read after the console's end; one that blocks in `read` cannot be ended.
    pub(super) fn read_from(
        &mut self,
        mut source: Box<dyn Read + Send>,
        bell: &Arc<Doorbell>,
    ) -> std::io::Result<()> {
        let pipe = Arc::new(Pipe::new(PIPE_LIMIT));
        let (end, bell) = (Arc::clone(&pipe), Arc::clone(bell));
        thread::Builder::new()
            .name("console-in".into())
            .spawn(move || {
                copy_in(&mut *source, &end, &bell);
                end.end();
                bell.ring();
            })?;
        self.input = Some(Input {
            pipe,
            bytes: Vec::new(),
            given: 0,
            closed: false,
        });
        Ok(())
    }

    /// Writes output to `sink` on a thread of its own.
    pub(super) fn write_to(
        &mut self,
        mut sink: Box<dyn Write + Send>,
        bell: &Arc<Doorbell>,
    ) -> std::io::Result<Writer> {
        let pipe = Arc::new(Pipe::new(PIPE_LIMIT));
        let (end, bell) = (Arc::clone(&pipe), Arc::clone(bell));
        let thread = thread::Builder::new()
            .name("console-out".into())
            .spawn(move || copy_out(&mut *sink, &end, &bell))?;
        self.output = Some(Arc::clone(&pipe));
        Ok(Writer { pipe, thread })
    }
}

fn copy_in(source: &mut dyn Read, pipe: &Pipe, bell: &Doorbell) {
    let mut buffer = vec![0; READ_SIZE];
    loop {
        match source.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => {
                if !pipe.put_waiting(&buffer[..count]) {
                    return;
                }
                bell.ring();
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(RETRY),
            Err(error) => {
                tracing::warn!(%error, "a console port's input ended early");
                return;
            }
        }
    }
}

fn copy_out(sink: &mut dyn Write, pipe: &Pipe, bell: &Doorbell) {
    while let Some(bytes) = pipe.take_waiting() {
        bell.ring();
        if let Err(error) = sink.write_all(&bytes).and_then(|()| sink.flush()) {
            // The guest goes on; what it writes goes nowhere.
            tracing::warn!(%error, "a console port's output is lost from here on");
            pipe.abandon();
        }
    }
}

/// Moves bytes until the doorbell stops it; then hands over all output there is.
pub(super) fn serve(shared: &Arc<Shared<Console>>, mut ports: Vec<Streams>, bell: &Doorbell) {
    while bell.wait() {
        while pump(shared, &mut ports) {}
    }
    // The vCPUs have stopped: what is in the queues is all there will be.
    loop {
        ports
            .iter()
            .filter_map(|p| p.output.as_ref())
            .for_each(|pipe| pipe.wait_for_room());
        if !pump(shared, &mut ports) {
            break;
        }
    }
    for input in ports.iter().filter_map(|p| p.input.as_ref()) {
        input.pipe.abandon();
    }
}

/// One round over all ports. Returns true if there was more output than was moved and
/// there is room for it.
fn pump(shared: &Arc<Shared<Console>>, ports: &mut [Streams]) -> bool {
    let mut more = shared.with(Console::process_control);
    for (port, streams) in ports.iter_mut().enumerate() {
        more |= pump_output(shared, port, streams.output.as_deref());
        if let Some(input) = &mut streams.input {
            pump_input(shared, port, input);
        }
    }
    more
}

fn pump_output(shared: &Arc<Shared<Console>>, port: usize, pipe: Option<&Pipe>) -> bool {
    // Nobody listens: the bytes are taken all the same, or the guest would wait.
    let room = pipe.map_or(PIPE_LIMIT, Pipe::room);
    if room == 0 {
        // The writer rings when it has made some.
        return false;
    }
    let mut bytes = Vec::new();
    let more =
        shared.with(|console, transport| console.take_output(transport, port, room, &mut bytes));
    if let Some(pipe) = pipe
        && !bytes.is_empty()
    {
        pipe.put(&bytes);
    }
    more
}

fn pump_input(shared: &Arc<Shared<Console>>, port: usize, input: &mut Input) {
    loop {
        if input.given == input.bytes.len() {
            input.bytes = input.pipe.take();
            input.given = 0;
        }
        if input.bytes.is_empty() {
            break;
        }
        let rest = &input.bytes[input.given..];
        let given = shared.with(|console, transport| console.give_input(transport, port, rest));
        if given == 0 {
            return;
        }
        input.given += given;
    }
    if !input.closed && input.pipe.drained() {
        input.closed = true;
        shared.with(|console, transport| console.close_input(transport, port));
    }
}
