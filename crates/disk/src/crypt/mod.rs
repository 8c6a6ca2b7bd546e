//! Encrypted images: passphrases, ciphers for sectors, and LUKS, which keeps the key.

mod cipher;
mod luks;

use std::fmt;
use std::io;
use std::path::Path;

use zeroize::Zeroizing;

pub use cipher::{Cipher, Hash};
pub(crate) use cipher::{SECTOR, Sectors};
pub(crate) use luks::{Luks, PROLOGUE};

/// The largest file that is taken for a passphrase, in bytes.
const MAX_FILE: u64 = 64 << 10;

/// What opens an encrypted image. It is wiped from memory when it is dropped, and never printed.
#[derive(Clone)]
pub struct Passphrase(Zeroizing<Vec<u8>>);

impl Passphrase {
    /// These bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// All that is in a file, the end of its last line too, as with `qemu-img --object secret,file=`
    /// and `cryptsetup --key-file`.
    pub fn read(path: &Path) -> io::Result<Self> {
        use std::io::Read;

        let mut bytes = Zeroizing::new(Vec::new());
        let file = std::fs::File::open(path)?;
        file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
        let wrong = if bytes.is_empty() {
            "it is empty"
        } else if bytes.len() as u64 > MAX_FILE {
            "it is larger than 64 KiB"
        } else {
            return Ok(Self(bytes));
        };
        Err(io::Error::new(io::ErrorKind::InvalidData, wrong))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Passphrase").finish_non_exhaustive()
    }
}
