//! A test case while it is still instructions, labels and initial state: what the generator
//! makes, what the shrinker takes apart, and what is assembled into a [`Case`].

use iced_x86::{Decoder, DecoderOptions, Encoder, FastFormatter, Instruction, OpKind};

use crate::case::{CODE_MAX, Case, PATCH_MAX, PATCH_SIZE, Patch, Registers, Width, Xsave};
use crate::layout::{ALIAS, CODE, INT3};

/// What an item is encoded from.
#[derive(Clone, Debug)]
pub enum Body {
    /// An instruction that the encoder knows.
    Instruction(Instruction),
    /// Bytes as they are: encodings that the encoder would not choose.
    Raw(Vec<u8>),
}

/// How an item refers to another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reference {
    /// By a relative branch.
    Branch,
    /// By the other's address as a 64-bit immediate.
    Immediate,
    /// By the other's address as the memory operand, RIP-relative.
    Memory,
    /// By the address at which the other can be written, as the memory operand.
    Alias,
}

/// One instruction of a program.
#[derive(Clone, Debug)]
pub struct Item {
    /// The instruction.
    pub body: Body,
    /// The item it refers to. The number of items stands for the end.
    pub target: Option<(Reference, usize)>,
}

impl From<Instruction> for Item {
    fn from(instruction: Instruction) -> Self {
        Self {
            body: Body::Instruction(instruction),
            target: None,
        }
    }
}

/// An address of an item that is needed as initial state.
#[derive(Clone, Copy, Debug)]
pub struct Fixup {
    /// The item.
    pub target: usize,
    /// Where its address goes.
    pub place: Place,
}

/// Where the address of an item goes.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    /// A general register, by number.
    Register(usize),
    /// Eight bytes of memory.
    Memory(u64),
}

/// A whole test.
#[derive(Clone, Debug)]
pub struct Program {
    /// The instructions; INT3 follows the last.
    pub items: Vec<Item>,
    /// How they are encoded.
    pub width: Width,
    /// Where the first of them goes.
    pub code_address: u64,
    /// Initial integer state; RIP is set when assembling.
    pub registers: Registers,
    /// Initial extended state.
    pub xsave: Xsave,
    /// Initial memory.
    pub patches: Vec<Patch>,
    /// Initial state that depends on where items are.
    pub fixups: Vec<Fixup>,
}

impl Program {
    /// Makes the case, if everything can be encoded and fits.
    pub fn assemble(&self) -> Option<Case> {
        let addresses = self.addresses()?;
        let mut code = Vec::with_capacity(CODE_MAX);
        let start = self.width.ip(self.code_address);
        for (item, &address) in self.items.iter().zip(&addresses) {
            let bytes = encode(item, self.width, address, |target| {
                addresses.get(target).copied()
            })?;
            if address + bytes.len() as u64 > start + CODE_MAX as u64 - 1 {
                return None;
            }
            code.extend(bytes);
        }
        code.push(INT3);
        let mut case = Case {
            xsave: self.xsave,
            registers: self.registers,
            width: self.width,
            code_address: self.code_address,
            code_length: code.len() as u64,
            code: [INT3; CODE_MAX],
            patch_count: 0,
            patches: [Patch::default(); PATCH_MAX],
        };
        case.registers.rip = case.ip();
        case.code[..code.len()].copy_from_slice(&code);
        for patch in &self.patches {
            push_patch(&mut case, *patch)?;
        }
        for fixup in &self.fixups {
            let address = *addresses.get(fixup.target)?;
            match fixup.place {
                Place::Register(n) => case.registers.gpr[n] = address,
                Place::Memory(place) => push_patch(&mut case, word_patch(place, address))?,
            }
        }
        Some(case)
    }

    /// RIP of every item, and of the end.
    fn addresses(&self) -> Option<Vec<u64>> {
        let mut address = self.width.ip(self.code_address);
        let mut addresses = Vec::with_capacity(self.items.len() + 1);
        for item in &self.items {
            addresses.push(address);
            // no encoding's length depends on where a target is, as long as it is near
            address += encode(item, self.width, address, |_| Some(address + 2))?.len() as u64;
        }
        addresses.push(address);
        Some(addresses)
    }

    /// The program without item `index`; labels keep pointing at what follows.
    #[must_use]
    pub fn without(&self, index: usize) -> Self {
        let mut shorter = self.clone();
        shorter.items.remove(index);
        let moved = |target: usize| if target > index { target - 1 } else { target };
        for item in &mut shorter.items {
            item.target = item
                .target
                .map(|(reference, target)| (reference, moved(target)));
        }
        for fixup in &mut shorter.fixups {
            fixup.target = moved(fixup.target);
        }
        shorter
    }
}

/// A patch of eight bytes.
pub(crate) fn word_patch(address: u64, value: u64) -> Patch {
    let mut bytes = [0; PATCH_SIZE];
    bytes[..8].copy_from_slice(&value.to_le_bytes());
    Patch {
        address,
        length: 8,
        bytes,
    }
}

fn push_patch(case: &mut Case, patch: Patch) -> Option<()> {
    *case.patches.get_mut(case.patch_count as usize)? = patch;
    case.patch_count += 1;
    Some(())
}

/// The bytes of `item` at `address`.
pub(crate) fn encode(
    item: &Item,
    width: Width,
    address: u64,
    resolve: impl Fn(usize) -> Option<u64>,
) -> Option<Vec<u8>> {
    let mut instruction = match &item.body {
        Body::Raw(bytes) => return Some(bytes.clone()),
        Body::Instruction(instruction) => *instruction,
    };
    if let Some((reference, target)) = item.target {
        let target = resolve(target)?;
        match reference {
            Reference::Branch if width == Width::Bits64 => instruction.set_near_branch64(target),
            Reference::Branch if instruction.op0_kind() == OpKind::NearBranch16 => {
                instruction.set_near_branch16(target as u16);
            }
            Reference::Branch => instruction.set_near_branch32(target as u32),
            Reference::Immediate if width == Width::Bits64 => instruction.set_immediate64(target),
            Reference::Immediate => instruction.set_immediate32(target as u32),
            Reference::Memory => instruction.set_memory_displacement64(target),
            Reference::Alias => instruction.set_memory_displacement64(target - CODE + ALIAS),
        }
    }
    let mut encoder = Encoder::try_new(width.bits()).ok()?;
    encoder.encode(&instruction, address).ok()?;
    Some(encoder.take_buffer())
}

/// The instructions of a case as the decoder sees them, in order of their addresses.
pub fn decode(case: &Case) -> Vec<Instruction> {
    let code = &case.code[..(case.code_length as usize).saturating_sub(1)];
    Decoder::with_ip(case.width.bits(), code, case.ip(), DecoderOptions::NONE)
        .iter()
        .collect()
}

/// One line of disassembly.
pub(crate) fn format(instruction: &Instruction) -> String {
    let mut text = String::new();
    FastFormatter::new().format(instruction, &mut text);
    text
}
