//! Makes test programs: first single instructions, every one of the catalogue in turn, then
//! sequences with branches, loops, calls and self-modification.
//!
//! Called by `runner` and by the fuzz target. Whatever it draws, it returns a program that
//! assembles.

mod builder;
mod memory;
mod operands;
mod save;
mod special;
pub(crate) mod state;
pub(crate) mod values;

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl};

use self::builder::Builder;
use crate::case::{Case, Width};
use crate::catalog::Catalog;
use crate::program::{Body, Item, Place, Program, Reference, encode};
use crate::rng::Rng;

/// Longest sequence, in instructions chosen (what sets up their operands comes on top).
const SEQUENCE_MAX: u64 = 20;

/// Makes the program number `index` of a run.
pub fn program(catalog: &Catalog, rng: &mut Rng, index: u64) -> (Program, Case) {
    // every other pair of cases is 32- or 16-bit code
    let width = match index & 6 {
        2 => Width::Bits32,
        6 => Width::Bits16,
        _ => Width::Bits64,
    };
    for _ in 0..64 {
        let program = if index.is_multiple_of(2) {
            let codes = catalog.codes(width);
            single(rng, width, codes[(index / 4 % codes.len() as u64) as usize])
        } else {
            sequence(catalog, rng, width)
        };
        if let Some(program) = program
            && let Some(case) = program.assemble()
        {
            return (program, case);
        }
    }
    let program = nothing(rng);
    let case = program
        .assemble()
        .unwrap_or_else(|| unreachable!("an empty program fits"));
    (program, case)
}

fn nothing(rng: &mut Rng) -> Program {
    Builder::new(Width::Bits64, state::registers(rng), &state::extended(rng)).program
}

fn start(rng: &mut Rng, width: Width) -> Builder {
    let mut builder = Builder::new(width, state::registers(rng), &state::extended(rng));
    builder.place(rng);
    builder
}

fn single(rng: &mut Rng, width: Width, code: Code) -> Option<Program> {
    let mut builder = start(rng, width);
    if !operands::append(&mut builder, rng, code) {
        return None;
    }
    special::aim(&mut builder, rng);
    Some(complete(builder, rng))
}

fn sequence(catalog: &Catalog, rng: &mut Rng, width: Width) -> Option<Program> {
    let mut builder = start(rng, width);
    let length = 2 + rng.below(SEQUENCE_MAX - 1);
    let mut filler = |builder: &mut Builder, rng: &mut Rng| {
        let code = pick_code(catalog, rng, width);
        if operands::append(builder, rng, code) {
            special::aim(builder, rng);
        }
    };
    for _ in 0..length {
        if rng.chance(6) {
            special::pattern(&mut builder, rng, &mut filler);
        } else {
            filler(&mut builder, rng);
        }
    }
    (builder.length() > 0).then(|| complete(builder, rng))
}

/// An instruction for a sequence: of all alike, or of those that programs are made of.
fn pick_code(catalog: &Catalog, rng: &mut Rng, width: Width) -> Code {
    let codes = catalog.codes(width);
    for _ in 0..8 {
        let code = rng.pick(codes);
        let op_code = code.op_code();
        // faults end a sequence, so what always faults is rare in them
        if op_code.is_privileged() && !rng.chance(3) {
            continue;
        }
        // emulated, so that the flags they leave undefined are not the host's
        if is_adjustment(code) {
            continue;
        }
        if rng.chance(45) || code.encoding() == iced_x86::EncodingKind::Legacy && is_integer(code) {
            return code;
        }
    }
    Code::Add_rm32_r32
}

fn is_adjustment(code: Code) -> bool {
    use iced_x86::Mnemonic as M;
    matches!(
        code.mnemonic(),
        M::Aaa | M::Aas | M::Aad | M::Aam | M::Daa | M::Das
    )
}

fn is_integer(code: Code) -> bool {
    use iced_x86::CpuidFeature as F;
    code.cpuid_features().iter().all(|f| {
        matches!(
            f,
            F::INTEL8086 | F::INTEL186 | F::INTEL386 | F::INTEL486 | F::X64 | F::CMOV
        )
    })
}

/// Bounds the branch targets, and sometimes spoils an encoding.
fn complete(mut builder: Builder, rng: &mut Rng) -> Program {
    let end = builder.length();
    for item in &mut builder.program.items {
        if let Some((_, target)) = &mut item.target {
            *target = (*target).min(end);
        }
    }
    for fixup in &mut builder.program.fixups {
        fixup.target = fixup.target.min(end);
        if let Place::Register(n) = fixup.place {
            builder.program.registers.gpr[n] = 0;
        }
    }
    if rng.chance(5) {
        spoil(&mut builder.program, rng);
    }
    builder.program
}

/// Puts a prefix before an instruction that the encoder would not put there.
fn spoil(program: &mut Program, rng: &mut Rng) {
    const PREFIXES: [u8; 13] = [
        0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x66, 0x67, 0xf2, 0xf3, 0xf0, 0x40, 0x48,
    ];
    let index = rng.index(program.items.len());
    // what is to be rewritten keeps its length
    let rewritten = |item: &Item| {
        item.target.is_some_and(|(way, target)| {
            target == index && matches!(way, Reference::Memory | Reference::Alias)
        })
    };
    if program.items.iter().any(rewritten) {
        return;
    }
    let item = &mut program.items[index];
    if item.target.is_some() {
        return;
    }
    let Some(mut bytes) = encode(
        item,
        program.width,
        program.width.ip(program.code_address),
        |_| None,
    ) else {
        return;
    };
    bytes.insert(0, rng.pick(&PREFIXES));
    let bits = program.width.bits();
    let mut decoder = Decoder::with_ip(
        bits,
        &bytes,
        program.width.ip(program.code_address),
        DecoderOptions::NONE,
    );
    let instruction = decoder.decode();
    // AMD cuts near branches to 16 bits by prefix 66, Intel does not
    let mut disputed = bytes[0] == 0x66 && instruction.flow_control() != FlowControl::Next;
    // F3 REX.B 90 is XCHG on CPUs and PAUSE to the decoder
    disputed |= instruction.code() == Code::Pause;
    let allowed = Catalog::shared().contains(program.width, instruction.code()) && !disputed;
    if allowed && instruction.len() == bytes.len() {
        item.body = Body::Raw(bytes);
    }
}
