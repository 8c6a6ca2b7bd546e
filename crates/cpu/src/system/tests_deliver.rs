//! Delivery of exceptions and interrupts.

use super::Flow;
use super::deliver::{TripleFault, deliver_debug_trap, deliver_exception, deliver_interrupt};
use super::tests::*;
use crate::exception::{Exception, vector};
use crate::state::{gpr, rflags, segment as index};

#[test]
fn an_interrupt_from_ring_3_switches_to_rsp0_and_clears_if() {
    let mut m = Machine::new().user();
    m.set_flags(rflags::IF | rflags::CF | rflags::NT);

    deliver_interrupt(&mut m.core, &m.bus, 0x30).unwrap();

    assert_eq!(m.core.state.rip, handler(0x30));
    assert_eq!(m.core.state.cpl, 0);
    assert_eq!(m.selector(index::CS), KERNEL_CS);
    assert_eq!(m.selector(index::SS), 0);
    assert_eq!(*m.reg(gpr::RSP), RSP0 - 40);
    let frame: Vec<u64> = (0..5).map(|i| m.stacked(i)).collect();
    let flags = rflags::IF | rflags::CF | rflags::NT | rflags::FIXED;
    assert_eq!(
        frame,
        [CODE, u64::from(USER_CS), flags, STACK, u64::from(USER_DS)]
    );
    assert!(!m.flag(rflags::IF) && !m.flag(rflags::NT));
}

#[test]
fn a_trap_gate_leaves_if_alone() {
    let mut m = Machine::new();
    m.set_gate(0x30, KERNEL_CS, 0x8f, 0);
    m.set_flags(rflags::IF);

    deliver_interrupt(&mut m.core, &m.bus, 0x30).unwrap();

    assert!(m.flag(rflags::IF));
}

#[test]
fn an_interrupt_within_ring_0_aligns_the_stack_and_keeps_ss() {
    let mut m = Machine::new();
    *m.reg(gpr::RSP) = STACK - 3;

    deliver_interrupt(&mut m.core, &m.bus, 0x30).unwrap();

    assert_eq!(*m.reg(gpr::RSP), STACK - 16 - 40);
    assert_eq!(m.stacked(3), STACK - 3);
    assert_eq!(m.selector(index::SS), KERNEL_DS);
}

#[test]
fn a_gate_with_an_ist_switches_stacks_within_ring_0() {
    let mut m = Machine::new();
    m.set_gate(0x30, KERNEL_CS, 0x8e, 1);

    deliver_interrupt(&mut m.core, &m.bus, 0x30).unwrap();

    assert_eq!(*m.reg(gpr::RSP), IST1 - 40);
}

#[test]
fn a_fault_pushes_its_error_code_and_rf_and_sets_cr2() {
    let mut m = Machine::new();

    deliver_exception(&mut m.core, &m.bus, Exception::page_fault(0xdead_b000, 2)).unwrap();

    assert_eq!(m.core.state.cr2, 0xdead_b000);
    assert_eq!(m.stacked(0), 2);
    assert_eq!(m.stacked(1), CODE);
    assert_ne!(m.stacked(3) & rflags::RF, 0);
    assert_eq!(m.core.state.rip, handler(vector::PF));
}

#[test]
fn a_single_step_sets_bs_and_clears_tf() {
    let mut m = Machine::new();
    m.set_flags(rflags::TF);

    deliver_debug_trap(&mut m.core, &m.bus, 0, true).unwrap();

    assert_ne!(m.core.state.dr[4] & 1 << 14, 0);
    assert_eq!(m.stacked(2) & (rflags::RF | rflags::TF), rflags::TF);
    assert!(!m.flag(rflags::TF));
}

#[test]
fn an_nmi_blocks_nmis() {
    let mut m = Machine::new();

    deliver_interrupt(&mut m.core, &m.bus, 2).unwrap();

    assert!(m.core.state.nmi_blocked);
}

#[test]
fn int_n_through_a_gate_of_ring_0_faults_in_ring_3_with_the_gate_in_the_code() {
    let mut m = Machine::new().user();

    assert_eq!(m.run(&[0xcd, 0x80]), gp(0x80 * 8 + 2));
    assert_eq!(m.core.state.rip, CODE);
}

#[test]
fn int_n_returns_behind_itself() {
    let mut m = Machine::new().user();
    m.set_gate(0x80, KERNEL_CS, 0xee, 0);

    assert_eq!(m.run(&[0xcd, 0x80]), Ok(Flow::Jump));

    assert_eq!(m.stacked(0), CODE + 2);
    assert_eq!(m.core.state.cpl, 0);
}

#[test]
fn int3_needs_a_gate_for_ring_3_but_int1_does_not() {
    let mut m = Machine::new().user();
    assert_eq!(m.run(&[0xcc]), gp(3 * 8 + 2));

    assert_eq!(m.run(&[0xf1]), Ok(Flow::Jump));

    assert_eq!(m.core.state.rip, handler(vector::DB));
    assert_eq!(m.stacked(0), CODE + 1);
}

#[test]
fn int_n_beyond_the_idt_faults_without_ext() {
    let mut m = Machine::new();
    m.core.state.idtr.limit = 0x20 * 16 - 1;

    assert_eq!(m.run(&[0xcd, 0x20]), gp(0x20 * 8 + 2));
}

#[test]
fn a_benign_exception_whose_gate_is_missing_becomes_np_with_ext() {
    let mut m = Machine::new();
    m.set_gate(vector::UD, KERNEL_CS, 0x0e, 0);

    deliver_exception(&mut m.core, &m.bus, Exception::undefined()).unwrap();

    assert_eq!(m.core.state.rip, handler(vector::NP));
    assert_eq!(m.stacked(0), u64::from(vector::UD) * 8 + 3);
}

#[test]
fn a_contributory_fault_on_another_is_a_double_fault() {
    let mut m = Machine::new();
    m.set_gate(vector::GP, KERNEL_CS, 0x0e, 0);

    deliver_exception(&mut m.core, &m.bus, Exception::general_protection(5)).unwrap();

    assert_eq!(m.core.state.rip, handler(vector::DF));
    assert_eq!(m.stacked(0), 0);
}

#[test]
fn a_page_fault_on_the_way_to_gp_is_delivered_by_itself() {
    let mut m = Machine::new();
    // the handler of #GP stands on a page that is not there
    m.set_gate(vector::GP, KERNEL_CS, 0x8e, 1);
    m.set_page(IST1 - 0x1000, 0);

    deliver_exception(&mut m.core, &m.bus, Exception::general_protection(5)).unwrap();

    assert_eq!(m.core.state.rip, handler(vector::PF));
    assert_eq!(m.core.state.cr2, IST1 - 48);
}

#[test]
fn a_page_fault_without_a_stack_is_a_double_fault_with_the_second_address_in_cr2() {
    let mut m = Machine::new();
    *m.reg(gpr::RSP) = 0x9000;
    m.set_page(0x8000, 0);
    m.set_gate(vector::DF, KERNEL_CS, 0x8e, 1);

    deliver_exception(&mut m.core, &m.bus, Exception::page_fault(0x1234, 0)).unwrap();

    assert_eq!(m.core.state.rip, handler(vector::DF));
    assert_eq!(m.core.state.cr2, 0x9000 - 48);
    assert_eq!(*m.reg(gpr::RSP), IST1 - 48);
}

#[test]
fn a_double_fault_that_faults_is_a_triple_fault() {
    let mut m = Machine::new();
    m.core.state.idtr.limit = 0;

    assert_eq!(
        deliver_exception(&mut m.core, &m.bus, Exception::undefined()),
        Err(TripleFault)
    );
}

#[test]
fn a_non_canonical_kernel_stack_is_a_stack_fault() {
    let mut m = Machine::new();
    m.put(TSS + 0x24, 0x8000_0000_0000_0000);
    m.set_gate(0x30, KERNEL_CS, 0x8e, 1);

    deliver_interrupt(&mut m.core, &m.bus, 0x30).unwrap();

    assert_eq!(m.core.state.rip, handler(vector::SS));
    assert_eq!(m.stacked(0), 1);
}

#[test]
fn a_gate_to_a_32_bit_segment_is_a_general_protection_fault() {
    let mut m = Machine::new();
    m.set_gate(0x30, USER_CS32, 0x8e, 0);

    deliver_interrupt(&mut m.core, &m.bus, 0x30).unwrap();

    assert_eq!(m.core.state.rip, handler(vector::GP));
    assert_eq!(m.stacked(0), u64::from(USER_CS32 & !3) | 1);
}

#[test]
fn a_tss_too_short_for_the_stack_is_an_invalid_tss() {
    let mut m = Machine::new().user();
    m.core.state.tr.limit = 8;
    m.set_gate(0x80, KERNEL_CS, 0xee, 0);

    let fault = m.run(&[0xcd, 0x80]);

    assert_eq!(fault, Err(Exception::invalid_tss(u32::from(TSS_SELECTOR))));
}
