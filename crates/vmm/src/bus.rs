//! Port and MMIO dispatch: who answers at an address. Built once, then read without locks
//! by every vCPU; devices bring their own.

use std::ops::Range;
use std::sync::Arc;

/// Something at I/O ports.
pub trait PortDevice: Send + Sync {
    /// `IN` of `size` (1, 2 or 4) bytes. The result's upper bytes do not matter.
    fn port_read(&self, port: u16, size: u8) -> u32;
    /// `OUT` of the low `size` (1, 2 or 4) bytes of `value`.
    fn port_write(&self, port: u16, size: u8, value: u32);
}

/// Something at guest physical addresses.
pub trait MmioDevice: Send + Sync {
    /// A load. False, and `data` untouched, if nobody is at this address.
    fn mmio_read(&self, address: u64, data: &mut [u8]) -> bool;
    /// A store. False if nobody is at this address.
    fn mmio_write(&self, address: u64, data: &[u8]) -> bool;
}

/// Who answers where. An access belongs to the device at its first address.
#[derive(Default)]
pub(crate) struct Buses {
    ports: Vec<(Range<u16>, Arc<dyn PortDevice>)>,
    mmio: Vec<(Range<u64>, Arc<dyn MmioDevice>)>,
    /// Asked about every address that nobody else has.
    rest: Option<Arc<dyn MmioDevice>>,
}

impl std::fmt::Debug for Buses {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ports: Vec<_> = self.ports.iter().map(|(range, _)| range).collect();
        let mmio: Vec<_> = self.mmio.iter().map(|(range, _)| range).collect();
        f.debug_struct("Buses")
            .field("ports", &ports)
            .field("mmio", &mmio)
            .finish_non_exhaustive()
    }
}

/// Puts `range` where it keeps the list sorted. Ranges are the machine's own, not the
/// guest's, so an overlap is a mistake in this crate.
fn insert<A: Ord + Copy, D>(list: &mut Vec<(Range<A>, D)>, range: Range<A>, device: D) {
    let at = list.partition_point(|(other, _)| other.start < range.start);
    debug_assert!(
        at == 0 || list[at - 1].0.end <= range.start,
        "overlapping devices"
    );
    debug_assert!(
        at == list.len() || range.end <= list[at].0.start,
        "overlapping devices"
    );
    list.insert(at, (range, device));
}

fn find<A: Ord + Copy, D>(list: &[(Range<A>, D)], address: A) -> Option<&D> {
    let at = list.partition_point(|(range, _)| range.end <= address);
    let (range, device) = list.get(at)?;
    range.contains(&address).then_some(device)
}

impl Buses {
    /// Puts `device` at `ports`.
    pub(crate) fn add_ports(&mut self, ports: Range<u16>, device: Arc<dyn PortDevice>) {
        insert(&mut self.ports, ports, device);
    }

    /// Whether a device has one of these ports.
    pub(crate) fn has_ports(&self, ports: &Range<u16>) -> bool {
        let overlaps =
            |(other, _): &(Range<u16>, _)| other.start < ports.end && ports.start < other.end;
        self.ports.iter().any(overlaps)
    }

    /// Puts `device` at `addresses`.
    pub(crate) fn add_mmio(&mut self, addresses: Range<u64>, device: Arc<dyn MmioDevice>) {
        insert(&mut self.mmio, addresses, device);
    }

    /// Lets `device` answer wherever nobody else does.
    pub(crate) fn set_rest(&mut self, device: Arc<dyn MmioDevice>) {
        self.rest = Some(device);
    }

    pub(crate) fn port_read(&self, port: u16, size: u8) -> u32 {
        find(&self.ports, port).map_or(u32::MAX, |device| device.port_read(port, size))
    }

    pub(crate) fn port_write(&self, port: u16, size: u8, value: u32) {
        if let Some(device) = find(&self.ports, port) {
            device.port_write(port, size, value);
        }
    }

    pub(crate) fn mmio_read(&self, address: u64, data: &mut [u8]) {
        let device = find(&self.mmio, address).or(self.rest.as_ref());
        if !device.is_some_and(|device| device.mmio_read(address, data)) {
            data.fill(0xff);
        }
    }

    pub(crate) fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some(device) = find(&self.mmio, address).or(self.rest.as_ref()) {
            device.mmio_write(address, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Fake(u8, Mutex<Vec<u64>>);

    impl PortDevice for Fake {
        fn port_read(&self, _port: u16, _size: u8) -> u32 {
            self.0.into()
        }
        fn port_write(&self, port: u16, _size: u8, _value: u32) {
            self.1.lock().unwrap().push(port.into());
        }
    }

    impl MmioDevice for Fake {
        fn mmio_read(&self, address: u64, data: &mut [u8]) -> bool {
            data.fill(self.0);
            address < 0xf000
        }
        fn mmio_write(&self, address: u64, _data: &[u8]) -> bool {
            self.1.lock().unwrap().push(address);
            true
        }
    }

    fn fake(value: u8) -> Arc<Fake> {
        Arc::new(Fake(value, Mutex::default()))
    }

    #[test]
    fn each_port_reaches_the_device_that_is_there_and_no_other() {
        let mut buses = Buses::default();
        let second = fake(2);
        buses.add_ports(0x3f8..0x400, second.clone());
        buses.add_ports(0x70..0x72, fake(1));
        buses.add_ports(0x400..0x401, fake(3));

        let values = [0x6f, 0x70, 0x71, 0x72, 0x3f8, 0x3ff, 0x400, 0x401, 0xffff];
        let found = values.map(|port| buses.port_read(port, 1) as u8);

        assert_eq!(found, [0xff, 1, 1, 0xff, 2, 2, 3, 0xff, 0xff]);
        buses.port_write(0x3f9, 1, 0);
        buses.port_write(0x500, 1, 0);
        assert_eq!(*second.1.lock().unwrap(), [0x3f9]);
    }

    #[test]
    fn addresses_that_nobody_has_read_all_ones_after_the_rest_was_asked() {
        let mut buses = Buses::default();
        buses.add_mmio(0x1000..0x2000, fake(1));
        buses.set_rest(fake(2));
        let read = |address| {
            let mut data = [0; 2];
            buses.mmio_read(address, &mut data);
            data[1]
        };

        assert_eq!(
            [0xfff, 0x1000, 0x1fff, 0x2000, 0xf000].map(read),
            [2, 1, 1, 2, 0xff]
        );
    }
}
