//! Drivers that do random things. Nothing may panic, and after a reset the device is as
//! good as new.

use strata_memory::{Bytes, GuestAddress, GuestMemory};

use super::testing::{Driver, MEMORY_SIZE, ring, write};
use super::*;
use crate::pci::PciFunction;

/// xorshift64*: enough to stir with, and the same on every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 16) % limit
    }

    /// A value of the kind that finds mistakes: small, at an edge, or anything.
    fn odd(&mut self) -> u64 {
        match self.below(6) {
            0 => self.below(4),
            1 => 1 << self.below(64),
            2 => (1_u64 << self.below(64)).wrapping_sub(1),
            3 => MEMORY_SIZE.wrapping_sub(self.below(32)),
            4 => u64::MAX - self.below(16),
            _ => self.next(),
        }
    }
}

/// Lets the owner's side of a device do all it can.
trait Serve: VirtioDevice + Sized {
    /// Returns how much it has done, in any unit.
    fn serve(device: &mut VirtioPci<Self>, random: &mut Random) -> usize;

    /// Puts a chain on a queue that keeps the rules, mostly one that the device understands.
    fn offer(driver: &mut Driver, queue: usize, random: &mut Random) {
        proper_chain(driver, queue, random);
    }
}

impl Serve for Entropy {
    fn serve(device: &mut VirtioPci<Self>, _random: &mut Random) -> usize {
        let mut served = 0;
        let (entropy, transport) = device.parts();
        while let Some(request) = entropy.next_request(transport) {
            let bytes = vec![0; request.length()];
            entropy.complete(transport, request, &bytes);
            served += 1;
        }
        transport.rearm(0);
        served
    }
}

impl Serve for Block {
    fn serve(device: &mut VirtioPci<Self>, random: &mut Random) -> usize {
        let mut served = 0;
        let (block, transport) = device.parts();
        for queue in 0..3 {
            for _ in 0..random.below(300) {
                let Some(request) = block.next_request(transport, queue) else {
                    break;
                };
                if let Action::Read { offset, .. } | Action::Write { offset, .. } = request.action {
                    assert!(offset <= 64 * SECTOR_SIZE);
                }
                served += usize::from(!matches!(request.action, Action::Answer(_)));
                block.complete(transport, queue, request, Status::Ok);
            }
            transport.rearm(queue);
        }
        served
    }
}

impl Serve for Console {
    fn serve(device: &mut VirtioPci<Self>, random: &mut Random) -> usize {
        let mut served = 0;
        let (console, transport) = device.parts();
        console.process_control(transport);
        let mut out = Vec::new();
        for port in 0..4 {
            console.take_output(transport, port, random.below(5000) as usize, &mut out);
            let given = console.give_input(transport, port, &[1; 300]);
            assert!(given <= 300);
            served += given;
            if random.below(50) == 0 {
                console.close_input(transport, port);
            }
        }
        assert!(out.len() <= 20_000);
        served + out.len()
    }
}

impl Serve for Net {
    fn serve(device: &mut VirtioPci<Self>, random: &mut Random) -> usize {
        let mut served = 0;
        let (net, transport) = device.parts();
        while let Some(frame) = net.next_frame(transport) {
            net.sent(transport, frame);
            served += 1;
        }
        transport.rearm(1);
        let mut held = Buffers::default();
        net.take_buffers(transport, &mut held);
        while held.size() > 0 && random.below(4) != 0 {
            let length = random.below(held.size() + 1) as usize;
            net.received(transport, &mut held, length);
            served += 1;
        }
        net.give_back(transport, &mut held);
        transport.rearm(0);
        net.take_accepts();
        served
    }
}

impl Serve for Vsock {
    fn serve(device: &mut VirtioPci<Self>, random: &mut Random) -> usize {
        let mut served = 0;
        let (vsock, transport) = device.parts();
        vsock.take_reset();
        // Few enough ports that the random driver meets them.
        vsock.connect(random.below(2) as u32, random.below(8) as u32 / 7);
        for _ in 0..random.below(300) {
            let Some(event) = vsock.next_event(transport) else {
                break;
            };
            served += usize::from(!matches!(event, VsockEvent::Nothing));
            if let VsockEvent::Data(data) = event {
                let (connection, length) = (data.connection(), data.length());
                let bytes = data.copy_from(transport.memory(), 0);
                assert_eq!(bytes.len(), length as usize);
                vsock.taken(transport, data);
                vsock.forwarded(connection, random.odd() as u32);
            }
        }
        let connection = random.below(3) as u32;
        if let Ok(buffers) = vsock.take_buffers(transport, connection) {
            let room: u64 = buffers.segments().map(|s| u64::from(s.length)).sum();
            assert!(room <= 64 << 10);
            vsock.received(transport, buffers, random.below(room + 1) as usize);
            served += 1;
        }
        match random.below(32) {
            0 => vsock.close(connection),
            1 => vsock.end(
                connection,
                Shutdown::from_bits_truncate(random.next() as u32),
            ),
            _ => {}
        }
        vsock.settle(transport, random.below(2) == 0);
        served
    }

    fn offer(driver: &mut Driver, queue: usize, random: &mut Random) {
        if queue == 1 {
            let packet = plausible_packet(driver, random);
            let data = (0x21_0000, 1 + random.below(8) as u32);
            driver.offer(queue, &[packet, data], &[]);
        } else {
            let short = random.below(500) == 0;
            let length = if short { 44 } else { 45 + random.below(0x2000) };
            driver.offer(0, &[], &[(0x22_0000, length as u32)]);
        }
    }
}

impl Serve for Fs {
    fn serve(device: &mut VirtioPci<Self>, random: &mut Random) -> usize {
        let mut served = 0;
        let (fs, transport) = device.parts();
        for queue in 0..3 {
            let mut held = Vec::new();
            while let Some(request) = fs.next_request(transport, queue) {
                let length = request.length() as usize;
                assert!((40..=MAX_FS_MESSAGE).contains(&length));
                held.push(request);
                served += 1;
            }
            for request in held {
                let length = random.odd() as u32;
                let mut header = [1; OUT_HEADER];
                header[..4].copy_from_slice(&length.to_le_bytes());
                if request.reply_data(length as usize).is_some() {
                    fs.complete(transport, queue, request, &header);
                } else {
                    fs.fail(transport, queue, request, EIO);
                }
            }
            transport.rearm(queue);
        }
        served
    }
}

/// A chain that keeps the rules, mostly one that a device understands.
fn proper_chain(driver: &mut Driver, queue: usize, random: &mut Random) {
    let message = plausible_message(driver, random);
    let mut buffers = || {
        let length = |random: &mut Random| [1, 8, 512, 512, 512, 513][random.below(6) as usize];
        let count = random.below(3);
        (0..count)
            .map(|_| (0x21_0000 + random.below(0x1_0000), length(random)))
            .collect::<Vec<_>>()
    };
    let (mut readable, mut writable) = (buffers(), buffers());
    if random.below(8) != 0 {
        readable.insert(0, message);
    }
    if random.below(8) != 0 || readable.is_empty() {
        writable.push((0x20_0000, 1));
    }
    driver.offer(queue, &readable, &writable);
}

fn random_chain(driver: &mut Driver, queue: usize, random: &mut Random) {
    for _ in 0..random.below(8) {
        let address = match random.below(3) {
            0 => random.odd(),
            1 => ring(queue) + random.below(0x4000),
            _ => 0x20_0000 + random.below(0x1_0000),
        };
        let length = match random.below(3) {
            0 => random.odd(),
            _ => random.below(600),
        };
        let flags = random.below(16) as u16;
        let (index, next) = (random.below(8) as u16, random.below(9) as u16);
        driver.set_descriptor(queue, index, (address, length as u32), flags, next);
    }
    driver.make_available(queue, random.below(9) as u16);
}

/// The header of a packet from guest 3 to the host, with small numbers in it.
fn plausible_packet(driver: &Driver, random: &mut Random) -> (u64, u32) {
    let mut bytes = [0; 44];
    bytes[0] = if random.below(50) == 0 { 4 } else { 3 };
    bytes[8] = 2;
    bytes[16] = random.below(8) as u8 / 7;
    bytes[20] = random.below(2) as u8;
    bytes[24] = random.below(8) as u8;
    bytes[28] = if random.below(50) == 0 { 2 } else { 1 };
    // Mostly acceptance and data.
    bytes[30] = [2, 2, 5, 5, 5, random.below(9) as u8][random.below(6) as usize];
    bytes[32] = random.below(4) as u8 & random.below(4) as u8 & random.below(4) as u8;
    bytes[36..40].copy_from_slice(&(random.odd() as u32).to_le_bytes());
    bytes[40..].copy_from_slice(&(random.odd() as u32).to_le_bytes());
    let at = 0x20_0000 + 64 * random.below(0x400);
    driver
        .memory
        .ram()
        .write_slice(&bytes, GuestAddress(at))
        .unwrap();
    (at, 44)
}

/// A header of a disk request, or a control message, with small numbers in it.
fn plausible_message(driver: &Driver, random: &mut Random) -> (u64, u32) {
    let mut bytes = [0; 32];
    bytes[0] = random.below(15) as u8;
    bytes[4] = random.below(8) as u8;
    bytes[6] = random.below(2) as u8;
    bytes[8] = random.below(70) as u8;
    bytes[16] = random.below(70) as u8;
    bytes[24] = random.below(4) as u8;
    let at = 0x20_0000 + 32 * random.below(0x800);
    driver
        .memory
        .ram()
        .write_slice(&bytes, GuestAddress(at))
        .unwrap();
    (at, if random.below(3) == 0 { 32 } else { 16 })
}

fn random_access(device: &mut dyn PciFunction, random: &mut Random) {
    let length = [1, 2, 4, 8][random.below(4) as usize];
    let bytes = random.odd().to_le_bytes();
    let within_common = random.below(2) == 0;
    let offset = random.below(if within_common { 0x40 } else { bar::SIZE - 7 });
    match random.below(8) {
        0 => device.config_write(random.below(256) as u16, &bytes[..length]),
        1 => device.config_read(random.below(4096) as u16, &mut [0; 8][..length]),
        2 => device.bar_read(0, offset, &mut [0; 8][..length]),
        _ => device.bar_write(0, offset, &bytes[..length]),
    }
}

fn torment<D: Serve>(make: impl Fn(GuestMemory) -> VirtioPci<D>, seed: u64) {
    let mut random = Random(seed);
    let mut driver = Driver::new(MEMORY_SIZE);
    let mut device = make(driver.memory.clone());
    let mut served = 0;
    for round in 0..10_000 {
        if round % 7 != 0 {
            driver.start(
                &mut device,
                random.odd() | random.odd() | feature::VERSION_1,
            );
        }
        let queues = u64::from(device.device().queue_count());
        for _ in 0..20 {
            let queue = random.below(queues) as usize;
            match random.below(64) {
                0..16 => random_access(&mut device, &mut random),
                16..19 => random_chain(&mut driver, queue, &mut random),
                _ => D::offer(&mut driver, queue, &mut random),
            }
            if random.below(200) == 0 {
                driver.set_available_index(0, random.odd() as u16);
            }
            served += D::serve(&mut device, &mut random);
            device.take_events();
        }
        write(&mut device, common::DEVICE_STATUS, &[0]);
        assert_eq!(testing::read_u8(&mut device, common::DEVICE_STATUS), 0);
    }
    assert!(
        served > 10_000,
        "the random driver is not understood: {served}"
    );
}

#[test]
fn a_random_driver_does_not_break_entropy() {
    torment(|memory| VirtioPci::new(Entropy, memory), 0x5eed_0001);
}

#[test]
fn a_random_driver_does_not_break_block() {
    let config = BlockConfig {
        sectors: 64,
        read_only: false,
        queues: 2,
        id: "x".into(),
    };
    torment(
        |memory| VirtioPci::new(Block::new(config.clone()), memory),
        0x5eed_0002,
    );
}

#[test]
fn a_random_driver_does_not_break_console() {
    let ports = vec![
        PortConfig {
            name: "p".into(),
            console: true
        };
        2
    ];
    torment(
        |memory| VirtioPci::new(Console::new(ports.clone()), memory),
        0x5eed_0003,
    );
}

#[test]
fn a_random_driver_does_not_break_net() {
    let config = NetConfig {
        mac: [2; 6],
        mtu: 1500,
    };
    torment(
        |memory| VirtioPci::new(Net::new(config), memory),
        0x5eed_0005,
    );
}

#[test]
fn a_random_driver_does_not_break_vsock() {
    torment(|memory| VirtioPci::new(Vsock::new(3), memory), 0x5eed_0006);
}

#[test]
fn a_random_driver_does_not_break_fs() {
    torment(|memory| VirtioPci::new(Fs::new("t"), memory), 0x5eed_0007);
}

#[test]
fn random_accesses_do_not_break_the_bus() {
    use crate::pci::{PciBus, PciLayout};
    let memory = GuestMemory::new(MEMORY_SIZE).unwrap();
    let layout = PciLayout {
        ecam: 0xe000_0000,
        window: 0xc000_0000..0xd000_0000,
    };
    let mut bus = PciBus::new(layout);
    for _ in 0..3 {
        bus.add(VirtioPci::new(Entropy, memory.clone())).unwrap();
    }
    let mut random = Random(0x5eed_0004);
    for _ in 0..100_000 {
        let length = [1, 2, 4, 8][random.below(4) as usize];
        let bytes = random.odd().to_le_bytes();
        let size = [1, 2, 4][random.below(3) as usize];
        let port = 0xcf8 + random.below(8) as u16;
        let address = match random.below(3) {
            0 => 0xe000_0000 + random.below(0x2_0000),
            1 => 0xc000_0000 + random.below(0x2_0000),
            _ => random.odd(),
        };
        match random.below(4) {
            0 => bus.port_write(port, size, random.odd() as u32),
            1 => _ = bus.port_read(port, size),
            2 => _ = bus.mmio_write(address, &bytes[..length]),
            _ => _ = bus.mmio_read(address, &mut [0; 8][..length]),
        }
    }
}
