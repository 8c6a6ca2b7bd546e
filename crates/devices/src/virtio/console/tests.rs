use super::*;
use crate::virtio::VirtioPci;
use crate::virtio::testing::{Driver, MEMORY_SIZE};

struct Guest {
    driver: Driver,
    device: VirtioPci<Console>,
    control: Vec<u64>,
}

/// A guest whose driver is up, with buffers for control messages posted.
fn guest() -> Guest {
    let mut driver = Driver::new(MEMORY_SIZE);
    let port = |name: &str| PortConfig {
        name: name.into(),
        console: false,
    };
    let console = Console::new(vec![port("in"), port("out")]);
    let mut device = VirtioPci::new(console, driver.memory.clone());
    driver.start(&mut device, u64::MAX);
    let mut guest = Guest {
        driver,
        device,
        control: Vec::new(),
    };
    for _ in 0..16 {
        guest.post_control();
    }
    guest
}

impl Guest {
    fn post_control(&mut self) {
        let buffer = self.driver.allocate(64);
        self.driver.offer(CONTROL_RECEIVE, &[], &[(buffer, 64)]);
        self.control.push(buffer);
    }

    fn say(&mut self, id: u32, event: u16, value: u16) {
        let mut message = id.to_le_bytes().to_vec();
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        let message = self.driver.place(&message);
        self.driver.offer(CONTROL_TRANSMIT, &[message], &[]);
        let (console, transport) = self.device.parts();
        console.process_control(transport);
    }

    /// Control messages that have come in: port, event, value, the rest as text.
    fn heard(&mut self) -> Vec<(u32, u16, u16, String)> {
        let used = self.driver.used(CONTROL_RECEIVE);
        let buffers: Vec<_> = self.control.drain(..used.len()).collect();
        let mut messages = Vec::new();
        for (buffer, (_, length)) in buffers.into_iter().zip(used) {
            let m = self.driver.bytes(buffer, length as usize);
            let name = String::from_utf8(m[8..].to_vec()).unwrap();
            let half = |at| u16::from_le_bytes([m[at], m[at + 1]]);
            messages.push((u32::from(m[0]), half(4), half(6), name));
        }
        messages
    }

    fn give(&mut self, port: usize, bytes: &[u8]) -> usize {
        let (console, transport) = self.device.parts();
        console.give_input(transport, port, bytes)
    }

    fn take(&mut self, port: usize, room: usize) -> Vec<u8> {
        let mut out = Vec::new();
        let (console, transport) = self.device.parts();
        console.take_output(transport, port, room, &mut out);
        out
    }

    fn post_input(&mut self, port: usize, length: u32) -> u64 {
        let buffer = self.driver.allocate(length.into());
        self.driver
            .offer(Console::receive_queue(port), &[], &[(buffer, length)]);
        buffer
    }
}

#[test]
fn ports_are_added_named_and_opened() {
    let mut guest = guest();

    guest.say(0xffff_ffff, event::DEVICE_READY, 1);
    assert_eq!(
        guest.heard(),
        [
            (0, event::DEVICE_ADD, 1, String::new()),
            (1, event::DEVICE_ADD, 1, String::new())
        ]
    );

    guest.say(1, event::PORT_READY, 1);
    assert_eq!(
        guest.heard(),
        [
            (1, event::PORT_NAME, 1, "out".into()),
            (1, event::PORT_OPEN, 1, String::new())
        ]
    );
}

#[test]
fn input_waits_until_a_program_opens_the_port_and_buffers_are_posted() {
    let mut guest = guest();
    let first = guest.post_input(0, 3);
    assert_eq!(guest.give(0, b"hello"), 0);

    guest.say(0, event::PORT_OPEN, 1);
    assert_eq!(guest.give(0, b"hello"), 3);
    assert_eq!(guest.give(0, b"lo"), 0);
    let second = guest.post_input(0, 16);
    assert_eq!(guest.give(0, b"lo"), 2);

    assert_eq!(guest.driver.bytes(first, 3), b"hel");
    assert_eq!(guest.driver.bytes(second, 3), b"lo\0");
    assert_eq!(
        guest.driver.used(0).iter().map(|u| u.1).collect::<Vec<_>>(),
        [3, 2]
    );
}

#[test]
fn output_is_taken_in_pieces_and_the_buffer_returned_after_the_last() {
    let mut guest = guest();
    let message = guest.driver.place(b"some output");
    let queue = Console::transmit_queue(1);
    guest.driver.offer(queue, &[message], &[]);

    assert_eq!(guest.take(1, 5), b"some ");
    assert!(guest.driver.used(queue).is_empty());
    assert_eq!(guest.take(1, 100), b"output");
    assert_eq!(guest.driver.used(queue).len(), 1);
    assert_eq!(guest.take(1, 100), b"");
}

#[test]
fn closing_is_told_once() {
    let mut guest = guest();
    guest.say(0, event::PORT_READY, 1);
    guest.heard();

    for _ in 0..2 {
        let (console, transport) = guest.device.parts();
        console.close_input(transport, 0);
    }

    assert_eq!(guest.heard(), [(0, event::PORT_OPEN, 0, String::new())]);
}

#[test]
fn a_port_closed_before_its_driver_came_up_is_never_opened() {
    let mut guest = guest();
    let (console, transport) = guest.device.parts();
    console.close_input(transport, 0);

    guest.say(0, event::PORT_READY, 1);

    assert_eq!(guest.heard(), [(0, event::PORT_NAME, 1, "in".into())]);
}

#[test]
fn control_messages_wait_for_buffers_and_do_not_pile_up_without_end() {
    let mut guest = guest();
    for _ in 0..2000 {
        guest.say(0, event::DEVICE_READY, 1);
    }
    assert!(guest.device.device().waiting.len() <= MAX_WAITING + 2);

    guest.heard();
    guest.post_control();
    let (console, transport) = guest.device.parts();
    console.process_control(transport);

    assert_eq!(guest.heard().len(), 1);
}

#[test]
fn a_driver_without_multiport_has_port_zero_open() {
    let mut driver = Driver::new(MEMORY_SIZE);
    let console = Console::new(vec![PortConfig::default()]);
    let mut device = VirtioPci::new(console, driver.memory.clone());

    driver.start(&mut device, crate::virtio::feature::VERSION_1);

    assert!(device.device().guest_open(0));
}

#[test]
fn output_of_before_a_reset_is_there_after_it() {
    let mut guest = guest();
    let queue = Console::transmit_queue(1);
    for text in [&b"said "[..], b"before ", b"going"] {
        let buffer = guest.driver.place(text);
        guest.driver.offer(queue, &[buffer], &[]);
    }
    // a part of it was taken already
    assert_eq!(guest.take(1, 3), b"sai");

    guest.driver.start(&mut guest.device, u64::MAX);

    assert_eq!(guest.take(1, 4), b"d be");
    assert_eq!(guest.take(1, 100), b"fore going");
    assert!(guest.take(1, 100).is_empty());
}
