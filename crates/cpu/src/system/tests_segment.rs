//! Segment registers and descriptor tables.

use super::Flow;
use super::tests::*;
use crate::exception::Exception;
use crate::state::{cr4, gpr, rflags, segment as index};

const MOV_FS_AX: &[u8] = &[0x8e, 0xe0];
const MOV_SS_AX: &[u8] = &[0x8e, 0xd0];
const LTR_AX: &[u8] = &[0x0f, 0x00, 0xd8];

#[test]
fn mov_to_fs_loads_the_base_and_marks_the_descriptor() {
    let mut m = Machine::new().user();
    *m.reg(gpr::RAX) = u64::from(BASED_DS);

    assert_eq!(m.run(MOV_FS_AX), Ok(Flow::Next));

    assert_eq!(m.core.state.fs_base, 0x1234_5678);
    assert_ne!(m.get(GDT + u64::from(BASED_DS & !7)) & 1 << 40, 0);
}

#[test]
fn a_null_selector_clears_the_base() {
    let mut m = Machine::new();
    m.core.state.fs_base = 77;
    *m.reg(gpr::RAX) = 3;

    assert_eq!(m.run(MOV_FS_AX), Ok(Flow::Next));

    assert_eq!((m.core.state.fs_base, m.selector(index::FS)), (0, 3));
}

#[test]
fn loading_a_data_segment_checks_privilege_presence_and_type() {
    let mut m = Machine::new().user();
    for (selector, expected) in [
        (KERNEL_DS, gp(u32::from(KERNEL_DS))),
        (0x1000, gp(0x1000)),
        (TSS_SELECTOR, gp(u32::from(TSS_SELECTOR))),
    ] {
        *m.reg(gpr::RAX) = u64::from(selector);
        assert_eq!(m.run(MOV_FS_AX), expected);
    }
    m.set_ring(0);
    *m.reg(gpr::RAX) = u64::from(NOT_PRESENT_CS);
    assert_eq!(
        m.run(MOV_FS_AX),
        Err(Exception::not_present(u32::from(NOT_PRESENT_CS)))
    );
}

#[test]
fn mov_to_ss_holds_interrupts_back_and_null_is_for_the_kernel() {
    let mut m = Machine::new();
    *m.reg(gpr::RAX) = 0;
    assert_eq!(m.run(MOV_SS_AX), Ok(Flow::Next));
    assert!(m.core.state.interrupt_shadow);

    m.set_ring(3);
    assert_eq!(m.run(MOV_SS_AX), gp(0));
    *m.reg(gpr::RAX) = u64::from(KERNEL_DS);
    assert_eq!(m.run(MOV_SS_AX), gp(u32::from(KERNEL_DS)));
}

#[test]
fn mov_to_cs_is_undefined() {
    let mut m = Machine::new();
    assert_eq!(m.run(&[0x8e, 0xc8]), ud());
}

#[test]
fn mov_from_a_segment_zero_extends_to_a_register_and_stores_two_bytes() {
    let mut m = Machine::new();
    *m.reg(gpr::RAX) = u64::MAX;
    // mov eax, cs
    assert_eq!(m.run(&[0x8c, 0xc8]), Ok(Flow::Next));
    assert_eq!(*m.reg(gpr::RAX), u64::from(KERNEL_CS));

    m.put(0x6000, u64::MAX);
    *m.reg(gpr::RBX) = 0x6000;
    // mov [rbx], cs
    assert_eq!(m.run(&[0x8c, 0x0b]), Ok(Flow::Next));
    assert_eq!(m.get(0x6000), 0xffff_ffff_ffff_0000 | u64::from(KERNEL_CS));
}

#[test]
fn an_operand_relative_to_gs_adds_the_base_to_a_signed_displacement() {
    let mut m = Machine::new();
    m.core.state.gs_base = HIGH + 0x61000;

    // mov gs:[-0x10], cs
    assert_eq!(
        m.run(&[0x65, 0x8c, 0x0c, 0x25, 0xf0, 0xff, 0xff, 0xff]),
        Ok(Flow::Next)
    );

    assert_eq!(m.get(0x60ff0), u64::from(KERNEL_CS));
}

#[test]
fn an_operand_relative_to_rip_counts_from_the_next_instruction() {
    let mut m = Machine::new();

    // mov [rip + 0x100], cs
    assert_eq!(m.run(&[0x8c, 0x0d, 0, 1, 0, 0]), Ok(Flow::Next));

    assert_eq!(m.get(CODE + 6 + 0x100), u64::from(KERNEL_CS));
}

#[test]
fn a_non_canonical_operand_is_a_stack_fault_relative_to_rbp() {
    let mut m = Machine::new();
    *m.reg(gpr::RBP) = 1 << 62;
    *m.reg(gpr::RBX) = 1 << 62;

    // mov [rbp], cs; mov fs:[rbp], cs; mov [rbx], cs
    assert_eq!(m.run(&[0x8c, 0x4d, 0]), Err(Exception::stack_fault(0)));
    assert_eq!(m.run(&[0x64, 0x8c, 0x4d, 0]), gp(0));
    assert_eq!(m.run(&[0x8c, 0x0b]), gp(0));
}

#[test]
fn ltr_marks_the_tss_busy_and_refuses_a_busy_one() {
    let mut m = Machine::new();
    *m.reg(gpr::RAX) = u64::from(FREE_TSS);

    assert_eq!(m.run(LTR_AX), Ok(Flow::Next));

    assert_eq!(m.core.state.tr.base, TSS);
    assert_eq!(m.core.state.tr.attributes & 0xf, 0xb);
    assert_eq!(m.run(LTR_AX), gp(u32::from(FREE_TSS)));
}

#[test]
fn lar_and_lsl_tell_what_is_visible() {
    let mut m = Machine::new().user();
    *m.reg(gpr::RAX) = u64::from(USER_DS);
    // lar ecx, eax; lsl edx, eax
    assert_eq!(m.run(&[0x0f, 0x02, 0xc8]), Ok(Flow::Next));
    assert!(m.flag(rflags::ZF));
    assert_eq!(*m.reg(gpr::RCX), 0x00c0_f300);
    assert_eq!(m.run(&[0x0f, 0x03, 0xd0]), Ok(Flow::Next));
    assert_eq!(*m.reg(gpr::RDX), 0xffff_ffff);

    *m.reg(gpr::RAX) = u64::from(KERNEL_DS);
    assert_eq!(m.run(&[0x0f, 0x03, 0xd0]), Ok(Flow::Next));
    assert!(!m.flag(rflags::ZF));
    assert_eq!(*m.reg(gpr::RDX), 0xffff_ffff);
}

#[test]
fn verw_wants_a_writable_segment_and_verr_a_readable_one() {
    let mut m = Machine::new().user();
    let mut check = |selector: u16, code: &[u8], expected: bool| {
        *m.reg(gpr::RAX) = u64::from(selector);
        assert_eq!(m.run(code), Ok(Flow::Next));
        assert_eq!(m.flag(rflags::ZF), expected, "{selector:#x} {code:x?}");
    };
    let (verr, verw): (&[u8], &[u8]) = (&[0x0f, 0x00, 0xe0], &[0x0f, 0x00, 0xe8]);
    check(USER_DS, verw, true);
    check(USER_CS, verw, false);
    check(USER_CS, verr, true);
    check(KERNEL_DS, verr, false);
    check(0, verr, false);
}

#[test]
fn lgdt_wants_a_canonical_base() {
    let mut m = Machine::new();
    *m.reg(gpr::RBX) = 0x6000;
    m.put_bytes(0x6000, &[0x6f, 0, 0, 0, 1, 0, 0, 0, 0, 0]);
    assert_eq!(m.run(&[0x0f, 0x01, 0x13]), Ok(Flow::Next));
    assert_eq!(m.core.state.gdtr.base, GDT);

    m.put_bytes(0x6000, &[0x6f, 0, 0, 0, 1, 0, 0, 0, 0, 0x80]);
    assert_eq!(m.run(&[0x0f, 0x01, 0x13]), gp(0));
}

#[test]
fn umip_hides_the_tables_from_ring_3() {
    let mut m = Machine::new().user();
    *m.reg(gpr::RBX) = 0x6000;
    assert_eq!(m.run(&[0x0f, 0x01, 0x03]), Ok(Flow::Next));
    assert_eq!(m.bytes(0x6000, 10), [0x6f, 0, 0, 0, 1, 0, 0, 0, 0, 0]);

    m.core.state.cr4 |= cr4::UMIP;
    for code in [
        &[0x0f, 0x01, 0x03],
        &[0x0f, 0x00, 0xc8],
        &[0x0f, 0x01, 0xe0],
    ] {
        assert_eq!(m.run(code), gp(0));
    }
}

#[test]
fn push_and_pop_of_fs_move_eight_bytes() {
    let mut m = Machine::new();
    m.core.state.segments[index::FS].selector = USER_DS;
    assert_eq!(m.run(&[0x0f, 0xa0]), Ok(Flow::Next));
    assert_eq!(
        (*m.reg(gpr::RSP), m.stacked(0)),
        (STACK - 8, u64::from(USER_DS))
    );

    m.core.state.segments[index::FS].selector = 0;
    assert_eq!(m.run(&[0x0f, 0xa1]), Ok(Flow::Next));
    assert_eq!((*m.reg(gpr::RSP), m.selector(index::FS)), (STACK, USER_DS));
}

#[test]
fn swapgs_is_for_ring_0_and_wrgsbase_for_canonical_addresses() {
    let mut m = Machine::new();
    m.core.state.gs_base = 1;
    m.core.state.kernel_gs_base = 2;
    assert_eq!(m.run(&[0x0f, 0x01, 0xf8]), Ok(Flow::Next));
    assert_eq!((m.core.state.gs_base, m.core.state.kernel_gs_base), (2, 1));

    m.set_ring(3);
    assert_eq!(m.run(&[0x0f, 0x01, 0xf8]), gp(0));
    let wrgsbase = &[0xf3, 0x48, 0x0f, 0xae, 0xd8];
    assert_eq!(m.run(wrgsbase), ud());
    m.core.state.cr4 |= cr4::FSGSBASE;
    *m.reg(gpr::RAX) = 1 << 47;
    assert_eq!(m.run(wrgsbase), gp(0));
}
