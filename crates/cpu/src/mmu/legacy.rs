//! The page-table walks of 32-bit paging and PAE paging (Intel SDM vol. 3A §4.3, §4.4).

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::{Core, Kind, Mapping, PHYSICAL_BITS, PTE_A, PTE_ADDRESS, PTE_D, PTE_G, PTE_NX};
use super::{PTE_P, PTE_PS, PTE_U, PTE_W, Rights, pf};
use crate::exception::Exception;
use crate::state::{cr0, cr4, efer};

/// Bits of a PAE page-directory-pointer-table entry that must be zero.
const PDPTE_RESERVED: u64 = 0x1e6;

/// An entry of a paging structure, of either size.
#[derive(Clone, Copy)]
enum Entry<'a> {
    Narrow(&'a AtomicU32),
    Wide(&'a AtomicU64),
}

impl Entry<'_> {
    fn load(self) -> u64 {
        match self {
            Self::Narrow(entry) => entry.load(Ordering::Acquire).into(),
            Self::Wide(entry) => entry.load(Ordering::Acquire),
        }
    }

    /// Sets bits of an entry that holds `old`; false if it no longer does.
    fn set(self, old: u64, bits: u64) -> bool {
        let new = old | bits;
        new == old
            || match self {
                Self::Narrow(entry) => entry
                    .compare_exchange(old as u32, new as u32, Ordering::SeqCst, Ordering::Relaxed)
                    .is_ok(),
                Self::Wide(entry) => entry
                    .compare_exchange(old, new, Ordering::SeqCst, Ordering::Relaxed)
                    .is_ok(),
            }
    }
}

/// One level of a walk.
struct Level {
    table: u64,
    /// log2 of what an entry maps.
    shift: u32,
}

impl Core {
    /// The physical address of a PAE page-directory-pointer-table entry.
    fn pdpte_address(&self, number: u64) -> u64 {
        (self.state.cr3 & 0xffff_ffe0) + number * 8
    }

    /// Whether the four page-directory-pointer-table entries of PAE paging are well-formed,
    /// which loading CR3 checks.
    pub(crate) fn pdptes_are_valid(&self) -> bool {
        (0..4).all(|number| {
            self.table_entry(self.pdpte_address(number))
                .is_none_or(|entry| {
                    let value = entry.load(Ordering::Acquire);
                    let beyond = PTE_ADDRESS & !((1 << PHYSICAL_BITS) - 1);
                    value & PTE_P == 0 || value & (PDPTE_RESERVED | beyond | PTE_NX) == 0
                })
        })
    }

    fn narrow_entry(&self, address: u64) -> Option<&AtomicU32> {
        let pointer = self.memory.host_ptr(address, 4)?.cast::<u32>();
        // SAFETY: four bytes of guest RAM, aligned since table entries are, mapped for as
        // long as `self.memory` lives; shared with the guest, hence atomic.
        Some(unsafe { AtomicU32::from_ptr(pointer) })
    }

    /// The walk with paging on, outside of IA-32e mode.
    pub(super) fn walk_legacy(
        &self,
        linear: u64,
        kind: Kind,
        asking: Rights,
    ) -> Result<Mapping, Exception> {
        let user = asking.is_user();
        let pae = self.state.cr4 & cr4::PAE != 0;
        let nxe = pae && self.state.efer & efer::NXE != 0;
        let mut code = if user { pf::U } else { 0 };
        if kind == Kind::Write {
            code |= pf::W;
        }
        if kind == Kind::Fetch && (nxe || self.state.cr4 & cr4::SMEP != 0) {
            code |= pf::I;
        }
        let fault = |extra| Exception::page_fault(linear, code | extra);
        let mut level = if pae {
            let entry = self
                .table_entry(self.pdpte_address(linear >> 30 & 3))
                .ok_or_else(|| fault(0))?;
            let value = entry.load(Ordering::Acquire);
            if value & PTE_P == 0 {
                return Err(fault(0));
            }
            Level {
                table: value & PTE_ADDRESS,
                shift: 21,
            }
        } else {
            Level {
                table: self.state.cr3 & 0xffff_f000,
                shift: 22,
            }
        };
        let mut rights = PTE_W | PTE_U;
        let mut nx = false;
        loop {
            let entry = self.entry(&level, linear, pae).ok_or_else(|| fault(0))?;
            let value = entry.load();
            if value & PTE_P == 0 {
                return Err(fault(0));
            }
            let large =
                level.shift > 12 && value & PTE_PS != 0 && (pae || self.state.cr4 & cr4::PSE != 0);
            if value & reserved(pae, nxe, large) != 0 {
                return Err(fault(pf::P | pf::RSVD));
            }
            let all = rights & value;
            let no_execute = nx || pae && value & PTE_NX != 0;
            if !large && level.shift > 12 {
                if entry.set(value, PTE_A) {
                    rights = all;
                    nx = no_execute;
                    let mask = if pae { PTE_ADDRESS } else { 0xffff_f000 };
                    level = Level {
                        table: value & mask,
                        shift: 12,
                    };
                }
                continue;
            }
            let may_write = all & PTE_W != 0 || (!user && self.state.cr0 & cr0::WP == 0);
            let denied = (user && all & PTE_U == 0)
                || (kind == Kind::Write && !may_write)
                || (kind == Kind::Fetch && no_execute)
                || self.prevents_supervisor(all & PTE_U != 0, kind, asking);
            if denied {
                return Err(fault(pf::P));
            }
            if !entry.set(value, kind.marks()) {
                continue;
            }
            let offset = (1_u64 << level.shift) - 1;
            let frame = match (pae, large) {
                (true, _) => value & PTE_ADDRESS & !offset,
                // PSE-36: bits 20:13 are bits 39:32
                (false, true) => value & 0xffc0_0000 | (value >> 13 & 0xff) << 32,
                (false, false) => value & 0xffff_f000,
            };
            return Ok(Mapping {
                physical: frame | linear & offset,
                page_shift: level.shift,
                global: value & PTE_G != 0 && self.state.cr4 & cr4::PGE != 0,
                accessed: (value | kind.marks()) & PTE_A != 0,
                writable: may_write && (value | kind.marks()) & PTE_D != 0,
            });
        }
    }

    fn entry(&self, level: &Level, linear: u64, pae: bool) -> Option<Entry<'_>> {
        if pae {
            let address = level.table + (linear >> level.shift & 0x1ff) * 8;
            return self.table_entry(address).map(Entry::Wide);
        }
        let address = level.table + (linear >> level.shift & 0x3ff) * 4;
        self.narrow_entry(address).map(Entry::Narrow)
    }
}

/// The bits of an entry that must be zero.
fn reserved(pae: bool, nxe: bool, large: bool) -> u64 {
    if !pae {
        return if large { 1 << 21 } else { 0 };
    }
    let beyond = 0x7fff_ffff_ffff_f000 & !((1 << PHYSICAL_BITS) - 1);
    let page = if large { 0x1f_e000 } else { 0 };
    beyond | page | if nxe { 0 } else { PTE_NX }
}
