//! Plain instructions: the guest's own opcode with its registers and memory operand
//! replaced. Semantics, results and flags are the host CPU's.

use iced_x86::{Code, Instruction, InstructionInfoOptions, Mnemonic, OpAccess, OpKind, Register};

use super::access::{Place, window_number};
use super::asm::{GUEST_RSP, HOME, RAX, RBP, Reg, T0, T1, slot};
use super::classify::{Extended, extended_state};
use super::generic::modrm_form;
use super::lower::{Flags, Lower, meta};
use crate::state::{gpr, rflags, state_offset};

/// iced's bits for the six status flags.
const STATUS: u32 = iced_x86::RflagsBits::OF
    | iced_x86::RflagsBits::SF
    | iced_x86::RflagsBits::ZF
    | iced_x86::RflagsBits::AF
    | iced_x86::RflagsBits::CF
    | iced_x86::RflagsBits::PF;

/// How an instruction deals with the status flags.
struct FlagUse {
    /// The host's RFLAGS must hold the guest's before it.
    needs: bool,
    /// It changes them.
    writes: bool,
}

/// Whether the instruction leaves nothing of the old flags though the manual calls some of
/// its own undefined: logic operations, and shifts by a known count.
fn sets_all(i: &Instruction) -> bool {
    use Mnemonic as M;
    match i.mnemonic() {
        M::And | M::Or | M::Xor | M::Test => true,
        M::Shl | M::Sal | M::Shr | M::Sar => shifts_for_sure(i),
        _ => false,
    }
}

/// Whether a shift's count is known and not zero.
fn shifts_for_sure(i: &Instruction) -> bool {
    let last = i.op_count() - 1;
    let mask = if i.op0_register().size() == 8 || i.memory_size().size() == 8 {
        63
    } else {
        31
    };
    match i.op_kind(last) {
        OpKind::Immediate8 => i.immediate8() & mask != 0,
        _ => false,
    }
}

fn flag_use(i: &Instruction) -> FlagUse {
    let changed = i.rflags_modified() & STATUS;
    // a count of zero leaves all flags, and only the CPU knows a count in CL
    let shift = matches!(
        i.mnemonic(),
        Mnemonic::Shl
            | Mnemonic::Sal
            | Mnemonic::Shr
            | Mnemonic::Sar
            | Mnemonic::Rol
            | Mnemonic::Ror
            | Mnemonic::Rcl
            | Mnemonic::Rcr
            | Mnemonic::Shld
            | Mnemonic::Shrd
    );
    let writes = changed != 0 || shift;
    // what is undefined may keep the old value on some CPUs, but for these
    let all = sets_all(i) || changed & !i.rflags_undefined() == STATUS && !shift;
    let keeps = writes && !all;
    FlagUse {
        needs: i.rflags_read() & STATUS != 0 || keeps,
        writes,
    }
}

/// Instructions whose accumulator operand is not written in the instruction.
fn implicit_rax(i: &Instruction) -> bool {
    use Mnemonic as M;
    match i.mnemonic() {
        M::Mul
        | M::Div
        | M::Idiv
        | M::Cbw
        | M::Cwde
        | M::Cdqe
        | M::Cwd
        | M::Cdq
        | M::Cqo
        | M::Cmpxchg
        | M::Cmpxchg8b
        | M::Cmpxchg16b
        | M::Lahf
        | M::Sahf
        | M::Pcmpestri
        | M::Pcmpestrm
        | M::Pcmpestri64
        | M::Pcmpestrm64
        | M::Vpcmpestri
        | M::Vpcmpestrm
        | M::Vpcmpestri64
        | M::Vpcmpestrm64 => true,
        M::Imul => i.op_count() == 1,
        M::Fnstsw | M::Fstsw => i.op0_kind() == OpKind::Register,
        _ => false,
    }
}

fn is_high_byte(register: Register) -> bool {
    matches!(
        register,
        Register::AH | Register::CH | Register::DH | Register::BH
    )
}

/// iced's name for part of host register `reg`, `size` bytes wide.
fn sized(reg: Reg, size: usize) -> Register {
    let n = u32::from(reg.0);
    match size {
        8 => Register::RAX + n,
        4 => Register::EAX + n,
        2 => Register::AX + n,
        _ if n < 4 => Register::AL + n,
        _ => Register::SPL + (n - 4),
    }
}

fn writes(access: OpAccess) -> bool {
    matches!(
        access,
        OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
    )
}

fn uses_x87(i: &Instruction) -> bool {
    use iced_x86::CpuidFeature as F;
    i.cpuid_features()
        .iter()
        .any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387))
}

/// Whether the instruction reports a pending x87 exception (Intel SDM vol. 1 §8.7).
fn waits_for_x87(i: &Instruction) -> bool {
    let mmx = i.cpuid_features().contains(&iced_x86::CpuidFeature::MMX)
        || (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_mm());
    mmx || uses_x87(i) && !i.code().op_code().is_fpu_no_wait()
}

/// Bytes that the memory operand has on the host: never less than what the host touches.
pub(super) fn bytes_accessed(i: &Instruction) -> u32 {
    match i.code() {
        // AMD's processors read four bytes for the two that the manuals name
        Code::Movsxd_r16_rm16 => 4,
        _ => i.memory_size().size() as u32,
    }
}

/// Whether a misaligned memory operand raises #GP (Intel SDM vol. 1 §10.4.1.1, §14.9).
fn demands_alignment(i: &Instruction) -> bool {
    use Mnemonic as M;
    let size = i.memory_size().size();
    if i.mnemonic() == M::Cmpxchg16b {
        return true;
    }
    if size < 16 || uses_x87(i) {
        return false;
    }
    match i.mnemonic() {
        M::Movups
        | M::Movupd
        | M::Movdqu
        | M::Lddqu
        | M::Pcmpestri
        | M::Pcmpestrm
        | M::Pcmpestri64
        | M::Pcmpestrm64
        | M::Pcmpistri
        | M::Pcmpistrm => false,
        M::Vmovaps
        | M::Vmovapd
        | M::Vmovdqa
        | M::Vmovntps
        | M::Vmovntpd
        | M::Vmovntdq
        | M::Vmovntdqa => true,
        _ => i.code().op_code().encoding() == iced_x86::EncodingKind::Legacy,
    }
}

/// Where the operands of one instruction are on the host.
struct Plan {
    instruction: Instruction,
    /// Guest RAX goes to host RAX and is operated on there.
    rax: bool,
    /// RAX is written, so it goes back home.
    rax_written: bool,
    /// Spilled guest registers and the temporaries that stand for them.
    spilled: [Option<(usize, Reg, bool)>; 3],
    /// The one high-byte operand beside a memory operand: its guest register, and whether
    /// it is written.
    high: Option<(usize, bool)>,
    /// RBP stands for guest RSP, whose home needs a REX prefix.
    low_rsp: bool,
    /// Host RAX is used at all.
    uses_rax: bool,
}

fn flag(on: bool, bit: u32) -> u32 {
    if on { bit } else { 0 }
}

fn memory_operand(i: &Instruction) -> Option<u32> {
    (0..i.op_count()).find(|&n| i.op_kind(n) == OpKind::Memory)
}

/// Whether the instruction has a memory operand that it spells out.
pub(super) fn has_memory(i: &Instruction) -> bool {
    memory_operand(i).is_some()
}

/// Whether a plain instruction never faults on the host, so that nobody asks where it is.
pub(super) fn is_harmless(i: &Instruction) -> bool {
    !has_memory(i)
        && !matches!(i.mnemonic(), Mnemonic::Div | Mnemonic::Idiv)
        && !i.has_lock_prefix()
        && extended_state(i) == Extended::No
}

/// BT and its kin with a bit offset in a register.
pub(super) fn is_bit_test(i: &Instruction) -> bool {
    matches!(
        i.mnemonic(),
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
    ) && i.op1_kind() == OpKind::Register
}

/// The guest register and displacement of an operand that is no more than these.
pub(super) fn plain_base(i: &Instruction) -> Option<(usize, i32)> {
    let base = i.memory_base();
    let plain = base.is_gpr64()
        && i.memory_index() == Register::None
        && !matches!(i.memory_segment(), Register::FS | Register::GS);
    plain.then(|| (base.number(), i.memory_displacement64() as i32))
}

impl Lower<'_> {
    /// Lowers a plain instruction; false if it has to be emulated after all.
    pub(super) fn plain(&mut self, original: &Instruction) -> bool {
        let mut instruction = *original;
        modrm_form(&mut instruction);
        instruction.set_has_rep_prefix(false);
        instruction.set_has_repne_prefix(false);
        if !has_memory(&instruction) {
            let free: &[Reg] = if self.in_span {
                &[T0, RAX]
            } else {
                &[T0, T1, RAX]
            };
            let Some(plan) = self.plan(&instruction, false, free) else {
                return false;
            };
            self.body(&plan);
            return true;
        }
        let Some((what, size)) = self.memory_use(&instruction) else {
            return false;
        };
        if is_bit_test(&instruction) {
            self.release_host_flags();
            self.bit_test(&instruction, size, what);
            return true;
        }
        self.operate(&instruction, size, what)
    }

    /// What an instruction does with its memory operand, and to how many bytes. None: not
    /// for translated code.
    pub(super) fn memory_use(&mut self, instruction: &Instruction) -> Option<(u32, u32)> {
        let memory = memory_operand(instruction)?;
        let what = match self.op_access(instruction, memory) {
            OpAccess::Read | OpAccess::CondRead => 0,
            // with an unmasked exception pending, the x87 does not store
            OpAccess::Write if uses_x87(instruction) => meta::STORE | meta::LOAD,
            OpAccess::Write => meta::STORE,
            OpAccess::ReadWrite | OpAccess::ReadCondWrite | OpAccess::CondWrite => {
                meta::STORE | meta::LOAD
            }
            OpAccess::NoMemAccess | OpAccess::None => return None,
        };
        let what = what
            | self.stack_segment(instruction)
            | flag(demands_alignment(instruction), meta::ALIGNED)
            | flag(waits_for_x87(instruction), meta::WAITS);
        let size = bytes_accessed(instruction);
        (1..=512).contains(&size).then_some((what, size))
    }

    /// What an instruction does with one of its operands.
    fn op_access(&mut self, instruction: &Instruction, operand: u32) -> OpAccess {
        let options =
            InstructionInfoOptions::NO_MEMORY_USAGE | InstructionInfoOptions::NO_REGISTER_USAGE;
        let info = self.tools.info.info_options(instruction, options);
        info.op_access(operand)
    }

    /// Whether the instruction changes a general register or part of it.
    pub(super) fn writes_register(&mut self, instruction: &Instruction, register: usize) -> bool {
        let options = InstructionInfoOptions::NO_MEMORY_USAGE;
        let info = self.tools.info.info_options(instruction, options);
        info.used_registers().iter().any(|u| {
            let full = u.register().full_register();
            full.is_gpr() && full.number() == register && writes(u.access())
        })
    }

    /// An instruction with a memory operand, done where the check says.
    fn operate(&mut self, instruction: &Instruction, size: u32, what: u32) -> bool {
        let window = window_number(instruction);
        if let Some((base, disp)) = plain_base(instruction) {
            let home = HOME[base];
            let place = Place {
                base: home.unwrap_or(T0),
                disp,
            };
            let mut replaced = *instruction;
            point_at(&mut replaced, place);
            let free: &[Reg] = if home.is_some() { &[T0, RAX] } else { &[RAX] };
            let plan = self.plan(&replaced, true, free);
            if self.in_span {
                let Some(plan) = plan else {
                    tracing::error!(code = ?instruction.code(), "a span holds what it cannot");
                    return false;
                };
                if home.is_none() {
                    self.asm.load_gs(T0, slot(base));
                }
                self.body(&plan);
                return true;
            }
            if let (Some(plan), Some(_)) = (plan, home) {
                self.release_host_flags();
                self.access_at(place, window, size, what, |s| s.body(&plan));
                return true;
            }
        }
        let mut replaced = *instruction;
        point_at(&mut replaced, Place::T0);
        if let Some(plan) = self.plan(&replaced, true, &[RAX]) {
            self.release_host_flags();
            self.address(instruction, 0);
            self.access_at(Place::T0, window, size, what, |s| s.body(&plan));
            return true;
        }
        replaced.set_memory_index(Register::None);
        let Some(plan) = self.plan(&replaced, true, &[T1, RAX]) else {
            return false;
        };
        self.release_host_flags();
        self.address(instruction, 0);
        self.access(window, size, what, |s| s.body(&plan));
        true
    }

    /// Whether a member of a span, or what stands between two, leaves T1 alone.
    pub(super) fn keeps_t1(&mut self, instruction: &Instruction) -> bool {
        let in_place = |i| {
            let register = instruction.op_register(i);
            !register.is_gpr()
                || !is_high_byte(register) && HOME[register.full_register().number()].is_some()
        };
        let mut operands = 0..instruction.op_count();
        let in_place = operands.all(|i| instruction.op_kind(i) != OpKind::Register || in_place(i));
        if in_place && !implicit_rax(instruction) {
            return true;
        }
        let mut instruction = *instruction;
        modrm_form(&mut instruction);
        let memory = has_memory(&instruction);
        let free: &[Reg] = match plain_base(&instruction) {
            Some((base, disp)) if memory => {
                let home = HOME[base];
                let place = Place {
                    base: home.unwrap_or(T0),
                    disp,
                };
                point_at(&mut instruction, place);
                if home.is_some() { &[T0, RAX] } else { &[RAX] }
            }
            _ => &[T0, RAX],
        };
        self.plan(&instruction, memory, free).is_some()
    }

    /// BT and its kin with a bit offset in a register, which reaches beyond the operand.
    fn bit_test(&mut self, instruction: &Instruction, size: u32, what: u32) {
        let guest = instruction.op1_register().full_register().number();
        let bits = size * 8;
        self.effective_address(instruction, 0);
        let from = self.register(guest, T1);
        match size {
            8 => self.asm.mov(T1, from),
            // movsxd r11, from32
            4 => self.asm.raw(&[0x4c | from.0 >> 3, 0x63, 0xd8 | from.0 & 7]),
            // movsx r11, from16
            _ => self
                .asm
                .raw(&[0x4c | from.0 >> 3, 0x0f, 0xbf, 0xd8 | from.0 & 7]),
        }
        self.asm.shift(7, T1, bits.trailing_zeros() as u8);
        let narrow = instruction.memory_base().size() == 4
            || instruction.memory_index().size() == 4
            || instruction.memory_displ_size() == 4 && instruction.memory_base() == Register::None;
        self.asm
            .lea(T0, Some(T0), Some((T1, size as u8)), 0, narrow);
        self.add_segment_base(instruction);
        let mut replaced = *instruction;
        point_at(&mut replaced, Place::T0);
        replaced.set_memory_index(Register::None);
        replaced.set_op1_register(sized(T1, size as usize));
        self.access(window_number(instruction), size, what, |s| {
            let from = s.register(guest, T1);
            s.asm.mov(T1, from);
            s.asm.and32(T1, bits - 1);
            s.flags_into_host();
            s.encode(&replaced);
            let at = s.flags;
            s.flags = Flags::Host;
            at
        });
    }

    /// How to operate with the temporaries in `free`, RAX the last of them. None: it takes
    /// more.
    fn plan(&mut self, instruction: &Instruction, memory: bool, free: &[Reg]) -> Option<Plan> {
        let mut plan = Plan {
            instruction: *instruction,
            rax: implicit_rax(instruction),
            rax_written: false,
            spilled: [None; 3],
            high: None,
            low_rsp: false,
            uses_rax: false,
        };
        let mut high_byte = false;
        for i in 0..instruction.op_count() {
            if instruction.op_kind(i) != OpKind::Register {
                continue;
            }
            let register = instruction.op_register(i);
            if !is_high_byte(register) {
                continue;
            }
            high_byte = true;
            if memory {
                let guest = register.full_register().number();
                plan.high = Some((guest, writes(self.op_access(instruction, i))));
            }
        }
        if high_byte && !memory {
            // no REX prefix is possible: all operands are operated on in RAX to RDI
            plan.rax = true;
            plan.low_rsp = (0..instruction.op_count()).any(|i| {
                instruction.op_kind(i) == OpKind::Register
                    && instruction.op_register(i).full_register() == Register::RSP
            });
        }
        plan.rax_written = plan.rax && self.writes_register(instruction, gpr::RAX);
        if plan.low_rsp && !free.contains(&T0)
            || plan.high.is_some() && plan.rax && !free.contains(&T1)
        {
            return None;
        }
        let free = if plan.rax || plan.high.is_some() {
            free.strip_suffix(&[RAX]).unwrap_or(free)
        } else {
            free
        };
        plan.uses_rax = plan.rax || plan.high.is_some();
        self.assign(&mut plan, free)?;
        Some(plan)
    }

    /// Replaces the register operands of `plan.instruction`.
    fn assign(&mut self, plan: &mut Plan, free: &[Reg]) -> Option<()> {
        let original = plan.instruction;
        let mut used = 0;
        for i in 0..original.op_count() {
            if original.op_kind(i) != OpKind::Register {
                continue;
            }
            let register = original.op_register(i);
            if !register.is_gpr() {
                continue;
            }
            let guest = register.full_register().number();
            let host = if is_high_byte(register) && plan.high.is_some() {
                // with an implicit accumulator (CMPXCHG) it goes to the other temporary
                let to = if plan.rax { sized(T1, 1) } else { Register::AL };
                plan.instruction.set_op_register(i, to);
                continue;
            } else if plan.rax && guest == 0 {
                RAX
            } else if plan.low_rsp && guest == 4 {
                RBP
            } else if let Some(home) = HOME[guest] {
                home
            } else if let Some((_, temp, written)) =
                plan.spilled.iter_mut().flatten().find(|s| s.0 == guest)
            {
                *written |= writes(self.op_access(&original, i));
                *temp
            } else {
                let temp = *free.get(used)?;
                let written = writes(self.op_access(&original, i));
                plan.spilled[used] = Some((guest, temp, written));
                plan.uses_rax |= temp == RAX;
                used += 1;
                temp
            };
            if is_high_byte(register) {
                // RAX, RCX, RDX and RBX hold their own here
                continue;
            }
            plan.instruction
                .set_op_register(i, sized(host, register.size()));
        }
        Some(())
    }

    /// Emits the instruction itself, its memory operand already at T0. Returns where the
    /// flags are while it executes.
    fn body(&mut self, plan: &Plan) -> Flags {
        let flags = flag_use(&plan.instruction);
        if flags.needs {
            self.flags_into_host();
        }
        let saved = plan.uses_rax && self.borrow_rax();
        if plan.rax {
            self.load_guest_rax();
        }
        if let Some((guest, _)) = plan.high {
            let home = HOME[guest].unwrap_or(RAX);
            if plan.rax {
                self.asm.mov(T1, home);
                self.asm.shift(5, T1, 8);
            } else {
                self.asm.mov(RAX, home);
                self.asm.swap_al_ah();
            }
        }
        for &(guest, temp, _) in plan.spilled.iter().flatten() {
            self.asm.load_gs(temp, slot(guest));
        }
        let at = if saved { Flags::Saved } else { self.flags };
        if self.in_span || plan.instruction.memory_base() == Register::None {
            self.site(at);
        }
        if plan.low_rsp {
            self.asm.mov(T0, RBP);
            self.asm.mov(RBP, GUEST_RSP);
        }
        self.encode(&plan.instruction);
        if plan.low_rsp {
            self.asm.mov(GUEST_RSP, RBP);
            self.asm.mov(RBP, T0);
        }
        for &(guest, temp, written) in plan.spilled.iter().flatten() {
            if written {
                self.asm.store_gs(slot(guest), temp);
            }
        }
        if let Some((guest, true)) = plan.high
            && !plan.rax
        {
            self.asm.swap_al_ah();
            self.set_register(guest, RAX);
        }
        if plan.rax && plan.rax_written {
            self.set_register(0, RAX);
        }
        if flags.writes {
            self.flags = Flags::Host;
        } else if saved {
            self.asm.load_gs(RAX, state_offset!(saved_status));
            self.flags = Flags::Ax;
        }
        at
    }

    /// Appends `instruction` as iced encodes it.
    fn encode(&mut self, instruction: &Instruction) {
        let buffer = std::mem::take(&mut self.asm.bytes);
        let length = buffer.len();
        self.tools.encoder.set_buffer(buffer);
        let result = self.tools.encoder.encode(instruction, 0);
        self.asm.bytes = self.tools.encoder.take_buffer();
        if let Err(error) = result {
            tracing::warn!(%error, code = ?instruction.code(), "an instruction cannot be re-encoded");
            self.asm.bytes.truncate(length);
            self.asm.raw(&[0x0f, 0x0b]); // ud2
        }
    }
}

/// Makes `[base + T1 + disp]` the memory operand.
fn point_at(instruction: &mut Instruction, place: Place) {
    instruction.set_memory_base(sized(place.base, 8));
    instruction.set_memory_index(sized(T1, 8));
    instruction.set_memory_index_scale(1);
    instruction.set_memory_displacement64(place.disp as i64 as u64);
    let bytes = match place.disp {
        0 => 0,
        -128..=127 => 1,
        _ => 8,
    };
    instruction.set_memory_displ_size(bytes);
    instruction.set_segment_prefix(Register::None);
}

const _: () = assert!(T0.0 == 10 && T1.0 == 11 && rflags::CF == 1);
