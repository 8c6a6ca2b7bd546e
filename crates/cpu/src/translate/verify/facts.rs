//! What is known of the registers at one instruction of a block: which of them are guest values,
//! what their distance to what was checked is, and which are host addresses.

use std::mem::{offset_of, size_of};

use iced_x86::{Code, Instruction, Mnemonic, OpAccess, OpKind, Register, UsedRegister};

use super::Code64;
use crate::mmu::{
    AddressSpace, JUMP_ENTRIES, JUMP_TABLES, JumpEntry, Rights, TLB_ENTRIES, TLBS, TlbEntry,
    WINDOW_KINDS, jump_entries, tlb_number,
};
use crate::state::{WIDE_WINDOWS, WINDOWS, WideWindow, Window, state_offset};
use crate::translate::lower::meta;
use crate::translate::thunks::DELTA;

/// Memory that may be accessed, `size` bytes from `low` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Checked {
    /// What `low` is relative to.
    pub(super) sym: u64,
    pub(super) low: i64,
    pub(super) size: i64,
    pub(super) store: bool,
}

impl Checked {
    /// Whether an access of `size` bytes, `from` bytes after the first, is allowed.
    pub(super) fn covers(self, from: i64, size: i64, store: bool) -> Result<(), &'static str> {
        if from < 0 || from.checked_add(size).is_none_or(|end| end > self.size) {
            Err("accesses more than was checked")
        } else if store && !self.store {
            Err("stores where a load was checked")
        } else {
            Ok(())
        }
    }
}

/// What a register holds. A symbol stands for a value that nothing is known of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Value {
    /// A guest value: symbol plus offset. Never an address by itself.
    Plain { sym: u64, off: i64 },
    /// The same less the start of the window at this GS offset.
    Distance { sym: u64, off: i64, window: i64 },
    /// The same less the tag at `at` from T1.
    FromTag { sym: u64, off: i64, at: i64 },
    /// The same, and so small that `size` bytes from there are in the window.
    Within { at: Checked, window: i64 },
    /// Host address less guest address, for what was checked.
    Delta(Checked),
    /// A host address.
    Host(Checked),
    /// A multiple of a jump-cache line's size, at most this.
    Index { most: u32 },
    /// The address space, plus such an index.
    Space { most: u32 },
    /// The same, where the TLB line whose tag is at `at` was found to be that of `checked`.
    Line {
        most: u32,
        at: i64,
        checked: Checked,
    },
    /// The same, where the `pc` at `at` was found equal.
    Jump { most: u32, at: i64 },
}

impl Value {
    /// What is true of a value that is one of the two.
    fn join(self, other: Self) -> Option<Self> {
        match (self, other) {
            (Self::Delta(a), Self::Delta(b)) if a.sym == b.sym && a.low == b.low => {
                Some(Self::Delta(Checked {
                    size: a.size.min(b.size),
                    store: a.store && b.store,
                    ..a
                }))
            }
            _ => (self == other).then_some(self),
        }
    }
}

/// The comparison that the next instruction may branch on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compared {
    /// This register with a constant.
    Limit { register: usize, limit: u64 },
    /// This register with the limit of the wide window at this GS offset.
    WideLimit { register: usize, window: i64 },
    /// The jump-cache line at a displacement from this register.
    Line { register: usize, at: i64 },
}

/// What is known before an instruction.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    registers: [Value; 16],
    /// Of guest registers in the state block.
    slots: [Value; 16],
    compared: Option<Compared>,
    /// The word that was just pushed for a slow path.
    pub(super) pushed: Option<u32>,
}

/// Symbols of values that come about at an instruction, or where paths meet.
fn fresh(index: usize, place: u64, join: bool) -> Value {
    let sym = ((index as u64 + 1) << 16) | (u64::from(join) << 15) | place;
    Value::Plain { sym, off: 0 }
}

/// Places of symbols: those of the slots come after those of the registers.
const SLOTS: u64 = 16;

/// Which guest register's slot is at an offset of the state block, if one begins there.
fn slot_at(at: i64) -> Option<usize> {
    let from = at - i64::from(state_offset!(gpr));
    ((0..16 * 8).contains(&from) && from % 8 == 0).then_some(from as usize / 8)
}

pub(super) fn writes(access: OpAccess) -> bool {
    matches!(
        access,
        OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
    )
}

fn number(register: Register) -> Option<usize> {
    register.is_gpr().then(|| register.full_register().number())
}

const T0: usize = 10;
const T1: usize = 11;

impl Facts {
    /// At the start of a block: guest values everywhere.
    pub(super) fn at_entry() -> Self {
        let guest = |first| {
            let value = |place| Value::Plain {
                sym: first + place as u64,
                off: 0,
            };
            std::array::from_fn(value)
        };
        Self {
            registers: guest(0),
            slots: guest(SLOTS),
            compared: None,
            pushed: None,
        }
    }

    pub(super) fn get(&self, register: Register) -> Value {
        match number(register) {
            Some(number) if register.is_gpr64() => self.registers[number],
            // never an address
            _ => Value::Index { most: 0 },
        }
    }

    /// What holds on both of two paths that meet.
    pub(super) fn join(mut self, other: &Self, index: usize) -> Self {
        let mine = self.registers.iter_mut().chain(&mut self.slots);
        let its = other.registers.iter().chain(&other.slots);
        for (place, (mine, its)) in mine.zip(its).enumerate() {
            *mine = mine
                .join(*its)
                .unwrap_or_else(|| fresh(index, place as u64, true));
        }
        self.compared = self.compared.filter(|mine| other.compared == Some(*mine));
        self.pushed = None;
        self
    }

    /// What is known after the instruction at `index`, by its jump or without. None: that way is
    /// never gone.
    pub(super) fn after(
        &self,
        code: &Code64<'_>,
        index: usize,
        registers: &[UsedRegister],
        jumped: bool,
    ) -> Result<Option<Self>, &'static str> {
        let i = &code.all[index];
        let mut next = self.clone();
        next.compared = None;
        next.pushed = None;
        if i.mnemonic() == Mnemonic::Call && code.is_inside(i.near_branch_target()) {
            // what comes back is another block
            return Ok(Some(if jumped { next } else { Self::at_entry() }));
        }
        match i.mnemonic() {
            Mnemonic::Push => next.pushed = Some(i.immediate32to64() as u32),
            Mnemonic::Call => {
                next.call(code, index, i, self.pushed)?;
                if jumped && self.pushed.is_some_and(|what| what & meta::SPAN != 0) {
                    // there is no place to do a span's accesses at
                    next.registers[T1] = fresh(index, T1 as u64, false);
                }
            }
            Mnemonic::Ja | Mnemonic::Jae | Mnemonic::Jne
                if !next.branch(i.mnemonic(), self.compared, jumped) =>
            {
                return Ok(None);
            }
            Mnemonic::Cmp => next.compared = self.comparison(i),
            _ => {}
        }
        let result = self.result(i);
        for used in registers.iter().filter(|used| writes(used.access())) {
            if let Some(place) = number(used.register())
                && i.mnemonic() != Mnemonic::Call
            {
                let known = result.filter(|_| {
                    i.op0_kind() == OpKind::Register && number(i.op0_register()) == Some(place)
                });
                next.registers[place] = known.unwrap_or(fresh(index, place as u64, false));
            }
        }
        next.forget_tags(registers);
        next.store_slot(self, i, index);
        Ok(Some(next))
    }

    /// What is relative to a tag that T1 led to is unknown once T1 leads elsewhere.
    fn forget_tags(&mut self, registers: &[UsedRegister]) {
        let changed = |u: &UsedRegister| writes(u.access()) && number(u.register()) == Some(T1);
        if !registers.iter().any(changed) {
            return;
        }
        for value in &mut self.registers {
            if matches!(value, Value::FromTag { .. }) {
                // like the index: never an address
                *value = Value::Index { most: 0 };
            }
        }
    }

    /// What a thunk leaves.
    fn call(
        &mut self,
        code: &Code64<'_>,
        index: usize,
        i: &Instruction,
        pushed: Option<u32>,
    ) -> Result<(), &'static str> {
        if code.is_repeat(i) {
            for register in [T0, T1, 1, 6, 7] {
                self.registers[register] = fresh(index, register as u64, false);
            }
            return Ok(());
        }
        if let Some(what) = code.draft_check(i, pushed) {
            return self.checked(what);
        }
        let Some(store) = code.slow_thunk(i) else {
            // `fpu_load` uses it
            self.registers[T1] = fresh(index, T1 as u64, false);
            return Ok(());
        };
        let what = pushed.unwrap_or(0);
        if (what & meta::STORE != 0) != store {
            return Err("a slow path of another kind");
        }
        self.checked(what)
    }

    /// An access at T0 was checked; T1 is the distance.
    fn checked(&mut self, what: u32) -> Result<(), &'static str> {
        let Value::Plain { sym, off } = self.registers[T0] else {
            return Err("a slow path without an address");
        };
        self.registers[T1] = Value::Delta(Checked {
            sym,
            low: off,
            size: i64::from(what & meta::SIZE),
            store: what & meta::STORE != 0,
        });
        Ok(())
    }

    /// What a comparison may tell the branch after it.
    fn comparison(&self, i: &Instruction) -> Option<Compared> {
        let register = number(i.op0_register()).filter(|_| i.op0_register().is_gpr64())?;
        if i.op1_kind() != OpKind::Memory {
            let immediate = matches!(
                i.op1_kind(),
                OpKind::Immediate8to64 | OpKind::Immediate32to64
            );
            return immediate.then(|| Compared::Limit {
                register,
                limit: i.immediate(1),
            });
        }
        if let Some(at) = gs_constant(i) {
            let window = at - offset_of!(WideWindow, limit) as i64;
            return is_wide_window(window).then_some(Compared::WideLimit { register, window });
        }
        let line = number(i.memory_base())?;
        let at = i.memory_displacement64() as i64;
        match self.registers[line] {
            Value::Space { most }
                if i.memory_index() == Register::None && is_jump_line(at, most) =>
            {
                Some(Compared::Line { register: line, at })
            }
            _ => None,
        }
    }

    /// What a branch on a comparison tells. False: it is never gone that way.
    fn branch(&mut self, mnemonic: Mnemonic, compared: Option<Compared>, jumped: bool) -> bool {
        match (mnemonic, compared) {
            // every number is at least zero
            (Mnemonic::Jae, Some(Compared::Limit { limit: 0, .. })) => jumped,
            (Mnemonic::Ja, Some(Compared::WideLimit { register, window })) if !jumped => {
                if let Value::Distance {
                    sym,
                    off,
                    window: from,
                } = self.registers[register]
                    && from == window
                {
                    let at = Checked {
                        sym,
                        low: off,
                        // what is left of the window behind its limit
                        size: 4096,
                        store: window_is_for_stores(window),
                    };
                    self.registers[register] = Value::Within { at, window };
                }
                true
            }
            (Mnemonic::Ja, Some(Compared::Limit { register, limit })) if !jumped => {
                if let Value::Distance { sym, off, window } = self.registers[register]
                    && is_window(window)
                    && limit <= 4096
                {
                    let at = Checked {
                        sym,
                        low: off,
                        size: 4096 - limit as i64,
                        store: window_is_for_stores(window),
                    };
                    self.registers[register] = Value::Within { at, window };
                }
                if let Value::FromTag { sym, off, at } = self.registers[register]
                    && let Value::Space { most } = self.registers[T1]
                    && limit <= 4096
                {
                    let checked = Checked {
                        sym,
                        low: off,
                        size: 4096 - limit as i64,
                        store: tlb_of_line(at, most).is_some_and(is_for_stores),
                    };
                    self.registers[T1] = Value::Line { most, at, checked };
                }
                true
            }
            (Mnemonic::Jne, Some(Compared::Line { register, at })) if !jumped => {
                if let Value::Space { most } = self.registers[register] {
                    self.registers[register] = Value::Jump { most, at };
                }
                true
            }
            _ => true,
        }
    }

    /// What the instruction makes of its first operand, where that is known.
    fn result(&self, i: &Instruction) -> Option<Value> {
        if i.op0_kind() != OpKind::Register {
            return None;
        }
        let to = i.op0_register();
        if to == Register::R11D
            && i.mnemonic() == Mnemonic::And
            && i.op1_kind() == OpKind::Immediate32
        {
            return Some(Value::Index {
                most: i.immediate32(),
            });
        }
        if !to.is_gpr64() {
            return None;
        }
        if i.op_count() == 1 {
            return match i.mnemonic() {
                Mnemonic::Inc => moved(self.get(to), 1),
                Mnemonic::Dec => moved(self.get(to), -1),
                _ => None,
            };
        }
        match (i.op1_kind(), gs_constant(i)) {
            (OpKind::Memory, Some(at)) => self.with_state(i.mnemonic(), self.get(to), at),
            (OpKind::Memory, None) if i.mnemonic() == Mnemonic::Lea => self.sum(i),
            (OpKind::Memory, None)
                if i.memory_base() == Register::R11 && i.memory_index() == Register::None =>
            {
                let at = i.memory_displacement64() as i64;
                self.with_line(i.mnemonic(), self.get(to), at)
            }
            (OpKind::Register, _) => {
                with_register(i.mnemonic(), self.get(to), self.get(i.op1_register()))
            }
            (OpKind::Immediate8to64 | OpKind::Immediate32to64, _) => {
                let by = i.immediate(1) as i64;
                match i.mnemonic() {
                    Mnemonic::Add => moved(self.get(to), by),
                    Mnemonic::Sub => moved(self.get(to), by.wrapping_neg()),
                    _ => None,
                }
            }
            _ => None,
        }
    }

    /// LEA of a register plus a constant.
    fn sum(&self, i: &Instruction) -> Option<Value> {
        let near = i.memory_index() == Register::None && i.memory_base().is_gpr64();
        let by = i.memory_displacement64() as i64;
        near.then(|| moved(self.get(i.memory_base()), by)).flatten()
    }

    /// An operation with a TLB line that T1 leads to.
    fn with_line(&self, mnemonic: Mnemonic, to: Value, at: i64) -> Option<Value> {
        match (mnemonic, to, self.registers[T1]) {
            (Mnemonic::Sub, Value::Plain { sym, off }, Value::Space { most }) => {
                tlb_of_line(at, most)?;
                Some(Value::FromTag { sym, off, at })
            }
            // on either way from the comparison T1 is what it was
            (
                Mnemonic::Add,
                Value::FromTag { sym, off, at: tag },
                Value::Space { .. } | Value::Line { .. },
            ) if tag == at => Some(Value::Plain { sym, off }),
            (
                Mnemonic::Mov,
                _,
                Value::Line {
                    at: tag, checked, ..
                },
            ) if at == tag + i64::from(DELTA) => Some(Value::Delta(checked)),
            _ => None,
        }
    }

    /// An operation with a field of the state block.
    fn with_state(&self, mnemonic: Mnemonic, to: Value, at: i64) -> Option<Value> {
        match (mnemonic, to) {
            (Mnemonic::Mov, _) if at == i64::from(state_offset!(space)) => {
                Some(Value::Space { most: 0 })
            }
            (Mnemonic::Add, Value::Index { most }) if at == i64::from(state_offset!(space)) => {
                Some(Value::Space { most })
            }
            (Mnemonic::Mov, _) => {
                let checked = self.registers.iter().find_map(|value| match value {
                    Value::Within {
                        at: checked,
                        window,
                    } if window + 8 == at => Some(*checked),
                    _ => None,
                });
                let delta = checked.map(Value::Delta);
                delta.or_else(|| slot_at(at).map(|slot| self.slots[slot]))
            }
            (Mnemonic::Sub, Value::Plain { sym, off }) if is_window(at) || is_wide_window(at) => {
                Some(Value::Distance {
                    sym,
                    off,
                    window: at,
                })
            }
            (Mnemonic::Add, Value::Distance { sym, off, window }) if window == at => {
                Some(Value::Plain { sym, off })
            }
            _ => None,
        }
    }

    /// Follows what is stored to guest registers in the state block.
    fn store_slot(&mut self, before: &Self, i: &Instruction, index: usize) {
        let Some(at) = gs_constant(i).filter(|_| i.op0_kind() == OpKind::Memory) else {
            return;
        };
        let size = i.memory_size().size() as i64;
        let whole = i.code() == Code::Mov_rm64_r64;
        for (place, slot) in self.slots.iter_mut().enumerate() {
            let offset = i64::from(state_offset!(gpr)) + 8 * place as i64;
            if at < offset + 8 && offset < at + size {
                let stored = before.get(i.op1_register());
                *slot = match stored {
                    Value::Plain { .. } if whole && at == offset => stored,
                    _ => fresh(index, SLOTS + place as u64, false),
                };
            }
        }
    }
}

/// An operation with another register.
fn with_register(mnemonic: Mnemonic, to: Value, from: Value) -> Option<Value> {
    match (mnemonic, to, from) {
        (Mnemonic::Mov, _, from) => Some(from),
        (Mnemonic::Add, Value::Plain { sym, off }, Value::Delta(checked)) if checked.sym == sym => {
            let before = off.wrapping_sub(checked.low);
            Some(Value::Host(Checked {
                size: checked.size.checked_sub(before).filter(|_| before >= 0)?,
                ..checked
            }))
        }
        _ => None,
    }
}

/// A guest value and a constant.
fn moved(value: Value, by: i64) -> Option<Value> {
    match value {
        Value::Plain { sym, off } => Some(Value::Plain {
            sym,
            off: off.wrapping_add(by),
        }),
        _ => None,
    }
}

/// The offset of a memory operand in the state block.
pub(super) fn gs_constant(i: &Instruction) -> Option<i64> {
    let constant = i.segment_prefix() == Register::GS
        && i.memory_base() == Register::None
        && i.memory_index() == Register::None;
    constant.then(|| i.memory_displacement64() as i64)
}

/// Where in the windows an offset of the state block is.
fn in_windows(at: i64) -> Option<i64> {
    let from = at - i64::from(state_offset!(windows));
    let size = size_of::<[[Window; WINDOWS]; WINDOW_KINDS]>() as i64;
    (0..size).contains(&from).then_some(from)
}

/// Whether it is the start of a window.
fn is_window(at: i64) -> bool {
    const { assert!(offset_of!(Window, start) == 0 && offset_of!(Window, delta) == 8) };
    in_windows(at).is_some_and(|from| from % size_of::<Window>() as i64 == 0)
}

/// Where in the wide windows an offset of the state block is.
fn in_wide_windows(at: i64) -> Option<i64> {
    let from = at - i64::from(state_offset!(wide));
    let size = size_of::<[[WideWindow; WIDE_WINDOWS]; 2]>() as i64;
    (0..size).contains(&from).then_some(from)
}

/// Whether it is the start of a wide window.
fn is_wide_window(at: i64) -> bool {
    const { assert!(offset_of!(WideWindow, start) == 0 && offset_of!(WideWindow, delta) == 8) };
    in_wide_windows(at).is_some_and(|from| from % size_of::<WideWindow>() as i64 == 0)
}

fn window_is_for_stores(at: i64) -> bool {
    if let Some(from) = in_wide_windows(at) {
        return from >= size_of::<[WideWindow; WIDE_WINDOWS]>() as i64;
    }
    let kind = in_windows(at).map(|from| from / size_of::<[Window; WINDOWS]>() as i64);
    kind.is_some_and(|kind| kind & 1 != 0)
}

/// Whether a TLB's lines are for stores.
fn is_for_stores(tlb: usize) -> bool {
    Rights::ALL.iter().any(|r| tlb == tlb_number(*r, true))
}

/// The TLB that has its tags at a displacement, plus an index of at most `most`.
fn tlb_of_line(at: i64, most: u32) -> Option<usize> {
    let line = size_of::<TlbEntry>() as i64;
    let table = TLB_ENTRIES as i64 * line;
    let from = at - offset_of!(AddressSpace, tlb) as i64;
    let whole = offset_of!(TlbEntry, tag) == 0 && from % table == 0;
    (whole && i64::from(most) == table - line && (0..TLBS as i64 * table).contains(&from))
        .then_some((from / table) as usize)
}

/// Whether a displacement, plus an index of at most `most`, is that of a jump-cache line.
fn is_jump_line(at: i64, most: u32) -> bool {
    let line = size_of::<JumpEntry>() as i64;
    let from = at - offset_of!(AddressSpace, jumps) as i64;
    let table = JUMP_ENTRIES as i64 * line;
    let inside = (0..table * JUMP_TABLES as i64).contains(&from);
    let one = most == 0 && inside;
    let number = (from / table) as usize;
    let any =
        inside && from % table == 0 && i64::from(most) == (jump_entries(number) as i64 - 1) * line;
    offset_of!(JumpEntry, pc) == 0 && from % line == 0 && (one || any)
}
