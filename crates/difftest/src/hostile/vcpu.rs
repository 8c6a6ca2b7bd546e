//! The vCPUs of a hostile guest: the modes they begin in, and a bus that answers anything.
//! Used by `hostile`.

use std::cell::RefCell;

use strata_cpu::state::{DescriptorTable, Segment, State, XsaveArea, cr0, cr4, efer, gpr, segment};
use strata_cpu::{Bus, Cpu, Signal, Waker};

use super::{CODE, CODE_SIZE, STACK_TOP, UPPER, code, tables};
use crate::rng::Rng;

/// What a vCPU begins in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Real,
    Protected16,
    Protected32,
    Paged32,
    Pae,
    Compatibility16,
    Compatibility32,
    Long,
}

impl Mode {
    /// The width of its code, in bits.
    pub(super) fn bits(self) -> u32 {
        match self {
            Mode::Real | Mode::Protected16 | Mode::Compatibility16 => 16,
            Mode::Protected32 | Mode::Paged32 | Mode::Pae | Mode::Compatibility32 => 32,
            Mode::Long => 64,
        }
    }

    /// The width of some code it runs: handlers in IA-32e mode are 64-bit code.
    pub(super) fn code_bits(self, rng: &mut Rng) -> u32 {
        if self.is_long() && rng.chance(50) {
            return 64;
        }
        self.bits()
    }

    pub(super) fn is_long(self) -> bool {
        matches!(
            self,
            Mode::Long | Mode::Compatibility16 | Mode::Compatibility32
        )
    }
}

pub(super) fn mode(rng: &mut Rng) -> Mode {
    rng.pick(&[
        Mode::Real,
        Mode::Protected16,
        Mode::Protected32,
        Mode::Paged32,
        Mode::Pae,
        Mode::Compatibility16,
        Mode::Compatibility32,
        Mode::Long,
        Mode::Long,
        Mode::Long,
        Mode::Long,
    ])
}

/// Puts a vCPU at the beginning of a life.
pub(super) fn begin(cpu: &mut Cpu, mode: Mode, rng: &mut Rng) {
    let state = cpu.state_mut();
    let user = rng.chance(40) && mode != Mode::Real;
    // the supervisor of 64-bit mode is at home in the upper half
    let half = if mode == Mode::Long && !user && rng.chance(70) {
        UPPER
    } else {
        0
    };
    for register in &mut state.gpr {
        *register = code::value(rng);
    }
    if rng.chance(90) {
        state.gpr[gpr::RSP] = half + STACK_TOP - 8 * rng.below(0x200);
    }
    if !mode.is_long() {
        for register in &mut state.gpr {
            *register &= u64::from(u32::MAX);
        }
    }
    state.rip = half + CODE + rng.below(CODE_SIZE);
    state.xsave = XsaveArea::INITIAL;
    state.dr = [0, 0, 0, 0, 0xffff_0ff0, 0x400];
    state.interrupt_shadow = false;
    state.nmi_blocked = false;
    (state.fs_base, state.gs_base) = (code::value(rng) & 0xffff_ffff, half + 0x8000);
    set_segments(state, mode, user);
    set_controls(state, mode, rng);
    if user || half != 0 {
        for bit in [cr4::SMEP, cr4::SMAP] {
            if mode.is_long() && rng.chance(40) {
                state.cr4 |= bit;
            }
        }
    }
    // IOPL, NT, AC and the like, but neither TF nor VM
    let flags = rng.bits() & (0x24_7eff);
    state.set_rflags(if rng.chance(50) { flags } else { 0x202 });
    cpu.reset_translations();
}

fn set_controls(state: &mut State, mode: Mode, rng: &mut Rng) {
    state.efer = efer::SCE | efer::NXE;
    state.cr0 = cr0::ET | cr0::NE | cr0::MP;
    state.cr4 = 0;
    state.xcr0 = 1;
    state.cr3 = tables::first_root(mode);
    state.cr2 = 0;
    if mode != Mode::Real {
        state.cr0 |= cr0::PE;
    }
    if rng.chance(80) {
        state.cr4 |= cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
        state.xcr0 = rng.pick(&[3, 7]);
    }
    if !matches!(mode, Mode::Real | Mode::Protected16 | Mode::Protected32) {
        state.cr0 |= cr0::PG | if rng.chance(70) { cr0::WP } else { 0 };
        state.cr4 |= cr4::PGE;
    }
    match mode {
        Mode::Paged32 => state.cr4 |= cr4::PSE,
        Mode::Pae => state.cr4 |= cr4::PAE,
        _ if mode.is_long() => {
            state.cr4 |= cr4::PAE;
            state.efer |= efer::LME | efer::LMA;
            for bit in [cr4::UMIP, cr4::FSGSBASE, cr4::PCIDE] {
                if rng.chance(25) {
                    state.cr4 |= bit;
                }
            }
        }
        _ => {}
    }
    if rng.chance(20) {
        state.cr0 |= cr0::AM;
    }
    state.msrs.star = u64::from(tables::CODE_64) << 32 | 0x33 << 48;
    state.msrs.lstar = UPPER + CODE + rng.below(CODE_SIZE);
    state.msrs.cstar = CODE + rng.below(CODE_SIZE);
    state.msrs.sysenter_cs = tables::CODE_64.into();
    state.msrs.sysenter_esp = STACK_TOP;
    state.msrs.sysenter_eip = CODE + rng.below(CODE_SIZE);
}

fn set_segments(state: &mut State, mode: Mode, user: bool) {
    let of = |limit, selector, attributes| Segment {
        base: 0,
        limit,
        selector,
        attributes,
    };
    let ring = if user { 0x60 } else { 0 };
    let (code, data) = match mode {
        Mode::Real => (of(0xffff, 0, 0x9b), of(0xffff, 0, 0x93)),
        Mode::Protected16 | Mode::Compatibility16 => {
            let [code, data] = if user {
                [tables::USER_CODE_16, tables::USER_DATA_16]
            } else {
                [tables::CODE_16, tables::DATA_16]
            };
            (of(0xffff, code, 0x9b | ring), of(0xffff, data, 0x93 | ring))
        }
        _ => {
            let [code, data] = match (mode, user) {
                (Mode::Long, true) => [tables::USER_CODE_64, tables::USER_DATA],
                (Mode::Long, false) => [tables::CODE_64, tables::DATA],
                (_, true) => [tables::USER_CODE_32, tables::USER_DATA],
                (_, false) => [tables::CODE_32, tables::DATA],
            };
            let size = if mode == Mode::Long { 0xa000 } else { 0xc000 };
            (
                of(u32::MAX, code, size | 0x9b | ring),
                of(u32::MAX, data, 0xc093 | ring),
            )
        }
    };
    state.segments = [data; 6];
    state.segments[segment::CS] = code;
    state.cpl = if user { 3 } else { 0 };
    let high = if mode.is_long() { UPPER } else { 0 };
    state.ldtr = of(0xff, 0x68, 0x82);
    state.ldtr.base = high + tables::LDT;
    state.tr = of(0x67, tables::TASK, 0x8b);
    state.tr.base = high + tables::TSS;
    let limit = if mode == Mode::Real { 0x3ff } else { 0xfff };
    let base = if mode == Mode::Real {
        0
    } else {
        high + tables::IDT
    };
    state.idtr = DescriptorTable { base, limit };
    state.gdtr = DescriptorTable {
        base: high + tables::GDT,
        limit: tables::GDT_SIZE as u16 - 1,
    };
}

/// A machine whose devices and interrupts do anything. What it does follows from a seed and
/// from how often it was asked, never from the time.
pub(super) struct TestBus {
    waker: Waker,
    rng: RefCell<Rng<'static>>,
}

impl TestBus {
    pub(super) fn new(waker: Waker, seed: u64) -> Self {
        Self {
            waker,
            rng: RefCell::new(Rng::new(seed, 0)),
        }
    }

    fn bits(&self) -> u64 {
        let mut rng = self.rng.borrow_mut();
        // a device raises interrupts when it is used
        if rng.chance(30) {
            self.waker.wake();
        }
        rng.bits()
    }

    fn chance(&self, percent: u64) -> bool {
        self.rng.borrow_mut().chance(percent)
    }
}

impl Bus for TestBus {
    fn port_read(&self, _port: u16, _size: u8) -> u32 {
        self.bits() as u32
    }
    fn port_write(&self, _port: u16, _size: u8, _value: u32) {
        self.bits();
    }
    fn mmio_read(&self, _address: u64, data: &mut [u8]) {
        data.fill(self.bits() as u8);
    }
    fn mmio_write(&self, _address: u64, _data: &[u8]) {
        self.bits();
    }
    fn msr_read(&self, _msr: u32) -> Option<u64> {
        let bits = self.bits();
        (!self.chance(20)).then_some(bits)
    }
    fn msr_write(&self, _msr: u32, _value: u64) -> Option<()> {
        self.bits();
        (!self.chance(20)).then_some(())
    }
    fn interrupt_pending(&self) -> bool {
        self.chance(50)
    }
    fn acknowledge_interrupt(&self) -> Option<u8> {
        let mut rng = self.rng.borrow_mut();
        rng.chance(50).then(|| rng.below(256) as u8)
    }
    fn task_priority(&self) -> u8 {
        self.bits() as u8 & 15
    }
    fn set_task_priority(&self, _priority: u8) {
        self.bits();
    }
    fn next_timer(&self) -> Option<u64> {
        // now, so that no time is spent halted
        Some(0)
    }
    fn take_signal(&self) -> Option<Signal> {
        let mut rng = self.rng.borrow_mut();
        match rng.below(40) {
            0..4 => Some(Signal::Nmi),
            4 => Some(Signal::Init),
            5..8 => Some(Signal::Startup((CODE >> 12) as u8)),
            _ => None,
        }
    }
}
