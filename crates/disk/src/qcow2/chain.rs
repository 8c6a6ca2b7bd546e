//! Changing what an image is based on, and how large it is.

use super::refcounts::numbers;
use super::{Qcow2, header::MAX_L1};
use crate::copy::{Copied, Part, each_part};
use crate::error::{Error, Result};
use crate::pieces::Crew;
use crate::{Buffers, Disk, Extent, ExtentKind, ReadOnlyDisk};

/// Bytes that are compared at once, at least.
const PIECE: u64 = 1 << 20;

impl Qcow2 {
    /// Writes what this image has of its own to the one that it is based on, `below`, which was
    /// opened for that. Afterwards this image has nothing of its own.
    pub fn commit_to(
        &mut self,
        below: &dyn Disk,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<Copied> {
        self.check_change(0, 0)?;
        if below.size() < self.size {
            let what = "the image below is smaller; resize it first".to_owned();
            return Err(Error::Invalid(what));
        }
        // what is not of this image's own is left as it is
        let own = Own(self);
        let put = |at, part: Part| match part {
            Part::Zeroes(length) => {
                let mut done = 0;
                while done < length {
                    let extent = self.extent(at + done, length - done)?;
                    if extent.depth == 0 && extent.kind != ExtentKind::Absent {
                        below.write_zeroes(at + done, extent.length, true)?;
                    }
                    done += extent.length;
                }
                Ok(())
            }
            Part::Data(bytes) => below.write(at, bytes.into()),
        };
        let (range, unit) = (0..self.size, below.unit());
        let copied = each_part(&own, range, unit, Crew::One, progress, &put)?;
        below.flush()?;
        self.empty()?;
        Ok(copied)
    }

    /// Forgets everything that this image has of its own.
    fn empty(&mut self) -> Result<()> {
        self.change_header(|header, place| {
            let entries = header.l1_entries as usize;
            header.l1_offset = place(&numbers(&vec![0; entries]))?;
            Ok(())
        })
    }

    /// Has the image based on `onto`, of which name and format are written down, or on none. What is
    /// on the disk stays the same: where the other differs from the one below, the image gets that of
    /// its own. Returns how many bytes it got.
    pub fn rebase(
        &mut self,
        onto: Option<(&dyn Disk, &str, &str)>,
        progress: &dyn Fn(u64),
    ) -> Result<u64> {
        self.check_change(0, 0)?;
        let piece = self.layout.cluster_size().max(PIECE);
        let (mut here, mut there) = (vec![0; piece as usize], vec![0; piece as usize]);
        let (mut at, mut got) = (0, 0);
        while at < self.size {
            let extent = self.extent(at, (self.size - at).min(piece - at % piece))?;
            let own = extent.depth == 0 && extent.kind != ExtentKind::Absent;
            if !own {
                let here = &mut here[..extent.length as usize];
                let there = &mut there[..extent.length as usize];
                self.read(at, Buffers::from(&mut *here))?;
                there.fill(0);
                if let Some((onto, ..)) = onto {
                    let inside = onto.size().saturating_sub(at).min(extent.length);
                    if inside > 0 {
                        onto.read(at, Buffers::from(&mut there[..inside as usize]))?;
                    }
                }
                let mut part = at;
                let cluster = self.layout.cluster_size() as usize;
                for (here, there) in here.chunks_mut(cluster).zip(there.chunks(cluster)) {
                    if here != there {
                        self.write(part, Buffers::from(&mut *here))?;
                        got += here.len() as u64;
                    }
                    part += here.len() as u64;
                }
            }
            at += extent.length;
            progress(at);
        }
        self.flush()?;
        self.set_backing(onto.map(|(_, name, format)| (name, format)))?;
        Ok(got)
    }

    /// Has the image based on another, of which `name` and `format` are written down. What is on the
    /// disk changes where the other is not the same.
    pub fn set_backing(&mut self, backing: Option<(&str, &str)>) -> Result<()> {
        self.check_change(0, 0)?;
        self.change_header(|header, _| {
            header.backing_name = backing.map(|(name, _)| name.to_owned());
            header.backing_format = backing.map(|(_, format)| format.to_owned());
            Ok(())
        })
    }

    /// Makes the disk larger or smaller. What is new is zeroes.
    pub fn resize(&mut self, size: u64) -> Result<()> {
        self.check_change(0, 0)?;
        let old = self.size;
        if size < old {
            if !self.snapshots()?.is_empty() {
                let what = "an image with snapshots cannot become smaller".to_owned();
                return Err(Error::Unsupported(what));
            }
            // what is cut off must not come back when the disk grows again
            self.write_zeroes(size, old - size, true)?;
        }
        let entries = self.layout.l1_entries(size);
        if entries * 8 > MAX_L1 {
            let what = "the disk is too large for its cluster size".to_owned();
            return Err(Error::Invalid(what));
        }
        self.commit()?;
        let mut l1 = self.tables().l1.clone();
        l1.resize(l1.len().max(entries as usize), 0);
        self.change_header(|header, place| {
            header.size = size;
            if l1.len() > header.l1_entries as usize {
                header.l1_offset = place(&numbers(&l1))?;
                header.l1_entries = l1.len() as u32;
            }
            Ok(())
        })?;
        let cluster = self.layout.cluster_size();
        let end = old.next_multiple_of(cluster).min(size);
        if size > old {
            // the rest of the last cluster, and what an image below has there
            self.write_zeroes(old, end - old, false)?;
            self.hide_below(end, size)?;
        }
        self.flush()
    }

    /// Makes bytes zeroes that an image below would show.
    fn hide_below(&self, start: u64, end: u64) -> Result<()> {
        let mut at = start;
        while at < end {
            let extent = self.extent(at, end - at)?;
            if extent.depth > 0 && extent.kind != ExtentKind::Absent {
                self.write_zeroes(at, extent.length, true)?;
            }
            at += extent.length;
        }
        Ok(())
    }
}

/// What an image has of its own; zeroes, elsewhere.
#[derive(Debug)]
struct Own<'a>(&'a Qcow2);

impl ReadOnlyDisk for Own<'_> {
    fn size(&self) -> u64 {
        self.0.size
    }

    fn read(&self, offset: u64, buffers: Buffers) -> Result<()> {
        self.0.read(offset, buffers)
    }

    fn extent(&self, offset: u64, length: u64) -> Result<Extent> {
        let mut extent = self.0.extent(offset, length)?;
        if extent.depth > 0 {
            extent.kind = ExtentKind::Absent;
        }
        Ok(extent)
    }
}
