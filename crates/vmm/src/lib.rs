//! One virtual machine: build it, boot Linux in it, run it, stop it.
//!
//! ```text
//!   MachineConfig ─► Machine::build ─► run ─► Outcome
//!                      │                │
//!        boot: kernel, initrd,          ├─ vCPU threads: Processor::run ─► VcpuBus
//!        boot_params, ACPI              │     ├─ ports, MMIO ─► bus ─► chipset, serial, PCI
//!                                       │     └─ LAPIC, kvmclock MSRs
//!                                       ├─ timer thread: wakes running vCPUs
//!                                       ├─ console threads: host input and output
//!                                       └─ virtio workers: host I/O
//! ```
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

pub use bus::{MmioDevice, PortDevice};
pub use config::{Accel, ConsolePort, DiskConfig, InitrdPart, MachineConfig, SerialConsole};
pub use ending::Outcome;
pub use error::{Error, KernelProblem};
pub use interrupts::Interrupts;
pub use machine::{Control, Machine};
