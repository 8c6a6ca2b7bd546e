//! One test case as both machines take it, and what comes back. Plain data of fixed size,
//! because it crosses to the host process through shared memory.

use crate::layout::{CODE_16, DATA_16, STACK_16};

/// Bytes of an XSAVE area in standard format up to the end of the AVX component (Intel SDM
/// vol. 1 §13.4).
pub const XSAVE_SIZE: usize = 832;
/// Bytes of code that a case can hold.
pub const CODE_MAX: usize = 448;
/// Patches that a case can hold.
pub const PATCH_MAX: usize = 12;
/// Bytes of one patch.
pub const PATCH_SIZE: usize = 32;
/// Changed cache lines that an outcome records in full. More are only hashed.
pub const LINE_MAX: usize = 32;
/// Bytes of a cache line.
pub const LINE: usize = 64;

/// Integer registers, in encoding order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Registers {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
}

/// x87, SSE and AVX state in the standard XSAVE format.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Xsave(pub [u8; XSAVE_SIZE]);

/// Offset of MXCSR.
pub const MXCSR_OFFSET: usize = 24;
/// Offset of ST0; each register takes 16 bytes, ten of them used.
pub const ST_OFFSET: usize = 32;
/// Offset of XMM0.
pub const XMM_OFFSET: usize = 160;
/// Offset of `XSTATE_BV`.
pub const HEADER_OFFSET: usize = 512;
/// Offset of the upper half of YMM0.
pub const YMM_OFFSET: usize = 576;

impl Xsave {
    /// The state after FNINIT, MXCSR at its default, vector registers zero, everything
    /// marked as present.
    pub fn initial() -> Self {
        let mut area = [0; XSAVE_SIZE];
        area[..2].copy_from_slice(&0x037f_u16.to_le_bytes());
        area[MXCSR_OFFSET..MXCSR_OFFSET + 4].copy_from_slice(&0x1f80_u32.to_le_bytes());
        area[HEADER_OFFSET] = 7;
        Self(area)
    }

    /// Makes areas comparable: components that `XSTATE_BV` calls initial get their initial
    /// values, what software may scribble on becomes zero, and so do FOP, FIP and FDP, which
    /// hosts differ in (AMD keeps them only around unmasked exceptions).
    pub fn normalise(&mut self) {
        let present = self.0[HEADER_OFFSET];
        let initial = Self::initial();
        if present & 1 == 0 {
            self.0[..MXCSR_OFFSET].copy_from_slice(&initial.0[..MXCSR_OFFSET]);
            self.0[ST_OFFSET..XMM_OFFSET].fill(0);
        }
        if present & 2 == 0 {
            self.0[XMM_OFFSET..XMM_OFFSET + 256].fill(0);
        }
        if present & 4 == 0 {
            self.0[YMM_OFFSET..].fill(0);
        }
        self.0[6..24].fill(0);
        self.0[28..32].fill(0);
        for st in self.0[ST_OFFSET..XMM_OFFSET].chunks_exact_mut(16) {
            st[10..].fill(0);
        }
        self.0[XMM_OFFSET + 256..YMM_OFFSET].fill(0);
    }

    /// The 32 bytes of a YMM register, 0 to 15.
    pub fn ymm(&self, register: usize) -> [u8; 32] {
        let mut value = [0; 32];
        let (low, high) = (XMM_OFFSET + 16 * register, YMM_OFFSET + 16 * register);
        value[..16].copy_from_slice(&self.0[low..low + 16]);
        value[16..].copy_from_slice(&self.0[high..high + 16]);
        value
    }

    /// Sets a YMM register, 0 to 15.
    pub fn set_ymm(&mut self, register: usize, value: &[u8; 32]) {
        let (low, high) = (XMM_OFFSET + 16 * register, YMM_OFFSET + 16 * register);
        self.0[low..low + 16].copy_from_slice(&value[..16]);
        self.0[high..high + 16].copy_from_slice(&value[16..]);
    }

    /// MXCSR.
    pub fn mxcsr(&self) -> u32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.0[MXCSR_OFFSET..MXCSR_OFFSET + 4]);
        u32::from_le_bytes(bytes)
    }
}

impl std::fmt::Debug for Xsave {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Xsave")
            .field("mxcsr", &self.mxcsr())
            .finish_non_exhaustive()
    }
}

/// Bytes that a case finds at a linear address, over the pristine contents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Patch {
    /// Linear address; the bytes lie in one writable page.
    pub address: u64,
    /// How many of `bytes` count.
    pub length: u64,
    /// The bytes.
    pub bytes: [u8; PATCH_SIZE],
}

/// How wide the code of a case is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u64)]
pub enum Width {
    /// 64-bit mode.
    #[default]
    Bits64,
    /// Compatibility mode, with a 32-bit code segment.
    Bits32,
    /// Compatibility mode, with 16-bit code, data and stack segments of 64 KiB and less that
    /// have bases of their own (`layout::SEGMENTS_16`).
    Bits16,
}

impl Width {
    /// The width in bits.
    pub fn bits(self) -> u32 {
        match self {
            Self::Bits64 => 64,
            Self::Bits32 => 32,
            Self::Bits16 => 16,
        }
    }

    /// The bits of a general register that code of this width sees.
    pub fn mask(self) -> u64 {
        match self {
            Self::Bits64 => u64::MAX,
            Self::Bits32 | Self::Bits16 => u32::MAX.into(),
        }
    }

    /// What is at a linear address of code, as RIP has it.
    pub fn ip(self, linear: u64) -> u64 {
        match self {
            Self::Bits16 => linear.wrapping_sub(CODE_16.base) & 0xffff,
            _ => linear,
        }
    }

    /// The offset of data at a linear address, in the segment that DS and ES hold.
    pub fn data_offset(self, linear: u64) -> u64 {
        match self {
            Self::Bits16 => linear.wrapping_sub(DATA_16.base) & 0xffff,
            _ => linear,
        }
    }

    /// The offset of what is at a linear address of the stack, as RSP has it.
    pub fn stack_offset(self, linear: u64) -> u64 {
        match self {
            Self::Bits16 => linear.wrapping_sub(STACK_16.base) & 0xffff,
            _ => linear,
        }
    }

    /// The linear address of a stack pointer.
    pub fn stack_linear(self, pointer: u64) -> u64 {
        match self {
            Self::Bits16 => STACK_16.base + (pointer & 0xffff),
            _ => pointer,
        }
    }

    /// The general and vector registers that code of this width sees.
    pub fn registers(self) -> usize {
        match self {
            Self::Bits64 => 16,
            Self::Bits32 | Self::Bits16 => 8,
        }
    }
}

/// Everything a machine needs to run one case.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Case {
    /// Extended state at the start.
    pub xsave: Xsave,
    /// Integer state at the start.
    pub registers: Registers,
    /// How the code is to be taken.
    pub width: Width,
    /// Linear address of the first byte of `code`, in the code pages.
    pub code_address: u64,
    /// How many bytes of `code` count.
    pub code_length: u64,
    /// Machine code; what follows it in memory is INT3.
    pub code: [u8; CODE_MAX],
    /// How many of `patches` count.
    pub patch_count: u64,
    /// Initial memory.
    pub patches: [Patch; PATCH_MAX],
}

impl Case {
    /// RIP of the first instruction.
    pub fn ip(&self) -> u64 {
        self.width.ip(self.code_address)
    }
}

/// How a case ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum End {
    /// The machine did not get to run it, or died on it.
    #[default]
    Lost,
    /// With an exception, as every case should.
    Exception,
    /// Not within the time allowed.
    Timeout,
}

/// One changed cache line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Line {
    /// Linear address.
    pub address: u64,
    /// What it holds now.
    pub bytes: [u8; LINE],
}

/// All lines that do not hold their pristine contents.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Changes {
    /// How many lines differ, which may be more than were recorded.
    pub count: u64,
    /// Hash over all of them.
    pub hash: u64,
    /// The first of them, by address.
    pub lines: [Line; LINE_MAX],
}

impl Changes {
    /// No change.
    pub const NONE: Self = Self {
        count: 0,
        hash: 0,
        lines: [Line {
            address: 0,
            bytes: [0; LINE],
        }; LINE_MAX],
    };

    /// The lines that were recorded.
    pub fn recorded(&self) -> &[Line] {
        &self.lines[..self.lines.len().min(self.count as usize)]
    }
}

impl std::fmt::Debug for Changes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Changes")
            .field("count", &self.count)
            .finish_non_exhaustive()
    }
}

/// What a machine made of a case.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Outcome {
    /// Extended state at the end, normalised.
    pub xsave: Xsave,
    /// Integer state at the end.
    pub registers: Registers,
    /// How it ended; the rest means something only after [`End::Exception`].
    pub end: End,
    /// Exception vector.
    pub vector: u32,
    /// The error code of the exceptions that have one, else 0.
    pub error_code: u64,
    /// The faulting address after a page fault, else 0.
    pub cr2: u64,
    /// Base of FS.
    pub fs_base: u64,
    /// Base of GS.
    pub gs_base: u64,
    /// Memory that is not as it was before the case was loaded, the case's own code and
    /// patches included.
    pub changes: Changes,
}

impl Outcome {
    /// The outcome of a case that was not run.
    pub fn lost() -> Self {
        Self {
            xsave: Xsave::initial(),
            registers: Registers::default(),
            end: End::Lost,
            vector: 0,
            error_code: 0,
            cr2: 0,
            fs_base: 0,
            gs_base: 0,
            changes: Changes::NONE,
        }
    }
}

/// Whether an exception pushes an error code (Intel SDM vol. 3A §6.13).
pub fn has_error_code(vector: u32) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21)
}
