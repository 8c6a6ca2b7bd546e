//! A small assembler for the fixed sequences around guest instructions: TLB checks, exits
//! and thunks. Guest instructions themselves go through iced's encoder.
//!
//! Only the forms that the translator needs exist. Every method appends one instruction.

use super::access::Place;
use crate::state::state_offset;

/// A host general register, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reg(pub(crate) u8);

/// Holds the guest's status flags (LAHF/SETO form) and serves implicit operands.
pub(crate) const RAX: Reg = Reg(0);
pub(crate) const RCX: Reg = Reg(1);
pub(crate) const RDX: Reg = Reg(2);
pub(crate) const RBX: Reg = Reg(3);
/// The host stack.
pub(crate) const RSP: Reg = Reg(4);
pub(crate) const RBP: Reg = Reg(5);
pub(crate) const RSI: Reg = Reg(6);
pub(crate) const RDI: Reg = Reg(7);
/// First temporary: an address, then the host pointer.
pub(crate) const T0: Reg = Reg(10);
/// Second temporary: TLB index, then a spilled register.
pub(crate) const T1: Reg = Reg(11);
/// Where guest RAX lives.
pub(crate) const GUEST_RAX: Reg = Reg(9);
/// Where guest RSP lives.
pub(crate) const GUEST_RSP: Reg = Reg(15);

/// Host register of each guest register, by guest number; `None` lives in the state block.
pub(crate) const HOME: [Option<Reg>; 16] = [
    Some(GUEST_RAX),
    Some(Reg(1)),
    Some(Reg(2)),
    Some(Reg(3)),
    Some(GUEST_RSP),
    Some(Reg(5)),
    Some(Reg(6)),
    Some(Reg(7)),
    Some(Reg(8)),
    None,
    None,
    None,
    Some(Reg(12)),
    Some(Reg(13)),
    Some(Reg(14)),
    None,
];

/// GS displacement of a guest register's slot.
pub(crate) fn slot(guest: usize) -> i32 {
    state_offset!(gpr) + 8 * guest as i32
}

/// Two-operand arithmetic, by its number in the 0x80 opcode group.
#[derive(Clone, Copy)]
pub(crate) enum Alu {
    Add = 0,
    Or = 1,
    And = 4,
    Sub = 5,
    Xor = 6,
    Cmp = 7,
}

/// Condition codes (Intel SDM vol. 2 appendix B).
pub(crate) mod cc {
    pub(crate) const B: u8 = 2;
    pub(crate) const AE: u8 = 3;
    pub(crate) const E: u8 = 4;
    pub(crate) const NE: u8 = 5;
    pub(crate) const A: u8 = 7;
}

/// Machine code being written for a known address.
#[derive(Default)]
pub(crate) struct Asm {
    pub(crate) bytes: Vec<u8>,
    /// Host address of `bytes[0]` when executed.
    pub(crate) base: u64,
}

impl Asm {
    pub(crate) fn new(base: u64) -> Self {
        Self {
            bytes: Vec::with_capacity(1024),
            base,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Host address of the next byte.
    pub(crate) fn here(&self) -> u64 {
        self.base + self.bytes.len() as u64
    }

    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    fn imm32(&mut self, value: i32) {
        self.raw(&value.to_le_bytes());
    }

    fn rex_w(&mut self, reg: Reg, base: Reg) {
        self.raw(&[0x48 | (reg.0 >> 3) << 2 | base.0 >> 3]);
    }

    /// ModRM and displacement for `[base + disp]`.
    fn modrm_mem(&mut self, reg: u8, base: Reg, disp: i32) {
        let rm = base.0 & 7;
        let (mode, short) = match disp {
            0 if rm != 5 => (0, true),
            -128..=127 => (1, true),
            _ => (2, false),
        };
        self.raw(&[mode << 6 | (reg & 7) << 3 | rm]);
        if rm == 4 {
            self.raw(&[0x24]);
        }
        match mode {
            0 => {}
            _ if short => self.raw(&[disp as u8]),
            _ => self.imm32(disp),
        }
    }

    fn modrm_gs(&mut self, reg: u8, disp: i32) {
        self.raw(&[(reg & 7) << 3 | 4, 0x25]);
        self.imm32(disp);
    }

    /// `mov to, from`
    pub(crate) fn mov(&mut self, to: Reg, from: Reg) {
        if to != from {
            self.rex_w(from, to);
            self.raw(&[0x89, 0xc0 | (from.0 & 7) << 3 | to.0 & 7]);
        }
    }

    /// `mov to, value` in its shortest form; flags stay.
    pub(crate) fn mov_imm(&mut self, to: Reg, value: u64) {
        if let Ok(small) = u32::try_from(value) {
            if to.0 > 7 {
                self.raw(&[0x41]);
            }
            self.raw(&[0xb8 | to.0 & 7]);
            self.raw(&small.to_le_bytes());
        } else if let Ok(signed) = i32::try_from(value as i64) {
            self.rex_w(Reg(0), to);
            self.raw(&[0xc7, 0xc0 | to.0 & 7]);
            self.imm32(signed);
        } else {
            self.rex_w(Reg(0), to);
            self.raw(&[0xb8 | to.0 & 7]);
            self.raw(&value.to_le_bytes());
        }
    }

    /// `mov to, gs:[disp]`
    pub(crate) fn load_gs(&mut self, to: Reg, disp: i32) {
        self.raw(&[0x65]);
        self.rex_w(to, Reg(0));
        self.raw(&[0x8b]);
        self.modrm_gs(to.0, disp);
    }

    /// `mov gs:[disp], from`
    pub(crate) fn store_gs(&mut self, disp: i32, from: Reg) {
        self.raw(&[0x65]);
        self.rex_w(from, Reg(0));
        self.raw(&[0x89]);
        self.modrm_gs(from.0, disp);
    }

    /// `mov gs:[disp + index], from`
    pub(crate) fn store_gs_indexed(&mut self, disp: i32, index: Reg, from: Reg) {
        self.raw(&[0x65]);
        self.rex_w(from, index);
        self.raw(&[0x89, 0x80 | (from.0 & 7) << 3 | index.0 & 7]);
        self.imm32(disp);
    }

    /// `mov qword gs:[disp], value`
    pub(crate) fn store_gs_imm(&mut self, disp: i32, value: i32) {
        self.raw(&[0x65, 0x48, 0xc7]);
        self.modrm_gs(0, disp);
        self.imm32(value);
    }

    /// `op reg, gs:[disp]`
    pub(crate) fn alu_gs(&mut self, op: Alu, reg: Reg, disp: i32) {
        self.raw(&[0x65]);
        self.rex_w(reg, Reg(0));
        self.raw(&[(op as u8) << 3 | 3]);
        self.modrm_gs(reg.0, disp);
    }

    /// `op gs:[disp + index], from`, 64 bits
    pub(crate) fn alu_gs_indexed(&mut self, op: Alu, disp: i32, index: Reg, from: Reg) {
        self.raw(&[0x65]);
        self.rex_w(from, index);
        self.raw(&[(op as u8) << 3 | 1, 0x80 | (from.0 & 7) << 3 | index.0 & 7]);
        self.imm32(disp);
    }

    /// `op qword gs:[disp], value`
    pub(crate) fn alu_gs_imm(&mut self, op: Alu, disp: i32, value: i32) {
        self.raw(&[0x65, 0x48, 0x81]);
        self.modrm_gs(op as u8, disp);
        self.imm32(value);
    }

    /// `cmp dword gs:[disp], 0`, nine bytes.
    pub(crate) fn test_gs_zero(&mut self, disp: i32) {
        self.raw(&[0x65, 0x83]);
        self.modrm_gs(7, disp);
        self.raw(&[0]);
    }

    /// `mov byte gs:[disp], value`
    pub(crate) fn store_gs_byte(&mut self, disp: i32, value: u8) {
        self.raw(&[0x65, 0xc6]);
        self.modrm_gs(0, disp);
        self.raw(&[value]);
    }

    /// `cmp byte gs:[disp], value`
    pub(crate) fn cmp_gs_byte(&mut self, disp: i32, value: u8) {
        self.raw(&[0x65, 0x80]);
        self.modrm_gs(7, disp);
        self.raw(&[value]);
    }

    /// `test dword gs:[disp], mask`
    pub(crate) fn test_gs(&mut self, disp: i32, mask: u32) {
        self.raw(&[0x65, 0xf7]);
        self.modrm_gs(0, disp);
        self.raw(&mask.to_le_bytes());
    }

    /// `movzx to, word gs:[disp]`
    pub(crate) fn load_gs_word(&mut self, to: Reg, disp: i32) {
        self.raw(&[0x65, 0x40 | (to.0 >> 3) << 2, 0x0f, 0xb7]);
        self.modrm_gs(to.0, disp);
    }

    /// `imul to, from, value`
    pub(crate) fn multiply(&mut self, to: Reg, from: Reg, value: i32) {
        self.rex_w(to, from);
        self.raw(&[0x69, 0xc0 | (to.0 & 7) << 3 | from.0 & 7]);
        self.imm32(value);
    }

    /// `test reg, mask`, 32 bits
    pub(crate) fn test32(&mut self, reg: Reg, mask: u32) {
        self.raw(&[0x40 | reg.0 >> 3, 0xf7, 0xc0 | reg.0 & 7]);
        self.raw(&mask.to_le_bytes());
    }

    /// `op reg, [base + disp]`, 64 bits
    pub(crate) fn alu_mem(&mut self, op: Alu, reg: Reg, base: Reg, disp: i32) {
        self.rex_w(reg, base);
        self.raw(&[(op as u8) << 3 | 3]);
        self.modrm_mem(reg.0, base, disp);
    }

    /// `op to, from`, 64 bits
    pub(crate) fn alu(&mut self, op: Alu, to: Reg, from: Reg) {
        self.rex_w(from, to);
        self.raw(&[(op as u8) << 3 | 1, 0xc0 | (from.0 & 7) << 3 | to.0 & 7]);
    }

    /// REX, opcode, ModRM, SIB and displacement for `[place.base + T1 + place.disp]`.
    fn at_place(&mut self, place: Place, reg: u8, opcode: u8, size: u32) {
        if size == 2 {
            self.raw(&[0x66]);
        }
        let wide = if size == 8 { 8 } else { 0 };
        let rex = 0x40 | wide | (reg >> 3) << 2 | (T1.0 >> 3) << 1 | place.base.0 >> 3;
        let short = i8::try_from(place.disp).is_ok();
        let mode = if short { 0x40 } else { 0x80 };
        let sib = (T1.0 & 7) << 3 | place.base.0 & 7;
        self.raw(&[rex, opcode, mode | (reg & 7) << 3 | 4, sib]);
        if short {
            self.raw(&[place.disp as u8]);
        } else {
            self.imm32(place.disp);
        }
    }

    /// `mov to, [place]` of 8 bytes, or of 2 that keeps the rest of `to`
    pub(crate) fn load_at(&mut self, to: Reg, place: Place, size: u32) {
        self.at_place(place, to.0, 0x8b, size);
    }

    /// `mov [place], from`; 8 or 2 bytes
    pub(crate) fn store_at(&mut self, place: Place, from: Reg, size: u32) {
        self.at_place(place, from.0, 0x89, size);
    }

    /// `mov [place], value`; 8 or 2 bytes, the value sign-extended
    pub(crate) fn store_imm_at(&mut self, place: Place, value: i32, size: u32) {
        self.at_place(place, 0, 0xc7, size);
        if size == 2 {
            self.raw(&(value as i16).to_le_bytes());
        } else {
            self.imm32(value);
        }
    }

    /// `op reg, value`, 64 bits
    pub(crate) fn alu_imm(&mut self, op: Alu, reg: Reg, value: i32) {
        self.rex_w(Reg(0), reg);
        if let Ok(short) = i8::try_from(value) {
            self.raw(&[0x83, 0xc0 | (op as u8) << 3 | reg.0 & 7, short as u8]);
        } else {
            self.raw(&[0x81, 0xc0 | (op as u8) << 3 | reg.0 & 7]);
            self.imm32(value);
        }
    }

    /// `and reg, value`, 32 bits: clears the upper half too
    pub(crate) fn and32(&mut self, reg: Reg, value: u32) {
        if reg.0 > 7 {
            self.raw(&[0x41]);
        }
        self.raw(&[0x81, 0xe0 | reg.0 & 7]);
        self.raw(&value.to_le_bytes());
    }

    /// `shl`, `shr` or `sar` by a constant, 64 bits; `group` is 4, 5 or 7
    pub(crate) fn shift(&mut self, group: u8, reg: Reg, count: u8) {
        self.rex_w(Reg(0), reg);
        self.raw(&[0xc1, 0xc0 | group << 3 | reg.0 & 7, count]);
    }

    /// `mov to, [base + disp]`, 64 bits
    pub(crate) fn load(&mut self, to: Reg, base: Reg, disp: i32) {
        self.rex_w(to, base);
        self.raw(&[0x8b]);
        self.modrm_mem(to.0, base, disp);
    }

    /// `mov [base], from`; 8 or 2 bytes
    pub(crate) fn store_sized(&mut self, base: Reg, from: Reg, size: u32) {
        if size == 2 {
            self.raw(&[0x66, 0x40 | (from.0 >> 3) << 2 | base.0 >> 3]);
        } else {
            self.rex_w(from, base);
        }
        self.raw(&[0x89]);
        self.modrm_mem(from.0, base, 0);
    }

    /// `mov to, [base]` of 8 bytes, or `mov to16, [base]` of 2 that keeps the rest of `to`
    pub(crate) fn load_sized(&mut self, to: Reg, base: Reg, size: u32) {
        if size == 2 {
            self.raw(&[0x66, 0x40 | (to.0 >> 3) << 2 | base.0 >> 3, 0x8b]);
            self.modrm_mem(to.0, base, 0);
        } else {
            self.load(to, base, 0);
        }
    }

    /// `lea to, [base + index * scale + disp]`; flags stay. `narrow`: 32-bit result.
    pub(crate) fn lea(
        &mut self,
        to: Reg,
        base: Option<Reg>,
        index: Option<(Reg, u8)>,
        disp: i32,
        narrow: bool,
    ) {
        let x = index.map_or(0, |(r, _)| r.0 >> 3);
        let b = base.map_or(0, |r| r.0 >> 3);
        let wide = if narrow { 0 } else { 8 };
        self.raw(&[0x40 | wide | (to.0 >> 3) << 2 | x << 1 | b, 0x8d]);
        let reg = (to.0 & 7) << 3;
        match (base, index) {
            (Some(base), None) => self.modrm_mem(to.0, base, disp),
            (None, None) => {
                self.raw(&[reg | 4, 0x25]);
                self.imm32(disp);
            }
            (base, Some((index, scale))) => {
                let sib = (scale.trailing_zeros() as u8) << 6 | (index.0 & 7) << 3;
                if let Some(base) = base {
                    let short = i8::try_from(disp).is_ok();
                    let mode = if short { 0x40 } else { 0x80 };
                    self.raw(&[mode | reg | 4, sib | base.0 & 7]);
                    if short {
                        self.raw(&[disp as u8]);
                    } else {
                        self.imm32(disp);
                    }
                } else {
                    self.raw(&[reg | 4, sib | 5]);
                    self.imm32(disp);
                }
            }
        }
    }

    /// Status flags into AX: `lahf; seto al`
    pub(crate) fn flags_to_ax(&mut self) {
        self.raw(&[0x9f, 0x0f, 0x90, 0xc0]);
    }

    /// Status flags from AX, which stays: `cmp al, 0x81` overflows exactly when AL is 1,
    /// then `sahf` sets the others.
    pub(crate) fn flags_from_ax(&mut self) {
        self.raw(&[0x3c, 0x81, 0x9e]);
    }

    /// `xchg al, ah`
    pub(crate) fn swap_al_ah(&mut self) {
        self.raw(&[0x86, 0xe0]);
    }

    /// `jmp target` (32-bit displacement)
    pub(crate) fn jmp(&mut self, target: u64) {
        self.raw(&[0xe9]);
        self.rel32(target);
    }

    /// `call target`
    pub(crate) fn call(&mut self, target: u64) {
        self.raw(&[0xe8]);
        self.rel32(target);
    }

    /// `jcc target`
    pub(crate) fn jcc(&mut self, condition: u8, target: u64) {
        self.raw(&[0x0f, 0x80 | condition]);
        self.rel32(target);
    }

    fn rel32(&mut self, target: u64) {
        let next = self.here() + 4;
        self.imm32(target.wrapping_sub(next) as i32);
    }

    /// `jcc` or `jmp` to be aimed later; returns where its displacement is.
    pub(crate) fn jcc_forward(&mut self, condition: u8) -> usize {
        self.raw(&[0x0f, 0x80 | condition, 0, 0, 0, 0]);
        self.len() - 4
    }

    /// `jmp` to be aimed later.
    pub(crate) fn jmp_forward(&mut self) -> usize {
        self.raw(&[0xe9, 0, 0, 0, 0]);
        self.len() - 4
    }

    /// `call` to be aimed later.
    pub(crate) fn call_forward(&mut self) -> usize {
        self.raw(&[0xe8, 0, 0, 0, 0]);
        self.len() - 4
    }

    /// `ret`
    pub(crate) fn ret(&mut self) {
        self.raw(&[0xc3]);
    }

    /// `cmp reg, [rip + ...]`, 64 bits; returns where the displacement is.
    pub(crate) fn cmp_constant(&mut self, reg: Reg) -> usize {
        self.rex_w(reg, Reg(0));
        self.raw(&[0x3b, (reg.0 & 7) << 3 | 5, 0, 0, 0, 0]);
        self.len() - 4
    }

    /// Aims a forward jump at the next byte.
    pub(crate) fn aim(&mut self, at: usize) {
        let distance = (self.len() - at - 4) as i32;
        self.bytes[at..at + 4].copy_from_slice(&distance.to_le_bytes());
    }

    /// `jmp [base + disp]`
    pub(crate) fn jmp_mem(&mut self, base: Reg, disp: i32) {
        self.raw(&[0x40 | base.0 >> 3, 0xff]);
        self.modrm_mem(4, base, disp);
    }

    /// `jmp reg`
    pub(crate) fn jmp_reg(&mut self, reg: Reg) {
        self.raw(&[0x40 | reg.0 >> 3, 0xff, 0xe0 | reg.0 & 7]);
    }

    /// `push value`
    pub(crate) fn push_imm(&mut self, value: u32) {
        self.raw(&[0x68]);
        self.raw(&value.to_le_bytes());
    }

    pub(crate) fn push(&mut self, reg: Reg) {
        if reg.0 > 7 {
            self.raw(&[0x41]);
        }
        self.raw(&[0x50 | reg.0 & 7]);
    }

    pub(crate) fn pop(&mut self, reg: Reg) {
        if reg.0 > 7 {
            self.raw(&[0x41]);
        }
        self.raw(&[0x58 | reg.0 & 7]);
    }

    /// `xsave64 gs:[disp]` or `xrstor64`, for the components in EDX:EAX
    pub(crate) fn xsave(&mut self, disp: i32) {
        self.raw(&[0x65, 0x48, 0x0f, 0xae]);
        self.modrm_gs(4, disp);
    }

    pub(crate) fn xrstor(&mut self, disp: i32) {
        self.raw(&[0x65, 0x48, 0x0f, 0xae]);
        self.modrm_gs(5, disp);
    }

    /// `ldmxcsr gs:[disp]`
    pub(crate) fn ldmxcsr(&mut self, disp: i32) {
        self.raw(&[0x65, 0x0f, 0xae]);
        self.modrm_gs(2, disp);
    }

    /// `stmxcsr gs:[disp]`
    pub(crate) fn stmxcsr(&mut self, disp: i32) {
        self.raw(&[0x65, 0x0f, 0xae]);
        self.modrm_gs(3, disp);
    }

    /// Moves vector register `number` to (`store`) or from `gs:[disp]`: all 32 bytes of a
    /// YMM register with `avx`, else 16.
    pub(crate) fn move_vector(&mut self, number: u8, disp: i32, store: bool, avx: bool) {
        let high = number > 7;
        match (avx, high) {
            (true, false) => self.raw(&[0x65, 0xc5, 0xfc]),
            (true, true) => self.raw(&[0x65, 0xc5, 0x7c]),
            (false, false) => self.raw(&[0x65, 0x0f]),
            (false, true) => self.raw(&[0x65, 0x44, 0x0f]),
        }
        self.raw(&[0x10 | u8::from(store)]);
        self.modrm_gs(number, disp);
    }
}
