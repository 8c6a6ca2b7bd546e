//! A program in the making: which registers' initial values are still free to choose, what
//! is known of the others, and the items so far.

use iced_x86::{Code, FlowControl, Instruction, InstructionInfoFactory, OpAccess, Register};

use crate::case::{Patch, Registers, Width, Xsave};
use crate::layout::{CODE, PAGE};
use crate::program::{Body, Fixup, Item, Place, Program, Reference, encode};
use crate::rng::Rng;

/// RSP's number.
pub(super) const RSP: usize = 4;

/// A program in the making.
pub(super) struct Builder {
    pub(super) program: Program,
    /// What each general register holds now, as far as that is known.
    known: [Option<u64>; 16],
    /// Which general registers no instruction has read or written yet.
    free: [bool; 16],
    /// Which vector registers no instruction has read or written yet.
    pub(super) free_vectors: [bool; 16],
    info: InstructionInfoFactory,
}

impl Builder {
    pub(super) fn new(width: Width, mut registers: Registers, xsave: &Xsave) -> Self {
        registers.gpr[RSP] = width.stack_offset(registers.gpr[RSP]);
        for value in &mut registers.gpr {
            *value &= width.mask();
        }
        Self {
            program: Program {
                items: Vec::new(),
                width,
                code_address: CODE,
                registers,
                xsave: *xsave,
                patches: Vec::new(),
                fixups: Vec::new(),
            },
            known: registers.gpr.map(Some),
            free: [true; 16],
            free_vectors: [true; 16],
            info: InstructionInfoFactory::new(),
        }
    }

    /// How the code is encoded.
    pub(super) fn width(&self) -> Width {
        self.program.width
    }

    /// Register `n` as wide as addresses are by default.
    pub(super) fn pointer(&self, n: usize) -> Register {
        match self.width() {
            Width::Bits64 => gpr64(n),
            Width::Bits32 => Register::EAX + n as u32,
            Width::Bits16 => Register::AX + n as u32,
        }
    }

    /// The number of a general register that the code can name.
    pub(super) fn any_register(&self, rng: &mut Rng) -> usize {
        rng.index(self.width().registers())
    }

    fn load_of(&self, n: usize, value: u64) -> Option<Instruction> {
        match self.width() {
            Width::Bits64 => Instruction::with2(Code::Mov_r64_imm64, gpr64(n), value),
            Width::Bits32 | Width::Bits16 => {
                let register = Register::EAX + n as u32;
                Instruction::with2(Code::Mov_r32_imm32, register, value as u32)
            }
        }
        .ok()
    }

    pub(super) fn length(&self) -> usize {
        self.program.items.len()
    }

    /// What register `n` holds now, if that is known.
    pub(super) fn known(&self, n: usize) -> Option<u64> {
        self.known[n]
    }

    /// Whether register `n` may be given an initial value.
    pub(super) fn is_free(&self, n: usize) -> bool {
        self.free[n]
    }

    /// No longer allows register `n` to be given another value.
    pub(super) fn commit(&mut self, n: usize) {
        self.free[n] = false;
    }

    /// Sets the initial value of a register that is free.
    pub(super) fn set_initial(&mut self, n: usize, value: u64) {
        debug_assert!(self.free[n]);
        let value = value & self.width().mask();
        self.program.registers.gpr[n] = value;
        self.known[n] = Some(value);
        self.free[n] = false;
    }

    /// Makes register `n` hold `value` from here on: as initial state where it is free, by
    /// an instruction otherwise.
    pub(super) fn make(&mut self, n: usize, value: u64) {
        let value = value & self.width().mask();
        if self.known[n] == Some(value) {
            self.free[n] = false;
        } else if self.free[n] {
            self.set_initial(n, value);
        } else {
            self.load(n, value);
        }
    }

    /// Makes register `n` hold `value` from here on, by an instruction.
    pub(super) fn load(&mut self, n: usize, value: u64) {
        if let Some(load) = self.load_of(n, value) {
            self.push(load);
            self.known[n] = Some(value & self.width().mask());
        }
    }

    /// Keeps what refers to items still to come from reaching beyond the next one.
    pub(super) fn limit_targets(&mut self) {
        let next = self.program.items.len();
        for item in &mut self.program.items {
            if let Some((_, target)) = &mut item.target {
                *target = (*target).min(next);
            }
        }
        for fixup in &mut self.program.fixups {
            fixup.target = fixup.target.min(next);
        }
    }

    /// Makes register `n` hold the address of item `target`.
    pub(super) fn make_address(&mut self, n: usize, target: usize) {
        if self.free[n] {
            self.program.fixups.push(Fixup {
                target,
                place: Place::Register(n),
            });
            self.free[n] = false;
        } else if let Some(load) = self.load_of(n, 0) {
            self.push(load);
            self.last_target(Reference::Immediate, target);
        }
        self.known[n] = None;
    }

    /// Initial memory. More than a case can hold is dropped.
    pub(super) fn patch(&mut self, patch: Patch) {
        if self.program.patches.len() + self.program.fixups.len() < crate::case::PATCH_MAX {
            self.program.patches.push(patch);
        }
    }

    /// Makes the last item refer to item `target`.
    pub(super) fn last_target(&mut self, reference: Reference, target: usize) {
        if let Some(item) = self.program.items.last_mut() {
            item.target = Some((reference, target));
        }
    }

    /// Makes item `index` refer to item `target`.
    pub(super) fn aim_at(&mut self, index: usize, reference: Reference, target: usize) {
        if let Some(item) = self.program.items.get_mut(index) {
            item.target = Some((reference, target));
        }
    }

    /// The address of item `target` as initial state, if there is room for it.
    pub(super) fn fixup(&mut self, target: usize, place: Place) {
        if self.program.patches.len() + self.program.fixups.len() < crate::case::PATCH_MAX {
            self.program.fixups.push(Fixup { target, place });
        }
    }

    /// The instruction appended last.
    pub(super) fn last_instruction(&self) -> Option<&Instruction> {
        match &self.program.items.last()?.body {
            Body::Instruction(instruction) => Some(instruction),
            Body::Raw(_) => None,
        }
    }

    /// Appends a direct branch to item `target`.
    pub(super) fn push_branch(&mut self, code: Code, target: usize) {
        if let Ok(branch) = Instruction::with_branch(code, self.width().ip(CODE))
            && self.push(branch)
        {
            self.last_target(Reference::Branch, target);
        }
    }

    /// Forgets what registers hold: the path to here is no longer a straight line.
    pub(super) fn forget_all(&mut self) {
        self.known = [None; 16];
        self.free = [false; 16];
    }

    /// Appends an instruction if it can be encoded, and learns what it does to registers.
    pub(super) fn push(&mut self, instruction: Instruction) -> bool {
        let item = Item::from(instruction);
        let ip = self.width().ip(CODE);
        if encode(&item, self.width(), ip, |_| Some(ip)).is_none() {
            return false;
        }
        self.program.items.push(item);
        self.learn(&instruction);
        true
    }

    /// Follows the effect of an instruction on what is known and free.
    fn learn(&mut self, instruction: &Instruction) {
        let stack = instruction.stack_pointer_increment();
        let info = self.info.info(instruction);
        for used in info.used_registers() {
            let register = used.register();
            if register.is_vector_register() {
                self.free_vectors[register.number() % 16] = false;
                continue;
            }
            if !register.is_gpr() {
                continue;
            }
            let n = gpr_number(register);
            self.free[n] = false;
            let writes = !matches!(
                used.access(),
                OpAccess::Read | OpAccess::CondRead | OpAccess::None
            );
            if writes && !(n == RSP && stack != 0) {
                self.known[n] = None;
            }
        }
        if stack != 0 {
            self.free[RSP] = false;
            self.known[RSP] = self.known[RSP].map(|rsp| rsp.wrapping_add(stack as i64 as u64));
        }
        if matches!(
            instruction.flow_control(),
            FlowControl::Call | FlowControl::IndirectCall
        ) {
            self.known[RSP] = None;
        }
    }

    /// A free register other than RSP and those in `taken`, or None.
    pub(super) fn pick_free(&self, rng: &mut Rng, taken: &[usize]) -> Option<usize> {
        let count = self.width().registers();
        let start = rng.index(count);
        (0..count)
            .map(|i| (start + i) % count)
            .find(|&n| n != RSP && self.free[n] && !taken.contains(&n))
    }

    /// Puts the code where it is to run: usually at the start of a cache line or anywhere,
    /// sometimes so that it crosses into the second page, or off the end of that.
    pub(super) fn place(&mut self, rng: &mut Rng) {
        self.program.code_address = match rng.below(20) {
            0..=12 => CODE + 64 * rng.below(40),
            13..=16 => CODE + rng.below(2560),
            17 | 18 => CODE + PAGE - 1 - rng.below(40),
            _ => CODE + 2 * PAGE - 1 - rng.below(60),
        };
    }
}

/// The 64-bit general register number `n`.
pub(super) fn gpr64(n: usize) -> Register {
    Register::RAX + n as u32
}

/// The number of the full register that `register`, a general one of any width, is part of.
pub(super) fn gpr_number(register: Register) -> usize {
    register.full_register().number() % 16
}
