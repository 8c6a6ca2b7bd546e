//! Stores by Rust code that must not go through the page tables again, or must be one step
//! to other vCPUs. Called by `engine` and system instructions.

use std::sync::atomic::{AtomicU8, Ordering};

use super::{Core, Kind, Privilege, Target, copy_to_guest};
use crate::bus::Bus;
use crate::exception::Exception;

impl Core {
    /// Stores to where [`Core::target`] led, within a page, whatever the page tables say now.
    pub(crate) fn store_at(&mut self, bus: &dyn Bus, target: &Target, data: &[u8]) {
        match *target {
            Target::Ram(host) => {
                if let Some(physical) = self.memory.address_of(host) {
                    self.note_store(physical, data.len() as u64);
                }
                copy_to_guest(host, data);
                self.seat.end_store();
            }
            Target::Device(physical) => bus.mmio_write(physical, data),
        }
    }

    /// Sets bits of a byte in memory for the supervisor, in one step as other vCPUs see it:
    /// descriptors are updated with LOCK (Intel SDM vol. 3A §8.1.2.1).
    pub(crate) fn set_bits(
        &mut self,
        bus: &dyn Bus,
        linear: u64,
        bits: u8,
    ) -> Result<(), Exception> {
        match self.target(linear, Kind::Write, Privilege::Supervisor)? {
            Target::Ram(host) => {
                self.store_behind_tag(linear, 1, Privilege::Supervisor)?;
                // SAFETY: a byte of guest RAM, mapped while `self.memory` lives; others use it
                // at the same time, hence atomic.
                unsafe { AtomicU8::from_ptr(host) }.fetch_or(bits, Ordering::SeqCst);
                self.seat.end_store();
            }
            Target::Device(physical) => {
                let mut byte = [0];
                bus.mmio_read(physical, &mut byte);
                bus.mmio_write(physical, &[byte[0] | bits]);
            }
        }
        Ok(())
    }
}
