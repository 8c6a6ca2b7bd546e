//! Why a machine could not be built: one variant for each thing a caller would do
//! differently.

use std::io;
use std::path::PathBuf;

use crate::virtio;

const MIB: u64 = 1 << 20;

/// Why a machine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// More vCPUs than can be run, or none.
    #[error("{0} vCPUs were asked for; a machine can have 1 to {most}", most = crate::MAX_CPUS)]
    Cpus(u8),
    /// Guest memory could not be had.
    #[error("cannot set up {} MiB of guest memory", size / MIB)]
    Memory {
        /// Bytes asked for.
        size: u64,
        /// Why not.
        source: strata_memory::Error,
    },
    /// The kernel and its initial RAM disk or modules do not fit.
    #[error(
        "{} MiB of memory is too little for this kernel and what is loaded with it; \
         give the machine at least {} MiB",
        size / MIB, minimum / MIB
    )]
    TooLittleMemory {
        /// Bytes the machine has.
        size: u64,
        /// Bytes it needs, a multiple of 1 MiB.
        minimum: u64,
    },
    /// A guest cannot have this context ID.
    #[error("{0} is no context ID of a guest, which are from 3 to 4294967294")]
    ContextId(u32),
    /// The socket device's host end could not be set up.
    #[error("cannot set up the host end of the socket device")]
    Vsock(#[source] io::Error),
    /// A file could not be read.
    #[error("cannot read the {what} {}", path.display())]
    Read {
        /// What it was to be: "kernel", "initial RAM disk", "module".
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The kernel file is not one that can be booted.
    #[error("{}: {problem}", path.display())]
    Kernel {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        problem: KernelProblem,
    },
    /// The initial RAM disk is larger than the memory it has to be in.
    #[error(
        "the initial RAM disk ({} MiB) is larger than the {} MiB of memory that can hold it; \
         give the machine more memory or use a smaller one",
        size.div_ceil(MIB), room / MIB
    )]
    InitrdTooLarge {
        /// Bytes of the RAM disk.
        size: u64,
        /// Bytes that there is room for.
        room: u64,
    },
    /// The modules are larger than the memory they have to be in.
    #[error(
        "the kernel's modules are larger than the memory that can hold them; \
         give the machine more memory or the kernel less"
    )]
    ModulesTooLarge,
    /// There are modules, but no Multiboot kernel.
    #[error(
        "modules are for Multiboot kernels, and {} is a Linux kernel; \
         it takes an initial RAM disk instead",
        .0.display()
    )]
    ModulesForLinux(PathBuf),
    /// The debug-exit port cannot be where it was asked for.
    #[error(
        "the debug-exit port cannot be at {0:#x}, where another device is; \
         test kernels expect it at 0xf4"
    )]
    DebugExitTaken(u16),
    /// The kernel would cut the command line off.
    #[error("the kernel command line has {length} bytes; this kernel takes at most {limit}")]
    CommandLineTooLong {
        /// Its length in bytes.
        length: usize,
        /// The most the kernel takes.
        limit: usize,
    },
    /// The command line contains a NUL, which would end it.
    #[error("the kernel command line contains a NUL byte")]
    CommandLineNul,
    /// A disk or console port could not be set up.
    #[error(transparent)]
    Device(#[from] virtio::Error),
    /// A vCPU could not be made.
    #[error("cannot make vCPU {index}")]
    Vcpu {
        /// Which one.
        index: u8,
        /// Why not.
        source: strata_hypervisor::Error,
    },
    /// The host gave no thread.
    #[error("cannot start a thread for the machine")]
    Thread(#[source] io::Error),
}

/// What is wrong with a kernel file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KernelProblem {
    /// It is something else.
    #[error(
        "not a Linux kernel but {0}; a bzImage (usually named vmlinuz), an x86-64 ELF vmlinux or \
         a Multiboot kernel is needed"
    )]
    NotAKernel(&'static str),
    /// It is a kernel for another machine.
    #[error("this kernel is for {0}; an x86-64 kernel is needed")]
    WrongMachine(&'static str),
    /// It ends too early.
    #[error(
        "the kernel is truncated: it has {length} bytes and should have at least {expected}; \
         fetch or copy it again"
    )]
    Truncated {
        /// Bytes that there are.
        length: u64,
        /// Bytes that its headers speak of.
        expected: u64,
    },
    /// It is a Multiboot kernel that cannot be loaded.
    #[error("this Multiboot kernel cannot be loaded: {0}")]
    Multiboot(String),
    /// It uses a boot protocol that is too old.
    #[error(
        "the kernel speaks boot protocol {}.{:02}; 2.08 or later (Linux 2.6.26) is needed",
        .0 >> 8, .0 & 0xff
    )]
    OldProtocol(u16),
    /// Its payload is compressed in a way that is not known.
    #[error("the kernel is compressed as {0}, which cannot be unpacked here; use another build")]
    Compression(&'static str),
    /// It does not unpack or contradicts itself.
    #[error("the kernel is damaged: {0}; fetch or copy it again")]
    Damaged(String),
}
