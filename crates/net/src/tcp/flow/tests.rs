use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;

use super::*;
use crate::offload::Offloads;
use crate::wire::{self, MacAddress, Packet};

/// A guest that writes down what it is sent, as long as it has room.
#[derive(Default)]
struct Recorder {
    sent: Vec<Sent>,
    full: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sent {
    sequence: u32,
    acknowledged: u32,
    flags: u8,
    length: usize,
}

impl Link for Recorder {
    fn send(&mut self, headers: &[u8], payload: [&[u8]; 2]) -> bool {
        if self.full {
            return false;
        }
        let message = [headers, payload[0], payload[1]].concat();
        let frame = &message[crate::offload::HEADER_SIZE + wire::ETHERNET_HEADER..];
        let packet = Packet::parse(frame).unwrap();
        let segment = Segment::parse(packet.payload).unwrap();
        self.sent.push(Sent {
            sequence: segment.sequence,
            acknowledged: segment.acknowledged,
            flags: segment.flags,
            length: segment.payload.len(),
        });
        true
    }
}

const INITIAL: u32 = u32::MAX - 1;

/// A flow through a forward, and the host's client of it.
fn forwarded() -> (Flow, TcpStream, Recorder) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (socket, _) = listener.accept().unwrap();
    socket.set_nonblocking(true).unwrap();
    let path = Path {
        link: wire::Link {
            source: MacAddress([2, 0, 0, 0, 0, 1]),
            destination: MacAddress([2, 0, 0, 0, 0, 2]),
        },
        guest: "10.0.2.2:80".parse().unwrap(),
        remote: "10.0.2.1:4000".parse().unwrap(),
        offloads: Offloads {
            checksum: true,
            tso4: true,
            tso6: true,
        },
        room: 256 << 10,
    };
    let mut flow = Flow::accepted(path, OwnedFd::from(socket), INITIAL, Instant::now());
    let mut link = Recorder::default();
    assert_eq!(flow.begin(&mut link, Instant::now()), Verdict::Keep);
    (flow, client, link)
}

/// A segment of the guest's, whose numbers begin at 1000.
fn from_guest(flow: &mut Flow, link: &mut Recorder, segment: (u32, u32, u8), window: u16) {
    let (sequence, acknowledged, flags) = segment;
    let mut bytes = vec![0, 80, 0x0f, 0xa0];
    bytes.extend(sequence.to_be_bytes());
    bytes.extend(acknowledged.to_be_bytes());
    bytes.extend([0x50, flags]);
    bytes.extend(window.to_be_bytes());
    bytes.extend([0; 4]);
    let segment = Segment::parse(&bytes).unwrap();
    let now = Instant::now();
    assert_eq!(flow.take(&segment, link, now), Verdict::Keep);
    assert_eq!(flow.pump(link, now), Verdict::Keep);
}

/// The same after the handshake, with this window.
fn established(window: u16) -> (Flow, TcpStream, Recorder) {
    let (mut flow, client, mut link) = forwarded();
    let both = flag::SYN | flag::ACK;
    from_guest(
        &mut flow,
        &mut link,
        (999, INITIAL.wrapping_add(1), both),
        window,
    );
    link.sent.clear();
    (flow, client, link)
}

/// Lets the flow take what the client has sent: on a loopback, at once or a moment later.
fn until_sent(flow: &mut Flow, link: &mut Recorder) {
    while link.sent.is_empty() {
        flow.ready(true, true);
        assert_eq!(flow.pump(link, Instant::now()), Verdict::Keep);
    }
}

#[test]
fn a_guest_that_remembers_an_earlier_connection_is_told_that_it_is_over() {
    let (mut flow, _client, mut link) = forwarded();
    from_guest(&mut flow, &mut link, (5, 77, flag::ACK), 1000);

    let syn = link.sent[0];
    assert_eq!((syn.sequence, syn.flags), (INITIAL, flag::SYN));
    let reset = link.sent[1];
    assert_eq!((reset.sequence, reset.flags), (77, flag::RST));
    assert_eq!(link.sent.len(), 2);
}

#[test]
fn a_handshake_is_acknowledged_across_the_end_of_sequence_space() {
    let (mut flow, _client, mut link) = forwarded();
    let both = flag::SYN | flag::ACK;
    from_guest(
        &mut flow,
        &mut link,
        (999, INITIAL.wrapping_add(1), both),
        1000,
    );

    let expected = Sent {
        sequence: u32::MAX,
        acknowledged: 1000,
        flags: flag::ACK,
        length: 0,
    };
    assert_eq!(link.sent[1..], [expected]);
}

#[test]
fn no_more_is_sent_than_the_guests_window_has_room_for() {
    use std::io::Write;
    let (mut flow, mut client, mut link) = established(100);
    client.write_all(&[7; 1000]).unwrap();
    until_sent(&mut flow, &mut link);
    assert_eq!(link.sent.iter().map(|s| s.length).sum::<usize>(), 100);

    let next = u32::MAX.wrapping_add(100);
    from_guest(&mut flow, &mut link, (1000, next, flag::ACK), 5000);
    while link.sent.iter().map(|s| s.length).sum::<usize>() < 1000 {
        flow.ready(true, true);
        assert_eq!(flow.pump(&mut link, Instant::now()), Verdict::Keep);
    }
    assert_eq!(link.sent[1].sequence, next);
}

#[test]
fn what_is_not_acknowledged_in_time_is_sent_again() {
    use std::io::Write;
    let (mut flow, mut client, mut link) = established(5000);
    client.write_all(b"once more").unwrap();
    until_sent(&mut flow, &mut link);
    let first = link.sent[0];

    let later = Instant::now() + Duration::from_secs(1);
    assert_eq!(flow.tick(&mut link, later), Verdict::Keep);

    let again = *link.sent.last().unwrap();
    assert_eq!(
        (again.sequence, again.length),
        (first.sequence, first.length)
    );
}

#[test]
fn a_full_link_holds_the_flow_until_it_has_room() {
    use std::io::Write;
    let (mut flow, mut client, mut link) = established(5000);
    link.full = true;
    client.write_all(b"patience").unwrap();
    let mut verdict = Verdict::Keep;
    while verdict == Verdict::Keep {
        flow.ready(true, true);
        verdict = flow.pump(&mut link, Instant::now());
    }
    assert_eq!(verdict, Verdict::Blocked);

    link.full = false;
    assert_eq!(flow.pump(&mut link, Instant::now()), Verdict::Keep);
    assert_eq!(link.sent[0].length, 8);
}

#[test]
fn a_reset_is_believed_only_where_it_is_expected() {
    let (mut flow, _client, mut link) = established(5000);
    from_guest(&mut flow, &mut link, (1001, 0, flag::RST), 0);
    // A challenge instead (RFC 5961 §3).
    assert_eq!(link.sent.last().map(|s| s.acknowledged), Some(1000));

    let bytes = [
        0,
        80,
        0x0f,
        0xa0,
        0,
        0,
        3,
        232,
        0,
        0,
        0,
        0,
        0x50,
        flag::RST,
        0,
        0,
        0,
        0,
        0,
        0,
    ];
    let segment = Segment::parse(&bytes).unwrap();
    assert_eq!(
        flow.take(&segment, &mut link, Instant::now()),
        Verdict::Remove
    );
}
