//! Segmentation outside of 64-bit mode (Intel SDM vol. 3A §3.2 to §3.5, §5.3; real mode:
//! §20.1): what the segment registers allow and add, as part of a block's mode and as checks
//! for one access.
//!
//! Called by `engine` when it looks for a block, and by `system` for its own accesses.
//! Translated code reads the [`Extent`]s itself. Nothing here loads a segment register.

use crate::exception::{Exception, vector};
use crate::mmu::Core;
use crate::state::{Segment, State, cr0, efer, rflags, segment as index};

/// Descriptor attribute bits (as in [`Segment::attributes`]).
pub(crate) mod attribute {
    /// Data: writable. Code: readable.
    pub(crate) const WRITABLE: u16 = 1 << 1;
    /// Data: expand down. Code: conforming.
    pub(crate) const EXPAND_DOWN: u16 = 1 << 2;
    /// Code.
    pub(crate) const CODE: u16 = 1 << 3;
    /// Code or data, not a system segment.
    pub(crate) const USER: u16 = 1 << 4;
    /// Present.
    pub(crate) const PRESENT: u16 = 1 << 7;
    /// 64-bit code.
    pub(crate) const LONG: u16 = 1 << 13;
    /// 32-bit code or stack; upper bound of an expand-down segment.
    pub(crate) const BIG: u16 = 1 << 14;
}

/// The offsets that may be read and written through a segment register. Translated code
/// compares with these.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Extent {
    /// First offset; beyond all offsets if there is none.
    pub(crate) first: u64,
    /// Behind the last offset for loads.
    pub(crate) end: u64,
    /// Behind the last offset for stores.
    pub(crate) store_end: u64,
}

impl Extent {
    /// Everything, without a check.
    const FLAT: Self = Self {
        first: 0,
        end: 1 << 32,
        store_end: 1 << 32,
    };
    const NONE: Self = Self {
        first: u64::MAX,
        end: 0,
        store_end: 0,
    };
}

/// What a block of code that is not 64-bit code was made for. Part of its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Legacy {
    /// Default operand and address size is 32 bits, else 16.
    pub(crate) big_code: bool,
    /// Stack operations use ESP, else SP.
    pub(crate) big_stack: bool,
    /// Segment registers whose [`Extent`] is not [`Extent::FLAT`]: one bit each, by number.
    pub(crate) checked: u8,
    /// Segment registers whose base may not be zero.
    pub(crate) based: u8,
    /// Linear address of offset 0 in the code segment.
    pub(crate) code_base: u32,
    /// Last offset in the code segment.
    pub(crate) code_limit: u32,
    /// Number of the block's whole mode, not 0: makes entries of the jump cache distinct.
    pub(crate) tag: u16,
}

impl Legacy {
    /// The linear address of an offset in the code segment.
    pub(crate) fn linear(&self, offset: u64) -> u64 {
        u64::from(self.code_base.wrapping_add(offset as u32))
    }

    /// What stands for the code offset in the jump cache.
    pub(crate) fn jump_key(&self, offset: u64) -> u64 {
        u64::from(self.tag) << 32 | offset & 0xffff_ffff
    }

    /// Bits of code per default operand, as the decoder wants them.
    pub(crate) fn bitness(&self) -> u32 {
        if self.big_code { 32 } else { 16 }
    }
}

impl State {
    /// Whether the processor runs 64-bit code (Intel SDM vol. 3A §2.2).
    pub(crate) fn is_long_code(&self) -> bool {
        self.efer & efer::LMA != 0 && self.segments[index::CS].attributes & attribute::LONG != 0
    }

    /// Whether IA-32e mode is active: 64-bit or compatibility mode.
    pub(crate) fn is_long_mode(&self) -> bool {
        self.efer & efer::LMA != 0
    }

    /// Whether selectors are paragraph numbers: real mode or virtual-8086 mode.
    pub(crate) fn is_real(&self) -> bool {
        self.cr0 & cr0::PE == 0 || self.is_virtual_8086()
    }

    /// Virtual-8086 mode.
    pub(crate) fn is_virtual_8086(&self) -> bool {
        self.system_flags & rflags::VM != 0
    }

    /// The linear base of a segment register outside of 64-bit mode.
    pub(crate) fn legacy_base(&self, number: usize) -> u32 {
        match number {
            index::FS => self.fs_base as u32,
            index::GS => self.gs_base as u32,
            _ => self.segments[number].base as u32,
        }
    }

    fn extent(&self, number: usize) -> Extent {
        let segment = &self.segments[number];
        if self.is_real() {
            let end = u64::from(segment.limit) + 1;
            return Extent {
                first: 0,
                end,
                store_end: end,
            };
        }
        protected_extent(segment)
    }

    /// The part of a block's mode that is not needed in 64-bit mode, less its tag; `None` in
    /// 64-bit mode. Sets what translated code compares with.
    pub(crate) fn legacy(&mut self) -> Option<Legacy> {
        if self.is_long_code() {
            return None;
        }
        // FS and GS have bases as a rule
        let mut based = 1 << index::FS | 1 << index::GS;
        let mut checked = 0;
        for number in 0..6 {
            let extent = self.extent(number);
            self.extents[number] = extent;
            if extent != Extent::FLAT {
                checked |= 1 << number;
            }
            if self.legacy_base(number) != 0 {
                based |= 1 << number;
            }
        }
        let code = &self.segments[index::CS];
        Some(Legacy {
            big_code: code.attributes & attribute::BIG != 0,
            big_stack: self.has_big_stack(),
            checked,
            based,
            code_base: code.base as u32,
            code_limit: code.limit,
            tag: 0,
        })
    }

    /// The linear address of the instruction at RIP.
    pub(crate) fn code_address(&self) -> u64 {
        if self.is_long_code() {
            return self.rip;
        }
        let base = self.segments[index::CS].base as u32;
        u64::from(base.wrapping_add(self.rip as u32))
    }

    /// Whether stack operations outside of 64-bit mode use ESP, not SP.
    pub(crate) fn has_big_stack(&self) -> bool {
        self.segments[index::SS].attributes & attribute::BIG != 0
    }
}

impl Segment {
    /// The bits of the stack pointer that a stack in this segment uses.
    pub(crate) fn stack_mask(&self) -> u64 {
        if self.attributes & attribute::BIG != 0 {
            u32::MAX.into()
        } else {
            0xffff
        }
    }

    /// The linear address of `length` bytes at `offset`, if protected mode allows them.
    pub(crate) fn linear(&self, offset: u64, length: u64, store: bool) -> Option<u64> {
        let extent = protected_extent(self);
        let end = if store { extent.store_end } else { extent.end };
        let inside = offset >= extent.first && offset + length <= end;
        inside.then(|| u64::from((self.base as u32).wrapping_add(offset as u32)))
    }
}

/// The extent of a segment register in protected mode.
fn protected_extent(segment: &Segment) -> Extent {
    use attribute as a;
    let on = |bit| segment.attributes & bit != 0;
    if !on(a::PRESENT) || !on(a::USER) {
        return Extent::NONE;
    }
    let behind = u64::from(segment.limit) + 1;
    if on(a::CODE) {
        return if on(a::WRITABLE) {
            Extent {
                first: 0,
                end: behind,
                store_end: 0,
            }
        } else {
            Extent::NONE
        };
    }
    let (first, end) = if on(a::EXPAND_DOWN) {
        (behind, if on(a::BIG) { 1 << 32 } else { 1 << 16 })
    } else {
        (0, behind)
    };
    let store_end = if on(a::WRITABLE) { end } else { 0 };
    Extent {
        first,
        end,
        store_end,
    }
}

impl Core {
    /// Checks an access of `length` bytes at `offset` of a segment register outside of 64-bit
    /// mode and returns its linear address.
    pub(crate) fn check_segment(
        &self,
        number: usize,
        offset: u32,
        length: u64,
        store: bool,
    ) -> Result<u64, Exception> {
        let extent = self.state.extent(number);
        let end = if store { extent.store_end } else { extent.end };
        let offset = u64::from(offset);
        if offset < extent.first || offset + length.max(1) > end {
            return Err(segment_fault(number));
        }
        Ok(self.linear_of(number, offset))
    }

    /// A linear address as the processor's mode cuts it.
    pub(crate) fn wrap(&self, linear: u64) -> u64 {
        if self.state.is_long_code() {
            linear
        } else {
            linear & u64::from(u32::MAX)
        }
    }

    /// Whether an access in a flat segment reaches beyond its 4 GiB.
    pub(crate) fn beyond_flat(&self, offset: u64, size: u64) -> bool {
        !self.state.is_long_code() && offset.saturating_add(size) > 1 << 32
    }

    /// How many elements of `size` bytes, the first at `offset`, lie within a segment, which
    /// allows the first.
    pub(crate) fn segment_room(&self, number: usize, offset: u64, size: u64, down: bool) -> u64 {
        let extent = self.state.extent(number);
        let bytes = if down {
            offset.saturating_sub(extent.first) + size
        } else {
            extent.end.max(extent.store_end).saturating_sub(offset)
        };
        (bytes / size).max(1)
    }

    /// The linear address of an offset in a segment, unchecked.
    pub(crate) fn linear_of(&self, number: usize, offset: u64) -> u64 {
        u64::from(self.state.legacy_base(number).wrapping_add(offset as u32))
    }
}

/// What an access beyond a segment's limit or rights raises.
pub(crate) fn segment_fault(number: usize) -> Exception {
    let vector = if number == index::SS {
        vector::SS
    } else {
        vector::GP
    };
    Exception::with_code(vector, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(limit: u32, attributes: u16) -> Segment {
        Segment {
            base: 0,
            limit,
            selector: 8,
            attributes,
        }
    }

    #[test]
    fn an_expand_down_segment_begins_above_its_limit() {
        let extent = protected_extent(&data(0xfff, 0x4097));
        assert_eq!((extent.first, extent.end), (0x1000, 1 << 32));
    }

    #[test]
    fn a_small_expand_down_segment_ends_at_64_kib() {
        assert_eq!(protected_extent(&data(0xfff, 0x0097)).end, 0x1_0000);
    }

    #[test]
    fn code_can_be_read_where_it_is_readable_and_never_written() {
        let readable = protected_extent(&data(u32::MAX, 0xc09b));
        assert_eq!(readable.end, 1 << 32);
        assert_eq!(readable.store_end, 0);
        assert_eq!(protected_extent(&data(u32::MAX, 0xc099)), Extent::NONE);
    }

    #[test]
    fn a_flat_data_segment_needs_no_check() {
        assert_eq!(protected_extent(&data(u32::MAX, 0xc093)), Extent::FLAT);
    }
}
