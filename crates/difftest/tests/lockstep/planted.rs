//! The comparison finds what is wrong: a small guest runs with one byte changed in the leader's
//! memory, so that its blocks do something else than the follower's instructions.

use strata_cpu::state::{cr0, cr4, efer, segment};
use strata_hypervisor::state::{Registers, Segment};
use strata_memory::{Bytes, GuestAddress, GuestMemory};

use crate::compare::Pair;

const MEMORY: u64 = 2 << 20;
const PML4: u64 = 0x1000;
const CODE: u64 = 0x1_0000;
/// Memory that the guest never touches.
const ELSEWHERE: u64 = 0x5_0000;
/// `mov al, 0xfe; out 0x64, al`: resets the machine.
const RESET: [u8; 4] = [0xb0, 0xfe, 0xe6, 0x64];

/// Puts `code` into memory, and returns the registers to run it with in 64-bit mode.
fn load(memory: &GuestMemory, code: &[u8]) -> Registers {
    let code = [code, &RESET].concat();
    memory.ram().write_slice(&code, GuestAddress(CODE)).unwrap();
    // one page of 2 MiB, at its own address
    for (at, entry) in [(PML4, 0x2003_u64), (0x2000, 0x3003), (0x3000, 0x83)] {
        memory.ram().write_obj(entry, GuestAddress(at)).unwrap();
    }
    let flat = |attributes| Segment {
        selector: 8,
        base: 0,
        limit: u32::MAX,
        attributes,
    };
    let mut segments = [flat(0xc093); 6];
    segments[segment::CS] = flat(0xa09b);
    Registers {
        rip: CODE,
        rflags: 2,
        segments,
        cr0: cr0::PG | cr0::PE | cr0::ET | cr0::NE,
        cr3: PML4,
        cr4: cr4::PAE | cr4::OSFXSR,
        efer: efer::LME | efer::LMA,
        ..Registers::default()
    }
}

/// Runs `code` with one byte `planted` at an address of the leader's memory. Returns the report.
fn report(code: &[u8], planted: (u64, u8)) -> Option<String> {
    let mut pair = Pair::new(MEMORY, |memory| load(memory, code));
    let (address, byte) = planted;
    let ram = pair.leader_memory().ram();
    ram.write_obj(byte, GuestAddress(address)).unwrap();
    let (compared, _) = pair.compare(0);
    compared.err().map(|difference| difference.to_string())
}

#[track_caller]
fn assert_reported(code: &[u8], planted: (u64, u8), lines: &[&str]) {
    let report = report(code, planted).expect("a difference");
    for line in lines {
        assert!(report.contains(line), "{line:?} is not in:\n{report}");
    }
}

/// `mov ecx, 3`, and again and again: `add rbx, rcx; dec ecx; jnz`
const SUM: &[u8] = &[0xb9, 3, 0, 0, 0, 0x48, 0x01, 0xcb, 0xff, 0xc9, 0x75, 0xf9];

#[test]
fn a_guest_without_a_fault_is_compared_to_its_end() {
    let mut pair = Pair::new(MEMORY, |memory| load(memory, SUM));
    let (compared, machine) = pair.compare(0);

    let compared = compared.unwrap_or_else(|difference| panic!("{difference}"));
    assert_eq!(compared.instructions, 1 + 3 * 3 + 2);
    assert!(compared.records >= 3);
    assert_eq!(compared.memories, 1);
    assert!(machine.is_over());
}

#[test]
fn a_wrong_general_register_is_reported_with_the_instruction_that_set_it() {
    // sub rbx, rcx
    let planted = (CODE + 6, 0x29);
    let lines = [
        "RBX is 0xfffffffffffffffd by the block, 0x3 one by one",
        "RIP 0x10005: add rbx,rcx  ; RBX = 0x3",
    ];
    assert_reported(SUM, planted, &lines);
}

#[test]
fn wrong_flags_are_reported_with_the_instruction_that_set_them() {
    // stc; inc eax: clc
    let lines = [
        "RFLAGS is 0x2 by the block, 0x3 one by one",
        "RIP 0x10000: stc  ; RFLAGS = 0x3",
    ];
    assert_reported(&[0xf9], (CODE, 0xf8), &lines);
}

#[test]
fn a_wrong_vector_register_is_reported_with_its_block() {
    // pcmpeqd xmm2, xmm2; paddd xmm1, xmm2: psubd
    let code = [0x66, 0x0f, 0x76, 0xd2, 0x66, 0x0f, 0xfe, 0xca];
    let lines = [
        "XMM1 is 0x100000001 by the block, 0xffffffffffffffff one by one",
        "RIP 0x10004: paddd xmm1,xmm2",
    ];
    assert_reported(&code, (CODE + 6, 0xfa), &lines);
}

#[test]
fn a_wrong_jump_is_reported() {
    // to itself: to the next
    let lines = [
        "the block led to RIP 0x10002, one by one did not",
        "RIP 0x10000: jmp",
    ];
    assert_reported(&[0xeb, 0xfe, 0xeb, 0xfe], (CODE + 1, 0), &lines);
}

#[test]
fn a_wrong_question_to_the_machine_is_reported() {
    // out 0xe9, al: 0xe8
    let lines = [
        "the follower asked the machine PortWrite(233, 1, 0), the leader PortWrite(232, 1, 0)",
        "RIP 0x10000: out 0E9h,al",
    ];
    assert_reported(&[0xe6, 0xe9], (CODE + 1, 0xe8), &lines);
}

#[test]
fn wrong_memory_is_reported() {
    let lines = ["memory at 0x50000 is 0x1 by blocks, 0x0 one by one"];
    assert_reported(SUM, (ELSEWHERE, 1), &lines);
}
