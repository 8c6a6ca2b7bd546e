//! The host bridge at 00:00.0: nothing but an identity. Linux looks for its class code
//! before it believes in port-based configuration access.

use super::{BAR_COUNT, BarWindows, ConfigSpace, Identity, PciFunction};

/// The host bridge. It has no BARs and no interrupts.
#[derive(Clone, Debug)]
pub struct HostBridge(ConfigSpace);

impl HostBridge {
    /// A host bridge (class 06, subclass 00).
    pub fn new() -> Self {
        Self(ConfigSpace::new(Identity {
            vendor: 0x8086,
            device: 0x0d57,
            revision: 0,
            class: 0x06_00_00,
            subsystem_vendor: 0,
            subsystem: 0,
        }))
    }
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl PciFunction for HostBridge {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.0.write(offset, data);
    }

    fn bar_windows(&self) -> BarWindows {
        [None; BAR_COUNT]
    }

    fn bar_sizes(&self) -> [u64; BAR_COUNT] {
        [0; BAR_COUNT]
    }

    fn bar_read(&mut self, _bar: usize, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&mut self, _bar: usize, _offset: u64, _data: &[u8]) {}
}
