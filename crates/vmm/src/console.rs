//! The serial console: a 16550 between the guest and the host's streams.
//!
//! ```text
//!   guest ──OUT──► Serial ──byte──► Output queue ──► writer thread ──► host
//!   guest ◄──IN─── Serial ◄──FIFO space── input thread ◄────────────── host
//! ```
//!
//! The vCPU thread never does host I/O. A full queue holds the guest up until the writer
//! has caught up, so that nothing is lost; no more input is taken than the guest has read.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use strata_devices::serial::{COM1_GSI, COM1_PORT, Serial};

use crate::bus::PortDevice;
use crate::ending::Ending;
use crate::interrupts::Interrupts;
use crate::panic_watch::{PanicWatch, Sight};
use crate::sync::lock;

/// Bytes that may wait for the host before the guest has to.
const QUEUE_SIZE: usize = 64 << 10;
/// For how long the writer waits for more to write at once.
const GATHER: Duration = Duration::from_millis(1);

#[derive(Default)]
struct Queue {
    bytes: VecDeque<u8>,
    /// No more will be added; what does not fit any more is dropped.
    closed: bool,
    /// The writer has written and flushed all, and ended.
    done: bool,
}

/// What the guest has sent and the host has not yet taken.
#[derive(Default)]
pub(crate) struct Output {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Output {
    /// Adds a byte. Waits while the queue is full.
    fn push(&self, byte: u8) {
        let mut queue = lock(&self.queue);
        while queue.bytes.len() >= QUEUE_SIZE {
            if queue.closed {
                return;
            }
            queue = self.wait(queue);
        }
        let was_empty = queue.bytes.is_empty();
        queue.bytes.push_back(byte);
        if was_empty {
            self.changed.notify_all();
        }
    }

    fn wait<'a>(&self, queue: MutexGuard<'a, Queue>) -> MutexGuard<'a, Queue> {
        self.changed
            .wait(queue)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the thread that writes to `sink`.
    pub(crate) fn start(self: &Arc<Self>, sink: Box<dyn Write + Send>) -> io::Result<()> {
        let output = Arc::clone(self);
        let body = move || output.run(sink);
        thread::Builder::new()
            .name("serial-out".into())
            .spawn(body)
            .map(drop)
    }

    fn run(&self, mut sink: Box<dyn Write + Send>) {
        let mut failed = false;
        while let Some(bytes) = self.take() {
            if failed {
                continue;
            }
            if let Err(error) = sink.write_all(&bytes).and_then(|()| sink.flush()) {
                tracing::warn!(%error, "console output is lost from here on");
                failed = true;
            }
        }
        drop(sink);
        lock(&self.queue).done = true;
        self.changed.notify_all();
    }

    /// Everything there is, once there is something. `None` at the end.
    fn take(&self) -> Option<Vec<u8>> {
        let mut queue = lock(&self.queue);
        while queue.bytes.is_empty() {
            if queue.closed {
                return None;
            }
            queue = self.wait(queue);
        }
        if !queue.closed {
            // The guest sends byte by byte. Let a few gather.
            drop(queue);
            thread::sleep(GATHER);
            queue = lock(&self.queue);
        }
        let bytes = std::mem::take(&mut queue.bytes);
        self.changed.notify_all();
        Some(bytes.into())
    }

    /// Lets the writer write what is left and end.
    pub(crate) fn close(&self) {
        lock(&self.queue).closed = true;
        self.changed.notify_all();
    }

    /// Waits until all is written, or for `limit` if there is one.
    pub(crate) fn finish(&self, limit: Option<Duration>) {
        let until = limit.map(|limit| Instant::now() + limit);
        let mut queue = lock(&self.queue);
        while !queue.done {
            let Some(until) = until else {
                queue = self.wait(queue);
                continue;
            };
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.changed.wait_timeout(queue, left);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

struct Port {
    serial: Serial,
    /// The level of the interrupt line as last told.
    line: bool,
    /// Looks for panic reports; `None` once the guest tells of panics itself.
    watch: Option<PanicWatch>,
    /// The machine has ended: no more input is taken.
    closed: bool,
}

/// The serial port on the machine's bus.
pub(crate) struct SerialPort {
    port: Mutex<Port>,
    /// The guest has made room for input, or the port was closed.
    room: Condvar,
    output: Arc<Output>,
    interrupts: Interrupts,
    ending: Arc<Ending>,
}

impl SerialPort {
    pub(crate) fn new(output: Arc<Output>, interrupts: Interrupts, ending: Arc<Ending>) -> Self {
        let port = Port {
            serial: Serial::new(),
            line: false,
            watch: Some(PanicWatch::default()),
            closed: false,
        };
        Self {
            port: Mutex::new(port),
            room: Condvar::new(),
            output,
            interrupts,
            ending,
        }
    }

    /// Tells a changed interrupt line. Under the port's lock, so that changes stay in order.
    fn drive_line(&self, port: &mut Port) {
        let line = port.serial.interrupt();
        if line != port.line {
            port.line = line;
            self.interrupts.set_line(COM1_GSI, line);
        }
    }

    fn send(&self, byte: u8, sight: Sight) {
        match sight {
            Sight::Nothing => {}
            Sight::Begun => self.ending.panic_begun(),
            Sight::Ended => self.ending.panicked(),
        }
        if byte == b'\n' {
            self.ending.output();
        }
        self.output.push(byte);
    }

    /// The guest tells of panics by better means.
    pub(crate) fn stop_panic_watch(&self) {
        lock(&self.port).watch = None;
    }

    /// Starts the thread that reads from `source`. It lives until the source ends, or the
    /// first thing it reads after [`SerialPort::close`].
    pub(crate) fn start_input(self: &Arc<Self>, source: Box<dyn Read + Send>) -> io::Result<()> {
        let port = Arc::clone(self);
        let body = move || port.read_from(source);
        thread::Builder::new()
            .name("serial-in".into())
            .spawn(body)
            .map(drop)
    }

    fn read_from(&self, mut source: Box<dyn Read + Send>) {
        let mut buffer = [0; 4096];
        loop {
            match source.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => {
                    let count = count.min(buffer.len());
                    if !self.feed(&buffer[..count]) {
                        return;
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::warn!(%error, "console input ends here");
                    return;
                }
            }
        }
    }

    /// Gives the guest all of `bytes`, as it reads them. False if the machine ended first.
    fn feed(&self, mut bytes: &[u8]) -> bool {
        let mut port = lock(&self.port);
        while !bytes.is_empty() {
            if port.closed {
                return false;
            }
            let taken = port.serial.receive(bytes);
            bytes = &bytes[taken..];
            self.drive_line(&mut port);
            if !bytes.is_empty() {
                port = self.room.wait(port).unwrap_or_else(PoisonError::into_inner);
            }
        }
        true
    }

    /// Takes no more input.
    pub(crate) fn close(&self) {
        lock(&self.port).closed = true;
        self.room.notify_all();
    }
}

impl PortDevice for SerialPort {
    fn port_read(&self, port: u16, _size: u8) -> u32 {
        let mut state = lock(&self.port);
        let had_room = state.serial.receive_space() > 0;
        let value = state.serial.read((port - COM1_PORT) as u8);
        self.drive_line(&mut state);
        if !had_room && state.serial.receive_space() > 0 {
            self.room.notify_all();
        }
        value.into()
    }

    fn port_write(&self, port: u16, _size: u8, value: u32) {
        let mut state = lock(&self.port);
        let had_room = state.serial.receive_space() > 0;
        let sent = state.serial.write((port - COM1_PORT) as u8, value as u8);
        self.drive_line(&mut state);
        if !had_room && state.serial.receive_space() > 0 {
            self.room.notify_all();
        }
        let Some(byte) = sent else { return };
        let sight = state
            .watch
            .as_mut()
            .map_or(Sight::Nothing, |watch| watch.see(byte));
        // Sending may have to wait for the host.
        drop(state);
        self.send(byte, sight);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::clock::Clock;
    use crate::ending::Outcome;

    const LONG: Duration = Duration::from_secs(20);
    const IER: u16 = COM1_PORT + 1;
    const FCR: u16 = COM1_PORT + 2;
    const LSR: u16 = COM1_PORT + 5;

    /// Collects what is written; can be held up.
    #[derive(Clone, Default)]
    struct Sink {
        bytes: Arc<Mutex<Vec<u8>>>,
        gate: Arc<Mutex<()>>,
    }

    impl Write for Sink {
        fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
            let _gate = self.gate.lock();
            self.bytes.lock().unwrap().extend_from_slice(buffer);
            Ok(buffer.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Broken;

    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn port(sink: Box<dyn Write + Send>) -> Arc<SerialPort> {
        let output = Arc::new(Output::default());
        output.start(sink).unwrap();
        let interrupts = Interrupts::new(
            1,
            &Clock {
                tsc_khz: 1_000_000,
                start_tsc: 0,
            },
        );
        Arc::new(SerialPort::new(output, interrupts, Arc::default()))
    }

    fn send(port: &SerialPort, bytes: &[u8]) {
        for byte in bytes {
            port.port_write(COM1_PORT, 1, (*byte).into());
        }
    }

    fn finish(port: &SerialPort) {
        port.output.close();
        port.output.finish(Some(LONG));
    }

    #[test]
    fn everything_sent_is_written_in_order_before_the_end() {
        let sink = Sink::default();
        let port = port(Box::new(sink.clone()));
        let text: Vec<u8> = (0..200_000_u32).map(|i| (i % 251) as u8).collect();

        send(&port, &text);
        finish(&port);

        assert!(*sink.bytes.lock().unwrap() == text);
    }

    #[test]
    fn a_full_queue_holds_the_guest_up_and_loses_nothing() {
        let sink = Sink::default();
        let port = port(Box::new(sink.clone()));
        let gate = sink.gate.lock().unwrap();
        let (sender, sent) = mpsc::channel();
        let guest = Arc::clone(&port);
        thread::spawn(move || {
            send(&guest, &vec![b'x'; 4 * QUEUE_SIZE]);
            sender.send(()).unwrap();
        });

        assert!(sent.recv_timeout(Duration::from_millis(50)).is_err());
        drop(gate);

        sent.recv_timeout(LONG).unwrap();
        finish(&port);
        assert_eq!(sink.bytes.lock().unwrap().len(), 4 * QUEUE_SIZE);
    }

    #[test]
    fn a_broken_output_does_not_hold_the_guest_up() {
        let port = port(Box::new(Broken));

        send(&port, &vec![b'x'; 3 * QUEUE_SIZE]);

        finish(&port);
    }

    #[test]
    fn a_blocked_output_does_not_hold_up_a_limited_finish() {
        let sink = Sink::default();
        let port = port(Box::new(sink.clone()));
        let _gate = sink.gate.lock().unwrap();
        send(&port, b"x");
        port.output.close();

        port.output.finish(Some(Duration::from_millis(20)));
    }

    #[test]
    fn input_longer_than_the_fifo_arrives_whole() {
        let port = port(Box::new(io::sink()));
        let text: Vec<u8> = (0..10_000_u32).map(|i| (i % 251) as u8).collect();
        port.start_input(Box::new(io::Cursor::new(text.clone())))
            .unwrap();
        port.port_write(FCR, 1, 0x81);
        port.port_write(IER, 1, 1);

        let mut received = Vec::new();
        let start = Instant::now();
        while received.len() < text.len() && start.elapsed() < LONG {
            if port.port_read(LSR, 1) & 1 != 0 {
                received.push(port.port_read(COM1_PORT, 1) as u8);
            } else {
                thread::yield_now();
            }
        }

        assert!(received == text);
    }

    #[test]
    fn closing_the_port_ends_an_input_that_waits_for_room() {
        let port = port(Box::new(io::sink()));
        let reader = Arc::clone(&port);
        let feeding = thread::spawn(move || reader.feed(b"never read"));

        port.close();

        assert!(!feeding.join().unwrap());
    }

    #[test]
    fn a_panic_report_makes_a_reset_a_panic_until_pvpanic_is_up() {
        let report = b"[    1.5] Kernel panic - not syncing: x\r\n";
        for (driver, outcome) in [(false, Outcome::Panic), (true, Outcome::Reset)] {
            let port = port(Box::new(io::sink()));
            if driver {
                port.stop_panic_watch();
            }
            send(&port, report);
            port.ending.end(Outcome::Reset);
            assert_eq!(port.ending.wait(), outcome);
        }
    }
}
