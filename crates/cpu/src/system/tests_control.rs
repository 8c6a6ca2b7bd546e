//! Control registers, flags, MSRs, ports, CPUID.

use iced_x86::CpuidFeature;

use super::Flow;
use super::cpuid::{Table, Vendor, cpuid};
use super::tests::*;
use crate::exception::Exception;
use crate::state::{cr0, cr4, efer, gpr, rflags};

const WRMSR: &[u8] = &[0x0f, 0x30];
const RDMSR: &[u8] = &[0x0f, 0x32];

/// MOV to control register `n` from RAX.
fn set_cr(m: &mut Machine, n: u8, value: u64) -> Result<Flow, Exception> {
    *m.reg(gpr::RAX) = value;
    if n == 8 {
        m.run(&[0x44, 0x0f, 0x22, 0xc0])
    } else {
        m.run(&[0x0f, 0x22, 0xc0 | n << 3])
    }
}

fn wrmsr(m: &mut Machine, msr: u32, value: u64) -> Result<Flow, Exception> {
    *m.reg(gpr::RCX) = u64::from(msr);
    *m.reg(gpr::RAX) = value & 0xffff_ffff;
    *m.reg(gpr::RDX) = value >> 32;
    m.run(WRMSR)
}

fn rdmsr(m: &mut Machine, msr: u32) -> Result<u64, Exception> {
    *m.reg(gpr::RCX) = u64::from(msr);
    m.run(RDMSR)?;
    Ok(*m.reg(gpr::RDX) << 32 | *m.reg(gpr::RAX))
}

#[test]
fn cr0_refuses_what_the_manual_refuses() {
    let mut m = Machine::new();
    let good = m.core.state.cr0;
    for bad in [
        good | 1 << 32,
        good & !cr0::PE,
        good | cr0::NW,
        good & !cr0::PG,
    ] {
        assert_eq!(set_cr(&mut m, 0, bad), gp(0), "{bad:#x}");
    }
    assert_eq!(
        set_cr(&mut m, 0, good & !cr0::ET | cr0::TS | 1 << 6),
        Ok(Flow::Next)
    );
    assert_eq!(m.core.state.cr0, good | cr0::TS);
}

#[test]
fn clearing_wp_makes_read_only_pages_writable_to_the_kernel() {
    let mut m = Machine::new();
    m.set_page(0x60000, PTE_P);
    *m.reg(gpr::RDI) = 0x60000;
    assert_eq!(m.run(&[0xaa]), Err(Exception::page_fault(0x60000, 3)));

    let cr0 = m.core.state.cr0;
    set_cr(&mut m, 0, cr0 & !cr0::WP).unwrap();

    assert_eq!(m.run(&[0xaa]), Ok(Flow::Next));
}

#[test]
fn cr3_refuses_addresses_beyond_the_physical_width_and_bit_63_without_pcids() {
    let mut m = Machine::new();
    assert_eq!(set_cr(&mut m, 3, 1 << 46 | 0x1000), gp(0));
    assert_eq!(set_cr(&mut m, 3, 1 << 63 | 0x1000), gp(0));

    let cr4 = m.core.state.cr4;
    set_cr(&mut m, 4, cr4 | cr4::PCIDE).unwrap();
    assert_eq!(set_cr(&mut m, 3, 1 << 63 | 0x1001), Ok(Flow::Next));
    assert_eq!(m.core.state.cr3, 0x1001);
}

#[test]
fn cr4_refuses_unknown_bits_pcide_with_a_pcid_set_and_leaving_pae() {
    let mut m = Machine::new();
    let good = m.core.state.cr4;
    for bad in [
        good | 1 << 22,
        good | 1 << 12,
        good | 1 << 40,
        good & !cr4::PAE,
    ] {
        assert_eq!(set_cr(&mut m, 4, bad), gp(0), "{bad:#x}");
    }
    m.core.state.cr3 |= 5;
    assert_eq!(set_cr(&mut m, 4, good | cr4::PCIDE), gp(0));
}

#[test]
fn cr8_is_the_task_priority() {
    let mut m = Machine::new();
    assert_eq!(set_cr(&mut m, 8, 16), gp(0));
    assert_eq!(set_cr(&mut m, 8, 9), Ok(Flow::Next));
    // mov rbx, cr8
    assert_eq!(m.run(&[0x44, 0x0f, 0x20, 0xc3]), Ok(Flow::Next));
    assert_eq!(*m.reg(gpr::RBX), 9);
}

#[test]
fn control_registers_are_for_ring_0() {
    let mut m = Machine::new().user();
    for code in [
        &[0x0f, 0x22, 0xc0][..],
        &[0x0f, 0x20, 0xd8],
        &[0x0f, 0x21, 0xf0],
        &[0x0f, 0x06],
        &[0xf4],
        &[0x0f, 0x01, 0x3b],
        &[0x0f, 0x08],
        &[0x0f, 0x09],
        RDMSR,
        WRMSR,
    ] {
        assert_eq!(m.run(code), gp(0), "{code:x?}");
    }
}

#[test]
fn sti_has_a_shadow_only_when_interrupts_were_off() {
    let mut m = Machine::new();
    assert_eq!(m.run(&[0xfb]), Ok(Flow::Next));
    assert!(m.core.state.interrupt_shadow);

    m.core.state.interrupt_shadow = false;
    assert_eq!(m.run(&[0xfb]), Ok(Flow::Next));
    assert!(!m.core.state.interrupt_shadow);
}

#[test]
fn popf_in_ring_3_keeps_if_and_iopl() {
    let mut m = Machine::new().user();
    m.set_flags(rflags::IF);
    m.stack(&[rflags::IOPL | rflags::ZF | rflags::RF | rflags::VM]);

    assert_eq!(m.run(&[0x9d]), Ok(Flow::Next));

    assert_eq!(
        m.core.state.rflags(),
        rflags::IF | rflags::ZF | rflags::FIXED
    );
    assert_eq!(*m.reg(gpr::RSP), STACK);
    assert_eq!(m.run(&[0xfa]), gp(0));
}

#[test]
fn pushf_with_a_16_bit_operand_pushes_two_bytes() {
    let mut m = Machine::new();
    m.set_flags(rflags::ZF | rflags::ID);

    assert_eq!(m.run(&[0x66, 0x9c]), Ok(Flow::Next));

    assert_eq!(*m.reg(gpr::RSP), STACK - 2);
    assert_eq!(m.stacked(0) as u16, (rflags::ZF | rflags::FIXED) as u16);
}

/// A small generator of reproducible numbers (xorshift).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// An address: in the mapped pages, at their edges, or anywhere.
    fn address(&mut self) -> u64 {
        let n = self.next();
        match n % 8 {
            0 => n,
            1 => n & 0xffff,
            2 => 0xffff_ffff_ffff_fff0 | n >> 60,
            _ => 0x60000 + (n >> 8 & 0x1_fffc),
        }
    }
}

#[test]
fn no_instruction_panics_whatever_its_bytes_and_the_registers() {
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    // the first bytes that lead to what is executed here
    let starts: [&[u8]; 10] = [
        &[],
        &[0x0f],
        &[0x0f, 0x01],
        &[0x0f, 0x00],
        &[0x0f, 0xae],
        &[0x0f, 0xc7],
        &[0x48, 0x0f],
        &[0xf3, 0x48],
        &[0xc4, 0xe2],
        &[0x66, 0x0f, 0x38],
    ];
    for round in 0..200 {
        let mut m = Machine::new();
        m.set_ring(if round % 2 == 0 { 0 } else { 3 });
        for _ in 0..200 {
            let start = starts[numbers.next() as usize % starts.len()];
            let mut code = start.to_vec();
            code.extend(numbers.next().to_le_bytes());
            for register in 0..16 {
                *m.reg(register) = numbers.address();
            }
            if numbers.next().is_multiple_of(4) {
                let flags = numbers.next();
                m.set_flags(flags & !rflags::VM);
            }
            let _ = m.run(&code);
        }
    }
}

#[test]
fn hlt_retires_before_it_waits() {
    let mut m = Machine::new();
    assert_eq!(m.run(&[0xf4]), Ok(Flow::Halt));
    assert_eq!(m.core.state.rip, CODE + 1);
}

#[test]
fn invpcid_checks_type_reserved_bits_and_addresses() {
    let mut m = Machine::new();
    *m.reg(gpr::RBX) = 0x6000;
    let mut check = |kind: u64, low: u64, linear: u64, expected| {
        *m.reg(gpr::RAX) = kind;
        m.put(0x6000, low);
        m.put(0x6008, linear);
        // invpcid rax, [rbx]
        assert_eq!(
            m.run(&[0x66, 0x0f, 0x38, 0x82, 0x03]),
            expected,
            "{kind} {low:#x} {linear:#x}"
        );
    };
    check(0, 0, 0x5000, Ok(Flow::Next));
    check(1, 0, 0, Ok(Flow::Next));
    check(2, 0, 0, Ok(Flow::Next));
    check(3, 0, 0, Ok(Flow::Next));
    check(4, 0, 0, gp(0));
    check(2, 1 << 12, 0, gp(0));
    check(1, 1, 0, gp(0));
    check(0, 0, 1 << 47, gp(0));
}

#[test]
fn xsetbv_wants_x87_and_sse_below_avx() {
    let mut m = Machine::new();
    let all = m.core.cpuid.xcr0();
    let mut check = |value: u64, expected| {
        *m.reg(gpr::RCX) = 0;
        *m.reg(gpr::RAX) = value;
        *m.reg(gpr::RDX) = 0;
        assert_eq!(m.run(&[0x0f, 0x01, 0xd1]), expected, "{value}");
    };
    check(all, Ok(Flow::Next));
    check(1, Ok(Flow::Next));
    check(2, gp(0));
    check(5, gp(0));
    check(9, gp(0));
}

#[test]
fn msr_writes_refuse_reserved_bits_and_non_canonical_addresses() {
    let mut m = Machine::new();
    for msr in [
        0xc000_0082,
        0xc000_0083,
        0xc000_0100,
        0xc000_0101,
        0xc000_0102,
        0x175,
        0x176,
    ] {
        assert_eq!(wrmsr(&mut m, msr, 1 << 47), gp(0), "{msr:#x}");
        assert_eq!(wrmsr(&mut m, msr, HIGH), Ok(Flow::Next));
        assert_eq!(rdmsr(&mut m, msr), Ok(HIGH));
    }
    assert_eq!(wrmsr(&mut m, 0xc000_0080, 1 << 1), gp(0));
    assert_eq!(wrmsr(&mut m, 0x277, 2), gp(0));
    assert_eq!(wrmsr(&mut m, 0xdead, 0), gp(0));
    assert_eq!(rdmsr(&mut m, 0xdead), Err(Exception::general_protection(0)));
}

#[test]
fn efer_keeps_lma_and_refuses_to_leave_long_mode_while_paging() {
    let mut m = Machine::new();
    assert_eq!(
        wrmsr(&mut m, 0xc000_0080, efer::LME | efer::NXE),
        Ok(Flow::Next)
    );
    assert_eq!(m.core.state.efer, efer::LME | efer::LMA | efer::NXE);
    assert_eq!(wrmsr(&mut m, 0xc000_0080, 0), gp(0));
}

#[test]
fn the_tsc_can_be_set_and_deadlines_reach_the_bus_in_host_time() {
    let mut m = Machine::new();
    assert_eq!(wrmsr(&mut m, 0x10, 1 << 60), Ok(Flow::Next));
    m.run(&[0x0f, 0x31]).unwrap();
    let tsc = *m.reg(gpr::RDX) << 32 | *m.reg(gpr::RAX);
    assert_eq!(tsc >> 40, 1 << 20);

    assert_eq!(wrmsr(&mut m, 0x6e0, tsc), Ok(Flow::Next));

    assert_eq!(
        m.bus.deadline.get(),
        tsc.wrapping_sub(m.core.state.tsc_offset)
    );
    assert_eq!(rdmsr(&mut m, 0x6e0), Ok(tsc));
    // long past, but not "none"
    assert_eq!(wrmsr(&mut m, 0x6e0, 1), Ok(Flow::Next));
    assert_eq!(m.bus.deadline.get(), 1);
}

#[test]
fn the_tsc_of_ring_3_obeys_tsd() {
    let mut m = Machine::new().user();
    assert_eq!(m.run(&[0x0f, 0x31]), Ok(Flow::Next));
    m.core.state.cr4 |= cr4::TSD;
    assert_eq!(m.run(&[0x0f, 0x31]), gp(0));
    assert_eq!(m.run(&[0x0f, 0x01, 0xf9]), gp(0));
}

#[test]
fn debug_registers_alias_until_de_is_set() {
    let mut m = Machine::new();
    *m.reg(gpr::RAX) = 0xf;
    // mov dr4, rax; mov rbx, dr6
    m.run(&[0x0f, 0x23, 0xe0]).unwrap();
    m.run(&[0x0f, 0x21, 0xf3]).unwrap();
    assert_eq!(*m.reg(gpr::RBX), 0xffff_0fff);

    m.core.state.cr4 |= cr4::DE;
    assert_eq!(m.run(&[0x0f, 0x23, 0xe0]), ud());
    *m.reg(gpr::RAX) = 1 << 32;
    assert_eq!(m.run(&[0x0f, 0x23, 0xf8]), gp(0));
}

#[test]
fn ports_in_ring_3_are_what_the_tss_allows() {
    let mut m = Machine::new().user();
    m.core.state.tr.limit = 0x68 + 0x100;
    m.put_bytes(TSS + 0x68, &[0xff; 0x101]);
    // ports 0x10 to 0x13 allowed
    m.put_bytes(TSS + 0x68 + 2, &[0xf0]);
    let out = |m: &mut Machine, port: u64, code: &[u8]| {
        *m.reg(gpr::RDX) = port;
        m.run(code)
    };
    assert_eq!(out(&mut m, 0x10, &[0xef]), Ok(Flow::Next));
    assert_eq!(out(&mut m, 0x13, &[0xee]), Ok(Flow::Next));
    assert_eq!(out(&mut m, 0x11, &[0xef]), gp(0));
    assert_eq!(out(&mut m, 0x13, &[0x66, 0xef]), gp(0));
    assert_eq!(out(&mut m, 0x800, &[0xee]), gp(0));
    m.set_flags(rflags::IOPL);
    assert_eq!(out(&mut m, 0x800, &[0xee]), Ok(Flow::Next));
}

#[test]
fn in_zero_extends_a_doubleword_and_keeps_the_rest_of_a_byte() {
    let mut m = Machine::new();
    *m.reg(gpr::RAX) = u64::MAX;
    // in al, 0x70; in eax, 0x70
    m.run(&[0xe4, 0x70]).unwrap();
    assert_eq!(*m.reg(gpr::RAX), 0xffff_ffff_ffff_ff70);
    m.run(&[0xe5, 0x70]).unwrap();
    assert_eq!(*m.reg(gpr::RAX), 0x1234_0070);
}

#[test]
fn hypercalls_are_refused_politely_in_ring_0_only() {
    let mut m = Machine::new();
    m.run(&[0x0f, 0x01, 0xc1]).unwrap();
    assert_eq!(*m.reg(gpr::RAX) as i64, -1000);
    m.set_ring(3);
    assert_eq!(m.run(&[0x0f, 0x01, 0xd9]), ud());
}

#[test]
fn enter_makes_nested_frames_as_the_manual_has_it() {
    let mut m = Machine::new();
    *m.reg(gpr::RBP) = 0x48000;
    m.put(0x48000 - 8, 0x1111);

    // enter 0x20, 2
    assert_eq!(m.run(&[0xc8, 0x20, 0, 2]), Ok(Flow::Next));

    let frame = STACK - 8;
    assert_eq!(*m.reg(gpr::RBP), frame);
    assert_eq!(*m.reg(gpr::RSP), STACK - 24 - 0x20);
    assert_eq!(
        (m.get(frame), m.get(frame - 8), m.get(frame - 16)),
        (0x48000, 0x1111, frame)
    );
}

#[test]
fn cpuid_tells_the_hypervisor_and_mirrors_osxsave() {
    let mut m = Machine::new();
    *m.reg(gpr::RAX) = 0x4000_0000;
    m.run(&[0x0f, 0xa2]).unwrap();
    let name: Vec<u8> = [gpr::RBX, gpr::RCX, gpr::RDX]
        .iter()
        .flat_map(|r| (m.core.state.gpr[*r] as u32).to_le_bytes())
        .collect();
    assert_eq!(name, b"KVMKVMKVM\0\0\0");

    let osxsave = |m: &Machine| cpuid(&m.core, 1, 0)[2] >> 27 & 1;
    assert_eq!(osxsave(&m), 1);
    m.core.state.cr4 &= !cr4::OSXSAVE;
    assert_eq!(osxsave(&m), 0);
}

#[test]
fn cpuid_offers_no_instruction_that_is_not_run() {
    let table = Table::from_host(2_000_000, 0, 1);
    for feature in [
        CpuidFeature::AVX512F,
        CpuidFeature::PKU,
        CpuidFeature::MONITOR,
        CpuidFeature::RDPID,
        CpuidFeature::RTM,
        CpuidFeature::XSAVES,
        CpuidFeature::SVM,
        CpuidFeature::VMX,
        CpuidFeature::SSE4A,
    ] {
        assert!(!table.offered(feature), "{feature:?}");
    }
    assert!(table.offered(CpuidFeature::SSE2));
}

#[test]
fn cpuid_keeps_page_table_isolation_off() {
    let mut m = Machine::new();
    if m.core.cpuid.vendor() == Vendor::Intel {
        assert_eq!(cpuid(&m.core, 7, 0)[3] >> 29 & 1, 1);
        assert_eq!(rdmsr(&mut m, 0x10a).unwrap() & 1, 1);
    } else {
        // Linux trusts AMD not to need it; automatic IBRS spares it retpolines
        assert_eq!(cpuid(&m.core, 0x8000_0021, 0)[0] >> 8 & 1, 1);
    }
}

#[test]
fn leaf_15h_gives_the_tsc_frequency_exactly() {
    let mut m = Machine::new();
    m.core.cpuid = Table::from_host(2_445_406, 0, 1);
    let [denominator, numerator, crystal, _] = cpuid(&m.core, 0x15, 0);
    let hz = u64::from(crystal) * u64::from(numerator) / u64::from(denominator);
    assert_eq!(hz, 2_445_406_000);
}
