//! Frames that a guest may not send, none of which may reach its neighbour's card. Each carries
//! a mark that the neighbour says it has seen; honest frames go before and after, and must arrive.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::Command;

use strata_net::{GATEWAY_LINK, GATEWAY_MAC, MacAddress, PREFIX};

use super::{Host, SEND, Tools, with_tools};
use crate::guest::{feed, run};
use crate::network::Server;

const ARP: u16 = 0x0806;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const VLAN: u16 = 0x8100;
const HOP_BY_HOP: u8 = 0;
const UDP: u8 = 17;
const FRAGMENT: u8 = 44;
const ICMPV6: u8 = 58;
const DESTINATION: u8 = 60;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: MacAddress = MacAddress([0x33, 0x33, 0, 0, 0, 1]);

/// Who has which addresses.
#[derive(Clone, Copy)]
struct Party {
    mac: MacAddress,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
    link: Ipv6Addr,
}

/// A network: its IPv4 addresses up to the last byte, its IPv6 prefix.
struct Network([u8; 3], Ipv6Addr);

impl Network {
    /// That of a host's first bridge.
    fn of_bridge() -> Self {
        Self(
            [10, 83, 0],
            Ipv6Addr::new(0xfd53, 0x7472, 0x6174, 0x6200, 0, 0, 0, 0),
        )
    }

    fn guest(&self, number: u8) -> Party {
        let Self([a, b, c], prefix) = *self;
        let mac = MacAddress([2, b'S', b't', b'r', b'a', number]);
        Party {
            mac,
            v4: Ipv4Addr::new(a, b, c, number),
            v6: mac.address_in(prefix),
            link: mac.address_in(GATEWAY_LINK),
        }
    }

    fn gateway(&self) -> Party {
        let Self([a, b, c], prefix) = *self;
        Party {
            mac: GATEWAY_MAC,
            v4: Ipv4Addr::new(a, b, c, 1),
            v6: (prefix.to_bits() | 1).into(),
            link: GATEWAY_LINK,
        }
    }
}

fn ethernet(from: MacAddress, to: MacAddress, kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to.0[..], &from.0, &kind.to_be_bytes(), payload].concat()
}

/// The same frame with a VLAN tag of number 0: of none, for who gets it (IEEE 802.1Q §6.9).
fn tagged(frame: &[u8]) -> Vec<u8> {
    let (addresses, rest) = frame.split_at(12);
    [addresses, &VLAN.to_be_bytes(), &[0, 0], rest].concat()
}

/// What `from` says in ARP: a reply, or a request (RFC 826).
fn arp(operation: u8, from: (MacAddress, Ipv4Addr), about: Ipv4Addr, mark: &[u8]) -> Vec<u8> {
    let start = [0, 1, 8, 0, 6, 4, 0, operation];
    let (mac, v4) = from;
    let addresses = [&mac.0[..], &v4.octets(), &[0; 6], &about.octets()].concat();
    [&start[..], &addresses, mark].concat()
}

fn ipv4(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let [high, low] = (20 + payload.len() as u16).to_be_bytes();
    let mut header = [0x45, 0, high, low, 0, 0, 0, 0, 64, protocol, 0, 0].to_vec();
    header.extend([from.octets(), to.octets()].concat());
    let sum: u32 = header
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    header[10..12].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    [&header, payload].concat()
}

fn ipv6(from: Ipv6Addr, to: Ipv6Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let [high, low] = (payload.len() as u16).to_be_bytes();
    let start = [0x60, 0, 0, 0, high, low, protocol, 255];
    [&start[..], &from.octets(), &to.octets(), payload].concat()
}

/// A datagram without a checksum.
fn udp(ports: [u16; 2], payload: &[u8]) -> Vec<u8> {
    let [from, to] = ports.map(u16::to_be_bytes);
    let length = (8 + payload.len() as u16).to_be_bytes();
    [&from[..], &to, &length, &[0, 0], payload].concat()
}

/// A message of neighbour discovery about `target` (RFC 4861 §4).
fn discovery(kind: u8, target: Ipv6Addr, mark: &[u8]) -> Vec<u8> {
    [&[kind, 0, 0, 0, 0x20, 0, 0, 0][..], &target.octets(), mark].concat()
}

/// Frames that are the guest's to send.
fn honest(own: Party, other: Party) -> Vec<(&'static str, Vec<u8>)> {
    let nobody = Ipv6Addr::UNSPECIFIED;
    let six = |from, kind: &str| {
        let body = udp([9, 9], &mark(kind));
        ethernet(own.mac, other.mac, IPV6, &ipv6(from, other.v6, UDP, &body))
    };
    let four = udp([9, 9], &mark("own IPv4"));
    let part = |units, name: &str| {
        let body = fragment_at(units, UDP, &udp([9, 9], &mark(name)));
        ethernet(
            own.mac,
            other.mac,
            IPV6,
            &ipv6(own.v6, other.v6, FRAGMENT, &body),
        )
    };
    let about = |from, kind, name: &str| {
        let body = discovery(kind, own.v6, &mark(name));
        let packet = ipv6(from, ALL_NODES, ICMPV6, &body);
        ethernet(own.mac, ALL_NODES_MAC, IPV6, &packet)
    };
    let asks = |operation, v4, name: &str| {
        let packet = arp(operation, (own.mac, v4), own.v4, &mark(name));
        ethernet(own.mac, MacAddress::BROADCAST, ARP, &packet)
    };
    let four = ethernet(
        own.mac,
        other.mac,
        IPV4,
        &ipv4(own.v4, other.v4, UDP, &four),
    );
    vec![
        ("own IPv4", four),
        ("own IPv6", six(own.v6, "own IPv6")),
        ("own link-local", six(own.link, "own link-local")),
        ("own fragment", part(0, "own fragment")),
        ("own next fragment", part(4, "own next fragment")),
        ("own ARP", asks(2, own.v4, "own ARP")),
        (
            "own ARP probe",
            asks(1, Ipv4Addr::UNSPECIFIED, "own ARP probe"),
        ),
        (
            "own advertisement",
            about(own.v6, NEIGHBOUR_ADVERTISEMENT, "own advertisement"),
        ),
        (
            "own probe",
            about(nobody, NEIGHBOUR_SOLICITATION, "own probe"),
        ),
    ]
}

/// Frames that nobody may see.
fn forged(own: Party, others: [Party; 2]) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    let [other, _] = others;
    let all = MacAddress::BROADCAST;
    let four = |name: &str, mac, from, to: (MacAddress, Ipv4Addr), ports| {
        let packet = ipv4(from, to.1, UDP, &udp(ports, &mark(name)));
        ethernet(mac, to.0, IPV4, &packet)
    };
    let six = |from, protocol, body: &[u8]| {
        let packet = ipv6(from, ALL_NODES, protocol, body);
        ethernet(own.mac, ALL_NODES_MAC, IPV6, &packet)
    };
    let to = (other.mac, other.v4);
    let everybody = (all, Ipv4Addr::BROADCAST);
    for (name, victim) in ["neighbour", "gateway"].into_iter().zip(others) {
        let named = |what: &str| mark(&format!("{what} of the {name}"));
        let text = |what: &str| format!("{what} of the {name}");
        frames.push(four(
            &text("Ethernet address"),
            victim.mac,
            own.v4,
            to,
            [9, 9],
        ));
        frames.push(four(&text("IPv4 address"), own.mac, victim.v4, to, [9, 9]));
        for from in [victim.v6, victim.link] {
            frames.push(six(from, UDP, &udp([9, 9], &named("IPv6 address"))));
            let body = discovery(NEIGHBOUR_ADVERTISEMENT, from, &named("advertisement"));
            frames.push(six(own.link, ICMPV6, &body));
            frames.push(tagged(&six(own.link, ICMPV6, &body)));
            // First fragments: one with all of it, one that ends before the address.
            frames.push(six(own.link, FRAGMENT, &fragment(ICMPV6, &body)));
            let short = six(own.link, FRAGMENT, &fragment(ICMPV6, &body[..8]));
            frames.push([short, named("short advertisement")].concat());
            let body = discovery(NEIGHBOUR_SOLICITATION, from, &named("probe"));
            frames.push(six(Ipv6Addr::UNSPECIFIED, ICMPV6, &body));
        }
        for (what, operation, sender) in [
            ("ARP reply", 2, (own.mac, victim.v4)),
            ("ARP request", 1, (own.mac, victim.v4)),
            ("ARP with Ethernet address", 2, (victim.mac, own.v4)),
            ("ARP probe", 1, (own.mac, Ipv4Addr::UNSPECIFIED)),
        ] {
            let packet = arp(operation, sender, victim.v4, &named(what));
            frames.push(ethernet(own.mac, all, ARP, &packet));
            frames.push(tagged(&ethernet(own.mac, all, ARP, &packet)));
        }
    }
    for (name, to) in [("DHCP offer", to), ("DHCP offer to all", everybody)] {
        let offer = four(name, own.mac, own.v4, to, [67, 68]);
        frames.extend([tagged(&offer), offer]);
    }
    let offer = udp([547, 546], &mark("DHCPv6 offer"));
    let offer = six(own.link, UDP, &offer);
    frames.extend([tagged(&offer), offer]);
    for (name, kind) in [("router", ROUTER_ADVERTISEMENT), ("redirect", REDIRECT)] {
        let body = discovery(kind, own.link, &mark(name));
        let plain = six(own.link, ICMPV6, &body);
        frames.extend([tagged(&plain), plain]);
        for header in [HOP_BY_HOP, DESTINATION] {
            let hidden = [&options(ICMPV6, b"")[..], &body].concat();
            frames.push(six(own.link, header, &hidden));
        }
    }
    // A first fragment that ends before the protocol proper begins, which is in the second.
    for protocol in [ICMPV6, UDP] {
        let hidden = options(protocol, &mark("first fragment"));
        frames.push(six(own.link, FRAGMENT, &fragment(DESTINATION, &hidden)));
    }
    let nobodys = udp([9, 9], &mark("IPv6 address of nobody"));
    frames.push(six(Ipv6Addr::UNSPECIFIED, UDP, &nobodys));
    frames.push(ethernet(own.mac, all, 0x88b5, &mark("another protocol")));
    frames
}

/// An extension header with an option that is to be skipped (RFC 8200 §4.2, §4.6).
fn options(next: u8, skipped: &[u8]) -> Vec<u8> {
    let units = (4 + skipped.len()).div_ceil(8);
    let mut header = vec![next, units as u8 - 1, 0x1e, (units * 8 - 4) as u8];
    header.extend(skipped);
    header.resize(units * 8, 0);
    header
}

/// The first fragment of a packet.
fn fragment(next: u8, start: &[u8]) -> Vec<u8> {
    fragment_at(0, next, start)
}

/// A fragment that begins after so many units of eight bytes, and is not the last (RFC 8200 §4.5).
fn fragment_at(units: u8, next: u8, part: &[u8]) -> Vec<u8> {
    [&[next, 0, 0, units << 3 | 1, 0, 0, 0, 7], part].concat()
}

fn mark(name: &str) -> Vec<u8> {
    format!("mark:{name};").into_bytes()
}

/// Frames as the guest's program reads them.
fn list(frames: impl IntoIterator<Item = Vec<u8>>) -> String {
    let mut text = String::new();
    for frame in frames {
        for byte in frame {
            write!(text, "{byte:02x}").unwrap();
        }
        text.push('\n');
    }
    text
}

/// Datagrams to port 83 of the host of a bridge from the first guest: to the host's loopback, which
/// must not arrive, and to the gateway.
pub(super) fn to_the_host() -> String {
    let network = Network::of_bridge();
    let (own, gateway) = (network.guest(2), network.gateway());
    let places = [("loopback", Ipv4Addr::LOCALHOST), ("gateway", gateway.v4)];
    list(places.map(|(name, to)| {
        let packet = ipv4(own.v4, to, UDP, &udp([9, 83], name.as_bytes()));
        ethernet(own.mac, gateway.mac, IPV4, &packet)
    }))
}

/// Lets the second guest of a network send all frames; gives what the first has seen, which is
/// what it may see and nothing else.
fn only_honest_frames_arrive(network: &Network, start: impl Fn(&[&str]) -> Command) {
    let [own, other] = [3, 2].map(|number| network.guest(number));
    let honest = honest(own, other);
    let last = ethernet(
        own.mac,
        other.mac,
        IPV4,
        &ipv4(own.v4, other.v4, UDP, &udp([9, 9], &mark("end"))),
    );
    let frames = honest.iter().map(|(_, frame)| frame.clone());
    let frames = frames.chain(forged(own, [other, network.gateway()]));
    let tools = Tools::with(&list(frames.chain([last])));
    let options = ["--disk", &tools.disk];
    let mut neighbour = Server::begin(start(&options), &with_tools("/mnt/frames hear"));
    let mut sender = start(&options);
    sender.args(["--", "sh", "-ec", &with_tools(SEND)]);
    feed(sender, b"").expect(0);

    let mut seen = Vec::new();
    while seen.last().is_none_or(|last| last != "end") {
        seen.push(neighbour.line());
    }
    let mut expected: Vec<_> = honest.iter().map(|(name, _)| *name).collect();
    expected.push("end");
    assert_eq!(seen, expected);
    neighbour.end();
}

#[test]
fn nobody_on_a_bridge_speaks_for_another() {
    let Some(host) = Host::new("spoof") else {
        return;
    };
    only_honest_frames_arrive(&Network::of_bridge(), |options| {
        host.run(&[&["--network", "bridge:lab"], options].concat())
    });
    host.is_clean();
}

#[test]
fn nobody_on_a_shared_network_speaks_for_another() {
    let directory = tempfile::tempdir().unwrap();
    let network = Network([10, 0, 2], PREFIX);
    only_honest_frames_arrive(&network, |options| {
        let mut command = run(&[&["--network", "lab"], options].concat());
        command.env("XDG_RUNTIME_DIR", directory.path());
        command
    });
}
