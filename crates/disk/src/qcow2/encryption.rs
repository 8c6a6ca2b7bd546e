//! Encrypted images: data clusters are, and tables are not. QEMU's docs/interop/qcow2.rst, "Full disk
//! encryption header pointer" and "Data encryption".

use super::Qcow2;
use super::header::{Encryption, Header};
use crate::crypt::{Luks, PROLOGUE, SECTOR, Sectors};
use crate::error::{Error, Result};
use crate::{Buffers, Cipher, HostFile, Passphrase};

/// Bytes that are encrypted at once.
const PIECE: u64 = 128 << 10;

/// Whether data is encrypted.
#[derive(Debug)]
pub(super) enum Secrecy {
    /// No.
    Open,
    /// It is, and there is no key yet.
    Locked,
    /// There is.
    Unlocked {
        sectors: Sectors,
        /// Whether sectors are numbered as in the file; as on the disk, if not.
        by_host: bool,
    },
}

/// How an image's data is encrypted, in words.
pub(super) fn describe(file: &HostFile, header: &Header) -> Result<Option<String>> {
    Ok(match header.encryption {
        None => None,
        Some(Encryption::Aes) => Some(Cipher::legacy().to_string()),
        Some(Encryption::Luks(offset, _)) => Some(read(file, offset)?.to_string()),
    })
}

fn read(file: &HostFile, offset: u64) -> Result<Luks> {
    let mut bytes = [0; PROLOGUE];
    file.read_bytes(offset, &mut bytes)?;
    Luks::parse(&bytes)
}

impl Qcow2 {
    /// Whether data is encrypted.
    pub fn is_encrypted(&self) -> bool {
        !matches!(self.secrecy, Secrecy::Open)
    }

    /// Makes the data of an encrypted image readable, and writable too unless it is encrypted as was
    /// usual before LUKS. That has nothing to tell a wrong passphrase by.
    pub fn unlock(&mut self, passphrase: &Passphrase) -> Result<()> {
        let encryption = self.tables().header.encryption;
        match encryption {
            None => {}
            Some(Encryption::Luks(offset, length)) => {
                let luks = read(&self.file, offset)?;
                let sectors = luks.unlock(passphrase, |at, bytes| {
                    let end = at.checked_add(bytes.len() as u64);
                    if end.is_none_or(|end| end > length) {
                        let what = "a key in the LUKS header is behind its end".to_owned();
                        return Err(Error::Damaged(what));
                    }
                    Ok(self.file.read_bytes(offset + at, bytes)?)
                })?;
                self.secrecy = Secrecy::Unlocked {
                    sectors,
                    by_host: true,
                };
            }
            Some(Encryption::Aes) => {
                if self.writable {
                    let what = "AES-CBC encryption, which is only read; convert the image to one \
                                with LUKS: strata disk convert --encrypt";
                    return Err(Error::Unsupported(what.to_owned()));
                }
                let mut key = zeroize::Zeroizing::new([0; 16]);
                for (byte, given) in key.iter_mut().zip(passphrase.bytes()) {
                    *byte = *given;
                }
                self.secrecy = Secrecy::Unlocked {
                    sectors: Cipher::legacy().with_key(&*key)?,
                    by_host: false,
                };
            }
        }
        Ok(())
    }

    /// Refuses what is no whole number of sectors where it has to be.
    pub(super) fn check_sectors(&self, offset: u64, length: u64) -> Result<()> {
        let sector = SECTOR as u64;
        if self.is_encrypted() && !(offset.is_multiple_of(sector) && length.is_multiple_of(sector))
        {
            let what = "an encrypted disk is read and written in whole sectors".to_owned();
            return Err(Error::Invalid(what));
        }
        Ok(())
    }

    /// Reads the data of byte `offset` of the disk, which is at byte `host` of the file.
    pub(super) fn read_data(&self, host: u64, offset: u64, mut buffers: Buffers) -> Result<()> {
        let Some((sectors, mut number)) = self.key(host, offset)? else {
            return Ok(self.data().read(host, buffers)?);
        };
        let mut bytes = vec![0; PIECE.min(buffers.len()) as usize];
        let mut at = host;
        while !buffers.is_empty() {
            let part = buffers.take(PIECE);
            let bytes = &mut bytes[..part.len() as usize];
            self.data().read_bytes(at, bytes)?;
            sectors.decrypt(number, bytes);
            part.fill_from(bytes);
            at += part.len();
            number += part.len() / SECTOR as u64;
        }
        Ok(())
    }

    /// Writes it.
    pub(super) fn write_data(&self, host: u64, offset: u64, mut buffers: Buffers) -> Result<()> {
        let Some((sectors, mut number)) = self.key(host, offset)? else {
            return Ok(self.data().write(host, buffers)?);
        };
        let mut bytes = vec![0; PIECE.min(buffers.len()) as usize];
        let mut at = host;
        while !buffers.is_empty() {
            let part = buffers.take(PIECE);
            let bytes = &mut bytes[..part.len() as usize];
            part.copy_to(bytes);
            sectors.encrypt(number, bytes);
            self.data().write_bytes(at, bytes)?;
            at += part.len();
            number += part.len() / SECTOR as u64;
        }
        Ok(())
    }

    /// What encrypts the data there, and its first sector's number; none, if it is not encrypted.
    fn key(&self, host: u64, offset: u64) -> Result<Option<(&Sectors, u64)>> {
        match &self.secrecy {
            Secrecy::Open => Ok(None),
            Secrecy::Locked => Err(Error::Locked),
            Secrecy::Unlocked { sectors, by_host } => {
                let place = if *by_host { host } else { offset };
                Ok(Some((sectors, place / SECTOR as u64)))
            }
        }
    }
}
