//! Encryption of sectors: block ciphers in the modes that LUKS images use. The initialization vector
//! of each sector follows from its number.

use std::fmt;
use std::str::FromStr;

use aes::cipher::array::Array;
use aes::cipher::consts::U16;
use aes::cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use aes::{Aes128, Aes192, Aes256};
use serpent::Serpent;
use sha1::Sha1;
use sha2::{Digest, Sha224, Sha256, Sha384, Sha512};
use twofish::Twofish;
use zeroize::Zeroizing;

use crate::error::{Error, Result};

/// Bytes that are encrypted together.
pub(crate) const SECTOR: usize = 512;
const BLOCK: usize = 16;

type Block = [u8; BLOCK];

/// A hash function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hash {
    /// SHA-1 (FIPS 180-4).
    Sha1,
    /// SHA-2 (FIPS 180-4), cut to 224 bits.
    Sha224,
    /// SHA-2 of 256 bits.
    Sha256,
    /// SHA-2, cut to 384 bits.
    Sha384,
    /// SHA-2 of 512 bits.
    Sha512,
}

impl Hash {
    const ALL: [(Self, &'static str); 5] = [
        (Self::Sha1, "sha1"),
        (Self::Sha224, "sha224"),
        (Self::Sha256, "sha256"),
        (Self::Sha384, "sha384"),
        (Self::Sha512, "sha512"),
    ];

    /// Of several pieces, one after the other.
    pub(crate) fn digest(self, pieces: &[&[u8]]) -> Zeroizing<Vec<u8>> {
        fn of<D: Digest>(pieces: &[&[u8]]) -> Zeroizing<Vec<u8>> {
            let mut state = D::new();
            for piece in pieces {
                state.update(piece);
            }
            Zeroizing::new(state.finalize().to_vec())
        }
        match self {
            Self::Sha1 => of::<Sha1>(pieces),
            Self::Sha224 => of::<Sha224>(pieces),
            Self::Sha256 => of::<Sha256>(pieces),
            Self::Sha384 => of::<Sha384>(pieces),
            Self::Sha512 => of::<Sha512>(pieces),
        }
    }

    /// PBKDF2 with HMAC (RFC 8018 §5.2).
    pub(crate) fn derive(self, phrase: &[u8], salt: &[u8], rounds: u32, key: &mut [u8]) {
        use pbkdf2::pbkdf2_hmac;
        match self {
            Self::Sha1 => pbkdf2_hmac::<Sha1>(phrase, salt, rounds, key),
            Self::Sha224 => pbkdf2_hmac::<Sha224>(phrase, salt, rounds, key),
            Self::Sha256 => pbkdf2_hmac::<Sha256>(phrase, salt, rounds, key),
            Self::Sha384 => pbkdf2_hmac::<Sha384>(phrase, salt, rounds, key),
            Self::Sha512 => pbkdf2_hmac::<Sha512>(phrase, salt, rounds, key),
        }
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(word(&Self::ALL, *self))
    }
}

impl FromStr for Hash {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        find(&Self::ALL, text).ok_or_else(|| Error::Unsupported(format!("the hash {text}")))
    }
}

fn word<T: PartialEq + Copy>(all: &[(T, &'static str)], wanted: T) -> &'static str {
    let found = all.iter().find(|(value, _)| *value == wanted);
    found.map_or("", |(_, word)| word)
}

fn find<T: Copy>(all: &[(T, &'static str)], wanted: &str) -> Option<T> {
    let found = all.iter().find(|(_, word)| *word == wanted);
    found.map(|(value, _)| *value)
}

/// A block cipher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Algorithm {
    Aes,
    Serpent,
    Twofish,
}

impl Algorithm {
    const ALL: [(Self, &'static str); 3] = [
        (Self::Aes, "aes"),
        (Self::Serpent, "serpent"),
        (Self::Twofish, "twofish"),
    ];

    fn with_key(self, key: &[u8]) -> Result<Box<dyn BlockCipher>> {
        fn boxed<C: BlockCipher + KeyInit + 'static>(key: &[u8]) -> Option<Box<dyn BlockCipher>> {
            let cipher = C::new_from_slice(key).ok()?;
            Some(Box::new(cipher))
        }
        let wrong = || Error::Unsupported(format!("keys of {} bits", key.len() * 8));
        if ![16, 24, 32].contains(&key.len()) {
            return Err(wrong());
        }
        let cipher = match (self, key.len()) {
            (Self::Aes, 16) => boxed::<Aes128>(key),
            (Self::Aes, 24) => boxed::<Aes192>(key),
            (Self::Aes, _) => boxed::<Aes256>(key),
            (Self::Serpent, _) => boxed::<Serpent>(key),
            (Self::Twofish, _) => boxed::<Twofish>(key),
        };
        cipher.ok_or_else(wrong)
    }
}

/// How the blocks of a sector depend on each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// IEEE 1619.
    Xts,
    /// NIST SP 800-38A §6.2.
    Cbc,
}

impl Mode {
    const ALL: [(Self, &'static str); 2] = [(Self::Xts, "xts"), (Self::Cbc, "cbc")];
}

/// How a sector's initialization vector is made of its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Vector {
    /// Its low 32 bits, little-endian.
    Plain,
    /// All of it.
    Plain64,
    /// That, encrypted with the hash of the key.
    Essiv(Hash),
}

impl Vector {
    const PLAIN: [(Self, &'static str); 2] = [(Self::Plain, "plain"), (Self::Plain64, "plain64")];
}

/// How sectors are encrypted, but for the key: such as `aes-256-xts-plain64`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cipher {
    algorithm: Algorithm,
    /// Bytes of the key, of which XTS has two.
    key: usize,
    mode: Mode,
    vector: Vector,
}

impl Cipher {
    /// What LUKS1 writes down of it: a name, and a mode with how vectors are made; and bytes of key.
    pub(crate) fn of_luks(name: &str, mode: &str, key: usize) -> Result<Self> {
        let unknown = || Error::Unsupported(format!("the cipher {name}-{mode}"));
        let algorithm = find(&Algorithm::ALL, name).ok_or_else(unknown)?;
        let (mode_name, vector) = mode.split_once('-').ok_or_else(unknown)?;
        let mode = find(&Mode::ALL, mode_name).ok_or_else(unknown)?;
        let vector = match vector.strip_prefix("essiv:") {
            Some(hash) => Vector::Essiv(hash.parse()?),
            None => find(&Vector::PLAIN, vector).ok_or_else(unknown)?,
        };
        let cipher = Self {
            algorithm,
            key: if mode == Mode::Xts { key / 2 } else { key },
            mode,
            vector,
        };
        if cipher.key_bytes() != key || ![16, 24, 32].contains(&cipher.key) {
            return Err(Error::Unsupported(format!("keys of {} bits", key * 8)));
        }
        Ok(cipher)
    }

    /// The words that [`Cipher::of_luks`] takes.
    pub(crate) fn luks_words(&self) -> (&'static str, String) {
        let mode = word(&Mode::ALL, self.mode);
        let mode = match self.vector {
            Vector::Essiv(hash) => format!("{mode}-essiv:{hash}"),
            plain => format!("{mode}-{}", word(&Vector::PLAIN, plain)),
        };
        (word(&Algorithm::ALL, self.algorithm), mode)
    }

    /// Bytes of the whole key.
    pub(crate) fn key_bytes(&self) -> usize {
        match self.mode {
            Mode::Xts => 2 * self.key,
            Mode::Cbc => self.key,
        }
    }

    /// What images of version 1 of qcow had: AES-128 in CBC mode.
    pub(crate) fn legacy() -> Self {
        Self {
            algorithm: Algorithm::Aes,
            key: 16,
            mode: Mode::Cbc,
            vector: Vector::Plain64,
        }
    }

    /// With a key, of the right length.
    pub(crate) fn with_key(&self, key: &[u8]) -> Result<Sectors> {
        let (data, tweak) = match self.mode {
            Mode::Xts => {
                let (data, tweak) = key.split_at(key.len() / 2);
                (data, Some(self.algorithm.with_key(tweak)?))
            }
            Mode::Cbc => (key, None),
        };
        let essiv = match self.vector {
            Vector::Essiv(hash) => Some(self.algorithm.with_key(&hash.digest(&[key]))?),
            _ => None,
        };
        Ok(Sectors {
            data: self.algorithm.with_key(data)?,
            tweak,
            essiv,
            vector: self.vector,
        })
    }
}

impl Default for Cipher {
    fn default() -> Self {
        Self {
            algorithm: Algorithm::Aes,
            key: 32,
            mode: Mode::Xts,
            vector: Vector::Plain64,
        }
    }
}

impl fmt::Display for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, mode) = self.luks_words();
        write!(f, "{name}-{}-{mode}", self.key * 8)
    }
}

impl FromStr for Cipher {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut words = text.splitn(3, '-');
        let mut next = || words.next().unwrap_or_default();
        let (name, bits, mode) = (next(), next(), next());
        let key: usize = bits.parse().unwrap_or_default();
        let keys = if mode.starts_with("xts-") { 2 } else { 1 };
        let cipher = Self::of_luks(name, mode, key.min(256) / 8 * keys);
        cipher.map_err(|_| {
            let what = format!(
                "{text:?} is no cipher; say for instance aes-256-xts-plain64 or \
                 serpent-256-cbc-essiv:sha256: aes, serpent or twofish, 128, 192 or 256 bits, xts or \
                 cbc, and plain64, plain or essiv with a hash"
            );
            Error::Invalid(what)
        })
    }
}

/// A block cipher with its key.
trait BlockCipher: Send + Sync {
    fn encrypt(&self, blocks: &mut [Block]);
    fn decrypt(&self, blocks: &mut [Block]);
}

impl<C> BlockCipher for C
where
    C: BlockCipherEncrypt<BlockSize = U16> + BlockCipherDecrypt<BlockSize = U16> + Send + Sync,
{
    fn encrypt(&self, blocks: &mut [Block]) {
        self.encrypt_blocks(Array::cast_slice_from_core_mut(blocks));
    }

    fn decrypt(&self, blocks: &mut [Block]) {
        self.decrypt_blocks(Array::cast_slice_from_core_mut(blocks));
    }
}

/// Encrypts and decrypts sectors.
pub(crate) struct Sectors {
    data: Box<dyn BlockCipher>,
    /// The second key of XTS.
    tweak: Option<Box<dyn BlockCipher>>,
    essiv: Option<Box<dyn BlockCipher>>,
    vector: Vector,
}

impl fmt::Debug for Sectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sectors").finish_non_exhaustive()
    }
}

impl Sectors {
    /// Encrypts whole sectors, of which the first has this number.
    pub(crate) fn encrypt(&self, first: u64, bytes: &mut [u8]) {
        for (number, sector) in (first..).zip(bytes.chunks_exact_mut(SECTOR)) {
            let (blocks, _) = sector.as_chunks_mut::<BLOCK>();
            let vector = self.vector(number);
            if let Some(tweaks) = self.tweaks(vector, blocks.len()) {
                xor(blocks, &tweaks);
                self.data.encrypt(blocks);
                xor(blocks, &tweaks);
            } else {
                let mut last = vector;
                for block in blocks.chunks_mut(1) {
                    xor(block, &[last]);
                    self.data.encrypt(block);
                    last = block[0];
                }
            }
        }
    }

    /// Decrypts them.
    pub(crate) fn decrypt(&self, first: u64, bytes: &mut [u8]) {
        for (number, sector) in (first..).zip(bytes.chunks_exact_mut(SECTOR)) {
            let (blocks, _) = sector.as_chunks_mut::<BLOCK>();
            let vector = self.vector(number);
            if let Some(tweaks) = self.tweaks(vector, blocks.len()) {
                xor(blocks, &tweaks);
                self.data.decrypt(blocks);
                xor(blocks, &tweaks);
            } else {
                let mut before = [[0; BLOCK]; SECTOR / BLOCK];
                before[0] = vector;
                before[1..].copy_from_slice(&blocks[..blocks.len() - 1]);
                self.data.decrypt(blocks);
                xor(blocks, &before);
            }
        }
    }

    fn vector(&self, number: u64) -> Block {
        let number = match self.vector {
            Vector::Plain => number & 0xffff_ffff,
            _ => number,
        };
        let mut block = u128::from(number).to_le_bytes();
        if let Some(essiv) = &self.essiv {
            essiv.encrypt(std::slice::from_mut(&mut block));
        }
        block
    }

    /// What is added to each block of a sector in XTS mode; none in another mode.
    fn tweaks(&self, vector: Block, count: usize) -> Option<[Block; SECTOR / BLOCK]> {
        /// x^7 + x^2 + x + 1, of the polynomial that powers are reduced by.
        const REDUCE: u128 = 0x87;
        let cipher = self.tweak.as_ref()?;
        let mut first = vector;
        cipher.encrypt(std::slice::from_mut(&mut first));
        let mut power = u128::from_le_bytes(first);
        let mut tweaks = [[0; BLOCK]; SECTOR / BLOCK];
        for tweak in &mut tweaks[..count] {
            *tweak = power.to_le_bytes();
            power = (power << 1) ^ ((power >> 127) * REDUCE);
        }
        Some(tweaks)
    }
}

fn xor(blocks: &mut [Block], others: &[Block]) {
    for (block, other) in blocks.iter_mut().zip(others) {
        *block = (u128::from_ne_bytes(*block) ^ u128::from_ne_bytes(*other)).to_ne_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xts_gives_what_ieee_1619_says() {
        // annex B, vector 4: key bytes, sector 0, data 00 01 02 ...
        let mut key = 0x2718_2818_2845_9045_2353_6028_7471_3526_u128
            .to_be_bytes()
            .to_vec();
        key.extend(0x3141_5926_5358_9793_2384_6264_3383_2795_u128.to_be_bytes());
        let cipher = Cipher::of_luks("aes", "xts-plain64", 32).unwrap();
        let sectors = cipher.with_key(&key).unwrap();
        let plain: Vec<u8> = (0..512).map(|n| n as u8).collect();

        let mut bytes = plain.clone();
        sectors.encrypt(0, &mut bytes);

        let expected = 0x27a7_479b_efa1_d476_489f_308c_d4cf_a6e2_u128.to_be_bytes();
        assert_eq!(bytes[..16], expected);
        sectors.decrypt(0, &mut bytes);
        assert_eq!(bytes, plain);
    }

    #[test]
    fn each_cipher_gives_back_what_it_was_given_and_is_written_as_it_is_read() {
        for name in ["aes", "serpent", "twofish"] {
            for bits in [128, 192, 256] {
                for mode in [
                    "xts-plain64",
                    "xts-plain",
                    "cbc-plain64",
                    "cbc-essiv:sha256",
                ] {
                    let text = format!("{name}-{bits}-{mode}");
                    let cipher: Cipher = text.parse().unwrap();
                    assert_eq!(cipher.to_string(), text);
                    let key: Vec<u8> = (0..cipher.key_bytes()).map(|n| n as u8).collect();
                    let sectors = cipher.with_key(&key).unwrap();
                    let mut bytes = vec![7; 3 * SECTOR];
                    sectors.encrypt(1 << 33, &mut bytes);
                    assert_ne!(bytes[..SECTOR], bytes[SECTOR..2 * SECTOR], "{text}");
                    sectors.decrypt(1 << 33, &mut bytes);
                    assert_eq!(bytes, [7; 3 * SECTOR], "{text}");
                }
            }
        }
    }

    #[test]
    fn what_is_no_cipher_is_explained() {
        for text in [
            "",
            "aes",
            "aes-256",
            "aes-100-xts-plain64",
            "des-128-cbc-plain64",
        ] {
            let error = text.parse::<Cipher>().unwrap_err().to_string();
            assert!(error.contains("aes-256-xts-plain64"), "{text}: {error}");
        }
        assert!("md5".parse::<Hash>().is_err());
    }
}
