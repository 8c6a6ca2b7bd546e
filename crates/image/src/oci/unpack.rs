//! Undoes the compression of a layer, told by its first bytes as media types are often wrong.

use std::io::{self, BufRead, BufReader, Read};

use ruzstd::decoding::errors::FrameDecoderError;
use ruzstd::decoding::errors::ReadFrameHeaderError::SkipFrame;
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

const GZIP: &[u8] = b"\x1f\x8b";
const XZ: &[u8] = b"\xfd7zXZ\0";
const ZSTD: &[u8] = b"\x28\xb5\x2f\xfd";
/// Frames with data for others; magic numbers 0x184d2a50 to 0x184d2a5f (RFC 8878 §3.1.2).
const ZSTD_SKIPPABLE: &[u8] = b"\x2a\x4d\x18";

/// How much is read at once, bytes.
const BUFFER: usize = 256 << 10;

/// The tar in `reader`, which may be compressed with gzip, zstd or xz.
pub(crate) fn unpack<'a>(reader: impl Read + Send + 'a) -> io::Result<Box<dyn Read + Send + 'a>> {
    let mut reader = BufReader::with_capacity(BUFFER, reader);
    let start = reader.fill_buf()?;
    Ok(if start.starts_with(GZIP) {
        Box::new(flate2::bufread::MultiGzDecoder::new(reader))
    } else if start.starts_with(XZ) {
        Box::new(lzma_rust2::XzReader::new(reader, true))
    } else if start.starts_with(ZSTD) || start.get(1..4) == Some(ZSTD_SKIPPABLE) {
        Box::new(Zstd {
            reader,
            decoder: FrameDecoder::new(),
            in_frame: false,
        })
    } else {
        Box::new(reader)
    })
}

/// All frames of a zstd stream, one after the other.
struct Zstd<R> {
    reader: R,
    decoder: FrameDecoder,
    in_frame: bool,
}

impl<R: BufRead> Zstd<R> {
    /// Begins the next frame with data; `false` at the end of all.
    fn next_frame(&mut self) -> io::Result<bool> {
        use FrameDecoderError::ReadFrameHeaderError;
        while !self.reader.fill_buf()?.is_empty() {
            match self.decoder.reset(&mut self.reader) {
                Ok(()) => {
                    self.in_frame = true;
                    return Ok(true);
                }
                Err(ReadFrameHeaderError(SkipFrame { length, .. })) => {
                    let mut skipped = (&mut self.reader).take(u64::from(length));
                    io::copy(&mut skipped, &mut io::sink())?;
                }
                Err(error) => return Err(io::Error::other(error)),
            }
        }
        Ok(false)
    }
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.decoder.can_collect() > 0 {
                return self.decoder.read(buffer);
            }
            if self.in_frame && !self.decoder.is_finished() {
                self.decoder
                    .decode_blocks(&mut self.reader, BlockDecodingStrategy::UptoBlocks(1))
                    .map_err(io::Error::other)?;
            } else if !self.next_frame()? {
                return Ok(0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    fn packed(program: &str, data: &[u8]) -> Vec<u8> {
        let mut child = Command::new(program)
            .arg("-c")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{program}: {error}"));
        child.stdin.take().unwrap().write_all(data).unwrap();
        child.wait_with_output().unwrap().stdout
    }

    fn unpacked(data: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        unpack(data)?.read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn every_compression_is_told_by_the_first_bytes() {
        let data: Vec<u8> = (0..50_000_u32)
            .flat_map(|n| (n / 7).to_le_bytes())
            .collect();
        for program in ["gzip", "zstd", "xz"] {
            assert!(
                unpacked(&packed(program, &data)).unwrap() == data,
                "{program}"
            );
        }
        assert!(unpacked(&data).unwrap() == data);
        assert!(unpacked(b"").unwrap().is_empty());
    }

    #[test]
    fn a_stream_may_have_several_members_and_others_data() {
        for program in ["gzip", "zstd"] {
            let both = [packed(program, b"one"), packed(program, b"two")].concat();
            assert_eq!(unpacked(&both).unwrap(), b"onetwo");
        }
        let skippable = b"\x5e\x2a\x4d\x18\x03\0\0\0abc";
        let mixed = [&skippable[..], &packed("zstd", b"x"), skippable].concat();
        assert_eq!(unpacked(&mixed).unwrap(), b"x");
    }

    #[test]
    fn a_truncated_stream_is_an_error() {
        let data = vec![1; 100_000];
        for program in ["gzip", "zstd", "xz"] {
            let packed = packed(program, &data);
            assert!(unpacked(&packed[..packed.len() - 3]).is_err(), "{program}");
        }
    }
}
