//! Device models of a PC, as pure state machines.
//!
//! ```text
//!   vmm: port, MMIO, MSR ──► read(register) / write(register, value) ──► outputs handed back
//!                            (serial, rtc, lapic, ioapic, pm, pvpanic, pci, virtio)
//! ```
//!
//! A device holds registers and nothing else: no threads, file descriptors, locks or
//! clocks. Time, input and the memory to work on are handed in; interrupts, output and
//! machine events are handed back. The glue to buses and host I/O is `vmm`'s.

#![forbid(unsafe_code)]

pub mod acpi;
pub mod ioapic;
pub mod lapic;
pub mod pci;
pub mod pm;
pub mod pvpanic;
pub mod rtc;
pub mod serial;
pub mod virtio;
