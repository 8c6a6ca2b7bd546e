//! The log of a VHDX image, [MS-VHDX] 2.3: changes to its tables that may not be in their places yet,
//! if it was not closed. They are read, and shown in place of what the file has there.

use std::collections::HashMap;

use super::{checksum, number};
use crate::HostFile;
use crate::error::{Error, Result, damaged};
use crate::overlay::Overlay;

/// Sectors of the log, and what an entry and its descriptors take, in bytes.
const SECTOR: usize = 4096;
const ENTRY: usize = 64;
const DESCRIPTOR: usize = 32;
/// The largest log that is read.
const MAX_LOG: u64 = 256 << 20;
/// How many times the log's length is checked for what may be entries, at most.
const MAX_CHECKED: usize = 16;

/// An entry whose checksum is right.
#[derive(Debug)]
struct Entry {
    sequence: u64,
    /// Where the first entry is that is to be replayed together with this one.
    tail: usize,
    length: usize,
    /// Bytes that the file has at least.
    flushed: u64,
}

/// What the log says, of which the header says where it is and by which GUID its entries are known.
pub(super) fn replay(file: &HostFile, guid: &[u8], at: u64, length: u64) -> Result<Overlay> {
    if length == 0 || !length.is_multiple_of(1 << 20) || !at.is_multiple_of(1 << 20) {
        return Err(damaged("the place of the VHDX image's log"));
    }
    if length > MAX_LOG {
        let what = format!("a log of {length} bytes");
        return Err(Error::Unsupported(what));
    }
    let mut bytes = vec![0; length as usize];
    file.read_bytes(at, &mut bytes)?;
    let log = Log(bytes);
    let entries = log.entries(guid)?;
    let (first, last) = active(&entries, log.0.len())
        .ok_or_else(|| damaged("the VHDX image was not closed, and its log is not whole"))?;
    if file.size()? < entries[&last].flushed {
        return Err(damaged("the VHDX image is cut off"));
    }
    let mut overlay = Overlay::default();
    let mut at = first;
    loop {
        let entry = &entries[&at];
        log.apply(at, entry, &mut overlay)?;
        if at == last {
            return Ok(overlay);
        }
        at = (at + entry.length) % log.0.len();
    }
}

/// Where the entries to be replayed begin, and the last of them: those up to the newest one whose
/// predecessors, back to where it says that they begin, are all there.
fn active(entries: &HashMap<usize, Entry>, length: usize) -> Option<(usize, usize)> {
    let mut order: Vec<usize> = entries.keys().copied().collect();
    order.sort_unstable_by_key(|at| std::cmp::Reverse(entries[at].sequence));
    // the last of those that follow each other from here on
    let mut lasts: HashMap<usize, usize> = HashMap::new();
    let mut found: Option<(usize, usize)> = None;
    for at in order {
        let entry = &entries[&at];
        let next = (at + entry.length) % length;
        let follows = entries.get(&next);
        let follows =
            follows.is_some_and(|next| Some(next.sequence) == entry.sequence.checked_add(1));
        let last = match lasts.get(&next) {
            Some(last) if follows => *last,
            _ => at,
        };
        lasts.insert(at, last);
        let newer = |(_, other): &(usize, usize)| entries[other].sequence < entries[&last].sequence;
        if entries[&last].tail == at && found.as_ref().is_none_or(newer) {
            found = Some((at, last));
        }
    }
    found
}

/// A ring of sectors.
struct Log(Vec<u8>);

impl Log {
    /// Bytes from `at` on, which may go on at the begin.
    fn bytes(&self, at: usize, length: usize) -> Vec<u8> {
        let ring = self.0.iter().cycle().skip(at % self.0.len());
        ring.take(length).copied().collect()
    }

    /// The entries with this GUID, by where they are.
    fn entries(&self, guid: &[u8]) -> Result<HashMap<usize, Entry>> {
        let mut entries = HashMap::new();
        let mut checked = 0;
        for at in (0..self.0.len()).step_by(SECTOR) {
            let head = &self.0[at..at + ENTRY];
            let length = number(head, 8, 4) as usize;
            let sequence = number(head, 16, 8);
            let likely = head.starts_with(b"loge")
                && head[32..48] == *guid
                && sequence > 0
                && length > 0
                && length.is_multiple_of(SECTOR)
                && length <= self.0.len();
            if !likely {
                continue;
            }
            checked += length;
            if checked / MAX_CHECKED > self.0.len() {
                return Err(damaged("the VHDX image's log is full of what is none"));
            }
            let bytes = self.bytes(at, length);
            if number(&bytes, 4, 4) != u64::from(checksum(&bytes)) {
                continue;
            }
            let entry = Entry {
                sequence,
                tail: number(head, 12, 4) as usize,
                length,
                flushed: number(head, 48, 8),
            };
            entries.insert(at, entry);
        }
        Ok(entries)
    }

    /// Does what the descriptors of an entry say.
    fn apply(&self, at: usize, entry: &Entry, overlay: &mut Overlay) -> Result<()> {
        let wrong = || {
            damaged(format!(
                "the log entry {} of the VHDX image",
                entry.sequence
            ))
        };
        let bytes = self.bytes(at, entry.length);
        let count = number(&bytes, 24, 4) as usize;
        let front = count
            .checked_mul(DESCRIPTOR)
            .and_then(|descriptors| descriptors.checked_add(ENTRY))
            .map(|front| front.next_multiple_of(SECTOR))
            .filter(|front| *front <= bytes.len())
            .ok_or_else(wrong)?;
        let mut sectors = bytes[front..].chunks_exact(SECTOR);
        for descriptor in bytes[ENTRY..].chunks_exact(DESCRIPTOR).take(count) {
            let offset = number(descriptor, 16, 8);
            if number(descriptor, 24, 8) != entry.sequence || !offset.is_multiple_of(SECTOR as u64)
            {
                return Err(wrong());
            }
            match &descriptor[..4] {
                b"zero" => {
                    let length = number(descriptor, 8, 8);
                    if !length.is_multiple_of(SECTOR as u64) {
                        return Err(wrong());
                    }
                    overlay.zero(offset, length);
                }
                b"desc" => {
                    let sector = sectors.next().ok_or_else(wrong)?;
                    let sequence = number(sector, 4, 4) << 32 | number(sector, SECTOR - 4, 4);
                    if !sector.starts_with(b"data") || sequence != entry.sequence {
                        return Err(wrong());
                    }
                    // its first and last bytes stand in the descriptor
                    let mut data = sector.to_vec();
                    data[..8].copy_from_slice(&descriptor[8..16]);
                    data[SECTOR - 4..].copy_from_slice(&descriptor[4..8]);
                    overlay.write(offset, &data);
                }
                _ => return Err(wrong()),
            }
        }
        Ok(())
    }
}
