//! Hardware breakpoints, DR0 to DR3 and DR7 (Intel SDM vol. 3B §18.2, §18.3.1).
//!
//! While one is enabled the engine runs instructions one by one, and every access takes the
//! slow path, so that nothing else pays for them. Instruction breakpoints are faults and are
//! looked for before an instruction; the others are traps: what an instruction hits is
//! gathered in [`Core::debug_hits`] and reported when it is done.

use crate::mmu::Core;
use crate::state::{cr4, rflags};

/// DR7: the enable bits of all four, local and global.
const ENABLES: u64 = 0xff;

/// What a breakpoint is for: R/W in DR7.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Condition {
    Execute,
    Write,
    Port,
    Access,
}

impl Core {
    /// Whether any breakpoint is enabled.
    pub(crate) fn breakpoints_enabled(&self) -> bool {
        self.state.dr[5] & ENABLES != 0
    }

    /// The enabled breakpoints whose condition `wanted` says yes to and whose bytes overlap
    /// `length` bytes at `address`: their bits in DR6.
    fn hits(&self, address: u64, length: u64, wanted: impl Fn(Condition) -> bool) -> u64 {
        let dr7 = self.state.dr[5];
        let hit = |number: &usize| {
            let enabled = 3 << (2 * number);
            if dr7 & enabled == 0 {
                return false;
            }
            let control = dr7 >> (16 + 4 * number);
            let condition = match control & 3 {
                0 => Condition::Execute,
                1 => Condition::Write,
                2 => Condition::Port,
                _ => Condition::Access,
            };
            let size: u64 = match control >> 2 & 3 {
                0 => 1,
                1 => 2,
                2 => 8,
                _ => 4,
            };
            let start = self.state.dr[*number] & !(size - 1);
            // either begins within the other
            let overlap =
                address.wrapping_sub(start) < size || start.wrapping_sub(address) < length;
            wanted(condition) && overlap
        };
        (0..4)
            .filter(hit)
            .fold(0, |bits, number| bits | 1 << number)
    }

    /// The bits in DR6 of instruction breakpoints at RIP. RFLAGS.RF holds them off once.
    pub(crate) fn instruction_hits(&mut self) -> u64 {
        if self.state.system_flags & rflags::RF != 0 {
            self.state.system_flags &= !rflags::RF;
            return 0;
        }
        let code = self.state.code_address();
        self.hits(code, 1, |condition| condition == Condition::Execute)
    }

    /// Notes an access to data.
    pub(crate) fn watch_data(&mut self, linear: u64, length: u64, store: bool) {
        if self.breakpoints_enabled() {
            self.debug_hits |= self.hits(linear, length, |condition| match condition {
                Condition::Access => true,
                Condition::Write => store,
                _ => false,
            });
        }
    }

    /// Notes an access to ports, which CR4.DE makes breakpoints possible for.
    pub(crate) fn watch_port(&mut self, port: u16, size: u8) {
        if self.breakpoints_enabled() && self.state.cr4 & cr4::DE != 0 {
            self.debug_hits |= self.hits(port.into(), size.into(), |c| c == Condition::Port);
        }
    }
}
