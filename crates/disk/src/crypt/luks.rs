//! LUKS1, "LUKS On-Disk Format Specification" 1.2.3: a header with the cipher's name and up to eight
//! slots, each of which has the key for the data, encrypted with a passphrase.

use std::fmt;

use zeroize::Zeroizing;

use super::Passphrase;
use super::cipher::{Cipher, Hash, SECTOR, Sectors};
use crate::error::{Error, Result, damaged};

const MAGIC: &[u8; 6] = b"LUKS\xba\xbe";
/// Bytes of the header that say something.
pub(crate) const PROLOGUE: usize = 592;
/// Where slots begin in it, how long each is and how many there are.
const FIRST_SLOT: usize = 208;
const SLOT: usize = 48;
const SLOTS: usize = 8;
const SALT: usize = 32;
const DIGEST: usize = 20;
const ACTIVE: u32 = 0x00ac_71f3;
const INACTIVE: u32 = 0x0000_dead;
/// Parts that a key is split into.
const STRIPES: usize = 4000;
/// Slots' keys begin at multiples of so many bytes.
const ALIGNMENT: usize = 4096;
/// Rounds of PBKDF2 that this does for whatever a header says, at most: minutes.
const MAX_ROUNDS: u32 = 200_000_000;

/// A header.
#[derive(Debug)]
pub(crate) struct Luks {
    cipher: Cipher,
    hash: Hash,
    digest: [u8; DIGEST],
    digest_salt: [u8; SALT],
    digest_rounds: u32,
    slots: Vec<Slot>,
}

/// A slot that is in use.
#[derive(Debug)]
struct Slot {
    rounds: u32,
    salt: [u8; SALT],
    /// Where the key is, in bytes behind the header's begin.
    offset: u64,
}

impl fmt::Display for Luks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LUKS, {}, {}", self.cipher, self.hash)
    }
}

impl Luks {
    /// What the first [`PROLOGUE`] bytes say.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self> {
        let fields = Fields(bytes);
        if bytes.len() < PROLOGUE || !bytes.starts_with(MAGIC) {
            return Err(damaged("there is no LUKS header where it should be"));
        }
        let version = u16::from_be_bytes(fields.array(6));
        if version != 1 {
            return Err(Error::Unsupported(format!("version {version} of LUKS")));
        }
        let key = fields.u32(108) as usize;
        let cipher = Cipher::of_luks(&fields.text(8)?, &fields.text(40)?, key)?;
        let mut slots = Vec::new();
        for at in (FIRST_SLOT..).step_by(SLOT).take(SLOTS) {
            if fields.u32(at) != ACTIVE {
                continue;
            }
            let stripes = fields.u32(at + 44);
            if stripes as usize != STRIPES {
                return Err(damaged(format!("a LUKS key in {stripes} parts")));
            }
            slots.push(Slot {
                rounds: rounds(fields.u32(at + 4))?,
                salt: fields.array(at + 8),
                offset: u64::from(fields.u32(at + 40)) * SECTOR as u64,
            });
        }
        Ok(Self {
            cipher,
            hash: fields.text(72)?.parse()?,
            digest: fields.array(112),
            digest_salt: fields.array(132),
            digest_rounds: rounds(fields.u32(164))?,
            slots,
        })
    }

    /// What decrypts the data. `read` reads bytes at an offset behind the header's begin.
    pub(crate) fn unlock(
        &self,
        phrase: &Passphrase,
        read: impl Fn(u64, &mut [u8]) -> Result<()>,
    ) -> Result<Sectors> {
        let length = self.cipher.key_bytes();
        for slot in &self.slots {
            let mut own = Zeroizing::new(vec![0; length]);
            let Slot { salt, rounds, .. } = slot;
            self.hash.derive(phrase.bytes(), salt, *rounds, &mut own);
            let mut split = Zeroizing::new(vec![0; (length * STRIPES).next_multiple_of(SECTOR)]);
            read(slot.offset, &mut split)?;
            self.cipher.with_key(&own)?.decrypt(0, &mut split);
            let key = merge(self.hash, &split[..length * STRIPES], length);
            let mut digest = [0; DIGEST];
            let (salt, rounds) = (&self.digest_salt, self.digest_rounds);
            self.hash.derive(&key, salt, rounds, &mut digest);
            if digest == self.digest {
                return self.cipher.with_key(&key);
            }
        }
        Err(Error::WrongPassphrase)
    }

    /// Bytes of a header and of all its slots' keys.
    pub(crate) fn length(cipher: &Cipher) -> u64 {
        (ALIGNMENT + SLOTS * slot_bytes(cipher)) as u64
    }

    /// A new header with a new key, in one slot for this passphrase; as it is in the file, up to that
    /// slot's end. What does PBKDF2 so many `rounds` takes about a microsecond for each.
    pub(crate) fn create(
        cipher: &Cipher,
        hash: Hash,
        phrase: &Passphrase,
        rounds: u32,
    ) -> Result<Vec<u8>> {
        let length = cipher.key_bytes();
        let key = random(length)?;
        let (digest_salt, salt) = (random(SALT)?, random(SALT)?);
        let digest_rounds = (rounds / 8).max(1000);
        let mut digest = [0; DIGEST];
        hash.derive(&key, &digest_salt, digest_rounds, &mut digest);

        let mut bytes = vec![0; ALIGNMENT + slot_bytes(cipher)];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        let (name, mode) = cipher.luks_words();
        put(0, MAGIC);
        put(6, &1_u16.to_be_bytes());
        put(8, name.as_bytes());
        put(40, mode.as_bytes());
        put(72, hash.to_string().as_bytes());
        let sectors = |bytes: usize| ((bytes / SECTOR) as u32).to_be_bytes();
        put(104, &sectors(Self::length(cipher) as usize));
        put(108, &(length as u32).to_be_bytes());
        put(112, &digest);
        put(132, &digest_salt);
        put(164, &digest_rounds.to_be_bytes());
        put(168, uuid()?.as_bytes());
        for number in 0..SLOTS {
            let at = FIRST_SLOT + number * SLOT;
            let state = if number == 0 { ACTIVE } else { INACTIVE };
            put(at, &state.to_be_bytes());
            if number == 0 {
                put(at + 4, &rounds.to_be_bytes());
                put(at + 8, &salt);
            }
            put(at + 40, &sectors(ALIGNMENT + number * slot_bytes(cipher)));
            put(at + 44, &(STRIPES as u32).to_be_bytes());
        }

        let mut own = Zeroizing::new(vec![0; length]);
        hash.derive(phrase.bytes(), &salt, rounds, &mut own);
        let split = split(hash, &key)?;
        let material = &mut bytes[ALIGNMENT..][..split.len().next_multiple_of(SECTOR)];
        material[..split.len()].copy_from_slice(&split);
        cipher.with_key(&own)?.encrypt(0, material);
        Ok(bytes)
    }
}

fn slot_bytes(cipher: &Cipher) -> usize {
    (cipher.key_bytes() * STRIPES).next_multiple_of(ALIGNMENT)
}

fn rounds(number: u32) -> Result<u32> {
    match number {
        1..=MAX_ROUNDS => Ok(number),
        _ => Err(damaged(format!("a LUKS header with {number} rounds"))),
    }
}

fn random(length: usize) -> Result<Zeroizing<Vec<u8>>> {
    let mut bytes = Zeroizing::new(vec![0; length]);
    getrandom::fill(&mut bytes).map_err(std::io::Error::from)?;
    Ok(bytes)
}

/// A random one, RFC 9562 §5.4.
fn uuid() -> Result<String> {
    let bytes = random(16)?;
    let mut value = bytes
        .iter()
        .fold(0_u128, |all, byte| all << 8 | u128::from(*byte));
    value = value & !(0xf << 76) & !(0x3 << 62) | 4 << 76 | 2 << 62;
    let hex = format!("{value:032x}");
    let parts = [
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ];
    Ok(parts.join("-"))
}

/// "AF-Splitter": all parts are needed to get the key back.
fn split(hash: Hash, key: &[u8]) -> Result<Zeroizing<Vec<u8>>> {
    let mut parts = random(key.len() * STRIPES)?;
    let last = key.len() * (STRIPES - 1);
    let mixed = mix(hash, &parts[..last], key.len());
    for (place, (key, mixed)) in parts[last..].iter_mut().zip(key.iter().zip(mixed.iter())) {
        *place = key ^ mixed;
    }
    Ok(parts)
}

fn merge(hash: Hash, parts: &[u8], length: usize) -> Zeroizing<Vec<u8>> {
    let last = parts.len() - length;
    let mut key = mix(hash, &parts[..last], length);
    for (byte, part) in key.iter_mut().zip(&parts[last..]) {
        *byte ^= part;
    }
    key
}

fn mix(hash: Hash, parts: &[u8], length: usize) -> Zeroizing<Vec<u8>> {
    let mut mixed = Zeroizing::new(vec![0; length]);
    for part in parts.chunks_exact(length) {
        for (byte, part) in mixed.iter_mut().zip(part) {
            *byte ^= part;
        }
        diffuse(hash, &mut mixed);
    }
    mixed
}

/// Each stretch as long as a digest becomes its own, with its number before it.
fn diffuse(hash: Hash, bytes: &mut [u8]) {
    let size = hash.digest(&[]).len();
    for (number, stretch) in (0_u32..).zip(bytes.chunks_mut(size)) {
        let digest = hash.digest(&[&number.to_be_bytes(), stretch]);
        stretch.copy_from_slice(&digest[..stretch.len()]);
    }
}

/// Big-endian fields of a whole header.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        if let Some(field) = self.0.get(at..at + N) {
            bytes.copy_from_slice(field);
        }
        bytes
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.array(at))
    }

    /// 32 bytes, of which what is behind a zero does not count.
    fn text(&self, at: usize) -> Result<String> {
        let bytes = self.array::<32>(at);
        let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        let text = std::str::from_utf8(text);
        Ok(text
            .map_err(|_| damaged("a name in the LUKS header"))?
            .to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unlock(bytes: &[u8], phrase: &str) -> Result<Sectors> {
        let read = |offset: u64, into: &mut [u8]| {
            let from = bytes.get(offset as usize..).unwrap_or_default();
            let length = into.len().min(from.len());
            into[..length].copy_from_slice(&from[..length]);
            Ok(())
        };
        Luks::parse(bytes)?.unlock(&Passphrase::new(phrase.into()), read)
    }

    #[test]
    fn a_new_header_is_unlocked_by_its_passphrase_alone() {
        let phrase = Passphrase::new(b"secret".to_vec());
        let cipher = Cipher::default();
        let bytes = Luks::create(&cipher, Hash::Sha256, &phrase, 1000).unwrap();

        unlock(&bytes, "secret").unwrap();
        for wrong in ["", "Secret", "secret\n"] {
            assert!(matches!(unlock(&bytes, wrong), Err(Error::WrongPassphrase)));
        }
    }

    #[test]
    fn a_header_that_makes_no_sense_is_refused() {
        let phrase = Passphrase::new(b"secret".to_vec());
        let bytes = Luks::create(&Cipher::default(), Hash::Sha1, &phrase, 1000).unwrap();
        // magic, version, cipher, mode, hash, bytes of key, rounds of the digest, a slot's parts
        for at in [0, 7, 9, 41, 73, 108, 164, 252] {
            let mut bytes = bytes.clone();
            bytes[at] = 0xff;
            assert!(Luks::parse(&bytes).is_err(), "byte {at}");
        }
        assert!(Luks::parse(&bytes[..100]).is_err());
    }
}
