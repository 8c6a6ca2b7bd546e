//! Devices as the machine uses them: over the bus, with their threads running, driven as
//! a guest's driver would.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use super::*;
use crate::config::DiskConfig;
use strata_devices::pci::{BAR_COUNT, BarWindow, BarWindows, PciFunction};
use strata_devices::virtio::bar;
use strata_devices::virtio::testing::{Driver, MEMORY_SIZE, MSI_ADDRESS};

const LAYOUT: PciLayout = PciLayout {
    ecam: 0xe000_0000,
    window: 0xc000_0000..0xd000_0000,
};
const PATIENCE: Duration = Duration::from_secs(20);

/// Counts interrupts by their data.
#[derive(Default)]
struct Interrupts {
    seen: Mutex<HashSet<u32>>,
    changed: Condvar,
}

impl MsiSink for Interrupts {
    fn deliver_msi(&self, address: u64, data: u32) {
        assert_eq!(address, MSI_ADDRESS);
        self.seen.lock().unwrap().insert(data);
        self.changed.notify_all();
    }
}

/// A device on the bus, reached by addresses alone.
struct OnBus {
    pci: Arc<PciRoot>,
    slot: u64,
}

impl OnBus {
    fn ecam(&self, offset: u16) -> u64 {
        LAYOUT.ecam + (self.slot << 15) + u64::from(offset)
    }

    fn window(&self) -> BarWindow {
        let mut low = [0; 4];
        assert!(self.pci.mmio_read(self.ecam(0x10), &mut low));
        let start = u64::from(u32::from_le_bytes(low) & !0xf);
        BarWindow {
            start,
            size: bar::SIZE,
        }
    }
}

impl PciFunction for OnBus {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        assert!(self.pci.mmio_read(self.ecam(offset), data));
    }
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        assert!(self.pci.mmio_write(self.ecam(offset), data));
    }
    fn bar_windows(&self) -> BarWindows {
        [Some(self.window()), None, None, None, None, None]
    }
    fn bar_sizes(&self) -> [u64; BAR_COUNT] {
        [bar::SIZE, 0, 0, 0, 0, 0]
    }
    fn bar_read(&mut self, _bar: usize, offset: u64, data: &mut [u8]) {
        assert!(self.pci.mmio_read(self.window().start + offset, data));
    }
    fn bar_write(&mut self, _bar: usize, offset: u64, data: &[u8]) {
        assert!(self.pci.mmio_write(self.window().start + offset, data));
    }
}

pub(super) struct Machine {
    pub(super) driver: Driver,
    pub(super) devices: Devices,
    interrupts: Arc<Interrupts>,
    device: OnBus,
}

/// A machine with the device that `add` adds, its driver up.
pub(super) fn machine(cpus: u8, add: impl FnOnce(&mut Devices)) -> Machine {
    let mut driver = Driver::new(MEMORY_SIZE);
    let interrupts = Arc::<Interrupts>::default();
    let sink: Arc<dyn MsiSink> = Arc::clone(&interrupts) as _;
    let mut devices = Devices::new(driver.memory.clone(), sink, LAYOUT, cpus).unwrap();
    add(&mut devices);
    let mut device = OnBus {
        pci: devices.pci(),
        slot: 1,
    };
    driver.start_function(&mut device, u64::MAX);
    Machine {
        driver,
        devices,
        interrupts,
        device,
    }
}

impl Machine {
    pub(super) fn kick(&mut self, queue: usize) {
        let offset = bar::NOTIFY + bar::NOTIFY_MULTIPLIER * queue as u64;
        self.device
            .bar_write(0, offset, &(queue as u16).to_le_bytes());
    }

    /// Waits for a queue's interrupt and returns its used elements.
    pub(super) fn wait(&mut self, queue: usize) -> Vec<(u32, u32)> {
        let vector = queue as u32 + 1;
        let seen = self.interrupts.seen.lock().unwrap();
        let (mut seen, timeout) = self
            .interrupts
            .changed
            .wait_timeout_while(seen, PATIENCE, |seen| !seen.contains(&vector))
            .unwrap();
        assert!(!timeout.timed_out(), "no interrupt of queue {queue}");
        seen.remove(&vector);
        drop(seen);
        let used = self.driver.used(queue);
        self.driver.rearm(queue);
        used
    }

    fn disk_request(&mut self, queue: usize, kind: u32, sector: u64, data: &[(u64, u32)]) -> u64 {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        let header = self.driver.place(&header);
        let status = self.driver.place(&[0xff]);
        let (mut readable, mut writable) = (vec![header], vec![]);
        if kind == 0 {
            &mut writable
        } else {
            &mut readable
        }
        .extend(data);
        writable.push(status);
        self.driver.offer(queue, &readable, &writable);
        status.0
    }
}

#[test]
fn a_disk_is_written_flushed_and_read_on_all_its_queues() {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let mut machine = machine(2, |devices| {
        devices
            .add_disk(Disk::open(&DiskConfig::image(image.path(), None, false)).unwrap())
            .unwrap();
    });
    let data = machine.driver.place(&[0x5a; 1024]);
    let back = machine.driver.allocate(1024);
    for queue in 0..2 {
        let write = machine.disk_request(queue, 1, 8, &[data]);
        machine.kick(queue);
        assert_eq!(machine.wait(queue).len(), 1);
        let flush = machine.disk_request(queue, 4, 0, &[]);
        machine.kick(queue);
        assert_eq!(machine.wait(queue).len(), 1);
        assert_eq!(
            std::fs::read(image.path()).unwrap()[4096..5120],
            [0x5a; 1024]
        );

        let read = machine.disk_request(queue, 0, 8, &[(back, 1024)]);
        machine.kick(queue);
        let used = machine.wait(queue);

        assert_eq!(used.iter().map(|u| u.1).collect::<Vec<_>>(), [1025]);
        assert_eq!(machine.driver.bytes(back, 1024), [0x5a; 1024]);
        for status in [write, flush, read] {
            assert_eq!(machine.driver.bytes(status, 1), [0]);
        }
    }
}

#[test]
fn requests_queued_when_the_machine_stops_are_still_done() {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let mut machine = machine(1, |devices| {
        devices
            .add_disk(Disk::open(&DiskConfig::image(image.path(), None, false)).unwrap())
            .unwrap();
    });
    let data = machine.driver.place(&[0x77; 512]);
    for sector in 0..50 {
        machine.disk_request(0, 1, sector, &[data]);
    }

    machine.devices.shutdown();

    let bytes = std::fs::read(image.path()).unwrap();
    assert!(bytes[..50 * 512].iter().all(|&b| b == 0x77));
}

#[test]
fn entropy_is_delivered() {
    let mut machine = machine(1, |devices| devices.add_entropy().unwrap());
    let buffer = machine.driver.allocate(4096);
    machine.driver.offer(0, &[], &[(buffer, 4096)]);
    machine.kick(0);

    let used = machine.wait(0);

    assert_eq!(used[0].1, 4096);
    let distinct: HashSet<_> = machine.driver.bytes(buffer, 4096).into_iter().collect();
    assert!(distinct.len() > 100);
}

/// An input that gives what is sent to its channel, then ends.
struct Fed(Receiver<Vec<u8>>);

impl Read for Fed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Ok(bytes) = self.0.recv() else {
            return Ok(0);
        };
        buffer[..bytes.len()].copy_from_slice(&bytes);
        Ok(bytes.len())
    }
}

/// An output that keeps what it gets, slowly.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<u8>>>);

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        thread::sleep(Duration::from_millis(1));
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

const CONTROL_IN: usize = 2;
const CONTROL_OUT: usize = 3;

/// A machine with one port whose guest end is open, and buffers for control messages.
fn console(output: Kept) -> (Machine, Sender<Vec<u8>>, Vec<u64>) {
    let (feed, fed) = mpsc::channel();
    let port = Port {
        name: "test".into(),
        input: Some(Box::new(Fed(fed))),
        output: Some(Box::new(output)),
    };
    let mut machine = machine(1, |devices| devices.add_console(vec![port]).unwrap());
    let mut control = Vec::new();
    for _ in 0..8 {
        let buffer = machine.driver.allocate(32);
        machine.driver.offer(CONTROL_IN, &[], &[(buffer, 32)]);
        control.push(buffer);
    }
    for (event, value) in [(0_u16, 1_u16), (3, 1), (6, 1)] {
        let mut message = vec![0; 4];
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        let message = machine.driver.place(&message);
        machine.driver.offer(CONTROL_OUT, &[message], &[]);
    }
    machine.kick(CONTROL_OUT);
    (machine, feed, control)
}

fn control_events(machine: &Machine, buffers: &[u64]) -> Vec<[u8; 8]> {
    let read = |at: &u64| machine.driver.bytes(*at, 8).try_into().unwrap();
    buffers.iter().map(read).collect()
}

#[test]
fn input_arrives_whole_before_the_port_is_closed() {
    let (mut machine, feed, control) = console(Kept::default());
    for piece in 0..10_u8 {
        feed.send(vec![piece; 1000]).unwrap();
    }
    drop(feed);

    let closed = [0, 0, 0, 0, 6, 0, 0, 0];
    let mut received = Vec::new();
    let started = Instant::now();
    while received.len() < 10_000 {
        assert!(started.elapsed() < PATIENCE);
        assert!(!control_events(&machine, &control).contains(&closed));
        let buffer = machine.driver.allocate(700);
        machine.driver.offer(0, &[], &[(buffer, 700)]);
        machine.kick(0);
        let used = machine.wait(0);
        assert_eq!(used.len(), 1);
        received.extend(machine.driver.bytes(buffer, used[0].1 as usize));
    }

    let expected: Vec<u8> = (0..10_u8).flat_map(|piece| vec![piece; 1000]).collect();
    assert_eq!(received, expected);
    while !control_events(&machine, &control).contains(&closed) {
        assert!(
            started.elapsed() < PATIENCE,
            "{:?}",
            control_events(&machine, &control)
        );
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn all_output_is_written_before_shutdown_returns() {
    let output = Kept::default();
    let (mut machine, _feed, _) = console(output.clone());
    let queue = 1;
    let piece = machine.driver.place(&vec![b'x'; 20_000]);
    for _ in 0..100 {
        machine.driver.offer(queue, &[piece], &[]);
    }
    machine.kick(queue);

    machine.devices.shutdown();

    assert_eq!(output.0.lock().unwrap().len(), 2_000_000);
}

#[test]
fn a_machine_without_devices_or_with_idle_ones_ends() {
    let mut machine = machine(4, |devices| {
        devices.add_entropy().unwrap();
        let (_, fed) = mpsc::channel();
        let input: Box<dyn Read + Send> = Box::new(Fed(fed));
        let port = Port {
            name: "idle".into(),
            input: Some(input),
            output: None,
        };
        devices.add_console(vec![port]).unwrap();
    });

    machine.devices.shutdown();
}

#[test]
fn too_many_ports_and_devices_are_errors() {
    let memory = GuestMemory::new(1 << 20).unwrap();
    let sink = Arc::<Interrupts>::default();
    let mut devices = Devices::new(memory, sink, LAYOUT, 1).unwrap();
    let port = |_| Port {
        name: String::new(),
        input: None,
        output: None,
    };

    assert!(matches!(
        devices.add_console((0..40).map(port).collect()),
        Err(Error::Ports(40))
    ));
    for _ in 0..31 {
        devices.add_entropy().unwrap();
    }
    assert!(matches!(
        devices.add_entropy(),
        Err(Error::Bus(BusFull::Slots))
    ));
}

/// A machine with a network card, and the other end of its cable.
fn card() -> (Machine, std::os::fd::OwnedFd) {
    use strata_net::{Addresses, MacAddress};
    let (socket, other) = strata_net::port_pair().unwrap();
    rustix::io::ioctl_fionbio(&socket, true).unwrap();
    let addresses = Addresses {
        mac: MacAddress([2, 0, 0, 0, 0, 2]),
        ipv4: [10, 0, 2, 2].into(),
        ipv6: std::net::Ipv6Addr::LOCALHOST,
    };
    let joined = Joined {
        socket,
        tap: None,
        addresses,
        gateway: [10, 0, 2, 1].into(),
    };
    let machine = machine(1, |devices| devices.add_net(joined).unwrap());
    (machine, other)
}

/// The next message of the machine's.
fn message(cable: &std::os::fd::OwnedFd) -> Vec<u8> {
    let mut buffer = vec![0; 70_000];
    let flags = rustix::net::RecvFlags::empty();
    let (_, length) = rustix::net::recv(cable, &mut buffer[..], flags).unwrap();
    buffer.truncate(length);
    buffer
}

#[test]
fn frames_leave_as_one_message_behind_what_the_driver_accepts() {
    let (mut machine, cable) = card();
    let header = machine.driver.place(&[0; 12]);
    let frame = machine.driver.place(&[7; 1000]);
    let head = machine.driver.offer(1, &[header, frame], &[]);
    machine.kick(1);

    assert_eq!(message(&cable), [7]);
    assert_eq!(message(&cable), [[0; 12].as_slice(), &[7; 1000]].concat());
    assert_eq!(machine.wait(1), [(u32::from(head), 0)]);
    machine.devices.shutdown();
}

#[test]
fn a_frame_waits_for_buffers_and_fills_several() {
    let (mut machine, cable) = card();
    let sent: Vec<u8> = (0..2500_u32).map(|i| i as u8).collect();
    let flags = rustix::net::SendFlags::empty();
    rustix::net::send(&cable, &sent, flags).unwrap();
    let buffers: Vec<u64> = (0..3).map(|_| machine.driver.allocate(1000)).collect();
    for buffer in &buffers {
        machine.driver.offer(0, &[], &[(*buffer, 1000)]);
        machine.kick(0);
    }

    let lengths: Vec<u32> = machine.wait(0).iter().map(|(_, length)| *length).collect();

    assert_eq!(lengths, [1000, 1000, 500]);
    let last = machine.driver.bytes(buffers[2], 500);
    assert_eq!(last, sent[2000..]);
}

#[test]
fn a_driver_learns_that_its_network_has_gone() {
    let (machine, cable) = card();
    drop(cable);
    let seen = machine.interrupts.seen.lock().unwrap();
    let changed = &machine.interrupts.changed;
    let waited = changed.wait_timeout_while(seen, PATIENCE, |seen| !seen.contains(&0));
    assert!(!waited.unwrap().1.timed_out());
    let mut status = [0; 2];
    let mut device = machine.device;
    device.bar_read(0, bar::DEVICE + 6, &mut status);
    assert_eq!(status, [0, 0]);
}

mod vsock;
