//! MSI-X (PCI Local Bus 3.0 §6.8.2): the table of vectors, their masks and pending bits.
//!
//! A function holds one, routes its BAR accesses here and hands what comes out to the
//! machine. Messages come out when they are due, at once or on unmasking.

/// Bytes of a table entry: address, data, vector control.
const ENTRY_SIZE: usize = 16;
/// Vector control bit 0: this vector is masked.
const VECTOR_MASKED: u32 = 1;

/// An interrupt as a PCI function sends it: a 32-bit write of `data` to `address`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msi {
    /// Where to, usually 0xfeexxxxx.
    pub address: u64,
    /// What.
    pub data: u32,
}

#[derive(Clone, Copy, Debug)]
struct Vector {
    address: u64,
    data: u32,
    control: u32,
    pending: bool,
}

impl Vector {
    fn entry(&self) -> [u8; ENTRY_SIZE] {
        let mut bytes = [0; ENTRY_SIZE];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.data.to_le_bytes());
        bytes[12..].copy_from_slice(&self.control.to_le_bytes());
        bytes
    }

    fn set_entry(&mut self, bytes: [u8; ENTRY_SIZE]) {
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        // Address bits 1:0 are reserved as zero.
        self.address = u64::from(word(4)) << 32 | u64::from(word(0) & !3);
        self.data = word(8);
        self.control = word(12) & VECTOR_MASKED;
    }

    fn message(&self) -> Msi {
        Msi {
            address: self.address,
            data: self.data,
        }
    }
}

/// A function's MSI-X table, pending bits, and the two bits of its message control.
#[derive(Clone, Debug)]
pub struct Msix {
    vectors: Vec<Vector>,
    enabled: bool,
    masked: bool,
}

impl Msix {
    /// The capability's ID.
    pub const CAPABILITY_ID: u8 = 0x11;
    /// Message control bit 15: MSI-X is in use.
    pub const ENABLE: u16 = 1 << 15;
    /// Message control bit 14: all vectors are masked.
    pub const FUNCTION_MASK: u16 = 1 << 14;

    /// A table of `vectors` (1 to 2048) entries, each masked.
    pub fn new(vectors: u16) -> Self {
        let vector = Vector {
            address: 0,
            data: 0,
            control: VECTOR_MASKED,
            pending: false,
        };
        Self {
            vectors: vec![vector; usize::from(vectors.clamp(1, 2048))],
            enabled: false,
            masked: false,
        }
    }

    /// The capability after its ID and link: message control, then where in BAR `bar` the
    /// table and the pending bits are (byte offsets, multiples of 8).
    pub fn capability(&self, bar: u8, table: u32, pending: u32) -> [u8; 10] {
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(self.vectors.len() as u16 - 1).to_le_bytes());
        body[2..6].copy_from_slice(&(table | u32::from(bar)).to_le_bytes());
        body[6..].copy_from_slice(&(pending | u32::from(bar)).to_le_bytes());
        body
    }

    /// The number of vectors.
    pub fn len(&self) -> u16 {
        self.vectors.len() as u16
    }

    /// Never: there is at least one vector.
    pub fn is_empty(&self) -> bool {
        self.vectors.is_empty()
    }

    /// Whether the guest has turned MSI-X on.
    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// Follows a write to message control; what was pending and is no longer masked goes
    /// to `out`.
    pub fn set_control(&mut self, control: u16, out: &mut Vec<Msi>) {
        self.enabled = control & Self::ENABLE != 0;
        self.masked = control & Self::FUNCTION_MASK != 0;
        for vector in 0..self.vectors.len() {
            self.release(vector, out);
        }
    }

    /// The function wants vector `vector`: the message goes to `out`, or is remembered
    /// while masked. Vectors that do not exist, or any while MSI-X is off, do nothing.
    pub fn signal(&mut self, vector: u16, out: &mut Vec<Msi>) {
        if !self.enabled {
            return;
        }
        if let Some(entry) = self.vectors.get_mut(usize::from(vector)) {
            entry.pending = true;
            self.release(usize::from(vector), out);
        }
    }

    fn release(&mut self, vector: usize, out: &mut Vec<Msi>) {
        let open = self.enabled && !self.masked;
        if let Some(entry) = self.vectors.get_mut(vector)
            && open
            && entry.pending
            && entry.control & VECTOR_MASKED == 0
        {
            entry.pending = false;
            out.push(entry.message());
        }
    }

    /// A load from the table, `offset` bytes into it.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset as usize..).zip(data) {
            let entry = self.vectors.get(at / ENTRY_SIZE);
            *byte = entry.map_or(0, |e| e.entry()[at % ENTRY_SIZE]);
        }
    }

    /// A store to the table, `offset` bytes into it, of at most 8 bytes in one entry.
    /// A vector that it unmasks with its pending bit set goes to `out`.
    pub fn table_write(&mut self, offset: u64, data: &[u8], out: &mut Vec<Msi>) {
        let (vector, start) = (offset as usize / ENTRY_SIZE, offset as usize % ENTRY_SIZE);
        let Some(entry) = self.vectors.get_mut(vector) else {
            return;
        };
        let mut bytes = entry.entry();
        let Some(field) = bytes.get_mut(start..start + data.len()) else {
            return;
        };
        field.copy_from_slice(data);
        entry.set_entry(bytes);
        self.release(vector, out);
    }

    /// A load from the pending bit array, `offset` bytes into it. Writes to it do nothing.
    pub fn pending_read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset as usize..).zip(data) {
            let bits = self.vectors.iter().skip(at.saturating_mul(8)).take(8);
            *byte = bits
                .enumerate()
                .fold(0, |b, (i, v)| b | u8::from(v.pending) << i);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MESSAGE: Msi = Msi {
        address: 0xfee0_1000,
        data: 0x41,
    };

    fn unmasked() -> Msix {
        let mut msix = Msix::new(3);
        let mut out = Vec::new();
        msix.set_control(Msix::ENABLE, &mut out);
        msix.table_write(16, &MESSAGE.address.to_le_bytes(), &mut out);
        msix.table_write(24, &MESSAGE.data.to_le_bytes(), &mut out);
        msix.table_write(28, &0_u32.to_le_bytes(), &mut out);
        assert!(out.is_empty());
        msix
    }

    fn pending(msix: &Msix) -> u8 {
        let mut byte = [0];
        msix.pending_read(0, &mut byte);
        byte[0]
    }

    #[test]
    fn an_unmasked_vector_sends_its_message() {
        let mut out = Vec::new();

        unmasked().signal(1, &mut out);

        assert_eq!(out, [MESSAGE]);
    }

    #[test]
    fn a_masked_vector_waits_and_is_sent_once_when_unmasked() {
        let mut msix = unmasked();
        let mut out = Vec::new();
        msix.table_write(28, &1_u32.to_le_bytes(), &mut out);

        msix.signal(1, &mut out);
        msix.signal(1, &mut out);

        assert!(out.is_empty());
        assert_eq!(pending(&msix), 0b10);
        msix.table_write(28, &0_u32.to_le_bytes(), &mut out);
        assert_eq!(out, [MESSAGE]);
        assert_eq!(pending(&msix), 0);
    }

    #[test]
    fn the_function_mask_holds_all_vectors_back() {
        let mut msix = unmasked();
        let mut out = Vec::new();
        msix.set_control(Msix::ENABLE | Msix::FUNCTION_MASK, &mut out);

        msix.signal(1, &mut out);
        assert!(out.is_empty());

        msix.set_control(Msix::ENABLE, &mut out);
        assert_eq!(out, [MESSAGE]);
    }

    #[test]
    fn nothing_is_sent_while_msix_is_off() {
        let mut msix = unmasked();
        let mut out = Vec::new();
        msix.set_control(0, &mut out);

        msix.signal(1, &mut out);
        msix.set_control(Msix::ENABLE, &mut out);

        assert!(out.is_empty());
    }

    #[test]
    fn accesses_outside_the_table_are_harmless() {
        let mut msix = unmasked();
        let mut out = Vec::new();
        let mut data = [0xff; 8];

        msix.table_write(3 * 16, &[0xff; 8], &mut out);
        msix.table_write(12, &[0xff; 8], &mut out);
        msix.table_read(3 * 16, &mut data);
        msix.signal(0xffff, &mut out);
        msix.pending_read(u64::MAX >> 1, &mut [0; 8]);

        assert_eq!(data, [0; 8]);
        assert!(out.is_empty());
    }
}
