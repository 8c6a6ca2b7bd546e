//! Exceptions as values: what an instruction raises before it is delivered.

/// Vectors of the exceptions that the CPU raises itself (Intel SDM vol. 3A §6.15).
#[allow(missing_docs)]
pub mod vector {
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const XM: u8 = 19;
}

/// A fault: RIP stays at the instruction that raised it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// 0 to 31.
    pub vector: u8,
    /// The error code, for the vectors that push one.
    pub error_code: Option<u32>,
    /// What CR2 becomes, for #PF.
    pub address: Option<u64>,
}

impl Exception {
    pub(crate) fn new(vector: u8) -> Self {
        Self {
            vector,
            error_code: None,
            address: None,
        }
    }

    pub(crate) fn with_code(vector: u8, code: u32) -> Self {
        Self {
            vector,
            error_code: Some(code),
            address: None,
        }
    }

    pub(crate) fn general_protection(code: u32) -> Self {
        Self::with_code(vector::GP, code)
    }

    pub(crate) fn stack_fault(code: u32) -> Self {
        Self::with_code(vector::SS, code)
    }

    pub(crate) fn not_present(code: u32) -> Self {
        Self::with_code(vector::NP, code)
    }

    pub(crate) fn invalid_tss(code: u32) -> Self {
        Self::with_code(vector::TS, code)
    }

    pub(crate) fn alignment_check() -> Self {
        Self::with_code(vector::AC, 0)
    }

    pub(crate) fn undefined() -> Self {
        Self::new(vector::UD)
    }

    pub(crate) fn page_fault(address: u64, code: u32) -> Self {
        Self {
            vector: vector::PF,
            error_code: Some(code),
            address: Some(address),
        }
    }
}
