//! What translated code does by itself of privileged and string instructions is what
//! `execute` does: each runs both ways from the same random states, and registers, segments,
//! flags, exceptions and memory are compared.

use std::ops::RangeInclusive;

use strata_memory::{Bytes, GuestAddress, PAGE_SIZE};

use super::tests::*;
use super::{Flow, deliver_exception};
use crate::exception::vector;
use crate::state::{Segment, State, cr4, gpr, rflags, segment as index};
use crate::{Cpu, Crew};

/// States that each instruction is run from.
const CASES: u64 = 200;
/// Memory that is compared.
const DATA: u64 = 0x20000;
const DATA_END: usize = 0x40000;

/// A reproducible source of random numbers.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }

    /// Mostly canonical.
    fn address(&mut self) -> u64 {
        match self.below(4) {
            0 => self.next(),
            1 => CODE + self.below(0x1000),
            _ => HIGH + self.below(1 << 21),
        }
    }

    /// RFLAGS with the given bits cleared.
    fn flags(&mut self, without: u64) -> u64 {
        self.next() & 0x3d_7fd5 & !without | rflags::FIXED
    }
}

pub(super) fn copy(from: &State, to: &mut State) {
    to.gpr = from.gpr;
    to.rip = from.rip;
    to.set_rflags(from.rflags());
    (to.fs_base, to.gs_base) = (from.fs_base, from.gs_base);
    to.kernel_gs_base = from.kernel_gs_base;
    to.segments = from.segments;
    (to.ldtr, to.tr) = (from.ldtr, from.tr);
    (to.gdtr, to.idtr) = (from.gdtr, from.idtr);
    to.cpl = from.cpl;
    (to.cr0, to.cr2, to.cr3, to.cr4) = (from.cr0, from.cr2, from.cr3, from.cr4);
    (to.xcr0, to.efer, to.msrs) = (from.xcr0, from.efer, from.msrs);
    to.nmi_blocked = from.nmi_blocked;
}

/// Everything that an instruction of these tests can change.
fn visible(state: &State) -> impl PartialEq + std::fmt::Debug + use<> {
    (
        (state.gpr, state.rip, state.rflags(), state.cpl, state.cr2),
        (state.segments, state.nmi_blocked),
        (state.fs_base, state.gs_base, state.kernel_gs_base),
    )
}

/// Runs `code` both ways from `CASES` states that `prepare` makes, and compares. How often
/// translated code did it by itself has to be in `alone`.
#[track_caller]
fn compare(
    code: &[u8],
    alone: RangeInclusive<u64>,
    mut prepare: impl FnMut(&mut Machine, &mut Random),
) {
    let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ u64::from(code[0]));
    let mut by_itself = 0;
    for case in 0..CASES {
        let (mut machine, mut twin) = (Machine::new(), Machine::new());
        machine.core.state.cr4 |= cr4::FSGSBASE;
        let seed = random.next();
        prepare(&mut machine, &mut Random(seed));
        prepare(&mut twin, &mut Random(seed));
        // a jump to another page ends the block
        let mut bytes = code.to_vec();
        let next = CODE + PAGE_SIZE;
        let distance = next.wrapping_sub(CODE + code.len() as u64 + 5);
        bytes.push(0xe9);
        bytes.extend_from_slice(&(distance as u32).to_le_bytes());
        machine.put_bytes(CODE, &bytes);
        twin.put_bytes(CODE, &bytes);

        let crew = Crew::new(twin.core.memory.clone(), 1);
        let mut cpu = Cpu::new(&crew, 0, 1_000_000).unwrap();
        copy(&machine.core.state, cpu.state_mut());
        cpu.reset_translations();
        // a first time to fill the TLB, and a second that counts
        let data = twin.bytes(DATA, DATA_END);
        assert_eq!(cpu.run_once(&twin.bus), None);
        twin.put_bytes(DATA, &data);
        copy(&machine.core.state, cpu.state_mut());
        cpu.core.check_interrupts = random.below(4) == 0;
        let before = cpu.statistics().departures;
        assert_eq!(cpu.run_once(&twin.bus), None);
        by_itself += u64::from(cpu.statistics().departures == before);

        match machine.run(code) {
            Ok(Flow::Next) if cpu.statistics().departures == before => {
                machine.core.state.rip = next;
            }
            Ok(_) => {}
            Err(exception) => {
                deliver_exception(&mut machine.core, &machine.bus, exception).unwrap();
            }
        }
        assert_eq!(
            visible(&machine.core.state),
            visible(cpu.state()),
            "case {case} of {code:02x?}, left is execute's"
        );
        assert!(
            machine.bytes(DATA, DATA_END) == twin.bytes(DATA, DATA_END),
            "memory of case {case} of {code:02x?}"
        );
    }
    assert!(
        alone.contains(&by_itself),
        "{code:02x?} done by translated code in {by_itself} of {CASES} cases"
    );
}

const MOST: RangeInclusive<u64> = CASES / 3..=CASES;

#[test]
fn translated_syscall_is_execute_s() {
    compare(&[0x0f, 0x05], MOST, |m, random| {
        m.set_ring(3);
        let state = &mut *m.core.state;
        state.set_rflags(random.flags(rflags::TF));
        state.msrs.star = random.next();
        state.msrs.sfmask = random.next() & 0xffff_ffff;
        state.msrs.lstar = HIGH + CODE + random.below(64);
        state.efer ^= u64::from(random.below(8) == 0);
        state.gpr = std::array::from_fn(|_| random.next());
    });
}

#[test]
fn translated_sysret_is_execute_s() {
    let some = CASES / 8..=CASES / 2;
    compare(&[0x48, 0x0f, 0x07], some, |m, random| {
        let state = &mut *m.core.state;
        state.set_rflags(random.flags(rflags::TF));
        state.msrs.star = random.next();
        state.efer ^= u64::from(random.below(8) == 0);
        state.gpr = std::array::from_fn(|_| random.next());
        state.gpr[gpr::RSP] = STACK;
        state.gpr[gpr::RCX] = random.address();
        if random.below(2) == 0 {
            state.gpr[gpr::R11] &= !(rflags::TF | rflags::AC);
        }
        state.cpl = random.one_of(&[0, 0, 0, 0, 0, 1]);
    });
}

#[test]
fn translated_iretq_is_execute_s() {
    let some = CASES / 16..=CASES / 2;
    compare(&[0x48, 0xcf], some, |m, random| {
        m.core
            .state
            .set_rflags(random.flags(rflags::TF | rflags::NT));
        if random.below(2) == 0 {
            m.core.state.system_flags &= !(3 << 19);
        }
        let pairs = [
            (USER_CS, USER_DS),
            (USER_CS, USER_DS),
            (KERNEL_CS, 0),
            (KERNEL_CS, KERNEL_DS),
            (USER_CS, KERNEL_DS),
            (KERNEL_CS, USER_DS),
            (USER_CS & !3, USER_DS),
            (NOT_PRESENT_CS, USER_DS),
            (random.next() as u16, random.next() as u16),
        ];
        let (cs, ss) = random.one_of(&pairs);
        let without = if random.below(2) == 0 {
            rflags::TF | rflags::AC
        } else {
            0
        };
        let frame = [
            random.address(),
            u64::from(cs) | random.next() << 16,
            random.flags(without) | random.next() & rflags::RF,
            random.address(),
            u64::from(ss) | random.next() << 16,
        ];
        m.stack(&frame);
        for at in [index::DS, index::ES, index::FS, index::GS] {
            if random.below(2) == 0 {
                m.core.state.segments[at] = Segment::default();
            }
        }
        if random.below(4) != 0 {
            for at in [index::DS, index::ES, index::FS, index::GS] {
                m.core.state.segments[at] = Segment::default();
            }
        }
        m.core.state.nmi_blocked = random.below(8) == 0;
    });
}

#[test]
fn translated_popfq_is_execute_s() {
    let some = CASES / 8..=CASES / 2;
    compare(&[0x9d], some, |m, random| {
        m.core.state.set_rflags(random.flags(rflags::TF));
        if random.below(4) != 0 {
            m.core.state.system_flags &= !(3 << 19);
        }
        let image = random.next() & !(random.below(2) * (rflags::TF | rflags::AC));
        m.stack(&[image]);
        m.set_ring(random.one_of(&[0, 0, 0, 3]));
    });
}

#[test]
fn translated_bases_are_execute_s() {
    // RD and WR, FS and GS, to and from RAX, R10D and R15
    for (rex, modrm) in [(0x48, 0xc0), (0x41, 0xc2), (0x49, 0xc7)] {
        for operation in [0x00, 0x08, 0x10, 0x18] {
            let code = [0xf3, rex, 0x0f, 0xae, modrm + operation];
            compare(&code, MOST, |m, random| {
                m.core
                    .state
                    .set_rflags(random.flags(rflags::TF | rflags::AC));
                m.core.state.gpr = std::array::from_fn(|_| random.address());
                m.core.state.gpr[gpr::RSP] = STACK;
                m.core.state.fs_base = random.address();
                m.core.state.gs_base = random.address();
                if random.below(8) == 0 {
                    m.core.state.cr4 &= !cr4::FSGSBASE;
                }
                m.set_ring(random.one_of(&[0, 3]));
            });
        }
    }
}

#[test]
fn translated_reads_of_segment_and_control_registers_are_execute_s() {
    let codes: [&[u8]; 7] = [
        &[0x8c, 0xd8],             // mov eax, ds
        &[0x66, 0x41, 0x8c, 0xe2], // mov r10w, fs
        &[0x66, 0x8c, 0xd2],       // mov dx, ss
        &[0x49, 0x8c, 0xcc],       // mov r12, cs
        &[0x0f, 0x20, 0xd0],       // mov rax, cr2
        &[0x41, 0x0f, 0x20, 0xda], // mov r10, cr3
        &[0x0f, 0x20, 0xe4],       // mov rsp, cr4
    ];
    for code in codes {
        compare(code, MOST, |m, random| {
            m.core
                .state
                .set_rflags(random.flags(rflags::TF | rflags::AC));
            m.core.state.gpr = std::array::from_fn(|_| random.next());
            m.core.state.gpr[gpr::RSP] = STACK;
            m.core.state.cr2 = random.next();
            for segment in &mut m.core.state.segments {
                segment.selector = random.next() as u16;
            }
            m.core.state.cpl = random.one_of(&[0, 0, 0, 1, 3]);
            if m.core.state.cpl == 3 {
                m.set_ring(3);
            }
        });
    }
}

#[test]
fn translated_repeated_copies_and_fills_are_execute_s() {
    let some = CASES / 8..=CASES;
    let codes: [&[u8]; 8] = [
        &[0xf3, 0xa4],
        &[0xf3, 0x66, 0xa5],
        &[0xf3, 0xa5],
        &[0xf3, 0x48, 0xa5],
        &[0xf3, 0xaa],
        &[0xf3, 0x66, 0xab],
        &[0xf2, 0xab],
        &[0xf3, 0x48, 0xab],
    ];
    for string in codes {
        compare(string, some.clone(), |m, random| {
            m.core
                .state
                .set_rflags(random.flags(rflags::TF | rflags::AC));
            if random.below(4) != 0 {
                m.core.state.system_flags &= !rflags::DF;
            }
            let state = &mut *m.core.state;
            state.gpr = std::array::from_fn(|_| random.next());
            state.gpr[gpr::RSP] = STACK;
            state.gpr[gpr::RCX] = random.below(700);
            state.gpr[gpr::RSI] = DATA + 0x4000 + random.below(0x2000);
            state.gpr[gpr::RDI] = DATA + 0x5000 + random.below(0x2000);
            let pattern: Vec<u8> = (0..0x8000).map(|_| random.next() as u8).collect();
            m.put_bytes(DATA + 0x3000, &pattern);
            m.set_ring(random.one_of(&[0, 3]));
        });
    }
}

/// Lets `code` run in ring 0 until it has left the page, or is in a handler.
fn run_blocks(machine: &Machine, code: &[u8]) {
    let crew = Crew::new(machine.core.memory.clone(), 1);
    let mut cpu = Cpu::new(&crew, 0, 1_000_000).unwrap();
    copy(&machine.core.state, cpu.state_mut());
    cpu.reset_translations();
    machine
        .core
        .memory
        .ram()
        .write_slice(code, GuestAddress(CODE))
        .unwrap();
    let page = |rip| rip & !(PAGE_SIZE - 1);
    while page(cpu.state().rip) == CODE {
        assert_eq!(cpu.run_once(&machine.bus), None);
    }
}

#[test]
fn stores_that_are_checked_together_leave_a_page_as_it_was_if_they_fault() {
    let mut machine = Machine::new();
    machine.set_page(DATA, PTE_P | PTE_U);
    machine.core.state.gpr[gpr::RBX] = DATA;

    // mov [rbx], rax; mov [rbx + 8], rax
    run_blocks(&machine, &[0x48, 0x89, 0x03, 0x48, 0x89, 0x43, 0x08]);

    let entry = machine.get(PAGE_TABLE + DATA / PAGE_SIZE * 8);
    assert_eq!(entry, DATA | PTE_P | PTE_U);
}

#[test]
fn an_address_in_no_window_is_the_stack_segment_s_fault_across_a_page_too() {
    // mov rax, [rbp]; mov rax, [rsp]; mov rax, [rbx]
    let codes: [(&[u8], u8); 3] = [
        (&[0x48, 0x8b, 0x45, 0x00], vector::SS),
        (&[0x48, 0x8b, 0x04, 0x24], vector::SS),
        (&[0x48, 0x8b, 0x43, 0x00], vector::GP),
    ];
    for (code, fault) in codes {
        for start in [CODE, CODE + PAGE_SIZE - 1] {
            let mut machine = Machine::new().user();
            machine.put_bytes(start, code);
            let state = &mut machine.core.state;
            state.rip = start;
            for register in [gpr::RBX, gpr::RBP, gpr::RSP] {
                state.gpr[register] = 1 << 63;
            }
            let crew = Crew::new(machine.core.memory.clone(), 1);
            let mut cpu = Cpu::new(&crew, 0, 1_000_000).unwrap();
            cpu.set_drafts(false);
            copy(&machine.core.state, cpu.state_mut());
            cpu.reset_translations();

            let rounds = (0..3).find(|_| {
                assert_eq!(cpu.run_once(&machine.bus), None);
                cpu.state().rip != start
            });

            assert!(rounds.is_some());
            assert_eq!(cpu.state().rip, handler(fault), "{code:02x?} at {start:#x}");
        }
    }
}
