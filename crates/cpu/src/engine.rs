//! Runs a vCPU: finds or makes blocks, enters them, and settles why they came back.
//!
//! ```text
//!           ┌── interrupt? ── deliver ──┐
//!   run ────┤                           ▼
//!           └── find block ── enter ── translated code ── leave ──► system instruction,
//!                  ▲                     ▲    │                      exception, chain,
//!                  └─ translate          └────┘ slow access          attention
//! ```

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use iced_x86::{CpuidFeature, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use strata_memory::PAGE_SIZE;

use crate::Error;
use crate::blocks::{Blocks, Key};
use crate::bus::{Bus, Waker};
use crate::crew::Crew;
use crate::exception::{Exception, vector};
use crate::hash::BuildFast;
use crate::mmu::{Core, JumpEntry, Kind, Privilege, Target, apart_table, jump_table};
use crate::segmentation::Legacy;
use crate::signal::{self, Window};
use crate::startup::Startup;
use crate::state::{BOUNCE_SIZE, State, cr0, cr4, gpr, rflags};
use crate::system::{self, Flow};
use crate::translate::asm::Asm;
use crate::translate::cache::CodeCache;
use crate::translate::legacy::FAULT_WAITS;
use crate::translate::lower::{ATTENTION_CHECK, Flags, Mode, Tools, meta};
use crate::translate::thunks::{self, Callbacks, Leave, Thunks};
use crate::translate::{Source, translate};

/// Address space for translated code, in bytes. Pages are used as code is made.
const CACHE_SIZE: usize = 64 << 20;
/// When less than this is left, the cache is emptied.
const CACHE_RESERVE: usize = 64 << 10;
/// The longest instruction, in bytes.
const MAX_INSTRUCTION: usize = 15;

/// Why [`Cpu::run`] returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// `stop` was set.
    Stopped,
    /// A triple fault.
    TripleFault,
    /// Something this CPU does not do; says what.
    Fatal(String),
}

/// How much was translated, for reports.
#[derive(Clone, Copy, Debug, Default)]
pub struct Statistics {
    /// Blocks made since the start.
    pub blocks: u64,
    /// Bytes of host code in the cache now.
    pub cache_bytes: usize,
    /// Times the cache was emptied.
    pub flushes: u64,
    /// Instructions that translated code left to Rust since the start.
    pub departures: u64,
}

/// A software vCPU. It may be made on one thread and run on another, which it belongs to while
/// [`Cpu::run`] is on it.
pub struct Cpu {
    pub(crate) core: Core,
    blocks: Blocks,
    cache: CodeCache,
    thunks: Thunks,
    thunks_end: usize,
    tools: Tools,
    /// Set while translated code runs, for the slow paths.
    bus: Option<&'static dyn Bus>,
    /// Where the parts of a bounced access are, and their lengths.
    bounced: [(Target, usize); 2],
    /// What a slow path raised.
    raised: Option<Exception>,
    /// The next instruction runs as a block of its own, since it writes its own block.
    alone: bool,
    /// It does so with all other vCPUs stopped.
    exclusive: bool,
    /// The next block checks every access by itself, since a span's check failed.
    apart: bool,
    /// #DB waits: SS was loaded.
    debug_held: bool,
    /// The control bits that current jump-cache entries were made under.
    controls: (u64, u64, u64, bool, bool),
    pub(crate) startup: Startup,
    /// Modes other than those of 64-bit code that blocks were made for, and their tags.
    legacy_modes: HashMap<Mode, u16, BuildFast>,
    statistics: Statistics,
}

// SAFETY: what it points to (state block, address spaces, code cache) it owns and takes along.
// Nothing in it is bound to a thread but `bus`, which is `None` outside `run`; `run` itself sets
// what the thread needs (the GS base, the window of the signal handler), and borrows `self`
// mutably for as long.
unsafe impl Send for Cpu {}

impl Cpu {
    /// The vCPU with number `index` of `crew`, with the state after reset but in no mode
    /// that it could run in: set CR0, CR4, EFER, segments and RIP before running. The
    /// guest is told that the TSC runs at `tsc_khz`.
    pub fn new(crew: &Arc<Crew>, index: u32, tsc_khz: u32) -> Result<Self, Error> {
        let mask = host_extended_state()?;
        let core = Core::new(crew, index, tsc_khz);
        let mut cache = CodeCache::new(CACHE_SIZE).map_err(Error::CodeCache)?;
        let mut asm = Asm::new(cache.base());
        let callbacks = Callbacks {
            access: access as *const () as u64,
            commit: commit as *const () as u64,
        };
        let thunks = thunks::emit(&mut asm, mask, &callbacks);
        cache.append(&asm.bytes);
        let thunks_end = cache.used();
        Ok(Self {
            core,
            blocks: Blocks::default(),
            cache,
            thunks,
            thunks_end,
            tools: Tools {
                encoder: iced_x86::Encoder::new(64),
                info: iced_x86::InstructionInfoFactory::new(),
            },
            bus: None,
            bounced: NOWHERE,
            raised: None,
            alone: false,
            exclusive: false,
            apart: false,
            debug_held: false,
            controls: (0, 0, 0, false, false),
            startup: Startup::default(),
            legacy_modes: HashMap::default(),
            statistics: Statistics::default(),
        })
    }

    /// A handle to interrupt this vCPU with.
    pub fn waker(&self) -> Waker {
        Waker(Arc::clone(self.core.state.block()))
    }

    /// The architectural state.
    pub fn state(&self) -> &State {
        &self.core.state
    }

    /// The architectural state, to change while the vCPU does not run. After changing
    /// control registers or EFER, call [`Cpu::reset_translations`].
    pub fn state_mut(&mut self) -> &mut State {
        &mut self.core.state
    }

    /// Forgets all translated code and all TLB contents.
    pub fn reset_translations(&mut self) {
        self.empty_cache();
        self.core.flush_all();
        self.core.select_space(false);
    }

    /// How much was translated.
    pub fn statistics(&self) -> Statistics {
        Statistics {
            cache_bytes: self.cache.used(),
            ..self.statistics
        }
    }

    fn empty_cache(&mut self) {
        for page in self.blocks.pages() {
            let cpu = self.core.seat.index();
            self.core.memory.code().clear_page(cpu, page * PAGE_SIZE);
        }
        self.blocks.clear(&mut self.cache, self.thunks_end);
        self.legacy_modes.clear();
        self.core.flush_jumps();
        self.statistics.flushes += 1;
    }

    /// Runs the guest until `stop` is set (and the vCPU woken), or it cannot go on.
    pub fn run(&mut self, stop: &AtomicBool, bus: &dyn Bus) -> Exit {
        self.begin(bus);
        let exit = loop {
            if let Some(exit) = self.step(stop, bus) {
                break exit;
            }
        };
        self.end();
        exit
    }

    /// Makes this thread one that translated code can run on, until `end`.
    fn begin(&mut self, bus: &dyn Bus) {
        self.core.state.runtime = (&raw mut *self).cast::<c_void>();
        // SAFETY: only the lifetime is widened; `end` clears `self.bus` before `bus` ends, and
        // only slow paths in between read it.
        self.bus = Some(unsafe { std::mem::transmute::<&dyn Bus, &'static dyn Bus>(bus) });
        let block: *const crate::state::Block = &raw const **self.core.state.block();
        // SAFETY: sets this thread's GS base, which nothing else in the process uses on
        // x86-64 Linux (thread-local storage is FS).
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, block as u64) };
        signal::set_window(Some(Window {
            start: self.cache.base(),
            end: self.cache.end(),
            thunk: self.thunks.host_fault,
            state: &raw mut *self.core.state,
        }));
        self.core.resume();
    }

    fn end(&mut self) {
        self.end_access();
        self.core.seat.rest();
        signal::set_window(None);
        // the guest's x87 state is saved; a pending exception of it must not meet host code
        // SAFETY: FNINIT only resets the x87 state, which Rust code does not use.
        unsafe { std::arch::asm!("fninit", options(nomem, nostack)) };
        self.bus = None;
    }

    /// One round of `run`.
    #[cfg(test)]
    pub(crate) fn run_once(&mut self, bus: &dyn Bus) -> Option<Exit> {
        self.begin(bus);
        let exit = self.step(&AtomicBool::new(false), bus);
        self.end();
        exit
    }

    /// One round: interrupts, then one entry into translated code and what it led to.
    fn step(&mut self, stop: &AtomicBool, bus: &dyn Bus) -> Option<Exit> {
        self.end_access();
        if self.attend() {
            self.take_signals(bus);
        }
        if stop.load(Ordering::SeqCst) {
            return Some(Exit::Stopped);
        }
        if self.startup.is_pending() && self.settle_startup(stop, bus).is_err() {
            return Some(Exit::TripleFault);
        }
        if std::mem::take(&mut self.exclusive) {
            self.core.begin_exclusive();
        }
        if std::mem::take(&mut self.core.all_stale) {
            self.empty_cache();
        }
        self.drop_stale();
        let shadow = std::mem::take(&mut self.core.state.interrupt_shadow);
        if self.core.check_interrupts {
            if shadow {
                // look again as soon as the shadow has passed
                self.core
                    .state
                    .block()
                    .attention
                    .0
                    .store(1, Ordering::SeqCst);
            } else if self.core.state.rflags() & rflags::IF != 0 {
                if let Some(number) = bus.acknowledge_interrupt() {
                    if system::deliver_interrupt(&mut self.core, bus, number).is_err() {
                        return Some(self.undelivered());
                    }
                } else {
                    self.core.check_interrupts = false;
                }
            }
        }
        let trap = self.core.state.rflags() & rflags::TF != 0;
        let apart = std::mem::take(&mut self.apart);
        let watched = self.core.breakpoints_enabled();
        if watched && self.meets_breakpoint() {
            return self.deliver(bus, Exception::new(vector::DB));
        }
        let single = trap || watched || std::mem::take(&mut self.alone);
        let shape = match (single, apart) {
            (true, _) => Shape::Single,
            (false, true) => Shape::Apart,
            (false, false) => Shape::Whole,
        };
        let made = self.statistics.blocks;
        let entry = match self.find_entry(shape) {
            Ok(entry) => entry,
            Err(exception) => return self.deliver(bus, exception),
        };
        // a new block runs once at least, however often others store to its bytes
        let entry = if shadow || single || made != self.statistics.blocks {
            entry + ATTENTION_CHECK
        } else {
            entry
        };
        self.core.state.interrupts_held = u64::from(self.core.check_interrupts);
        // SAFETY: `entry` is in a live block of this vCPU's cache, GS and the window are
        // set, and the state is only reached through raw pointers until it returns.
        let code = unsafe {
            let enter: extern "sysv64" fn(u64) -> u32 =
                std::mem::transmute(self.thunks.enter as *const ());
            enter(entry)
        };
        let leave = Leave::from_code(code);
        let done = match leave {
            Leave::Lookup | Leave::Attention => true,
            Leave::Apart => {
                self.apart = true;
                true
            }
            Leave::Branch => match self.check_branch() {
                Ok(()) => true,
                Err(exception) => return self.deliver(bus, exception),
            },
            Leave::Link => {
                self.link();
                true
            }
            Leave::System => return self.system(stop, bus, trap),
            Leave::Exception => match self.raised.take() {
                Some(exception) => return self.deliver(bus, exception),
                None => false,
            },
            Leave::Fault => {
                let word = self.core.state.temp[0];
                let mut exception = Exception::with_code(word as u8, 0);
                if word & FAULT_WAITS != 0 && self.core.state.x87_pending() {
                    exception = Exception::new(vector::MF);
                }
                return self.deliver(bus, exception);
            }
            Leave::HostFault => return self.host_fault(bus),
        };
        if done && leave != Leave::Attention {
            return self.debug_trap(bus, trap);
        }
        None
    }

    /// Whether an instruction breakpoint faults before the next instruction; notes which.
    fn meets_breakpoint(&mut self) -> bool {
        if std::mem::take(&mut self.debug_held) {
            return false;
        }
        self.core.debug_hits = 0;
        let hits = self.core.instruction_hits();
        self.core.state.dr[4] |= hits;
        hits != 0
    }

    /// After an instruction: #DB if it ran with TF set or hit a breakpoint.
    fn debug_trap(&mut self, bus: &dyn Bus, trap: bool) -> Option<Exit> {
        let hits = std::mem::take(&mut self.core.debug_hits);
        if !trap && hits == 0 {
            return None;
        }
        system::deliver_debug_trap(&mut self.core, bus, hits, trap)
            .is_err()
            .then(|| self.undelivered())
    }

    fn deliver(&mut self, bus: &dyn Bus, exception: Exception) -> Option<Exit> {
        tracing::trace!(?exception, rip = self.core.state.rip, "exception");
        system::deliver_exception(&mut self.core, bus, exception)
            .is_err()
            .then(|| self.undelivered())
    }

    /// Why an exception or interrupt could not be delivered.
    fn undelivered(&mut self) -> Exit {
        let reason = self.core.fatal.take();
        reason.map_or(Exit::TripleFault, |reason| Exit::Fatal(reason.into()))
    }

    fn system(&mut self, stop: &AtomicBool, bus: &dyn Bus, trap: bool) -> Option<Exit> {
        let number = self.core.state.temp[0];
        let Some(instruction) = self.blocks.system(number) else {
            return Some(Exit::Fatal(format!("no system instruction {number}")));
        };
        if instruction.is_call_near_indirect() {
            // translated code leaves these only when the target is not canonical
            return self.deliver(bus, Exception::general_protection(0));
        }
        self.statistics.departures += 1;
        let flow = system::execute(&mut self.core, bus, &instruction);
        // entering a handler clears TF, and what an INT sets off is over with it
        let entered = match instruction.mnemonic() {
            Mnemonic::Int | Mnemonic::Int1 | Mnemonic::Int3 | Mnemonic::Syscall => true,
            Mnemonic::Into => flow == Ok(Flow::Jump),
            _ => false,
        };
        match flow {
            Ok(Flow::Next) => self.core.state.rip = instruction.next_ip(),
            Ok(Flow::Jump) => {}
            Ok(Flow::Halt) => self.halt(stop, bus),
            Ok(Flow::Pause) => {
                self.core.state.rip = instruction.next_ip();
                self.core.pause();
            }
            Ok(Flow::Fatal(reason)) => return Some(Exit::Fatal(reason)),
            Err(_) if self.core.fatal.is_some() => return Some(self.undelivered()),
            Err(exception) => return self.deliver(bus, exception),
        }
        if loads_stack(&instruction) {
            // #DB waits for the next instruction (Intel SDM vol. 3A §6.8.3)
            self.debug_held = self.core.breakpoints_enabled();
            return None;
        }
        self.debug_trap(bus, trap && !entered)
    }

    /// After an indirect branch that found no block: a target that is not canonical is the
    /// branch's own fault (Intel SDM vol. 2, JMP, RET), so what it did is undone.
    fn check_branch(&mut self) -> Result<(), Exception> {
        let state = &mut *self.core.state;
        if Core::canonical(state.rip) {
            return Ok(());
        }
        state.rip = state.temp[0];
        let rip = state.rip;
        let bus = self.current_bus();
        let mut bytes = [0; MAX_INSTRUCTION];
        // RET is one byte, or three with the count of what it drops
        let length = (PAGE_SIZE - rip % PAGE_SIZE).min(MAX_INSTRUCTION as u64) as usize;
        let (first, second) = bytes.split_at_mut(length);
        self.core
            .read_linear(bus, rip, first, Privilege::Supervisor)?;
        // it was fetched, so what lies there of it can be read
        let _ = self.core.read_linear(
            bus,
            rip.wrapping_add(length as u64),
            second,
            Privilege::Supervisor,
        );
        let instruction = Decoder::with_ip(64, &bytes, rip, DecoderOptions::NONE).decode();
        if instruction.mnemonic() == Mnemonic::Ret {
            let dropped = if instruction.op_count() == 1 {
                u64::from(instruction.immediate16())
            } else {
                0
            };
            let rsp = &mut self.core.state.gpr[gpr::RSP];
            *rsp = rsp.wrapping_sub(8 + dropped);
        }
        Err(Exception::general_protection(0))
    }

    /// Waits until there is an interrupt to take or the vCPU is to stop.
    fn halt(&mut self, stop: &AtomicBool, bus: &dyn Bus) {
        let enabled = self.core.state.rflags() & rflags::IF != 0;
        self.core.state.interrupt_shadow = false;
        loop {
            self.attend();
            self.drop_stale();
            if self.take_signals(bus) || self.takes_nmi() || stop.load(Ordering::SeqCst) {
                return;
            }
            if enabled && bus.interrupt_pending() {
                self.core.check_interrupts = true;
                return;
            }
            let wait = if enabled {
                bus.next_timer().map(|at| self.until(at))
            } else {
                None
            };
            self.core.seat.rest();
            self.core.state.block().attention.wait(wait);
            self.core.resume();
        }
    }

    /// Takes the attention word back and sees to what other vCPUs set it for. Returns
    /// whether it was set.
    pub(crate) fn attend(&mut self) -> bool {
        let attention = &self.core.state.block().attention.0;
        if attention.swap(0, Ordering::SeqCst) == 0 {
            return false;
        }
        self.core.check_interrupts = true;
        self.core.meet_crew();
        true
    }

    /// Time until the host TSC reaches `at`.
    fn until(&self, at: u64) -> Duration {
        let cycles = at.saturating_sub(host_tsc());
        let khz = u128::from(self.core.tsc_khz.max(1));
        Duration::from_nanos((u128::from(cycles) * 1_000_000 / khz) as u64)
    }

    /// Throws away blocks whose bytes were written.
    fn drop_stale(&mut self) {
        for (address, length) in std::mem::take(&mut self.core.stale) {
            self.invalidate(address, length);
        }
    }

    fn invalidate(&mut self, address: u64, length: u64) {
        for pc in self.blocks.invalidate(&mut self.cache, address, length) {
            self.core.forget_jump(pc);
        }
        if !self.blocks.page_in_use(address) {
            let cpu = self.core.seat.index();
            self.core.memory.code().clear_page(cpu, address);
        }
    }

    fn mode(&self, shape: Shape) -> Mode {
        let state = &self.core.state;
        let extended = if state.cr0 & (cr0::EM | cr0::TS) != 0 {
            0
        } else if state.cr4 & cr4::OSFXSR == 0 {
            1
        } else if state.cr4 & cr4::OSXSAVE == 0 || state.xcr0 & 6 != 6 {
            2
        } else {
            3
        };
        let tsc = !self.core.user() || state.cr4 & cr4::TSD == 0;
        Mode {
            user: self.core.user(),
            extended,
            tsc,
            aligned: self.core.checks_alignment(),
            single: shape == Shape::Single,
            apart: shape == Shape::Apart,
            middle: matches!(state.cpl, 1 | 2),
            smap: state.cr4 & cr4::SMAP != 0,
            open: self.core.opens_user_pages(),
            legacy: None,
        }
    }

    /// As `mode`, outside of 64-bit mode.
    fn legacy_mode(&mut self, shape: Shape) -> Option<Mode> {
        let legacy = self.core.state.legacy()?;
        let mut mode = Mode {
            legacy: Some(legacy),
            ..self.mode(shape)
        };
        if self.legacy_modes.len() >= usize::from(u16::MAX) {
            self.empty_cache();
        }
        let next = self.legacy_modes.len() as u16 + 1;
        let tag = *self.legacy_modes.entry(mode).or_insert(next);
        mode.legacy = Some(Legacy { tag, ..legacy });
        Some(mode)
    }

    /// Where to enter for where the guest is: from the jump cache, else `find_block`.
    fn find_entry(&mut self, shape: Shape) -> Result<u64, Exception> {
        if !self.core.state.is_long_code() {
            return self.find_legacy_entry(shape);
        }
        let rights = self.core.current_rights();
        let state = &self.core.state;
        let aligned = self.core.checks_alignment();
        let controls = (
            state.cr0 & (cr0::EM | cr0::TS),
            state.cr4,
            state.xcr0,
            aligned,
            // these share the jump cache of ring 0
            matches!(state.cpl, 1 | 2),
        );
        if controls != self.controls {
            // blocks depend on these through their mode, which jump caches do not tell
            self.controls = controls;
            self.core.flush_jumps();
        }
        let rip = self.core.state.rip;
        match self.core.space().jump(jump_table(rights, false), rip) {
            Some(entry) if shape == Shape::Whole => Ok(entry),
            _ => Ok(self.find_block(shape)?.1),
        }
    }

    /// As `find_entry`, outside of 64-bit mode.
    fn find_legacy_entry(&mut self, shape: Shape) -> Result<u64, Exception> {
        self.core.state.rip &= u64::from(u32::MAX);
        let rip = self.core.state.rip;
        let Some(mode) = self.legacy_mode(shape) else {
            return Ok(self.find_block(shape)?.1);
        };
        let known = mode.legacy.and_then(|legacy| {
            let space = self.core.space();
            space.jump(mode.jumps(), legacy.jump_key(rip))
        });
        match known {
            Some(entry) if shape == Shape::Whole => Ok(entry),
            _ => Ok(self.find_block_in(mode)?.1),
        }
    }

    /// The block for where the guest is, made if need be: its number and entry address.
    fn find_block(&mut self, shape: Shape) -> Result<(u32, u64), Exception> {
        let mode = self.legacy_mode(shape).unwrap_or_else(|| self.mode(shape));
        self.find_block_in(mode)
    }

    fn find_block_in(&mut self, mode: Mode) -> Result<(u32, u64), Exception> {
        let rip = self.core.state.rip;
        let first = mode.linear(rip);
        if mode.legacy.is_some_and(|l| rip > l.code_limit.into()) {
            return Err(Exception::general_protection(0));
        }
        let (physical, global) = self.core.fetch_address(first)?;
        let mut key = Key {
            physical,
            second: None,
            rip,
            mode,
        };
        let mut number = self.blocks.find(&key);
        if number.is_none() {
            number = Some(self.make_block(&mut key)?);
        }
        let number = number.unwrap_or_default();
        let block = &self.blocks.all[number as usize];
        let entry = self.cache.base() + u64::from(block.entry);
        if !mode.single {
            let last = first.wrapping_add(u64::from(block.length.max(1) - 1));
            let line = JumpEntry {
                pc: mode.jump_key(rip),
                code: entry,
            };
            let table = if mode.apart {
                apart_table(mode.rights())
            } else {
                mode.jumps()
            };
            self.core.space().insert_jump(
                table,
                line,
                (first, last),
                global && block.key.second.is_none(),
            );
        }
        Ok((number, entry))
    }

    fn make_block(&mut self, key: &mut Key) -> Result<u32, Exception> {
        let mut bytes = [0; PAGE_SIZE as usize];
        let first = (PAGE_SIZE - key.physical % PAGE_SIZE) as usize;
        let allowed = key.mode.code_left(key.rip);
        let first = first.min(1024).min(allowed);
        self.fetch(key.physical, &mut bytes[..first]);
        if self.cache.free() < CACHE_RESERVE {
            self.empty_cache();
        }
        if let Some(number) = self.place(key, &bytes[..first]) {
            return Ok(number);
        }
        if first == allowed {
            // it reaches beyond the code segment
            return Err(Exception::general_protection(0));
        }
        // the first instruction goes on in the next page
        let next = key.mode.next_page(key.rip);
        let (second, _) = self.core.fetch_address(next)?;
        key.second = Some(second);
        if let Some(number) = self.blocks.find(key) {
            return Ok(number);
        }
        let end = allowed.min(first + MAX_INSTRUCTION);
        self.fetch(second, &mut bytes[first..end]);
        // sixteen bytes decide even an instruction that is too long
        self.place(key, &bytes[..end])
            .ok_or_else(|| Exception::general_protection(0))
    }

    fn fetch(&self, physical: u64, bytes: &mut [u8]) {
        match self.core.memory.host_ptr(physical, bytes.len() as u64) {
            // SAFETY: the range is guest RAM, mapped while `self.core.memory` lives.
            Some(host) => unsafe {
                std::ptr::copy_nonoverlapping(host, bytes.as_mut_ptr(), bytes.len());
            },
            // what a bus without a device reads as
            None => bytes.fill(0xff),
        }
    }

    fn place(&mut self, key: &Key, bytes: &[u8]) -> Option<u32> {
        // whole cache lines keep a block's patched entry in one of them
        let padding = (16 - self.cache.used() % 16) % 16;
        self.cache.append(&[0xcc; 16][..padding]);
        let host = self.cache.base() + self.cache.used() as u64;
        let table = &self.core.cpuid;
        // whoever spins may be waiting for a vCPU that the host does not run
        let spins = !self.core.seat.is_single();
        // an instruction that crosses a page is a block of its own
        let crossing = key.second.is_some();
        let mode = Mode {
            single: key.mode.single || crossing && key.mode.legacy.is_some(),
            ..key.mode
        };
        let source = Source {
            start: key.rip,
            bytes,
            mode,
            crossing,
        };
        let translated = translate(
            &source,
            &mut self.tools,
            &self.thunks,
            host,
            &self.blocks.next(),
            |feature| table.offered(feature) && !(spins && feature == CpuidFeature::PAUSE),
        )?;
        let start = self.cache.append(&translated.lowered.code);
        let number = self.blocks.add(*key, translated, start);
        self.statistics.blocks += 1;
        self.mark_code(number, bytes);
        Some(number)
    }

    /// Has stores to the bytes of a new block noticed. If they are no longer those that it
    /// was made from, it is thrown away before the next block runs.
    fn mark_code(&mut self, number: u32, bytes: &[u8]) {
        let ranges = self.blocks.all[number as usize].ranges();
        for (address, size) in ranges.into_iter().filter(|r| r.1 > 0) {
            self.core.mark_code(address, size);
        }
        if self.core.seat.is_single() {
            return;
        }
        let mut made_from = bytes;
        for (address, size) in ranges.into_iter().filter(|r| r.1 > 0) {
            let mut now = [0; PAGE_SIZE as usize];
            let now = &mut now[..size as usize];
            self.fetch(address, now);
            let (before, rest) = made_from.split_at(size as usize);
            made_from = rest;
            if now != before {
                self.core.stale.push((address, size));
                self.core.look_up();
            }
        }
    }

    /// Chains the exit that was just taken to the block for `rip`.
    fn link(&mut self) {
        let exit = self.core.state.temp[0] as u32;
        let flushes = self.statistics.flushes;
        // a fault is met again, and delivered, in the next round
        if let Ok((target, _)) = self.find_block(Shape::Whole)
            && flushes == self.statistics.flushes
            && self.blocks.exit_alive(exit)
        {
            let rights = self.core.current_rights();
            let thunk = self.thunks.unchained[rights as usize];
            let unchained = (thunk - self.cache.base()) as u32;
            let legacy = self.blocks.all[target as usize].key.mode.legacy.is_some();
            let unchained = (!legacy).then_some(unchained);
            self.blocks.chain(&mut self.cache, exit, target, unchained);
        }
    }

    fn host_fault(&mut self, bus: &dyn Bus) -> Option<Exit> {
        let fault = self.core.state.host_fault;
        let offset = fault.rip.wrapping_sub(self.cache.base()) as u32;
        let Some((number, site)) = self.blocks.locate(offset) else {
            return Some(Exit::Fatal(format!(
                "host fault {} outside of any block",
                fault.trap
            )));
        };
        let key = &self.blocks.all[number as usize].key;
        let alone = key.mode.single || key.second.is_some();
        let state = &mut *self.core.state;
        state.rip = key.rip.wrapping_add(u64::from(site.guest));
        match site.flags {
            Flags::Ax | Flags::Both => {}
            Flags::Host => state.status = State::status_from(fault.rflags),
            Flags::Saved => state.status = state.saved_status,
        }
        let exception = match fault.trap as u8 {
            vector::DE => Exception::new(vector::DE),
            vector::UD => Exception::undefined(),
            // an address in no window, or a misaligned operand: by itself the instruction
            // shows which, in the order of the manual
            vector::GP | vector::SS if !alone => {
                self.alone = true;
                return None;
            }
            vector::GP => Exception::general_protection(0),
            vector::MF => Exception::new(vector::MF),
            vector::XM if state.cr4 & cr4::OSXMMEXCPT == 0 => Exception::undefined(),
            vector::XM => Exception::new(vector::XM),
            trap => {
                let rip = state.rip;
                return Some(Exit::Fatal(format!(
                    "host trap {trap} in translated code at guest RIP {rip:#x}: is the host out of memory?"
                )));
            }
        };
        self.deliver(bus, exception)
    }

    /// The slow path of an access by translated code: a host pointer to do it at, or
    /// `None` with `raised` set, or neither when the instruction must run alone.
    fn slow_access(&mut self, address: u64, what: u32, from: u64) -> Option<*mut u8> {
        let size = u64::from(what & meta::SIZE);
        let store = what & meta::STORE != 0;
        let offset = from.wrapping_sub(self.cache.base()) as u32 - 1;
        let (number, site) = self.blocks.locate(offset)?;
        let block = &self.blocks.all[number as usize];
        let rip = block.key.rip.wrapping_add(u64::from(site.guest));
        let alone = block.key.mode.single || block.key.second.is_some();
        if what & meta::SPAN != 0 {
            let host = self.settle_span(address, size, store);
            self.core.state.bounced = u64::from(host.is_none());
            // translated code goes another way and makes no use of it
            return Some(host.unwrap_or(std::ptr::dangling_mut()));
        }
        let crosses = address % PAGE_SIZE + size > PAGE_SIZE;
        if store && what & meta::LOAD != 0 && crosses && !self.core.seat.may_be_atomic() {
            // it may be atomic: again, with all others stopped
            self.core.state.rip = rip;
            self.alone = true;
            self.exclusive = true;
            return None;
        }
        let result = self.settle_access(address, size, what, (!alone).then_some(number));
        let bounced = matches!(result, Ok(Some(Place::Bounced(_))));
        // a store in place that others wait for ends like one that was bounced
        let announced = store && !bounced && self.core.seat.is_storing();
        self.core.state.bounced = u64::from(bounced || announced);
        self.core.state.commit_length = match (bounced && store, announced) {
            (true, _) => size,
            (_, true) => DONE_IN_PLACE,
            _ => 0,
        };
        if !matches!(result, Ok(Some(_))) {
            self.end_access();
        }
        match result {
            Ok(Some(Place::Direct(host) | Place::Bounced(host))) => return Some(host),
            Ok(None) => self.alone = true,
            Err(mut exception) => {
                if what & meta::STACK != 0 && exception.vector == vector::GP {
                    exception.vector = vector::SS;
                }
                if let Some(earlier) = earlier_fault(address, size, what) {
                    exception = earlier;
                }
                self.raised = Some(exception);
            }
        }
        self.core.state.rip = rip;
        None
    }

    /// Host memory for the accesses of a span, `size` bytes in all, if they are within a
    /// page of RAM and none of them could fault.
    fn settle_span(&mut self, address: u64, size: u64, store: bool) -> Option<*mut u8> {
        if address % PAGE_SIZE + size > PAGE_SIZE {
            return None;
        }
        let mut target = self.core.target(address, Kind::Read, Privilege::Current);
        if store && target.is_ok() {
            // one that may never be reached must not set the dirty bit
            if !self.core.may_store(address) {
                return None;
            }
            target = self.core.target(address, Kind::Write, Privilege::Current);
        }
        match target.ok()? {
            Target::Ram(host) => Some(host),
            Target::Device(_) => None,
        }
    }

    fn settle_access(
        &mut self,
        address: u64,
        size: u64,
        what: u32,
        block: Option<u32>,
    ) -> Result<Option<Place>, Exception> {
        let store = what & meta::STORE != 0;
        let kind = if store { Kind::Write } else { Kind::Read };
        if !Core::canonical(address.wrapping_add(size.saturating_sub(1)))
            || what & meta::WRAPS == 0 && self.core.beyond_flat(address, size)
        {
            return Err(Exception::general_protection(0));
        }
        self.core.watch_data(address, size, store);
        self.core.check_alignment(address, size)?;
        let first = size.min(PAGE_SIZE - address % PAGE_SIZE);
        let parts = [
            (address, first),
            (self.core.wrap(address.wrapping_add(first)), size - first),
        ];
        let mut direct = None;
        let mut found = NOWHERE;
        for (&(at, length), found) in parts.iter().zip(&mut found).filter(|p| p.0.1 > 0) {
            let target = self.core.target(at, kind, Privilege::Current)?;
            if let Target::Ram(host) = target {
                direct = Some(host);
            } else {
                direct = None;
            }
            *found = (target, length as usize);
            if store && direct.is_some() {
                let told = self.core.stale.len();
                self.core.store_behind_tag(at, length, Privilege::Current)?;
                if self.writes_itself(block, told) {
                    self.core.stale.truncate(told);
                    return Ok(None);
                }
                self.drop_stale();
            }
        }
        if let (Some(host), true) = (direct, first == size) {
            return Ok(Some(Place::Direct(host)));
        }
        let offset = (address % 64) as usize;
        debug_assert!(offset + size as usize <= BOUNCE_SIZE);
        if !store || what & meta::LOAD != 0 {
            let mut data = [0; 512];
            let data = &mut data[..size as usize];
            let bus = self.current_bus();
            self.core
                .read_linear(bus, address, data, Privilege::Current)?;
            self.core.state.bounce.0[offset..offset + data.len()].copy_from_slice(data);
        }
        self.core.state.commit_address = address;
        self.bounced = found;
        let host = (&raw mut self.core.state.bounce.0[offset]).cast();
        Ok(Some(Place::Bounced(host)))
    }

    /// Whether one of the stale ranges after the first `told` is in the running block.
    fn writes_itself(&self, block: Option<u32>, told: usize) -> bool {
        block.is_some_and(|number| {
            let block = &self.blocks.all[number as usize];
            self.core.stale[told..]
                .iter()
                .any(|&(address, length)| block.overlaps(address, length))
        })
    }

    fn current_bus(&self) -> &'static dyn Bus {
        self.bus.expect("slow paths run inside Cpu::run")
    }

    /// Whatever an access that took the slow path had others do or wait for, it is over.
    fn end_access(&mut self) {
        self.core.seat.end_store();
        self.core.seat.end_exclusive();
    }

    fn commit_store(&mut self) {
        let length = std::mem::take(&mut self.core.state.commit_length);
        if length != DONE_IN_PLACE {
            self.write_back(length as usize);
        }
        self.end_access();
    }

    /// Does the store that an instruction did to the bounce buffer, where its pages were
    /// found before it ran: another vCPU may have changed the page tables since.
    fn write_back(&mut self, length: usize) {
        let offset = (self.core.state.commit_address % 64) as usize;
        let mut data = [0; 512];
        let data = &mut data[..length];
        data.copy_from_slice(&self.core.state.bounce.0[offset..offset + length]);
        let bus = self.current_bus();
        let mut rest = &*data;
        for (target, length) in self.bounced.into_iter().filter(|part| part.1 > 0) {
            let (part, after) = rest.split_at(length);
            self.core.store_at(bus, &target, part);
            rest = after;
        }
        self.drop_stale();
    }
}

/// As the length of what is to be written back: nothing, the store was done in place.
const DONE_IN_PLACE: u64 = u64::MAX;

/// Where the two parts of an access are that has none.
const NOWHERE: [(Target, usize); 2] = [(Target::Device(0), 0); 2];

/// What kind of block is to go on with.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// The usual one.
    Whole,
    /// As `Whole`, but every access is checked by itself.
    Apart,
    /// One instruction.
    Single,
}

/// MOV SS and POP SS.
fn loads_stack(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Mov | Mnemonic::Pop)
        && instruction.op0_kind() == OpKind::Register
        && instruction.op0_register() == Register::SS
}

/// Where a slow access is done.
enum Place {
    Direct(*mut u8),
    Bounced(*mut u8),
}

/// What an access that is going to fault anyway raises instead, because it is checked
/// before the address is translated.
fn earlier_fault(address: u64, size: u64, what: u32) -> Option<Exception> {
    if what & meta::WAITS != 0 && x87_exception_pending() {
        return Some(Exception::new(vector::MF));
    }
    (what & meta::ALIGNED != 0 && !address.is_multiple_of(size.max(1)))
        .then(|| Exception::general_protection(0))
}

/// Whether the guest's x87 state, which stays loaded in slow paths, has an unmasked
/// exception pending.
fn x87_exception_pending() -> bool {
    let status: u16;
    // SAFETY: FNSTSW only reads the x87 status word, and does not wait.
    unsafe { std::arch::asm!("fnstsw ax", out("ax") status, options(nomem, nostack)) };
    status & 0x80 != 0
}

const ARCH_SET_GS: libc::c_int = 0x1001;

/// Called by the slow thunks.
extern "sysv64" fn access(cpu: *mut Cpu, address: u64, what: u32, from: u64) -> *mut u8 {
    // SAFETY: `runtime` is the Cpu inside whose `run` translated code executes; `run` does
    // not touch `self` while it does.
    let cpu = unsafe { &mut *cpu };
    cpu.slow_access(address, what, from)
        .unwrap_or(std::ptr::null_mut())
}

/// Called by the commit thunk.
extern "sysv64" fn commit(cpu: *mut Cpu) {
    // SAFETY: as in `access`.
    unsafe { &mut *cpu }.commit_store();
}

/// The host's time stamp counter.
fn host_tsc() -> u64 {
    // SAFETY: RDTSC is available on every x86-64 CPU.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// The extended-state components of x87, SSE and AVX that the host has on.
fn host_extended_state() -> Result<u32, Error> {
    if !std::arch::is_x86_feature_detected!("sse4.2") {
        return Err(Error::HostCpu("SSE4.2 (x86-64-v2)"));
    }
    if !std::arch::is_x86_feature_detected!("xsave") {
        return Err(Error::HostCpu("XSAVE"));
    }
    // SAFETY: XSAVE is there and, as the check includes it, enabled by the OS.
    let xcr0 = unsafe { xgetbv() };
    Ok((xcr0 & 7) as u32)
}

#[target_feature(enable = "xsave")]
fn xgetbv() -> u64 {
    // SAFETY: XCR0 always exists where XGETBV does.
    unsafe { std::arch::x86_64::_xgetbv(0) }
}
