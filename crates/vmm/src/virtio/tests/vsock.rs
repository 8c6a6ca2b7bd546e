//! A guest's driver on one side, programs with real Unix sockets on the other.

use std::os::unix::net::{UnixListener, UnixStream};

use strata_devices::virtio::vsock_queue::{RECEIVE, TRANSMIT};
use strata_devices::virtio::{Shutdown, common, testing};

use super::*;

const CID: u32 = 3;
const GUEST_PORT: u32 = 52;
const HEADER: usize = 44;
/// Bytes and number of the guest's receive buffers.
const BUFFER: u32 = 4096;
const BUFFERS: usize = 32;

/// Operations (virtio 1.2 §5.10.6).
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;

/// A packet to the guest.
#[derive(Debug, PartialEq, Eq)]
struct Packet {
    op: u16,
    host_port: u32,
    guest_port: u32,
    flags: u32,
    data: Vec<u8>,
}

/// A machine with a socket device, and where programs come in.
struct Guest {
    machine: Machine,
    path: std::path::PathBuf,
    _directory: tempfile::TempDir,
    /// Receive buffers, in the order in which they were offered.
    buffers: std::collections::VecDeque<u64>,
    /// Where packets are put together, over and over.
    packet: u64,
    came: std::collections::VecDeque<Packet>,
}

impl Guest {
    /// A machine whose driver is up; programs do `before` that.
    fn start<T>(before: impl FnOnce(&std::path::Path) -> T) -> (Self, T) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock");
        let door = Door::open(UnixListener::bind(&path).unwrap().into()).unwrap();
        let done = before(&path);
        let mut machine = machine(1, |devices| devices.add_vsock(CID, door).unwrap());
        let packet = machine.driver.allocate(70_000);
        let mut guest = Self {
            machine,
            path,
            _directory: directory,
            buffers: std::collections::VecDeque::new(),
            packet,
            came: std::collections::VecDeque::new(),
        };
        guest.give_buffers();
        (guest, done)
    }

    fn give_buffers(&mut self) {
        self.buffers.clear();
        for _ in 0..BUFFERS {
            let at = self.machine.driver.allocate(BUFFER.into());
            self.give(at);
        }
        self.machine.kick(RECEIVE);
    }

    fn give(&mut self, at: u64) {
        let driver = &mut self.machine.driver;
        driver.offer(RECEIVE, &[], &[(at, BUFFER)]);
        self.buffers.push_back(at);
    }

    /// The next packet for the guest.
    fn next(&mut self) -> Packet {
        let started = Instant::now();
        loop {
            if let Some(packet) = self.came.pop_front() {
                return packet;
            }
            assert!(started.elapsed() < PATIENCE, "no packet");
            for (_, length) in self.machine.driver.used(RECEIVE) {
                let at = self.buffers.pop_front().unwrap();
                let bytes = self.machine.driver.bytes(at, length as usize);
                let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
                self.came.push_back(Packet {
                    op: u16::from_le_bytes([bytes[30], bytes[31]]),
                    host_port: u32_at(16),
                    guest_port: u32_at(20),
                    flags: u32_at(32),
                    data: bytes[HEADER..].to_vec(),
                });
                self.give(at);
            }
            self.machine.kick(RECEIVE);
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[track_caller]
    fn expect(&mut self, op: u16, host_port: u32) -> Packet {
        let packet = self.next();
        assert_eq!((packet.op, packet.host_port), (op, host_port), "{packet:?}");
        packet
    }

    /// Data for the guest on one connection, of `length` bytes.
    fn read(&mut self, host_port: u32, length: usize) -> Vec<u8> {
        let mut data = Vec::new();
        while data.len() < length {
            data.extend(self.expect(RW, host_port).data);
        }
        data
    }

    /// Sends a packet and waits until the device has it.
    fn send(&mut self, op: u16, host_port: u32, flags: u32, data: &[u8]) {
        let mut bytes = u64::from(CID).to_le_bytes().to_vec();
        bytes.extend(2_u64.to_le_bytes());
        bytes.extend(GUEST_PORT.to_le_bytes());
        bytes.extend(host_port.to_le_bytes());
        bytes.extend((data.len() as u32).to_le_bytes());
        bytes.extend(1_u16.to_le_bytes());
        bytes.extend(op.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        // Room without end, of which nothing is ever left.
        bytes.extend((1_u32 << 30).to_le_bytes());
        bytes.extend(0_u32.to_le_bytes());
        bytes.extend(data);
        let ram = self.machine.driver.memory.clone();
        let at = strata_memory::GuestAddress(self.packet);
        strata_memory::Bytes::write_slice(ram.ram(), &bytes, at).unwrap();
        let driver = &mut self.machine.driver;
        driver.offer(TRANSMIT, &[(self.packet, bytes.len() as u32)], &[]);
        self.machine.kick(TRANSMIT);
        let started = Instant::now();
        while self.machine.driver.used(TRANSMIT).is_empty() {
            assert!(started.elapsed() < PATIENCE, "the packet is not taken");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// A program that has connected and been accepted, and its host port.
    fn accepted(&mut self) -> (UnixStream, u32) {
        let mut program = connect(&self.path, "CONNECT 52\n");
        let request = self.next();
        assert_eq!((request.op, request.guest_port), (REQUEST, GUEST_PORT));
        self.send(RESPONSE, request.host_port, 0, &[]);
        let expected = format!("OK {}\n", request.host_port);
        assert_eq!(read(&mut program, expected.len()), expected.as_bytes());
        (program, request.host_port)
    }
}

fn connect(path: &std::path::Path, first: &str) -> UnixStream {
    let mut program = UnixStream::connect(path).unwrap();
    program.set_read_timeout(Some(PATIENCE)).unwrap();
    program.write_all(first.as_bytes()).unwrap();
    program
}

fn read(program: &mut UnixStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    program.read_exact(&mut bytes).unwrap();
    bytes
}

fn rest(program: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    program.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Bytes that are not the same everywhere.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 7 + i / 251) as u8).collect()
}

#[test]
fn bytes_and_ends_go_both_ways() {
    let (mut guest, mut program) = Guest::start(|path| connect(path, "CONNECT 52\nhello"));
    let request = guest.next();
    assert_eq!((request.op, request.guest_port), (REQUEST, GUEST_PORT));
    let port = request.host_port;
    guest.send(RESPONSE, port, 0, &[]);

    // What came behind the line is for the guest, though it came early.
    assert_eq!(guest.read(port, 5), b"hello");
    guest.send(RW, port, 0, b"world");
    let expected = format!("OK {port}\nworld");
    assert_eq!(read(&mut program, expected.len()), expected.as_bytes());

    program.write_all(b"last").unwrap();
    program.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.read(port, 4), b"last");
    assert_eq!(guest.expect(SHUTDOWN, port).flags, Shutdown::SEND.bits());
    guest.send(RW, port, 0, b"words");
    guest.send(SHUTDOWN, port, Shutdown::all().bits(), &[]);

    assert_eq!(rest(&mut program), b"words");
    guest.expect(RST, port);
}

#[test]
fn the_guests_end_leaves_it_the_other_direction() {
    let (mut guest, ()) = Guest::start(|_| ());
    let (mut program, port) = guest.accepted();
    guest.send(RW, port, 0, b"question");
    guest.send(SHUTDOWN, port, Shutdown::SEND.bits(), &[]);
    assert_eq!(rest(&mut program), b"question");

    program.write_all(b"answer").unwrap();
    drop(program);

    assert_eq!(guest.read(port, 6), b"answer");
    let mut ends = Shutdown::empty();
    while ends != Shutdown::all() {
        ends = Shutdown::from_bits_truncate(guest.expect(SHUTDOWN, port).flags);
    }
}

#[test]
fn a_refused_program_is_closed_without_a_word() {
    let (mut guest, ()) = Guest::start(|_| ());
    let mut program = connect(&guest.path, "CONNECT 52\n");
    let port = guest.next().host_port;
    guest.send(RST, port, 0, &[]);
    assert_eq!(rest(&mut program), b"");
}

#[test]
fn whoever_says_something_else_is_closed() {
    let (guest, ()) = Guest::start(|_| ());
    let long = "x".repeat(40);
    for wrong in ["GET / HTTP/1.1\r\n", "CONNECT\n", "\n", &long] {
        let mut program = connect(&guest.path, wrong);
        let mut bytes = Vec::new();
        // What was not read makes it a reset.
        let ended = program.read_to_end(&mut bytes);
        assert!(bytes.is_empty(), "{wrong} {ended:?}");
    }
    // A line may come in pieces.
    let mut program = connect(&guest.path, "CONN");
    program.write_all(b"ECT 52\n").unwrap();
    let mut guest = guest;
    assert_eq!(guest.next().op, REQUEST);
}

#[test]
fn a_program_that_leaves_or_is_reset_ends_in_the_guest() {
    let (mut guest, ()) = Guest::start(|_| ());
    let (program, port) = guest.accepted();
    // It has not read this: its end is a reset.
    guest.send(RW, port, 0, b"unread");
    drop(program);
    let end = guest.next();
    assert!(matches!(end.op, RST | SHUTDOWN), "{end:?}");

    // One that leaves before it is accepted.
    let program = connect(&guest.path, "CONNECT 52\n");
    let port = loop {
        let packet = guest.next();
        if packet.op == REQUEST {
            break packet.host_port;
        }
    };
    drop(program);
    guest.expect(RST, port);
}

#[test]
fn a_program_that_does_not_read_holds_up_nobody_else_and_loses_nothing() {
    let (mut guest, ()) = Guest::start(|_| ());
    let (mut slow, slow_port) = guest.accepted();
    let (mut quick, quick_port) = guest.accepted();
    let part = pattern(60_000);
    // More than its socket takes; as much as the guest has credit for.
    for _ in 0..4 {
        guest.send(RW, slow_port, 0, &part);
    }

    for _ in 0..50 {
        guest.send(RW, quick_port, 0, b"ping");
        assert_eq!(read(&mut quick, 4), b"ping");
        quick.write_all(b"pong").unwrap();
        while guest.next() != data(quick_port, b"pong") {}
    }

    assert_eq!(read(&mut slow, 4 * part.len()), part.repeat(4));
    guest.send(RW, slow_port, 0, &part);
    assert_eq!(read(&mut slow, part.len()), part);
}

fn data(host_port: u32, bytes: &[u8]) -> Packet {
    Packet {
        op: RW,
        host_port,
        guest_port: GUEST_PORT,
        flags: 0,
        data: bytes.to_vec(),
    }
}

#[test]
fn much_data_of_several_programs_arrives_in_order() {
    let (mut guest, ()) = Guest::start(|_| ());
    let programs: Vec<_> = (0..3).map(|_| guest.accepted()).collect();
    let bytes = pattern(1 << 20);
    let ports: Vec<u32> = programs.iter().map(|(_, port)| *port).collect();
    let mut came: std::collections::HashMap<u32, Vec<u8>> =
        ports.iter().map(|port| (*port, Vec::new())).collect();
    thread::scope(|scope| {
        for (program, _) in &programs {
            let mut program = program;
            let bytes = &bytes;
            scope.spawn(move || program.write_all(bytes).unwrap());
        }
        while came.values().any(|came| came.len() < bytes.len()) {
            let packet = guest.next();
            assert_eq!(packet.op, RW);
            came.get_mut(&packet.host_port).unwrap().extend(packet.data);
        }
    });
    for came in came.values() {
        assert!(*came == bytes);
    }
}

#[test]
fn a_reset_of_the_driver_closes_what_it_knew_of() {
    let (mut guest, ()) = Guest::start(|_| ());
    let (mut program, _) = guest.accepted();

    testing::write(&mut guest.machine.device, common::DEVICE_STATUS, &[0]);

    assert_eq!(rest(&mut program), b"");
    let Machine { driver, device, .. } = &mut guest.machine;
    driver.start_function(device, u64::MAX);
    guest.give_buffers();
    guest.accepted();
}

#[test]
fn the_end_of_the_machine_loses_nothing_that_the_guest_sent() {
    let (mut guest, ()) = Guest::start(|_| ());
    let (mut program, port) = guest.accepted();
    let part = pattern(60_000);
    for _ in 0..4 {
        guest.send(RW, port, 0, &part);
    }
    let reader = thread::spawn(move || rest(&mut program));

    guest.machine.devices.shutdown();

    assert!(reader.join().unwrap() == part.repeat(4));
}

#[test]
fn credit_comes_back_as_a_program_reads() {
    let (mut guest, ()) = Guest::start(|_| ());
    let (mut program, port) = guest.accepted();
    let part = pattern(65_536);
    for _ in 0..4 {
        guest.send(RW, port, 0, &part);
    }
    assert_eq!(read(&mut program, 4 * part.len()), part.repeat(4));
    guest.expect(CREDIT_UPDATE, port);
}
