//! Networks: what a guest reaches, what reaches it, and its neighbours. The host's side is this
//! test process, on its loopback.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use crate::guest::{Slot, guest_with, run};

/// Connections through a forward, unless the long checks ask for more.
const CONNECTIONS: u32 = 200;
/// Clients that make them at the same time.
const CLIENTS: u32 = 8;

/// A guest that runs a line of shell, and then waits for its input to end.
pub(crate) struct Server {
    pub(crate) child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    _slot: Slot,
}

impl Server {
    fn start(options: &[&str], line: &str) -> Self {
        Self::begin(run(options), line)
    }

    /// The same by a `strata run` of the caller's.
    pub(crate) fn begin(mut run: Command, line: &str) -> Self {
        let slot = Slot::take();
        let script = format!("{line}; echo ready; cat");
        let mut child = run
            .args(["--", "sh", "-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut server = Self {
            child,
            input,
            output,
            _slot: slot,
        };
        while server.line() != "ready" {}
        server
    }

    /// The next line that the guest says.
    pub(crate) fn line(&mut self) -> String {
        let mut said = String::new();
        let length = self.output.read_line(&mut said).unwrap();
        assert_ne!(length, 0, "the guest has ended");
        said.trim_end().to_owned()
    }

    /// Ends the guest; gives what it still said.
    pub(crate) fn end(mut self) -> String {
        self.input = None;
        let mut rest = String::new();
        self.output.read_to_string(&mut rest).unwrap();
        assert!(self.child.wait().unwrap().success());
        rest
    }
}

/// A port of the loopback that nobody uses just now.
fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    listener.local_addr().unwrap().port()
}

/// Serves one connection on the loopback; gives its port.
fn serve(work: impl FnOnce(TcpStream) + Send + 'static) -> (u16, thread::JoinHandle<()>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let thread = thread::spawn(move || work(listener.accept().unwrap().0));
    (port, thread)
}

/// Asks the web server behind a forward for a page.
fn fetch(port: u16, page: &str) -> String {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    write!(stream, "GET /{page} HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn a_guest_has_no_network_unless_it_is_asked_for() {
    let ended = guest_with(&[] as &[&str], &["ls", "/sys/class/net"], b"").expect(0);
    assert_eq!(ended.text(), "lo\n");
}

#[test]
fn what_goes_through_the_network_arrives_unchanged_both_ways() {
    let (port, server) = serve(|mut stream| {
        let mut data = Vec::new();
        stream.read_to_end(&mut data).unwrap();
        assert_eq!(data.len(), 5 << 20);
        stream.write_all(&data).unwrap();
    });
    let script = format!(
        "dd if=/dev/urandom of=/tmp/sent bs=64k count=80 2>/dev/null
         nc 10.0.2.1 {port} </tmp/sent >/tmp/received && cmp /tmp/sent /tmp/received && echo same"
    );
    let ended = guest_with(&["--network", "user,host"], &["sh", "-c", &script], b"").expect(0);
    assert_eq!(ended.text(), "same\n");
    server.join().unwrap();
}

#[test]
fn a_guest_does_not_reach_this_host_unless_it_may() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let script = format!(
        "for to in 10.0.2.1 127.0.0.1 169.254.169.254; do
             nc -w 3 $to {port} </dev/null && echo reached $to
         done; echo done"
    );
    let ended = guest_with(&["--network", "user"], &["sh", "-c", &script], b"").expect(0);
    assert_eq!(ended.text(), "done\n");
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err());
}

#[test]
fn dhcp_and_router_advertisements_say_what_the_guest_was_told() {
    let script = "udhcpc -i eth0 -q -n -f -s /bin/true 2>&1 | grep -o 'lease of [0-9.]*'
         for i in $(seq 50); do
             ip -6 address show dev eth0 | grep -q fd53: && break
             usleep 100000
         done
         ip -6 address show dev eth0 | grep -o 'fd53:[0-9a-f:]*'";
    let ended = guest_with(&["--network", "user"], &["sh", "-c", script], b"").expect(0);
    let expected = "lease of 10.0.2.2\nfd53:7472:6174:6100:53:74ff:fe72:6102\n";
    assert_eq!(ended.text(), expected);
}

#[test]
fn short_connections_through_a_forward_all_arrive() {
    let asked = std::env::var("STRATA_TEST_CONNECTIONS").ok();
    let connections = asked.map_or(CONNECTIONS, |text| text.parse().unwrap());
    let port = free_port();
    let server = Server::start(
        &["-p", &format!("{port}:80")],
        "mkdir /www; echo hello >/www/page; httpd -p 80 -h /www",
    );
    let left = AtomicU32::new(connections);
    thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                let one_less = |left: u32| left.checked_sub(1);
                while left
                    .fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less)
                    .is_ok()
                {
                    let answer = fetch(port, "page");
                    assert!(answer.ends_with("\r\n\r\nhello\n"), "{answer:?}");
                }
            });
        }
    });
    server.end();
}

#[test]
fn datagrams_go_to_the_host_and_back() {
    // TFTP (RFC 1350) in a nutshell: a request, a short block of data, its acknowledgement.
    let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = server.local_addr().unwrap().port();
    let thread = thread::spawn(move || {
        let mut buffer = [0; 600];
        let (length, client) = server.recv_from(&mut buffer).unwrap();
        assert!(buffer[..length].starts_with(b"\0\x01page\0octet\0"));
        server.send_to(b"\0\x03\0\x01hello\n", client).unwrap();
        let (length, _) = server.recv_from(&mut buffer).unwrap();
        assert_eq!(buffer[..length], [0, 4, 0, 1]);
    });
    let script = format!("tftp -g -r page -l /tmp/page 10.0.2.1 {port}; cat /tmp/page");
    let ended = guest_with(&["--network", "user,host"], &["sh", "-c", &script], b"").expect(0);
    assert_eq!(ended.text(), "hello\n");
    thread.join().unwrap();
}

#[test]
fn packets_in_fragments_are_answered() {
    let script = "ping -c 1 -s 4000 10.0.2.1 >/dev/null && echo four
         for i in $(seq 50); do
             ip -6 address show dev eth0 scope global | grep -v tentative | grep -q fd53: && break
             usleep 100000
         done
         ping6 -c 1 -s 9000 fd53:7472:6174:6100::1 >/dev/null && echo six";
    let ended = guest_with(&["--network", "user"], &["sh", "-c", script], b"").expect(0);
    assert_eq!(ended.text(), "four\nsix\n");
}

#[test]
fn machines_on_one_network_find_each_other_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let on = |name: &'static str| {
        let mut command = run(&["--network", "lab", "--name", name]);
        command.env("XDG_RUNTIME_DIR", directory.path());
        command
    };
    let slot = Slot::take();
    let script =
        "hostname; mkdir /www; echo found >/www/page; httpd -p 80 -h /www; echo ready; cat";
    let mut first = on("web")
        .args(["--", "sh", "-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(first.stdout.take().unwrap());
    let mut said = String::new();
    while !said.ends_with("ready\n") {
        assert_ne!(
            output.read_line(&mut said).unwrap(),
            0,
            "the guest has ended"
        );
    }
    assert_eq!(said, "web\nready\n");

    let script = "wget -q -O - http://web/page; wget -q -O - http://web.internal/page
         ip -4 address show dev eth0 | grep -o '10[0-9.]*/24'";
    let second = on("client")
        .args(["--", "sh", "-c", script])
        .output()
        .unwrap();
    assert_eq!(
        String::from_utf8_lossy(&second.stdout),
        "found\nfound\n10.0.2.3/24\n"
    );

    drop(first.stdin.take());
    assert!(first.wait().unwrap().success());
    drop(slot);
}

#[test]
fn a_port_in_use_is_named() {
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let ended = guest_with(&["-p", &format!("{port}:80")], &["true"], b"").expect(125);
    assert!(
        ended.stderr.contains(&format!("127.0.0.1:{port}")),
        "{}",
        ended.stderr
    );
}
