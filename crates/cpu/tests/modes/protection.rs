//! SMAP, SMEP and hardware breakpoints, in 64-bit mode.

use strata_cpu::Exit;
use strata_cpu::state::cr4;

use crate::machine::run_long;

guest!(
    access_prevention,
    access_prevention_end,
    "jmp 1f",
    ".balign 64",
    // reports the error code and goes on at R15
    "popq %rax",
    "outl %eax, $0x10",
    "movq %r15, (%rsp)",
    "iretq",
    ".balign 64",
    "ud2",
    "1: movl $0x200000, %ebx",
    "leaq 2f(%rip), %r15",
    "movl (%rbx), %eax", // faults
    "2: stac",
    "movl $7, (%rbx)",
    "movl (%rbx), %eax",
    "outl %eax, $0x10",
    // AC outlives branches of every kind
    "movl $3, %ecx",
    "3: addl $1, (%rbx)",
    "decl %ecx",
    "jnz 3b",
    "leaq 4f(%rip), %rdx",
    "jmp *%rdx",
    "4: call 5f",
    "movl (%rbx), %eax",
    "outl %eax, $0x10",
    "clac",
    "leaq 6f(%rip), %r15",
    "call 5f", // faults on the same code
    "6: popq %rax",
    "leaq 7f(%rip), %r15",
    "movl $1, (%rbx)", // a write
    "7: pushfq",
    "orl $0x40000, (%rsp)",
    "popfq",
    "movl (%rbx), %eax",
    "outl %eax, $0x10",
    // what the processor does by itself is not open
    "leaq 8f(%rip), %r15",
    "movl $0x5a, %eax",
    "movl %eax, 8(%rbx)",
    "clac",
    "leaq 8f(%rip), %r15",
    "jmp *%rbx", // SMEP
    "8: outb %al, $0xf4",
    ".balign 64",
    "5: addl $0x10, (%rbx)",
    "ret",
);

#[test]
fn smap_and_smep_keep_the_supervisor_from_pages_of_ring_3() {
    let code = code!(access_prevention, access_prevention_end);

    let (words, exit) = run_long(code, cr4::SMAP | cr4::SMEP);

    assert_eq!(exit, Exit::Stopped, "{words:x?}");
    let read = 1; // P
    let write = 3; // P, W
    let fetch = 0x11; // P, I
    assert_eq!(
        words,
        [read, 7, 7 + 3 + 0x10, write, write, 7 + 3 + 0x10, fetch],
        "{words:x?}"
    );
}

guest!(
    breakpoints,
    breakpoints_end,
    "jmp 1f",
    ".balign 64",
    "ud2",
    ".balign 64",
    // reports DR6, how far into the code it came, and RF; sets RF
    "pushq %rax",
    "movq %db7, %rax",
    "pushq %rax",
    "xorl %eax, %eax",
    "movq %rax, %db7",
    "movq %db6, %rax",
    "andl $0xe00f, %eax",
    "outl %eax, $0x10",
    "movl 16(%rsp), %eax",
    "subl $0x8000, %eax",
    "outl %eax, $0x10",
    "movl 32(%rsp), %eax",
    "andl $0x10000, %eax",
    "outl %eax, $0x10",
    "orl $0x10000, 32(%rsp)",
    "xorl %eax, %eax",
    "movq %rax, %db6",
    "popq %rax",
    "movq %rax, %db7",
    "popq %rax",
    "iretq",
    ".balign 256, 0x90",
    "1: movl $0x200000, %ebx",
    "leaq 2f(%rip), %rax",
    "movq %rax, %db0",
    "leaq 8(%rbx), %rax",
    "movq %rax, %db1",
    "leaq 16(%rbx), %rax",
    "movq %rax, %db2",
    "movl $0x10, %eax",
    "movq %rax, %db3",
    // DR0: execute; DR1: write 8 bytes; DR2: access 2 bytes; DR3: port, 1 byte
    "movl $0x27900055, %eax",
    "movq %rax, %db7",
    "movl $3, %ecx",
    ".balign 256, 0x90",
    "2: nop", // 0x200: faults each time round
    "decl %ecx",
    "jnz 2b",
    "movq 8(%rbx), %rax", // a read of what only writes hit
    "movb $1, 15(%rbx)",
    ".balign 256, 0x90",
    "movb $1, 7(%rbx)", // beside it
    "movw 17(%rbx), %ax",
    ".balign 256, 0x90",
    "leaq 6(%rbx), %rdi",
    "movl $2, %ecx",
    "rep stosw", // the second iteration
    ".balign 256, 0x90",
    "movl $0x77, %eax",
    "outl %eax, $0x10",
    ".balign 256, 0x90",
    "xorl %eax, %eax",
    "movq %rax, %db7",
    "movb $1, 15(%rbx)",
    // single steps, but not behind MOV SS
    "pushfq",
    "orl $0x100, (%rsp)",
    "popfq",
    "nop",
    "xorl %eax, %eax",
    "movw %ax, %ss",
    "nop",
    "andl $0, (%rsp)",
    "outb %al, $0xf4",
);

#[test]
fn breakpoints_stop_at_code_data_and_ports() {
    let code = code!(breakpoints, breakpoints_end);

    let (words, exit) = run_long(code, cr4::DE);

    assert_eq!(exit, Exit::Stopped, "{words:x?}");
    let fault = [1, 0x200, 0];
    assert_eq!(words[..9], fault.repeat(3), "{words:x?}");
    let (data, rest) = words[9..].split_at(9);
    // a write; a read that begins in the middle; the second store of two
    assert_eq!(data, [2, 0x20d, 0, 4, 0x308, 0, 2, 0x40c, 0], "{words:x?}");
    let (port, steps) = rest.split_at(4);
    // what was written to the port, and the breakpoint after it
    assert_eq!(port, [0x77, 8, 0x507, 0], "{words:x?}");
    let ends: Vec<u32> = steps.chunks(3).map(|step| step[1]).collect();
    // each instruction but MOV SS
    assert_eq!(ends, [0x613, 0x615, 0x618, 0x61c], "{words:x?}");
    assert!(steps.chunks(3).all(|step| step[0] == 0x4000), "{words:x?}");
}
