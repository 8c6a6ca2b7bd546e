//! Architectural state of a vCPU, the same for every backend.
//!
//! Names and encodings are the Intel SDM's (vol. 3A chapters 2 and 3).

/// A segment register with its descriptor cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, scaled by G.
    pub limit: u32,
    /// Descriptor bits 55:40: type, S, DPL, P in bits 7:0; AVL, L, D/B, G in bits 15:12.
    pub attributes: u16,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, inclusive.
    pub limit: u16,
}

/// What a vCPU does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activity {
    /// It runs, or is halted for an interrupt.
    #[default]
    Running,
    /// It was reset and waits for a startup message (Intel SDM vol. 3A §9.4).
    WaitForStartup,
}

/// All registers that a machine sets at boot. The extended state (x87, SSE, AVX) starts in
/// its initial configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags; bit 1 reads as one.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS, in encoding order.
    pub segments: [Segment; 6],
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table register.
    pub gdtr: DescriptorTable,
    /// Interrupt descriptor table register.
    pub idtr: DescriptorTable,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// `IA32_EFER`.
    pub efer: u64,
    /// `IA32_KERNEL_GS_BASE`.
    pub kernel_gs_base: u64,
    /// What the vCPU does. Waiting for a startup message, it has the registers of a reset,
    /// whatever the other fields say.
    pub activity: Activity,
}
