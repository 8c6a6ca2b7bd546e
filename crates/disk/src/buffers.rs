//! Memory that disks are read into and written from: guest RAM, or the host's own. Used by
//! everything that moves data.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// The most pieces the kernel takes in one call (`UIO_MAXIOV`).
const MAX_PIECES: usize = 1024;

/// Pieces of memory, in order, that somebody else may change meanwhile.
#[derive(Clone, Debug, Default)]
pub struct Buffers<'a> {
    pieces: Vec<VolatileSlice<'a>>,
    length: u64,
}

impl<'a> Buffers<'a> {
    /// These pieces of guest memory. What is read into them is not told to their bitmap.
    pub fn of_guest<B: BitmapSlice>(pieces: &[VolatileSlice<'a, B>]) -> Self {
        pieces
            .iter()
            .map(|piece| {
                // SAFETY: the same memory, for as long.
                unsafe { VolatileSlice::new(piece.ptr_guard_mut().as_ptr(), piece.len()) }
            })
            .collect()
    }

    /// How many bytes they are.
    pub fn len(&self) -> u64 {
        self.length
    }

    /// Whether they are none.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Takes `length` bytes off the front, or all if there are not so many.
    #[must_use]
    pub fn take(&mut self, length: u64) -> Self {
        let mut left = length;
        let mut taken = Vec::new();
        let mut rest = self.pieces.split_off(0).into_iter();
        for piece in rest.by_ref() {
            let here = (piece.len() as u64).min(left) as usize;
            left -= here as u64;
            let Ok((front, back)) = piece.split_at(here) else {
                break;
            };
            taken.push(front);
            if !back.is_empty() {
                self.pieces.push(back);
            }
            if left == 0 {
                break;
            }
        }
        self.pieces.extend(rest);
        self.length -= length - left;
        Self {
            pieces: taken,
            length: length - left,
        }
    }

    /// Copies `data` to the front.
    pub fn fill_from(&self, data: &[u8]) {
        let mut rest = data;
        for piece in &self.pieces {
            let (here, after) = rest.split_at(piece.len().min(rest.len()));
            piece.copy_from(here);
            rest = after;
        }
    }

    /// Copies the front to `data`.
    pub fn copy_to(&self, data: &mut [u8]) {
        let mut rest = data;
        for piece in &self.pieces {
            let (here, after) = rest.split_at_mut(piece.len().min(rest.len()));
            piece.copy_to(here);
            rest = after;
        }
    }

    /// Makes them all zeroes.
    pub fn clear(&self) {
        const ZEROES: [u8; 4096] = [0; 4096];
        for piece in &self.pieces {
            let mut rest = *piece;
            while !rest.is_empty() {
                let here = rest.len().min(ZEROES.len());
                rest.copy_from(&ZEROES[..here]);
                match rest.offset(here) {
                    Ok(after) => rest = after,
                    Err(_) => break,
                }
            }
        }
    }

    /// Fills them from byte `offset` of a file; with zeroes past its end.
    pub(crate) fn read_from(mut self, file: &File, offset: u64) -> io::Result<()> {
        self.read_some(file, offset)?;
        self.clear();
        Ok(())
    }

    /// Fills them from byte `offset` of a file. Fails with `UnexpectedEof` past its end.
    pub(crate) fn read_exact_from(mut self, file: &File, offset: u64) -> io::Result<()> {
        self.read_some(file, offset)?;
        if self.is_empty() {
            Ok(())
        } else {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }

    /// Fills them as far as the file goes, and leaves the rest.
    fn read_some(&mut self, file: &File, mut offset: u64) -> io::Result<()> {
        while !self.is_empty() {
            let vectors = self.vectors();
            // SAFETY: each vector is writable memory that a piece stands for; nobody holds Rust
            // references to it. There are at most MAX_PIECES.
            let done = unsafe {
                libc::preadv64(
                    file.as_raw_fd(),
                    vectors.as_ptr(),
                    vectors.len() as i32,
                    offset as i64,
                )
            };
            match result(done)? {
                Some(0) => break,
                Some(done) => {
                    let _ = self.take(done);
                    offset += done;
                }
                None => {}
            }
        }
        Ok(())
    }

    /// Writes them to a file from byte `offset` on.
    pub(crate) fn write_to(mut self, file: &File, mut offset: u64) -> io::Result<()> {
        while !self.is_empty() {
            let vectors = self.vectors();
            // SAFETY: each vector is memory that a piece stands for, which the kernel only reads.
            // There are at most MAX_PIECES.
            let done = unsafe {
                libc::pwritev64(
                    file.as_raw_fd(),
                    vectors.as_ptr(),
                    vectors.len() as i32,
                    offset as i64,
                )
            };
            match result(done)? {
                Some(0) => return Err(io::ErrorKind::WriteZero.into()),
                Some(done) => {
                    let _ = self.take(done);
                    offset += done;
                }
                None => {}
            }
        }
        Ok(())
    }

    fn vectors(&self) -> Vec<libc::iovec> {
        let pieces = self.pieces.iter().filter(|piece| !piece.is_empty());
        pieces
            .take(MAX_PIECES)
            .map(|piece| libc::iovec {
                iov_base: piece.ptr_guard_mut().as_ptr().cast(),
                iov_len: piece.len(),
            })
            .collect()
    }
}

/// Bytes that a system call did; none if it was interrupted.
fn result(done: libc::ssize_t) -> io::Result<Option<u64>> {
    match u64::try_from(done) {
        Ok(done) => Ok(Some(done)),
        Err(_) => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(None),
            error => Err(error),
        },
    }
}

impl<'a> FromIterator<VolatileSlice<'a>> for Buffers<'a> {
    fn from_iter<I: IntoIterator<Item = VolatileSlice<'a>>>(pieces: I) -> Self {
        let pieces: Vec<_> = pieces.into_iter().collect();
        let length = pieces.iter().map(|piece| piece.len() as u64).sum();
        Self { pieces, length }
    }
}

impl<'a> From<&'a mut [u8]> for Buffers<'a> {
    fn from(bytes: &'a mut [u8]) -> Self {
        [VolatileSlice::from(bytes)].into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taking_splits_pieces_and_keeps_their_order() {
        let (mut a, mut b) = ([0_u8; 3], [0_u8; 5]);
        let mut buffers: Buffers = [
            VolatileSlice::from(&mut a[..]),
            VolatileSlice::from(&mut b[..]),
        ]
        .into_iter()
        .collect();

        let front = buffers.take(4);
        assert_eq!((front.len(), buffers.len()), (4, 4));
        front.fill_from(&[1, 2, 3, 4]);
        buffers.fill_from(&[5, 6, 7, 8]);
        assert_eq!(buffers.take(9).len(), 4);
        assert!(buffers.is_empty());

        assert_eq!((a, b), ([1, 2, 3], [4, 5, 6, 7, 8]));
    }

    #[test]
    fn reading_past_the_end_of_a_file_gives_zeroes() {
        let file = tempfile::tempfile().unwrap();
        let mut data = [1_u8, 2, 3];
        Buffers::from(&mut data[..]).write_to(&file, 2).unwrap();

        let mut all = [9_u8; 8];
        Buffers::from(&mut all[..]).read_from(&file, 1).unwrap();
        assert_eq!(all, [0, 1, 2, 3, 0, 0, 0, 0]);
    }
}
