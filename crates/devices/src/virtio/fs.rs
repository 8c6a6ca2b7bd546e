//! virtio-fs (virtio 1.2 §5.11): a queue for requests that must not wait, and one for all others.
//! What they carry is FUSE (linux/fuse.h), of which this file knows the headers only.
//!
//! The owner takes a request with [`Fs::next_request`], has it carried out by a server of files
//! with as many others as it likes, and gives it back with [`Fs::complete`] or [`Fs::fail`].

use super::queue::{Chain, Segment, slice};
use super::transport::Transport;
use super::{DeviceType, VirtioDevice, copy_config};

/// Bytes of a tag (§5.11.4).
pub const TAG_SIZE: usize = 36;
/// Bytes of the largest request, and of the largest reply, headers included.
pub const MAX_FS_MESSAGE: usize = (1 << 20) + 0x1000;
/// Bytes of `struct fuse_in_header`, with which a request begins.
const IN_HEADER: usize = 40;
/// Bytes of `struct fuse_out_header`, with which a reply begins.
pub const OUT_HEADER: usize = 16;
/// Where a request's number is in its header.
const UNIQUE: usize = 8;
/// `EIO`, the error of requests that cannot be carried out.
pub const EIO: i32 = 5;

/// The queues, by their numbers (§5.11.2).
pub mod fs_queue {
    /// Requests that must not wait for others: to forget, to interrupt.
    pub const HIGH_PRIORITY: usize = 0;
    /// All others. There is one such queue.
    pub const REQUEST: usize = 1;
}

/// A request of the driver's.
#[derive(Debug)]
#[must_use = "a request is to be given back with Fs::complete or Fs::fail"]
pub struct FsRequest {
    chain: Chain,
    unique: u64,
}

impl FsRequest {
    /// Where the request is, in order: 40 to [`MAX_FS_MESSAGE`] bytes.
    pub fn request(&self) -> &[Segment] {
        self.chain.readable()
    }

    /// Bytes of the request.
    pub fn length(&self) -> u32 {
        self.chain.readable_length() as u32
    }

    /// The request's number, as it was when the request was taken.
    pub fn unique(&self) -> u64 {
        self.unique
    }

    /// Where a reply of `length` bytes goes, its header left out; `None` if there is no room.
    pub fn reply_data(&self, length: usize) -> Option<Vec<Segment>> {
        let header = OUT_HEADER as u64;
        let fits = (header..=self.chain.writable_length()).contains(&(length as u64));
        fits.then(|| slice(self.chain.writable(), header, length as u64 - header))
    }

    /// Whether the driver waits for a reply.
    pub fn wants_reply(&self) -> bool {
        self.chain.writable_length() > 0
    }
}

/// A virtio file system device.
#[derive(Clone, Debug)]
pub struct Fs {
    tag: [u8; TAG_SIZE],
}

impl Fs {
    /// A device by the name of `tag`, of which the first 36 bytes count.
    pub fn new(tag: &str) -> Self {
        let mut padded = [0; TAG_SIZE];
        for (place, byte) in padded.iter_mut().zip(tag.bytes()) {
            *place = byte;
        }
        Self { tag: padded }
    }

    /// Takes the next request from a queue; `None` if there is none. What cannot be one is given
    /// back at once.
    pub fn next_request(&self, transport: &mut Transport, queue: usize) -> Option<FsRequest> {
        loop {
            let chain = transport.pop(queue)?;
            let mut header = [0; IN_HEADER];
            let read = chain.read(transport.memory(), 0, &mut header);
            let unique = header[UNIQUE..].first_chunk().copied().unwrap_or_default();
            let unique = u64::from_le_bytes(unique);
            let request = FsRequest { chain, unique };
            if read == IN_HEADER && request.chain.readable_length() <= MAX_FS_MESSAGE as u64 {
                return Some(request);
            }
            self.fail(transport, queue, request, EIO);
        }
    }

    /// Gives a request back whose reply begins with `header`. The data that the header counts are
    /// where [`FsRequest::reply_data`] said.
    pub fn complete(
        &self,
        transport: &mut Transport,
        queue: usize,
        request: FsRequest,
        header: &[u8; OUT_HEADER],
    ) {
        let FsRequest { chain, .. } = request;
        let room = chain.writable_length() as u32;
        let length = match chain.write(transport.memory(), 0, header) {
            OUT_HEADER => header.first_chunk().copied().map_or(0, u32::from_le_bytes),
            _ => 0,
        };
        transport.push(queue, chain, length.min(room));
    }

    /// Gives a request back that has failed with an error of the host's, such as [`EIO`].
    pub fn fail(&self, transport: &mut Transport, queue: usize, request: FsRequest, error: i32) {
        let mut header = [0; OUT_HEADER];
        header[..4].copy_from_slice(&(OUT_HEADER as u32).to_le_bytes());
        header[4..8].copy_from_slice(&(-error).to_le_bytes());
        header[8..].copy_from_slice(&request.unique.to_le_bytes());
        self.complete(transport, queue, request, &header);
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> DeviceType {
        DeviceType {
            id: 26,
            class: 0x01_80_00,
        }
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_count(&self) -> u16 {
        2
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut image = [0; TAG_SIZE + 4];
        image[..TAG_SIZE].copy_from_slice(&self.tag);
        image[TAG_SIZE..].copy_from_slice(&1_u32.to_le_bytes());
        copy_config(&image, offset, data);
    }
}

#[cfg(test)]
mod tests {
    use super::fs_queue::REQUEST;
    use super::*;
    use crate::pci::PciFunction;
    use crate::virtio::VirtioPci;
    use crate::virtio::bar;
    use crate::virtio::testing::{Driver, MEMORY_SIZE};

    fn device() -> (Driver, VirtioPci<Fs>) {
        let mut driver = Driver::new(MEMORY_SIZE);
        let mut device = VirtioPci::new(Fs::new("site"), driver.memory.clone());
        driver.start(&mut device, u64::MAX);
        (driver, device)
    }

    fn header(unique: u64) -> [u8; IN_HEADER] {
        let mut header = [0; IN_HEADER];
        header[UNIQUE..16].copy_from_slice(&unique.to_le_bytes());
        header
    }

    #[test]
    fn the_configuration_has_the_tag_and_one_request_queue() {
        let (_, mut device) = device();
        let mut config = [0; 44];
        device.bar_read(0, bar::DEVICE, &mut config);
        assert_eq!(&config[..5], b"site\0");
        assert_eq!(config[5..36], [0; 31]);
        assert_eq!(config[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn a_reply_is_its_header_and_the_data_behind() {
        let (mut driver, mut device) = device();
        let request = driver.place(&header(7));
        let reply = driver.allocate(64);
        driver.offer(REQUEST, &[request], &[(reply, 16), (reply + 16, 48)]);

        let (fs, transport) = device.parts();
        let request = fs.next_request(transport, REQUEST).unwrap();
        assert_eq!((request.unique(), request.length()), (7, 40));
        let data = request.reply_data(20).unwrap();
        assert_eq!(data[0].address, reply + 16);
        assert_eq!(data[0].length, 4);
        let mut answer = [9; OUT_HEADER];
        answer[..4].copy_from_slice(&20_u32.to_le_bytes());
        fs.complete(transport, REQUEST, request, &answer);

        assert_eq!(driver.used(REQUEST)[0].1, 20);
        assert_eq!(driver.bytes(reply, 16), answer);
    }

    #[test]
    fn a_reply_that_is_too_long_has_no_place() {
        let (mut driver, mut device) = device();
        let request = driver.place(&header(7));
        let reply = driver.allocate(32);
        driver.offer(REQUEST, &[request], &[(reply, 32)]);

        let (fs, transport) = device.parts();
        let request = fs.next_request(transport, REQUEST).unwrap();
        assert!(request.reply_data(33).is_none() && request.reply_data(15).is_none());
        fs.fail(transport, REQUEST, request, EIO);

        let expected = [&16_u32.to_le_bytes()[..], &(-5_i32).to_le_bytes()].concat();
        assert_eq!(driver.bytes(reply, 8), expected);
        assert_eq!(driver.bytes(reply + 8, 8), 7_u64.to_le_bytes());
    }

    #[test]
    fn what_is_too_short_for_a_request_fails_and_the_next_is_served() {
        let (mut driver, mut device) = device();
        let short = driver.place(&[1; 39]);
        let reply = driver.allocate(16);
        driver.offer(REQUEST, &[short], &[(reply, 16)]);
        let whole = driver.place(&header(8));
        driver.offer(REQUEST, &[whole], &[]);

        let (fs, transport) = device.parts();
        let request = fs.next_request(transport, REQUEST).unwrap();
        assert_eq!(request.unique(), 8);
        assert!(!request.wants_reply());
        fs.fail(transport, REQUEST, request, EIO);

        let lengths: Vec<_> = driver.used(REQUEST).iter().map(|used| used.1).collect();
        assert_eq!(lengths, [16, 0]);
    }
}
