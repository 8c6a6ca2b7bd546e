//! Programs of the host reach ports of the guest through a Unix socket. The guest's side is
//! `programs/vsock.c`.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::disks::image_of;
use crate::guest::{Slot, feed, run};
use crate::programs::compile;

/// Ports of the guest's program.
const ECHO: u32 = 1000;
const SUM: u32 = 1001;
const SOURCE: u32 = 1002;
/// One on which nobody listens.
const DEAD: u32 = 2000;
/// No answer takes this long.
const PATIENCE: Duration = Duration::from_mins(2);

/// A guest that runs the program, until its input ends.
struct Server {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    socket: PathBuf,
    _directories: (TempDir, TempDir),
    _slot: Slot,
}

impl Server {
    /// Starts it; its socket is called `name`.
    fn start(name: &str) -> Self {
        let slot = Slot::take();
        let directory = tempfile::tempdir().unwrap();
        let content = directory.path().join("content");
        fs::create_dir(&content).unwrap();
        compile("vsock", &[], &content.join("vsock"));
        let (image_directory, image) = image_of(&content);
        let socket = directory.path().join(name);
        fs::create_dir_all(socket.parent().unwrap()).unwrap();
        let disk = format!("{},ro", image.to_str().unwrap());
        let script = "mount -t ext4 -o ro,noload /dev/vda /mnt; /mnt/vsock & cat";
        let mut child = run(&["--disk", &disk, "--vsock", socket.to_str().unwrap()])
            .args(["--", "sh", "-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self {
            child,
            input,
            output,
            socket,
            _directories: (directory, image_directory),
            _slot: slot,
        }
    }

    /// Waits until the program listens.
    fn ready(mut self) -> Self {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        self
    }

    /// A connection that is asked for.
    fn ask(&self, port: u32) -> UnixStream {
        ask(&self.socket, port)
    }

    /// A connection that was accepted.
    fn connect(&self, port: u32) -> UnixStream {
        let mut stream = self.ask(port);
        let line = line(&mut stream);
        let number = line.strip_prefix("OK ").map(str::trim_end);
        assert!(number.is_some_and(|n| n.parse::<u32>().is_ok()), "{line}");
        stream
    }

    /// Ends the guest.
    fn end(mut self) {
        self.input = None;
        assert!(self.child.wait().unwrap().success());
    }
}

fn ask(socket: &Path, port: u32) -> UnixStream {
    let mut stream = through(socket, |path| UnixStream::connect(path).unwrap());
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    writeln!(stream, "CONNECT {port}").unwrap();
    stream
}

/// Uses a path that is too long for an address by way of its directory.
fn through<T>(path: &Path, use_path: impl FnOnce(&Path) -> T) -> T {
    use std::os::fd::AsRawFd;
    let directory = fs::File::open(path.parent().unwrap()).unwrap();
    let short = format!("/proc/self/fd/{}", directory.as_raw_fd());
    use_path(&Path::new(&short).join(path.file_name().unwrap()))
}

fn line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.last() != Some(&b'\n') && stream.read(&mut byte).unwrap() == 1 {
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

fn rest(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 7 + i / 251) as u8).collect()
}

fn sum(bytes: &[u8]) -> u64 {
    let add = |sum: u64, byte: &u8| sum.wrapping_mul(31).wrapping_add((*byte).into());
    bytes.iter().fold(0, add)
}

#[test]
fn bytes_and_ends_go_through_a_socket_unchanged() {
    let server = Server::start("vsock").ready();
    let bytes = pattern(32 << 20);

    // Down, and its end, behind which the answer comes.
    let mut stream = server.connect(SUM);
    stream.write_all(&bytes).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let expected = format!("{} {}\n", bytes.len(), sum(&bytes));
    assert_eq!(String::from_utf8(rest(&mut stream)).unwrap(), expected);

    // Up, to the end.
    let mut stream = server.connect(SOURCE);
    writeln!(stream, "{}", bytes.len()).unwrap();
    assert!(rest(&mut stream) == bytes);

    // Both at the same time.
    let mut stream = server.connect(ECHO);
    let mut writer = stream.try_clone().unwrap();
    let came = thread::scope(|scope| {
        scope.spawn(|| {
            writer.write_all(&bytes).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        rest(&mut stream)
    });
    assert!(came == bytes);

    // Nobody is there; others are afterwards as before.
    assert_eq!(rest(&mut server.ask(DEAD)), b"");
    for turn in 0..300 {
        let mut stream = server.connect(ECHO);
        let said = format!("turn {turn}");
        stream.write_all(said.as_bytes()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(rest(&mut stream), said.as_bytes());
    }

    // Many at once, one of which nobody reads.
    let mut unread = server.connect(SOURCE);
    unread.write_all(b"10000000\n").unwrap();
    let mut streams: Vec<_> = (0..50).map(|_| server.connect(ECHO)).collect();
    for (number, stream) in streams.iter_mut().enumerate() {
        writeln!(stream, "stream {number}").unwrap();
    }
    for (number, stream) in streams.iter_mut().enumerate() {
        assert_eq!(line(stream), format!("stream {number}\n"));
    }
    drop(streams);
    assert!(rest(&mut unread) == pattern(10_000_000));
    server.end();
}

#[test]
fn early_programs_wait_for_the_guest_and_long_names_are_names() {
    let name = format!("{}/vsock", "long".repeat(40));
    let server = Server::start(&name);
    let started = Instant::now();
    while through(&server.socket, |path| UnixStream::connect(path).is_err()) {
        assert!(started.elapsed() < PATIENCE, "nobody listens");
        thread::sleep(Duration::from_millis(1));
    }
    // The guest boots; when its driver is up, nobody listens on that port.
    let mut early = server.ask(DEAD);
    assert_eq!(rest(&mut early), b"");

    let server = server.ready();
    let mut stream = server.connect(ECHO);
    stream.write_all(b"hello\n").unwrap();
    assert_eq!(line(&mut stream), "hello\n");
    server.end();
}

#[test]
fn a_socket_that_answers_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vsock");
    let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let mut command = run(&["--vsock", path.to_str().unwrap()]);
    command.args(["--", "true"]);
    let ended = feed(command, b"").expect(125);
    assert!(ended.stderr.contains("another program"), "{}", ended.stderr);
    UnixStream::connect(&path).unwrap();
}

#[test]
fn a_machine_that_cannot_be_known_runs_without_a_socket() {
    // no directory can be made there
    let mut command = run(&[] as &[&str]);
    command.env("XDG_STATE_HOME", "/dev/null");
    command.args(["--", "sh", "-c", "cat /sys/bus/pci/devices/*/device"]);
    let ended = feed(command, b"").expect(0);
    assert!(!ended.text().contains("0x1053"), "{}", ended.text());
}
