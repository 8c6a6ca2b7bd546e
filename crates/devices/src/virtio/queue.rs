//! A split virtqueue (virtio 1.2 §2.7) and the descriptor chains that come out of it.
//!
//! [`Transport`](super::Transport) owns the queues. A [`Chain`] is checked once, when it is
//! taken: every buffer lies in guest memory, readable ones come before writable ones, and
//! the chain ends. After that the guest can no longer change what it describes.

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use strata_memory::vm_memory::{GuestMemory as _, Permissions};
use strata_memory::{Bytes, GuestAddress, Ram};
use virtio_queue::{Queue, QueueOwnedT, QueueT};

/// The largest number of descriptors in a chain. Linux may exceed the queue size with
/// indirect tables; nobody comes near this.
const MAX_CHAIN: usize = 1024;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (virtio 1.2 §2.7.6).
const AVAIL_NO_INTERRUPT: u16 = 1;

/// How a driver has broken the rules of the virtqueue. The device needs a reset then.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// A ring, table or buffer is not in guest memory, or not aligned.
    #[error("{0} at {1:#x} is misplaced or not in guest memory")]
    Misplaced(&'static str, u64),
    /// A chain does not end, leaves its table, or has a broken indirect table.
    #[error("the descriptor chain from {0} has no proper end")]
    Endless(u16),
    /// A chain has a device-readable buffer behind a device-writable one.
    #[error("the descriptor chain from {0} has a readable buffer behind a writable one")]
    Order(u16),
    /// The ring is inconsistent.
    #[error("the ring is inconsistent")]
    Ring(#[from] virtio_queue::Error),
    /// What a chain holds makes no sense to the device.
    #[error("{0}")]
    Protocol(&'static str),
}

/// A buffer in guest memory, checked to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest physical address.
    pub address: u64,
    /// Bytes, more than 0.
    pub length: u32,
}

/// A request as the driver has described it: buffers to read, then buffers to write.
/// While it exists the device counts as busy, and a reset of the device waits.
#[derive(Debug)]
#[must_use = "a chain is to be given back with Transport::push"]
pub struct Chain {
    head: u16,
    segments: Vec<Segment>,
    readable: usize,
    _busy: Arc<()>,
}

fn total(segments: &[Segment]) -> u64 {
    segments.iter().map(|s| u64::from(s.length)).sum()
}

/// The parts of `segments` that `length` bytes from `offset` (or as many as there are) fill.
pub(super) fn slice(segments: &[Segment], offset: u64, length: u64) -> Vec<Segment> {
    let (mut skip, mut left) = (offset, length);
    let mut parts = Vec::new();
    for segment in segments {
        let size = u64::from(segment.length);
        if skip >= size {
            skip -= size;
            continue;
        }
        let taken = (size - skip).min(left);
        if taken == 0 {
            break;
        }
        parts.push(Segment {
            address: segment.address + skip,
            length: taken as u32,
        });
        left -= taken;
        skip = 0;
    }
    parts
}

impl Chain {
    /// The buffers that the device may read.
    pub fn readable(&self) -> &[Segment] {
        &self.segments[..self.readable]
    }

    /// The buffers that the device may write.
    pub fn writable(&self) -> &[Segment] {
        &self.segments[self.readable..]
    }

    /// Bytes in the readable buffers, below 4 GiB.
    pub fn readable_length(&self) -> u64 {
        total(self.readable())
    }

    /// Bytes in the writable buffers, below 4 GiB.
    pub fn writable_length(&self) -> u64 {
        total(self.writable())
    }

    /// Copies out of the readable buffers, from `offset` on. Returns the bytes copied:
    /// fewer than `data` holds if the buffers end before.
    pub fn read(&self, memory: &Ram, offset: u64, data: &mut [u8]) -> usize {
        let mut done = 0;
        for part in slice(self.readable(), offset, data.len() as u64) {
            let piece = &mut data[done..done + part.length as usize];
            if memory
                .read_slice(piece, GuestAddress(part.address))
                .is_err()
            {
                break;
            }
            done += part.length as usize;
        }
        done
    }

    /// Copies into the writable buffers, from `offset` on. Returns the bytes copied: fewer
    /// than `data` holds if the buffers end before.
    pub fn write(&self, memory: &Ram, offset: u64, data: &[u8]) -> usize {
        let mut done = 0;
        for part in slice(self.writable(), offset, data.len() as u64) {
            let piece = &data[done..done + part.length as usize];
            if memory
                .write_slice(piece, GuestAddress(part.address))
                .is_err()
            {
                break;
            }
            done += part.length as usize;
        }
        done
    }
}

/// One virtqueue: what the driver has set, and the ring once it is enabled.
#[derive(Debug)]
pub(super) struct Virtqueue {
    queue: Queue,
    pub(super) descriptors: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
    pub(super) vector: u16,
}

impl Virtqueue {
    /// A queue of at most `size` (a power of two up to 32768) descriptors.
    pub(super) fn new(size: u16) -> Self {
        let queue = Queue::new(size).expect("the model's queue size is a power of two");
        let (descriptors, driver, device) = (0, 0, 0);
        Self {
            queue,
            descriptors,
            driver,
            device,
            vector: super::NO_VECTOR,
        }
    }

    pub(super) fn reset(&mut self) {
        *self = Self::new(self.queue.max_size());
    }

    pub(super) fn size(&self) -> u16 {
        self.queue.size()
    }

    pub(super) fn enabled(&self) -> bool {
        self.queue.ready()
    }

    /// Takes a size from the driver. One that is no power of two or too large is ignored.
    pub(super) fn set_size(&mut self, size: u16) {
        if !self.enabled() {
            let _ = self.queue.try_set_size(size);
        }
    }

    /// Starts the queue with the addresses set so far.
    pub(super) fn enable(&mut self, memory: &Ram, event_idx: bool) -> Result<(), QueueError> {
        let size = u64::from(self.queue.size());
        // Ring sizes: virtio 1.2 §2.7, the event fields included.
        let parts = [
            (
                "the descriptor table",
                self.descriptors,
                16 * size,
                Permissions::Read,
            ),
            (
                "the available ring",
                self.driver,
                6 + 2 * size,
                Permissions::Read,
            ),
            (
                "the used ring",
                self.device,
                6 + 8 * size,
                Permissions::Write,
            ),
        ];
        for (name, address, length, access) in parts {
            let start = GuestAddress(address);
            if address == 0 || !memory.check_range(start, length as usize, access) {
                return Err(QueueError::Misplaced(name, address));
            }
        }
        self.queue
            .try_set_desc_table_address(GuestAddress(self.descriptors))?;
        self.queue
            .try_set_avail_ring_address(GuestAddress(self.driver))?;
        self.queue
            .try_set_used_ring_address(GuestAddress(self.device))?;
        self.queue.set_event_idx(event_idx);
        self.queue.set_ready(true);
        Ok(())
    }

    /// Takes the next chain that the driver has made available.
    pub(super) fn pop(
        &mut self,
        memory: &Ram,
        busy: &Arc<()>,
    ) -> Result<Option<Chain>, QueueError> {
        let Some(descriptors) = self.queue.iter(memory)?.next() else {
            return Ok(None);
        };
        let head = descriptors.head_index();
        let mut segments = Vec::new();
        let mut readable = 0;
        let mut ended = false;
        for descriptor in descriptors {
            let (address, length) = (descriptor.addr(), descriptor.len());
            let access = if descriptor.is_write_only() {
                Permissions::Write
            } else if readable == segments.len() {
                readable += usize::from(length > 0);
                Permissions::Read
            } else {
                return Err(QueueError::Order(head));
            };
            if length > 0 {
                if !memory.check_range(address, length as usize, access) {
                    return Err(QueueError::Misplaced("a buffer", address.0));
                }
                segments.push(Segment {
                    address: address.0,
                    length,
                });
            }
            ended = !descriptor.has_next();
            if segments.len() > MAX_CHAIN {
                break;
            }
        }
        if !ended || segments.len() > MAX_CHAIN {
            return Err(QueueError::Endless(head));
        }
        Ok(Some(Chain {
            head,
            segments,
            readable,
            _busy: Arc::clone(busy),
        }))
    }

    /// Gives a chain back, `written` bytes of its writable buffers filled. Returns whether
    /// the driver wants an interrupt.
    pub(super) fn push(
        &mut self,
        memory: &Ram,
        chain: &Chain,
        written: u32,
    ) -> Result<bool, QueueError> {
        self.queue.add_used(memory, chain.head, written)?;
        if self.queue.event_idx_enabled() {
            return Ok(self.queue.needs_notification(memory)?);
        }
        // The flags are read after the used index is visible, so that a driver that sets
        // them and looks again misses nothing.
        fence(Ordering::SeqCst);
        let flags: u16 = memory
            .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
            .map_err(|_| QueueError::Misplaced("the available ring", self.driver))?;
        Ok(u16::from_le(flags) & AVAIL_NO_INTERRUPT == 0)
    }

    /// Gives several chains back at once: the driver sees all of them or none. Returns whether it
    /// wants an interrupt.
    pub(super) fn push_all(
        &mut self,
        memory: &Ram,
        chains: &[(Chain, u32)],
    ) -> Result<bool, QueueError> {
        let Some(((last, written), before)) = chains.split_last() else {
            return Ok(false);
        };
        let old = Wrapping(self.queue.next_used());
        let size = self.queue.size();
        for ((chain, written), index) in before.iter().zip(0_u16..) {
            // An element is two u32: head and bytes written (virtio 1.2 §2.7.8).
            let slot = u64::from((old.0.wrapping_add(index)) % size);
            let at = GuestAddress(self.queue.used_ring() + 4 + 8 * slot);
            let element = u64::from(chain.head) | u64::from(*written) << 32;
            memory
                .write_obj(element.to_le(), at)
                .map_err(|_| QueueError::Misplaced("the used ring", self.device))?;
        }
        let new = old + Wrapping(chains.len() as u16);
        self.queue.set_next_used((new - Wrapping(1)).0);
        let wanted = self.push(memory, last, *written)?;
        if !self.queue.event_idx_enabled() {
            return Ok(wanted);
        }
        // The queue knows of one chain only: the rule for all of them (§2.7.7.2).
        let at = GuestAddress(self.queue.avail_ring() + 4 + 2 * u64::from(size));
        let event: u16 = memory
            .load(at, Ordering::Relaxed)
            .map_err(|_| QueueError::Misplaced("the available ring", self.driver))?;
        Ok(new - Wrapping(u16::from_le(event)) - Wrapping(1) < new - old)
    }

    /// Puts the `count` chains that were taken last back, as if they had not been taken.
    pub(super) fn unpop(&mut self, count: u16) {
        let next = self.queue.next_avail().wrapping_sub(count);
        self.queue.set_next_avail(next);
    }

    /// Asks to be notified of the next chain. Returns true if there is one already.
    pub(super) fn rearm(&mut self, memory: &Ram) -> Result<bool, QueueError> {
        Ok(self.queue.enable_notification(memory)?)
    }
}
