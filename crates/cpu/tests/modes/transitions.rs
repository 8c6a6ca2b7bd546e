//! From mode to mode.

use strata_cpu::Exit;

use crate::machine::run;

guest!(
    real_mode,
    real_mode_end,
    ".code16",
    // an interrupt through the vector table
    "movw $1f - real_mode + 0x8000, 0x21 * 4",
    "movw $0, 0x21 * 4 + 2",
    "stc",
    "int $0x21",
    "movl $0x100, %eax",
    "adcl $0, %eax",
    "outl %eax, $0x10",
    "jmp 2f",
    "1: movw %sp, %bp",
    "movzwl (%bp), %eax",
    "subl $0x8000, %eax",
    "outl %eax, $0x10", // the offset behind INT
    "movzwl 4(%bp), %eax",
    "andl $0x201, %eax",
    "outl %eax, $0x10", // IF and CF as they were
    "iretw",
    // segments are paragraphs; an offset wraps at 64 KiB
    "2: movw $0x1234, %ax",
    "movw %ax, %ds",
    "movb $0x5a, %ds:0x10",
    "xorw %ax, %ax",
    "movw %ax, %ds",
    "movw $0x1235, %ax",
    "movw %ax, %es",
    "movzbl %es:0, %eax",
    "outl %eax, $0x10", // 0x5a
    "movw $0xfff0, %bx",
    "movw $0x20, %si",
    "movb $0x77, 0x10",
    "movzbl (%bx,%si), %eax",
    "outl %eax, $0x10", // 0x77
    // beyond the limit: #GP without an error code
    "movw $3f - real_mode + 0x8000, 13 * 4",
    "movw $0, 13 * 4 + 2",
    "movw $0xffff, %bx",
    "movw (%bx), %ax",
    "outl %eax, $0x10", // not reached
    "3: movl $13, %eax",
    "outl %eax, $0x10",
    "addw $6, %sp",
    "movzwl %sp, %eax",
    "outl %eax, $0x10", // 0x7000
    // far calls, and string copies between segments
    "lcallw $0x0800, $4f - real_mode",
    "outl %eax, $0x10",
    "outb %al, $0xf4",
    "4: movw $0x2000, %ax",
    "movw %ax, %es",
    "movw $0x8000, %si",
    "xorw %di, %di",
    "movl $0xabcd0004, %ecx",
    "cld",
    "rep movsb",
    "movl %ecx, %eax",
    "outl %eax, $0x10", // 0xabcd0000: only CX counts
    "movw %cs, %ax",
    "movzwl %ax, %eax",
    "outl %eax, $0x10", // 0x800
    "movl %es:0, %eax",
    "cmpl 0x8000, %eax",
    "sete %al",
    "movzbl %al, %eax",
    "lretw",
);

#[test]
fn real_mode_runs_with_segments_vectors_and_far_calls() {
    let (words, exit) = run(code!(real_mode, real_mode_end));

    assert_eq!(exit, Exit::Stopped, "{words:x?}");
    let behind_int = words[0];
    assert!(behind_int > 10 && behind_int < 40, "{behind_int}");
    assert_eq!(
        words[1..],
        [0x001, 0x101, 0x5a, 0x77, 13, 0x7000, 0xabcd_0000, 0x800, 1]
    );
}

guest!(
    all_modes,
    all_modes_end,
    ".set at, 0x8000",
    ".code16",
    "cli",
    "lgdtl 90f - all_modes + at",
    "movl %cr0, %eax",
    "orb $1, %al",
    "movl %eax, %cr0",
    "movw %cs, %ax",
    "movzwl %ax, %eax",
    "outl %eax, $0x10", // still the real-mode selector
    "ljmpl $0x08, $1f - all_modes + at",
    ".code32",
    "1: movw $0x10, %ax",
    "movw %ax, %ds",
    "movw %ax, %es",
    "movw %ax, %ss",
    "movl $0x7000, %esp",
    "movl $0x32, %eax",
    "outl %eax, $0x10",
    // gates: 0x30 to ring 0, 0x31 for ring 3, #GP
    "movl $92f - all_modes + at, %esi",
    "movl $0x9000, %edi",
    "movl $0x0008ee00, %ebx",
    "movl $30f - all_modes + at, %eax",
    "movl $0x30, %ecx",
    "call 20f",
    "movl $31f - all_modes + at, %eax",
    "movl $0x31, %ecx",
    "call 20f",
    "movl $13f - all_modes + at, %eax",
    "movl $13, %ecx",
    "call 20f",
    "lidtl 91f - all_modes + at",
    "int $0x30",
    // ring 3 and back, through the stack in the TSS
    "movw $0x28, %ax",
    "ltr %ax",
    "movl $0x6800, 0xa004",
    "movl $0x10, 0xa008",
    "pushl $0x23",
    "pushl $0x6000",
    "pushfl",
    "pushl $0x1b",
    "pushl $2f - all_modes + at",
    "iretl",
    "2: movw %cs, %ax",
    "movzwl %ax, %ebp",
    "int $0x31", // reports and comes back in ring 0
    // 16-bit protected code with a base
    "3: ljmpl $0x30, $(4f - all_modes)",
    ".code16",
    "4: movl $0x16, %eax",
    "outl %eax, $0x10",
    "pushw $0x1111",
    "movl %esp, %eax",
    "outl %eax, $0x10", // the stack is 32-bit all the same
    "popw %ax",
    "ljmpl $0x08, $5f - all_modes + at",
    ".code32",
    // 32-bit paging with 4 MiB pages: linear 4 MiB is physical 0
    "5: movl $0xb000, %edi",
    "movl $0x83, (%edi)",
    "movl $0x83, 4(%edi)",
    "movl %edi, %cr3",
    "movl $0x10, %eax",
    "movl %eax, %cr4",
    "movl %cr0, %eax",
    "orl $0x80000000, %eax",
    "movl %eax, %cr0",
    "movl $0x4b, 0x5000",
    "movl 0x405000, %eax",
    "outl %eax, $0x10",
    "movl 0xb004, %eax",
    "andl $0x60, %eax",
    "outl %eax, $0x10", // accessed, not dirty
    "movl %cr0, %eax",
    "andl $0x7fffffff, %eax",
    "movl %eax, %cr0",
    // PAE paging: a 2 MiB page, linear 2 MiB is physical 0
    "movl $0xd001, 0xc000",
    "movl $0, 0xc004",
    "movl $0, 0xc008",
    "movl $0, 0xc00c",
    "movl $0, 0xc010",
    "movl $0, 0xc018",
    "movl $0x83, 0xd000",
    "movl $0, 0xd004",
    "movl $0x83, 0xd008",
    "movl $0, 0xd00c",
    "movl $0x20, %eax",
    "movl %eax, %cr4",
    "movl $0xc000, %eax",
    "movl %eax, %cr3",
    "movl %cr0, %eax",
    "orl $0x80000000, %eax",
    "movl %eax, %cr0",
    "movl 0x205000, %eax",
    "outl %eax, $0x10",
    "movl %cr0, %eax",
    "andl $0x7fffffff, %eax",
    "movl %eax, %cr0",
    // IA-32e: PML4 at 0xe000 over the same page directory
    "movl $0xf003, 0xe000",
    "movl $0, 0xe004",
    "movl $0xd003, 0xf000",
    "movl $0, 0xf004",
    "movl $0xe000, %eax",
    "movl %eax, %cr3",
    "movl $0xc0000080, %ecx",
    "rdmsr",
    "orl $0x100, %eax",
    "wrmsr",
    "movl %cr0, %eax",
    "orl $0x80000000, %eax",
    "movl %eax, %cr0",
    "rdmsr",
    "andl $0x400, %eax",
    "outl %eax, $0x10", // LMA: compatibility mode
    "ljmpl $0x38, $6f - all_modes + at",
    ".code64",
    "6: movabsq $0x123456789abcdef0, %rax",
    "shrq $32, %rax",
    "outl %eax, $0x10",
    // to 32-bit code and back by far returns
    "pushq $0x08",
    "pushq $7f - all_modes + at",
    "lretq",
    ".code32",
    "7: movl $0xc0de, %eax",
    "outl %eax, $0x10",
    "lcalll $0x38, $8f - all_modes + at",
    "outb %al, $0xf4",
    ".code64",
    "8: movl 4(%rsp), %eax",
    "outl %eax, $0x10", // CS as the call pushed it
    "outb %al, $0xf4",
    ".code32",
    // writes the gate of vector ECX to handler EAX
    "20: movw %ax, (%edi,%ecx,8)",
    "movw $0x08, 2(%edi,%ecx,8)",
    "movw $0xee00, 4(%edi,%ecx,8)",
    "shrl $16, %eax",
    "movw %ax, 6(%edi,%ecx,8)",
    "ret",
    "30: movl (%esp), %eax",
    "movzbl -1(%eax), %eax",
    "outl %eax, $0x10", // the operand of INT
    "movl 4(%esp), %eax",
    "outl %eax, $0x10",
    "iretl",
    // from ring 3: its CS, its stack, ours; ends in ring 0
    "31: movl 4(%esp), %eax",
    "outl %eax, $0x10",
    "movl 12(%esp), %eax",
    "outl %eax, $0x10",
    "movl %esp, %eax",
    "outl %eax, $0x10",
    "movl %ebp, %eax",
    "outl %eax, $0x10",
    "movw $0x10, %ax",
    "movw %ax, %ds",
    "movl $0x7000, %esp",
    "jmp 3b",
    "13: movl $0xbad, %eax",
    "outl %eax, $0x10",
    "movl (%esp), %eax",
    "outl %eax, $0x10",
    "outb %al, $0xf4",
    ".balign 8",
    "93: .quad 0",
    ".quad 0x00cf9b000000ffff", // 08: 32-bit code
    ".quad 0x00cf93000000ffff", // 10: data
    ".quad 0x00cffb000000ffff", // 18: ring 3 code
    ".quad 0x00cff3000000ffff", // 20: ring 3 data
    ".quad 0x00008900a0000067", // 28: TSS at 0xa000
    ".quad 0x00009b008000ffff", // 30: 16-bit code at 0x8000
    ".quad 0x00af9b000000ffff", // 38: 64-bit code
    "90: .word 0x3f",
    ".long 93b - all_modes + at",
    "91: .word 0x7ff",
    ".long 0x9000",
    "92:",
);

#[test]
fn boot_code_goes_through_every_mode_to_64_bit_code() {
    let (words, exit) = run(code!(all_modes, all_modes_end));

    assert_eq!(exit, Exit::Stopped, "{words:x?}");
    assert_eq!(
        words,
        [
            0x0,  // CS in 16-bit protected mode
            0x32, // 32-bit protected mode
            0x30,
            0x08, // a gate in ring 0
            0x1b,
            0x6000,
            0x6800 - 20,
            0x1b, // a gate from ring 3
            0x16,
            0x6ffe, // a 16-bit code segment with a base
            0x4b,
            0x20,  // 32-bit paging
            0x4b,  // PAE paging
            0x400, // compatibility mode
            0x1234_5678,
            0xc0de,
            0x08, // 64-bit code and back
        ],
        "{words:x?}"
    );
}

guest!(
    virtual_8086,
    virtual_8086_end,
    ".set at, 0x8000",
    ".code16",
    "cli",
    "lgdtl 90f - virtual_8086 + at",
    "movl %cr0, %eax",
    "orb $1, %al",
    "movl %eax, %cr0",
    "ljmpl $0x08, $1f - virtual_8086 + at",
    ".code32",
    "1: movw $0x10, %ax",
    "movw %ax, %ds",
    "movw %ax, %es",
    "movw %ax, %ss",
    "movl $0x7000, %esp",
    // gates of #GP and 0x40; a TSS whose ring 0 stack is at 0x6800
    "movw $13f - virtual_8086 + at, 0x9000 + 13 * 8",
    "movl $0x8e000008, 0x9000 + 13 * 8 + 2",
    "movw $40f - virtual_8086 + at, 0x9000 + 0x40 * 8",
    "movl $0xee000008, 0x9000 + 0x40 * 8 + 2",
    "lidtl 91f - virtual_8086 + at",
    "movw $0x28, %ax",
    "ltr %ax",
    "movl $0x6800, 0xa004",
    "movl $0x10, 0xa008",
    // a call gate from ring 3 that copies one value
    "movl $0x21, %eax",
    "pushl $0x23",
    "pushl $0x6000",
    "pushl $0x1b",
    "pushl $2f - virtual_8086 + at",
    "lretl",
    "2: pushl $0x55aa",
    "lcalll $0x33, $0",
    "movl %esp, %ebp", // the gate's code has dropped the value
    "int $0x40",
    // from the handler on in ring 0: virtual-8086 mode with IOPL 3, then with IOPL 0
    "3: pushl $0x1111",
    "pushl $0x2222",
    "pushl $0x3333",
    "pushl $0x4444",
    "pushl $0x0500", // SS
    "pushl $0x800",  // ESP
    "pushl $0x23002",
    "pushl $0x0800", // CS
    "pushl $4f - virtual_8086",
    "iretl",
    ".code16",
    "4: movw $0x1234, %ax",
    "movw %ax, %ds",
    "sti",
    "cli",
    "pushw %ax",
    "int $0x40",
    "5: pushfw",
    "popw %ax",
    "andw $0x3000, %ax",
    "int $0x40",
    "6: cli", // with IOPL 0 by now
    ".code32",
    "30: movl 8(%esp), %eax",
    "outl %eax, $0x10", // the value
    "movl 4(%esp), %eax",
    "outl %eax, $0x10", // CS of ring 3
    "lretl $4",
    // reports EFLAGS.VM, EAX, CS, SP, DS as pushed, DS as it is
    "40: testl $0x20000, 8(%esp)",
    "jz 41f",
    "movzwl %ax, %eax",
    "outl %eax, $0x10",
    "movl 4(%esp), %eax",
    "outl %eax, $0x10",
    "movl 12(%esp), %eax",
    "outl %eax, $0x10",
    "movl 24(%esp), %eax",
    "outl %eax, $0x10",
    "movw %ds, %ax",
    "movzwl %ax, %eax",
    "outl %eax, $0x10",
    "cmpl $(6b - virtual_8086), (%esp)",
    "jne 42f",
    "andl $~0x3000, 8(%esp)",
    "42: iretl",
    "41: movl %ebp, %eax",
    "outl %eax, $0x10",
    "movw $0x10, %ax",
    "movw %ax, %ds",
    "movl $0x7000, %esp",
    "jmp 3b",
    "13: movl $0xbad, %eax",
    "outl %eax, $0x10",
    "movl (%esp), %eax",
    "outl %eax, $0x10",
    "movl 4(%esp), %eax",
    "subl $(6b - virtual_8086), %eax",
    "outl %eax, $0x10",
    "outb %al, $0xf4",
    ".balign 8",
    "93: .quad 0",
    ".quad 0x00cf9b000000ffff",
    ".quad 0x00cf93000000ffff",
    ".quad 0x00cffb000000ffff",
    ".quad 0x00cff3000000ffff",
    ".quad 0x00008900a0000067", // 28: TSS at 0xa000
    // 30: a call gate to 30, for ring 3, one value
    ".word 30b - virtual_8086 + at, 0x08, 0xec01, 0",
    "90: .word 0x37",
    ".long 93b - virtual_8086 + at",
    "91: .word 0x7ff",
    ".long 0x9000",
);

#[test]
fn a_call_gate_and_virtual_8086_code_enter_ring_0_and_leave_it() {
    let (words, exit) = run(code!(virtual_8086, virtual_8086_end));

    assert_eq!(exit, Exit::Stopped, "{words:x?}");
    assert_eq!(words[..3], [0x55aa, 0x1b, 0x6000], "{words:x?}");
    let pushed = [0x800, 0x7fe, 0x1234, 0];
    assert_eq!(words[3], 0x1234, "{words:x?}");
    assert_eq!(words[4..8], pushed, "{words:x?}");
    assert_eq!(words[8], 0x3000, "{words:x?}");
    assert_eq!(words[9..13], pushed, "{words:x?}");
    // CLI with IOPL 0
    assert_eq!(words[13..], [0xbad, 0, 0], "{words:x?}");
}
