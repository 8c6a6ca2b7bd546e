use super::*;
use crate::virtio::testing::{Driver, MEMORY_SIZE};
use crate::virtio::{DeviceStatus, VirtioPci};

const SECTORS: u64 = 64;

fn disk(read_only: bool) -> (Driver, VirtioPci<Block>) {
    let mut driver = Driver::new(MEMORY_SIZE);
    let config = BlockConfig {
        sectors: SECTORS,
        read_only,
        queues: 2,
        id: "disk0".into(),
    };
    let mut device = VirtioPci::new(Block::new(config), driver.memory.clone());
    driver.start(&mut device, u64::MAX);
    (driver, device)
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(count.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

/// Offers a request and returns what the device makes of it.
fn request(
    driver: &mut Driver,
    device: &mut VirtioPci<Block>,
    header: &[u8],
    payload: &[u8],
    room: u32,
) -> Request {
    let mut readable = vec![driver.place(header)];
    if !payload.is_empty() {
        readable.push(driver.place(payload));
    }
    let mut writable = Vec::new();
    if room > 0 {
        writable.push((driver.allocate(room.into()), room));
    }
    writable.push((driver.allocate(1), 1));
    driver.offer(1, &readable, &writable);
    let (block, transport) = device.parts();
    block.next_request(transport, 1).unwrap()
}

fn action(header: &[u8], payload: &[u8], room: u32) -> Action {
    let (mut driver, mut device) = disk(false);
    request(&mut driver, &mut device, header, payload, room).action
}

#[test]
fn a_read_names_the_place_and_the_buffers() {
    let (mut driver, mut device) = disk(false);

    let read = request(&mut driver, &mut device, &header(kind::IN, 3), &[], 1024);

    let Action::Read {
        offset: 1536,
        buffers,
    } = &read.action
    else {
        panic!("{read:?}")
    };
    assert_eq!(buffers.iter().map(|b| b.length).sum::<u32>(), 1024);
}

#[test]
fn a_status_in_the_same_buffer_as_the_data_is_its_last_byte() {
    let (mut driver, mut device) = disk(false);
    let header = driver.place(&header(kind::IN, 0));
    let buffer = driver.allocate(513);
    driver.offer(0, &[header], &[(buffer, 513)]);
    let (block, transport) = device.parts();

    let read = block.next_request(transport, 0).unwrap();
    let buffers = vec![Segment {
        address: buffer,
        length: 512,
    }];
    assert_eq!(read.action, Action::Read { offset: 0, buffers });
    block.complete(transport, 0, read, Status::Unsupported);

    assert_eq!(driver.bytes(buffer + 512, 1), [2]);
    assert_eq!(driver.used(0), [(0, 513)]);
}

#[test]
fn a_header_split_over_buffers_and_joined_with_data_is_understood() {
    let (mut driver, mut device) = disk(false);
    let mut bytes = header(kind::OUT, 1);
    bytes.extend([0x5a; 512]);
    let (start, _) = driver.place(&bytes);
    let status = driver.allocate(1);
    driver.offer(0, &[(start, 7), (start + 7, 521)], &[(status, 1)]);
    let (block, transport) = device.parts();

    let write = block.next_request(transport, 0).unwrap();

    let buffers = vec![Segment {
        address: start + 16,
        length: 512,
    }];
    assert_eq!(
        write.action,
        Action::Write {
            offset: 512,
            buffers,
            durable: false
        }
    );
}

#[test]
fn requests_past_the_end_are_io_errors() {
    let error = Action::Answer(Status::IoError);
    assert_eq!(action(&header(kind::IN, SECTORS - 1), &[], 1024), error);
    assert_eq!(action(&header(kind::OUT, SECTORS), &[0; 512], 0), error);
    assert_eq!(action(&header(kind::IN, u64::MAX), &[], 512), error);
    assert_eq!(
        action(&header(kind::DISCARD, 0), &range(SECTORS - 1, 2, 0), 0),
        error
    );
    assert_eq!(
        action(&header(kind::WRITE_ZEROES, 0), &range(u64::MAX, 2, 0), 0),
        error
    );
}

#[test]
fn partial_sectors_are_io_errors() {
    let error = Action::Answer(Status::IoError);
    assert_eq!(action(&header(kind::IN, 0), &[], 511), error);
    assert_eq!(action(&header(kind::OUT, 0), &[0; 513], 0), error);
    assert_eq!(action(&header(kind::DISCARD, 0), &[0; 15], 0), error);
}

#[test]
fn unknown_kinds_and_flags_are_unsupported() {
    let unsupported = Action::Answer(Status::Unsupported);
    assert_eq!(action(&header(99, 0), &[], 0), unsupported);
    assert_eq!(
        action(&header(kind::DISCARD, 0), &range(0, 1, 1), 0),
        unsupported
    );
    assert_eq!(
        action(&header(kind::WRITE_ZEROES, 0), &range(0, 1, 2), 0),
        unsupported
    );
}

#[test]
fn a_header_cut_short_is_an_io_error() {
    assert_eq!(action(&[0; 15], &[], 512), Action::Answer(Status::IoError));
}

#[test]
fn discard_and_write_zeroes_name_their_ranges() {
    let discarded = SectorRange {
        offset: 4096,
        length: 1024,
        may_unmap: false,
    };
    let zeroed = SectorRange {
        offset: 512,
        length: 512,
        may_unmap: true,
    };
    let two = [range(8, 2, 0), range(8, 2, 0)].concat();

    assert_eq!(
        action(&header(kind::DISCARD, 0), &two, 0),
        Action::Discard(vec![discarded, discarded])
    );
    assert_eq!(
        action(&header(kind::WRITE_ZEROES, 0), &range(1, 1, 1), 0),
        Action::WriteZeroes {
            ranges: vec![zeroed],
            durable: false
        }
    );
}

#[test]
fn a_read_only_disk_refuses_to_change_and_says_so_in_its_features() {
    let (mut driver, mut device) = disk(true);
    assert_ne!(device.device().features() & feature::RO, 0);
    assert_eq!(
        device.device().features() & (feature::DISCARD | feature::WRITE_ZEROES),
        0
    );
    for (kind, payload) in [
        (kind::OUT, vec![0; 512]),
        (kind::DISCARD, range(0, 1, 0)),
        (kind::WRITE_ZEROES, range(0, 1, 0)),
    ] {
        let refused = request(&mut driver, &mut device, &header(kind, 0), &payload, 0);
        assert_eq!(refused.action, Action::Answer(Status::IoError));
        let (block, transport) = device.parts();
        block.complete(transport, 1, refused, Status::IoError);
    }
}

#[test]
fn the_id_is_answered_without_the_owner() {
    let (mut driver, mut device) = disk(false);
    let header = driver.place(&header(kind::GET_ID, 0));
    let buffer = driver.allocate(21);
    driver.offer(0, &[header], &[(buffer, 21)]);
    let (block, transport) = device.parts();

    let request = block.next_request(transport, 0).unwrap();

    assert_eq!(request.action, Action::Answer(Status::Ok));
    assert_eq!(driver.bytes(buffer, 6), b"disk0\0");
}

#[test]
fn turning_the_write_cache_off_makes_writes_durable() {
    let (mut driver, mut device) = disk(false);
    device.parts().0.write_config(CONFIG_WRITEBACK, &[0]);

    let write = request(
        &mut driver,
        &mut device,
        &header(kind::OUT, 0),
        &[0; 512],
        0,
    );

    assert!(matches!(write.action, Action::Write { durable: true, .. }));
}

#[test]
fn a_driver_that_cannot_flush_gets_write_through() {
    let mut driver = Driver::new(MEMORY_SIZE);
    let config = BlockConfig {
        sectors: 8,
        read_only: false,
        queues: 2,
        id: String::new(),
    };
    let mut device = VirtioPci::new(Block::new(config), driver.memory.clone());
    driver.start(&mut device, crate::virtio::feature::VERSION_1);

    let write = request(
        &mut driver,
        &mut device,
        &header(kind::OUT, 0),
        &[0; 512],
        0,
    );

    assert!(matches!(write.action, Action::Write { durable: true, .. }));
}

#[test]
fn a_request_without_room_for_a_status_breaks_the_device() {
    let (mut driver, mut device) = disk(false);
    let header = driver.place(&header(kind::FLUSH, 0));
    driver.offer(0, &[header], &[]);
    let (block, transport) = device.parts();

    assert!(block.next_request(transport, 0).is_none());

    assert!(
        transport
            .status()
            .contains(DeviceStatus::DEVICE_NEEDS_RESET)
    );
}

#[test]
fn the_configuration_tells_capacity_and_queues() {
    let (_, device) = disk(false);
    let mut data = [0; 36];

    device.device().read_config(0, &mut data);

    assert_eq!(data[..8], SECTORS.to_le_bytes());
    assert_eq!(data[12..16], 254_u32.to_le_bytes());
    assert_eq!(data[34..], [2, 0]);
}
