//! The state block of one vCPU: what translated code addresses through the GS segment,
//! and the rest of the architectural state beside it.
//!
//! Translated code relies on the field offsets (`offset_of!`), so everything here is
//! `repr(C)`. While translated code runs, twelve of the general registers and the FPU live
//! in host registers and the copies here are stale; every exit writes them back.

use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use crate::bus::Attention;
use crate::mmu::{AddressSpace, WINDOW_KINDS};
use crate::roaming::FILLS;
use crate::segmentation::Extent;

/// RFLAGS bits (Intel SDM vol. 1 §3.4.3).
pub mod rflags {
    /// Carry.
    pub const CF: u64 = 1;
    /// Always one.
    pub const FIXED: u64 = 1 << 1;
    /// Parity.
    pub const PF: u64 = 1 << 2;
    /// Auxiliary carry.
    pub const AF: u64 = 1 << 4;
    /// Zero.
    pub const ZF: u64 = 1 << 6;
    /// Sign.
    pub const SF: u64 = 1 << 7;
    /// Trap.
    pub const TF: u64 = 1 << 8;
    /// Interrupt enable.
    pub const IF: u64 = 1 << 9;
    /// Direction.
    pub const DF: u64 = 1 << 10;
    /// Overflow.
    pub const OF: u64 = 1 << 11;
    /// I/O privilege level.
    pub const IOPL: u64 = 3 << 12;
    /// Nested task.
    pub const NT: u64 = 1 << 14;
    /// Resume.
    pub const RF: u64 = 1 << 16;
    /// Virtual-8086 mode.
    pub const VM: u64 = 1 << 17;
    /// Alignment check.
    pub const AC: u64 = 1 << 18;
    /// CPUID available.
    pub const ID: u64 = 1 << 21;
    /// The six status flags.
    pub const STATUS: u64 = CF | PF | AF | ZF | SF | OF;
}

/// CR0 bits (Intel SDM vol. 3A §2.5).
pub mod cr0 {
    /// Protection enable.
    pub const PE: u64 = 1;
    /// Monitor coprocessor.
    pub const MP: u64 = 1 << 1;
    /// Emulation.
    pub const EM: u64 = 1 << 2;
    /// Task switched.
    pub const TS: u64 = 1 << 3;
    /// Extension type, fixed to one.
    pub const ET: u64 = 1 << 4;
    /// Numeric error.
    pub const NE: u64 = 1 << 5;
    /// Write protect.
    pub const WP: u64 = 1 << 16;
    /// Alignment mask.
    pub const AM: u64 = 1 << 18;
    /// Not write-through.
    pub const NW: u64 = 1 << 29;
    /// Cache disable.
    pub const CD: u64 = 1 << 30;
    /// Paging.
    pub const PG: u64 = 1 << 31;
}

/// CR4 bits (Intel SDM vol. 3A §2.5).
pub mod cr4 {
    /// Time stamp disable.
    pub const TSD: u64 = 1 << 2;
    /// Debugging extensions.
    pub const DE: u64 = 1 << 3;
    /// Page size extensions.
    pub const PSE: u64 = 1 << 4;
    /// Physical address extension.
    pub const PAE: u64 = 1 << 5;
    /// Machine-check enable.
    pub const MCE: u64 = 1 << 6;
    /// Page global enable.
    pub const PGE: u64 = 1 << 7;
    /// RDPMC in ring 3.
    pub const PCE: u64 = 1 << 8;
    /// FXSAVE and SSE enable.
    pub const OSFXSR: u64 = 1 << 9;
    /// Unmasked SIMD exceptions enable.
    pub const OSXMMEXCPT: u64 = 1 << 10;
    /// User-mode instruction prevention.
    pub const UMIP: u64 = 1 << 11;
    /// RDFSBASE and friends enable.
    pub const FSGSBASE: u64 = 1 << 16;
    /// Process-context identifiers.
    pub const PCIDE: u64 = 1 << 17;
    /// XSAVE and XCR0 enable.
    pub const OSXSAVE: u64 = 1 << 18;
    /// Supervisor-mode execution prevention.
    pub const SMEP: u64 = 1 << 20;
    /// Supervisor-mode access prevention.
    pub const SMAP: u64 = 1 << 21;
}

/// `IA32_EFER` bits (Intel SDM vol. 3A §2.2.1).
pub mod efer {
    /// SYSCALL enable.
    pub const SCE: u64 = 1;
    /// Long mode enable.
    pub const LME: u64 = 1 << 8;
    /// Long mode active.
    pub const LMA: u64 = 1 << 10;
    /// Execute-disable enable.
    pub const NXE: u64 = 1 << 11;
    /// AMD: automatic IBRS enable.
    pub const AUTOIBRS: u64 = 1 << 21;
}

/// Indexes into [`State::gpr`], in encoding order.
#[allow(missing_docs)]
pub mod gpr {
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
    pub const R8: usize = 8;
    pub const R9: usize = 9;
    pub const R10: usize = 10;
    pub const R11: usize = 11;
    pub const R12: usize = 12;
    pub const R13: usize = 13;
    pub const R14: usize = 14;
    pub const R15: usize = 15;
}

/// Indexes into [`State::segments`], in encoding order.
#[allow(missing_docs)]
pub mod segment {
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// A segment register with its descriptor cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Segment {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, scaled by G.
    pub limit: u32,
    /// Visible selector.
    pub selector: u16,
    /// Descriptor bits 55:40: type, S, DPL, P in bits 7:0; AVL, L, D/B, G in bits 15:12.
    pub attributes: u16,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, inclusive.
    pub limit: u16,
}

/// Size of the XSAVE area in standard format for x87, SSE and AVX (Intel SDM vol. 1
/// §13.4): 512 legacy + 64 header + 256 high halves of YMM0 to YMM15.
pub const XSAVE_SIZE: usize = 832;
/// Offset of the high halves of the YMM registers in the standard format.
pub const XSAVE_AVX_OFFSET: usize = 576;
/// Offset of the XSAVE header.
pub const XSAVE_HEADER_OFFSET: usize = 512;

/// The extended state of a vCPU in the standard XSAVE format.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct XsaveArea(pub [u8; XSAVE_SIZE]);

impl XsaveArea {
    /// The state after `FNINIT` and with MXCSR at 0x1f80, all components initial.
    pub const INITIAL: Self = {
        let mut bytes = [0; XSAVE_SIZE];
        bytes[0] = 0x7f; // FCW = 0x037f
        bytes[1] = 0x03;
        bytes[24] = 0x80; // MXCSR = 0x1f80
        bytes[25] = 0x1f;
        Self(bytes)
    };
}

/// Model-specific registers that are plain storage.
#[derive(Clone, Copy, Debug, Default)]
pub struct Msrs {
    /// `IA32_STAR`.
    pub star: u64,
    /// `IA32_LSTAR`.
    pub lstar: u64,
    /// `IA32_CSTAR`.
    pub cstar: u64,
    /// `IA32_FMASK`.
    pub sfmask: u64,
    /// `IA32_SYSENTER_CS`.
    pub sysenter_cs: u64,
    /// `IA32_SYSENTER_ESP`.
    pub sysenter_esp: u64,
    /// `IA32_SYSENTER_EIP`.
    pub sysenter_eip: u64,
    /// `IA32_TSC_AUX`.
    pub tsc_aux: u64,
    /// `IA32_PAT`.
    pub pat: u64,
    /// `IA32_SPEC_CTRL`.
    pub spec_ctrl: u64,
    /// `IA32_MISC_ENABLE`.
    pub misc_enable: u64,
    /// `IA32_MTRR_DEF_TYPE`.
    pub mtrr_def_type: u64,
}

/// Where translated code puts an access that cannot be done in place: one that crosses a
/// page or goes to a device. The data lies at the same offset modulo 64 as in the guest,
/// so alignment faults stay what they are.
pub const BOUNCE_SIZE: usize = 1024;

/// Windows of each kind.
pub(crate) const WINDOWS: usize = 256;

/// A bit for each window of one kind.
pub(crate) type WindowSet = [u64; WINDOWS / 64];

/// Counters of drafts, some of which share one.
pub(crate) const DRAFT_COUNTERS: usize = 1 << 16;

/// How often a draft begins until it is made anew as a whole.
pub(crate) const DRAFT_RUNS: u8 = 64;

/// log2 of the bytes of code that share a counter.
pub(crate) const DRAFT_SHIFT: u8 = 4;

/// The counter of the draft that has `address` behind its first instruction.
pub(crate) fn draft_counter(address: u64) -> usize {
    (address >> DRAFT_SHIFT) as usize % DRAFT_COUNTERS
}

/// A page that a place in the code accessed last, so that it may do so again.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Window {
    /// Linear address of the page.
    pub(crate) start: u64,
    /// Host address less linear address.
    pub(crate) delta: u64,
}

impl Window {
    /// No guest access is possible where this one lies: what passes its check faults on the
    /// host, since the address is not canonical there either.
    pub(crate) const NONE: Self = Self {
        start: 1 << 63,
        delta: 0,
    };
}

/// Pages in a row, of any sizes, as a place of ring 3's that roams may access them.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct WideWindow {
    /// Linear address of the first.
    pub(crate) start: u64,
    /// Host address less linear address.
    pub(crate) delta: u64,
    /// How far from the start an access may begin. Of any there is, the end is inside too.
    pub(crate) limit: u64,
    /// How many accesses may yet miss it until Rust is asked.
    pub(crate) misses: u64,
}

impl WideWindow {
    /// As [`Window::NONE`].
    pub(crate) const NONE: Self = Self {
        start: Window::NONE.start,
        delta: 0,
        limit: 0,
        misses: WIDE_MISSES,
    };
}

/// Wide windows for loads, and as many for stores.
pub(crate) const WIDE_WINDOWS: usize = 4;
/// Misses of a wide window between two looks at whether it should be elsewhere.
pub(crate) const WIDE_MISSES: u64 = 1 << 12;

/// Everything about one vCPU that translated code or system instructions touch.
#[repr(C, align(64))]
pub struct State {
    /// General registers in encoding order.
    pub gpr: [u64; 16],
    /// Instruction pointer: of the instruction being executed while one is.
    pub rip: u64,
    /// All of RFLAGS but the six status flags, which are in `status`.
    pub(crate) system_flags: u64,
    /// The status flags as `LAHF; SETO AL` leaves them in AX.
    pub(crate) status: u64,
    /// The address space that data accesses go through.
    pub(crate) space: *mut AddressSpace,
    /// Bases of FS and GS, where translated code adds them. The `base` of the segment
    /// registers FS and GS themselves is unused.
    pub fs_base: u64,
    /// See `fs_base`.
    pub gs_base: u64,
    /// Guest TSC less host TSC.
    pub tsc_offset: u64,
    /// Nonzero while the guest's extended state is in the host's registers.
    pub(crate) fpu_loaded: u64,
    /// Nonzero: an interrupt may be pending that IF held back; STI has to look.
    pub(crate) interrupts_held: u64,
    /// The host stack pointer to leave translated code with.
    pub(crate) host_rsp: u64,
    /// RSP while a return stack is empty, by its number.
    pub(crate) return_bases: [u64; 2],
    /// Where ring 3's return stack ends while the supervisor runs.
    pub(crate) user_returns: u64,
    /// Temporaries of one translated instruction.
    pub(crate) temp: [u64; 4],
    /// What IRET popped: RIP, CS, RFLAGS, RSP, SS.
    pub(crate) frame: [u64; 5],
    /// Status flags that gave way to an instruction that needs host RAX.
    pub(crate) saved_status: u64,
    /// Nonzero: the access that took the slow path goes to the bounce buffer.
    pub(crate) bounced: u64,
    /// What the commit step after a bounced store has to do: 0 nothing.
    pub(crate) commit_length: u64,
    /// Guest linear address of the bounced store.
    pub(crate) commit_address: u64,
    /// MXCSR as Rust code expects it.
    pub(crate) default_mxcsr: u64,
    /// The guest's MXCSR while a slow path runs.
    pub(crate) mxcsr: u64,
    /// The guest's vector registers while a slow path runs.
    pub(crate) vectors: [[u8; 32]; 16],
    /// Set by the signal handler: trap number, host RIP and flags of a host fault.
    pub(crate) host_fault: HostFault,
    /// Opaque pointer for the runtime's slow paths.
    pub(crate) runtime: *mut std::ffi::c_void,
    /// Extended state while it is not loaded.
    pub xsave: XsaveArea,
    /// Outside of 64-bit mode: what the segment registers allow, by number.
    pub(crate) extents: [Extent; 6],
    /// See [`BOUNCE_SIZE`].
    pub(crate) bounce: Bounce,
    /// By [`window_kind`](crate::mmu::window_kind).
    pub(crate) windows: [[Window; WINDOWS]; WINDOW_KINDS],
    /// Which windows are in use, a bit for each.
    pub(crate) windows_used: [WindowSet; WINDOW_KINDS],
    /// How often ring 3's windows may yet be filled until Rust is asked, for loads and for stores.
    pub(crate) window_fills: [[u32; WINDOWS]; 2],
    /// For loads and for stores of ring 3; see `mmu::wide`.
    pub(crate) wide: [[WideWindow; WIDE_WINDOWS]; 2],
    /// How often drafts may yet begin until they are made anew as a whole; see
    /// [`draft_counter`].
    pub(crate) drafts: [u8; DRAFT_COUNTERS],
    /// `IA32_KERNEL_GS_BASE`.
    pub kernel_gs_base: u64,
    /// ES, CS, SS, DS, FS, GS.
    pub segments: [Segment; 6],
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table register.
    pub gdtr: DescriptorTable,
    /// Interrupt descriptor table register.
    pub idtr: DescriptorTable,
    /// Current privilege level, 0 or 3 (or 1, 2).
    pub cpl: u8,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// XCR0.
    pub xcr0: u64,
    /// `IA32_EFER`.
    pub efer: u64,
    /// DR0 to DR3, DR6, DR7.
    pub dr: [u64; 6],
    /// The other MSRs.
    pub msrs: Msrs,
    /// The next instruction is in the shadow of STI or MOV SS.
    pub interrupt_shadow: bool,
    /// NMIs are blocked until IRET.
    pub nmi_blocked: bool,
}

/// Aligned scratch memory for bounced accesses.
#[repr(C, align(64))]
pub(crate) struct Bounce(pub(crate) [u8; BOUNCE_SIZE]);

/// What the signal handler saw when translated code faulted on the host.
#[derive(Clone, Copy, Default, Debug)]
#[repr(C)]
pub(crate) struct HostFault {
    pub(crate) trap: u64,
    pub(crate) rip: u64,
    pub(crate) rflags: u64,
    pub(crate) rax: u64,
}

impl State {
    #[expect(
        clippy::large_stack_arrays,
        reason = "a state is made once and moves into its block"
    )]
    pub(crate) fn new() -> Self {
        let flat = |attributes| Segment {
            base: 0,
            limit: u32::MAX,
            selector: 0,
            attributes,
        };
        Self {
            gpr: [0; 16],
            rip: 0,
            system_flags: rflags::FIXED,
            status: 0,
            space: std::ptr::null_mut(),
            fs_base: 0,
            gs_base: 0,
            tsc_offset: 0,
            fpu_loaded: 0,
            interrupts_held: 0,
            host_rsp: 0,
            return_bases: [0; 2],
            user_returns: 0,
            temp: [0; 4],
            frame: [0; 5],
            saved_status: 0,
            bounced: 0,
            commit_length: 0,
            commit_address: 0,
            default_mxcsr: 0x1f80,
            mxcsr: 0,
            vectors: [[0; 32]; 16],
            host_fault: HostFault::default(),
            runtime: std::ptr::null_mut(),
            xsave: XsaveArea::INITIAL,
            extents: [Extent::default(); 6],
            bounce: Bounce([0; BOUNCE_SIZE]),
            windows: [[Window::NONE; WINDOWS]; WINDOW_KINDS],
            windows_used: [[0; WINDOWS / 64]; WINDOW_KINDS],
            window_fills: [[FILLS; WINDOWS]; 2],
            wide: [[WideWindow::NONE; WIDE_WINDOWS]; 2],
            drafts: [DRAFT_RUNS; DRAFT_COUNTERS],
            kernel_gs_base: 0,
            segments: [flat(0xc093); 6],
            ldtr: Segment::default(),
            tr: Segment::default(),
            gdtr: DescriptorTable::default(),
            idtr: DescriptorTable::default(),
            cpl: 0,
            cr0: cr0::ET,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            xcr0: 1,
            efer: 0,
            dr: [0, 0, 0, 0, 0xffff_0ff0, 0x400],
            // PAT after reset: Intel SDM vol. 3A §12.12.4
            msrs: Msrs {
                pat: 0x0007_0406_0007_0406,
                ..Msrs::default()
            },
            interrupt_shadow: false,
            nmi_blocked: false,
        }
    }

    /// All of RFLAGS.
    pub fn rflags(&self) -> u64 {
        let ah =
            self.status >> 8 & (rflags::SF | rflags::ZF | rflags::AF | rflags::PF | rflags::CF);
        self.system_flags & !rflags::STATUS | rflags::FIXED | ah | (self.status & 1) << 11
    }

    /// Sets all of RFLAGS.
    pub fn set_rflags(&mut self, value: u64) {
        self.system_flags = value & !rflags::STATUS | rflags::FIXED;
        self.status = Self::status_from(value);
    }

    /// The form of `status` for the status flags in `value`.
    pub(crate) fn status_from(value: u64) -> u64 {
        (value & (rflags::SF | rflags::ZF | rflags::AF | rflags::PF | rflags::CF)) << 8
            | (value >> 11 & 1)
    }
}

/// A vCPU's state block: the word that others touch, and behind it what only the vCPU's
/// own thread does. GS points at its start while translated code runs.
#[repr(C, align(64))]
pub(crate) struct Block {
    pub(crate) attention: Attention,
    state: UnsafeCell<State>,
}

// SAFETY: other threads only ever use `attention`, an atomic; `state` is reached through
// `StateRef` alone, of which there is one, owned by the vCPU.
unsafe impl Sync for Block {}
// SAFETY: the raw pointers in `State` are made valid by the vCPU each time it runs.
unsafe impl Send for Block {}

/// The one owner of a block's [`State`].
pub(crate) struct StateRef(Arc<Block>);

impl StateRef {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Block {
            attention: Attention::default(),
            state: UnsafeCell::new(State::new()),
        }))
    }

    pub(crate) fn block(&self) -> &Arc<Block> {
        &self.0
    }
}

impl Deref for StateRef {
    type Target = State;

    fn deref(&self) -> &State {
        // SAFETY: `self` is the only path to the state, so a shared borrow of it excludes
        // every mutable one; translated code runs only inside `&mut` methods.
        unsafe { &*self.0.state.get() }
    }
}

impl DerefMut for StateRef {
    fn deref_mut(&mut self) -> &mut State {
        // SAFETY: as above, with the exclusive borrow of `self`.
        unsafe { &mut *self.0.state.get() }
    }
}

/// Offset of `State` from the start of its block, in bytes.
pub(crate) const STATE_OFFSET: usize = std::mem::offset_of!(Block, state);

/// GS-relative displacement of a field of [`State`].
macro_rules! state_offset {
    ($($field:tt)+) => {
        ($crate::state::STATE_OFFSET + ::std::mem::offset_of!($crate::state::State, $($field)+)) as i32
    };
}
pub(crate) use state_offset;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rflags_survive_the_split_into_status_and_system_flags() {
        let mut state = State::new();
        for value in [
            0x2,
            0xed7,
            0x246,
            0x3202,
            rflags::STATUS | rflags::FIXED | rflags::DF,
        ] {
            state.set_rflags(value);
            assert_eq!(state.rflags(), value | rflags::FIXED);
        }
    }
}
