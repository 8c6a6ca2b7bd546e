//! A machine with one port for reports, and the macros that assemble guest code for it.

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
        std::arch::global_asm!(
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
pub(crate) fn run(code: &[u8]) -> (Vec<u32>, Exit) {
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

/// Runs 64-bit guest code in ring 0, with `cr4` beside what paging needs. The first 2 MiB are
/// the supervisor's, the next ring 3's. #PF and #DB have their handlers 64 and 128 bytes
/// into the code.
pub(crate) fn run_long(code: &[u8], cr4: u64) -> (Vec<u32>, Exit) {
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
