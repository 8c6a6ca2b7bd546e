//! Hostile guests: random code, tables and devices, that must do the host no harm.
//!
//! ```text
//!   rng ─► scene: RAM between fences (memory), tables (tables), code (code), vCPUs (vcpu)
//!                   │
//!                   └─► run: each vCPU on a thread, a meddler that patches code and tables
//!                            meanwhile ─► what is wrong, if anything
//! ```
//!
//! Called by the test `hostile` and by the fuzz target of the same name. What is looked for is
//! the host's harm alone: a panic, a fault in translated code, a byte changed outside of RAM, a
//! vCPU that cannot be stopped. What becomes of the guest is no matter. A fault of the host
//! itself ends the process, so whoever calls this does so in a process of its own.

mod code;
mod memory;
mod tables;
mod vcpu;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use strata_cpu::{Cpu, Crew, Exit, Waker};
use strata_memory::{Bytes, GuestAddress, GuestMemory};

use crate::rng::Rng;
use memory::FencedMemory;
use vcpu::{Mode, TestBus};

/// Bytes of guest RAM.
const RAM: u64 = 4 << 20;
/// Where code is, what interrupts lead to, and what many stores hit.
const CODE: u64 = 0x4000;
const CODE_SIZE: u64 = 0x4000;
/// Where stacks and data are: within reach of 16-bit code.
const STACK_TOP: u64 = 0xfff0;
/// Where IA-32e tables map low memory again, for the supervisor alone.
const UPPER: u64 = 0xffff_8000_0000_0000;
/// How often a scene makes new tables and code.
const ROUNDS: u32 = 16;
/// How long each lasts at most: code that loops goes nowhere.
const ROUND: Duration = Duration::from_micros(400);
/// How often a vCPU begins with the same memory.
const LIVES: u32 = 6;
/// How long a vCPU may take to stop after it was told to.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// Why a scene could not be set.
#[derive(Debug, thiserror::Error)]
pub enum SceneError {
    /// No memory for it.
    #[error(transparent)]
    Memory(#[from] strata_memory::Error),
    /// No CPU for it.
    #[error(transparent)]
    Cpu(#[from] strata_cpu::Error),
    /// Guest RAM could not be given neighbours of our own.
    #[error("there is no room for fences around guest memory")]
    Fences,
}

/// What became of a scene.
#[derive(Debug, Default)]
pub struct Outcome {
    /// The harm that was done to the host.
    pub harm: Option<String>,
    /// Blocks that were translated: whether the guest got anywhere.
    pub blocks: u64,
}

/// Runs the scene that `rng` makes: [`ROUNDS`] times, tables and code are made and run.
pub fn run(rng: &mut Rng) -> Result<Outcome, SceneError> {
    let memory = FencedMemory::new(RAM)?;
    let cpus = if rng.chance(70) { 1 } else { 2 + rng.index(2) };
    let crew = Crew::new(memory.guest().clone(), cpus as u32);
    let mut vcpus = Vec::new();
    for index in 0..cpus {
        let mut cpu = Cpu::new(&crew, index as u32, 1_000_000)?;
        // told by what is drawn next, so that the scene is the same
        cpu.set_restless(rng.clone().chance(30));
        vcpus.push(cpu);
    }
    let mut harm = None;
    for _ in 0..ROUNDS {
        let modes: Vec<Mode> = (0..cpus).map(|_| vcpu::mode(rng)).collect();
        fill(memory.guest(), rng, &modes);
        harm = round(&mut vcpus, &modes, memory.guest(), rng);
        harm = harm.or_else(|| memory.changed_outside());
        if harm.is_some() {
            break;
        }
    }
    let blocks = vcpus.iter().map(|cpu| cpu.statistics().blocks).sum();
    Ok(Outcome { harm, blocks })
}

/// Puts tables, code and data into RAM.
fn fill(memory: &GuestMemory, rng: &mut Rng, modes: &[Mode]) {
    // what looks like addresses and numbers
    let values: Vec<u8> = (0..64)
        .flat_map(|_| code::value(rng).to_le_bytes())
        .collect();
    for at in (0..0x1_0000).step_by(values.len()) {
        put(memory, at, &values);
    }
    tables::write(memory, rng, modes);
    let mut code = Vec::new();
    while code.len() < CODE_SIZE as usize {
        let bits = rng.pick(modes).code_bits(rng);
        code.extend(code::piece(rng, bits));
    }
    put(memory, CODE, &code);
}

/// Writes as a device does. What lies beyond RAM is ignored.
fn put(memory: &GuestMemory, at: u64, bytes: &[u8]) {
    let _ = memory.ram().write(bytes, GuestAddress(at));
}

/// Runs all vCPUs for a while, each on a thread.
fn round(vcpus: &mut [Cpu], modes: &[Mode], memory: &GuestMemory, rng: &mut Rng) -> Option<String> {
    let stop = &AtomicBool::new(false);
    let wakers: Vec<Waker> = vcpus.iter().map(Cpu::waker).collect();
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for (cpu, mode) in vcpus.iter_mut().zip(modes) {
            let rng = Rng::new(rng.bits(), 0);
            threads.push(scope.spawn(move || live(cpu, *mode, rng, stop)));
        }
        let end = Instant::now() + ROUND;
        // alone, a vCPU does the same again; beside others, nothing does
        let meddles = wakers.len() > 1;
        while Instant::now() < end && !threads.iter().all(ScopedJoinHandle::is_finished) {
            thread::sleep(Duration::from_micros(50));
            if meddles {
                meddle(memory, rng, modes);
                rng.pick(&[&wakers[0], &wakers[1]]).wake();
            }
        }
        stop.store(true, Ordering::SeqCst);
        wakers.iter().for_each(Waker::wake);
        let told = Instant::now();
        let mut harm = None;
        for thread in threads {
            let found = thread.join().unwrap_or_else(|_| Some("a panic".to_owned()));
            harm = harm.or(found);
        }
        let late = told.elapsed();
        harm.or_else(|| (late > STOP_LIMIT).then(|| format!("took {late:?} to stop")))
    })
}

/// Changes code or a table under the vCPUs' feet.
fn meddle(memory: &GuestMemory, rng: &mut Rng, modes: &[Mode]) {
    if rng.chance(70) {
        let bits = rng.pick(modes).code_bits(rng);
        let piece = code::piece(rng, bits);
        put(memory, CODE + rng.below(CODE_SIZE), &piece);
    } else {
        let mode = rng.pick(modes);
        tables::disturb(memory, rng, mode);
    }
}

/// One vCPU: begins anew a few times when it ends, until it is to stop.
fn live(cpu: &mut Cpu, mode: Mode, mut rng: Rng, stop: &AtomicBool) -> Option<String> {
    for _ in 0..LIVES {
        vcpu::begin(cpu, mode, &mut rng);
        let bus = TestBus::new(cpu.waker(), rng.bits());
        let exit = catch_unwind(AssertUnwindSafe(|| cpu.run(stop, &bus)));
        match exit {
            Ok(Exit::Stopped) => return None,
            Ok(Exit::TripleFault) => {}
            // what this CPU says it does not do
            Ok(Exit::Fatal(reason)) if reason.contains("task switch") => {}
            Ok(Exit::Fatal(reason)) => return Some(reason),
            Err(_) => return Some(format!("a panic at guest RIP {:#x}", cpu.state().rip)),
        }
    }
    None
}
