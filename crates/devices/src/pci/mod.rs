//! PCI: the configuration space of functions, the root bus that finds them, and MSI-X.
//!
//! ```text
//!   ports 0xcf8/0xcfc ─┐                ┌─► HostBridge   00:00.0
//!   ECAM MMIO ─────────┼─► PciBus ──────┼─► PciFunction  00:01.0 ─► Msi (address, data)
//!   BAR MMIO ──────────┘   (decoding)   └─► ...
//! ```
//!
//! One root bus, no bridges below it, functions 0 only. Interrupts are MSI-X alone (the
//! interrupt pin register reads 0). Called by the machine's bus dispatch; holds no locks,
//! threads or file descriptors, and never touches guest memory.

mod bus;
mod config;
mod host_bridge;
mod msix;

pub use bus::{BarHit, BusFull, PciBus, PciLayout};
pub use config::{BarWindow, Command, ConfigSpace, Identity, register};
pub use host_bridge::HostBridge;
pub use msix::{Msi, Msix};

/// Number of base address registers in a type 0 header.
pub const BAR_COUNT: usize = 6;

/// What each BAR of a function decodes at the moment; `None` for absent or disabled ones.
pub type BarWindows = [Option<BarWindow>; BAR_COUNT];

/// One function on the bus, as the bus sees it.
pub trait PciFunction {
    /// Reads configuration bytes at `offset` (0 to 0xfff); absent ones read 0.
    fn config_read(&mut self, offset: u16, data: &mut [u8]);
    /// Writes configuration bytes at `offset` (0 to 0xfff); read-only bits keep their value.
    fn config_write(&mut self, offset: u16, data: &[u8]);
    /// The addresses the function decodes now.
    fn bar_windows(&self) -> BarWindows;
    /// The size in bytes of each BAR that is to be given an address, 0 for none.
    fn bar_sizes(&self) -> [u64; BAR_COUNT];
    /// A load from BAR `bar`, `offset` bytes into it.
    fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]);
    /// A store to BAR `bar`, `offset` bytes into it.
    fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]);
}
