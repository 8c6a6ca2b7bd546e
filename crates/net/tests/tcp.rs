//! TCP through the NAT, with smoltcp as the guest's stack.

mod common;

use std::io::{Read, Write};
use std::net::{Ipv6Addr, Shutdown, TcpStream};
use std::thread;

use common::{Guest, LOCALHOST, echo, gateway, network, open, pattern, serve};
use smoltcp::iface::SocketHandle;
use strata_net::{Config, Forward, GATEWAY_V6, Hello, Protocol};

/// Sends `data` and ends, and returns all that comes back.
fn exchange(guest: &mut Guest, handle: SocketHandle, data: &[u8]) -> Vec<u8> {
    let mut sent = 0;
    let mut received = Vec::new();
    guest.until(|guest| {
        let socket = guest.stream(handle);
        if socket.can_send() && sent < data.len() {
            sent += socket.send_slice(&data[sent..]).unwrap();
            if sent == data.len() {
                socket.close();
            }
        }
        while socket.can_recv() {
            socket
                .recv(|bytes| {
                    received.extend_from_slice(bytes);
                    (bytes.len(), ())
                })
                .unwrap();
        }
        (!socket.may_recv() && sent == data.len()).then_some(())
    });
    received
}

fn guest() -> Guest {
    let (_, mut ports) = network(open(), 1);
    Guest::join(ports.remove(0), &Hello::default())
}

#[test]
fn what_a_guest_sends_comes_back_unchanged() {
    let (port, server) = serve(LOCALHOST, echo);
    let mut guest = guest();
    let stream = guest.connect(gateway(port), 5000);
    assert!(guest.is_open(stream));
    let data = pattern(3_000_000);
    assert!(exchange(&mut guest, stream, &data) == data);
    server.join().unwrap();
}

#[test]
fn over_ipv6_too() {
    let (port, server) = serve(Ipv6Addr::LOCALHOST.into(), echo);
    let mut guest = guest();
    let stream = guest.connect((GATEWAY_V6, port).into(), 5000);
    assert!(guest.is_open(stream));
    let data = pattern(300_000);
    assert!(exchange(&mut guest, stream, &data) == data);
    server.join().unwrap();
}

#[test]
fn frames_that_a_guest_loses_come_again() {
    let (port, server) = serve(LOCALHOST, echo);
    let mut guest = guest();
    let stream = guest.connect(gateway(port), 5000);
    assert!(guest.is_open(stream));
    guest.wire.lose_every = Some(13);
    let data = pattern(200_000);
    assert!(exchange(&mut guest, stream, &data) == data);
    server.join().unwrap();
}

#[test]
fn a_host_that_does_not_read_stops_the_guest_and_nothing_is_lost() {
    let (start, started) = std::sync::mpsc::channel();
    let (result, results) = std::sync::mpsc::channel();
    let (port, server) = serve(LOCALHOST, move |mut stream| {
        started.recv().unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        result.send(all).unwrap();
    });
    let mut guest = guest();
    let stream = guest.connect(gateway(port), 5000);
    assert!(guest.is_open(stream));
    // More than sockets and rings of host and switch hold.
    let data = pattern(40 << 20);
    let (mut sent, mut still) = (0, 0);
    guest.until(|guest| {
        let socket = guest.stream(stream);
        let count = socket.send_slice(&data[sent..]).unwrap();
        sent += count;
        still = if count == 0 { still + 1 } else { 0 };
        (still > 2000).then_some(())
    });
    assert!(sent < data.len(), "the guest was never stopped");
    start.send(()).unwrap();
    guest.until(|guest| {
        let socket = guest.stream(stream);
        sent += socket.send_slice(&data[sent..]).unwrap();
        (sent == data.len()).then(|| socket.close())
    });
    let received = guest.until(|_| results.try_recv().ok());
    assert!(received == data);
    server.join().unwrap();
}

#[test]
fn a_guest_that_does_not_read_stops_the_host_and_nothing_is_lost() {
    let data = pattern(20 << 20);
    let all = data.clone();
    let (port, server) = serve(LOCALHOST, move |mut stream| stream.write_all(&all).unwrap());
    let mut guest = guest();
    let stream = guest.connect(gateway(port), 5000);
    assert!(guest.is_open(stream));
    let mut waited = 0;
    guest.until(|_| {
        waited += 1;
        (waited > 3000).then_some(())
    });
    assert!(!server.is_finished(), "the host was never stopped");
    guest.stream(stream).close();
    let mut received = Vec::new();
    guest.until(|guest| {
        let socket = guest.stream(stream);
        while socket.can_recv() {
            socket
                .recv(|bytes| {
                    received.extend_from_slice(bytes);
                    (bytes.len(), ())
                })
                .unwrap();
        }
        (!socket.may_recv()).then_some(())
    });
    assert!(received == data);
    server.join().unwrap();
}

#[test]
fn a_side_that_has_ended_still_hears_the_other() {
    let (port, server) = serve(LOCALHOST, |mut stream| {
        // Ends first, and reads on.
        stream.write_all(b"hello").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"and goodbye");
    });
    let mut guest = guest();
    let stream = guest.connect(gateway(port), 5000);
    assert!(guest.is_open(stream));
    let mut heard = Vec::new();
    guest.until(|guest| {
        let socket = guest.stream(stream);
        if socket.can_recv() {
            socket
                .recv(|bytes| (bytes.len(), heard.extend_from_slice(bytes)))
                .unwrap();
        }
        (!socket.may_recv()).then_some(())
    });
    assert_eq!(heard, b"hello");
    guest.stream(stream).send_slice(b"and goodbye").unwrap();
    guest.stream(stream).close();
    guest.until(|_| server.is_finished().then_some(()));
    server.join().unwrap();
}

#[test]
fn a_port_where_nobody_listens_refuses() {
    let port = {
        let listener = std::net::TcpListener::bind((LOCALHOST, 0)).unwrap();
        listener.local_addr().unwrap().port()
    };
    let mut guest = guest();
    let stream = guest.connect(gateway(port), 5000);
    assert!(!guest.is_open(stream));
}

#[test]
fn the_host_is_out_of_reach_unless_the_network_was_told() {
    let (port, _server) = serve(LOCALHOST, echo);
    let (_, mut ports) = network(Config::default(), 1);
    let mut guest = Guest::join(ports.remove(0), &Hello::default());
    let stream = guest.connect(gateway(port), 5000);
    assert!(!guest.is_open(stream));
}

/// A guest that serves `port` through a forward; gives the host's port.
fn forwarded(guest_port: u16) -> (Guest, u16) {
    let free = std::net::TcpListener::bind((LOCALHOST, 0)).unwrap();
    let host = free.local_addr().unwrap();
    drop(free);
    let (_, mut ports) = network(Config::default(), 1);
    let forward = Forward {
        protocol: Protocol::Tcp,
        host,
        guest: guest_port,
    };
    let hello = Hello {
        name: None,
        forwards: vec![forward],
    };
    (Guest::join(ports.remove(0), &hello), host.port())
}

#[test]
fn a_forward_leads_to_the_guest() {
    let (mut guest, port) = forwarded(80);
    let listener = guest.tcp();
    guest.stream(listener).listen(80).unwrap();
    let client = thread::spawn(move || {
        let mut stream = TcpStream::connect((LOCALHOST, port)).unwrap();
        stream.write_all(b"request").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    });
    let mut request = Vec::new();
    guest.until(|guest| {
        let socket = guest.stream(listener);
        if socket.can_recv() {
            socket
                .recv(|bytes| (bytes.len(), request.extend_from_slice(bytes)))
                .unwrap();
        }
        (socket.is_open() && !socket.may_recv() && socket.may_send()).then_some(())
    });
    assert_eq!(request, b"request");
    guest.stream(listener).send_slice(b"answer").unwrap();
    guest.stream(listener).close();
    guest.until(|_| client.is_finished().then_some(()));
    assert_eq!(client.join().unwrap(), "answer");
}

#[test]
fn many_short_connections_through_a_forward_all_arrive() {
    const CONNECTIONS: usize = 300;
    const LISTENERS: usize = 16;
    let (mut guest, port) = forwarded(80);
    let listeners: Vec<_> = (0..LISTENERS).map(|_| guest.tcp()).collect();
    let client = thread::spawn(move || {
        for number in 0..CONNECTIONS as u32 {
            let mut stream = TcpStream::connect((LOCALHOST, port)).unwrap();
            stream.write_all(&number.to_be_bytes()).unwrap();
            let mut answer = [0; 4];
            stream.read_exact(&mut answer).unwrap();
            assert_eq!(u32::from_be_bytes(answer), number);
        }
    });
    guest.until(|guest| {
        for listener in &listeners {
            let socket = guest.stream(*listener);
            if !socket.is_open() {
                socket.listen(80).unwrap();
            }
            if socket.can_recv() {
                let mut request = [0; 4];
                let count = socket.recv_slice(&mut request).unwrap();
                socket.send_slice(&request[..count]).unwrap();
                socket.close();
            }
            if socket.state() == smoltcp::socket::tcp::State::TimeWait {
                socket.abort();
            }
        }
        client.is_finished().then_some(())
    });
    client.join().unwrap();
}
