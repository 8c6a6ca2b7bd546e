//! The processor's modes, each left and entered as boot code does it: real mode, protected
//! mode with 16- and 32-bit segments, without paging, with 32-bit and PAE paging, IA-32e mode
//! with 64-bit and 32-bit code.
//!
//! The guest code is assembled below and runs at [`BASE`]. It reports by writing words to
//! [`REPORT`]; a write to [`END`] stops it.

use std::arch::global_asm;
use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering};

use strata_cpu::state::{DescriptorTable, Segment, cr0, cr4, efer, gpr, segment};
use strata_cpu::{Bus, Cpu, Crew, Exit, Waker};
use strata_memory::{Bytes, GuestAddress, GuestMemory};

/// Where guest code runs.
const BASE: u64 = 0x8000;
/// The port for reports.
const REPORT: u16 = 0x10;
/// The port that ends a run.
const END: u16 = 0xf4;

/// Guest code `$name`, from `$name` to the same with `_end`.
macro_rules! guest {
    ($name:ident, $end:ident, $($line:literal),+ $(,)?) => {
        global_asm!(
            concat!(".pushsection .rodata.", stringify!($name), ",\"a\""),
            concat!(".global ", stringify!($name)),
            concat!(stringify!($name), ":"),
            $($line,)+
            concat!(".global ", stringify!($end)),
            concat!(stringify!($end), ":"),
            ".code64",
            ".popsection",
            options(att_syntax)
        );
        unsafe extern "C" {
            static $name: u8;
            static $end: u8;
        }
    };
}

macro_rules! code {
    ($name:ident, $end:ident) => {{
        // SAFETY: the two symbols frame bytes of read-only data.
        unsafe {
            let (start, end) = (&raw const $name, &raw const $end);
            std::slice::from_raw_parts(start, end.offset_from(start) as usize)
        }
    }};
}

struct Reports<'a> {
    words: RefCell<Vec<u32>>,
    stop: &'a AtomicBool,
    waker: Waker,
}

impl Bus for Reports<'_> {
    fn port_read(&self, _port: u16, _size: u8) -> u32 {
        u32::MAX
    }
    fn port_write(&self, port: u16, _size: u8, value: u32) {
        let mut words = self.words.borrow_mut();
        if port == REPORT {
            words.push(value);
        }
        if port == END || words.len() > 100 {
            self.stop.store(true, Ordering::SeqCst);
            self.waker.wake();
        }
    }
    fn mmio_read(&self, _address: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _address: u64, _data: &[u8]) {}
    fn msr_read(&self, _msr: u32) -> Option<u64> {
        None
    }
    fn msr_write(&self, _msr: u32, _value: u64) -> Option<()> {
        None
    }
    fn interrupt_pending(&self) -> bool {
        false
    }
    fn acknowledge_interrupt(&self) -> Option<u8> {
        None
    }
    fn task_priority(&self) -> u8 {
        0
    }
    fn set_task_priority(&self, _priority: u8) {}
    fn next_timer(&self) -> Option<u64> {
        None
    }
}

/// Runs guest code in real mode from [`BASE`]; returns what it reported and how it ended.
fn run(code: &[u8]) -> (Vec<u32>, Exit) {
    let memory = GuestMemory::new(16 << 20).unwrap();
    memory.ram().write_slice(code, GuestAddress(BASE)).unwrap();
    let mut cpu = Cpu::new(&Crew::new(memory, 1), 0, 1_000_000).unwrap();
    let state = cpu.state_mut();
    state.segments = [Segment {
        base: 0,
        limit: 0xffff,
        selector: 0,
        attributes: 0x93,
    }; 6];
    state.segments[segment::CS].attributes = 0x9b;
    state.idtr = DescriptorTable {
        base: 0,
        limit: 0x3ff,
    };
    state.cr0 = cr0::ET;
    state.rip = BASE;
    state.gpr[gpr::RSP] = 0x7000;
    cpu.reset_translations();
    let stop = AtomicBool::new(false);
    let bus = Reports {
        words: RefCell::default(),
        stop: &stop,
        waker: cpu.waker(),
    };
    let exit = cpu.run(&stop, &bus);
    (bus.words.into_inner(), exit)
}

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

/// Runs 64-bit guest code in ring 0, with `cr4` beside what paging needs. The first 2 MiB are
/// the supervisor's, the next ring 3's. #PF and #DB have their handlers 64 and 128 bytes
/// into the code.
fn run_long(code: &[u8], cr4: u64) -> (Vec<u32>, Exit) {
    const PAGES: u64 = 0x1000;
    const IDT: u64 = 0x4000;
    const GDT: u64 = 0x5000;
    let memory = GuestMemory::new(16 << 20).unwrap();
    let put = |address: u64, value: u64| {
        let ram = memory.ram();
        ram.write_obj(value, GuestAddress(address)).unwrap();
    };
    put(PAGES, (PAGES + 0x1000) | 7);
    put(PAGES + 0x1000, (PAGES + 0x2000) | 7);
    put(PAGES + 0x2000, 0x83);
    put(PAGES + 0x2008, 0x20_0087);
    for (vector, handler) in [(14, BASE + 64), (1, BASE + 128)] {
        put(IDT + vector * 16, 8 << 16 | 0x8e00 << 32 | handler);
    }
    put(GDT + 8, 0x00af_9b00_0000_ffff);
    memory.ram().write_slice(code, GuestAddress(BASE)).unwrap();
    let mut cpu = Cpu::new(&Crew::new(memory, 1), 0, 1_000_000).unwrap();
    let state = cpu.state_mut();
    state.segments[segment::CS].selector = 8;
    state.segments[segment::CS].attributes = 0xa09b;
    (state.gdtr.base, state.gdtr.limit) = (GDT, 0xf);
    (state.idtr.base, state.idtr.limit) = (IDT, 0xfff);
    state.cr0 = cr0::ET | cr0::PE | cr0::PG | cr0::WP;
    state.cr3 = PAGES;
    state.cr4 = cr4::PAE | cr4;
    state.efer = efer::LME | efer::LMA;
    state.rip = BASE;
    state.gpr[gpr::RSP] = 0x7000;
    cpu.reset_translations();
    let stop = AtomicBool::new(false);
    let bus = Reports {
        words: RefCell::default(),
        stop: &stop,
        waker: cpu.waker(),
    };
    let exit = cpu.run(&stop, &bus);
    (bus.words.into_inner(), exit)
}

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
