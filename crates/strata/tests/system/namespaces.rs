//! The world beyond this host, as two network namespaces and a cable between them: the machine's
//! host in one, somebody else in the other. As root only; others skip these tests.

use std::fs::File;
use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::process::Command;
use std::thread;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::guest::{STRATA, feed};

/// Two namespaces, gone when dropped.
pub(crate) struct World {
    pub(crate) here: String,
    pub(crate) there: String,
}

pub(crate) fn ip(words: &str) -> bool {
    let mut command = Command::new("ip");
    command.args(words.split(' '));
    command.status().is_ok_and(|status| status.success())
}

impl World {
    /// `None`, and word of it, where this process may not make one.
    pub(crate) fn new(name: &str) -> Option<Self> {
        let id = format!("strata-{name}-{}", std::process::id());
        let world = Self {
            here: format!("{id}-a"),
            there: format!("{id}-b"),
        };
        let Self { here, there } = &world;
        if !rustix::process::geteuid().is_root() || !ip(&format!("netns add {here}")) {
            eprintln!("skipped: no network namespaces for this process");
            return None;
        }
        let made = [
            format!("netns add {there}"),
            format!("link add cable netns {here} type veth peer name cable netns {there}"),
            format!("-n {here} address add 192.0.2.1/24 dev cable"),
            format!("-n {there} address add 192.0.2.2/24 dev cable"),
            format!("-n {here} address add 2001:db8::1/64 dev cable nodad"),
            format!("-n {there} address add 2001:db8::2/64 dev cable nodad"),
            format!("-n {here} link set lo up"),
            format!("-n {here} link set cable up"),
            format!("-n {there} link set cable up"),
            // The internet is there.
            format!("-n {here} -6 route add default via 2001:db8::2"),
            format!("netns exec {here} sysctl -qw net.ipv4.ping_group_range=0\t2147483647"),
        ];
        for words in made {
            assert!(ip(&words), "ip {words}");
        }
        Some(world)
    }

    /// Tells every client that comes to `address` who it is, in this namespace.
    pub(crate) fn serve(namespace: &str, address: &str) {
        let address: SocketAddr = address.parse().unwrap();
        let (ready, wait) = std::sync::mpsc::channel();
        Self::inside(namespace, move || {
            let listener = TcpListener::bind(address).unwrap();
            ready.send(()).unwrap();
            while let Ok((mut client, from)) = listener.accept() {
                let _ = writeln!(client, "you are {}", from.ip().to_canonical());
            }
        });
        wait.recv().unwrap();
    }

    /// Lets a thread work in a namespace.
    pub(crate) fn inside<T: Send + 'static>(
        namespace: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> thread::JoinHandle<T> {
        let file = File::open(format!("/run/netns/{namespace}")).unwrap();
        thread::spawn(move || {
            let network = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(file.as_fd(), network).unwrap();
            work()
        })
    }

    /// Runs a line of shell in a guest whose host is here.
    fn guest(&self, line: &str) -> String {
        let mut command = Command::new("ip");
        command
            .args([
                "netns", "exec", &self.here, STRATA, "run", "--accel", "soft",
            ])
            .args([
                "--timeout",
                "120s",
                "--network",
                "user",
                "--",
                "sh",
                "-c",
                line,
            ]);
        feed(command, b"").expect(0).text()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        ip(&format!("netns del {}", self.there));
        ip(&format!("netns del {}", self.here));
    }
}

/// Waits until the guest has made its IPv6 address.
pub(crate) const WAIT: &str = "for i in $(seq 50); do
    ip -6 address show dev eth0 scope global | grep -v tentative | grep -q fd53: && break
    usleep 100000
done";

#[test]
fn others_see_this_host_where_a_guest_connects() {
    let Some(world) = World::new("nat") else {
        return;
    };
    World::serve(&world.there, "192.0.2.2:80");
    World::serve(&world.there, "[2001:db8::2]:80");
    let said = world.guest(&format!(
        "{WAIT}; nc 192.0.2.2 80 </dev/null; nc 2001:db8::2 80 </dev/null"
    ));
    assert_eq!(said, "you are 192.0.2.1\nyou are 2001:db8::1\n");
}

#[test]
fn others_answer_a_guests_ping() {
    let Some(world) = World::new("ping") else {
        return;
    };
    let said = world.guest(&format!(
        "{WAIT}; ping -c 1 192.0.2.2 >/dev/null && echo one
         ping6 -c 1 2001:db8::2 >/dev/null && echo two"
    ));
    assert_eq!(said, "one\ntwo\n");
}

#[test]
fn the_hosts_own_addresses_and_those_of_nobody_are_out_of_reach() {
    let Some(world) = World::new("own") else {
        return;
    };
    World::serve(&world.here, "192.0.2.1:80");
    World::serve(&world.here, "[2001:db8::1]:80");
    let said = world.guest(&format!(
        "{WAIT}; for to in 192.0.2.1 2001:db8::1 192.0.2.77; do
             nc -w 9 $to 80 </dev/null 2>&1 | grep -o 'connect'
         done; ping -c 1 -W 1 192.0.2.1 >/dev/null || echo silent"
    ));
    assert_eq!(said, "connect\nconnect\nconnect\nsilent\n");
}
