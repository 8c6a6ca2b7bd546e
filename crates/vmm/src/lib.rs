//! One virtual machine: build it, boot a kernel in it, run it, stop it.
//!
//! ```text
//!   MachineConfig ─► Machine::open ─► Opened::build ─► Machine::run ─► Outcome
//!                      │                 │                │
//!        files, memory, vCPUs            ├─ console       ├─ vCPU threads: Processor::run ─► VcpuBus
//!        boot: kernel, initrd,           │  threads:      │     ├─ ports, MMIO ─► bus ─► chipset,
//!        boot_params, ACPI               │  host streams  │     │                 serial, PCI
//!                                        └─ virtio        │     └─ LAPIC, kvmclock MSRs
//!                                           workers       └─ timer thread: wakes running vCPUs
//! ```
//!
//! What is opened needs nothing new of the host and has no thread yet, so between `open` and
//! `build` the process can be locked up.
//!
//! Locks live here: devices are state machines without any, and vCPU threads never do host
//! I/O. This crate knows nothing of images or tenants.

mod boot;
mod bus;
mod chipset;
mod clock;
mod config;
mod console;
mod ending;
mod error;
mod interrupts;
mod layout;
mod machine;
mod panic_watch;
mod pvclock;
mod sync;
#[cfg(test)]
mod testing;
mod timers;
mod vcpu;
pub mod virtio;

pub use boot::load;
pub use bus::{MmioDevice, PortDevice};
pub use config::{
    Accel, BootModule, ConsolePort, DiskConfig, DiskContent, DiskImage, InitrdPart, MachineConfig,
    SerialConsole, VsockConfig,
};
pub use ending::Outcome;
pub use error::{Error, KernelProblem};
pub use interrupts::Interrupts;
pub use machine::{Control, MAX_CPUS, Machine, Opened};
pub use strata_hypervisor::Statistics;
pub use strata_memory::{give_back_large_blocks, give_back_program};
pub use virtio::open_tap;
