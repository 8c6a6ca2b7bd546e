//! SHA-256 digests, and readers that check what passes through them.

use std::fmt;
use std::io::{self, Read};
use std::str::FromStr;

use sha2::{Digest as _, Sha256};

use crate::manifest::hex;

/// A SHA-256 digest, written `sha256:` and 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// Its 64 digits, without the algorithm's name.
    pub fn hex(&self) -> String {
        hex(&self.0)
    }

    /// Its first bytes, as the UUID of a file system.
    pub(crate) fn uuid(&self) -> [u8; 16] {
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&self.0[..16]);
        uuid
    }
}

impl FromStr for Digest {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("'{text}' is no digest: sha256: and 64 hexadecimal digits are");
        let digits = text.strip_prefix("sha256:").ok_or_else(bad)?;
        if digits.len() != 64 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(bad());
        }
        let mut digest = [0; 32];
        for (byte, pair) in digest.iter_mut().zip(digits.as_bytes().chunks(2)) {
            let pair = str::from_utf8(pair).map_err(|_| bad())?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| bad())?;
        }
        Ok(Self(digest))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

/// Hashes what passes. Reading it to its end is an error unless it is what was promised.
pub(crate) struct Checked<R> {
    inner: R,
    what: &'static str,
    hash: Sha256,
    digest: Option<Digest>,
    size: Option<u64>,
    read: u64,
    done: bool,
}

impl<R: Read> Checked<R> {
    /// `what` is read after "the"; a digest or a size that is not known is not checked.
    pub(crate) fn new(
        inner: R,
        what: &'static str,
        digest: Option<Digest>,
        size: Option<u64>,
    ) -> Self {
        Self {
            inner,
            what,
            hash: Sha256::new(),
            digest,
            size,
            read: 0,
            done: false,
        }
    }

    /// Reads what is left, so that all is checked.
    pub(crate) fn finish(&mut self) -> io::Result<Digest> {
        io::copy(self, &mut io::sink())?;
        Ok(Digest(self.hash.clone().finalize().into()))
    }

    fn check(&self) -> io::Result<()> {
        let what = self.what;
        if let Some(size) = self.size
            && size != self.read
        {
            let read = self.read;
            return Err(invalid(format!("the {what} has {read} bytes, not {size}")));
        }
        let found = Digest(self.hash.clone().finalize().into());
        match self.digest {
            Some(digest) if digest != found => Err(invalid(format!(
                "the {what} is damaged: its digest is {found}, not {digest}"
            ))),
            _ => Ok(()),
        }
    }
}

impl<R: Read> Read for Checked<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.done || buffer.is_empty() {
            return Ok(0);
        }
        let count = self.inner.read(buffer)?;
        self.hash.update(&buffer[..count]);
        self.read += count as u64;
        if self.size.is_some_and(|size| self.read > size) {
            let (what, size) = (self.what, self.size.unwrap_or_default());
            return Err(invalid(format!("the {what} has more than {size} bytes")));
        }
        if count == 0 {
            self.check()?;
            self.done = true;
        }
        Ok(count)
    }
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ABC: &str = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn a_digest_is_read_as_it_is_written() {
        assert_eq!(Digest::of(b"abc").to_string(), ABC);
        assert_eq!(ABC.parse(), Ok(Digest::of(b"abc")));
        let upper = format!("sha256:{}", &ABC[7..].to_uppercase());
        assert_eq!(upper.parse(), Ok(Digest::of(b"abc")));
        for text in [
            "",
            "sha256:",
            "sha512:00",
            &ABC[7..],
            &ABC[..70],
            "sha256:+a",
        ] {
            assert!(text.parse::<Digest>().is_err(), "{text}");
        }
    }

    #[test]
    fn only_what_was_promised_is_read_to_its_end() {
        let read = |digest, size| {
            Checked::new(&b"abc"[..], "file", digest, size)
                .finish()
                .map_err(|error| error.to_string())
        };
        let digest = Some(Digest::of(b"abc"));
        assert_eq!(read(digest, Some(3)), Ok(Digest::of(b"abc")));
        assert!(read(None, None).is_ok());
        assert!(
            read(Some(Digest::of(b"x")), None)
                .unwrap_err()
                .contains("damaged")
        );
        assert!(
            read(digest, Some(4))
                .unwrap_err()
                .contains("3 bytes, not 4")
        );
        assert!(read(digest, Some(2)).unwrap_err().contains("more than 2"));
    }
}
