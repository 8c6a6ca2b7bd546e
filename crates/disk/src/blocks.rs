//! Images that are a table of blocks, each somewhere in the file or nowhere: what VHD, VHDX and VMDK
//! have in common when they are read. They are read to be converted, and never changed.

use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};

use flate2::read::ZlibDecoder;

use crate::error::{Error, Result, damaged};
use crate::{Buffers, Extent, ExtentKind, HostFile, ReadOnlyDisk};

/// Blocks of an image, at most: 16 TiB of the smallest ones that are usual.
pub(crate) const MAX_BLOCKS: u64 = 1 << 28;

/// In place of a host offset: the block is zeroes.
pub(crate) const NOWHERE: u64 = u64::MAX;

/// See the module.
#[derive(Debug)]
pub(crate) struct BlockImage {
    pub(crate) file: HostFile,
    /// Bytes of the disk.
    pub(crate) size: u64,
    /// Bytes of a block.
    pub(crate) block: u64,
    /// Where each is: host offset, or [`NOWHERE`].
    pub(crate) blocks: Vec<u64>,
    /// Whether there is a VMDK grain marker and compressed data, and not the bytes.
    pub(crate) packed: bool,
    /// The block that was unpacked last.
    pub(crate) unpacked: Mutex<Option<(u64, Arc<[u8]>)>>,
}

impl BlockImage {
    /// An image whose blocks are as they are on the disk.
    pub(crate) fn new(file: HostFile, size: u64, block: u64, blocks: Vec<u64>) -> Self {
        Self {
            file,
            size,
            block,
            blocks,
            packed: false,
            unpacked: Mutex::new(None),
        }
    }

    fn place(&self, offset: u64) -> Option<u64> {
        let number = usize::try_from(offset / self.block).ok()?;
        self.blocks.get(number).copied().filter(|at| *at != NOWHERE)
    }

    /// The bytes of the packed block at a host offset.
    fn unpack(&self, at: u64) -> Result<Arc<[u8]>> {
        let lock = || self.unpacked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, block)) = lock().as_ref().filter(|last| last.0 == at) {
            return Ok(Arc::clone(block));
        }
        // where on the disk, how many bytes
        let mut marker = [0; 12];
        self.file.read_bytes(at, &mut marker)?;
        let length = u32::from_le_bytes([marker[8], marker[9], marker[10], marker[11]]);
        if u64::from(length) > 2 * self.block {
            return Err(damaged(format!("the grain at byte {at:#x}")));
        }
        let mut packed = vec![0; length as usize];
        self.file.read_bytes(at + 12, &mut packed)?;
        let mut block = Vec::new();
        let decoder = ZlibDecoder::new(&*packed).take(self.block);
        { decoder }
            .read_to_end(&mut block)
            .map_err(|_| damaged(format!("the grain at byte {at:#x}")))?;
        // the last one of a disk may be shorter
        block.resize(self.block as usize, 0);
        let block: Arc<[u8]> = block.into();
        *lock() = Some((at, Arc::clone(&block)));
        Ok(block)
    }
}

impl ReadOnlyDisk for BlockImage {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, mut offset: u64, mut buffers: Buffers) -> Result<()> {
        let end = offset.checked_add(buffers.len());
        if end.is_none_or(|end| end > self.size) {
            return Err(Error::Invalid("beyond the end of the disk".to_owned()));
        }
        while !buffers.is_empty() {
            let inside = offset % self.block;
            let part = buffers.take(self.block - inside);
            let length = part.len();
            match self.place(offset) {
                None => part.clear(),
                Some(at) if self.packed => {
                    part.fill_from(&self.unpack(at)?[inside as usize..][..length as usize]);
                }
                Some(at) => self.file.read(at + inside, part)?,
            }
            offset += length;
        }
        Ok(())
    }

    fn extent(&self, offset: u64, length: u64) -> Result<Extent> {
        let end = offset.saturating_add(length).min(self.size);
        let first = self.place(offset);
        let inside = offset % self.block;
        let mut at = offset - inside + self.block;
        while at < end {
            let next = self.place(at);
            let goes_on = match (first, next) {
                (None, None) => true,
                (Some(a), Some(b)) => self.packed || b == a + (at - (offset - inside)),
                _ => false,
            };
            if !goes_on {
                break;
            }
            at += self.block;
        }
        let kind = match first {
            None => ExtentKind::Absent,
            Some(_) if self.packed => ExtentKind::Compressed,
            Some(at) => ExtentKind::Data(at + inside),
        };
        Ok(Extent {
            length: at.min(end) - offset,
            kind,
            depth: 0,
        })
    }
}
