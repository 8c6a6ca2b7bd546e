//! Which accesses of a block share a check: runs of them off one base register, near each
//! other, with nothing between that needs the register that holds the checked place.
//!
//! Called by `translate` before a block is lowered. Where a span's check fails, nothing of
//! it has happened yet: the block is left, and one that checks every access by itself does
//! what is to be done, faults included (`Mode::apart`).

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::access::{Place, STACK_WINDOW, window_number};
use super::asm::{GUEST_RSP, HOME, T0, slot};
use super::classify::Class;
use super::lower::{Lower, meta};
use super::plain::{bytes_accessed, has_memory, is_bit_test, plain_base};
use crate::state::gpr;

/// Bytes from the first to the last that one check covers, at most.
const REACH: i64 = 256;

/// What an instruction is to a span.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Role {
    /// Not part of one; its accesses have checks of their own.
    #[default]
    Outside,
    /// Part of one that was checked before.
    Inside,
    /// The first: the check goes before it.
    First(Span),
}

/// Bytes around a base register's value at the span's first instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    base: usize,
    low: i32,
    size: u32,
    store: bool,
}

/// An access off a base register that a span can take in.
#[derive(Clone, Copy)]
struct Access {
    base: usize,
    disp: i64,
    size: u32,
    store: bool,
}

/// What an instruction does to a span that it may be part of.
struct Effect {
    access: Option<Access>,
    /// It leaves T1 alone, if its access is part of the span.
    keeps: bool,
}

/// What becomes of a register's value.
enum Change {
    Add(i64),
    Lost,
}

impl Lower<'_> {
    /// Finds the spans of a block: the longest run first come, first served.
    pub(super) fn find_spans(&mut self, block: &[(Instruction, Class)]) -> Vec<Role> {
        let mut roles = vec![Role::Outside; block.len()];
        let legacy = self.mode.legacy.is_some();
        if self.mode.single || self.mode.aligned || self.mode.apart || legacy {
            return roles;
        }
        let mut at = 0;
        while at < block.len() {
            let Some((span, last)) = self.span_from(&block[at..]) else {
                at += 1;
                continue;
            };
            roles[at..=at + last].fill(Role::Inside);
            roles[at] = Role::First(span);
            at += last + 1;
        }
        roles
    }

    /// The span that begins with the first of these, and the index of its last.
    fn span_from(&mut self, block: &[(Instruction, Class)]) -> Option<(Span, usize)> {
        let first = self.effect(&block[0]).access?;
        let base = first.base;
        let (mut low, mut high) = (first.disp, first.disp + i64::from(first.size));
        let mut store = first.store;
        let mut moved = 0;
        let mut last = 0;
        for (i, member) in block.iter().enumerate() {
            let effect = self.effect(member);
            if !effect.keeps {
                break;
            }
            if let Some(access) = effect.access {
                if access.base != base {
                    break;
                }
                let from = moved + access.disp;
                let to = from + i64::from(access.size);
                if high.max(to) - low.min(from) > REACH {
                    break;
                }
                (low, high) = (low.min(from), high.max(to));
                store |= access.store;
                last = i;
            }
            match self.change(&member.0, base) {
                Change::Add(by) => moved += by,
                Change::Lost => break,
            }
        }
        let span = Span {
            base,
            low: i32::try_from(low).ok()?,
            size: (high - low) as u32,
            store,
        };
        (last > 0).then_some((span, last))
    }

    fn effect(&mut self, (instruction, class): &(Instruction, Class)) -> Effect {
        let none = Effect {
            access: None,
            keeps: false,
        };
        match class {
            Class::Nop => Effect {
                access: None,
                keeps: true,
            },
            Class::Plain if !has_memory(instruction) => Effect {
                access: None,
                keeps: self.keeps_t1(instruction),
            },
            Class::Plain => {
                let Some(access) = self.plain_access(instruction) else {
                    return none;
                };
                Effect {
                    access: Some(access),
                    keeps: self.keeps_t1(instruction),
                }
            }
            // where it is not taken
            Class::Branch if instruction.is_jcc_short_or_near() => Effect {
                access: None,
                keeps: true,
            },
            Class::Stack | Class::Branch => Effect {
                access: stack_access(instruction),
                keeps: stack_access(instruction).is_some(),
            },
            // an index that is not in a host register would be loaded into T1
            Class::Special if instruction.mnemonic() == Mnemonic::Lea => Effect {
                access: None,
                keeps: has_home(instruction.memory_index()),
            },
            Class::Special | Class::Transfer | Class::System => none,
        }
    }

    fn plain_access(&mut self, instruction: &Instruction) -> Option<Access> {
        let (base, disp) = plain_base(instruction)?;
        let size = bytes_accessed(instruction);
        if is_bit_test(instruction) || size == 0 || i64::from(size) > REACH {
            return None;
        }
        let (what, _) = self.memory_use(instruction)?;
        Some(Access {
            base,
            disp: disp.into(),
            size,
            store: what & meta::STORE != 0,
        })
    }

    /// What an instruction does to a general register.
    fn change(&mut self, instruction: &Instruction, register: usize) -> Change {
        let by = instruction.stack_pointer_increment();
        let to = instruction.op0_register().full_register();
        if register == gpr::RSP && by != 0 && to != Register::RSP {
            return Change::Add(by.into());
        }
        let written = self.writes_register(instruction, register);
        if !written {
            return Change::Add(0);
        }
        let to_itself = instruction.op0_register().is_gpr64()
            && instruction.op0_register().number() == register;
        match instruction.mnemonic() {
            Mnemonic::Add | Mnemonic::Sub if to_itself && is_immediate(instruction) => {
                let value = instruction.immediate(1) as i64;
                Change::Add(if instruction.mnemonic() == Mnemonic::Add {
                    value
                } else {
                    value.wrapping_neg()
                })
            }
            Mnemonic::Inc if to_itself => Change::Add(1),
            Mnemonic::Dec if to_itself => Change::Add(-1),
            Mnemonic::Lea if to_itself => match plain_base(instruction) {
                Some((base, disp)) if base == register => Change::Add(disp.into()),
                _ => Change::Lost,
            },
            _ => Change::Lost,
        }
    }

    /// Checks a span before its first instruction.
    pub(super) fn begin_span(&mut self, span: Span, first: &Instruction) {
        self.release_host_flags();
        let stack = span.base == gpr::RSP;
        let window = if stack {
            STACK_WINDOW
        } else {
            window_number(first)
        };
        let what = if span.store { meta::STORE } else { 0 };
        let place = if let Some(base) = HOME[span.base] {
            Place {
                base,
                disp: span.low,
            }
        } else {
            self.asm.load_gs(T0, slot(span.base));
            self.asm.lea(T0, Some(T0), None, span.low, false);
            Place::T0
        };
        debug_assert!(!stack || place.base == GUEST_RSP);
        self.span(place, window, span.size, what);
        self.site(self.flags);
    }
}

/// Whether a register is always in a host register, or is none at all.
fn has_home(register: Register) -> bool {
    let full = register.full_register();
    !full.is_gpr64() || HOME[full.number()].is_some()
}

fn is_immediate(instruction: &Instruction) -> bool {
    matches!(
        instruction.op1_kind(),
        OpKind::Immediate8to64 | OpKind::Immediate32to64
    )
}

/// The access of a stack operation that `stack` does where a span says.
fn stack_access(instruction: &Instruction) -> Option<Access> {
    let size = instruction.stack_pointer_increment().unsigned_abs();
    let at = |disp, size, store| Access {
        base: gpr::RSP,
        disp,
        size,
        store,
    };
    match instruction.mnemonic() {
        Mnemonic::Push if instruction.op0_kind() != OpKind::Memory => {
            Some(at(-i64::from(size), size, true))
        }
        Mnemonic::Pop if instruction.op0_kind() != OpKind::Memory => Some(at(0, size, false)),
        Mnemonic::Call if instruction.is_call_near() => Some(at(-8, 8, true)),
        Mnemonic::Ret => Some(at(0, 8, false)),
        _ => None,
    }
}
