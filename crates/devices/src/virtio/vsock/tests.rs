use std::collections::VecDeque;

use strata_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::VirtioPci;
use crate::virtio::testing::{Driver, MEMORY_SIZE, write};
use crate::virtio::{common, feature};

const CID: u32 = 3;
const HOST_PORT: u32 = 1 << 30;
const GUEST_PORT: u32 = 52;
/// Bytes of a receive buffer of these tests.
const BUFFER: u32 = 4096;
const NONE: [u16; 0] = [];

/// A guest's driver and the device.
struct Guest {
    driver: Driver,
    device: VirtioPci<Vsock>,
    /// Receive buffers, in the order in which they were offered.
    buffers: VecDeque<u64>,
}

impl Guest {
    fn new() -> Self {
        let driver = Driver::new(MEMORY_SIZE);
        let device = VirtioPci::new(Vsock::new(CID), driver.memory.clone());
        Self {
            driver,
            device,
            buffers: VecDeque::new(),
        }
    }

    /// One whose driver is up and has given `count` buffers.
    fn with_buffers(count: usize) -> Self {
        let mut guest = Self::new();
        guest.start();
        guest.give(count);
        guest
    }

    /// One with a connection that was accepted, and room for `credit` bytes.
    fn connected(count: usize, credit: u32) -> Self {
        let mut guest = Self::with_buffers(count);
        guest.connect(HOST_PORT, credit);
        guest
    }

    fn start(&mut self) {
        self.buffers.clear();
        let wanted = FEATURE_STREAM | feature::VERSION_1;
        self.driver.start(&mut self.device, wanted);
    }

    fn give(&mut self, count: usize) {
        for _ in 0..count {
            let at = self.driver.allocate(BUFFER.into());
            self.driver.offer(RECEIVE, &[], &[(at, BUFFER)]);
            self.buffers.push_back(at);
        }
    }

    fn connect(&mut self, host_port: u32, credit: u32) {
        assert!(self.vsock(|vsock, _| vsock.connect(host_port, GUEST_PORT)));
        assert_eq!(self.told()[0].0.op, op::REQUEST);
        let response = Header {
            destination_port: host_port,
            ..packet(op::RESPONSE)
        };
        let event = self.send(&Header {
            buf_alloc: credit,
            ..response
        });
        assert!(matches!(event, VsockEvent::Accepted(id) if id == host_port));
    }

    fn vsock<T>(&mut self, act: impl FnOnce(&mut Vsock, &mut Transport) -> T) -> T {
        let (vsock, transport) = self.device.parts();
        act(vsock, transport)
    }

    /// Sends a packet with `data`, and gives what it means.
    fn send_with(&mut self, header: &Header, data: &[u8]) -> VsockEvent {
        let bytes = self.driver.place(&header.bytes());
        let mut buffers = vec![bytes];
        if !data.is_empty() {
            buffers.push(self.driver.place(data));
        }
        self.driver.offer(TRANSMIT, &buffers, &[]);
        self.vsock(Vsock::next_event).unwrap()
    }

    fn send(&mut self, header: &Header) -> VsockEvent {
        self.send_with(header, &[])
    }

    /// Sends data; gives it back to the driver, not passed on.
    fn send_data(&mut self, data: &[u8]) -> VsockEvent {
        let header = Header {
            length: data.len() as u32,
            ..packet(op::RW)
        };
        let event = self.send_with(&header, data);
        let VsockEvent::Data(outgoing) = event else {
            return event;
        };
        let ram = self.driver.memory.clone();
        assert_eq!(outgoing.copy_from(ram.ram(), 0), data);
        assert_eq!(outgoing.copy_from(ram.ram(), 1), data[1..]);
        self.vsock(|vsock, transport| vsock.taken(transport, outgoing));
        VsockEvent::Nothing
    }

    /// What the driver is told: packets and their data.
    fn told(&mut self) -> Vec<(Header, Vec<u8>)> {
        self.vsock(|vsock, transport| vsock.settle(transport, false));
        let used = self.driver.used(RECEIVE);
        let mut packets = Vec::new();
        for (_, length) in used {
            let at = self.buffers.pop_front().unwrap();
            let bytes = self.driver.bytes(at, length as usize);
            let header = Header::parse(bytes[..HEADER_SIZE].try_into().unwrap());
            assert_eq!(header.length as usize, bytes.len() - HEADER_SIZE);
            packets.push((header, bytes[HEADER_SIZE..].to_vec()));
        }
        packets
    }

    fn operations(&mut self) -> Vec<u16> {
        self.told().iter().map(|(header, _)| header.op).collect()
    }

    /// Lets bytes arrive for the guest, as an owner does; gives how many went.
    fn arrive(&mut self, bytes: &[u8]) -> Result<usize, Hold> {
        let memory = self.driver.memory.clone();
        self.vsock(|vsock, transport| {
            let buffers = vsock.take_buffers(transport, HOST_PORT)?;
            let mut rest = bytes;
            for segment in buffers.segments() {
                let (now, later) = rest.split_at(rest.len().min(segment.length as usize));
                let at = GuestAddress(segment.address);
                memory.ram().write_slice(now, at).unwrap();
                rest = later;
            }
            let filled = bytes.len() - rest.len();
            vsock.received(transport, buffers, filled);
            Ok(filled)
        })
    }
}

/// A packet of the guest's, on the connection of these tests.
fn packet(op: u16) -> Header {
    Header {
        source_cid: CID.into(),
        destination_cid: HOST_CID,
        source_port: GUEST_PORT,
        destination_port: HOST_PORT,
        kind: STREAM,
        op,
        buf_alloc: 1 << 20,
        ..Header::default()
    }
}

#[test]
fn the_configuration_is_the_guests_context_id() {
    let guest = Guest::new();
    let mut bytes = [0xff; 8];
    guest.device.device().read_config(0, &mut bytes);
    assert_eq!(bytes, [3, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn a_connection_is_asked_for_and_accepted() {
    let mut guest = Guest::with_buffers(2);
    assert!(guest.vsock(|vsock, _| vsock.connect(HOST_PORT, GUEST_PORT)));

    let asked = Header {
        source_cid: HOST_CID,
        destination_cid: CID.into(),
        source_port: HOST_PORT,
        destination_port: GUEST_PORT,
        kind: STREAM,
        op: op::REQUEST,
        buf_alloc: ROOM,
        ..Header::default()
    };
    assert_eq!(guest.told(), [(asked, vec![])]);
    let event = guest.send(&packet(op::RESPONSE));
    assert!(matches!(event, VsockEvent::Accepted(HOST_PORT)));
    // A second acceptance is one too many.
    let event = guest.send(&packet(op::RESPONSE));
    assert!(matches!(event, VsockEvent::Reset(HOST_PORT)));
}

#[test]
fn a_refused_connection_is_no_more_and_is_not_answered() {
    let mut guest = Guest::with_buffers(2);
    guest.vsock(|vsock, _| vsock.connect(HOST_PORT, GUEST_PORT));
    assert_eq!(guest.operations(), [op::REQUEST]);

    let event = guest.send(&packet(op::RST));

    assert!(matches!(event, VsockEvent::Reset(HOST_PORT)));
    assert!(!guest.device.device().has(HOST_PORT));
    assert_eq!(guest.operations(), NONE);
}

#[test]
fn a_connection_waits_for_the_driver_and_for_its_reset() {
    let mut guest = Guest::new();
    guest.vsock(|vsock, _| vsock.connect(HOST_PORT, GUEST_PORT));
    guest.vsock(|vsock, transport| assert!(!vsock.settle(transport, false)));

    guest.start();
    assert_eq!(guest.operations(), NONE);
    guest.give(1);

    assert_eq!(guest.operations(), [op::REQUEST]);
}

#[test]
fn one_that_leaves_before_the_driver_knew_leaves_nothing() {
    let mut guest = Guest::new();
    for _ in 0..3 * MAX_CONNECTIONS {
        assert!(guest.vsock(|vsock, _| vsock.connect(HOST_PORT, GUEST_PORT)));
        guest.vsock(|vsock, _| vsock.close(HOST_PORT));
    }
    let (vsock, _) = guest.device.parts();
    assert_eq!((vsock.talkers.len(), vsock.resets.len()), (0, 0));
}

#[test]
fn there_are_so_many_connections_and_no_more() {
    let mut guest = Guest::new();
    let (vsock, _) = guest.device.parts();
    for port in 0..MAX_CONNECTIONS as u32 {
        assert!(vsock.connect(port, GUEST_PORT));
    }
    assert!(!vsock.connect(HOST_PORT, GUEST_PORT));

    vsock.close(7);

    assert!(!vsock.connect(8, GUEST_PORT), "taken");
    assert!(vsock.connect(HOST_PORT, GUEST_PORT));
}

#[test]
fn data_to_the_guest_fills_several_buffers_and_unused_ones_come_next() {
    let mut guest = Guest::connected(6, 1 << 20);
    let part = BUFFER as usize - HEADER_SIZE;
    let bytes: Vec<u8> = (0..part + 10).map(|i| i as u8).collect();

    assert_eq!(guest.arrive(&bytes), Ok(bytes.len()));
    assert_eq!(guest.arrive(b"more"), Ok(4));

    let told = guest.told();
    let data: Vec<_> = told
        .iter()
        .map(|(header, data)| (header.op, &**data))
        .collect();
    let expected: [&[u8]; 3] = [&bytes[..part], &bytes[part..], b"more"];
    assert_eq!(data, expected.map(|bytes| (op::RW, bytes)));
    assert_eq!(guest.arrive(&[]), Ok(0));
    assert_eq!(guest.operations(), NONE);
}

#[test]
fn no_more_is_sent_than_the_guest_has_room_for() {
    let mut guest = Guest::connected(8, 100);
    assert_eq!(guest.arrive(&[1; 500]), Ok(100));
    assert_eq!(guest.arrive(&[1; 500]), Err(Hold::Credit));
    assert_eq!(guest.arrive(&[1; 500]), Err(Hold::Credit));
    // It is asked once.
    assert_eq!(guest.operations(), [op::RW, op::CREDIT_REQUEST]);

    let update = Header {
        buf_alloc: 100,
        fwd_cnt: 60,
        ..packet(op::CREDIT_UPDATE)
    };
    let event = guest.send(&update);

    assert!(matches!(event, VsockEvent::Credit(HOST_PORT)));
    assert_eq!(guest.arrive(&[1; 500]), Ok(60));
    assert_eq!(guest.arrive(&[1; 500]), Err(Hold::Credit));
}

#[test]
fn counts_that_make_no_sense_leave_no_credit() {
    let mut guest = Guest::connected(4, 100);
    assert_eq!(guest.arrive(&[1; 10]), Ok(10));
    // More has left its room than was ever sent.
    let update = Header {
        buf_alloc: 100,
        fwd_cnt: 11,
        ..packet(op::CREDIT_UPDATE)
    };
    guest.send(&update);
    assert_eq!(guest.arrive(&[1; 10]), Err(Hold::Credit));
}

#[test]
fn without_buffers_nothing_is_sent() {
    let mut guest = Guest::connected(1, 100);
    assert_eq!(guest.arrive(b"x"), Err(Hold::Buffers));
    guest.give(1);
    assert_eq!(guest.arrive(b"x"), Ok(1));
}

#[test]
fn data_of_the_guests_is_where_it_lies_and_its_credit_is_told_when_half_is_gone() {
    let mut guest = Guest::connected(4, 0);
    let data = vec![7; MAX_DATA as usize];
    for _ in 0..ROOM / MAX_DATA {
        assert!(matches!(guest.send_data(&data), VsockEvent::Nothing));
    }
    assert_eq!(guest.operations(), NONE, "nothing was passed on yet");

    guest.vsock(|vsock, _| vsock.forwarded(HOST_PORT, MAX_DATA));

    let told = guest.told();
    assert_eq!(told.len(), 1);
    assert_eq!(
        (told[0].0.op, told[0].0.fwd_cnt),
        (op::CREDIT_UPDATE, MAX_DATA)
    );
    assert!(matches!(guest.send_data(&data), VsockEvent::Nothing));
}

#[test]
fn data_without_credit_ends_the_connection() {
    let mut guest = Guest::connected(4, 0);
    let data = vec![7; MAX_DATA as usize];
    for _ in 0..ROOM / MAX_DATA {
        guest.send_data(&data);
    }

    let event = guest.send_data(b"x");

    assert!(matches!(event, VsockEvent::Reset(HOST_PORT)));
    assert_eq!(guest.operations(), [op::RST]);
}

#[test]
fn a_guest_that_asks_for_credit_is_told() {
    let mut guest = Guest::connected(4, 0);
    guest.send(&packet(op::CREDIT_REQUEST));
    let told = guest.told();
    assert_eq!(
        (told[0].0.op, told[0].0.buf_alloc),
        (op::CREDIT_UPDATE, ROOM)
    );
}

#[test]
fn ends_go_both_ways_one_by_one() {
    let mut guest = Guest::connected(4, 0);
    guest.vsock(|vsock, _| vsock.end(HOST_PORT, Shutdown::SEND));
    let told = guest.told();
    assert_eq!((told[0].0.op, told[0].0.flags), (op::SHUTDOWN, 2));
    // Not twice.
    guest.vsock(|vsock, _| vsock.end(HOST_PORT, Shutdown::SEND));
    assert_eq!(guest.operations(), NONE);

    let end = |flags| Header {
        flags,
        ..packet(op::SHUTDOWN)
    };
    let event = guest.send(&end(2));
    assert!(matches!(
        event,
        VsockEvent::Ended(HOST_PORT, Shutdown::SEND)
    ));
    let event = guest.send(&end(1));

    assert!(matches!(event, VsockEvent::Over(HOST_PORT)));
    assert_eq!(guest.operations(), [op::RST]);
    assert!(!guest.device.device().has(HOST_PORT));
}

#[test]
fn data_behind_its_end_breaks_the_rules() {
    let mut guest = Guest::connected(4, 0);
    guest.send(&Header {
        flags: 2,
        ..packet(op::SHUTDOWN)
    });
    assert!(matches!(guest.send_data(b"x"), VsockEvent::Reset(_)));
}

#[test]
fn a_reset_behind_the_guests_end_loses_nothing() {
    let mut guest = Guest::connected(4, 0);
    guest.send(&Header {
        flags: 2,
        ..packet(op::SHUTDOWN)
    });
    let event = guest.send(&packet(op::RST));
    assert!(matches!(event, VsockEvent::Over(HOST_PORT)));
}

#[test]
fn what_belongs_to_no_connection_is_reset_once_and_resets_are_not() {
    let mut guest = Guest::with_buffers(16);
    let request = Header {
        destination_port: 1024,
        ..packet(op::REQUEST)
    };
    for wrong in [
        request,
        packet(op::RW),
        packet(99),
        Header {
            kind: 2,
            ..packet(op::REQUEST)
        },
    ] {
        assert!(matches!(guest.send(&wrong), VsockEvent::Nothing));
        assert_eq!(guest.told(), [(wrong.refusal(), vec![])]);
    }
    for _ in 0..1000 {
        guest.send(&packet(op::RST));
        guest.driver.used(TRANSMIT);
        assert_eq!(guest.operations(), NONE);
    }
}

#[test]
fn packets_that_are_not_from_the_guest_or_for_the_host_are_dropped() {
    let mut guest = Guest::connected(4, 0);
    for wrong in [
        Header {
            source_cid: 4,
            ..packet(op::RST)
        },
        Header {
            destination_cid: 1,
            ..packet(op::RST)
        },
    ] {
        assert!(matches!(guest.send(&wrong), VsockEvent::Nothing));
    }
    assert_eq!(guest.operations(), NONE);
    assert!(guest.device.device().has(HOST_PORT));
}

#[test]
fn packets_that_make_no_sense_end_their_connection() {
    let long = Header {
        length: 10,
        ..packet(op::RW)
    };
    for wrong in [packet(0), packet(8), packet(op::REQUEST), long] {
        let mut guest = Guest::connected(4, 0);
        assert!(matches!(guest.send(&wrong), VsockEvent::Reset(HOST_PORT)));
        assert_eq!(guest.operations(), [op::RST]);
    }
    // Not even a header.
    let mut guest = Guest::connected(4, 0);
    let short = guest.driver.place(&[3; HEADER_SIZE - 1]);
    guest.driver.offer(TRANSMIT, &[short], &[]);
    let event = guest.vsock(Vsock::next_event);
    assert!(matches!(event, Some(VsockEvent::Nothing)));
}

#[test]
fn a_guest_that_reads_no_answers_is_not_listened_to() {
    let mut guest = Guest::with_buffers(0);
    for _ in 0..MAX_RESETS {
        let bytes = guest.driver.place(&packet(op::RW).bytes());
        guest.driver.offer(TRANSMIT, &[bytes], &[]);
        assert!(guest.vsock(Vsock::next_event).is_some());
    }
    let bytes = guest.driver.place(&packet(op::RW).bytes());
    guest.driver.offer(TRANSMIT, &[bytes], &[]);
    assert!(guest.vsock(Vsock::next_event).is_none());
    assert!(!guest.vsock(|vsock, transport| vsock.settle(transport, false)));

    guest.give(1);

    assert_eq!(guest.operations(), [op::RST]);
    assert!(guest.vsock(Vsock::next_event).is_some());
}

#[test]
fn a_receive_buffer_without_room_for_data_is_a_fault_of_the_drivers() {
    let mut guest = Guest::connected(1, 100);
    let at = guest.driver.allocate(64);
    guest
        .driver
        .offer(RECEIVE, &[], &[(at, HEADER_SIZE as u32)]);
    assert_eq!(guest.arrive(b"x"), Err(Hold::Buffers));
    assert!(!guest.device.parts().1.running());
}

#[test]
fn a_reset_of_the_device_ends_all_connections_but_those_that_wait() {
    let mut guest = Guest::connected(4, 100);
    let waiting = HOST_PORT + 1;
    guest.vsock(|vsock, _| vsock.take_reset());
    guest.vsock(|vsock, _| vsock.connect(waiting, GUEST_PORT));

    write(&mut guest.device, common::DEVICE_STATUS, &[0]);

    let (vsock, _) = guest.device.parts();
    assert!(vsock.take_reset() && !vsock.take_reset());
    assert!(!vsock.has(HOST_PORT) && vsock.has(waiting));
    guest.start();
    guest.give(2);
    let told = guest.told();
    assert_eq!(told.len(), 1);
    assert_eq!(
        (told[0].0.op, told[0].0.source_port),
        (op::REQUEST, waiting)
    );
}
