//! The fixed pieces of code at the start of the cache: the way in, the ways out, the slow
//! path of memory accesses, and the loading of extended state.
//!
//! Called by translated code only, which runs on the return stacks. Rust runs on the stack that
//! translated code was entered from.

use super::asm::{
    Alu, Asm, GUEST_RAX, HOME, RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP, Reg, T0, T1, cc, slot,
};
use super::lower::meta;
use super::transfer::{jump_through_cache, jump_through_neighbour};
use super::{draft, repeat};
use crate::mmu::{
    AddressSpace, Rights, TLB_ENTRIES, TLBS, TlbEntry, Wide, jump_table, tlb_number, window_kind,
};
use crate::returns::stack_number;
use crate::state::{WIDE_WINDOWS, WINDOWS, WideWindow, Window, WindowSet, state_offset};

/// Why translated code came back. The values are what the exit thunks put in EAX.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Leave {
    /// `rip` has no block in the jump cache.
    Lookup = 0,
    /// As `Lookup`, and a jump may be chained: the one whose stub's end is in `temp[0]`.
    Link = 1,
    /// The instruction at `rip` is for `system::execute`; its number is in `temp[0]`.
    System = 2,
    /// A slow path raised an exception, or wants the instruction run alone.
    Exception = 3,
    /// The attention word was set at a block's start, or the block was thrown away.
    Attention = 4,
    /// The host faulted in translated code; see `host_fault`.
    HostFault = 5,
    /// As `Lookup`, after an indirect branch whose address is in `temp[0]`.
    Branch = 6,
    /// The instruction at `rip` raises the exception in `temp[0]` with error code 0.
    Fault = 7,
    /// As `Lookup`, for a block that checks every access by itself.
    Apart = 8,
    /// A draft was to begin; the address behind its first instruction is in `temp[0]`. The
    /// attention word was set, it was thrown away, or it is to be made anew as a whole.
    Draft = 9,
}

impl Leave {
    pub(crate) fn from_code(code: u32) -> Self {
        match code {
            0 => Self::Lookup,
            1 => Self::Link,
            2 => Self::System,
            3 => Self::Exception,
            5 => Self::HostFault,
            6 => Self::Branch,
            7 => Self::Fault,
            8 => Self::Apart,
            9 => Self::Draft,
            _ => Self::Attention,
        }
    }
}

/// Rust's side of the slow paths.
pub(crate) struct Callbacks {
    /// `fn(runtime, address, meta, return address) -> host pointer or null`
    pub(crate) access: u64,
    /// `fn(runtime)`
    pub(crate) commit: u64,
}

/// Addresses of the thunks.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Thunks {
    pub(crate) enter: u64,
    pub(crate) lookup: u64,
    pub(crate) link: u64,
    /// As `lookup`, of 64-bit code, by [`Rights`]: after a look at the neighbouring line of
    /// the jump cache.
    pub(crate) far_lookup: [u64; 3],
    /// As `branch`, likewise.
    pub(crate) far_branch: [u64; 3],
    /// Instead of `link`, for targets that must not be chained: to the guest address in T0
    /// through the jump cache, by [`Rights`].
    pub(crate) unchained: [u64; 3],
    pub(crate) branch: u64,
    /// To the guest address in T0, where a return meant for elsewhere came back; T1 is the
    /// return's own. By the return stack's number.
    pub(crate) returned: [u64; 2],
    /// The same, where the return stack is empty.
    pub(crate) bottom: [u64; 2],
    pub(crate) repeat: repeat::Thunks,
    pub(crate) system: u64,
    pub(crate) attention: u64,
    pub(crate) host_fault: u64,
    pub(crate) fault: u64,
    pub(crate) fpu_load: u64,
    pub(crate) commit: u64,
    pub(crate) apart: u64,
    pub(crate) draft: draft::Thunks,
    /// Slow path of an access, through the TLB first. Indexed by [`slow_index`].
    pub(crate) slow: [u64; TLBS],
    /// The same without the TLB.
    pub(crate) slow_always: [u64; TLBS],
}

/// Which slow thunk.
pub(crate) fn slow_index(rights: Rights, store: bool) -> usize {
    tlb_number(rights, store)
}

/// Offset of the windows of a kind in the state block.
pub(crate) fn window_offset(kind: usize) -> i32 {
    state_offset!(windows) + (kind * size_of::<[Window; WINDOWS]>()) as i32
}

/// Offset of a wide window in the state block.
pub(crate) fn wide_offset(which: Wide) -> i32 {
    let row = usize::from(which.store) * WIDE_WINDOWS;
    let number = row + usize::from(which.number);
    state_offset!(wide) + (number * size_of::<WideWindow>()) as i32
}

/// Offset of a TLB's tags in the address space; their deltas are [`DELTA`] further.
pub(crate) fn tag_offset(rights: Rights, store: bool) -> i32 {
    let table = tlb_number(rights, store) * size_of::<[TlbEntry; TLB_ENTRIES]>();
    (std::mem::offset_of!(AddressSpace, tlb) + table + std::mem::offset_of!(TlbEntry, tag)) as i32
}

/// Distance of a line's delta from its tag.
pub(crate) const DELTA: i32 =
    (std::mem::offset_of!(TlbEntry, delta) - std::mem::offset_of!(TlbEntry, tag)) as i32;

const CALLEE_SAVED: [Reg; 6] = [RBX, RBP, Reg(12), Reg(13), Reg(14), Reg(15)];
const CALLER_SAVED_GUESTS: [usize; 6] = [0, 1, 2, 6, 7, 8];

fn save_guests(a: &mut Asm) {
    for (guest, home) in HOME.iter().enumerate() {
        if let Some(reg) = home {
            a.store_gs(slot(guest), *reg);
        }
    }
    a.store_gs(state_offset!(status), RAX);
}

fn fpu_mask(a: &mut Asm, mask: u32) {
    a.mov_imm(RAX, u64::from(mask));
    a.mov_imm(RDX, 0);
}

/// Saves extended state and gives Rust a default MXCSR. Clobbers RAX, RDX.
fn fpu_save(a: &mut Asm, mask: u32) {
    fpu_mask(a, mask);
    a.xsave(state_offset!(xsave));
    a.ldmxcsr(state_offset!(default_mxcsr));
    if mask & 4 != 0 {
        a.raw(&[0xc5, 0xf8, 0x77]); // vzeroupper
    }
}

/// Puts aside what Rust code may clobber of loaded extended state: the vector registers
/// and MXCSR. The x87 registers stay where they are, since Rust code does not use them.
fn vectors_save(a: &mut Asm, mask: u32) {
    a.test_gs_zero(state_offset!(fpu_loaded));
    let idle = a.jcc_forward(cc::E);
    for number in 0..16 {
        let at = state_offset!(vectors) + 32 * i32::from(number);
        a.move_vector(number, at, true, mask & 4 != 0);
    }
    a.stmxcsr(state_offset!(mxcsr));
    a.ldmxcsr(state_offset!(default_mxcsr));
    a.aim(idle);
}

/// Undoes [`vectors_save`]; keeps the general registers.
fn vectors_restore(a: &mut Asm, mask: u32) {
    a.test_gs_zero(state_offset!(fpu_loaded));
    let idle = a.jcc_forward(cc::E);
    for number in 0..16 {
        let at = state_offset!(vectors) + 32 * i32::from(number);
        a.move_vector(number, at, false, mask & 4 != 0);
    }
    a.ldmxcsr(state_offset!(mxcsr));
    a.aim(idle);
}

/// Calls a function on Rust's stack. Clobbers RBX and what functions may clobber.
fn call_rust(a: &mut Asm, function: u64) {
    a.mov(RBX, RSP);
    a.load_gs(RSP, state_offset!(host_rsp));
    a.mov_imm(RAX, function);
    a.raw(&[0xff, 0xd0]); // call rax
    a.mov(RSP, RBX);
}

/// Writes all thunks into `a`, for the extended-state components in `mask`.
pub(crate) fn emit(a: &mut Asm, mask: u32, callbacks: &Callbacks) -> Thunks {
    let mut thunks = Thunks {
        enter: enter(a),
        ..Thunks::default()
    };
    let leave = leave_common(a, mask);
    let out = |a: &mut Asm, reason: Leave, with_number: bool| {
        let at = a.here();
        a.store_gs(state_offset!(rip), T0);
        if with_number {
            a.store_gs(state_offset!(temp), T1);
        }
        a.store_gs(state_offset!(status), RAX);
        a.mov_imm(RAX, reason as u64);
        a.jmp(leave);
        at
    };
    thunks.lookup = out(a, Leave::Lookup, false);
    thunks.apart = out(a, Leave::Apart, false);
    thunks.link = a.here();
    a.pop(T1);
    out(a, Leave::Link, true);
    for rights in Rights::ALL {
        let lookup = neighbour(a, rights, thunks.lookup);
        thunks.far_lookup[rights as usize] = lookup;
        thunks.unchained[rights as usize] = unchained(a, rights, lookup);
    }
    thunks.repeat = repeat::emit(a);
    thunks.branch = out(a, Leave::Branch, true);
    for rights in Rights::ALL {
        thunks.far_branch[rights as usize] = neighbour(a, rights, thunks.branch);
    }
    for rights in [Rights::Supervisor, Rights::User] {
        let number = stack_number(rights);
        let far_branch = thunks.far_branch[rights as usize];
        (thunks.bottom[number], thunks.returned[number]) = returned(a, rights, far_branch);
    }
    thunks.system = out(a, Leave::System, true);
    thunks.attention = out(a, Leave::Attention, false);
    thunks.fault = out(a, Leave::Fault, true);
    thunks.host_fault = a.here();
    a.store_gs(state_offset!(status), RAX);
    a.mov_imm(RAX, Leave::HostFault as u64);
    a.jmp(leave);
    thunks.fpu_load = fpu_load(a, mask);
    thunks.commit = commit(a, mask, callbacks.commit);
    for rights in Rights::ALL {
        for store in [false, true] {
            thunks.slow_always[slow_index(rights, store)] = slow(a, mask, callbacks.access, leave);
        }
    }
    for rights in Rights::ALL {
        for store in [false, true] {
            let index = slow_index(rights, store);
            thunks.slow[index] = through_tlb(a, rights, store, thunks.slow_always[index]);
        }
    }
    thunks.draft = draft::emit(a, &thunks.slow_always, leave);
    thunks
}

/// `extern "sysv64" fn(code) -> u32`
fn enter(a: &mut Asm) -> u64 {
    let at = a.here();
    for reg in CALLEE_SAVED {
        a.push(reg);
    }
    a.alu_imm(Alu::Add, RSP, -8);
    a.store_gs(state_offset!(host_rsp), RSP);
    a.mov(T0, RDI);
    let base = |rights| state_offset!(return_bases) + 8 * stack_number(rights) as i32;
    a.load_gs(RSP, base(Rights::User));
    a.store_gs(state_offset!(user_returns), RSP);
    a.cmp_gs_byte(state_offset!(cpl), 3);
    let user = a.jcc_forward(cc::E);
    a.load_gs(RSP, base(Rights::Supervisor));
    a.aim(user);
    for (guest, home) in HOME.iter().enumerate() {
        if let Some(reg) = home {
            a.load_gs(*reg, slot(guest));
        }
    }
    a.load_gs(RAX, state_offset!(status));
    a.jmp_reg(T0);
    at
}

/// All ways out end here, with the reason in EAX and the status flags saved.
fn leave_common(a: &mut Asm, mask: u32) -> u64 {
    let at = a.here();
    for (guest, home) in HOME.iter().enumerate() {
        if let Some(reg) = home {
            a.store_gs(slot(guest), *reg);
        }
    }
    a.test_gs_zero(state_offset!(fpu_loaded));
    let idle = a.jcc_forward(cc::E);
    a.mov(RCX, RAX);
    fpu_save(a, mask);
    a.store_gs_imm(state_offset!(fpu_loaded), 0);
    a.mov(RAX, RCX);
    a.aim(idle);
    a.load_gs(RSP, state_offset!(host_rsp));
    a.alu_imm(Alu::Add, RSP, 8);
    for reg in CALLEE_SAVED.into_iter().rev() {
        a.pop(reg);
    }
    a.raw(&[0xc3]);
    at
}

fn fpu_load(a: &mut Asm, mask: u32) -> u64 {
    let at = a.here();
    a.store_gs(state_offset!(temp), RAX);
    a.mov(T1, RDX);
    fpu_mask(a, mask);
    a.xrstor(state_offset!(xsave));
    a.store_gs_imm(state_offset!(fpu_loaded), 1);
    a.mov(RDX, T1);
    a.load_gs(RAX, state_offset!(temp));
    a.raw(&[0xc3]);
    at
}

/// To the guest address in T0, which is not in its own line of the jump cache, through the
/// neighbouring one; or else to `out`. Keeps T1 for it.
fn neighbour(a: &mut Asm, rights: Rights, out: u64) -> u64 {
    let at = a.here();
    a.store_gs(state_offset!(temp) + 8, RAX);
    let miss = jump_through_neighbour(a, jump_table(rights, false));
    a.aim(miss);
    a.load_gs(RAX, state_offset!(temp) + 8);
    a.jmp(out);
    at
}

/// To the guest address in T0 through the jump cache, keeping T1 for when it is not there.
/// The first way in has the return stack empty again.
fn returned(a: &mut Asm, rights: Rights, far_branch: u64) -> (u64, u64) {
    let bottom = a.here();
    let base = state_offset!(return_bases) + 8 * stack_number(rights) as i32;
    a.load_gs(RSP, base);
    let returned = a.here();
    a.store_gs(state_offset!(temp), T1);
    let miss = jump_through_cache(a, jump_table(rights, false));
    a.aim(miss);
    a.load_gs(T1, state_offset!(temp));
    a.jmp(far_branch);
    (bottom, returned)
}

/// To the guest address in T0 through the jump cache.
fn unchained(a: &mut Asm, rights: Rights, lookup: u64) -> u64 {
    let at = a.here();
    let miss = jump_through_cache(a, jump_table(rights, false));
    a.aim(miss);
    a.jmp(lookup);
    at
}

/// The address of the TLB line for the linear address in `address` into T1, less the tags'
/// offset.
pub(crate) fn line_of(a: &mut Asm, address: Reg) {
    let shift = size_of::<TlbEntry>().trailing_zeros() as u8;
    a.mov(T1, address);
    a.shift(5, T1, 12);
    a.alu(Alu::Xor, T1, address);
    a.shift(5, T1, 12 - shift);
    a.and32(T1, ((TLB_ENTRIES - 1) * size_of::<TlbEntry>()) as u32);
    a.alu_gs(Alu::Add, T1, state_offset!(space));
}

/// Looks an access up in the TLB. One that is there has its window filled; one
/// that crosses into a page that follows in host memory too is done in place; a span that
/// crosses otherwise goes apart. All else goes on with `slow`. In and out as there.
fn through_tlb(a: &mut Asm, rights: Rights, store: bool, slow: u64) -> u64 {
    let at = a.here();
    let tag = tag_offset(rights, store);
    a.push(RAX);
    a.push(RCX);
    line_of(a, T0);
    // the distance from the page that the line is of
    a.mov(RAX, T0);
    a.alu_mem(Alu::Sub, RAX, T1, tag);
    a.alu_imm(Alu::Cmp, RAX, 4095);
    let miss = a.jcc_forward(cc::A);
    let crosses = window_kind(rights, store).map(|kind| {
        a.raw(&[0x8b, 0x4c, 0x24, 24]); // mov ecx, [rsp + 24]: meta
        a.raw(&[0x0f, 0xb7, 0xc9]); // movzx ecx, cx
        a.alu(Alu::Add, RAX, RCX);
        a.alu_imm(Alu::Cmp, RAX, 4096);
        let crosses = a.jcc_forward(cc::A);
        a.raw(&[0x8b, 0x4c, 0x24, 24]);
        a.shift(5, RCX, meta::WINDOW_SHIFT as u8);
        let counted = (rights == Rights::User).then(|| count_fill(a, store));
        fill_window(a, kind, tag);
        a.pop(RCX);
        a.pop(RAX);
        a.raw(&[0xc2, 8, 0]); // ret 8
        (crosses, counted)
    });
    if let Some((crosses, _)) = crosses {
        a.aim(crosses);
    }
    a.load(RAX, T1, tag);
    a.load(RCX, T1, tag + DELTA);
    a.alu_imm(Alu::Add, RAX, 4096);
    line_of(a, RAX);
    a.alu_mem(Alu::Cmp, RAX, T1, tag);
    let absent = a.jcc_forward(cc::NE);
    a.alu_mem(Alu::Cmp, RCX, T1, tag + DELTA);
    let elsewhere = a.jcc_forward(cc::NE);
    a.mov(T1, RCX);
    a.pop(RCX);
    a.pop(RAX);
    a.raw(&[0xc2, 8, 0]); // ret 8
    a.aim(absent);
    a.aim(elsewhere);
    a.raw(&[0xf7, 0x44, 0x24, 24]); // test dword [rsp + 24], SPAN
    a.raw(&meta::SPAN.to_le_bytes());
    let single = a.jcc_forward(cc::E);
    a.pop(RCX);
    a.pop(RAX);
    a.raw(&[0x48, 0x83, 0x04, 0x24, 5]); // add qword [rsp], 5
    a.raw(&[0xc2, 8, 0]); // ret 8
    a.aim(miss);
    a.aim(single);
    if let Some((_, Some(counted))) = crosses {
        a.aim(counted);
    }
    a.pop(RCX);
    a.pop(RAX);
    a.jmp(slow);
    at
}

/// Counts a fill of the window whose number is in RCX. Returns the jump to aim for where Rust is
/// to be asked.
fn count_fill(a: &mut Asm, store: bool) -> usize {
    let fills =
        state_offset!(window_fills) + (usize::from(store) * size_of::<[u32; WINDOWS]>()) as i32;
    a.raw(&[0x65, 0xff, 0x0c, 0x8d]); // dec dword gs:[rcx * 4 + fills]
    a.raw(&fills.to_le_bytes());
    a.jcc_forward(cc::E)
}

/// Fills the window whose number is in RCX from the line at T1. Leaves the distance from
/// guest to host in T1; clobbers RAX, RCX.
fn fill_window(a: &mut Asm, kind: usize, tag: i32) {
    let window = window_offset(kind);
    let used = state_offset!(windows_used) + (kind * size_of::<WindowSet>()) as i32;
    a.push(RDX);
    a.mov(RDX, RCX);
    a.shift(5, RDX, 6);
    a.shift(4, RDX, 3);
    a.mov_imm(RAX, 1);
    a.raw(&[0x48, 0xd3, 0xe0]); // shl rax, cl
    a.alu_gs_indexed(Alu::Or, used, RDX, RAX);
    a.shift(4, RCX, size_of::<Window>().trailing_zeros() as u8);
    a.load(RAX, T1, tag);
    a.load(T1, T1, tag + DELTA);
    a.store_gs_indexed(window, RCX, RAX);
    a.store_gs_indexed(window + 8, RCX, T1);
    a.pop(RDX);
}

/// Slow path of an access. On the stack: return address, meta. In: T0, the linear address.
/// Out: T0 as before, T1 the distance from it to where the access is to be done. Returns
/// five bytes further, behind a jump, if that is the bounce buffer.
fn slow(a: &mut Asm, mask: u32, access: u64, leave: u64) -> u64 {
    let at = a.here();
    a.store_gs(state_offset!(temp) + 24, T0);
    save_guests(a);
    vectors_save(a, mask);
    a.load_gs(RDI, state_offset!(runtime));
    a.mov(RSI, T0);
    a.load(RDX, RSP, 8);
    a.load(RCX, RSP, 0);
    call_rust(a, access);
    vectors_restore(a, mask);
    a.raw(&[0x48, 0x85, 0xc0]); // test rax, rax
    let fault = a.jcc_forward(cc::E);
    a.load_gs(T0, state_offset!(temp) + 24);
    a.mov(T1, RAX);
    a.alu(Alu::Sub, T1, T0);
    for guest in CALLER_SAVED_GUESTS {
        a.load_gs(HOME[guest].unwrap_or(GUEST_RAX), slot(guest));
    }
    a.load_gs(RBX, slot(3));
    a.load_gs(RAX, state_offset!(status));
    a.test_gs_zero(state_offset!(bounced));
    let direct = a.jcc_forward(cc::E);
    a.raw(&[0x48, 0x83, 0x04, 0x24, 5]); // add qword [rsp], 5
    a.aim(direct);
    a.raw(&[0xc2, 8, 0]); // ret 8
    a.aim(fault);
    for guest in CALLER_SAVED_GUESTS {
        a.load_gs(HOME[guest].unwrap_or(GUEST_RAX), slot(guest));
    }
    a.load_gs(RBX, slot(3));
    a.mov_imm(RAX, Leave::Exception as u64);
    a.jmp(leave);
    at
}

/// After a store that may have gone to the bounce buffer. Keeps every register and flag.
fn commit(a: &mut Asm, mask: u32, function: u64) -> u64 {
    let at = a.here();
    a.raw(&[0x9c]); // pushfq
    a.test_gs_zero(state_offset!(commit_length));
    let work = a.jcc_forward(cc::NE);
    a.raw(&[0x9d, 0xc3]); // popfq; ret
    a.aim(work);
    let kept = [RAX, RCX, RDX, RBX, RSI, RDI, Reg(8), GUEST_RAX, T0, T1];
    for reg in kept {
        a.push(reg);
    }
    vectors_save(a, mask);
    a.load_gs(RDI, state_offset!(runtime));
    call_rust(a, function);
    vectors_restore(a, mask);
    for reg in kept.into_iter().rev() {
        a.pop(reg);
    }
    a.raw(&[0x9d, 0xc3]);
    at
}
