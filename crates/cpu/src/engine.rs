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

mod find;
mod slow;

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use strata_memory::PAGE_SIZE;

use crate::Error;
use crate::blocks::Blocks;
use crate::bus::{Bus, Waker};
use crate::crew::Crew;
use crate::exception::{Exception, vector};
use crate::hash::BuildFast;
use crate::mmu::{Core, Privilege, Target};
use crate::paced::Pace;
use crate::returns::ReturnStacks;
use crate::roaming::Roaming;
use crate::signal::{self, Window};
use crate::startup::Startup;
use crate::state::{State, cr4, gpr, rflags};
use crate::system::{self, Flow};
use crate::translate::asm::Asm;
use crate::translate::cache::CodeCache;
use crate::translate::legacy::FAULT_WAITS;
use crate::translate::lower::{Flags, Mode, Tools};
use crate::translate::thunks::{self, Callbacks, Leave, Thunks};
use crate::wanted::Wanted;

/// Address space for translated code, in bytes. Pages are used as code is made.
const CACHE_SIZE: usize = 64 << 20;
/// When less than this is left, the cache is emptied.
const CACHE_RESERVE: usize = 64 << 10;
/// The longest instruction, in bytes.
pub(crate) const MAX_INSTRUCTION: usize = 15;

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

/// How much was translated and what that takes, for reports.
#[derive(Clone, Copy, Debug, Default)]
pub struct Statistics {
    /// Blocks made since the start.
    pub blocks: u64,
    /// Guest bytes that they cover.
    pub guest_bytes: u64,
    /// Bytes of host code made since the start.
    pub host_bytes: u64,
    /// Bytes of host code in the cache now.
    pub cache_bytes: usize,
    /// Bytes of the tables that tell of the blocks in the cache, about.
    pub table_bytes: usize,
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
    wanted: Wanted,
    pub(crate) roaming: Roaming,
    thunks: Thunks,
    thunks_end: usize,
    returns: ReturnStacks,
    tools: Tools,
    /// Set while translated code runs, for the slow paths.
    bus: Option<&'static dyn Bus>,
    /// Where the parts of a bounced access are, and their lengths.
    bounced: [(Target, usize); 2],
    /// What a slow path raised.
    raised: Option<Exception>,
    /// The next instruction runs as a block of its own, since it writes its own block.
    pub(crate) alone: bool,
    /// It does so with all other vCPUs stopped.
    exclusive: bool,
    /// The next block checks every access by itself, since a span's check failed.
    pub(crate) apart: bool,
    /// Blocks are drafts at first.
    drafts: bool,
    /// A draft that was retired and is to be made anew as a whole.
    ripe: Option<u32>,
    /// #DB waits: SS was loaded.
    debug_held: bool,
    /// The control bits that current jump-cache entries were made under.
    controls: (u64, u64, u64, bool, bool),
    pub(crate) startup: Startup,
    /// Modes other than those of 64-bit code that blocks were made for, and their tags.
    legacy_modes: HashMap<Mode, u16, BuildFast>,
    statistics: Statistics,
    /// Set while it runs in steps.
    pub(crate) pace: Option<Pace>,
}

// SAFETY: what it points to (state block, tables, code, return stacks) it owns and takes along.
// `bus` alone is bound to a thread, and `None` outside `run`, which sets what the thread needs
// (GS base, the signal handler's window, signal mask) and borrows `self` mutably for as long.
unsafe impl Send for Cpu {}

impl Cpu {
    /// The vCPU with number `index` of `crew`, with the state after reset but in no mode
    /// that it could run in: set CR0, CR4, EFER, segments and RIP before running. The
    /// guest is told that the TSC runs at `tsc_khz`.
    pub fn new(crew: &Arc<Crew>, index: u32, tsc_khz: u32) -> Result<Self, Error> {
        let mask = host_extended_state()?;
        let mut core = Core::new(crew, index, tsc_khz)?;
        let mut returns = ReturnStacks::new().map_err(Error::ReturnStacks)?;
        let mut cache = CodeCache::new(CACHE_SIZE).map_err(Error::CodeCache)?;
        let mut asm = Asm::new(cache.base());
        let callbacks = Callbacks {
            access: slow::access as *const () as u64,
            commit: slow::commit as *const () as u64,
        };
        let thunks = thunks::emit(&mut asm, mask, &callbacks);
        cache.append(&asm.bytes);
        let thunks_end = cache.used();
        for (number, code) in thunks.bottom.into_iter().enumerate() {
            returns.set_bottom(number, code);
            core.state.return_bases[number] = returns.base(number);
        }
        let draft_out = (thunks.draft.out - cache.base()) as u32;
        Ok(Self {
            core,
            blocks: Blocks::new(draft_out),
            cache,
            wanted: Wanted::default(),
            roaming: Roaming::default(),
            thunks,
            thunks_end,
            returns,
            tools: Tools {
                encoder: iced_x86::Encoder::new(64),
                info: iced_x86::InstructionInfoFactory::new(),
            },
            bus: None,
            bounced: slow::NOWHERE,
            raised: None,
            alone: false,
            exclusive: false,
            apart: false,
            drafts: true,
            ripe: None,
            debug_held: false,
            controls: (0, 0, 0, false, false),
            startup: Startup::default(),
            legacy_modes: HashMap::default(),
            statistics: Statistics::default(),
            pace: None,
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

    /// Sets whether blocks are made small at first, and for speed only when they have run often,
    /// as they are unless this says otherwise; or all for speed at once. For tests of both.
    pub fn set_drafts(&mut self, on: bool) {
        self.drafts = on;
    }

    /// Sets whether all of ring 3's code that is translated from now on is taken for code that
    /// accesses another page each time, and is given the rows of pages that it accesses at once
    /// (`mmu::wide`). For tests of that: it is slow.
    pub fn set_restless(&mut self, on: bool) {
        self.roaming.set_all(on);
        self.core.set_impatient(on);
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
            table_bytes: self.blocks.bytes(),
            ..self.statistics
        }
    }

    fn empty_cache(&mut self) {
        for page in self.blocks.pages() {
            let cpu = self.core.seat.index();
            self.core.memory.code().clear_page(cpu, page * PAGE_SIZE);
        }
        self.blocks.clear(&mut self.cache, self.thunks_end);
        self.ripe = None;
        self.roaming.clear();
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
    pub(crate) fn begin(&mut self, bus: &dyn Bus) {
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
            returns: self.returns.range(),
        }));
        self.core.resume();
    }

    pub(crate) fn end(&mut self) {
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
    pub(crate) fn step(&mut self, stop: &AtomicBool, bus: &dyn Bus) -> Option<Exit> {
        self.end_access();
        if self.attend() {
            self.take_signals(bus);
        }
        if self.startup.is_pending() && self.settle_startup(stop, bus).is_err() {
            return Some(Exit::TripleFault);
        }
        // behind all that takes the attention word back, which is set but once for it
        if stop.load(Ordering::SeqCst) {
            return Some(Exit::Stopped);
        }
        if std::mem::take(&mut self.exclusive) {
            self.core.begin_exclusive();
        }
        if std::mem::take(&mut self.core.all_stale) {
            self.empty_cache();
        }
        self.drop_stale();
        let shadow = std::mem::take(&mut self.core.state.interrupt_shadow);
        if self.core.check_interrupts
            && let Err(exit) = self.take_interrupt(bus, shadow)
        {
            return Some(exit);
        }
        let trap = self.core.state.rflags() & rflags::TF != 0;
        let apart = std::mem::take(&mut self.apart);
        let watched = self.core.breakpoints_enabled();
        if watched && self.meets_breakpoint() {
            return self.deliver(bus, Exception::new(vector::DB));
        }
        let single = trap
            || watched
            || std::mem::take(&mut self.alone)
            || self.pace == Some(Pace::Instruction);
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
        let (paced, from) = (self.pace.is_some(), self.core.state.rip);
        if paced {
            // the next block leaves at once
            self.core.look_up();
        }
        let entry = if shadow || single || paced || made != self.statistics.blocks {
            self.behind_check(entry)
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
        if paced && !apart && leave == Leave::Attention && self.core.state.rip == from {
            // it went to the block that checks apart, which left at once
            self.apart = true;
        }
        let done = match leave {
            Leave::Lookup | Leave::Attention => true,
            Leave::Draft => {
                self.leave_draft();
                return None;
            }
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

    /// Delivers an interrupt, if the guest takes any now and there is one.
    fn take_interrupt(&mut self, bus: &dyn Bus, shadow: bool) -> Result<(), Exit> {
        if shadow {
            // look again as soon as the shadow has passed
            self.core.look_up();
        } else if self.core.state.rflags() & rflags::IF != 0 {
            let Some(number) = bus.acknowledge_interrupt() else {
                self.core.check_interrupts = false;
                return Ok(());
            };
            if system::deliver_interrupt(&mut self.core, bus, number).is_err() {
                return Err(self.undelivered());
            }
        }
        Ok(())
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

    fn host_fault(&mut self, bus: &dyn Bus) -> Option<Exit> {
        let fault = self.core.state.host_fault;
        let offset = fault.rip.wrapping_sub(self.cache.base()) as u32;
        let Some((number, site)) = self.blocks.locate(offset) else {
            return Some(Exit::Fatal(format!(
                "host fault {} outside of any block",
                fault.trap
            )));
        };
        let key = self.blocks.key(number);
        let alone = key.mode.single;
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
}

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

const ARCH_SET_GS: libc::c_int = 0x1001;

/// The host's time stamp counter.
pub(crate) fn host_tsc() -> u64 {
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
