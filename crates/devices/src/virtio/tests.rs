//! The transport and the queues as a driver sees them, on the simplest device there is.

use super::testing::{self, Driver, MEMORY_SIZE, MSI_ADDRESS, read_u8, read_u16, read_u32, write};
use super::*;
use crate::pci::{Msi, PciFunction, register};
use crate::virtio::feature::{EVENT_IDX, INDIRECT_DESC, VERSION_1};

fn device() -> (Driver, VirtioPci<Entropy>) {
    let driver = Driver::new(MEMORY_SIZE);
    let device = VirtioPci::new(Entropy, driver.memory.clone());
    (driver, device)
}

fn started(features: u64) -> (Driver, VirtioPci<Entropy>) {
    let (mut driver, mut device) = device();
    driver.start(&mut device, features);
    device.take_events();
    (driver, device)
}

fn status(device: &mut VirtioPci<Entropy>) -> DeviceStatus {
    DeviceStatus::from_bits_retain(read_u8(device, common::DEVICE_STATUS))
}

fn needs_reset(device: &mut VirtioPci<Entropy>) -> bool {
    status(device).contains(DeviceStatus::DEVICE_NEEDS_RESET)
}

/// Serves one request; returns the bytes asked for.
fn serve(device: &mut VirtioPci<Entropy>) -> Option<usize> {
    let (entropy, transport) = device.parts();
    let request = entropy.next_request(transport)?;
    let length = request.length();
    entropy.complete(transport, request, &vec![1; length]);
    Some(length)
}

fn message(vector: u32) -> Msi {
    Msi {
        address: MSI_ADDRESS,
        data: vector,
    }
}

#[test]
fn features_without_version_1_are_not_accepted() {
    let (_, mut device) = device();
    write(&mut device, common::DEVICE_STATUS, &[3]);

    write(&mut device, common::DEVICE_STATUS, &[11]);

    assert_eq!(status(&mut device).bits(), 3);
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    let (_, mut device) = device();
    write(&mut device, common::DEVICE_STATUS, &[3]);
    write(&mut device, common::DRIVER_FEATURE, &1_u32.to_le_bytes());
    write(
        &mut device,
        common::DRIVER_FEATURE_SELECT,
        &1_u32.to_le_bytes(),
    );
    write(&mut device, common::DRIVER_FEATURE, &1_u32.to_le_bytes());

    write(&mut device, common::DEVICE_STATUS, &[11]);

    assert_eq!(status(&mut device).bits(), 3);
}

#[test]
fn a_driver_is_not_ready_before_its_features_are_agreed() {
    let (_, mut device) = device();

    write(&mut device, common::DEVICE_STATUS, &[7]);

    assert!(!status(&mut device).contains(DeviceStatus::DRIVER_OK));
}

#[test]
fn starting_notifies_all_queues_once() {
    let (mut driver, mut device) = device();

    driver.start(&mut device, u64::MAX);

    assert_eq!(device.take_events().notified, 1);
    assert_eq!(device.take_events().notified, 0);
}

#[test]
fn a_notification_names_its_queue() {
    let (_, mut device) = started(u64::MAX);

    device.bar_write(0, bar::NOTIFY, &[0, 0]);
    assert_eq!(device.take_events().notified, 1);

    device.bar_write(0, bar::NOTIFY + 4, &[1, 0]);
    assert_eq!(device.take_events().notified, 0);
}

#[test]
fn a_vector_that_does_not_exist_reads_back_as_none() {
    let (_, mut device) = device();

    write(&mut device, common::QUEUE_MSIX_VECTOR, &2_u16.to_le_bytes());

    assert_eq!(read_u16(&mut device, common::QUEUE_MSIX_VECTOR), NO_VECTOR);
}

#[test]
fn a_queue_that_does_not_exist_has_size_zero() {
    let (_, mut device) = device();
    write(&mut device, common::QUEUE_SELECT, &1_u16.to_le_bytes());

    assert_eq!(read_u16(&mut device, common::QUEUE_SIZE), 0);
    write(&mut device, common::QUEUE_ENABLE, &[1, 0]);
    assert_eq!(read_u16(&mut device, common::QUEUE_ENABLE), 0);
}

#[test]
fn a_queue_outside_memory_breaks_the_device() {
    let (_, mut device) = device();
    write(
        &mut device,
        common::DRIVER_FEATURE_SELECT,
        &1_u32.to_le_bytes(),
    );
    write(&mut device, common::DRIVER_FEATURE, &1_u32.to_le_bytes());
    write(&mut device, common::DEVICE_STATUS, &[11]);
    for field in [
        common::QUEUE_DESC,
        common::QUEUE_DRIVER,
        common::QUEUE_DEVICE,
    ] {
        write(&mut device, field, &(MEMORY_SIZE as u32 - 64).to_le_bytes());
    }

    write(&mut device, common::QUEUE_ENABLE, &[1, 0]);

    assert_eq!(read_u16(&mut device, common::QUEUE_ENABLE), 0);
    assert!(needs_reset(&mut device));
}

#[test]
fn without_event_idx_the_drivers_flag_suppresses_interrupts() {
    let (mut driver, mut device) = started(VERSION_1);
    let buffer = (driver.allocate(4), 4);
    driver.offer(0, &[], &[buffer]);
    driver.offer(0, &[], &[buffer]);

    driver.set_available_flags(0, 1);
    assert_eq!(serve(&mut device), Some(4));
    assert!(device.take_events().messages.is_empty());

    driver.set_available_flags(0, 0);
    assert_eq!(serve(&mut device), Some(4));
    assert_eq!(device.take_events().messages, [message(1)]);
}

#[test]
fn with_event_idx_an_interrupt_comes_when_the_index_is_passed() {
    let (mut driver, mut device) = started(VERSION_1 | EVENT_IDX);
    let buffer = (driver.allocate(4), 4);
    for _ in 0..3 {
        driver.offer(0, &[], &[buffer]);
    }
    driver.set_used_event(0, 1);

    let sent: Vec<_> = (0..3)
        .map(|_| {
            serve(&mut device).unwrap();
            device.take_events().messages.len()
        })
        .collect();

    assert_eq!(sent, [0, 1, 0]);
}

#[test]
fn rearming_tells_of_chains_that_came_meanwhile() {
    let (mut driver, mut device) = started(u64::MAX);
    let (_, transport) = device.parts();
    assert!(transport.pop(0).is_none());
    assert!(!transport.rearm(0));
    let buffer = (driver.allocate(4), 4);

    driver.offer(0, &[], &[buffer]);

    assert!(transport.rearm(0));
    assert!(transport.pop(0).is_some());
}

#[test]
fn an_indirect_table_gives_its_buffers() {
    let (mut driver, mut device) = started(VERSION_1 | INDIRECT_DESC);
    let buffer = driver.allocate(64);
    let mut table = Vec::new();
    for (index, next) in [(0_u64, 1_u16), (1, 0)] {
        table.extend((buffer + 16 * index).to_le_bytes());
        table.extend(16_u32.to_le_bytes());
        table.extend((2 | next).to_le_bytes());
        table.extend(next.to_le_bytes());
    }
    let table = driver.place(&table);
    driver.set_descriptor(0, 0, table, 4, 0);
    driver.make_available(0, 0);

    assert_eq!(serve(&mut device), Some(32));

    assert_eq!(driver.used(0), [(0, 32)]);
}

#[test]
fn broken_chains_ask_for_a_reset_and_tell_the_driver() {
    // (descriptor 0: address, length, flags, next), (descriptor 1)
    let readable_last = [((0x20_0000, 4), 2 | 1, 1), ((0x20_0000, 4), 0, 0)];
    let endless = [((0x20_0000, 4), 2 | 1, 1), ((0x20_0000, 4), 2 | 1, 0)];
    let next_outside = [((0x20_0000, 4), 2 | 1, 300), ((0, 0), 0, 0)];
    let buffer_outside = [((MEMORY_SIZE - 2, 4), 2, 0), ((0, 0), 0, 0)];
    let buffer_wraps = [((u64::MAX - 1, 4), 2, 0), ((0, 0), 0, 0)];
    let odd_table = [((0x20_0000, 15), 4, 0), ((0, 0), 0, 0)];
    let table_outside = [((MEMORY_SIZE, 16), 4, 0), ((0, 0), 0, 0)];
    for chain in [
        readable_last,
        endless,
        next_outside,
        buffer_outside,
        buffer_wraps,
        odd_table,
        table_outside,
    ] {
        let (mut driver, mut device) = started(u64::MAX);
        for (index, (buffer, flags, next)) in chain.into_iter().enumerate() {
            driver.set_descriptor(0, index as u16, buffer, flags, next);
        }
        driver.make_available(0, 0);

        assert_eq!(serve(&mut device), None, "{chain:?}");

        assert!(needs_reset(&mut device), "{chain:?}");
        assert_eq!(device.take_events().messages, [message(0)], "{chain:?}");
    }
}

#[test]
fn an_available_index_too_far_ahead_asks_for_a_reset() {
    let (driver, mut device) = started(u64::MAX);

    driver.set_available_index(0, 257);

    assert_eq!(serve(&mut device), None);
    assert!(needs_reset(&mut device));
}

#[test]
fn a_reset_starts_afresh() {
    let (driver, mut device) = started(u64::MAX);
    driver.set_available_index(0, 999);
    serve(&mut device);
    assert!(needs_reset(&mut device));

    write(&mut device, common::DEVICE_STATUS, &[0]);

    assert!(device.take_events().reset);
    assert!(status(&mut device).is_empty());
    assert_eq!(read_u16(&mut device, common::QUEUE_ENABLE), 0);
    assert_eq!(read_u32(&mut device, common::QUEUE_DESC), 0);
    let (mut driver, buffer) = (driver, 0x20_0000);
    driver.start(&mut device, u64::MAX);
    driver.offer(0, &[], &[(buffer, 4)]);
    assert_eq!(serve(&mut device), Some(4));
}

#[test]
fn a_reset_is_not_seen_before_the_last_request_is_back() {
    let (mut driver, mut device) = started(u64::MAX);
    let buffer = driver.allocate(4);
    driver.offer(0, &[], &[(buffer, 4)]);
    let (entropy, transport) = device.parts();
    let entropy = *entropy;
    let request = entropy.next_request(transport).unwrap();

    write(&mut device, common::DEVICE_STATUS, &[0]);
    assert!(!status(&mut device).is_empty());
    assert!(device.parts().1.pop(0).is_none());

    entropy.complete(device.parts().1, request, &[1; 4]);
    assert!(status(&mut device).is_empty());
    assert!(driver.used(0).is_empty());
}

#[test]
fn the_isr_is_set_only_without_msix_and_cleared_by_reading() {
    let (mut driver, mut device) = started(VERSION_1);
    let buffer = driver.allocate(4);
    let msix = testing::find_capability(&mut device, crate::pci::Msix::CAPABILITY_ID).unwrap();
    device.config_write(msix + 2, &[0, 0]);
    driver.offer(0, &[], &[(buffer, 4)]);
    serve(&mut device);
    device.parts().1.config_changed();
    assert!(device.take_events().messages.is_empty());

    let mut isr = [[0_u8]; 2];
    for isr in &mut isr {
        device.bar_read(0, bar::ISR, isr);
    }

    assert_eq!(isr, [[3], [0]]);
}

#[test]
fn a_change_of_configuration_moves_the_generation_and_interrupts() {
    let (_, mut device) = started(u64::MAX);

    device.parts().1.config_changed();

    assert_eq!(read_u8(&mut device, common::CONFIG_GENERATION), 1);
    assert_eq!(device.take_events().messages, [message(0)]);
}

#[test]
fn the_capabilities_lead_to_the_structures() {
    let (_, mut device) = device();
    let mut found = Vec::new();
    let mut at = [0];
    device.config_read(register::CAPABILITIES, &mut at);
    while at[0] != 0 {
        let mut capability = [0; 16];
        device.config_read(u16::from(at[0]), &mut capability);
        if capability[0] == 9 {
            let offset = u32::from_le_bytes(capability[8..12].try_into().unwrap());
            found.push((capability[3], u64::from(offset)));
        }
        at[0] = capability[1];
    }

    let expected = [
        (1, bar::COMMON),
        (3, bar::ISR),
        (4, bar::DEVICE),
        (2, bar::NOTIFY),
        (5, 0),
    ];
    assert_eq!(found, expected);
}

#[test]
fn the_bar_is_reached_through_configuration_space() {
    let (_, mut device) = device();
    let mut access = testing::find_capability(&mut device, 9).unwrap();
    loop {
        let mut head = [0; 4];
        device.config_read(access, &mut head);
        if head[3] == 5 {
            break;
        }
        access = u16::from(head[1]);
    }
    let at = (bar::COMMON + common::DEVICE_STATUS) as u32;
    device.config_write(access + 8, &at.to_le_bytes());
    device.config_write(access + 12, &1_u32.to_le_bytes());

    device.config_write(access + 16, &[1]);

    assert_eq!(status(&mut device), DeviceStatus::ACKNOWLEDGE);
    let mut data = [0; 4];
    device.config_read(access + 16, &mut data);
    assert_eq!(data, [1, 0, 0, 0]);
}
