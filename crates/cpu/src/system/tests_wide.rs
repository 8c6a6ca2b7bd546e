//! Wide windows: rows of pages in ring 3, their ends, what empties them, and code that goes through
//! them.

use strata_memory::PAGE_SIZE;

use super::tests::*;
use super::tests_translated::copy;
use crate::mmu::Wide;
use crate::state::gpr;
use crate::{Cpu, Crew};

const LOADS: Wide = Wide {
    store: false,
    number: 0,
};
const STORES: Wide = Wide {
    store: true,
    number: 0,
};

const LARGE: u64 = 2 << 20;
/// The page directory of the first GiB.
const DIRECTORY: u64 = 0x3000;
/// Linear address of the row.
const ROW: u64 = 4 * LARGE;
/// Where its pages are in RAM.
const PAGES: [u64; 3] = [3 * LARGE, LARGE, 2 * LARGE];

const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const IS_LARGE: u64 = 1 << 7;
const USED: u64 = PTE_P | PTE_W | PTE_U | ACCESSED | DIRTY;

fn map(machine: &mut Machine, linear: u64, physical: u64, flags: u64) {
    let entry = DIRECTORY + linear / LARGE * 8;
    machine.put(entry, physical | flags | IS_LARGE);
}

/// In ring 3, with a row of three large pages that do not follow each other in RAM.
fn machine() -> Machine {
    let mut machine = Machine::new();
    for (number, page) in PAGES.into_iter().enumerate() {
        map(&mut machine, ROW + number as u64 * LARGE, page, USED);
    }
    machine.user()
}

/// Where the window is and how far accesses may begin from there.
fn window(machine: &Machine, which: Wide) -> Option<(u64, u64)> {
    let window = &machine.core.state.wide[usize::from(which.store)][0];
    (window.limit != 0).then_some((window.start, window.limit))
}

/// Cycles until a row may be looked at again, but not moved.
const SOON: u64 = 100_000;

const WHOLE: Option<(u64, u64)> = Some((ROW, 3 * LARGE - PAGE_SIZE));

#[test]
fn pages_of_a_row_are_reached_by_one_distance_wherever_they_are() {
    let mut machine = machine();
    for (number, page) in PAGES.into_iter().enumerate() {
        machine.put(page + 0x1238, number as u64 + 7);
    }

    machine.core.fill_wide_window(LOADS, ROW + LARGE + 5, 0);

    assert_eq!(window(&machine, LOADS), WHOLE);
    let delta = machine.core.state.wide[0][0].delta;
    for number in 0..3 {
        let host = (ROW + number * LARGE + 0x1238).wrapping_add(delta) as *const u64;
        // SAFETY: within the row, which is mapped while the window is there.
        assert_eq!(unsafe { host.read() }, number + 7);
    }
}

#[test]
fn a_row_ends_at_a_page_that_an_access_would_change_the_entry_of() {
    for (flags, ends_loads, ends_stores) in [
        (USED & !ACCESSED, true, true),
        (USED & !DIRTY, false, true),
        (USED & !PTE_W, false, true),
        (USED & !PTE_U, true, true),
        (USED & !PTE_P, true, true),
    ] {
        let mut machine = machine();
        map(&mut machine, ROW + 2 * LARGE, PAGES[2], flags);

        for (which, ends) in [(LOADS, ends_loads), (STORES, ends_stores)] {
            machine.core.fill_wide_window(which, ROW, 0);
            let pages = if ends { 2 } else { 3 };
            let expected = Some((ROW, pages * LARGE - PAGE_SIZE));
            assert_eq!(window(&machine, which), expected, "{flags:#x} {which:?}");
        }
        let entry = machine.get(DIRECTORY + (ROW / LARGE + 2) * 8);
        assert_eq!(entry, PAGES[2] | flags | IS_LARGE);
    }
}

#[test]
fn a_row_for_stores_ends_at_a_page_with_code_and_is_left_when_one_gets_some() {
    let mut machine = machine();
    machine.core.mark_code(PAGES[2] + 0x5000, 16);
    for which in [LOADS, STORES] {
        machine.core.fill_wide_window(which, ROW, 0);
    }
    let two = Some((ROW, 2 * LARGE - PAGE_SIZE));
    assert_eq!(window(&machine, LOADS), WHOLE);
    assert_eq!(window(&machine, STORES), two);

    machine.core.mark_code(PAGES[2] + 0x8000, 16);
    assert_eq!(window(&machine, STORES), two);
    machine.core.mark_code(PAGES[1] + 0x5000, 16);
    assert_eq!(window(&machine, STORES), None);
    assert_eq!(window(&machine, LOADS), WHOLE);
    machine.core.fill_wide_window(STORES, ROW, SOON);
    assert_eq!(window(&machine, STORES), None, "it is too soon to move");
    machine.core.fill_wide_window(STORES, ROW, u64::MAX / 2);
    assert_eq!(window(&machine, STORES), Some((ROW, LARGE - PAGE_SIZE)));
}

#[test]
fn flushes_empty_a_window_that_may_hold_what_they_drop() {
    type Flush = fn(&mut crate::mmu::Core);
    let flushes: [(Flush, bool); 7] = [
        (|core| core.flush_page(ROW + LARGE + 0x3000), true),
        (|core| core.flush_page(ROW - 1), false),
        (|core| core.flush_page(ROW + 3 * LARGE), false),
        (|core| core.flush_page(1 << 40), false),
        (|core| core.select_space(true), true),
        (|core| core.flush_all(), true),
        (|core| core.flush_pcid(0), true),
    ];
    for (number, (flush, empties)) in flushes.into_iter().enumerate() {
        let mut machine = machine();
        machine.core.fill_wide_window(LOADS, ROW, 0);
        flush(&mut machine.core);
        let expected = if empties { None } else { WHOLE };
        assert_eq!(window(&machine, LOADS), expected, "{number}");
        // what was mapped for it is there, also before it may move
        machine.core.fill_wide_window(LOADS, ROW, SOON);
        assert_eq!(window(&machine, LOADS), WHOLE, "{number}");
    }
}

/// Runs code that ends with HLT, which faults in ring 3, where accesses at these offsets roam.
fn run(machine: &Machine, cpu: &mut Cpu, roaming: &[(u64, bool)]) {
    copy(&machine.core.state, cpu.state_mut());
    cpu.reset_translations();
    for (offset, store) in roaming {
        let wide = if *store { STORES } else { LOADS };
        cpu.roaming.add(CODE + offset, Some(wide));
    }
    while cpu.state().rip & !(PAGE_SIZE - 1) == CODE {
        assert_eq!(cpu.run_once(&machine.bus), None);
    }
}

fn cpu(machine: &Machine) -> Cpu {
    let crew = Crew::new(machine.core.memory.clone(), 1);
    let mut cpu = Cpu::new(&crew, 0, 1_000_000).unwrap();
    cpu.set_drafts(false);
    cpu
}

/// Steps through the row, which miss every page's window.
const STEP: u64 = 0x5_3008;
const STEPS: u64 = 20_000;

/// The addresses that the code below goes through.
fn addresses() -> impl Iterator<Item = u64> {
    (1..=STEPS).map(|i| ROW + i * STEP % (4 * LARGE))
}

/// Where an address of the row is in RAM; the fourth part is small pages in no order.
fn physical(linear: u64) -> u64 {
    let offset = linear - ROW;
    match PAGES.get((offset / LARGE) as usize) {
        Some(page) => page + offset % LARGE,
        None => 7 * LARGE + offset % LARGE / PAGE_SIZE * 77 % 512 * PAGE_SIZE + offset % PAGE_SIZE,
    }
}

/// Of the small pages, the first that was never accessed.
const UNUSED: u64 = ROW + 3 * LARGE + 300 * PAGE_SIZE;

fn add_small_pages(machine: &mut Machine) {
    let table = 6 * LARGE;
    machine.put(DIRECTORY + (ROW / LARGE + 3) * 8, table | USED);
    for page in 0..512 {
        let linear = ROW + 3 * LARGE + page * PAGE_SIZE;
        let unused = if linear == UNUSED { ACCESSED } else { 0 };
        machine.put(table + page * 8, physical(linear) | USED & !unused);
    }
}

#[test]
fn a_row_goes_on_in_small_pages_to_the_first_that_is_missing() {
    for start in [ROW, ROW + 3 * LARGE + 5, UNUSED - 1] {
        let mut machine = machine();
        add_small_pages(&mut machine);
        let pages = (ROW..UNUSED).step_by(PAGE_SIZE as usize);
        for linear in pages.clone() {
            machine.put(physical(linear) + 16, linear);
        }

        machine.core.fill_wide_window(LOADS, start, 0);

        let whole = Some((ROW, UNUSED - ROW - PAGE_SIZE));
        assert_eq!(window(&machine, LOADS), whole, "{start:#x}");
        let delta = machine.core.state.wide[0][0].delta;
        for linear in pages {
            let host = (linear + 16).wrapping_add(delta) as *const u64;
            // SAFETY: within the row, which is mapped while the window is there.
            assert_eq!(unsafe { host.read() }, linear);
        }
    }
}

#[test]
fn a_row_that_the_tlb_holds_anyway_is_left_to_it() {
    let mut machine = machine();
    add_small_pages(&mut machine);
    // what is behind the page that was not accessed is no mebibyte
    machine.core.fill_wide_window(LOADS, UNUSED + PAGE_SIZE, 0);
    assert_eq!(window(&machine, LOADS), None);
}

#[test]
fn places_that_roam_in_one_row_share_a_window() {
    let mut machine = machine();
    let other = ROW + 8 * LARGE;
    map(&mut machine, other, 5 * LARGE, USED);
    let core = &mut machine.core;

    let first = core.wide_window_at(ROW, false, 0);
    assert_eq!(first, Some(LOADS));
    assert_eq!(core.wide_window_at(ROW + 2 * LARGE, false, 0), first);
    assert_eq!(core.wide_window_at(ROW, true, 0), Some(STORES));
    let second = core.wide_window_at(other, false, 0);
    assert_eq!(second.map(|wide| wide.number), Some(1));
    assert_eq!(core.wide_window_at(other + LARGE, false, 0), None);
    assert_eq!(window(&machine, LOADS), WHOLE);
}

#[test]
fn loads_through_a_wide_window_are_those_of_the_pages_mapped_now() {
    let mut machine = machine();
    add_small_pages(&mut machine);
    for linear in addresses() {
        machine.put(physical(linear), linear);
    }
    // add rax, step; mov rdi, rax; and rdi, mask; add rdx, [rbx + rdi]; dec rcx; jnz; hlt
    machine.put_bytes(
        CODE,
        &[
            0x4c, 0x01, 0xc0, 0x48, 0x89, 0xc7, 0x4c, 0x21, 0xcf, 0x48, 0x03, 0x14, 0x3b, 0x48,
            0xff, 0xc9, 0x75, 0xee, 0xf4,
        ],
    );
    let state = &mut machine.core.state;
    state.gpr[gpr::RBX] = ROW;
    state.gpr[gpr::R8] = STEP;
    state.gpr[gpr::R8 + 1] = 4 * LARGE - 1;
    state.gpr[gpr::RCX] = STEPS;
    let mut cpu = cpu(&machine);
    let sum = addresses().fold(0_u64, u64::wrapping_add);

    run(&machine, &mut cpu, &[(9, false)]);

    assert_eq!(cpu.state().gpr[gpr::RDX], sum);
    assert_eq!(cpu.core.state.wide[0][0].start, ROW);

    // the second page of the row is another one now
    let other = 5 * LARGE;
    map(&mut machine, ROW + LARGE, other, USED);
    for linear in addresses().filter(|a| (a - ROW) / LARGE == 1) {
        machine.put(other + linear % LARGE, linear + 1);
    }
    let moved = addresses().filter(|a| (a - ROW) / LARGE == 1).count() as u64;
    cpu.core.flush_page(ROW + LARGE);
    run(&machine, &mut cpu, &[(9, false)]);
    assert_eq!(cpu.state().gpr[gpr::RDX], sum.wrapping_add(moved));
}

#[test]
fn stores_through_a_wide_window_go_where_the_pages_are_and_are_noticed_where_code_is() {
    let mut machine = machine();
    add_small_pages(&mut machine);
    // add rax, step; mov rdi, rax; and rdi, mask; mov [rbx + rdi], rax; dec rcx; jnz; hlt
    machine.put_bytes(
        CODE,
        &[
            0x4c, 0x01, 0xc0, 0x48, 0x89, 0xc7, 0x4c, 0x21, 0xcf, 0x48, 0x89, 0x04, 0x3b, 0x48,
            0xff, 0xc9, 0x75, 0xee, 0xf4,
        ],
    );
    let state = &mut machine.core.state;
    state.gpr[gpr::RBX] = ROW;
    state.gpr[gpr::R8] = STEP;
    state.gpr[gpr::R8 + 1] = 4 * LARGE - 1;
    state.gpr[gpr::RCX] = STEPS;
    let mut cpu = cpu(&machine);

    run(&machine, &mut cpu, &[(9, true)]);

    assert_eq!(cpu.core.state.wide[1][0].start, ROW);
    // the last value stored to each address
    let mut last = std::collections::BTreeMap::new();
    for (i, linear) in addresses().enumerate() {
        last.insert(physical(linear), (i as u64 + 1) * STEP);
    }
    for (physical, value) in last {
        assert_eq!(machine.get(physical), value);
    }

    let address = addresses().find(|a| (a - ROW) / LARGE == 1).unwrap();
    cpu.core.mark_code(physical(address), 8);
    assert_eq!(cpu.core.state.wide[1][0].limit, 0);
    cpu.core.stale.clear();
    run(&machine, &mut cpu, &[(9, true)]);
    assert!(!machine.core.memory.code().page_has_code(physical(address)));
}
