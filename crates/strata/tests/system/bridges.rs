//! Machines on a bridge, in network namespaces of the test's own: see `namespaces`. As root only,
//! and where nft is; elsewhere these tests are skipped.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Command, Output};
use std::thread;
use std::time::Duration;

use crate::guest::{STRATA, feed};
use crate::namespaces::{World, ip};
use crate::network::Server;

/// A host with a bridge: the world lies behind `cable`, a network of the host's behind `other`.
struct Host {
    world: World,
}

impl Host {
    fn new(name: &str) -> Option<Self> {
        if Command::new("nft").arg("--version").output().is_err() {
            eprintln!("skipped: no nft");
            return None;
        }
        let world = World::new(name)?;
        let here = &world.here;
        for words in [
            format!("-n {here} route add default via 192.0.2.2"),
            format!(
                "link add other netns {here} type veth peer name other netns {}",
                world.there
            ),
            format!("-n {here} address add 198.51.100.1/24 dev other"),
            format!("-n {} address add 198.51.100.2/24 dev other", world.there),
            format!("-n {here} link set other up"),
            format!("-n {} link set other up", world.there),
        ] {
            assert!(ip(&words), "ip {words}");
        }
        Some(Self { world })
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
        for _ in 0..300 {
            let links = self.text(&["ip", "-o", "link"]);
            let tables = self.text(&["nft", "list", "tables"]);
            if !links.contains(": st-") && !links.contains(": strata-") && tables.is_empty() {
                return;
            }
            thread::sleep(Duration::from_millis(100));
        }
        panic!(
            "left: {}{}",
            self.text(&["ip", "-o", "link"]),
            self.text(&["nft", "list", "tables"])
        );
    }
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

const WEB: &str = "mkdir /www; echo found >/www/page; httpd -p 80 -h /www";

#[test]
fn machines_on_a_bridge_reach_each_other_and_the_world() {
    let Some(host) = Host::new("br") else {
        return;
    };
    let World { here, there } = &host.world;
    for place in ["192.0.2.2:80", "198.51.100.2:80", "[2001:db8::2]:80"] {
        World::serve(there, place);
    }
    World::serve(here, "192.0.2.1:81");
    let forwards = ["-p", "8080:80", "-p", "192.0.2.1:8081:80"];
    let options = [&["--network", "bridge:lab", "--name", "web"][..], &forwards].concat();
    let web = Server::begin(host.run(&options), WEB);

    assert!(fetch(here, "127.0.0.1:8080").ends_with("found\n"));
    assert!(fetch(there, "192.0.2.1:8081").ends_with("found\n"));

    // 169.254.169.254 and a second network of the host's, and the host itself, are out of reach.
    let said = host.guest(
        &["--network", "bridge:lab", "--name", "client"],
        "ip -4 address show dev eth0 | grep -o '10[0-9.]*/24'
         wget -q -O - http://web/page; wget -q -O - http://web.internal/page
         nc -w 9 192.0.2.2 80 </dev/null
         for to in '198.51.100.2 80' '169.254.169.254 80' '192.0.2.1 81' '10.83.0.1 81'; do
             nc -w 9 $to </dev/null 2>&1 | grep you
         done
         udhcpc -i eth0 -q -n -f -s /bin/true 2>&1 | grep -o 'lease of [0-9.]*'
         echo done",
    );
    assert_eq!(
        said,
        "10.83.0.3/24\nfound\nfound\nyou are 192.0.2.1\nlease of 10.83.0.3\ndone\n"
    );
    web.end();
    host.is_clean();
}

#[test]
fn nobody_on_a_bridge_speaks_for_another() {
    let Some(host) = Host::new("spoof") else {
        return;
    };
    let other = Server::begin(host.run(&["--network", "bridge:lab"]), "true");
    // Each try is one of its own that is known to work with the guest's own addresses.
    let said = host.guest(
        &["--network", "bridge:lab"],
        "reach() { ping -c 1 -W 2 $1 10.83.0.2 >/dev/null && echo $2; }
         reach '' own
         ip address add 10.83.0.77/24 dev eth0
         reach '-I 10.83.0.77' address; ip address del 10.83.0.77/24 dev eth0
         reach '' again
         ip link set eth0 down; ip link set eth0 address 02:53:74:72:61:63; ip link set eth0 up
         reach '' ethernet
         ip link set eth0 down; ip link set eth0 address 02:53:74:72:61:03; ip link set eth0 up
         sleep 1; reach '' 'own again'
         echo done",
    );
    assert_eq!(said, "own\nagain\nown again\ndone\n");
    other.end();
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

/// The wardens in a namespace.
fn wardens(namespace: &str) -> Vec<rustix::process::Pid> {
    let listed = Command::new("ip")
        .args(["netns", "pids", namespace])
        .output()
        .unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
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
