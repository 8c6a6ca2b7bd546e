//! IRET, SYSCALL and SYSRET, far returns and jumps.

use super::Flow;
use super::cpuid::Vendor;
use super::tests::*;
use crate::exception::Exception;
use crate::state::{gpr, rflags, segment as index};

const IRETQ: &[u8] = &[0x48, 0xcf];
const SYSCALL: &[u8] = &[0x0f, 0x05];
const SYSRETQ: &[u8] = &[0x48, 0x0f, 0x07];
const LRETQ: &[u8] = &[0x48, 0xcb];
const NON_CANONICAL: u64 = 0x8000_0000_0000;

fn frame(rip: u64, cs: u16, flags: u64, rsp: u64, ss: u16) -> [u64; 5] {
    [rip, u64::from(cs), flags, rsp, u64::from(ss)]
}

#[test]
fn iret_to_ring_3_loads_everything_and_drops_kernel_segments() {
    let mut m = Machine::new();
    m.core.state.segments[index::DS].attributes = 0xc093;
    m.core.state.segments[index::DS].selector = KERNEL_DS;
    m.core.state.nmi_blocked = true;
    m.stack(&frame(
        0x5000,
        USER_CS,
        rflags::IF | rflags::CF | rflags::RF,
        0x7000,
        USER_DS,
    ));

    assert_eq!(m.run(IRETQ), Ok(Flow::Jump));

    assert_eq!((m.core.state.rip, m.core.state.cpl), (0x5000, 3));
    assert_eq!(*m.reg(gpr::RSP), 0x7000);
    assert_eq!(
        m.core.state.rflags(),
        rflags::IF | rflags::CF | rflags::FIXED
    );
    assert_eq!(
        (m.selector(index::CS), m.selector(index::SS)),
        (USER_CS, USER_DS)
    );
    assert_eq!(m.selector(index::DS), 0);
    assert!(!m.core.state.nmi_blocked);
}

#[test]
fn iret_within_ring_0_pops_the_stack_and_allows_a_null_ss() {
    let mut m = Machine::new();
    m.stack(&frame(0x5000, KERNEL_CS, rflags::IOPL, 0x7001, 0));

    assert_eq!(m.run(IRETQ), Ok(Flow::Jump));

    assert_eq!(*m.reg(gpr::RSP), 0x7001);
    assert!(m.flag(rflags::IOPL));
}

#[test]
fn iret_in_ring_3_changes_neither_if_nor_iopl() {
    let mut m = Machine::new().user();
    m.set_flags(rflags::IF);
    m.stack(&frame(
        0x5000,
        USER_CS,
        rflags::IOPL | rflags::DF,
        0x7000,
        USER_DS,
    ));

    assert_eq!(m.run(IRETQ), Ok(Flow::Jump));

    assert_eq!(
        m.core.state.rflags(),
        rflags::IF | rflags::DF | rflags::FIXED
    );
}

#[test]
fn iret_faults_name_what_is_wrong_and_change_nothing() {
    let not_present = Err(Exception::not_present(u32::from(NOT_PRESENT_CS)));
    let cases = [
        (frame(0x5000, 0, 2, 0x7000, USER_DS), gp(0)),
        (frame(NON_CANONICAL, USER_CS, 2, 0x7000, USER_DS), gp(0)),
        (frame(0x5000, 0x1000, 2, 0x7000, USER_DS), gp(0x1000)),
        (
            frame(0x5000, USER_DS, 2, 0x7000, USER_DS),
            gp(u32::from(USER_DS & !3)),
        ),
        (
            frame(0x5000, KERNEL_CS | 3, 2, 0x7000, USER_DS),
            gp(u32::from(KERNEL_CS)),
        ),
        (
            frame(0x5000, NOT_PRESENT_CS, 2, 0x7000, KERNEL_DS),
            not_present,
        ),
        (frame(0x5000, USER_CS, 2, 0x7000, 3), gp(0)),
        (
            frame(0x5000, USER_CS, 2, 0x7000, KERNEL_DS),
            gp(u32::from(KERNEL_DS)),
        ),
        (
            frame(0x5000, USER_CS, 2, 0x7000, USER_CS),
            gp(u32::from(USER_CS & !3)),
        ),
        (frame(0x5000, KERNEL_CS, 2, 0x7000, 3), gp(0)),
    ];
    for (values, expected) in cases {
        let mut m = Machine::new();
        m.stack(&values);
        let rsp = *m.reg(gpr::RSP);

        assert_eq!(m.run(IRETQ), expected, "{values:x?}");

        assert_eq!(
            (m.core.state.rip, *m.reg(gpr::RSP), m.core.state.cpl),
            (CODE, rsp, 0)
        );
    }
}

#[test]
fn iret_with_nested_task_set_faults() {
    let mut m = Machine::new();
    m.set_flags(rflags::NT);
    m.stack(&frame(0x5000, USER_CS, 2, 0x7000, USER_DS));

    assert_eq!(m.run(IRETQ), gp(0));
}

#[test]
fn iret_from_a_non_canonical_stack_is_a_stack_fault() {
    let mut m = Machine::new();
    *m.reg(gpr::RSP) = NON_CANONICAL;

    assert_eq!(m.run(IRETQ), Err(Exception::stack_fault(0)));
}

#[test]
fn syscall_and_sysret_are_inverse() {
    let mut m = Machine::new().user();
    m.core.state.msrs.star = u64::from(USER_CS32) << 48 | u64::from(KERNEL_CS) << 32;
    m.core.state.msrs.lstar = HIGH + 0x6000;
    m.core.state.msrs.sfmask = rflags::IF | rflags::TF;
    m.set_flags(rflags::IF | rflags::ZF);

    assert_eq!(m.run(SYSCALL), Ok(Flow::Jump));

    assert_eq!((m.core.state.rip, m.core.state.cpl), (HIGH + 0x6000, 0));
    assert_eq!(
        (m.selector(index::CS), m.selector(index::SS)),
        (KERNEL_CS, KERNEL_DS)
    );
    assert_eq!(*m.reg(gpr::RCX), CODE + 2);
    assert_eq!(*m.reg(gpr::R11), rflags::IF | rflags::ZF | rflags::FIXED);
    assert_eq!(m.core.state.rflags(), rflags::ZF | rflags::FIXED);

    assert_eq!(m.run(SYSRETQ), Ok(Flow::Jump));

    assert_eq!((m.core.state.rip, m.core.state.cpl), (CODE + 2, 3));
    assert_eq!(
        (m.selector(index::CS), m.selector(index::SS)),
        (USER_CS, USER_DS)
    );
    assert_eq!(
        m.core.state.rflags(),
        rflags::IF | rflags::ZF | rflags::FIXED
    );
}

#[test]
fn sysret_to_a_non_canonical_address_faults_where_the_vendor_has_it() {
    let mut m = Machine::new();
    *m.reg(gpr::RCX) = NON_CANONICAL;

    let result = m.run(SYSRETQ);

    match m.core.cpuid.vendor() {
        Vendor::Intel => assert_eq!((result, m.core.state.cpl), (gp(0), 0)),
        Vendor::Amd => assert_eq!((result, m.core.state.cpl), (Ok(Flow::Jump), 3)),
    }
}

#[test]
fn sysret_outside_ring_0_and_syscall_without_sce_fault() {
    let mut m = Machine::new().user();
    assert_eq!(m.run(SYSRETQ), gp(0));

    m.core.state.efer &= !1;
    assert_eq!(m.run(SYSCALL), ud());
    assert_eq!(m.run(SYSRETQ), ud());
}

#[test]
fn a_far_return_stays_in_the_ring_and_releases_its_arguments() {
    let mut m = Machine::new();
    m.stack(&[0x5000, u64::from(KERNEL_CS), 0, 0]);

    assert_eq!(m.run(&[0x48, 0xca, 0x10, 0x00]), Ok(Flow::Jump));

    assert_eq!(m.core.state.rip, 0x5000);
    assert_eq!(*m.reg(gpr::RSP), STACK);
}

#[test]
fn a_far_return_to_ring_3_switches_stacks() {
    let mut m = Machine::new();
    m.stack(&[0x5000, u64::from(USER_CS), 0x7000, u64::from(USER_DS)]);

    assert_eq!(m.run(LRETQ), Ok(Flow::Jump));

    assert_eq!((m.core.state.cpl, *m.reg(gpr::RSP)), (3, 0x7000));
    assert_eq!(m.selector(index::SS), USER_DS);
}

#[test]
fn a_far_return_to_a_higher_privilege_faults() {
    let mut m = Machine::new().user();
    m.stack(&[0x5000, u64::from(KERNEL_CS)]);

    assert_eq!(m.run(LRETQ), gp(u32::from(KERNEL_CS)));
}

#[test]
fn a_far_jump_loads_cs_and_a_far_call_pushes_the_way_back() {
    let mut m = Machine::new();
    m.put(0x6000, 0x5000);
    m.put(0x6008, u64::from(KERNEL_CS));
    *m.reg(gpr::RBX) = 0x6000;

    // call far [rbx] with REX.W
    assert_eq!(m.run(&[0x48, 0xff, 0x1b]), Ok(Flow::Jump));

    assert_eq!(m.core.state.rip, 0x5000);
    assert_eq!(
        (m.stacked(0), m.stacked(1)),
        (CODE + 3, u64::from(KERNEL_CS))
    );

    m.put(0x6008, u64::from(KERNEL_DS));
    // jmp far [rbx]
    assert_eq!(m.run(&[0x48, 0xff, 0x2b]), gp(u32::from(KERNEL_DS)));
}

#[test]
fn iret_to_32_bit_code_enters_compatibility_mode() {
    let mut m = Machine::new();
    m.stack(&frame(0x5000, USER_CS32, 2, 0x7000, USER_DS));

    assert_eq!(m.run(IRETQ), Ok(Flow::Jump));
    assert!(m.core.state.is_long_mode() && !m.core.state.is_long_code());
    assert_eq!((m.core.state.rip, m.core.state.cpl), (0x5000, 3));
    assert_eq!(m.core.state.gpr[gpr::RSP], 0x7000);
}

#[test]
fn an_interrupt_and_iret_bring_everything_back() {
    let mut m = Machine::new().user();
    m.set_flags(rflags::IF | rflags::CF | rflags::OF | rflags::DF);
    let before = (
        m.core.state.gpr,
        m.core.state.rflags(),
        m.core.state.segments[index::SS],
    );

    super::deliver_interrupt(&mut m.core, &m.bus, 0x30).unwrap();
    assert_eq!(m.run(IRETQ), Ok(Flow::Jump));

    let after = (
        m.core.state.gpr,
        m.core.state.rflags(),
        m.core.state.segments[index::SS],
    );
    assert_eq!(before, after);
    assert_eq!((m.core.state.rip, m.core.state.cpl), (CODE, 3));
}
