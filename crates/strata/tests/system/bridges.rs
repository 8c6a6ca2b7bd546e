//! Machines on a bridge, in network namespaces of the test's own: see `namespaces`. As root only,
//! and where nft is; elsewhere these tests are skipped.

mod forgeries;

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Output};
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

use crate::disks::image_of;
use crate::guest::{STRATA, feed};
use crate::namespaces::{WAIT, World, ip};
use crate::network::Server;
use crate::programs::compile;

/// A disk for guests with the program `frames`.
struct Tools {
    disk: String,
    _directories: [TempDir; 2],
}

impl Tools {
    /// The frames of `list` are there for [`SEND`].
    fn with(list: &str) -> Self {
        let content = tempfile::tempdir().unwrap();
        compile("frames", &[], &content.path().join("frames"));
        fs::write(content.path().join("list"), list).unwrap();
        let (directory, image) = image_of(content.path());
        Self {
            disk: format!("{},ro", image.to_str().unwrap()),
            _directories: [content, directory],
        }
    }
}

/// A line of shell in a guest that has the tools.
fn with_tools(line: &str) -> String {
    format!("mount -t ext4 -o ro,noload /dev/vda /mnt; {line}")
}

const SEND: &str = "/mnt/frames send </mnt/list";

/// A host with a bridge: the world lies behind `cable`, a network of the host's behind `other`.
struct Host {
    world: World,
    /// Of machines: others may have some of the same names.
    state: TempDir,
}

impl Host {
    fn new(name: &str) -> Option<Self> {
        if Command::new("nft").arg("--version").output().is_err() {
            eprintln!("skipped: no nft");
            return None;
        }
        let world = World::new(name)?;
        let World { here, there } = &world;
        for words in [
            format!("-n {here} route add default via 192.0.2.2"),
            format!("link add other netns {here} type veth peer name other netns {there}"),
            format!("-n {here} address add 198.51.100.1/24 dev other"),
            format!("-n {there} address add 198.51.100.2/24 dev other"),
            format!("-n {here} link set other up"),
            format!("-n {there} link set other up"),
            // Where clouds keep credentials.
            format!("-n {here} address add 169.254.169.254/32 dev other"),
            // A router for IPv6.
            format!("netns exec {here} sysctl -qw net.ipv6.conf.all.forwarding=1"),
            // Somebody who knows of the first bridge's guests.
            format!("-n {there} route add 10.83.0.0/24 via 192.0.2.1"),
            format!("-n {there} -6 route add fd53:7472:6174:6200::/64 via 2001:db8::1"),
        ] {
            assert!(ip(&words), "ip {words}");
        }
        let state = tempfile::tempdir().unwrap();
        Some(Self { world, state })
    }

    /// A command here.
    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", &self.world.here])
            .args(words);
        command
    }

    fn run(&self, options: &[&str]) -> Command {
        let mut command = self.command(&[STRATA, "run", "--accel", "soft", "--timeout", "300s"]);
        command.env("XDG_STATE_HOME", self.state.path());
        command.args(options);
        command
    }

    /// What a line of shell says in a guest.
    fn guest(&self, options: &[&str], line: &str) -> String {
        let mut command = self.run(options);
        command.args(["--", "sh", "-c", line]);
        feed(command, b"").expect(0).text()
    }

    fn text(&self, words: &[&str]) -> String {
        let Output { stdout, .. } = self.command(words).output().unwrap();
        String::from_utf8(stdout).unwrap()
    }

    /// Waits until nothing of a bridge is left here.
    fn is_clean(&self) {
        wait_for_nothing(|| self.left());
    }

    /// Interfaces, rules and sockets of bridges.
    fn left(&self) -> String {
        let here = &self.world.here;
        let links = self.text(&["ip", "-o", "link"]);
        let links = links.lines().filter(|line| line.contains(": st"));
        let mut left: String = links.collect();
        left += &self.text(&["nft", "list", "tables"]);
        let namespace = fs::metadata(format!("/run/netns/{here}")).unwrap().ino();
        let sockets = format!("bridge-{namespace}-");
        for file in fs::read_dir("/run/strata").unwrap() {
            let name = file.unwrap().file_name().into_string().unwrap();
            left += if name.starts_with(&sockets) {
                &name
            } else {
                ""
            };
        }
        left
    }
}

fn wait_for_nothing(left: impl Fn() -> String) {
    for _ in 0..300 {
        if left().is_empty() {
            return;
        }
        thread::sleep(Duration::from_millis(100));
    }
    panic!("left: {}", left());
}

/// What the web server at `address` says, asked from a namespace.
fn fetch(namespace: &str, address: &'static str) -> String {
    let thread = World::inside(namespace, move || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(b"GET /page HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    });
    thread.join().unwrap()
}

/// Asserts that nobody at these addresses takes connections from a namespace.
fn assert_closed(namespace: &str, addresses: &[&'static str]) {
    let try_all = addresses.iter().map(|&address| {
        World::inside(namespace, move || {
            let patience = Duration::from_secs(2);
            let tried = TcpStream::connect_timeout(&address.parse().unwrap(), patience);
            assert!(tried.is_err(), "{address} is open");
        })
    });
    // All at once.
    let threads: Vec<_> = try_all.collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

/// What comes back from the address that a datagram is sent to.
fn echo(namespace: &str, address: &'static str) -> String {
    let thread = World::inside(namespace, move || {
        let own = if address.starts_with('[') {
            "[::]:0"
        } else {
            "0.0.0.0:0"
        };
        let socket = UdpSocket::bind(own).unwrap();
        socket.connect(address).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        socket.send(address.as_bytes()).unwrap();
        let mut answer = [0; 100];
        let length = socket.recv(&mut answer).unwrap();
        String::from_utf8(answer[..length].to_vec()).unwrap()
    });
    thread.join().unwrap()
}

const WEB: &str = "mkdir /www; echo found >/www/page; httpd -p 80 -h /www";
/// Tells in the background that the guest has its IPv6 address.
const TELL_OF_IPV6: &str = "(for i in $(seq 300); do
    ip -6 address show dev eth0 scope global | grep -v tentative | grep -q fd53: && break
    usleep 100000
done; echo six) & true";
const FIRST_GUEST: [&str; 2] = ["10.83.0.2:80", "[fd53:7472:6174:6200:53:74ff:fe72:6102]:80"];
/// What port 81 of the host says to a guest at each of the host's addresses, if anything.
const TRY_HOST: &str = "for to in 10.83.0.1 192.0.2.1 fd53:7472:6174:6200::1 2001:db8::1 \
        fe80::1%eth0 169.254.169.254; do
    nc -w 9 $to 81 </dev/null 2>&1 | grep you
done";
/// The same of others: in the world, and in another network of the host's.
const TRY_OTHERS: &str = "for to in 192.0.2.2 2001:db8::2 198.51.100.2; do
    nc -w 9 $to 80 </dev/null 2>&1 | grep you
done";

impl Host {
    /// Serves all that guests try.
    fn serve(&self) {
        let World { here, there } = &self.world;
        World::serve(there, "[::]:80");
        World::serve(here, "[::]:81");
    }
}

#[test]
fn machines_on_a_bridge_reach_each_other_and_the_world() {
    let Some(host) = Host::new("br") else {
        return;
    };
    host.serve();
    let World { here, there } = &host.world;
    let tools = Tools::with("");
    let options: Vec<&str> = "--network bridge:lab --name web -p 8080:80 -p 192.0.2.1:8081:80 \
         -p [2001:db8::1]:8081:80 -p [::]:8082:80 -p 5007:7/udp -p 192.0.2.1:5008:7/udp \
         -p [2001:db8::1]:5008:7/udp --disk"
        .split_ascii_whitespace()
        .chain([&*tools.disk])
        .collect();
    let line = format!("{WEB}; /mnt/frames echo 7; {TELL_OF_IPV6}");
    let mut web = Server::begin(host.run(&options), &with_tools(&line));

    let line = format!(
        "ip -4 address show dev eth0 | grep -o '10[0-9.]*/24'
         wget -q -O - http://web/page; wget -q -O - http://web.internal/page
         {WAIT}; {TRY_OTHERS}; {TRY_HOST}
         udhcpc -i eth0 -q -n -f -s /bin/true 2>&1 | grep -o 'lease of [0-9.]*'
         echo done"
    );
    let said = host.guest(&["--network", "bridge:lab", "--name", "client"], &line);
    assert_eq!(
        said,
        "10.83.0.3/24\nfound\nfound\nyou are 192.0.2.1\nyou are 2001:db8::1\n\
         lease of 10.83.0.3\ndone\n"
    );

    assert_eq!(web.line(), "six");
    for (from, place) in [
        (here, "127.0.0.1:8080"),
        (there, "192.0.2.1:8081"),
        (there, "[2001:db8::1]:8081"),
        (here, "[2001:db8::1]:8082"),
        (there, "[2001:db8::1]:8082"),
    ] {
        assert!(fetch(from, place).ends_with("found\n"), "{place}");
    }
    for (from, place) in [
        (here, "127.0.0.1:5007"),
        (there, "192.0.2.1:5008"),
        (there, "[2001:db8::1]:5008"),
    ] {
        assert_eq!(echo(from, place), place);
    }
    // Forwards are where they were asked for, and others know no other way to the guest.
    assert_closed(there, &["192.0.2.1:8080", "192.0.2.1:8082"]);
    assert_closed(there, &FIRST_GUEST);
    web.end();
    host.is_clean();
}

#[test]
fn a_machine_reaches_the_host_and_its_networks_if_it_may() {
    let Some(host) = Host::new("host") else {
        return;
    };
    host.serve();
    let here = &host.world.here;
    let heard = World::inside(here, || UdpSocket::bind("0.0.0.0:83").unwrap());
    let heard = heard.join().unwrap();
    let tools = Tools::with(&forgeries::to_the_host());
    let said = host.guest(
        &["--network", "bridge:lab,host", "--disk", &tools.disk],
        &with_tools(&format!(
            "{WAIT}; {TRY_OTHERS}; {TRY_HOST}; {SEND}; echo done"
        )),
    );
    // The host sees guests as they are, its networks see the host; nobody 169.254.169.254.
    let lines: Vec<&str> = said.lines().collect();
    let own = "you are fd53:7472:6174:6200:53:74ff:fe72:6102";
    assert_eq!(
        lines,
        [
            "you are 192.0.2.1",
            "you are 2001:db8::1",
            "you are 198.51.100.1",
            "you are 10.83.0.2",
            "you are 10.83.0.2",
            own,
            own,
            "you are fe80::53:74ff:fe72:6102",
            "done"
        ]
    );
    heard
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    let mut datagram = [0; 100];
    let length = heard.recv(&mut datagram).unwrap();
    assert_eq!(&datagram[..length], b"gateway");
    host.is_clean();
}

#[test]
fn isolated_machines_reach_each_other_alone() {
    let Some(host) = Host::new("isolated") else {
        return;
    };
    host.serve();
    let World { here, there } = &host.world;
    let options = [
        "--network",
        "bridge:lab,isolated",
        "--name",
        "web",
        "-p",
        "8080:80",
    ];
    let line = format!("{WEB}; {TELL_OF_IPV6}");
    let mut web = Server::begin(host.run(&options), &line);
    let line = format!(
        "{WAIT}; wget -q -O - http://web/page
         nc -w 9 fd53:7472:6174:6200:53:74ff:fe72:6102 80 </dev/null && echo six
         {TRY_OTHERS}; {TRY_HOST}; echo done"
    );
    let said = host.guest(&["--network", "bridge:lab,isolated"], &line);
    assert_eq!(said, "found\nsix\ndone\n");
    assert_eq!(web.line(), "six");
    assert!(fetch(here, "127.0.0.1:8080").ends_with("found\n"));
    assert_closed(there, &FIRST_GUEST);
    web.end();
    host.is_clean();
}

#[test]
fn what_killed_machines_leave_is_removed() {
    let Some(host) = Host::new("kill") else {
        return;
    };
    let mut first = Server::begin(host.run(&["--network", "bridge:a"]), "true");
    first.child.kill().unwrap();
    first.child.wait().unwrap();
    drop(first);
    host.is_clean();

    // With its warden gone too, whoever comes next does it.
    let mut second = Server::begin(
        host.run(&["--network", "bridge:b", "-p", "8080:80"]),
        "true",
    );
    assert!(
        host.text(&["nft", "list", "tables"])
            .contains("inet st-b.2")
    );
    for process in wardens(&host.world.here) {
        rustix::process::kill_process(process, rustix::process::Signal::KILL).unwrap();
    }
    second.child.kill().unwrap();
    second.child.wait().unwrap();
    drop(second);
    // Its name server has nobody to serve.
    wait_for_nothing(|| processes(&host.world.here));
    assert!(
        host.text(&["nft", "list", "tables"])
            .contains("inet st-b.2")
    );
    let said = host.guest(
        &["--network", "bridge:c"],
        "ip address show dev eth0 | grep -o 10.83.0.2/",
    );
    assert_eq!(said, "10.83.0.2/\n");
    host.is_clean();
}

#[test]
fn a_guest_is_answered_by_new_name_servers() {
    let Some(host) = Host::new("names") else {
        return;
    };
    let World { here, there } = &host.world;
    assert!(ip(&format!(
        "-n {there} address add 192.0.2.3/24 dev cable"
    )));
    // What `ip netns exec` shows as a file of /etc.
    let etc = Path::new("/etc/netns").join(here);
    fs::create_dir_all(&etc).unwrap();
    let file = etc.join("resolv.conf");
    fs::write(&file, "nameserver 192.0.2.3\n").unwrap();
    let asked = |address: &'static str| {
        let (ready, wait) = std::sync::mpsc::channel();
        let thread = World::inside(there, move || {
            let server = UdpSocket::bind((address, 53)).unwrap();
            ready.send(()).unwrap();
            let mut question = [0; 512];
            let (length, from) = server.recv_from(&mut question).unwrap();
            (server, question[..length].to_vec(), from)
        });
        wait.recv().unwrap();
        thread
    };
    let (first, second) = (asked("192.0.2.3"), asked("192.0.2.2"));
    thread::spawn(move || {
        // Whoever was asked first does not answer, and is a name server no more.
        let _silent = first.join().unwrap();
        fs::write(&file, "nameserver 192.0.2.2\n").unwrap();
        let (server, mut answer, from) = second.join().unwrap();
        // A response: there is no such name.
        answer[2] |= 0x80;
        answer[3] = 3;
        server.send_to(&answer, from).unwrap();
    });
    let said = host.guest(
        &["--network", "user"],
        "for i in $(seq 30); do
             nslookup -type=a example.org 2>&1 | grep -o NXDOMAIN && exit
         done",
    );
    let _ = fs::remove_dir_all(etc);
    assert_eq!(said, "NXDOMAIN\n");
}

/// The numbers of all processes in a namespace.
fn processes(namespace: &str) -> String {
    let mut command = Command::new("ip");
    let output = command.args(["netns", "pids", namespace]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// The wardens in a namespace.
fn wardens(namespace: &str) -> Vec<rustix::process::Pid> {
    let listed = processes(namespace);
    let is_warden = |number: &&str| {
        let line = fs::read(format!("/proc/{number}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains("network-warden")
    };
    let numbers = listed.split_ascii_whitespace().filter(is_warden);
    let found: Vec<_> = numbers
        .filter_map(|number| rustix::process::Pid::from_raw(number.parse().ok()?))
        .collect();
    assert!(!found.is_empty());
    found
}

#[test]
fn without_privileges_a_bridge_is_refused_with_advice() {
    // Root without privileges, or whoever runs the test.
    let mut command = Command::new("setpriv");
    command.args(["--inh-caps", "-all"]);
    if rustix::process::geteuid().is_root() {
        command.args(["--bounding-set", "-all"]);
    }
    command.args([STRATA, "run", "--network", "bridge:lab", "--", "true"]);
    let ended = feed(command, b"").expect(125);
    assert!(ended.stderr.contains("needs root"), "{}", ended.stderr);
    assert!(ended.stderr.contains("--network user"), "{}", ended.stderr);
}
