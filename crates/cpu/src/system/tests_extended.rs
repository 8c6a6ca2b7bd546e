//! Extended state: XSAVE and friends, x87 environments, gathers and masked moves.

use super::Flow;
use super::fpu::u64_at;
use super::tests::*;
use crate::exception::{Exception, vector};
use crate::state::{XSAVE_SIZE, XsaveArea, cr0, cr4, gpr};

const AREA: u64 = 0x60000;
/// With operand [rbx].
const XSAVE64: &[u8] = &[0x48, 0x0f, 0xae, 0x23];
const XRSTOR64: &[u8] = &[0x48, 0x0f, 0xae, 0x2b];
const XSAVEC64: &[u8] = &[0x48, 0x0f, 0xc7, 0x23];
const XSAVEOPT64: &[u8] = &[0x48, 0x0f, 0xae, 0x33];
const FXSAVE64: &[u8] = &[0x48, 0x0f, 0xae, 0x03];
const FXRSTOR64: &[u8] = &[0x48, 0x0f, 0xae, 0x0b];

fn machine() -> Machine {
    let mut m = Machine::new().user();
    *m.reg(gpr::RBX) = AREA;
    *m.reg(gpr::RAX) = 7;
    m
}

/// Fills all components with recognizable bytes.
fn fill(m: &mut Machine) {
    let area = &mut m.core.state.xsave.0;
    for (i, byte) in area.iter_mut().enumerate() {
        *byte = (i % 251) as u8 | 1;
    }
    area[24..28].copy_from_slice(&0x1fa0_u32.to_le_bytes());
    area[512..576].fill(0);
    area[512] = 7;
}

fn xmm(m: &Machine, n: usize) -> &[u8] {
    &m.core.state.xsave.0[160 + 16 * n..][..16]
}

fn set_ymm(m: &mut Machine, n: usize, value: [u64; 4]) {
    let bytes: Vec<u8> = value.iter().flat_map(|v| v.to_le_bytes()).collect();
    let area = &mut m.core.state.xsave.0;
    area[512] |= 6;
    area[160 + 16 * n..][..16].copy_from_slice(&bytes[..16]);
    area[576 + 16 * n..][..16].copy_from_slice(&bytes[16..]);
}

fn ymm(m: &Machine, n: usize) -> [u64; 4] {
    let area = &m.core.state.xsave.0;
    let (low, high) = (160 + 16 * n, 576 + 16 * n);
    [
        u64_at(area, low),
        u64_at(area, low + 8),
        u64_at(area, high),
        u64_at(area, high + 8),
    ]
}

#[test]
fn xsave_and_xrstor_bring_everything_back_but_host_pointers() {
    for save in [XSAVE64, XSAVEC64, XSAVEOPT64] {
        let mut m = machine();
        fill(&mut m);
        // control words that loading leaves as they are
        m.core.state.xsave.0[..4].copy_from_slice(&[0x7e, 0x03, 0x81, 0xb8]);
        let before = m.core.state.xsave;
        assert_eq!(m.run(save), Ok(Flow::Next));
        assert_eq!(m.bytes(AREA + 6, 18), [0; 18]);

        m.core.state.xsave = crate::state::XsaveArea::INITIAL;
        assert_eq!(m.run(XRSTOR64), Ok(Flow::Next));

        let after = m.core.state.xsave;
        assert_eq!(before.0[..6], after.0[..6]);
        assert_eq!(before.0[24..28], after.0[24..28]);
        assert_eq!(before.0[32..416], after.0[32..416]);
        assert_eq!(before.0[512..], after.0[512..]);
    }
}

#[test]
fn xsave_leaves_components_alone_that_are_not_asked_for() {
    let mut m = machine();
    fill(&mut m);
    m.put_bytes(AREA, &[0xcc; XSAVE_SIZE]);
    m.put(AREA + 512, 0);
    *m.reg(gpr::RAX) = 4;

    assert_eq!(m.run(XSAVE64), Ok(Flow::Next));

    assert_eq!(m.bytes(AREA, 24), [0xcc; 24]);
    assert_eq!(m.bytes(AREA + 24, 4), 0x1fa0_u32.to_le_bytes());
    assert_eq!(m.bytes(AREA + 160, 256), [0xcc; 256]);
    assert_eq!(m.get(AREA + 512), 4);
}

#[test]
fn xsavec_and_xsaveopt_do_not_write_components_in_their_initial_state() {
    for save in [XSAVEC64, XSAVEOPT64] {
        let mut m = machine();
        fill(&mut m);
        m.core.state.xsave.0[512] = 3;
        m.put_bytes(AREA + 576, &[0xcc; 256]);

        assert_eq!(m.run(save), Ok(Flow::Next));

        assert_eq!(m.bytes(AREA + 576, 256), [0xcc; 256]);
        assert_eq!(m.get(AREA + 512), 3);
    }
}

#[test]
fn components_that_hold_their_initial_values_are_not_in_use_whatever_the_host_says() {
    let mut m = machine();
    m.core.state.xsave = XsaveArea::INITIAL;
    m.core.state.xsave.0[512] = 7;
    m.core.state.xsave.0[160] = 1;

    assert_eq!(m.run(XSAVE64), Ok(Flow::Next));

    assert_eq!(m.get(AREA + 512), 2);
}

#[test]
fn xrstor_of_a_missing_component_initializes_it() {
    let mut m = machine();
    fill(&mut m);
    m.put_bytes(AREA, &[0; XSAVE_SIZE]);
    m.put(AREA + 24, 0x1f80);

    assert_eq!(m.run(XRSTOR64), Ok(Flow::Next));

    let area = &m.core.state.xsave.0;
    assert_eq!(area[..2], [0x7f, 3]);
    assert_eq!(xmm(&m, 0), [0; 16]);
    assert_eq!(area[576..], [0; 256]);
    assert_eq!(area[512], 0);
}

#[test]
fn xrstor_refuses_bad_headers_mxcsr_and_alignment() {
    let bad: [(u64, u64); 6] = [
        (512, 8),
        (512 + 8, 1),
        (512 + 16, 1),
        // compacted: a component that is not in the map, and one that does not exist
        (512 + 8, 1 << 63 | 3),
        (512 + 8, 1 << 63 | 15),
        (24, 0x1_0000_0000 | 0xffff_0000_0000_0000 | 1 << 31),
    ];
    for (offset, value) in bad {
        let mut m = machine();
        m.put(AREA + 24, 0x1f80);
        m.put(AREA + 512, 7);
        m.put(AREA + offset, value);
        let before = m.core.state.xsave;
        assert_eq!(m.run(XRSTOR64), gp(0), "{offset} {value:#x}");
        assert!(before.0 == m.core.state.xsave.0);
    }
    let mut m = machine();
    *m.reg(gpr::RBX) = AREA + 32;
    assert_eq!(m.run(XRSTOR64), gp(0));
    assert_eq!(m.run(XSAVE64), gp(0));
}

#[test]
fn a_fault_at_the_end_of_the_area_leaves_both_sides_alone() {
    let mut m = machine();
    fill(&mut m);
    *m.reg(gpr::RBX) = AREA + 0x1000 - 576;
    m.set_page(AREA + 0x1000, 0);

    assert_eq!(m.run(XSAVE64), Err(missing_page(AREA + 0x1000, true, true)));

    assert_eq!(m.bytes(AREA + 0x1000 - 576, 576), [0; 576]);
}

#[test]
fn the_xsave_family_needs_osxsave_and_ts_clear() {
    let mut m = machine();
    m.core.state.cr0 |= cr0::TS;
    assert_eq!(m.run(XSAVE64), Err(Exception::new(vector::NM)));
    m.core.state.cr4 &= !cr4::OSXSAVE;
    assert_eq!(m.run(XSAVE64), ud());
}

#[test]
fn fxsave_and_fxrstor_keep_the_high_halves() {
    let mut m = machine();
    fill(&mut m);
    let before = m.core.state.xsave;
    assert_eq!(m.run(FXSAVE64), Ok(Flow::Next));
    m.core.state.xsave.0[160..416].fill(0);

    assert_eq!(m.run(FXRSTOR64), Ok(Flow::Next));

    assert_eq!(before.0[160..416], m.core.state.xsave.0[160..416]);
    assert_eq!(before.0[576..], m.core.state.xsave.0[576..]);
    m.put(AREA + 24, 1 << 31);
    assert_eq!(m.run(FXRSTOR64), gp(0));
    *m.reg(gpr::RBX) = AREA + 8;
    assert_eq!(m.run(FXSAVE64), gp(0));
}

#[test]
fn unavailable_units_raise_nm_or_ud_in_the_manuals_order() {
    let mut m = machine();
    let (fld1, addps, vaddps): (&[u8], &[u8], &[u8]) = (
        &[0xd9, 0xe8],
        &[0x0f, 0x58, 0xc1],
        &[0xc5, 0xf0, 0x58, 0xc1],
    );
    let nm = Err(Exception::new(vector::NM));
    m.core.state.cr0 |= cr0::TS;
    for code in [fld1, addps, vaddps] {
        assert_eq!(m.run(code), nm);
    }
    m.core.state.cr0 |= cr0::EM;
    assert_eq!(m.run(fld1), nm);
    assert_eq!(m.run(addps), ud());
    m.core.state.cr0 &= !cr0::EM;
    m.core.state.cr4 &= !cr4::OSFXSR;
    assert_eq!(m.run(addps), ud());
    m.core.state.xcr0 = 3;
    assert_eq!(m.run(vaddps), ud());
}

#[test]
fn an_x87_environment_survives_storing_and_loading() {
    let mut m = machine();
    let area = &mut m.core.state.xsave.0;
    area[512] = 1;
    // TOP = 6, two registers in use: 1.0 and 0.0
    area[2..4].copy_from_slice(&(6_u16 << 11).to_le_bytes());
    area[4] = 0xc0;
    area[32..42].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f]);
    let before = m.core.state.xsave;

    // fnsave [rbx]
    assert_eq!(m.run(&[0xdd, 0x33]), Ok(Flow::Next));

    assert_eq!(m.get(AREA + 8) & 0xffff, 0x4fff);
    assert_eq!(m.core.state.xsave.0[..6], [0x7f, 3, 0, 0, 0, 0]);
    // frstor [rbx]
    assert_eq!(m.run(&[0xdd, 0x23]), Ok(Flow::Next));
    assert_eq!(before.0[..6], m.core.state.xsave.0[..6]);
    assert_eq!(before.0[32..160], m.core.state.xsave.0[32..160]);
}

#[test]
fn fnstenv_masks_all_exceptions() {
    let mut m = machine();
    m.core.state.xsave.0[512] = 1;
    m.core.state.xsave.0[0] = 0x40;

    assert_eq!(m.run(&[0xd9, 0x33]), Ok(Flow::Next));

    assert_eq!(m.get(AREA) as u16, 0x0340);
    assert_eq!(m.core.state.xsave.0[0], 0x7f);
}

#[test]
fn a_gather_that_faults_keeps_what_it_has() {
    let mut m = machine();
    set_ymm(&mut m, 0, [1, 2, 3, 4]);
    // indexes of eight bytes: two good, one on a missing page, one good
    set_ymm(&mut m, 1, [0, 8, 0x1000, 16]);
    set_ymm(&mut m, 2, [1 << 63; 4]);
    m.put(AREA, 0xaa);
    m.put(AREA + 8, 0xbb);
    m.put(AREA + 16, 0xdd);
    m.set_page(AREA + 0x1000, 0);
    // vpgatherqq ymm0, [rbx+ymm1], ymm2
    let gather = &[0xc4, 0xe2, 0xed, 0x91, 0x04, 0x0b];

    assert_eq!(m.run(gather), Err(missing_page(AREA + 0x1000, false, true)));

    assert_eq!(ymm(&m, 0), [0xaa, 0xbb, 3, 4]);
    assert_eq!(ymm(&m, 2), [0, 0, u64::MAX, u64::MAX]);

    m.set_page(AREA + 0x1000, PTE_P | PTE_W | PTE_U);
    m.put(AREA + 0x1000, 0xcc);
    assert_eq!(m.run(gather), Ok(Flow::Next));
    assert_eq!(ymm(&m, 0), [0xaa, 0xbb, 0xcc, 0xdd]);
    assert_eq!(ymm(&m, 2), [0; 4]);
}

#[test]
fn a_gather_whose_registers_are_not_distinct_is_undefined() {
    let mut m = machine();
    // vpgatherqq ymm1, [rbx+ymm1], ymm2
    assert_eq!(m.run(&[0xc4, 0xe2, 0xed, 0x91, 0x0c, 0x0b]), ud());
}

#[test]
fn a_masked_load_touches_only_what_its_mask_chooses() {
    let mut m = machine();
    m.set_page(AREA + 0x1000, 0);
    *m.reg(gpr::RBX) = AREA + 0xff8;
    m.put(AREA + 0xff8, 0x1234);
    set_ymm(&mut m, 0, [9; 4]);
    set_ymm(&mut m, 1, [u64::MAX, 0, 0, 0]);
    // vpmaskmovq ymm0, ymm1, [rbx]
    assert_eq!(m.run(&[0xc4, 0xe2, 0xf5, 0x8c, 0x03]), Ok(Flow::Next));
    assert_eq!(ymm(&m, 0), [0x1234, 0, 0, 0]);

    set_ymm(&mut m, 1, [u64::MAX, u64::MAX, 0, 0]);
    set_ymm(&mut m, 0, [5, 6, 7, 8]);
    // vpmaskmovq [rbx], ymm1, ymm0
    assert_eq!(
        m.run(&[0xc4, 0xe2, 0xf5, 0x8e, 0x03]),
        Err(missing_page(AREA + 0x1000, true, true))
    );
    assert_eq!(m.get(AREA + 0xff8), 0x1234);
}

#[test]
fn maskmovdqu_stores_chosen_bytes_at_rdi() {
    let mut m = machine();
    *m.reg(gpr::RDI) = AREA + 3;
    set_ymm(&mut m, 0, [0x8877_6655_4433_2211, 0xff, 0, 0]);
    set_ymm(&mut m, 1, [0x0080_0080_0000_0080, 0, 0, 0]);

    // maskmovdqu xmm0, xmm1
    assert_eq!(m.run(&[0x66, 0x0f, 0xf7, 0xc1]), Ok(Flow::Next));

    assert_eq!(m.bytes(AREA + 3, 8), [0x11, 0, 0, 0, 0x55, 0, 0x77, 0]);
}

#[test]
fn registers_whose_component_is_initial_read_as_zero() {
    let mut m = machine();
    fill(&mut m);
    m.core.state.xsave.0[512] = 0;
    *m.reg(gpr::RDI) = AREA;

    // maskmovdqu xmm0, xmm1
    assert_eq!(m.run(&[0x66, 0x0f, 0xf7, 0xc1]), Ok(Flow::Next));

    assert_eq!(m.bytes(AREA, 16), [0; 16]);
}
