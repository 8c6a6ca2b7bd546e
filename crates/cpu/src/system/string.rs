//! String instructions, repeated or not (Intel SDM vol. 2B, REP): MOVS and STOS as host
//! copies, page chunk by page chunk.
//!
//! RSI, RDI and RCX are written after every chunk, so that a fault finds them exact. A
//! repeated instruction gives back control after [`BUDGET`] bytes, for interrupts.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::segment::register_index;
use super::{Flow, io};
use crate::bus::Bus;
use crate::exception::Exception;
use crate::mmu::{Core, Kind, Privilege, Target};
use crate::state::{State, gpr, rflags, segment as index};

use strata_memory::PAGE_SIZE;

/// Most bytes that one call moves.
const BUDGET: u64 = 64 << 10;
/// Most port accesses that one call makes.
const PORT_BUDGET: u64 = 1024;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Operation {
    Move,
    Store,
    Load,
    Compare,
    Scan,
    Input,
    Output,
}

/// A string instruction, decoded.
#[derive(Clone, Copy)]
struct Job {
    operation: Operation,
    /// Bytes an element: 1, 2, 4 or 8.
    size: u64,
    /// The address size: what RSI, RDI and RCX are cut to.
    mask: u64,
    /// The source segment.
    source: Register,
    /// Outside of 64-bit mode: segments have limits, and bases other than FS's and GS's.
    legacy: bool,
    /// DF is set.
    down: bool,
    repeat: bool,
    /// For CMPS and SCAS: goes on while ZF is this.
    while_equal: bool,
}

fn kind_of(mnemonic: Mnemonic) -> Option<(Operation, u64)> {
    use Mnemonic as M;
    use Operation as O;
    Some(match mnemonic {
        M::Movsb => (O::Move, 1),
        M::Movsw => (O::Move, 2),
        M::Movsd => (O::Move, 4),
        M::Movsq => (O::Move, 8),
        M::Stosb => (O::Store, 1),
        M::Stosw => (O::Store, 2),
        M::Stosd => (O::Store, 4),
        M::Stosq => (O::Store, 8),
        M::Lodsb => (O::Load, 1),
        M::Lodsw => (O::Load, 2),
        M::Lodsd => (O::Load, 4),
        M::Lodsq => (O::Load, 8),
        M::Cmpsb => (O::Compare, 1),
        M::Cmpsw => (O::Compare, 2),
        M::Cmpsd => (O::Compare, 4),
        M::Cmpsq => (O::Compare, 8),
        M::Scasb => (O::Scan, 1),
        M::Scasw => (O::Scan, 2),
        M::Scasd => (O::Scan, 4),
        M::Scasq => (O::Scan, 8),
        M::Insb => (O::Input, 1),
        M::Insw => (O::Input, 2),
        M::Insd => (O::Input, 4),
        M::Outsb => (O::Output, 1),
        M::Outsw => (O::Output, 2),
        M::Outsd => (O::Output, 4),
        _ => return None,
    })
}

/// What the address size leaves of RSI, RDI and RCX.
fn address_mask(instr: &Instruction) -> u64 {
    let uses =
        |kinds: [OpKind; 2]| (0..instr.op_count()).any(|i| kinds.contains(&instr.op_kind(i)));
    if uses([OpKind::MemorySegESI, OpKind::MemoryESEDI]) {
        0xffff_ffff
    } else if uses([OpKind::MemorySegSI, OpKind::MemoryESDI]) {
        0xffff
    } else {
        u64::MAX
    }
}

fn decode(core: &Core, instr: &Instruction) -> Result<Job, Exception> {
    let (operation, size) = kind_of(instr.mnemonic()).ok_or(Exception::undefined())?;
    Ok(Job {
        operation,
        size,
        mask: address_mask(instr),
        source: instr.memory_segment(),
        legacy: !core.state.is_long_code(),
        down: core.state.system_flags & rflags::DF != 0,
        repeat: instr.has_rep_prefix() || instr.has_repne_prefix(),
        while_equal: !instr.has_repne_prefix(),
    })
}

/// What a chunk did.
struct Chunk {
    elements: u64,
    /// CMPS and SCAS: the last two values compared.
    compared: Option<(u64, u64)>,
}

impl Chunk {
    fn of(elements: u64) -> Self {
        Self {
            elements,
            compared: None,
        }
    }
}

impl Job {
    fn source(&self, core: &Core) -> u64 {
        let offset = core.state.gpr[gpr::RSI] & self.mask;
        if self.legacy {
            return core.linear_of(register_index(self.source), offset);
        }
        core.segment_base(self.source).wrapping_add(offset)
    }

    fn destination(&self, core: &Core) -> u64 {
        let offset = core.state.gpr[gpr::RDI] & self.mask;
        if self.legacy {
            return core.linear_of(index::ES, offset);
        }
        offset
    }

    /// Sets as much of a register as the address size covers.
    fn set(&self, core: &mut Core, register: usize, value: u64) {
        let old = core.state.gpr[register];
        core.state.gpr[register] = if self.mask == 0xffff {
            old & !0xffff | value & 0xffff
        } else {
            value & self.mask
        };
    }

    /// Outside of 64-bit mode: checks the next element of each operand, in the order in which
    /// they are accessed: of the second, the first one's own faults go before.
    fn check_segments(&self, core: &mut Core) -> Result<(), Exception> {
        use Operation as O;
        if !self.legacy {
            return Ok(());
        }
        let offset = |register: usize| (core.state.gpr[register] & self.mask) as u32;
        let source = (register_index(self.source), offset(gpr::RSI), false);
        let target = (index::ES, offset(gpr::RDI), false);
        let store = (index::ES, offset(gpr::RDI), true);
        let (first, second) = match self.operation {
            O::Move => (source, Some(store)),
            O::Compare => (target, Some(source)),
            O::Load | O::Output => (source, None),
            O::Scan => (target, None),
            O::Store | O::Input => (store, None),
        };
        let check =
            |core: &Core, (number, at, store)| core.check_segment(number, at, self.size, store);
        let linear = check(core, first)?;
        let Some(Err(fault)) = second.map(|operand| check(core, operand)) else {
            return Ok(());
        };
        core.check_alignment(linear, self.size)?;
        core.target(linear, Kind::Read, Privilege::Current)?;
        if linear % PAGE_SIZE + self.size > PAGE_SIZE {
            let next = core.wrap((linear | (PAGE_SIZE - 1)).wrapping_add(1));
            core.target(next, Kind::Read, Privilege::Current)?;
        }
        Err(fault)
    }

    fn advance(&self, core: &mut Core, register: usize, elements: u64) {
        let bytes = elements.wrapping_mul(self.size);
        let old = core.state.gpr[register];
        let new = if self.down {
            old.wrapping_sub(bytes)
        } else {
            old.wrapping_add(bytes)
        };
        self.set(core, register, new);
    }

    /// How many elements from `linear` on lie within its page. 0: the first does not.
    fn span(&self, linear: u64) -> u64 {
        let offset = linear % PAGE_SIZE;
        if !self.down {
            (PAGE_SIZE - offset) / self.size
        } else if offset + self.size <= PAGE_SIZE {
            offset / self.size + 1
        } else {
            0
        }
    }

    /// How many elements a register can go before it wraps at the address size.
    fn room(&self, core: &Core, register: usize) -> u64 {
        if self.mask == u64::MAX {
            return u64::MAX;
        }
        let value = core.state.gpr[register] & self.mask;
        let room = if self.down {
            value / self.size + 1
        } else {
            ((self.mask + 1 - value) / self.size).max(1)
        };
        if !self.legacy {
            return room;
        }
        let segment = if register == gpr::RSI {
            register_index(self.source)
        } else {
            index::ES
        };
        room.min(core.segment_room(segment, value, self.size, self.down))
    }

    /// The lowest address of a chunk that begins at `linear`.
    fn lowest(&self, linear: u64, elements: u64) -> u64 {
        if self.down {
            linear.wrapping_sub((elements - 1) * self.size)
        } else {
            linear
        }
    }

    fn read(&self, core: &mut Core, bus: &dyn Bus, linear: u64) -> Result<u64, Exception> {
        core.check_alignment(linear, self.size)?;
        let mut data = [0; 8];
        core.read_linear(
            bus,
            linear,
            &mut data[..self.size as usize],
            Privilege::Current,
        )?;
        Ok(u64::from_le_bytes(data))
    }

    fn write(
        &self,
        core: &mut Core,
        bus: &dyn Bus,
        linear: u64,
        value: u64,
    ) -> Result<(), Exception> {
        core.check_alignment(linear, self.size)?;
        core.write_linear(
            bus,
            linear,
            &value.to_le_bytes()[..self.size as usize],
            Privilege::Current,
        )
    }

    /// Finds host memory to store `elements` at `linear`, if it is RAM, and has code there
    /// thrown away. Returns the lowest byte's address. The caller ends the store.
    fn store_target(
        &self,
        core: &mut Core,
        linear: u64,
        elements: u64,
    ) -> Result<Option<*mut u8>, Exception> {
        core.check_alignment(linear, self.size)?;
        core.watch_data(self.lowest(linear, elements), elements * self.size, true);
        let lowest = self.lowest(linear, elements);
        let target = core.target(lowest, Kind::Write, Privilege::Current);
        match target.map_err(|e| Self::at_element(e, linear))? {
            Target::Ram(host) => {
                core.store_behind_tag(lowest, elements * self.size, Privilege::Current)?;
                Ok(Some(host))
            }
            Target::Device(_) => Ok(None),
        }
    }

    /// A chunk's page fault as one of its first element, which is the one that faults.
    fn at_element(exception: Exception, linear: u64) -> Exception {
        Exception {
            address: exception.address.map(|_| linear),
            ..exception
        }
    }

    fn load_target(
        &self,
        core: &mut Core,
        linear: u64,
        elements: u64,
    ) -> Result<Option<*const u8>, Exception> {
        core.check_alignment(linear, self.size)?;
        core.watch_data(self.lowest(linear, elements), elements * self.size, false);
        let lowest = self.lowest(linear, elements);
        let target = core.target(lowest, Kind::Read, Privilege::Current);
        match target.map_err(|e| Self::at_element(e, linear))? {
            Target::Ram(host) => Ok(Some(host)),
            Target::Device(_) => Ok(None),
        }
    }

    fn chunk(&self, core: &mut Core, bus: &dyn Bus, most: u64) -> Result<Chunk, Exception> {
        if matches!(self.operation, Operation::Input | Operation::Output) {
            // before memory is looked at, and even its segment
            io::require_ports(core, bus, Self::port(core), self.size as u8)?;
        }
        self.check_segments(core)?;
        match self.operation {
            Operation::Move => self.movs(core, bus, most).map(Chunk::of),
            Operation::Store => self.stos(core, bus, most).map(Chunk::of),
            Operation::Load => self.lods(core, bus).map(Chunk::of),
            Operation::Compare => self.cmps(core, bus, most),
            Operation::Scan => self.scas(core, bus, most),
            Operation::Input => self.ins(core, bus).map(Chunk::of),
            Operation::Output => self.outs(core, bus).map(Chunk::of),
        }
    }

    fn movs(&self, core: &mut Core, bus: &dyn Bus, most: u64) -> Result<u64, Exception> {
        let (from, to) = (self.source(core), self.destination(core));
        let room = self.room(core, gpr::RSI).min(self.room(core, gpr::RDI));
        let elements = most.min(room).min(self.span(from)).min(self.span(to));
        let mut done = elements;
        let in_place = if elements == 0 {
            None
        } else {
            let source = self.load_target(core, from, elements)?;
            let target = self.store_target(core, to, elements)?;
            source.zip(target)
        };
        if let Some((source, target)) = in_place {
            // SAFETY: both point at `elements * size` bytes of guest RAM within one page
            // (span, target), which stays mapped while `core.memory` lives.
            unsafe {
                copy_elements(
                    source,
                    target,
                    elements as usize,
                    self.size as usize,
                    self.down,
                );
            };
            core.seat.end_store();
        } else {
            let value = self.read(core, bus, from)?;
            self.write(core, bus, to, value)?;
            done = 1;
        }
        self.advance(core, gpr::RSI, done);
        self.advance(core, gpr::RDI, done);
        Ok(done)
    }

    fn stos(&self, core: &mut Core, bus: &dyn Bus, most: u64) -> Result<u64, Exception> {
        let to = self.destination(core);
        let value = core.state.gpr[gpr::RAX];
        let elements = most.min(self.room(core, gpr::RDI)).min(self.span(to));
        let mut done = elements;
        let target = if elements == 0 {
            None
        } else {
            self.store_target(core, to, elements)?
        };
        if let Some(target) = target {
            // SAFETY: as in `movs`.
            unsafe { fill_elements(target, value, elements as usize, self.size as usize) };
            core.seat.end_store();
        } else {
            self.write(core, bus, to, value)?;
            done = 1;
        }
        self.advance(core, gpr::RDI, done);
        Ok(done)
    }

    fn lods(&self, core: &mut Core, bus: &dyn Bus) -> Result<u64, Exception> {
        let from = self.source(core);
        let value = self.read(core, bus, from)?;
        let rax = &mut core.state.gpr[gpr::RAX];
        *rax = match self.size {
            1 => *rax & !0xff | value,
            2 => *rax & !0xffff | value,
            _ => value,
        };
        self.advance(core, gpr::RSI, 1);
        Ok(1)
    }

    /// Whether a repeated CMPS or SCAS goes on after comparing these.
    fn goes_on(&self, a: u64, b: u64) -> bool {
        (a == b) == self.while_equal
    }

    fn cmps(&self, core: &mut Core, bus: &dyn Bus, most: u64) -> Result<Chunk, Exception> {
        let (from, to) = (self.source(core), self.destination(core));
        let room = self.room(core, gpr::RSI).min(self.room(core, gpr::RDI));
        let elements = most.min(room).min(self.span(from)).min(self.span(to));
        let in_place = if elements == 0 {
            None
        } else {
            // the second operand goes first, as on AMD's processors; no manual says
            let b = self.load_target(core, to, elements)?;
            let a = self.load_target(core, from, elements)?;
            a.zip(b)
        };
        let chunk = if let Some((a, b)) = in_place {
            let size = self.size as usize;
            self.compare_run(elements, |i| {
                let at = self.position(i, elements) * size;
                // SAFETY: element `i` of `elements` within one page of guest RAM each.
                unsafe { (load_element(a.add(at), size), load_element(b.add(at), size)) }
            })
        } else {
            let b = self.read(core, bus, to)?;
            let a = self.read(core, bus, from)?;
            Chunk {
                elements: 1,
                compared: Some((a, b)),
            }
        };
        self.advance(core, gpr::RSI, chunk.elements);
        self.advance(core, gpr::RDI, chunk.elements);
        Ok(chunk)
    }

    fn scas(&self, core: &mut Core, bus: &dyn Bus, most: u64) -> Result<Chunk, Exception> {
        let to = self.destination(core);
        let width = u64::MAX >> (64 - self.size * 8);
        let wanted = core.state.gpr[gpr::RAX] & width;
        let elements = most.min(self.room(core, gpr::RDI)).min(self.span(to));
        let in_place = if elements == 0 {
            None
        } else {
            self.load_target(core, to, elements)?
        };
        let chunk = if let Some(b) = in_place {
            let size = self.size as usize;
            self.compare_run(elements, |i| {
                let at = self.position(i, elements) * size;
                // SAFETY: element `i` of `elements` within one page of guest RAM.
                (wanted, unsafe { load_element(b.add(at), size) })
            })
        } else {
            let b = self.read(core, bus, to)?;
            Chunk {
                elements: 1,
                compared: Some((wanted, b)),
            }
        };
        self.advance(core, gpr::RDI, chunk.elements);
        Ok(chunk)
    }

    /// Where the `i`th element of a chunk lies, counted from its lowest.
    fn position(&self, i: u64, elements: u64) -> usize {
        (if self.down { elements - 1 - i } else { i }) as usize
    }

    fn compare_run(&self, elements: u64, values: impl Fn(u64) -> (u64, u64)) -> Chunk {
        let mut i = 0;
        loop {
            let (a, b) = values(i);
            i += 1;
            if i == elements || !self.goes_on(a, b) {
                return Chunk {
                    elements: i,
                    compared: Some((a, b)),
                };
            }
        }
    }

    fn ins(&self, core: &mut Core, bus: &dyn Bus) -> Result<u64, Exception> {
        let port = Self::port(core);
        let to = self.destination(core);
        core.check_alignment(to, self.size)?;
        core.probe_write(to, self.size, Privilege::Current)?;
        core.watch_port(port, self.size as u8);
        let value = bus.port_read(port, self.size as u8);
        core.check_interrupts = true;
        self.write(core, bus, to, u64::from(value))?;
        self.advance(core, gpr::RDI, 1);
        Ok(1)
    }

    fn port(core: &Core) -> u16 {
        core.state.gpr[gpr::RDX] as u16
    }

    fn outs(&self, core: &mut Core, bus: &dyn Bus) -> Result<u64, Exception> {
        let port = Self::port(core);
        let from = self.source(core);
        let value = self.read(core, bus, from)?;
        core.watch_port(port, self.size as u8);
        bus.port_write(port, self.size as u8, value as u32);
        core.check_interrupts = true;
        self.advance(core, gpr::RSI, 1);
        Ok(1)
    }

    /// Most elements in one call. One when single-stepping: #DB comes after each.
    fn budget(&self, core: &Core) -> u64 {
        if core.state.system_flags & rflags::TF != 0 || core.breakpoints_enabled() {
            return 1;
        }
        match self.operation {
            Operation::Input | Operation::Output => PORT_BUDGET,
            _ => BUDGET / self.size,
        }
    }
}

/// The status flags after `a - b` in `size` bytes, in RFLAGS.
fn subtraction_flags(a: u64, b: u64, size: u64) -> u64 {
    let bits = size * 8;
    let result = a.wrapping_sub(b) & (u64::MAX >> (64 - bits));
    let bit = |on: bool, flag: u64| if on { flag } else { 0 };
    bit(a < b, rflags::CF)
        | bit(result == 0, rflags::ZF)
        | bit(result >> (bits - 1) != 0, rflags::SF)
        | bit(((a ^ b) & (a ^ result)) >> (bits - 1) & 1 != 0, rflags::OF)
        | bit((a ^ b ^ result) & 0x10 != 0, rflags::AF)
        | bit((result as u8).count_ones().is_multiple_of(2), rflags::PF)
}

pub(super) fn execute(
    core: &mut Core,
    bus: &dyn Bus,
    instr: &Instruction,
) -> Result<Flow, Exception> {
    let job = decode(core, instr)?;
    if !job.repeat {
        let chunk = job.chunk(core, bus, 1)?;
        set_compared(core, &job, chunk.compared);
        return Ok(Flow::Next);
    }
    let mut left = core.state.gpr[gpr::RCX] & job.mask;
    let mut budget = job.budget(core);
    let mut compared = None;
    while left > 0 {
        if budget == 0 {
            set_compared(core, &job, compared);
            return Ok(Flow::Jump);
        }
        let chunk = job.chunk(core, bus, left.min(budget))?;
        left -= chunk.elements;
        budget -= chunk.elements;
        job.set(core, gpr::RCX, left);
        compared = chunk.compared;
        if compared.is_some_and(|(a, b)| !job.goes_on(a, b)) {
            break;
        }
    }
    set_compared(core, &job, compared);
    Ok(Flow::Next)
}

fn set_compared(core: &mut Core, job: &Job, compared: Option<(u64, u64)>) {
    if let Some((a, b)) = compared {
        core.state.status = State::status_from(subtraction_flags(a, b, job.size));
    }
}

/// Loads one element.
///
/// # Safety
/// `from` must point at `size` (1, 2, 4 or 8) readable bytes.
unsafe fn load_element(from: *const u8, size: usize) -> u64 {
    // SAFETY: the caller's promise; the guest may change the bytes at any time, which an
    // unaligned read of plain integers tolerates.
    unsafe {
        match size {
            1 => u64::from(from.read_volatile()),
            2 => u64::from(from.cast::<u16>().read_unaligned()),
            4 => u64::from(from.cast::<u32>().read_unaligned()),
            _ => from.cast::<u64>().read_unaligned(),
        }
    }
}

/// Stores one element.
///
/// # Safety
/// `to` must point at `size` (1, 2, 4 or 8) writable bytes.
unsafe fn store_element(to: *mut u8, value: u64, size: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        match size {
            1 => to.write_volatile(value as u8),
            2 => to.cast::<u16>().write_unaligned(value as u16),
            4 => to.cast::<u32>().write_unaligned(value as u32),
            _ => to.cast::<u64>().write_unaligned(value),
        }
    }
}

/// Copies elements one after the other, upwards from the lowest or down from the highest,
/// as if each were loaded and stored by itself.
///
/// # Safety
/// `from` and `to` must each point at `elements * size` bytes of guest RAM, readable and
/// writable; they may overlap.
unsafe fn copy_elements(from: *const u8, to: *mut u8, elements: usize, size: usize, down: bool) {
    let length = elements * size;
    let (source, target) = (from as usize, to as usize);
    let apart = source + length <= target || target + length <= source;
    let harmless = if down {
        target >= source
    } else {
        target <= source
    };
    // SAFETY: all accesses are within the ranges that the caller promised; `copy` allows
    // overlap, and each piece of the doubling loop ends where its target begins.
    unsafe {
        if elements == 1 {
            store_element(to, load_element(from, size), size);
        } else if apart {
            std::ptr::copy_nonoverlapping(from, to, length);
        } else if harmless {
            std::ptr::copy(from, to, length);
        } else if !down && target - source >= size {
            // the bytes before the target repeat; what is there doubles with every piece
            let distance = target - source;
            let mut done = 0;
            while done < length {
                let piece = (done + distance).min(length - done);
                std::ptr::copy_nonoverlapping(from, to.add(done), piece);
                done += piece;
            }
        } else {
            for i in 0..elements {
                let at = if down { elements - 1 - i } else { i } * size;
                store_element(to.add(at), load_element(from.add(at), size), size);
            }
        }
    }
}

/// Stores the low `size` bytes of `value` `elements` times.
///
/// # Safety
/// `to` must point at `elements * size` writable bytes of guest RAM.
unsafe fn fill_elements(to: *mut u8, value: u64, elements: usize, size: usize) {
    let byte = value as u8;
    let bits = size as u32 * 8;
    let uniform = value << (64 - bits) == (u64::from(byte) * 0x0101_0101_0101_0101) << (64 - bits);
    // SAFETY: all accesses are within the range that the caller promised.
    unsafe {
        if elements == 1 {
            store_element(to, value, size);
        } else if uniform {
            std::ptr::write_bytes(to, byte, elements * size);
        } else {
            for i in 0..elements {
                store_element(to.add(i * size), value, size);
            }
        }
    }
}
