//! REP MOVS and REP STOS as the host's own, where all of it lies within a page for each
//! pointer and the TLB knows the pages. The rest (longer runs, DF, devices, faults) is left
//! to `system`, before anything has changed.
//!
//! `lower` calls what `thunks` has written of it once: both are here.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::asm::{Alu, Asm, GUEST_RAX, RAX, RCX, RDI, RSI, RSP, T0, T1, cc};
use super::lower::Lower;
use super::thunks::{DELTA, line_of, tag_offset};
use crate::mmu::Rights;
use crate::state::{rflags, state_offset};

/// A repeated copy or fill with 64-bit addresses.
struct Repeat {
    moves: bool,
    /// log2 of an element's bytes.
    shift: u8,
}

/// The host's STOS and MOVS, less REP, by `shift`.
const OPCODES: [[&[u8]; 2]; 4] = [
    [&[0xaa], &[0xa4]],
    [&[0x66, 0xab], &[0x66, 0xa5]],
    [&[0xab], &[0xa5]],
    [&[0x48, 0xab], &[0x48, 0xa5]],
];

/// Whether `instruction` is one that has a short form.
pub(super) fn is_repeat(instruction: &Instruction) -> bool {
    repeat(instruction).is_some()
}

fn repeat(instruction: &Instruction) -> Option<Repeat> {
    use Mnemonic as M;
    let repeated = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    let wide = |i| {
        !matches!(
            instruction.op_kind(i),
            OpKind::MemorySegESI | OpKind::MemoryESEDI | OpKind::MemorySegSI | OpKind::MemoryESDI
        )
    };
    let based = matches!(instruction.memory_segment(), Register::FS | Register::GS);
    if !repeated
        || instruction.has_lock_prefix()
        || based
        || !(0..instruction.op_count()).all(wide)
        || !instruction.is_string_instruction()
    {
        return None;
    }
    let (moves, shift) = match instruction.mnemonic() {
        M::Movsb => (true, 0),
        M::Movsw => (true, 1),
        M::Movsd => (true, 2),
        M::Movsq => (true, 3),
        M::Stosb => (false, 0),
        M::Stosw => (false, 1),
        M::Stosd => (false, 2),
        M::Stosq => (false, 3),
        _ => return None,
    };
    Some(Repeat { moves, shift })
}

impl Repeat {
    /// Its number among the `repeat` thunks of a ring.
    fn number(&self) -> usize {
        usize::from(self.moves) << 2 | usize::from(self.shift)
    }
}

/// How many there are.
const REPEATS: usize = 8;

/// Addresses of the thunks, by [`Rights`].
pub(crate) type Thunks = [[u64; REPEATS]; 3];

/// Writes the thunks.
pub(super) fn emit(a: &mut Asm) -> Thunks {
    let mut thunks = Thunks::default();
    for (rights, row) in Rights::ALL.into_iter().zip(&mut thunks) {
        for moves in [false, true] {
            for (shift, opcode) in OPCODES.iter().enumerate() {
                let job = Repeat {
                    moves,
                    shift: shift as u8,
                };
                row[job.number()] = a.here();
                thunk(a, rights, &job, opcode[usize::from(moves)]);
            }
        }
    }
    thunks
}

/// In: the guest's registers, with its flags in AX. Out: the host's ZF is set if it is done,
/// else nothing has changed. Clobbers T0, T1 and the host's flags.
fn thunk(a: &mut Asm, rights: Rights, job: &Repeat, opcode: &[u8]) {
    a.test_gs(state_offset!(system_flags), rflags::DF as u32);
    let down = a.jcc_forward(cc::NE);
    a.alu_imm(Alu::Cmp, RCX, 4096 >> job.shift);
    let long = a.jcc_forward(cc::A);
    a.store_gs(state_offset!(temp) + 8, RAX);
    a.mov(T0, RDI);
    let mut misses = probe(a, rights, true, job).to_vec();
    if job.moves {
        a.store_gs(state_offset!(temp) + 16, T0);
        a.mov(T0, RSI);
        misses.extend(probe(a, rights, false, job));
    }
    a.mov(T1, RCX);
    a.push(RDI);
    if job.moves {
        a.push(RSI);
        a.mov(RSI, T0);
        a.load_gs(RDI, state_offset!(temp) + 16);
    } else {
        a.mov(RDI, T0);
        a.mov(RAX, GUEST_RAX);
    }
    a.raw(&[0xf3]);
    a.raw(opcode);
    a.shift(4, T1, job.shift);
    if job.moves {
        a.pop(RSI);
        a.alu(Alu::Add, RSI, T1);
    }
    a.pop(RDI);
    a.alu(Alu::Add, RDI, T1);
    a.load_gs(RAX, state_offset!(temp) + 8);
    a.alu(Alu::Cmp, RSP, RSP);
    a.raw(&[0xc3]);
    for miss in misses {
        a.aim(miss);
    }
    a.load_gs(RAX, state_offset!(temp) + 8);
    a.aim(down);
    a.aim(long);
    // RSP is never 0
    a.alu_imm(Alu::Cmp, RSP, 0);
    a.raw(&[0xc3]);
}

/// The linear address in T0 becomes a host address, if the TLB knows it and the whole run
/// lies within its page. Returns the jumps for when not. Clobbers RAX and T1.
fn probe(a: &mut Asm, rights: Rights, store: bool, job: &Repeat) -> [usize; 2] {
    let tag = tag_offset(rights, store);
    line_of(a, T0);
    a.mov(RAX, T0);
    a.alu_mem(Alu::Sub, RAX, T1, tag);
    a.alu_imm(Alu::Cmp, RAX, 4095);
    let miss = a.jcc_forward(cc::A);
    a.alu_mem(Alu::Add, T0, T1, tag + DELTA);
    a.mov(T1, RCX);
    a.shift(4, T1, job.shift);
    a.alu(Alu::Add, RAX, T1);
    a.alu_imm(Alu::Cmp, RAX, 4096);
    let crosses = a.jcc_forward(cc::A);
    [miss, crosses]
}

impl Lower<'_> {
    /// A repeated copy or fill. False: it has no short form here.
    pub(super) fn repeat(&mut self, instruction: &Instruction) -> bool {
        let mode = self.mode;
        let Some(job) = repeat(instruction) else {
            return false;
        };
        if mode.single || mode.aligned || mode.legacy.is_some() {
            return false;
        }
        self.release_host_flags();
        let thunk = self.thunks.repeat[self.rights as usize][job.number()];
        self.asm.call(thunk);
        self.depart_if(cc::NE, instruction);
        true
    }
}
