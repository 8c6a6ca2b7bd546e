use super::*;
use crate::virtio::VirtioPci;
use crate::virtio::testing::{Driver, MEMORY_SIZE};

const MERGEABLE: u64 = u64::MAX;
const PLAIN: u64 = !feature::MRG_RXBUF;

fn card(features: u64) -> (Driver, VirtioPci<Net>) {
    let mut driver = Driver::new(MEMORY_SIZE);
    let config = NetConfig {
        mac: [2, 0, 0, 0, 0, 9],
        mtu: 1500,
    };
    let mut device = VirtioPci::new(Net::new(config), driver.memory.clone());
    driver.start(&mut device, features);
    (driver, device)
}

/// Lets `bytes` arrive, as an owner does.
fn arrive(driver: &Driver, device: &mut VirtioPci<Net>, bytes: &[u8]) -> Buffers {
    let (net, transport) = device.parts();
    let mut held = Buffers::default();
    net.take_buffers(transport, &mut held);
    let mut rest = bytes;
    for segment in held.segments() {
        let (now, later) = rest.split_at(rest.len().min(segment.length as usize));
        let at = strata_memory::GuestAddress(segment.address);
        strata_memory::Bytes::write_slice(driver.memory.ram(), now, at).unwrap();
        rest = later;
    }
    assert!(rest.is_empty());
    net.received(transport, &mut held, bytes.len());
    held
}

#[test]
fn the_configuration_has_address_link_and_mtu() {
    let (_, mut device) = card(MERGEABLE);
    let mut bytes = [0; 12];
    device.device().read_config(0, &mut bytes);
    assert_eq!(bytes, [2, 0, 0, 0, 0, 9, 1, 0, 1, 0, 0xdc, 5]);

    let (net, transport) = device.parts();
    net.set_link(transport, false);
    net.read_config(0, &mut bytes);
    assert_eq!(bytes[6], 0);
    assert!(!device.take_events().messages.is_empty());
}

#[test]
fn what_the_driver_accepts_is_told_once() {
    let (mut driver, mut device) = card(MERGEABLE);
    let all = Accepts {
        checksum: true,
        tso4: true,
        tso6: true,
    };
    let (net, _) = device.parts();
    assert_eq!(net.take_accepts(), Some(all));
    assert_eq!(net.take_accepts(), None);

    driver.start(&mut device, !feature::GUEST_CSUM);
    assert_eq!(device.parts().0.take_accepts(), Some(Accepts::default()));
}

#[test]
fn a_frame_is_sent_from_where_it_lies() {
    let (mut driver, mut device) = card(MERGEABLE);
    let header = driver.place(&[0; HEADER_SIZE]);
    let frame = driver.place(&[7; 60]);
    let head = driver.offer(TRANSMIT, &[header, frame], &[]);

    let (net, transport) = device.parts();
    let outgoing = net.next_frame(transport).unwrap();
    let expected = [header, frame].map(|(address, length)| Segment { address, length });
    assert_eq!(outgoing.buffers(), expected);
    net.sent(transport, outgoing);

    assert_eq!(driver.used(TRANSMIT), [(u32::from(head), 0)]);
}

#[test]
fn what_is_no_frame_is_dropped() {
    let (mut driver, mut device) = card(MERGEABLE);
    let short = driver.place(&[0; HEADER_SIZE + ETHERNET_HEADER - 1]);
    driver.offer(TRANSMIT, &[short], &[]);
    let long = (driver.allocate(70_000), 70_000);
    driver.offer(TRANSMIT, &[long], &[]);

    let (net, transport) = device.parts();
    assert!(net.next_frame(transport).is_none());

    assert_eq!(driver.used(TRANSMIT).len(), 2);
}

#[test]
fn a_large_frame_takes_several_buffers_and_says_how_many() {
    let (mut driver, mut device) = card(MERGEABLE);
    let buffers: Vec<_> = (0..4).map(|_| driver.allocate(100)).collect();
    let heads: Vec<_> = buffers
        .iter()
        .map(|at| u32::from(driver.offer(RECEIVE, &[], &[(*at, 100)])))
        .collect();
    let bytes: Vec<u8> = (0..250).map(|i| i as u8).collect();

    let mut held = arrive(&driver, &mut device, &bytes);

    let used = [(heads[0], 100), (heads[1], 100), (heads[2], 50)];
    assert_eq!(driver.used(RECEIVE), used);
    assert_eq!(driver.bytes(buffers[0] + NUM_BUFFERS, 2), [3, 0]);
    assert_eq!(driver.bytes(buffers[2], 50), bytes[200..]);
    // The one that was not needed comes first next time.
    let (net, transport) = device.parts();
    assert_eq!(held.size(), 100);
    net.give_back(transport, &mut held);
    arrive(&driver, &mut device, &[1; 60]);
    assert_eq!(driver.used(RECEIVE), [(heads[3], 60)]);
}

#[test]
fn a_driver_without_mergeable_buffers_gets_a_frame_in_one() {
    let (mut driver, mut device) = card(PLAIN);
    for _ in 0..2 {
        let at = driver.allocate(2000);
        driver.offer(RECEIVE, &[], &[(at, 2000)]);
    }

    let held = arrive(&driver, &mut device, &[1; 1500]);

    assert_eq!(held.size(), 0);
    assert_eq!(driver.used(RECEIVE).len(), 1);
}

#[test]
fn an_interrupt_comes_if_any_of_several_buffers_was_waited_for() {
    for (event, expected) in [(0, true), (1, true), (2, true), (3, false)] {
        let (mut driver, mut device) = card(MERGEABLE);
        for _ in 0..3 {
            let at = driver.allocate(64);
            driver.offer(RECEIVE, &[], &[(at, 64)]);
        }
        device.take_events();
        driver.set_used_event(RECEIVE, event);

        arrive(&driver, &mut device, &[1; 180]);

        let messages = device.take_events().messages;
        assert_eq!(!messages.is_empty(), expected, "event {event}");
    }
}

#[test]
fn a_receive_buffer_without_room_for_a_header_stops_the_device() {
    let (mut driver, mut device) = card(MERGEABLE);
    let at = driver.allocate(64);
    driver.offer(RECEIVE, &[], &[(at, 11)]);

    let (net, transport) = device.parts();
    let mut held = Buffers::default();
    net.take_buffers(transport, &mut held);

    assert!(!transport.running());
}
