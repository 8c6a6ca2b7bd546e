//! Several vCPUs that run random bytes, each other's stores and a device's among them: the
//! host must neither crash nor hang, whatever they do to each other's code.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use strata_cpu::{Bus, Cpu, Crew, Exit, Signal, Waker};
use strata_memory::{Bytes, GuestAddress, GuestMemory};

const CPUS: usize = 3;
/// RAM, all of which real-mode code reaches.
const RAM: u64 = 1 << 20;
/// Where code is, what the interrupt vectors lead to, and what most stores hit: few pages,
/// so that they meet.
const CODE: std::ops::Range<u64> = 0x1000..0x4000;
/// How long one set of random bytes is run.
const ROUND: Duration = Duration::from_millis(60);
/// Random bytes to start from, unless the environment says otherwise.
const ROUNDS: u64 = 12;

/// Steele and Vigna's `SplitMix64`.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// The page of a startup message that has not been taken, plus one; or 0.
#[derive(Default)]
struct Line(AtomicU32);

struct Machine(Arc<Line>);

impl Bus for Machine {
    fn port_read(&self, port: u16, _size: u8) -> u32 {
        port.into()
    }
    fn port_write(&self, _port: u16, _size: u8, _value: u32) {}
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
    fn take_signal(&self) -> Option<Signal> {
        match self.0.0.load(Ordering::SeqCst) {
            0 => None,
            // INIT first, then the startup message
            word if word & 0x100 != 0 => {
                self.0.0.store(word & !0x100, Ordering::SeqCst);
                Some(Signal::Init)
            }
            word => {
                self.0.0.store(0, Ordering::SeqCst);
                Some(Signal::Startup((word & 0xff) as u8))
            }
        }
    }
}

/// A random piece of code: bytes as they come, or stores into code and atomics, some across
/// pages, which random bytes seldom are.
fn piece(random: &mut Random) -> Vec<u8> {
    let at = (CODE.start + random.below(CODE.end - CODE.start)) as u16;
    let [low, high] = at.to_le_bytes();
    let edge = [0xff, (CODE.start >> 8) as u8 + 0x0f];
    let value = random.next() as u8;
    match random.below(8) {
        0 => random.next().to_le_bytes().to_vec(),
        // mov byte [at], value
        1 => vec![0xc6, 0x06, low, high, value],
        // mov [at], ax
        2 => vec![0xa3, low, high],
        // lock add [at], ax
        3 => vec![0xf0, 0x01, 0x06, low, high],
        // lock xadd [edge], eax: across pages
        4 => vec![0x66, 0xf0, 0x0f, 0xc1, 0x06, edge[0], edge[1]],
        // mov di, at; mov cx, value; rep stosb
        5 => vec![0xbf, low, high, 0xb9, value, 0, 0xf3, 0xaa],
        // jmp at
        6 => vec![0xb8, low, high, 0xff, 0xe0],
        // pause; inc ax
        _ => vec![0xf3, 0x90, 0x40],
    }
}

fn fill(memory: &GuestMemory, random: &mut Random) {
    let mut code = Vec::new();
    while (code.len() as u64) < CODE.end - CODE.start {
        code.extend(piece(random));
    }
    let code = &code[..(CODE.end - CODE.start) as usize];
    memory
        .ram()
        .write_slice(code, GuestAddress(CODE.start))
        .unwrap();
    for vector in 0..256 {
        let at = CODE.start + random.below(CODE.end - CODE.start);
        let vector = GuestAddress(vector * 4);
        memory.ram().write_obj(at as u32, vector).unwrap();
    }
}

/// Has a vCPU start anew at a page of code.
fn start(line: &Line, waker: &Waker, random: &mut Random) {
    let page = (CODE.start >> 12) + random.below((CODE.end - CODE.start) >> 12);
    line.0.store(0x100 | page as u32, Ordering::SeqCst);
    waker.wake();
}

fn round(seed: u64) {
    let random = &mut Random(seed);
    let memory = GuestMemory::new(RAM).unwrap();
    fill(&memory, random);
    let crew = Crew::new(memory.clone(), CPUS as u32);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let mut vcpus = Vec::new();
        for index in 0..CPUS {
            let mut cpu = Cpu::new(&crew, index as u32, 1_000_000).unwrap();
            cpu.wait_for_startup();
            let line = Arc::new(Line::default());
            vcpus.push((Arc::clone(&line), cpu.waker()));
            let stop = &stop;
            scope.spawn(move || {
                let bus = Machine(line);
                while cpu.run(stop, &bus) != Exit::Stopped {
                    cpu.wait_for_startup();
                }
            });
        }
        let end = Instant::now() + ROUND;
        while Instant::now() < end {
            let (line, waker) = &vcpus[random.below(CPUS as u64) as usize];
            start(line, waker, random);
            let at = CODE.start + random.below(CODE.end - CODE.start - 16);
            let bytes = piece(random);
            memory.ram().write_slice(&bytes, GuestAddress(at)).unwrap();
            thread::sleep(Duration::from_micros(random.below(300)));
        }
        stop.store(true, Ordering::SeqCst);
        for (_, waker) in &vcpus {
            waker.wake();
        }
    });
}

#[test]
fn vcpus_that_overwrite_each_others_code_do_the_host_no_harm() {
    let rounds = std::env::var("STRATA_HOSTILE_ROUNDS").map_or(ROUNDS, |n| n.parse().unwrap());
    for seed in 1..=rounds {
        round(seed);
    }
}
