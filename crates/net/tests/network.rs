//! Addresses, names, datagrams and neighbours, with smoltcp as the guests' stack.

mod common;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::thread;
use std::time::Duration;

use common::{Guest, LOCALHOST, gateway, network, open};
use smoltcp::iface::SocketHandle;
use smoltcp::socket::{dhcpv4, icmp, tcp};
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr};
use strata_net::{Config, Forward, GATEWAY, Hello, JoinError, Protocol, join};

fn named(name: &str) -> Hello {
    Hello {
        name: Some(name.to_owned()),
        forwards: Vec::new(),
    }
}

fn two_guests(config: Config) -> [Guest; 2] {
    let (_, ports) = network(config, 2);
    let mut names = ["one", "two"].into_iter();
    let guests = ports
        .into_iter()
        .map(|port| Guest::join(port, &named(names.next().unwrap())));
    let guests: Vec<_> = guests.collect();
    guests.try_into().unwrap_or_else(|_| unreachable!())
}

/// A query for an A record.
fn query(name: &str) -> Vec<u8> {
    let mut message = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        message.push(label.len() as u8);
        message.extend(label.bytes());
    }
    message.extend([0, 0, 1, 0, 1]);
    message
}

#[test]
fn dhcp_gives_a_guest_the_address_it_was_told() {
    let (_, mut ports) = network(Config::default(), 1);
    let mut guest = Guest::join(ports.remove(0), &Hello::default());
    guest.interface.update_ip_addrs(|list| {
        list.clear();
    });
    let socket = guest.sockets.add(dhcpv4::Socket::new());
    let lease = guest.until(|guest| {
        let event = guest.sockets.get_mut::<dhcpv4::Socket>(socket).poll();
        match event {
            Some(dhcpv4::Event::Configured(config)) => {
                Some((config.address, config.router, config.dns_servers.to_vec()))
            }
            _ => None,
        }
    });
    assert_eq!(lease.0.address(), guest.addresses.ipv4);
    assert_eq!(lease.0.prefix_len(), 24);
    assert_eq!((lease.1, lease.2), (Some(GATEWAY), vec![GATEWAY]));
}

#[test]
fn guests_find_each_other_by_name_and_talk() {
    let [mut one, mut two] = two_guests(Config::default());
    let asking = one.udp(4000);
    let answer = one.ask(asking, gateway(53), &query("two.internal"));
    assert!(answer.ends_with(&two.addresses.ipv4.octets()));

    let listener = two.tcp();
    two.stream(listener).listen(80).unwrap();
    let to = (two.addresses.ipv4, 80).into();
    let stream = one.connect(to, 5000);
    let server = thread::spawn(move || {
        two.until(|guest| {
            let socket = guest.stream(listener);
            let mut request = [0; 5];
            (socket.recv_slice(&mut request) == Ok(5)).then_some(())?;
            assert_eq!(&request, b"hello");
            Some(socket.send_slice(b"world").unwrap())
        });
    });
    assert!(one.is_open(stream));
    one.stream(stream).send_slice(b"hello").unwrap();
    let mut answer = [0; 5];
    one.until(|guest| (guest.stream(stream).recv_slice(&mut answer) == Ok(5)).then_some(()));
    assert_eq!(&answer, b"world");
    server.join().unwrap();
}

#[test]
fn a_name_of_nobody_is_no_name() {
    let [mut one, _two] = two_guests(Config::default());
    let asking = one.udp(4000);
    let answer = one.ask(asking, gateway(53), &query("three.internal"));
    assert_eq!(answer[3] & 15, 3);
}

#[test]
fn other_names_are_asked_of_the_hosts_name_server() {
    let server = UdpSocket::bind((LOCALHOST, 0)).unwrap();
    let config = Config {
        resolvers: vec![server.local_addr().unwrap()],
        ..Config::default()
    };
    let [mut one, _two] = two_guests(config);
    let thread = thread::spawn(move || {
        let mut buffer = [0; 512];
        let (length, from) = server.recv_from(&mut buffer).unwrap();
        assert_eq!(buffer[..length], query("example.org"));
        server.send_to(b"the answer", from).unwrap();
    });
    let asking = one.udp(4000);
    assert_eq!(
        one.ask(asking, gateway(53), &query("example.org")),
        b"the answer"
    );
    thread.join().unwrap();
}

/// A message behind its length.
fn framed(message: &[u8]) -> Vec<u8> {
    let length = u16::try_from(message.len()).unwrap();
    [&length.to_be_bytes(), message].concat()
}

#[test]
fn names_are_answered_over_tcp_here_and_by_the_hosts_server() {
    let server = std::net::TcpListener::bind((LOCALHOST, 0)).unwrap();
    let config = Config {
        resolvers: vec![server.local_addr().unwrap()],
        ..Config::default()
    };
    let [mut one, two] = two_guests(config);
    // More than a datagram has room for, in pieces.
    let long = common::pattern(20_000);
    let answer = framed(&long);
    let thread = thread::spawn(move || {
        let (mut stream, _) = server.accept().unwrap();
        let mut asked = vec![0; framed(&query("example.org")).len()];
        stream.read_exact(&mut asked).unwrap();
        assert_eq!(asked, framed(&query("example.org")));
        for piece in answer.chunks(999) {
            stream.write_all(piece).unwrap();
        }
    });
    let stream = one.connect(gateway(53), 5000);
    assert!(one.is_open(stream));
    let questions = [
        framed(&query("two.internal")),
        framed(&query("example.org")),
    ]
    .concat();
    // A length may come without what it is of.
    for piece in [&questions[..1], &questions[1..9], &questions[9..]] {
        one.stream(stream).send_slice(piece).unwrap();
        one.until(|guest| (guest.stream(stream).send_queue() == 0).then_some(()));
    }
    let mut heard = Vec::new();
    let size = |heard: &[u8]| 2 + usize::from(u16::from_be_bytes([heard[0], heard[1]]));
    one.until(|guest| {
        let mut buffer = [0; 4096];
        let length = guest.stream(stream).recv_slice(&mut buffer).unwrap();
        heard.extend(&buffer[..length]);
        (heard.len() > 2 && heard.len() >= size(&heard) + long.len() + 2).then_some(())
    });
    let (own, others) = heard.split_at(size(&heard));
    assert!(own.ends_with(&two.addresses.ipv4.octets()));
    assert_eq!(others, framed(&long));
    thread.join().unwrap();
}

#[test]
fn two_machines_cannot_have_one_name() {
    let (_, mut ports) = network(Config::default(), 2);
    let _one = Guest::join(ports.remove(0), &named("same"));
    let refused = join(ports.remove(0), &named("same"));
    assert!(matches!(refused, Err(JoinError::Refused(why)) if why.contains("same")));
}

#[test]
fn a_port_that_is_taken_is_named() {
    let taken = std::net::TcpListener::bind((LOCALHOST, 0)).unwrap();
    let host = taken.local_addr().unwrap();
    let (_, mut ports) = network(Config::default(), 1);
    let hello = Hello {
        name: None,
        forwards: vec![Forward {
            protocol: Protocol::Tcp,
            host,
            guest: 80,
        }],
    };
    let refused = join(ports.remove(0), &hello);
    assert!(matches!(refused, Err(JoinError::Refused(why)) if why.contains(&host.to_string())));
}

#[test]
fn datagrams_go_to_the_host_and_back() {
    let server = UdpSocket::bind((LOCALHOST, 0)).unwrap();
    let port = server.local_addr().unwrap().port();
    let thread = thread::spawn(move || {
        let mut buffer = [0; 2000];
        for _ in 0..3 {
            let (length, from) = server.recv_from(&mut buffer).unwrap();
            server.send_to(&buffer[..length], from).unwrap();
        }
    });
    let [mut one, _two] = two_guests(open());
    let socket = one.udp(4000);
    for length in [1, 500, 1400] {
        let data = common::pattern(length);
        assert_eq!(one.ask(socket, gateway(port), &data), data);
    }
    thread.join().unwrap();
}

#[test]
fn whoever_a_guest_sends_to_sees_the_same_port_and_only_they_answer() {
    let servers = [(); 3].map(|()| UdpSocket::bind((LOCALHOST, 0)).unwrap());
    let ports = servers
        .each_ref()
        .map(|server| server.local_addr().unwrap().port());
    let [mut one, mut two] = two_guests(open());
    let (socket, other) = (one.udp(4000), one.udp(4001));
    let mut buffer = [0; 64];
    let mut seen = |guest: &mut Guest, socket, server: usize| {
        guest.say(socket, gateway(ports[server]), b"here");
        guest.until(|_| {
            servers[server].set_nonblocking(true).unwrap();
            let (_, from) = servers[server].recv_from(&mut buffer).ok()?;
            Some(from)
        })
    };

    let mapped = seen(&mut one, socket, 0);
    assert_eq!(seen(&mut one, socket, 1), mapped);
    assert_ne!(seen(&mut one, other, 1), mapped);
    let twos = two.udp(4000);
    assert_ne!(seen(&mut two, twos, 0), mapped);

    // Who was not asked is not heard; who was is, each under its own address.
    servers[2].send_to(b"unasked", mapped).unwrap();
    for server in [1, 0] {
        servers[server].send_to(b"answer", mapped).unwrap();
        let heard = one.hear(socket);
        assert_eq!(heard, (gateway(ports[server]), b"answer".to_vec()));
    }
}

#[test]
fn datagrams_reach_a_guest_through_a_forward_and_are_answered() {
    let free = UdpSocket::bind((LOCALHOST, 0)).unwrap();
    let host = free.local_addr().unwrap();
    drop(free);
    let (_, mut ports) = network(Config::default(), 1);
    let hello = Hello {
        name: None,
        forwards: vec![Forward {
            protocol: Protocol::Udp,
            host,
            guest: 5353,
        }],
    };
    let mut guest = Guest::join(ports.remove(0), &hello);
    let socket = guest.udp(5353);
    let client = UdpSocket::bind((LOCALHOST, 0)).unwrap();
    client.send_to(b"question", host).unwrap();

    let (from, data) = guest.hear(socket);
    assert_eq!((from.ip(), &*data), (IpAddr::V4(GATEWAY), &b"question"[..]));
    guest.say(socket, from, b"answer");
    guest.until(|guest| {
        let mut buffer = [0; 64];
        client.set_nonblocking(true).unwrap();
        let (length, from) = client.recv_from(&mut buffer).ok()?;
        assert_eq!((&buffer[..length], from), (&b"answer"[..], host));
        let _ = guest;
        Some(())
    });
}

/// Pings `to`; whether an answer came within a while: smoltcp looks for one neighbour a second.
fn ping(guest: &mut Guest, to: Ipv4Addr) -> bool {
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 1024]);
    let mut socket = icmp::Socket::new(buffer(), buffer());
    socket.bind(icmp::Endpoint::Ident(7)).unwrap();
    let handle: SocketHandle = guest.sockets.add(socket);
    let echo = Icmpv4Repr::EchoRequest {
        ident: 7,
        seq_no: 1,
        data: b"ping",
    };
    let socket = guest.sockets.get_mut::<icmp::Socket>(handle);
    let bytes = socket.send(echo.buffer_len(), to.into()).unwrap();
    echo.emit(
        &mut Icmpv4Packet::new_unchecked(bytes),
        &smoltcp::phy::ChecksumCapabilities::default(),
    );
    let mut left = 15_000;
    let answered = guest.until(|guest| {
        let socket = guest.sockets.get_mut::<icmp::Socket>(handle);
        left -= 1;
        if let Ok((data, from)) = socket.recv() {
            return Some(from == to.into() && data.ends_with(b"ping"));
        }
        (left == 0).then_some(false)
    });
    guest.sockets.remove(handle);
    answered
}

#[test]
fn the_gateway_and_neighbours_answer_a_ping() {
    let [mut one, mut two] = two_guests(Config::default());
    let other = two.addresses.ipv4;
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = std::sync::Arc::clone(&stop);
    let neighbour = thread::spawn(move || {
        two.until(|_| {
            stopped
                .load(std::sync::atomic::Ordering::SeqCst)
                .then_some(())
        });
    });
    assert!(ping(&mut one, GATEWAY));
    assert!(ping(&mut one, other));
    assert!(!ping(&mut one, Ipv4Addr::new(10, 0, 2, 200)));
    stop.store(true, std::sync::atomic::Ordering::SeqCst);
    neighbour.join().unwrap();
}

#[test]
fn a_guest_with_anothers_address_is_not_heard() {
    let [mut one, two] = two_guests(Config::default());
    assert!(ping(&mut one, GATEWAY));
    one.interface.update_ip_addrs(|list| {
        list.clear();
        list.push(smoltcp::wire::IpCidr::new(two.addresses.ipv4.into(), 24))
            .unwrap();
    });
    assert!(!ping(&mut one, GATEWAY));
}

#[test]
fn an_isolated_guest_reaches_nobody_outside() {
    let config = Config {
        isolated: true,
        ..Config::default()
    };
    let [mut one, _two] = two_guests(config);
    let to: SocketAddr = "192.0.2.1:80".parse().unwrap();
    let stream = one.connect(to, 5000);
    // smoltcp gives up by itself on no ICMP message: it goes on asking in vain.
    let mut left = 2000;
    let state = one.until(|guest| {
        left -= 1;
        (left == 0).then(|| guest.stream(stream).state())
    });
    assert_ne!(state, tcp::State::Established);
}

#[test]
fn a_network_ends_with_its_last_machine() {
    let (switch, ports) = network(Config::default(), 2);
    drop(ports);
    while !switch.is_finished() {
        thread::sleep(Duration::from_millis(1));
    }
    switch.join().unwrap();
}
