//! The leader, the follower, and the comparison.

use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use strata_cpu::state::State;
use strata_cpu::{Cpu, Exit, Pace};
use strata_hypervisor::Processor;
use strata_hypervisor::soft::{Crew, SoftCpu};
use strata_hypervisor::state::Registers;
use strata_memory::{Bytes, GuestAddress, GuestMemory, PAGE_SIZE};

use crate::difference::{Difference, What};
use crate::machine::{Machine, TSC_KHZ, Time};
use crate::record::{Events, Question, Record, Recorder, Replay};
use crate::state::{self, Differing, General, Snapshot};

/// Ticks of the guest's clock that a block takes.
const BLOCK_TICKS: u64 = 20;
/// Records that go over at once.
const BATCH: usize = 4096;
/// Memory is compared after so many batches, and at the end.
const BATCHES_PER_MEMORY: u64 = 256;
/// A step of the leader is at most so many instructions: straight code runs on without a stop.
const STEPS_PER_RECORD: usize = 1 << 13;

/// Records on their way, and whether memory is to be compared behind them.
type Batch = (Vec<Record>, bool);

/// What was compared.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Compared {
    pub(crate) instructions: u64,
    pub(crate) records: u64,
    pub(crate) memories: u64,
}

/// The same guest twice: the leader's and the follower's.
pub(crate) struct Pair {
    cpus: [SoftCpu; 2],
    memories: [GuestMemory; 2],
}

impl Pair {
    /// Two vCPUs on `size` bytes of memory each, which `load` fills and tells where to begin.
    pub(crate) fn new(size: u64, load: impl Fn(&GuestMemory) -> Registers) -> Self {
        let memories = [(); 2].map(|()| GuestMemory::new(size).unwrap());
        let cpus = memories.each_ref().map(|memory| {
            let registers = load(memory);
            let crew = Crew::new(memory.clone(), 1);
            let mut cpu = SoftCpu::new(&crew, 0, TSC_KHZ).unwrap();
            cpu.set_registers(&registers).unwrap();
            cpu
        });
        Self { cpus, memories }
    }

    /// What the leader runs on.
    pub(crate) fn leader_memory(&self) -> &GuestMemory {
        &self.memories[0]
    }

    /// Runs both until the guest resets its machine, or until memory is compared for the first
    /// time after `limit` instructions, unless that is 0. Returns the leader's machine too.
    pub(crate) fn compare(&mut self, limit: u64) -> (Result<Compared, Box<Difference>>, Machine) {
        let [leader, follower] = &mut self.cpus;
        let memories = &self.memories;
        let machine = Machine::new(Time::default());
        let (sender, records) = sync_channel(4);
        let (resume, resumed) = sync_channel(1);
        thread::scope(|scope| {
            let leader = scope.spawn(move || {
                lead(leader.cpu_mut(), &machine, &sender, &resumed);
                machine
            });
            let source = Source {
                batches: records,
                batch: Vec::new().into_iter(),
                compares: false,
                memories,
                resume: &resume,
                compared: Compared::default(),
                limit,
            };
            let compared = follow(follower.cpu_mut(), source);
            drop(resume);
            (compared, leader.join().unwrap())
        })
    }
}

/// Runs the translator, and hands over what it did.
fn lead(cpu: &mut Cpu, machine: &Machine, out: &SyncSender<Batch>, resumed: &Receiver<()>) {
    let (time, events) = (machine.time(), Events::default());
    let (clock, noted) = (time.clone(), events.clone());
    cpu.make_repeatable(move || {
        let now = clock.look();
        noted.note(Question::Clock, Some(now));
        now
    });
    let bus = Recorder {
        machine,
        events: events.clone(),
    };
    let stop = AtomicBool::new(false);
    let (mut batch, mut batches) = (Vec::with_capacity(BATCH), 0);
    let mut send = |batch: Vec<Record>, last: bool| {
        batches += 1;
        let compares = last || batches % BATCHES_PER_MEMORY == 0;
        out.send((batch, compares)).is_ok() && (!compares || resumed.recv().is_ok())
    };
    let exit = cpu.run_paced(Pace::Block, &stop, &bus, |state| {
        time.pass(BLOCK_TICKS);
        batch.push(Record {
            events: events.take(),
            after: Snapshot::of(state),
        });
        !machine.is_over()
            && (batch.len() < BATCH
                || send(
                    std::mem::replace(&mut batch, Vec::with_capacity(BATCH)),
                    false,
                ))
    });
    send(batch, true);
    eprintln!("the leader: {exit:?}, {:?}", cpu.statistics());
}

/// Runs instruction by instruction, and compares.
fn follow(cpu: &mut Cpu, source: Source<'_>) -> Result<Compared, Box<Difference>> {
    let replay = Replay::default();
    let clock = replay.clone();
    cpu.make_repeatable(move || clock.number(&Question::Clock).unwrap_or(0));
    let mut follower = Follower::new(replay.clone(), source, cpu.state());
    let mut found = None;
    let exit = cpu.run_paced(
        Pace::Instruction,
        &AtomicBool::new(false),
        &replay,
        |state| {
            let goes_on = follower.after(state);
            goes_on.unwrap_or_else(|what| {
                found = Some(what);
                false
            })
        },
    );
    if exit != Exit::Stopped {
        found = found.or(Some(What::Ended(exit)));
    }
    match found {
        None => Ok(follower.source.compared),
        Some(what) => Err(Box::new(follower.report(what, cpu))),
    }
}

/// How far the follower is from what the leader did.
struct Follower<'a> {
    source: Source<'a>,
    replay: Replay,
    /// Where it has to come to.
    after: Snapshot,
    /// Its state where both last agreed, and after each instruction since.
    path: Vec<General>,
    /// What differed where it came to the leader's RIP, at its best, and the path to there.
    nearest: Option<(Vec<Differing>, usize)>,
}

impl<'a> Follower<'a> {
    fn new(replay: Replay, mut source: Source<'a>, state: &State) -> Self {
        let first = source
            .next()
            .ok()
            .flatten()
            .expect("the leader did nothing");
        replay.load(first.events);
        Self {
            source,
            replay,
            after: first.after,
            path: vec![state::general(state)],
            nearest: None,
        }
    }

    /// Sees the state after an instruction. Returns whether there is more to compare.
    fn after(&mut self, state: &State) -> Result<bool, What> {
        self.source.compared.instructions += 1;
        self.path.push(state::general(state));
        if state.rip == self.after.rip() && self.replay.is_done() {
            if Snapshot::of(state) == self.after {
                self.source.compared.records += 1;
                return self.go_on(state);
            }
            let differing = self.after.differing(state);
            if self
                .nearest
                .as_ref()
                .is_none_or(|(least, _)| differing.len() < least.len())
            {
                self.nearest = Some((differing, self.path.len()));
            }
        }
        if let Some(wrong) = self.replay.wrong() {
            return Err(What::Asked(wrong));
        }
        if self.path.len() > STEPS_PER_RECORD {
            return Err(What::Elsewhere(self.after.rip()));
        }
        Ok(true)
    }

    fn go_on(&mut self, state: &State) -> Result<bool, What> {
        let Some(next) = self.source.next()? else {
            return Ok(false);
        };
        self.replay.load(next.events);
        self.after = next.after;
        self.path.clear();
        self.path.push(state::general(state));
        self.nearest = None;
        Ok(true)
    }

    /// What was found, unless registers differed before that.
    fn report(self, what: What, cpu: &Cpu) -> Difference {
        let compared = self.source.compared;
        match self.nearest {
            Some((differing, length)) => {
                let what = What::Registers(differing);
                Difference::new(what, compared, &self.path[..length], cpu)
            }
            None => Difference::new(what, compared, &self.path, cpu),
        }
    }
}

/// Records in order.
struct Source<'a> {
    batches: Receiver<Batch>,
    batch: std::vec::IntoIter<Record>,
    /// Memory is compared behind the batch.
    compares: bool,
    memories: &'a [GuestMemory; 2],
    /// Tells the leader that memory was compared.
    resume: &'a SyncSender<()>,
    compared: Compared,
    /// Instructions after which a comparison of memory is the last; 0 for none.
    limit: u64,
}

impl Source<'_> {
    /// The next record; before, where the leader waits for it, memory is compared.
    fn next(&mut self) -> Result<Option<Record>, What> {
        loop {
            if let Some(record) = self.batch.next() {
                return Ok(Some(record));
            }
            if std::mem::take(&mut self.compares) {
                compare_memory(self.memories)?;
                self.compared.memories += 1;
                eprintln!("{:?}", self.compared);
                if self.limit != 0 && self.compared.instructions >= self.limit {
                    return Ok(None);
                }
                let _ = self.resume.send(());
            }
            let Ok((batch, compares)) = self.batches.recv() else {
                return Ok(None);
            };
            self.batch = batch.into_iter();
            self.compares = compares;
        }
    }
}

/// Compares all of memory, while both vCPUs wait.
fn compare_memory(memories: &[GuestMemory; 2]) -> Result<(), What> {
    let mut pages = [[0_u8; PAGE_SIZE as usize]; 2];
    for page in (0..memories[0].size()).step_by(PAGE_SIZE as usize) {
        for (memory, bytes) in memories.iter().zip(&mut pages) {
            memory.ram().read_slice(bytes, GuestAddress(page)).unwrap();
        }
        let [leader, follower] = pages.each_ref().map(|bytes| bytes.chunks(8));
        if let Some((at, (a, b))) = leader.zip(follower).enumerate().find(|(_, (a, b))| a != b) {
            let [a, b] = [a, b].map(|word| u64::from_le_bytes(word.try_into().unwrap()));
            return Err(What::Memory(page + at as u64 * 8, a, b));
        }
    }
    Ok(())
}
