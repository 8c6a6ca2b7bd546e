//! virtio-rng (virtio 1.2 §5.4): one queue of buffers to fill with random bytes, which the
//! owner supplies.

use super::queue::Chain;
use super::transport::Transport;
use super::{DeviceType, VirtioDevice};

/// The most bytes given for one request; a driver that wants more asks again.
const MAX_BYTES: u64 = 64 << 10;
/// The only queue.
const QUEUE: usize = 0;

/// A source of entropy.
#[derive(Clone, Copy, Debug, Default)]
pub struct Entropy;

/// Buffers that the driver wants filled.
#[derive(Debug)]
#[must_use = "a request is to be given back with Entropy::complete"]
pub struct EntropyRequest(Chain);

impl EntropyRequest {
    /// Bytes wanted, 0 to 64 KiB.
    pub fn length(&self) -> usize {
        self.0.writable_length().min(MAX_BYTES) as usize
    }
}

impl Entropy {
    /// Takes the next request; `None` if there is none.
    pub fn next_request(self, transport: &mut Transport) -> Option<EntropyRequest> {
        transport.pop(QUEUE).map(EntropyRequest)
    }

    /// Answers a request with `bytes`; those beyond its length are dropped.
    pub fn complete(self, transport: &mut Transport, request: EntropyRequest, bytes: &[u8]) {
        let EntropyRequest(chain) = request;
        let written = chain.write(transport.memory(), 0, bytes);
        transport.push(QUEUE, chain, written as u32);
    }
}

impl VirtioDevice for Entropy {
    fn device_type(&self) -> DeviceType {
        DeviceType {
            id: 4,
            class: 0xff_00_00,
        }
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_count(&self) -> u16 {
        1
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::Msi;
    use crate::virtio::testing::{Driver, MEMORY_SIZE};
    use crate::virtio::{Events, VirtioPci};

    #[test]
    fn random_bytes_land_in_the_drivers_buffer_and_raise_its_interrupt() {
        let mut driver = Driver::new(MEMORY_SIZE);
        let mut device = VirtioPci::new(Entropy, driver.memory.clone());
        driver.start(&mut device, u64::MAX);
        let buffer = driver.allocate(8);
        driver.offer(0, &[], &[(buffer, 8)]);

        let (entropy, transport) = device.parts();
        let request = entropy.next_request(transport).unwrap();
        assert_eq!(request.length(), 8);
        entropy.complete(transport, request, &[7; 64]);

        assert_eq!(driver.bytes(buffer, 9), [7, 7, 7, 7, 7, 7, 7, 7, 0]);
        assert_eq!(driver.used(0), [(0, 8)]);
        let Events { messages, .. } = device.take_events();
        assert_eq!(
            messages,
            [Msi {
                address: 0xfee0_0000,
                data: 1
            }]
        );
    }
}
