//! Guests that send random frames: whole ones with a few bytes changed, mostly. Nothing may
//! panic, and what a guest makes the switch hold stays within its bounds. The network is isolated,
//! so that nothing random leaves this host; what goes out beyond that is tested in `tests`.

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::OwnedFd;

use rustix::net::{RecvFlags, recv};

use crate::config::{Addresses, Config, GATEWAY, GATEWAY_LINK, GATEWAY_MAC, GATEWAY_V6};
use crate::fragments::tests::cut;
use crate::offload::{HEADER_SIZE, Header};
use crate::protocol::{Hello, MAX_MESSAGE, port_pair};
use crate::switch::Switch;
use crate::wire::{self, Link, MacAddress};

const ROUNDS: u32 = 60_000;

/// xorshift64*: enough to stir with, and the same on every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() >> 16) as usize % limit
    }

    fn pick<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len())]
    }
}

/// Two guests on a network, with the guests' ends of their sockets.
fn network(config: Config) -> (Switch, [OwnedFd; 2]) {
    let mut switch = Switch::new(config).unwrap();
    let ends = [2, 3].map(|number| {
        let (ours, theirs) = port_pair().unwrap();
        switch.add_port(ours).unwrap();
        let hello = Hello {
            name: Some(format!("guest{number}")),
            forwards: Vec::new(),
        };
        let text = serde_json::to_vec(&hello).unwrap();
        switch.admit(number, &text).unwrap();
        theirs
    });
    (switch, ends)
}

/// A frame of guest 2's that makes sense.
fn plausible(random: &mut Random) -> Vec<u8> {
    let own = Addresses::of(2);
    let other = Addresses::of(3);
    let link = Link {
        source: own.mac,
        destination: random.pick(&[GATEWAY_MAC, other.mac, MacAddress::BROADCAST]),
    };
    let v6 = random.below(2) == 0;
    let own_link = own.mac.address_in(GATEWAY_LINK);
    let source = if v6 {
        random.pick(&[own.ipv6, own_link]).into()
    } else {
        own.ipv4.into()
    };
    let destination = if v6 {
        random
            .pick(&[
                GATEWAY_V6,
                GATEWAY_LINK,
                other.ipv6,
                "2001:db8::1".parse().unwrap(),
            ])
            .into()
    } else {
        random
            .pick(&[GATEWAY, other.ipv4, "192.0.2.1".parse().unwrap()])
            .into()
    };
    let ends = (source, destination);
    match random.below(6) {
        0 => arp(link),
        1 => icmp(link, ends, random.pick(&[8, 128, 133, 134, 135, 136])),
        2 => dhcp(link, random.pick(&[1, 3, 8])),
        3 => question(link, ends, random.pick(&[53, 67, 80, 1000])),
        _ => segment(link, ends, random.pick(&[53, 80]), random.next() as u8),
    }
}

fn arp(link: Link) -> Vec<u8> {
    let own = Addresses::of(2);
    let mut frame = Vec::new();
    wire::put_ethernet(&mut frame, link, wire::ethertype::ARP);
    frame.extend([0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(own.mac.0);
    frame.extend(own.ipv4.octets());
    frame.extend([0; 6]);
    frame.extend(GATEWAY.octets());
    frame
}

fn icmp(link: Link, ends: (IpAddr, IpAddr), kind: u8) -> Vec<u8> {
    let mut body = vec![kind, 0, 0, 0, 0, 7, 0, 1];
    body.extend(GATEWAY_V6.octets());
    let protocol = match ends.0 {
        IpAddr::V4(_) => wire::protocol::ICMP,
        IpAddr::V6(_) => wire::protocol::ICMPV6,
    };
    wire::frame_of(link, ends, protocol, &body, 2)
}

fn dhcp(link: Link, kind: u8) -> Vec<u8> {
    let mut message = vec![1, 1, 6, 0, 1, 2, 3, 4];
    message.resize(236, 0);
    message.extend([0x63, 0x82, 0x53, 0x63, 53, 1, kind, 50, 4, 10, 0, 2, 2, 255]);
    let from = (Ipv4Addr::UNSPECIFIED, 68).into();
    wire::udp_frame(link, from, (Ipv4Addr::BROADCAST, 67).into(), &message)
}

fn question(link: Link, ends: (IpAddr, IpAddr), port: u16) -> Vec<u8> {
    let mut question = vec![1, 2, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 6];
    question.extend(b"guest3\x08internal\0\0\x01\0\x01");
    wire::udp_frame(
        link,
        (ends.0, 4000).into(),
        (ends.1, port).into(),
        &question,
    )
}

fn segment(link: Link, ends: (IpAddr, IpAddr), port: u8, flags: u8) -> Vec<u8> {
    let mut segment = vec![0x10, 0, 0, port, 0, 0, 0, 1, 0, 0, 0, 9, 0x60, flags];
    segment.extend([0xff, 0xff, 0, 0, 0, 0, 2, 4, 5, 0xb4, 1, 2, 3]);
    wire::frame_of(link, ends, wire::protocol::TCP, &segment, 16)
}

fn drain(ends: &[OwnedFd], buffer: &mut [u8]) -> usize {
    let mut count = 0;
    for end in ends {
        while recv(end, &mut *buffer, RecvFlags::DONTWAIT).is_ok_and(|(_, length)| length > 0) {
            count += 1;
        }
    }
    count
}

#[test]
fn random_frames_do_not_break_the_switch() {
    let config = Config {
        isolated: true,
        ..Config::default()
    };
    let (mut switch, ends) = network(config);
    let mut random = Random(0x5eed_0010);
    let mut buffer = vec![0; MAX_MESSAGE];
    let mut answers = 0;
    for round in 0..ROUNDS {
        let mut message = Header::default().encode().to_vec();
        let mut frame = plausible(&mut random);
        if frame.len() > 60 && frame[12..14] != [8, 6] && random.below(4) == 0 {
            // Pieces of few packets, so that they meet.
            let size = 8 * (1 + random.below(3));
            let mut pieces = cut(&frame, size, random.below(12) as u16);
            frame = pieces.swap_remove(random.below(pieces.len()));
        }
        message.extend(frame);
        // A third is as it should be; the rest has something changed.
        match random.below(6) {
            0 | 1 => {}
            2 => message.truncate(random.below(message.len() + 1)),
            3 => message[random.below(HEADER_SIZE)] = random.next() as u8,
            _ => {
                for _ in 0..=random.below(4) {
                    let at = HEADER_SIZE + random.below(message.len() - HEADER_SIZE);
                    message[at] = random.pick(&[0, 1, 0x7f, 0x80, 0xff, round as u8]);
                }
            }
        }
        switch.receive(2, &message);
        switch.pump();
        answers += drain(&ends, &mut buffer);
        assert!(switch.ports[&2].fragments.held() <= 8 * 65_535);
    }
    assert!(
        answers > ROUNDS as usize / 6,
        "the frames are not understood: {answers}"
    );
    // Nothing but connections to the gateway's name server, and those go with the guest.
    switch.remove_port(2);
    assert!(switch.nat.is_quiet());
}

#[test]
fn first_messages_of_random_bytes_are_refused() {
    let mut switch = Switch::new(Config::default()).unwrap();
    let (ours, _theirs) = port_pair().unwrap();
    switch.add_port(ours).unwrap();
    let mut random = Random(0x5eed_0011);
    for _ in 0..10_000 {
        let good = br#"{"name":"a","forwards":[]}"#;
        let mut message = good.to_vec();
        let at = random.below(message.len());
        message[at] = random.next() as u8;
        message.truncate(random.below(good.len()));
        assert!(switch.admit(2, &message).is_err());
    }
}

#[test]
fn a_guest_cannot_use_up_the_hosts_sockets() {
    let config = Config {
        host: true,
        ..Config::default()
    };
    let (mut switch, ends) = network(config);
    let mut buffer = vec![0; MAX_MESSAGE];
    let own = Addresses::of(2);
    let link = Link {
        source: own.mac,
        destination: GATEWAY_MAC,
    };
    for port in 1..=4000 {
        let mut message = Header::default().encode().to_vec();
        let (from, to) = ((own.ipv4, port).into(), (GATEWAY, 9).into());
        message.extend(wire::udp_frame(link, from, to, b"x"));
        switch.receive(2, &message);
        drain(&ends, &mut buffer);
    }
    assert!(switch.ports[&2].exchanges <= 1024);
}
