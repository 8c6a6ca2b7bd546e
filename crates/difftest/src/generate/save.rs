//! Saving extended state to memory, changing it and loading it back: FXSAVE, XSAVE, FNSAVE,
//! FNSTENV and their counterparts.
//!
//! What they store is not compared (see `compare`), only what is loaded from it again. Their
//! images lie on pages of their own, which no other operand is put on.

use iced_x86::{Code, Instruction, MemoryOperand, Register};

use super::builder::{Builder, gpr64};
use crate::case::{HEADER_OFFSET, PATCH_SIZE, Patch, Width};
use crate::layout::{HOLE, IMAGES, IMAGES_SIZE, PAGE, READ_ONLY};
use crate::rng::Rng;

const RAX: usize = 0;
const RDX: usize = 2;

/// An instruction that saves and one that restores from the same image.
const PAIRS: [(Code, Code); 10] = [
    (Code::Fxsave_m512byte, Code::Fxrstor_m512byte),
    (Code::Fxsave64_m512byte, Code::Fxrstor64_m512byte),
    (Code::Fxsave64_m512byte, Code::Fxrstor_m512byte),
    (Code::Xsave_mem, Code::Xrstor_mem),
    (Code::Xsave64_mem, Code::Xrstor64_mem),
    (Code::Xsavec_mem, Code::Xrstor_mem),
    (Code::Xsavec64_mem, Code::Xrstor64_mem),
    (Code::Xsaveopt64_mem, Code::Xrstor64_mem),
    (Code::Fnsave_m108byte, Code::Frstor_m108byte),
    (Code::Fnstenv_m28byte, Code::Fldenv_m28byte),
];

/// Appends a save, what `filler` appends, and a restore.
pub(super) fn pattern(
    builder: &mut Builder,
    rng: &mut Rng,
    filler: &mut dyn FnMut(&mut Builder, &mut Rng),
) {
    let (save, restore) = rng.pick(&PAIRS);
    if !is_offered(save) {
        return;
    }
    let image = place(rng);
    clear_header(builder, image);
    use_image(builder, rng, save, image);
    for _ in 0..=rng.below(4) {
        filler(builder, rng);
    }
    if rng.chance(85) {
        use_image(builder, rng, restore, image);
    }
}

fn is_offered(save: Code) -> bool {
    let features = save.cpuid_features();
    if features.contains(&iced_x86::CpuidFeature::XSAVEC) {
        std::arch::is_x86_feature_detected!("xsavec")
    } else if features.contains(&iced_x86::CpuidFeature::XSAVEOPT) {
        std::arch::is_x86_feature_detected!("xsaveopt")
    } else {
        true
    }
}

/// Mostly where an image may lie, else misaligned, off the edge or where no store can go.
fn place(rng: &mut Rng) -> u64 {
    match rng.below(20) {
        0..=12 => IMAGES + 64 * rng.below((IMAGES_SIZE - 1024) / 64),
        13..=15 => IMAGES + PAGE - 64 * (1 + rng.below(12)),
        16 => IMAGES + IMAGES_SIZE - 64 * (1 + rng.below(12)),
        17 => IMAGES + rng.below(PAGE),
        18 => IMAGES + 16 * rng.below(PAGE / 16),
        _ => rng.pick(&[HOLE, READ_ONLY, 0]) + 64 * rng.below(32),
    }
}

/// The header of an image must be sound before XSAVE, which keeps part of it.
fn clear_header(builder: &mut Builder, image: u64) {
    let zeros = |address| Patch {
        address,
        length: 32,
        bytes: [0; PATCH_SIZE],
    };
    builder.patch(zeros(image.wrapping_add(HEADER_OFFSET as u64)));
    builder.patch(zeros(image.wrapping_add(HEADER_OFFSET as u64 + 32)));
}

fn use_image(builder: &mut Builder, rng: &mut Rng, code: Code, image: u64) {
    // the components that both machines have
    let components = rng.pick(&[7, 7, 7, 7, 6, 5, 4, 3, 2, 1, 0]);
    builder.make(RAX, components);
    builder.make(RDX, 0);
    let base = builder.pick_free(rng, &[RAX, RDX]).unwrap_or(3);
    builder.make(base, builder.width().data_offset(image));
    let name = match builder.width() {
        Width::Bits64 => gpr64(base),
        _ => Register::EAX + base as u32,
    };
    let operand = MemoryOperand::with_base(name);
    if let Ok(instruction) = Instruction::with1(code, operand) {
        builder.push(instruction);
    }
}
