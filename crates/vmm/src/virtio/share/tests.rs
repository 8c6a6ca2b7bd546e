//! Shares as a guest's driver uses them, with a test in place of the server.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread;

use strata_devices::virtio::fs_queue::{HIGH_PRIORITY, REQUEST};
use strata_share::Share;

use crate::virtio::tests::{Machine, machine};

/// A machine with a share, and the ends of its lines that are the server's.
fn shared(lines: usize) -> (Machine, Vec<UnixStream>) {
    let pairs = (0..=lines).map(|_| strata_share::pair().unwrap());
    let (ours, theirs): (Vec<_>, Vec<_>) = pairs.unzip();
    let share = Share {
        tag: "t".into(),
        sockets: theirs,
    };
    let machine = machine(1, |devices| devices.add_share(share).unwrap());
    (machine, ours.into_iter().map(UnixStream::from).collect())
}

/// A request with some data; gives where its reply goes.
fn offer(machine: &mut Machine, queue: usize, unique: u64, data: &[u8], room: u32) -> u64 {
    let mut bytes = vec![0; 40];
    bytes[8..16].copy_from_slice(&unique.to_le_bytes());
    let header = machine.driver.place(&bytes);
    let data = machine.driver.place(data);
    let place = machine.driver.allocate(u64::from(room.max(1)));
    let room = [(place, room)];
    let room = if room[0].1 == 0 { &[][..] } else { &room };
    machine.driver.offer(queue, &[header, data], room);
    machine.kick(queue);
    place
}

/// The next request: its number and data.
fn receive(stream: &mut UnixStream) -> (u64, Vec<u8>) {
    let mut length = [0; 4];
    stream.read_exact(&mut length).unwrap();
    let mut frame = vec![0; u32::from_le_bytes(length) as usize];
    stream.read_exact(&mut frame).unwrap();
    let unique = u64::from_le_bytes(frame[8..16].try_into().unwrap());
    (unique, frame[40..].to_vec())
}

fn reply(stream: &mut UnixStream, unique: u64, data: &[u8]) {
    let mut bytes = (16 + data.len() as u32).to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(unique.to_le_bytes());
    bytes.extend(data);
    stream.write_all(&bytes).unwrap();
}

fn error(machine: &Machine, place: u64) -> i32 {
    let bytes = machine.driver.bytes(place + 4, 4);
    i32::from_le_bytes(bytes.try_into().unwrap())
}

#[test]
fn a_request_goes_to_the_server_and_its_reply_to_the_guest() {
    let (mut machine, mut lines) = shared(1);
    let data: Vec<u8> = (0..100_000_u32).map(|n| n as u8).collect();
    let place = offer(&mut machine, REQUEST, 7, &data, 200_000);

    assert_eq!(receive(&mut lines[1]), (7, data.clone()));
    reply(&mut lines[1], 7, &data);

    assert_eq!(machine.wait(REQUEST)[0].1, 100_016);
    assert!(machine.driver.bytes(place + 16, 100_000) == data);
}

#[test]
fn requests_that_must_not_wait_have_a_line_of_their_own() {
    let (mut machine, mut lines) = shared(1);
    offer(&mut machine, REQUEST, 1, b"", 16);
    assert_eq!(receive(&mut lines[1]).0, 1);

    offer(&mut machine, HIGH_PRIORITY, 2, b"forget", 0);
    assert_eq!(receive(&mut lines[0]), (2, b"forget".to_vec()));
    reply(&mut lines[0], 2, b"");
    assert_eq!(machine.wait(HIGH_PRIORITY)[0].1, 0);

    reply(&mut lines[1], 1, b"");
    assert_eq!(machine.wait(REQUEST)[0].1, 16);
}

#[test]
fn a_slow_request_does_not_hold_up_others() {
    let (mut machine, lines) = shared(3);
    let (seen, requests) = mpsc::channel();
    let mut servers = Vec::new();
    for mut line in lines.into_iter().skip(1) {
        let seen = seen.clone();
        servers.push(thread::spawn(move || {
            let (unique, _) = receive(&mut line);
            seen.send((unique, line)).unwrap();
        }));
    }
    for unique in 1..=3 {
        offer(&mut machine, REQUEST, unique, b"", 16);
    }

    // All three are with the server before it replies to any.
    let mut held: Vec<_> = (0..3).map(|_| requests.recv().unwrap()).collect();
    held.sort_by_key(|(unique, _)| *unique);
    assert_eq!(
        held.iter().map(|held| held.0).collect::<Vec<_>>(),
        [1, 2, 3]
    );
    for (unique, mut line) in held {
        reply(&mut line, unique, b"");
    }
    let mut used = 0;
    while used < 3 {
        used += machine.wait(REQUEST).len();
    }
    for server in servers {
        server.join().unwrap();
    }
}

#[test]
fn replies_to_nothing_are_passed_over_and_those_without_room_are_errors() {
    let (mut machine, mut lines) = shared(1);
    let place = offer(&mut machine, REQUEST, 7, b"", 32);
    receive(&mut lines[1]);
    reply(&mut lines[1], 6, &vec![1; 10_000]);
    reply(&mut lines[1], 7, b"sixteen and more.");
    machine.wait(REQUEST);
    assert_eq!(error(&machine, place), -5);

    // The line goes on.
    offer(&mut machine, REQUEST, 8, b"", 32);
    assert_eq!(receive(&mut lines[1]).0, 8);
    reply(&mut lines[1], 8, b"fits");
    assert_eq!(machine.wait(REQUEST)[0].1, 20);
}

#[test]
fn without_its_server_every_request_is_an_error() {
    let (mut machine, mut lines) = shared(2);
    let place = offer(&mut machine, REQUEST, 1, b"", 16);
    lines.clear();
    machine.wait(REQUEST);
    assert_eq!(error(&machine, place), -5);
    for unique in 2..6 {
        let place = offer(&mut machine, REQUEST, unique, &vec![1; 50_000], 16);
        machine.wait(REQUEST);
        assert_eq!(error(&machine, place), -5);
    }
    machine.devices.shutdown();
}

#[test]
fn a_server_that_lies_about_lengths_is_one_that_has_gone() {
    let (mut machine, mut lines) = shared(1);
    let place = offer(&mut machine, REQUEST, 1, b"", 64);
    receive(&mut lines[1]);
    lines[1].write_all(&[0xff; 16]).unwrap();
    machine.wait(REQUEST);
    assert_eq!(error(&machine, place), -5);
}

#[test]
fn a_machine_ends_though_its_server_hangs() {
    let (mut machine, mut lines) = shared(1);
    offer(&mut machine, REQUEST, 1, b"", 64);
    receive(&mut lines[1]);
    machine.devices.shutdown();
}
