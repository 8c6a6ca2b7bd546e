//! A driver for tests: talks to a [`VirtioPci`] through its registers, as Linux does, with
//! rings it lays out in guest memory. Its conveniences panic; tests are the only callers.
#![allow(missing_docs, clippy::missing_panics_doc)]

use strata_memory::{Bytes, GuestAddress, GuestMemory};

use super::{DeviceStatus, QUEUE_SIZE, VirtioDevice, VirtioPci, bar, common};
use crate::pci::{Command, Msix, PciFunction, register};

/// Enough memory for the rings of all queues and some buffers.
pub const MEMORY_SIZE: u64 = 4 << 20;
/// Vectors send data equal to their number to this address.
pub const MSI_ADDRESS: u64 = 0xfee0_0000;

const RINGS: u64 = 0x10_000;
const RING_SPACE: u64 = 0x4000;
const BUFFERS: u64 = 0x20_0000;
const USED_OFFSET: u64 = 0x2000;
const AVAIL_OFFSET: u64 = 0x1000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// The driver's side of a device.
#[derive(Debug)]
pub struct Driver {
    pub memory: GuestMemory,
    next_buffer: u64,
    next_descriptor: Vec<u16>,
    available: Vec<u16>,
    seen: Vec<u16>,
}

impl Driver {
    pub fn new(memory: u64) -> Self {
        Self::with(GuestMemory::new(memory).unwrap())
    }

    pub fn with(memory: GuestMemory) -> Self {
        let queues = usize::from(super::MAX_QUEUES);
        Self {
            memory,
            next_buffer: BUFFERS,
            next_descriptor: vec![0; queues],
            available: vec![0; queues],
            seen: vec![0; queues],
        }
    }

    /// Negotiates whatever is offered and in `wanted`, sets up all queues, and starts.
    pub fn start<D: VirtioDevice>(&mut self, device: &mut VirtioPci<D>, wanted: u64) {
        self.start_function(device, wanted);
    }

    /// The same through the bus's view of a device.
    pub fn start_function(&mut self, device: &mut dyn PciFunction, wanted: u64) {
        enable_msix(device);
        write(device, common::DEVICE_STATUS, &[0]);
        self.next_descriptor.fill(0);
        self.available.fill(0);
        self.seen.fill(0);
        let mut status = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER;
        write(device, common::DEVICE_STATUS, &[status.bits()]);
        for half in 0..2_u32 {
            write(device, common::DEVICE_FEATURE_SELECT, &half.to_le_bytes());
            write(device, common::DRIVER_FEATURE_SELECT, &half.to_le_bytes());
            let offered = read_u32(device, common::DEVICE_FEATURE);
            let accepted = offered & (wanted >> (32 * half)) as u32;
            write(device, common::DRIVER_FEATURE, &accepted.to_le_bytes());
        }
        status |= DeviceStatus::FEATURES_OK;
        write(device, common::DEVICE_STATUS, &[status.bits()]);
        assert_eq!(read_u8(device, common::DEVICE_STATUS), status.bits());
        write(device, common::CONFIG_MSIX_VECTOR, &[0, 0]);
        for queue in 0..read_u16(device, common::NUM_QUEUES) {
            self.set_up_queue(device, queue);
        }
        status |= DeviceStatus::DRIVER_OK;
        write(device, common::DEVICE_STATUS, &[status.bits()]);
        assert_eq!(read_u8(device, common::DEVICE_STATUS), status.bits());
    }

    fn set_up_queue(&self, device: &mut dyn PciFunction, queue: u16) {
        let base = ring(usize::from(queue));
        self.memory
            .ram()
            .write_slice(&[0; RING_SPACE as usize], GuestAddress(base))
            .unwrap();
        write(device, common::QUEUE_SELECT, &queue.to_le_bytes());
        assert_eq!(read_u16(device, common::QUEUE_SIZE), QUEUE_SIZE);
        write(
            device,
            common::QUEUE_MSIX_VECTOR,
            &(queue + 1).to_le_bytes(),
        );
        assert_eq!(read_u16(device, common::QUEUE_MSIX_VECTOR), queue + 1);
        for (field, address) in [
            (common::QUEUE_DESC, base),
            (common::QUEUE_DRIVER, base + AVAIL_OFFSET),
            (common::QUEUE_DEVICE, base + USED_OFFSET),
        ] {
            write(device, field, &(address as u32).to_le_bytes());
            write(device, field + 4, &((address >> 32) as u32).to_le_bytes());
        }
        write(device, common::QUEUE_ENABLE, &[1, 0]);
        assert_eq!(read_u16(device, common::QUEUE_ENABLE), 1);
    }

    /// Room for `length` bytes, zeroed when first used.
    pub fn allocate(&mut self, length: u64) -> u64 {
        let address = self.next_buffer;
        self.next_buffer += length.next_multiple_of(16);
        assert!(self.next_buffer < self.memory.size());
        address
    }

    /// `bytes` in guest memory.
    pub fn place(&mut self, bytes: &[u8]) -> (u64, u32) {
        let address = self.allocate(bytes.len() as u64);
        self.memory
            .ram()
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
        (address, bytes.len() as u32)
    }

    /// Puts a chain of buffers (address, length) on a queue; returns its head.
    pub fn offer(&mut self, queue: usize, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> u16 {
        let buffers = readable
            .iter()
            .map(|b| (b, 0))
            .chain(writable.iter().map(|b| (b, WRITE)));
        let buffers: Vec<_> = buffers.collect();
        let head = self.next_descriptor[queue];
        for (index, &(&(address, length), flags)) in buffers.iter().enumerate() {
            let descriptor = self.next_descriptor[queue];
            let next = (descriptor + 1) % QUEUE_SIZE;
            let flags = flags | if index + 1 < buffers.len() { NEXT } else { 0 };
            self.set_descriptor(queue, descriptor, (address, length), flags, next);
            self.next_descriptor[queue] = next;
        }
        self.make_available(queue, head);
        head
    }

    /// Fills a descriptor as told, right or wrong.
    pub fn set_descriptor(
        &self,
        queue: usize,
        index: u16,
        (address, length): (u64, u32),
        flags: u16,
        next: u16,
    ) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        let at = ring(queue) + 16 * u64::from(index);
        self.memory
            .ram()
            .write_slice(&bytes, GuestAddress(at))
            .unwrap();
    }

    /// Puts a head in the available ring.
    pub fn make_available(&mut self, queue: usize, head: u16) {
        let avail = ring(queue) + AVAIL_OFFSET;
        let index = self.available[queue];
        let slot = avail + 4 + 2 * u64::from(index % QUEUE_SIZE);
        self.memory
            .ram()
            .write_obj(head, GuestAddress(slot))
            .unwrap();
        self.available[queue] = index.wrapping_add(1);
        self.set_available_index(queue, self.available[queue]);
    }

    /// Sets the index of the available ring, right or wrong.
    pub fn set_available_index(&self, queue: usize, index: u16) {
        let avail = ring(queue) + AVAIL_OFFSET;
        self.memory
            .ram()
            .write_obj(index, GuestAddress(avail + 2))
            .unwrap();
    }

    /// Sets the flags of the available ring.
    pub fn set_available_flags(&self, queue: usize, flags: u16) {
        let avail = ring(queue) + AVAIL_OFFSET;
        self.memory
            .ram()
            .write_obj(flags, GuestAddress(avail))
            .unwrap();
    }

    /// Sets the index after which an interrupt is wanted.
    pub fn set_used_event(&self, queue: usize, index: u16) {
        let at = ring(queue) + AVAIL_OFFSET + 4 + 2 * u64::from(QUEUE_SIZE);
        self.memory
            .ram()
            .write_obj(index, GuestAddress(at))
            .unwrap();
    }

    /// The (head, length) pairs used since the last call.
    pub fn used(&mut self, queue: usize) -> Vec<(u32, u32)> {
        let used = ring(queue) + USED_OFFSET;
        let ram = self.memory.ram();
        let index: u16 = ram.read_obj(GuestAddress(used + 2)).unwrap();
        let mut elements = Vec::new();
        while self.seen[queue] != index {
            let at = used + 4 + 8 * u64::from(self.seen[queue] % QUEUE_SIZE);
            let head = ram.read_obj(GuestAddress(at)).unwrap();
            let length = ram.read_obj(GuestAddress(at + 4)).unwrap();
            elements.push((head, length));
            self.seen[queue] = self.seen[queue].wrapping_add(1);
        }
        elements
    }

    /// Asks for an interrupt at the next used element.
    pub fn rearm(&self, queue: usize) {
        self.set_used_event(queue, self.seen[queue]);
    }

    /// Guest memory.
    pub fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory
            .ram()
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }
}

/// Where a queue's rings are.
pub fn ring(queue: usize) -> u64 {
    RINGS + RING_SPACE * queue as u64
}

/// Enables memory decoding and MSI-X, and unmasks all vectors.
pub fn enable_msix(device: &mut dyn PciFunction) {
    let command = (Command::MEMORY | Command::BUS_MASTER).bits();
    device.config_write(register::COMMAND, &command.to_le_bytes());
    let msix = find_capability(device, Msix::CAPABILITY_ID).expect("MSI-X");
    device.config_write(msix + 2, &Msix::ENABLE.to_le_bytes());
    for vector in 0..=u64::from(super::MAX_QUEUES) {
        let entry = bar::MSIX_TABLE + 16 * vector;
        device.bar_write(0, entry, &MSI_ADDRESS.to_le_bytes());
        device.bar_write(0, entry + 8, &(vector as u32).to_le_bytes());
        device.bar_write(0, entry + 12, &[0; 4]);
    }
}

/// The offset of the first capability with `id`.
pub fn find_capability(device: &mut dyn PciFunction, id: u8) -> Option<u16> {
    let mut byte = [0];
    device.config_read(register::CAPABILITIES, &mut byte);
    while byte[0] != 0 {
        let mut header = [0; 2];
        device.config_read(u16::from(byte[0]), &mut header);
        if header[0] == id {
            return Some(u16::from(byte[0]));
        }
        byte[0] = header[1];
    }
    None
}

/// Writes a common configuration field.
pub fn write(device: &mut dyn PciFunction, offset: u64, data: &[u8]) {
    device.bar_write(0, bar::COMMON + offset, data);
}

pub fn read_u8(device: &mut dyn PciFunction, offset: u64) -> u8 {
    let mut data = [0];
    device.bar_read(0, bar::COMMON + offset, &mut data);
    data[0]
}

pub fn read_u16(device: &mut dyn PciFunction, offset: u64) -> u16 {
    let mut data = [0; 2];
    device.bar_read(0, bar::COMMON + offset, &mut data);
    u16::from_le_bytes(data)
}

pub fn read_u32(device: &mut dyn PciFunction, offset: u64) -> u32 {
    let mut data = [0; 4];
    device.bar_read(0, bar::COMMON + offset, &mut data);
    u32::from_le_bytes(data)
}
