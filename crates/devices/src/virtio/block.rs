//! virtio-blk (virtio 1.2 §5.2): turns descriptor chains into [`Request`]s and their
//! outcome into status bytes.
//!
//! The owner takes requests with [`Block::next_request`], carries out the [`Action`], and
//! gives each back with [`Block::complete`]. All ranges in an action lie inside the disk
//! and inside guest memory. This file never sees a byte of the disk.

use strata_memory::{Bytes, GuestAddress};

use super::queue::{Chain, QueueError, Segment, slice};
use super::transport::Transport;
use super::{DeviceType, QUEUE_SIZE, VirtioDevice, copy_config};

/// Bytes in a sector, the unit of all positions on a disk (§5.2.4).
pub const SECTOR_SIZE: u64 = 512;
/// Bytes of the block size that is suggested to the guest: a page of the host's cache.
const PHYSICAL_BLOCK_EXPONENT: u8 = 3;
/// Bytes of a request's header: type, reserved, sector (§5.2.6).
const HEADER_SIZE: u64 = 16;
/// Bytes of a range in a discard or write-zeroes request.
const RANGE_SIZE: u64 = 16;
/// The most ranges in one such request.
const MAX_RANGES: u32 = 16;
/// The most sectors in a range to discard: 2 GiB.
const MAX_DISCARD_SECTORS: u32 = 1 << 22;
/// The most sectors in a range to zero: 64 MiB, as the host may have to write them all.
const MAX_ZERO_SECTORS: u32 = 1 << 17;
/// Bytes of the string that identifies the disk.
const ID_SIZE: usize = 20;

/// Feature bits (§5.2.3).
mod feature {
    pub(super) const SEG_MAX: u64 = 1 << 2;
    pub(super) const RO: u64 = 1 << 5;
    pub(super) const BLK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = 1 << 9;
    pub(super) const TOPOLOGY: u64 = 1 << 10;
    pub(super) const CONFIG_WCE: u64 = 1 << 11;
    pub(super) const MQ: u64 = 1 << 12;
    pub(super) const DISCARD: u64 = 1 << 13;
    pub(super) const WRITE_ZEROES: u64 = 1 << 14;
}

/// Offset of `writeback` in the configuration structure (§5.2.4).
const CONFIG_WRITEBACK: u64 = 32;
/// Bytes of the configuration structure.
const CONFIG_SIZE: usize = 60;

/// Request types (§5.2.6).
mod kind {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
}

/// Flag of a write-zeroes range: the blocks may be deallocated.
const FLAG_UNMAP: u32 = 1;

/// How a request ended (§5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// Failed: out of range, misaligned, or the host could not.
    IoError = 1,
    /// A kind of request that the device does not know.
    Unsupported = 2,
}

/// A part of the disk, in bytes: multiples of [`SECTOR_SIZE`], inside the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SectorRange {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// For zeroes: the host may deallocate the blocks.
    pub may_unmap: bool,
}

/// What a request asks the owner to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Fill `buffers` from the disk, from byte `offset` on.
    Read {
        /// Where on the disk.
        offset: u64,
        /// Where in guest memory, in order.
        buffers: Vec<Segment>,
    },
    /// Write `buffers` to the disk, from byte `offset` on.
    Write {
        /// Where on the disk.
        offset: u64,
        /// Where in guest memory, in order.
        buffers: Vec<Segment>,
        /// The data is to be on stable storage before the request is completed.
        durable: bool,
    },
    /// Bring all completed writes to stable storage.
    Flush,
    /// The contents of these ranges are no longer needed.
    Discard(Vec<SectorRange>),
    /// These ranges are to read as zeroes.
    WriteZeroes {
        /// Where on the disk.
        ranges: Vec<SectorRange>,
        /// The zeroes are to be on stable storage before the request is completed.
        durable: bool,
    },
    /// Nothing: complete the request with this status.
    Answer(Status),
}

/// A request on its way through the owner.
#[derive(Debug)]
#[must_use = "a request is to be given back with Block::complete"]
pub struct Request {
    /// What to do.
    pub action: Action,
    chain: Chain,
    /// Where the status byte goes.
    status: GuestAddress,
}

/// What a disk is.
#[derive(Clone, Debug)]
pub struct BlockConfig {
    /// Size in sectors of 512 bytes.
    pub sectors: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Request queues, 1 to 64.
    pub queues: u16,
    /// What `VIRTIO_BLK_T_GET_ID` answers; at most 20 bytes of it.
    pub id: String,
}

/// A virtio disk.
#[derive(Clone, Debug)]
pub struct Block {
    config: BlockConfig,
    /// Writes may stay in a cache until a flush.
    writeback: bool,
}

impl Block {
    /// A disk as `config` says.
    pub fn new(config: BlockConfig) -> Self {
        Self {
            config,
            writeback: true,
        }
    }

    /// Takes the next request of queue `queue`; `None` if there is none.
    pub fn next_request(&self, transport: &mut Transport, queue: usize) -> Option<Request> {
        let chain = transport.pop(queue)?;
        let Some(last) = chain.writable().last() else {
            transport.fail(&QueueError::Protocol(
                "a disk request has no room for its status",
            ));
            return None;
        };
        let status = GuestAddress(last.address + u64::from(last.length) - 1);
        let action = self.parse(transport, &chain).unwrap_or_else(Action::Answer);
        Some(Request {
            action,
            chain,
            status,
        })
    }

    /// Gives a request back to the driver.
    pub fn complete(
        &self,
        transport: &mut Transport,
        queue: usize,
        request: Request,
        status: Status,
    ) {
        let Request {
            chain,
            status: address,
            ..
        } = request;
        let _ = transport.memory().write_obj(status as u8, address);
        let written = chain.writable_length() as u32;
        transport.push(queue, chain, written);
    }

    fn parse(&self, transport: &Transport, chain: &Chain) -> Result<Action, Status> {
        let mut header = [0; HEADER_SIZE as usize];
        if chain.read(transport.memory(), 0, &mut header) < header.len() {
            return Err(Status::IoError);
        }
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let payload = chain.readable_length() - HEADER_SIZE;
        // The last writable byte is the status.
        let room = chain.writable_length() - 1;
        match u32::from_le_bytes([a, b, c, d]) {
            kind::IN => {
                let offset = self.locate(sector, room)?;
                Ok(Action::Read {
                    offset,
                    buffers: slice(chain.writable(), 0, room),
                })
            }
            kind::OUT => {
                self.check_writable()?;
                let offset = self.locate(sector, payload)?;
                let buffers = slice(chain.readable(), HEADER_SIZE, payload);
                Ok(Action::Write {
                    offset,
                    buffers,
                    durable: !self.writeback,
                })
            }
            kind::FLUSH => Ok(Action::Flush),
            kind::GET_ID => Ok(Action::Answer(self.answer_id(transport, chain, room))),
            kind::DISCARD => {
                let ranges = self.ranges(transport, chain, MAX_DISCARD_SECTORS, 0)?;
                Ok(Action::Discard(ranges))
            }
            kind::WRITE_ZEROES => {
                let ranges = self.ranges(transport, chain, MAX_ZERO_SECTORS, FLAG_UNMAP)?;
                Ok(Action::WriteZeroes {
                    ranges,
                    durable: !self.writeback,
                })
            }
            _ => Err(Status::Unsupported),
        }
    }

    fn check_writable(&self) -> Result<(), Status> {
        if self.config.read_only {
            Err(Status::IoError)
        } else {
            Ok(())
        }
    }

    /// The byte offset of `sector`, if `length` bytes from it are whole sectors on the disk.
    fn locate(&self, sector: u64, length: u64) -> Result<u64, Status> {
        if !length.is_multiple_of(SECTOR_SIZE) {
            return Err(Status::IoError);
        }
        let end = sector
            .checked_add(length / SECTOR_SIZE)
            .ok_or(Status::IoError)?;
        if end > self.config.sectors {
            return Err(Status::IoError);
        }
        sector.checked_mul(SECTOR_SIZE).ok_or(Status::IoError)
    }

    /// The ranges of a discard or write-zeroes request (§5.2.6).
    fn ranges(
        &self,
        transport: &Transport,
        chain: &Chain,
        max_sectors: u32,
        flags_known: u32,
    ) -> Result<Vec<SectorRange>, Status> {
        self.check_writable()?;
        let payload = chain.readable_length() - HEADER_SIZE;
        let too_long = payload > u64::from(MAX_RANGES) * RANGE_SIZE;
        if payload == 0 || !payload.is_multiple_of(RANGE_SIZE) || too_long {
            return Err(Status::IoError);
        }
        let mut ranges = Vec::new();
        for index in 0..payload / RANGE_SIZE {
            let mut bytes = [0; RANGE_SIZE as usize];
            chain.read(
                transport.memory(),
                HEADER_SIZE + index * RANGE_SIZE,
                &mut bytes,
            );
            let [sector @ .., s0, s1, s2, s3, f0, f1, f2, f3] = bytes;
            let count = u32::from_le_bytes([s0, s1, s2, s3]);
            let flags = u32::from_le_bytes([f0, f1, f2, f3]);
            if flags & !flags_known != 0 {
                return Err(Status::Unsupported);
            }
            if count > max_sectors {
                return Err(Status::IoError);
            }
            let length = u64::from(count) * SECTOR_SIZE;
            let offset = self.locate(u64::from_le_bytes(sector), length)?;
            ranges.push(SectorRange {
                offset,
                length,
                may_unmap: flags & FLAG_UNMAP != 0,
            });
        }
        Ok(ranges)
    }

    fn answer_id(&self, transport: &Transport, chain: &Chain, room: u64) -> Status {
        let mut id = [0; ID_SIZE];
        for (byte, value) in id.iter_mut().zip(self.config.id.bytes()) {
            *byte = value;
        }
        if room < ID_SIZE as u64 {
            return Status::IoError;
        }
        chain.write(transport.memory(), 0, &id);
        Status::Ok
    }

    fn config_structure(&self) -> [u8; CONFIG_SIZE] {
        let mut image = [0; CONFIG_SIZE];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.config.sectors.to_le_bytes());
        // A header and a status descriptor go with the data.
        put(12, &u32::from(QUEUE_SIZE - 2).to_le_bytes());
        put(20, &(SECTOR_SIZE as u32).to_le_bytes());
        put(24, &[PHYSICAL_BLOCK_EXPONENT, 0]);
        // Smallest and best transfer, in blocks of 512 bytes.
        put(26, &(1_u16 << PHYSICAL_BLOCK_EXPONENT).to_le_bytes());
        put(28, &0_u32.to_le_bytes());
        put(CONFIG_WRITEBACK as usize, &[u8::from(self.writeback)]);
        put(34, &self.config.queues.to_le_bytes());
        if !self.config.read_only {
            put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
            put(40, &MAX_RANGES.to_le_bytes());
            put(44, &(1_u32 << PHYSICAL_BLOCK_EXPONENT).to_le_bytes());
            put(48, &MAX_ZERO_SECTORS.to_le_bytes());
            put(52, &MAX_RANGES.to_le_bytes());
            put(56, &[1]);
        }
        image
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType {
            id: 2,
            class: 0x01_80_00,
        }
    }

    fn features(&self) -> u64 {
        let common = feature::SEG_MAX
            | feature::BLK_SIZE
            | feature::FLUSH
            | feature::TOPOLOGY
            | feature::CONFIG_WCE
            | feature::MQ;
        if self.config.read_only {
            common | feature::RO
        } else {
            common | feature::DISCARD | feature::WRITE_ZEROES
        }
    }

    fn queue_count(&self) -> u16 {
        self.config.queues
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&self.config_structure(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (CONFIG_WRITEBACK, [value]) = (offset, data) {
            self.writeback = *value != 0;
        }
    }

    fn activate(&mut self, features: u64) {
        // A driver that can neither flush nor choose expects write-through (§5.2.5.2).
        if features & (feature::FLUSH | feature::CONFIG_WCE) == 0 {
            self.writeback = false;
        }
    }

    fn reset(&mut self) {
        self.writeback = true;
    }
}

#[cfg(test)]
mod tests;
