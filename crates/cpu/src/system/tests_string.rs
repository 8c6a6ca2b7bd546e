//! String instructions.

use super::Flow;
use super::tests::*;
use crate::exception::Exception;
use crate::state::{gpr, rflags};

const REP_MOVSB: &[u8] = &[0xf3, 0xa4];
const REP_MOVSQ: &[u8] = &[0xf3, 0x48, 0xa5];
const REP_STOSB: &[u8] = &[0xf3, 0xaa];
const REP_STOSQ: &[u8] = &[0xf3, 0x48, 0xab];
const REPE_CMPSB: &[u8] = &[0xf3, 0xa6];
const REPNE_SCASB: &[u8] = &[0xf2, 0xae];

fn machine(rsi: u64, rdi: u64, rcx: u64) -> Machine {
    let mut m = Machine::new().user();
    *m.reg(gpr::RSI) = rsi;
    *m.reg(gpr::RDI) = rdi;
    *m.reg(gpr::RCX) = rcx;
    m
}

fn registers(m: &Machine) -> (u64, u64, u64) {
    let g = &m.core.state.gpr;
    (g[gpr::RSI], g[gpr::RDI], g[gpr::RCX])
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 7 + i / 251) as u8).collect()
}

/// What MOVS does by the manual: one element after the other.
fn moved(memory: &mut [u8], from: usize, to: usize, elements: usize, size: usize, down: bool) {
    for i in 0..elements {
        let step = i * size;
        let (f, t) = if down {
            (from - step, to - step)
        } else {
            (from + step, to + step)
        };
        let element = memory[f..f + size].to_vec();
        memory[t..t + size].copy_from_slice(&element);
    }
}

#[test]
fn rep_movs_crosses_pages_and_leaves_the_registers_behind_the_copy() {
    let mut m = machine(0x60ff0, 0x70801, 0x1800);
    let data = pattern(0x1800);
    m.put_bytes(0x60ff0, &data);

    assert_eq!(m.run(REP_MOVSB), Ok(Flow::Next));

    assert_eq!(m.bytes(0x70801, 0x1800), data);
    assert_eq!(registers(&m), (0x627f0, 0x72001, 0));
}

#[test]
fn a_fault_in_the_middle_of_rep_movs_leaves_exact_registers() {
    let mut m = machine(0x60000, 0x70ff0, 0x100);
    m.set_page(0x71000, 0);

    let fault = m.run(REP_MOVSB);

    assert_eq!(fault, Err(missing_page(0x71000, true, true)));
    assert_eq!(registers(&m), (0x60010, 0x71000, 0xf0));

    m.set_page(0x71000, PTE_P | PTE_W | PTE_U);
    assert_eq!(m.run(REP_MOVSB), Ok(Flow::Next));
    assert_eq!(registers(&m), (0x60100, 0x710f0, 0));
}

#[test]
fn the_source_of_movs_faults_before_its_destination() {
    let mut m = machine(0x60000, 0x70000, 1);
    m.set_page(0x60000, 0);
    m.set_page(0x70000, 0);

    assert_eq!(m.run(REP_MOVSB), Err(missing_page(0x60000, false, true)));
}

#[test]
fn an_element_across_a_page_that_faults_moves_nothing() {
    let mut m = machine(0x60000, 0x70ffc, 2);
    m.set_page(0x71000, 0);
    m.put(0x60000, u64::MAX);

    assert_eq!(m.run(REP_MOVSQ), Err(missing_page(0x71000, true, true)));

    assert_eq!(registers(&m), (0x60000, 0x70ffc, 2));
    assert_eq!(m.bytes(0x70ffc, 4), [0; 4]);
}

#[test]
fn overlapping_copies_are_done_element_by_element() {
    for (opcode, size) in [
        (&[0xf3, 0xa4][..], 1),
        (&[0xf3, 0x66, 0xa5], 2),
        (&[0xf3, 0xa5], 4),
        (REP_MOVSQ, 8),
    ] {
        for distance in [-4100_i64, -100, -9, -3, -1, 0, 1, 3, 7, 8, 9, 13, 100, 4100] {
            for down in [false, true] {
                let base = 0x60000_u64;
                let (elements, length) = (600, 0x6000);
                let from = 0x2ffb;
                let to = (from as i64 + distance) as usize;
                let mut expected = pattern(length);
                let mut m = machine(base + from as u64, base + to as u64, elements as u64);
                m.put_bytes(base, &expected);
                m.set_flags(if down { rflags::DF } else { 0 });

                assert_eq!(m.run(opcode), Ok(Flow::Next));

                moved(&mut expected, from, to, elements, size, down);
                assert!(
                    m.bytes(base, length) == expected,
                    "size {size}, distance {distance}, down {down}"
                );
            }
        }
    }
}

#[test]
fn rep_stos_fills_with_any_pattern() {
    for (rax, size, opcode) in [
        (0x5a, 1, REP_STOSB),
        (0, 8, REP_STOSQ),
        (0x0102_0304_0506_0708, 8, REP_STOSQ),
        (0x1111_2222, 4, &[0xf3, 0xab]),
    ] {
        let mut m = machine(0, 0x60ffd, 700);
        *m.reg(gpr::RAX) = rax;

        assert_eq!(m.run(opcode), Ok(Flow::Next));

        let expected: Vec<u8> = (0..700)
            .flat_map(|_| rax.to_le_bytes().into_iter().take(size))
            .collect();
        assert_eq!(m.bytes(0x60ffd, 700 * size), expected);
        assert_eq!(m.bytes(0x60ffd + 700 * size as u64, 1), [0]);
        assert_eq!(registers(&m).1, 0x60ffd + 700 * size as u64);
    }
}

#[test]
fn a_long_copy_gives_control_back_with_work_left() {
    let mut m = machine(0x60000, 0x90000, 0x20000);
    m.put_bytes(0x60000, &pattern(0x20000));

    assert_eq!(m.run(REP_MOVSB), Ok(Flow::Jump));

    assert_eq!(m.core.state.rip, CODE);
    assert_eq!(registers(&m), (0x70000, 0xa0000, 0x10000));
    assert_eq!(m.run(REP_MOVSB), Ok(Flow::Next));
    assert_eq!(m.core.state.rip, CODE + 2);
}

#[test]
fn a_single_stepped_rep_does_one_iteration_at_a_time() {
    let mut m = machine(0x60000, 0x70000, 2);
    m.set_flags(rflags::TF);

    assert_eq!(m.run(REP_MOVSB), Ok(Flow::Jump));
    assert_eq!(registers(&m), (0x60001, 0x70001, 1));
    assert_eq!(m.run(REP_MOVSB), Ok(Flow::Next));
}

#[test]
fn a_count_of_zero_does_nothing_at_all() {
    let mut m = machine(1 << 63, 1 << 63, 0);
    m.set_flags(rflags::STATUS);

    assert_eq!(m.run(REPE_CMPSB), Ok(Flow::Next));

    assert_eq!(m.core.state.rflags() & rflags::STATUS, rflags::STATUS);
}

#[test]
fn a_non_canonical_string_address_is_a_general_protection_fault() {
    let mut m = machine(1 << 63, 0x60000, 1);
    assert_eq!(m.run(REP_MOVSB), gp(0));
}

#[test]
fn repe_cmps_stops_behind_the_first_difference_with_its_flags() {
    let mut m = machine(0x60ffe, 0x70000, 10);
    m.put_bytes(0x60ffe, b"abcdXfg");
    m.put_bytes(0x70000, b"abcdYfg");

    assert_eq!(m.run(REPE_CMPSB), Ok(Flow::Next));

    assert_eq!(registers(&m), (0x61003, 0x70005, 5));
    // 'X' - 'Y' is -1
    let expected = rflags::CF | rflags::SF | rflags::PF | rflags::AF;
    assert_eq!(m.core.state.rflags() & rflags::STATUS, expected);
}

#[test]
fn a_fault_in_cmps_leaves_the_flags_alone() {
    let mut m = machine(0x60ff0, 0x70000, 0x100);
    m.set_page(0x61000, 0);
    m.set_flags(rflags::CF);

    assert_eq!(m.run(REPE_CMPSB), Err(missing_page(0x61000, false, true)));

    assert_eq!(m.core.state.rflags() & rflags::STATUS, rflags::CF);
    assert_eq!(registers(&m), (0x61000, 0x70010, 0xf0));
}

#[test]
fn repne_scas_finds_a_byte_in_both_directions() {
    let mut m = machine(0, 0x60000, u64::MAX);
    m.put_bytes(0x60000, b"needle\0");
    assert_eq!(m.run(&[0xb0, 0]), ud());
    *m.reg(gpr::RAX) = 0xffff_ff00;

    assert_eq!(m.run(REPNE_SCASB), Ok(Flow::Next));

    assert_eq!(registers(&m), (0, 0x60007, u64::MAX - 7));
    assert!(m.flag(rflags::ZF));

    m.set_flags(rflags::DF);
    *m.reg(gpr::RAX) = u64::from(b'n');
    assert_eq!(m.run(REPNE_SCASB), Ok(Flow::Next));
    assert_eq!(registers(&m).1, 0x5ffff);
}

#[test]
fn lods_keeps_what_its_size_does_not_reach() {
    let mut m = machine(0x60000, 0, 0);
    m.put(0x60000, 0x1122_3344_5566_7788);
    *m.reg(gpr::RAX) = u64::MAX;
    m.run(&[0xac]).unwrap();
    assert_eq!(*m.reg(gpr::RAX), 0xffff_ffff_ffff_ff88);
    // lodsd
    m.run(&[0xad]).unwrap();
    assert_eq!(*m.reg(gpr::RAX), 0x4455_6677);
    assert_eq!(registers(&m).0, 0x60005);
}

#[test]
fn the_source_takes_a_segment_override_and_the_destination_does_not() {
    let mut m = machine(0x10, 0x70000, 0);
    m.core.state.gs_base = 0x60000;
    m.put_bytes(0x60010, b"x");

    // gs movsb
    assert_eq!(m.run(&[0x65, 0xa4]), Ok(Flow::Next));

    assert_eq!(m.bytes(0x70000, 1), b"x");
}

#[test]
fn a_32_bit_address_size_cuts_the_registers() {
    let mut m = machine(
        0xffff_ffff_0006_0000,
        0xaaaa_0000_0007_0000,
        0xbbbb_0000_0000_0003,
    );
    m.put_bytes(0x60000, b"abc");

    assert_eq!(m.run(&[0x67, 0xf3, 0xa4]), Ok(Flow::Next));

    assert_eq!(m.bytes(0x70000, 3), b"abc");
    assert_eq!(registers(&m), (0x60003, 0x70003, 0));
}

#[test]
fn stores_into_translated_code_are_told() {
    let mut m = machine(0x60000, 0x70000, 0x100);
    m.core.memory.code().mark(0, 0x70080, 4);

    assert_eq!(m.run(REP_MOVSB), Ok(Flow::Next));

    assert_eq!(m.core.stale, [(0x70000, 0x100)]);
}

#[test]
fn copies_to_and_from_devices_go_element_by_element() {
    let mut m = machine(0x60000, 0x70000, 3);
    // beyond RAM
    m.put(0x4000 + 0x60 * 8, 0xc000_0000 | PTE_P | PTE_U);

    assert_eq!(m.run(REP_MOVSB), Ok(Flow::Next));

    assert_eq!(m.bytes(0x70000, 4), [0xee, 0xee, 0xee, 0]);
}

#[test]
fn ins_checks_its_destination_before_it_reads_the_port() {
    let mut m = machine(0, 0x60000, 2);
    m.set_flags(rflags::IOPL);
    *m.reg(gpr::RDX) = 0x3f8;
    m.run(&[0xf3, 0x66, 0x6d]).unwrap();
    assert_eq!(m.bytes(0x60000, 4), [0xf8, 3, 0xf8, 3]);

    m.set_page(0x60000, PTE_P | PTE_U);
    *m.reg(gpr::RDI) = 0x60000;
    let fault: Result<Flow, Exception> = m.run(&[0x6c]);
    assert_eq!(fault, Err(Exception::page_fault(0x60000, 7)));
}

#[test]
fn rep_outs_writes_each_element() {
    let mut m = machine(0x60000, 0, 3);
    m.set_flags(rflags::IOPL);
    m.put_bytes(0x60000, b"abc");
    *m.reg(gpr::RDX) = 0x3f8;

    m.run(&[0xf3, 0x6e]).unwrap();

    let written: Vec<u8> = m.bus.written.borrow().iter().map(|w| w.2 as u8).collect();
    assert_eq!(written, b"abc");
}

#[test]
fn a_misaligned_element_is_refused_in_ring_3_where_alignment_is_checked() {
    let mut m = machine(0x60000, 0x70004, 2);
    m.core.state.cr0 |= crate::state::cr0::AM;
    m.core.state.system_flags |= rflags::AC;

    assert_eq!(m.run(REP_MOVSQ), Err(Exception::alignment_check()));

    assert_eq!(registers(&m), (0x60000, 0x70004, 2));
}
