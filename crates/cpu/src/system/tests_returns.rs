//! A guest's calls and returns use the host's, which must not show: returns go where the
//! guest's stack says, whatever was called before.

use super::tests::*;
use super::tests_translated::copy;
use crate::state::{gpr, rflags};
use crate::{Cpu, Crew};

/// `out 0x10, eax; jmp $`
const REPORT: &[u8] = &[0xe7, 0x10, 0xeb, 0xfe];
/// Rounds after which a guest that reported nothing is lost.
const ROUNDS: u32 = 10_000;

/// Runs until EAX is reported, and returns it.
#[track_caller]
fn report(machine: &Machine) -> u32 {
    let crew = Crew::new(machine.core.memory.clone(), 1);
    let mut cpu = Cpu::new(&crew, 0, 1_000_000).unwrap();
    copy(&machine.core.state, cpu.state_mut());
    cpu.reset_translations();
    for _ in 0..ROUNDS {
        assert_eq!(cpu.run_once(&machine.bus), None);
        if let Some((0x10, 4, value)) = machine.bus.written.borrow().first() {
            return *value;
        }
    }
    panic!("nothing was reported; RIP is {:#x}", cpu.state().rip);
}

/// A machine with this code, in a ring that may report.
fn with_code(parts: &[&[u8]], ring: u8) -> Machine {
    let mut machine = Machine::new();
    machine.put_bytes(CODE, &parts.concat());
    machine.set_ring(ring);
    machine.set_flags(rflags::IOPL);
    machine
}

#[test]
fn recursion_deeper_than_the_return_stack_comes_back() {
    for ring in [0, 3] {
        let mut machine = with_code(
            &[
                &[0xb9, 0xa0, 0x86, 0x01, 0x00], // mov ecx, 100000
                &[0x31, 0xc0],                   // xor eax, eax
                &[0xe8, 4, 0, 0, 0],             // call f
                REPORT,
                &[0xff, 0xc9],                   // f: dec ecx
                &[0x74, 5],                      // jz over
                &[0xe8, 0xf7, 0xff, 0xff, 0xff], // call f
                &[0xff, 0xc0],                   // over: inc eax
                &[0xc3],
            ],
            ring,
        );
        *machine.reg(gpr::RSP) = 0x1f_0000;

        assert_eq!(report(&machine), 100_000, "ring {ring}");
    }
}

#[test]
fn a_function_may_change_where_it_returns_to() {
    let machine = with_code(
        &[
            &[0xb9, 9, 0, 0, 0],  // mov ecx, 9
            &[0x31, 0xc0],        // xor eax, eax
            &[0xe8, 11, 0, 0, 0], // again: call f
            &[0x83, 0xc8, 0x01],  // or eax, 1
            &[0xff, 0xc9],        // dec ecx
            &[0x75, 0xf4],        // jnz again
            REPORT,
            &[0x48, 0x83, 0x04, 0x24, 3], // f: add qword [rsp], 3
            &[0xc3],
        ],
        3,
    );

    assert_eq!(report(&machine), 0);
}

#[test]
fn two_stacks_take_turns() {
    let mut machine = with_code(
        &[
            &[0xb9, 50, 0, 0, 0], // mov ecx, 50
            &[0x31, 0xc0],        // xor eax, eax
            &[0xe8, 23, 0, 0, 0], // again: call turn
            &[0x83, 0xc0, 0x01],  // add eax, 1
            &[0xff, 0xc9],        // dec ecx
            &[0x75, 0xf4],        // jnz again
            REPORT,               // at 23:
            &[0x05, 0, 1, 0, 0],  // add eax, 0x100
            &[0xe8, 2, 0, 0, 0],  // call turn
            &[0xeb, 0xf4],        // jmp to 23
            &[0x48, 0x87, 0xdc],  // turn: xchg rsp, rbx
            &[0xc3],
        ],
        3,
    );
    machine.put(STACK + 0x8000, CODE + 23);
    *machine.reg(gpr::RBX) = STACK + 0x8000;

    assert_eq!(report(&machine), 50 + 50 * 0x100);
}

#[test]
fn the_supervisor_does_not_return_with_the_rights_of_ring_3() {
    let mut machine = with_code(
        &[
            &[0xe8, 32, 0, 0, 0],      // again: call enter
            &[0x8c, 0xc8],             // mov eax, cs
            &[0x01, 0xc2],             // add edx, eax
            &[0xff, 0xce],             // dec esi
            &[0x74, 14],               // jz done
            &[0xb9, 0, 0, 3, 0],       // mov ecx, again
            &[0x41, 0xbb, 2, 0, 0, 0], // mov r11d, 2
            &[0x48, 0x0f, 0x07],       // sysret
            &[0x89, 0xd0],             // done: mov eax, edx
            REPORT,
            &[0x90, 0x90, 0x90, 0x90],
            &[0x0f, 0x05], // enter: syscall
        ],
        3,
    );
    // push again + 5; ret
    machine.put_bytes(CODE + 0x100, &[0x68, 5, 0, 3, 0, 0xc3]);
    let state = &mut machine.core.state;
    state.msrs.star = 0x23 << 48 | u64::from(KERNEL_CS) << 32;
    state.msrs.lstar = CODE + 0x100;
    state.gpr[gpr::RDX] = 0;
    state.gpr[gpr::RSI] = 20;

    assert_eq!(report(&machine), 20 * u32::from(KERNEL_CS));
}

#[test]
fn a_function_may_change_the_code_that_it_returns_to() {
    for ring in [0, 3] {
        let machine = with_code(
            &[
                &[0xb9, 9, 0, 0, 0],  // mov ecx, 9
                &[0x31, 0xc0],        // xor eax, eax
                &[0xe8, 11, 0, 0, 0], // again: call f
                &[0x83, 0xc0, 0x00],  // add eax, 0, at 12
                &[0xff, 0xc9],        // dec ecx
                &[0x75, 0xf4],        // jnz again
                REPORT,
                &[0xfe, 0x05, 0xf1, 0xff, 0xff, 0xff], // f: inc byte [14]
                &[0xc3],
            ],
            ring,
        );

        assert_eq!(report(&machine), (1..=9).sum::<u32>(), "ring {ring}");
    }
}

#[test]
fn a_function_may_map_other_code_to_where_it_returns_to() {
    let page = |add: u32| {
        let parts: [&[u8]; 6] = [
            &[0xe8, 0xfb, 0x0f, 0, 0], // again: call f, in the next page
            &[0x05],
            &add.to_le_bytes(), // add eax, ...
            &[0xff, 0xc9],      // dec ecx
            &[0x75, 0xf2],      // jnz again
            REPORT,
        ];
        parts.concat()
    };
    let mut machine = with_code(&[&page(1)], 0);
    machine.put_bytes(CODE + 0x2000, &page(0x100));
    let f: [&[u8]; 3] = [
        &[0x48, 0x87, 0x14, 0x25, 0x80, 0x41, 0, 0], // xchg rdx, [0x4180]
        &[0x0f, 0x01, 0x3c, 0x25, 0, 0, 3, 0],       // invlpg [CODE]
        &[0xc3],
    ];
    machine.put_bytes(CODE + 0x1000, &f.concat());
    let state = &mut machine.core.state;
    state.gpr[gpr::RAX] = 0;
    state.gpr[gpr::RCX] = 20;
    state.gpr[gpr::RDX] = (CODE + 0x2000) | PTE_P | PTE_W | PTE_U;

    assert_eq!(report(&machine), 10 + 10 * 0x100);
}
