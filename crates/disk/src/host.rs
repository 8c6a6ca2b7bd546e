//! A file or block device of the host, as images use it.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, SeekFrom as RustixSeek, fallocate, seek};
use rustix::io::Errno;

use crate::buffers::Buffers;
use crate::overlay::{Overlay, Seen};

/// Zeroes are written in pieces of so many bytes where the host cannot make them.
const ZERO_PIECE: u64 = 256 << 10;

/// See the module.
#[derive(Debug)]
pub struct HostFile {
    file: File,
    durable: bool,
    /// What reads see in place of what the file has.
    overlay: Option<Overlay>,
}

impl HostFile {
    /// A file that was opened for what is to be done with it.
    pub fn new(file: File) -> Self {
        Self {
            file,
            durable: true,
            overlay: None,
        }
    }

    /// The same for one whose content can be made again: what is written survives the end of the
    /// process, as that of any file does, but is made durable only when the host likes.
    pub fn relaxed(file: File) -> Self {
        Self {
            file,
            durable: false,
            overlay: None,
        }
    }

    /// Its size in bytes.
    pub fn size(&self) -> io::Result<u64> {
        // the end, not the metadata: block devices have no length there
        (&self.file).seek(SeekFrom::End(0))
    }

    /// Fills `buffers` from byte `offset` on; with zeroes past the end.
    pub fn read(&self, mut offset: u64, mut buffers: Buffers) -> io::Result<()> {
        let Some(overlay) = &self.overlay else {
            return buffers.read_from(&self.file, offset);
        };
        while !buffers.is_empty() {
            let length;
            match overlay.see(offset) {
                Seen::File(rest) => {
                    let part = buffers.take(rest);
                    length = part.len();
                    part.read_from(&self.file, offset)?;
                }
                Seen::Zeroes(rest) => {
                    let part = buffers.take(rest);
                    length = part.len();
                    part.clear();
                }
                Seen::Data(data) => {
                    let part = buffers.take(data.len() as u64);
                    length = part.len();
                    part.fill_from(&data[..length as usize]);
                }
            }
            offset += length;
        }
        Ok(())
    }

    /// Has [`HostFile::read`] see these changes. The file, which is only read, stays as it is.
    pub(crate) fn show(&mut self, changes: Overlay) {
        self.overlay = Some(changes);
    }

    /// Fills `buffers` from byte `offset` on. Fails with `UnexpectedEof` past the end.
    pub fn read_exact(&self, offset: u64, buffers: Buffers) -> io::Result<()> {
        buffers.read_exact_from(&self.file, offset)
    }

    /// Writes `buffers` from byte `offset` on.
    pub fn write(&self, offset: u64, buffers: Buffers) -> io::Result<()> {
        buffers.write_to(&self.file, offset)
    }

    /// Reads as many bytes as `data` has, which are zeroes past the end.
    pub fn read_bytes(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.read(offset, Buffers::from(data))
    }

    /// Writes all of `data`.
    pub fn write_bytes(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    /// Makes what was written before durable.
    pub fn sync(&self) -> io::Result<()> {
        if self.durable {
            self.file.sync_data()?;
        }
        Ok(())
    }

    /// Sets the size in bytes.
    pub fn set_size(&self, size: u64) -> io::Result<()> {
        self.file.set_len(size)
    }

    /// Gives blocks back to the host; afterwards they read as zeroes. Whether the host could.
    pub fn punch(&self, offset: u64, length: u64) -> io::Result<bool> {
        self.allocate(FallocateFlags::PUNCH_HOLE, offset, length)
    }

    /// Makes bytes zeroes, which keep their blocks if the host can do that.
    pub fn write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        if length == 0 || self.allocate(FallocateFlags::ZERO_RANGE, offset, length)? {
            return Ok(());
        }
        let zeroes = vec![0; ZERO_PIECE.min(length) as usize];
        let mut done = 0;
        while done < length {
            let here = ZERO_PIECE.min(length - done);
            self.write_bytes(offset + done, &zeroes[..here as usize])?;
            done += here;
        }
        Ok(())
    }

    /// Whether the host could do it; `false` if it cannot do such a thing at all.
    fn allocate(&self, flags: FallocateFlags, offset: u64, length: u64) -> io::Result<bool> {
        if length == 0 {
            return Ok(true);
        }
        loop {
            match fallocate(
                &self.file,
                flags | FallocateFlags::KEEP_SIZE,
                offset,
                length,
            ) {
                Ok(()) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The first bytes at or behind `offset` that the host keeps, up to the next hole; empty, at the
    /// end, if there are none.
    pub fn next_data(&self, offset: u64) -> io::Result<Range<u64>> {
        let end = self.size()?;
        let start = match seek(&self.file, RustixSeek::Data(offset)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(end..end),
            // a host that cannot tell: all of it
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(offset.min(end)..end),
            Err(error) => return Err(error.into()),
        };
        match seek(&self.file, RustixSeek::Hole(start)) {
            Ok(hole) => Ok(start..hole.max(start)),
            Err(Errno::NXIO) => Ok(end..end),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_told_from_data() {
        let file = HostFile::new(tempfile::tempfile().unwrap());
        file.set_size(1 << 20).unwrap();
        file.write_bytes(0x40000, &[1; 0x1000]).unwrap();

        assert_eq!(file.next_data(0).unwrap(), 0x40000..0x41000);
        assert_eq!(file.next_data(0x40800).unwrap(), 0x40800..0x41000);
        assert_eq!(file.next_data(0x41000).unwrap(), 1 << 20..1 << 20);

        assert!(file.punch(0x40000, 0x1000).unwrap());
        assert_eq!(file.next_data(0).unwrap(), 1 << 20..1 << 20);
    }

    #[test]
    fn zeroes_are_written_over_data() {
        let file = HostFile::new(tempfile::tempfile().unwrap());
        file.write_bytes(0, &[7; 0x3000]).unwrap();
        file.write_zeroes(0x800, 0x2000).unwrap();

        let mut data = [9; 0x3000];
        file.read_bytes(0, &mut data).unwrap();
        assert!(data[0x800..0x2800].iter().all(|byte| *byte == 0));
        assert_eq!((data[0x7ff], data[0x2800]), (7, 7));
    }
}
