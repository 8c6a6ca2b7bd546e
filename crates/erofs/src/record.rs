//! A record of what a layer's tar has beside the contents of files, by which the tar can be had
//! back byte for byte from the blob. Written by `tar` while the layer is read.
//!
//! A record is a row of pieces: `0`, a length of 32 bits and bytes; or `1` and two numbers of 64
//! bits, where in the blob the bytes are and how many. Numbers are little-endian.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;

use crate::error::Error;

const BYTES: u8 = 0;
const STORED: u8 = 1;

/// Writes a record, if there is to be one.
pub(crate) struct Recorder<'a>(pub(crate) Option<&'a mut dyn Write>);

impl Recorder<'_> {
    /// The tar goes on with these bytes.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let Some(out) = &mut self.0 else {
            return Ok(());
        };
        for piece in bytes.chunks(u32::MAX as usize) {
            let head = [&[BYTES][..], &(piece.len() as u32).to_le_bytes()].concat();
            out.write_all(&head)
                .and_then(|()| out.write_all(piece))
                .map_err(Error::Write)?;
        }
        Ok(())
    }

    /// The tar goes on with `length` bytes that are `at` in the blob.
    pub(crate) fn stored(&mut self, at: u64, length: u64) -> Result<(), Error> {
        let Some(out) = &mut self.0 else {
            return Ok(());
        };
        let head = [&[STORED][..], &at.to_le_bytes(), &length.to_le_bytes()].concat();
        out.write_all(&head).map_err(Error::Write)
    }
}

/// Reads a layer's tar again, from its record and its blob.
#[derive(Debug)]
pub struct Replay<'a, R> {
    record: R,
    blob: &'a File,
    /// Bytes left of the current piece, and where they are in the blob if they are there.
    left: u64,
    at: Option<u64>,
}

impl<'a, R: Read> Replay<'a, R> {
    /// `record` and `blob` are what [`Layer::read_recorded`](crate::Layer::read_recorded) wrote.
    pub fn new(record: R, blob: &'a File) -> Self {
        Self {
            record,
            blob,
            left: 0,
            at: None,
        }
    }

    /// Begins the next piece; `false` at the end of the record.
    fn next_piece(&mut self) -> io::Result<bool> {
        let mut tag = [0];
        if self.record.read(&mut tag)? == 0 {
            return Ok(false);
        }
        let mut long = [0; 8];
        match tag[0] {
            BYTES => {
                let mut length = [0; 4];
                self.record.read_exact(&mut length)?;
                self.left = u32::from_le_bytes(length).into();
                self.at = None;
            }
            STORED => {
                self.record.read_exact(&mut long)?;
                self.at = Some(u64::from_le_bytes(long));
                self.record.read_exact(&mut long)?;
                self.left = u64::from_le_bytes(long);
            }
            _ => {
                let text = "the record of a layer's tar is damaged";
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
        }
        Ok(true)
    }
}

impl<R: Read> Read for Replay<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.left == 0 {
            if !self.next_piece()? {
                return Ok(0);
            }
        }
        let most = self.left.min(buffer.len() as u64) as usize;
        let buffer = &mut buffer[..most];
        let count = match &mut self.at {
            None => self.record.read(buffer)?,
            Some(at) => {
                let count = self.blob.read_at(buffer, *at)?;
                *at += count as u64;
                count
            }
        };
        if count == 0 && most > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= count as u64;
        Ok(count)
    }
}
