//! The software CPU under test: a guest of page tables, an IDT and the test pages, that
//! runs each case in ring 3 and stops in ring 0 at the first exception.
//!
//! Called by `runner`. Each vector's handler is one OUT instruction, so that every register
//! is as the exception left it when the bus sees the port; the rest is in the exception's
//! stack frame. Memory is changed between cases as a device would change it, so the CPU has
//! to notice new code by itself.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use strata_cpu::state::{DescriptorTable, Segment, cr0, cr4, efer, segment};
use strata_cpu::{Bus, Cpu, Crew, Exit, Waker};
use strata_memory::{Bytes, GuestAddress, GuestMemory};

use crate::case::{Case, End, Outcome, Width, has_error_code};
use crate::layout::{
    self, Access, CODE_16, CODE_32_SELECTOR, CODE_SELECTOR, DATA_16, FS_BASE, FS_SELECTOR, GS_BASE,
    GS_SELECTOR, PAGE, PAGES, STACK_16, STACK_SELECTOR, Segment16,
};
use crate::native;
use crate::pages::{self, Store};

const PAGE_BYTES: usize = PAGE as usize;
const RAM_SIZE: u64 = 8 << 20;
/// Where page tables are taken from.
const TABLES: u64 = 0x10_0000;
/// Where the supervisor's pages are, and the linear address they are mapped at.
const SYSTEM: u64 = 0x8_0000;
const SYSTEM_LINEAR: u64 = 0xffff_8000_0000_0000;
/// Pages of the supervisor, by offset: descriptor tables, handlers, stack.
const GDT: u64 = 0;
const TSS: u64 = 0x800;
const IDT: u64 = PAGE;
const HANDLERS: u64 = 2 * PAGE;
const HANDLER_STACK: u64 = 3 * PAGE;
const SYSTEM_PAGES: u64 = 4;
/// Bytes from one vector's handler to the next.
const HANDLER_SIZE: u64 = 16;
/// Where test page N is in RAM: every other page, so that neighbours are not neighbours.
const TEST_PAGES: u64 = 0x20_0000;
const TEST_PAGE_STRIDE: u64 = 3 * PAGE;
/// The port that handlers write to.
const PORT: u16 = 0xe0;
const KERNEL_CODE_SELECTOR: u16 = 0x10;
const TSS_SELECTOR: u16 = 0x40;
/// Of a 64-bit TSS without an I/O permission bitmap, in bytes, inclusive.
const TSS_LIMIT: u64 = 103;
/// How often the watchdog looks, in milliseconds; a case gets two to three such periods.
const WATCHDOG_MILLISECONDS: u64 = 250;

/// Why there is no guest.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// No memory for it.
    #[error(transparent)]
    Memory(#[from] strata_memory::Error),
    /// No CPU for it.
    #[error(transparent)]
    Cpu(#[from] strata_cpu::Error),
    /// Its own memory is too small.
    #[error("the guest's tables do not fit its memory")]
    Layout,
}

/// The guest. Belongs to the thread that made it, as its CPU does.
pub struct Guest {
    cpu: Cpu,
    bus: TestBus,
    pages: GuestPages,
    pristine: Vec<[u8; PAGE_BYTES]>,
    watchdog: Watchdog,
}

impl Guest {
    /// Builds the guest.
    pub fn new() -> Result<Self, GuestError> {
        let memory = GuestMemory::new(RAM_SIZE)?;
        let pristine = layout::pristine();
        let cr3 = build(&memory, &pristine).ok_or(GuestError::Layout)?;
        let mut cpu = Cpu::new(&Crew::new(memory.clone(), 1), 0, 1_000_000)?;
        set_mode(&mut cpu, cr3);
        cpu.reset_translations();
        let stop = Arc::new(AtomicBool::new(false));
        let bus = TestBus {
            stop: Arc::clone(&stop),
            waker: cpu.waker(),
            hit: Cell::new(false),
        };
        let watchdog = Watchdog::start(stop, cpu.waker());
        Ok(Self {
            cpu,
            bus,
            pages: GuestPages { memory },
            pristine,
            watchdog,
        })
    }

    /// Runs one case. The text says what went wrong where it did not end in an exception.
    pub fn run(&mut self, case: &Case) -> (Outcome, Option<String>) {
        self.load(case);
        // all forms of blocks and accesses, and the same again for the same case
        let mixed = case.code.iter().fold(0, |mixed, byte| mixed ^ byte);
        self.cpu.set_drafts(mixed & 1 == 0);
        self.cpu.set_restless(mixed & 6 == 0);
        self.bus.stop.store(false, Ordering::SeqCst);
        self.bus.hit.set(false);
        self.watchdog.begin();
        let (cpu, bus) = (&mut self.cpu, &self.bus);
        let exit = catch_unwind(AssertUnwindSafe(|| cpu.run(&bus.stop, bus)));
        self.watchdog.end();
        let mut outcome = Outcome::lost();
        let trouble = match exit {
            Ok(Exit::Stopped) if self.bus.hit.get() => {
                self.record(&mut outcome);
                None
            }
            Ok(Exit::Stopped) => {
                outcome.end = End::Timeout;
                Some(format!("still running at {:#x}", self.cpu.state().rip))
            }
            Ok(other) => Some(format!("{other:?} at {:#x}", self.cpu.state().rip)),
            Err(_) => Some("the CPU panicked".to_owned()),
        };
        pages::take_changes(&mut self.pages, &self.pristine, &mut outcome.changes);
        (outcome, trouble)
    }

    fn load(&mut self, case: &Case) {
        let code = &case.code[..case.code.len().min(case.code_length as usize)];
        pages::write(&mut self.pages, case.code_address, code);
        for patch in case.patches.iter().take(case.patch_count as usize) {
            let length = patch.bytes.len().min(patch.length as usize);
            pages::write(&mut self.pages, patch.address, &patch.bytes[..length]);
        }
        let state = self.cpu.state_mut();
        state.gpr = case.registers.gpr;
        state.rip = case.registers.rip;
        state.set_rflags(case.registers.rflags);
        state.xsave.0.copy_from_slice(&case.xsave.0);
        state.cpl = 3;
        state.segments = ring_3_segments(case.width);
        state.fs_base = FS_BASE;
        state.gs_base = GS_BASE;
        state.cr2 = 0;
        state.interrupt_shadow = false;
    }

    /// Reads the outcome from the CPU and the exception's stack frame (Intel SDM vol. 3A
    /// §6.14.2).
    fn record(&mut self, outcome: &mut Outcome) {
        let state = self.cpu.state();
        let handler = state.rip.wrapping_sub(SYSTEM_LINEAR + HANDLERS) / HANDLER_SIZE;
        let mut frame = state.gpr[4]
            .wrapping_sub(SYSTEM_LINEAR)
            .wrapping_add(SYSTEM);
        let mut pop = || {
            let value = self
                .pages
                .memory
                .ram()
                .read_obj::<u64>(GuestAddress(frame))
                .unwrap_or(0);
            frame = frame.wrapping_add(8);
            value
        };
        outcome.end = End::Exception;
        outcome.vector = handler as u32;
        outcome.error_code = if has_error_code(outcome.vector) {
            pop()
        } else {
            0
        };
        outcome.registers.gpr = state.gpr;
        outcome.registers.rip = pop();
        let _cs = pop();
        outcome.registers.rflags = pop();
        outcome.registers.gpr[4] = pop();
        outcome.cr2 = if outcome.vector == 14 { state.cr2 } else { 0 };
        outcome.fs_base = state.fs_base;
        outcome.gs_base = state.gs_base;
        outcome.xsave.0.copy_from_slice(&state.xsave.0);
        outcome.xsave.normalise();
    }
}

/// The mode in which Linux runs ring 3.
fn set_mode(cpu: &mut Cpu, cr3: u64) {
    let state = cpu.state_mut();
    state.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
    state.cr3 = cr3;
    state.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::FSGSBASE | cr4::OSXSAVE;
    state.efer = efer::SCE | efer::LME | efer::LMA | efer::NXE;
    state.xcr0 = 7;
    state.gdtr = DescriptorTable {
        base: SYSTEM_LINEAR + GDT,
        limit: TSS as u16 - 1,
    };
    state.idtr = DescriptorTable {
        base: SYSTEM_LINEAR + IDT,
        limit: PAGE as u16 - 1,
    };
    // a busy 64-bit TSS
    state.tr = Segment {
        base: SYSTEM_LINEAR + TSS,
        limit: TSS_LIMIT as u32,
        selector: TSS_SELECTOR,
        attributes: 0x008b,
    };
}

fn ring_3_segments(width: Width) -> [Segment; 6] {
    let flat = |selector, attributes| Segment {
        base: 0,
        limit: u32::MAX,
        selector,
        attributes,
    };
    let mut segments = [flat(STACK_SELECTOR, 0xc0f3); 6];
    segments[segment::CS] = match width {
        Width::Bits64 => flat(CODE_SELECTOR, 0xa0fb),
        Width::Bits32 => flat(CODE_32_SELECTOR, 0xc0fb),
        Width::Bits16 => segment_16(CODE_16),
    };
    if width == Width::Bits16 {
        segments[segment::SS] = segment_16(STACK_16);
        segments[segment::DS] = segment_16(DATA_16);
        segments[segment::ES] = segment_16(DATA_16);
    }
    for (number, selector, base) in [
        (segment::FS, FS_SELECTOR, FS_BASE),
        (segment::GS, GS_SELECTOR, GS_BASE),
    ] {
        segments[number] = if native::has_fsgsbase() {
            Segment {
                base,
                ..flat(selector, 0xc0f3)
            }
        } else {
            Segment::default()
        };
    }
    segments
}

fn segment_16(s: Segment16) -> Segment {
    Segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        attributes: if s.code { 0x00fb } else { 0x00f3 },
    }
}

/// Fills guest memory; returns CR3.
fn build(memory: &GuestMemory, pristine: &[[u8; PAGE_BYTES]]) -> Option<u64> {
    const SUPERVISOR: u64 = 0x63; // P, W, A, D
    const USER: u64 = 0x65; // P, U, A, D
    const WRITABLE: u64 = 2;
    const NO_EXECUTE: u64 = 1 << 63;
    let mut tables = Tables {
        memory,
        next: TABLES + PAGE,
    };
    for page in 0..SYSTEM_PAGES {
        tables.map(
            SYSTEM_LINEAR + page * PAGE,
            (SYSTEM + page * PAGE) | SUPERVISOR,
        )?;
    }
    for (index, &(linear, access)) in PAGES.iter().enumerate() {
        let rights = match access {
            Access::ReadOnly => USER | NO_EXECUTE,
            Access::Writable => USER | WRITABLE | NO_EXECUTE,
            Access::Code => USER | WRITABLE,
        };
        tables.map(linear, test_page(index) | rights)?;
        if access == Access::Code {
            let alias = linear - layout::CODE + layout::ALIAS;
            tables.map(alias, test_page(index) | USER | WRITABLE | NO_EXECUTE)?;
        }
        let contents = pristine.get(index)?;
        memory
            .ram()
            .write_slice(contents, GuestAddress(test_page(index)))
            .ok()?;
    }
    write_descriptors(memory)?;
    write_handlers(memory)?;
    Some(TABLES)
}

fn test_page(index: usize) -> u64 {
    TEST_PAGES + index as u64 * TEST_PAGE_STRIDE
}

/// Page tables in the making.
struct Tables<'a> {
    memory: &'a GuestMemory,
    next: u64,
}

impl Tables<'_> {
    /// Maps the 4 KiB page at `linear` by `entry`.
    fn map(&mut self, linear: u64, entry: u64) -> Option<()> {
        const TABLE: u64 = 0x67; // P, W, U, A, D
        const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
        let mut table = TABLES;
        for level in [39, 30, 21] {
            let slot = GuestAddress(table + (linear >> level & 511) * 8);
            let mut next = self.memory.ram().read_obj::<u64>(slot).ok()?;
            if next == 0 {
                next = self.next | TABLE;
                self.next += PAGE;
                self.memory.ram().write_obj(next, slot).ok()?;
            }
            table = next & ADDRESS;
        }
        let slot = GuestAddress(table + (linear >> 12 & 511) * 8);
        self.memory.ram().write_obj(entry, slot).ok()
    }
}

fn write_descriptors(memory: &GuestMemory) -> Option<()> {
    let put = |offset: u64, value: u64| {
        memory
            .ram()
            .write_obj(value, GuestAddress(SYSTEM + offset))
            .ok()
    };
    put(GDT + u64::from(KERNEL_CODE_SELECTOR), 0x00af_9b00_0000_ffff)?;
    put(GDT + u64::from(STACK_SELECTOR & !7), 0x00cf_f300_0000_ffff)?;
    put(GDT + u64::from(CODE_SELECTOR & !7), 0x00af_fb00_0000_ffff)?;
    put(
        GDT + u64::from(CODE_32_SELECTOR & !7),
        0x00cf_fb00_0000_ffff,
    )?;
    let tss = SYSTEM_LINEAR + TSS;
    let low = TSS_LIMIT | (tss & 0xff_ffff) << 16 | 0x8b << 40 | (tss >> 24 & 0xff) << 56;
    put(GDT + u64::from(TSS_SELECTOR), low)?;
    put(GDT + u64::from(TSS_SELECTOR) + 8, tss >> 32)?;
    // RSP0; and an I/O map base beyond the limit: no port is allowed
    let stack = SYSTEM_LINEAR + HANDLER_STACK + PAGE;
    memory
        .ram()
        .write_obj(stack, GuestAddress(SYSTEM + TSS + 4))
        .ok()?;
    memory
        .ram()
        .write_obj(104_u16, GuestAddress(SYSTEM + TSS + 102))
        .ok()
}

fn write_handlers(memory: &GuestMemory) -> Option<()> {
    for vector in 0..256 {
        let offset = HANDLERS + vector * HANDLER_SIZE;
        // OUT 0xe0, AL; and should that not stop the CPU, JMP to itself
        let code = [0xe6, PORT as u8, 0xeb, 0xfe];
        memory
            .ram()
            .write_slice(&code, GuestAddress(SYSTEM + offset))
            .ok()?;
        let address = SYSTEM_LINEAR + offset;
        // #BP and #OF may be raised by software in ring 3
        let rights = if matches!(vector, 3 | 4) { 0xee } else { 0x8e };
        let low = address & 0xffff
            | u64::from(KERNEL_CODE_SELECTOR) << 16
            | rights << 40
            | (address >> 16 & 0xffff) << 48;
        let gate = GuestAddress(SYSTEM + IDT + 16 * vector);
        memory.ram().write_obj(low, gate).ok()?;
        memory
            .ram()
            .write_obj(address >> 32, GuestAddress(gate.0 + 8))
            .ok()?;
    }
    Some(())
}

/// The test pages in guest RAM, written as a device would.
struct GuestPages {
    memory: GuestMemory,
}

impl Store for GuestPages {
    fn page(&self, index: usize) -> &[u8; PAGE_BYTES] {
        let page = self
            .memory
            .host_ptr(test_page(index), PAGE)
            .unwrap_or_else(|| unreachable!());
        // SAFETY: a page of RAM that stays mapped as long as `self.memory`; the CPU, the
        // only other user, does not run while the harness looks.
        unsafe { &*page.cast::<[u8; PAGE_BYTES]>() }
    }

    fn write(&mut self, index: usize, offset: usize, bytes: &[u8]) {
        let address = GuestAddress(test_page(index) + offset as u64);
        let written = self.memory.ram().write_slice(bytes, address);
        debug_assert!(written.is_ok());
    }
}

/// A machine with one port.
struct TestBus {
    stop: Arc<AtomicBool>,
    waker: Waker,
    hit: Cell<bool>,
}

impl Bus for TestBus {
    fn port_read(&self, _port: u16, _size: u8) -> u32 {
        u32::MAX
    }

    fn port_write(&self, port: u16, _size: u8, _value: u32) {
        if port == PORT {
            self.hit.set(true);
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

/// Stops a CPU that does not come to an end by itself.
struct Watchdog {
    shared: Arc<Watched>,
    thread: Option<std::thread::JoinHandle<()>>,
}

#[derive(Default)]
struct Watched {
    /// Odd while a case runs.
    turns: AtomicU64,
    quit: AtomicBool,
}

impl Watchdog {
    fn start(stop: Arc<AtomicBool>, waker: Waker) -> Self {
        let shared = Arc::new(Watched::default());
        let watched = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            let (mut last, mut same) = (0, 0);
            while !watched.quit.load(Ordering::Relaxed) {
                std::thread::park_timeout(Duration::from_millis(WATCHDOG_MILLISECONDS));
                let turns = watched.turns.load(Ordering::SeqCst);
                same = if turns == last && turns % 2 == 1 {
                    same + 1
                } else {
                    0
                };
                last = turns;
                if same >= 2 {
                    stop.store(true, Ordering::SeqCst);
                    waker.wake();
                }
            }
        });
        Self {
            shared,
            thread: Some(thread),
        }
    }

    fn begin(&self) {
        self.shared.turns.fetch_add(1, Ordering::SeqCst);
    }

    fn end(&self) {
        self.shared.turns.fetch_add(1, Ordering::SeqCst);
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.quit.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}
