//! Several vCPUs on one memory: what each has to tell the others, and when one has to wait
//! for another.
//!
//! Every vCPU translates by itself and has TLBs of its own; memory and the map of code are
//! shared. Called by `engine` between blocks and in slow paths, and by `mmu` for stores that
//! take the slow path. Translated code knows nothing of it but the attention word.
//!
//! **A store into code that another vCPU translated.** The storer announces the page
//! ([`Seat::begin_store`]), asks the map who holds code there, sends those a letter and sets
//! their attention, then stores, then withdraws the announcement. The others read letters
//! before the next block, so before anything that serialises has passed. Who translates
//! marks first, then waits for announced stores to that page, then compares the bytes that
//! it translated with memory: a store that was not seen by one side was seen by the other.
//!
//! **A page that becomes code while others may store to it through their TLBs.** Who
//! translates marks the page and asks the map who may store without asking; those get a
//! letter too, and are waited for.
//!
//! **An atomic access that no host instruction can do** (across a page) has all others stop.
//!
//! A vCPU *rests* while it promises not to touch guest memory: when it is halted, is not
//! run, or waits for others here. Nobody waits for one that rests. When it goes on it first
//! reads its letters. So no two can wait for each other.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use strata_memory::{CodeWriteListener, CpuSet, GuestMemory, MAX_CPUS, PAGE_SIZE};

use crate::bus::Waker;
use crate::mmu::Core;

/// Reads of a condition before the thread sleeps: what a running vCPU does at its next block
/// takes less than a microsecond.
const SPINS: u32 = 200;
/// PAUSE instructions that a vCPU executes before it offers the host its time.
const PATIENCE: u32 = 64;
/// Letters about stores that a vCPU may leave unread; after more it forgets all its code.
const MOST_LETTERS: usize = 4096;

/// What a vCPU has been told and not read.
#[derive(Default)]
struct Letters {
    /// Ranges, each within a page, that hold code of this vCPU and were stored to.
    written: Vec<(u64, u64)>,
    /// Too many to list were.
    all_written: bool,
    /// Pages that were translated by another and must lose their lines for stores.
    revoked: HashSet<u64>,
}

struct Member {
    /// Set when the vCPU is made.
    waker: OnceLock<Waker>,
    resting: AtomicBool,
    /// The page that the vCPU is storing to, with a count that makes stores differ; or 0.
    storing: AtomicU64,
    letters: Mutex<Letters>,
    /// There are letters.
    told: AtomicBool,
}

impl Member {
    fn new() -> Self {
        Self {
            waker: OnceLock::new(),
            resting: AtomicBool::new(true),
            storing: AtomicU64::new(0),
            letters: Mutex::default(),
            told: AtomicBool::new(false),
        }
    }

    fn letters(&self) -> MutexGuard<'_, Letters> {
        self.letters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rests(&self) -> bool {
        self.resting.load(Ordering::SeqCst)
    }

    /// Writes to the member and, unless it rests, has it look up.
    fn tell(&self, write: impl FnOnce(&mut Letters)) {
        write(&mut self.letters());
        self.told.store(true, Ordering::SeqCst);
        self.summon();
    }

    fn summon(&self) {
        if !self.rests()
            && let Some(waker) = self.waker.get()
        {
            waker.wake();
        }
    }
}

/// Lets threads sleep until a condition on atomics holds.
#[derive(Default)]
struct Changes {
    sleepers: AtomicU32,
    lock: Mutex<()>,
    changed: Condvar,
}

impl Changes {
    fn wait_until(&self, mut holds: impl FnMut() -> bool) {
        for _ in 0..SPINS {
            if holds() {
                return;
            }
            std::hint::spin_loop();
        }
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while !holds() {
            let woken = self.changed.wait(guard);
            guard = woken.unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    /// Something that others may wait for has changed.
    fn tell(&self) {
        if self.sleepers.load(Ordering::SeqCst) != 0 {
            drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner));
            self.changed.notify_all();
        }
    }
}

/// The software vCPUs of one machine.
pub struct Crew {
    memory: GuestMemory,
    members: Box<[Member]>,
    /// The vCPU that runs alone, plus one; or 0.
    alone: AtomicU32,
    changes: Changes,
}

impl std::fmt::Debug for Crew {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Crew")
            .field("vcpus", &self.members.len())
            .finish_non_exhaustive()
    }
}

impl Crew {
    /// A crew of `cpus` (1 to [`MAX_CPUS`]; other numbers are cut to that) for `memory`,
    /// which must have no other.
    pub fn new(memory: GuestMemory, cpus: u32) -> Arc<Self> {
        let cpus = (cpus as usize).clamp(1, MAX_CPUS);
        let crew = Arc::new(Self {
            memory,
            members: (0..cpus).map(|_| Member::new()).collect(),
            alone: AtomicU32::new(0),
            changes: Changes::default(),
        });
        let listener = Listener(Arc::downgrade(&crew));
        crew.memory.code().set_listener(Box::new(listener));
        crew
    }

    /// Number of vCPUs.
    pub fn cpus(&self) -> u32 {
        self.members.len() as u32
    }

    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Tells `holders` that bytes they translated were, or are about to be, stored to.
    fn tell_written(&self, holders: CpuSet, address: u64, length: u64) {
        for (_, member) in self.among(holders) {
            member.tell(|letters| {
                if letters.written.len() < MOST_LETTERS {
                    letters.written.push((address, length));
                } else {
                    letters.all_written = true;
                }
            });
        }
    }

    fn among(&self, set: CpuSet) -> impl Iterator<Item = (usize, &Member)> {
        let members = self.members.iter().enumerate();
        members.filter(move |(index, _)| set >> index & 1 != 0)
    }
}

/// Device writes into code. Weak, since the memory that holds it is held by the crew.
struct Listener(std::sync::Weak<Crew>);

impl CodeWriteListener for Listener {
    fn code_written(&self, holders: CpuSet, address: u64, length: u64) {
        if let Some(crew) = self.0.upgrade() {
            crew.tell_written(holders, address, length);
        }
    }
}

/// One vCPU's place in its crew.
pub(crate) struct Seat {
    crew: Arc<Crew>,
    index: usize,
    /// Stores announced so far.
    stores: u64,
    /// A store is announced.
    storing: bool,
    /// PAUSE instructions since the host was last offered this thread's time.
    pauses: u32,
    /// All others are stopped.
    exclusive: bool,
}

impl Seat {
    /// Place `index` in `crew`, for the vCPU that is woken by `waker`.
    pub(crate) fn new(crew: &Arc<Crew>, index: u32, waker: Waker) -> Self {
        let index = (index as usize).min(crew.members.len() - 1);
        let _ = crew.members[index].waker.set(waker);
        Self {
            crew: Arc::clone(crew),
            index,
            stores: 0,
            storing: false,
            pauses: 0,
            exclusive: false,
        }
    }

    pub(crate) fn index(&self) -> usize {
        self.index
    }

    fn member(&self) -> &Member {
        &self.crew.members[self.index]
    }

    fn own(&self) -> CpuSet {
        1 << self.index
    }

    fn others(&self) -> impl Iterator<Item = &Member> {
        self.crew.among(!self.own()).map(|(_, member)| member)
    }

    /// Whether no other vCPU exists.
    pub(crate) fn is_single(&self) -> bool {
        self.crew.members.len() == 1
    }

    // --- resting -----------------------------------------------------------------------

    /// From here on this vCPU does not touch guest memory.
    pub(crate) fn rest(&self) {
        self.member().resting.store(true, Ordering::SeqCst);
        self.crew.changes.tell();
    }

    /// Ends a rest, when nobody runs alone. The caller then reads its letters.
    fn resume(&self) {
        let free = || [0, self.index as u32 + 1].contains(&self.crew.alone.load(Ordering::SeqCst));
        loop {
            self.crew.changes.wait_until(free);
            self.member().resting.store(false, Ordering::SeqCst);
            if free() {
                return;
            }
            self.rest();
        }
    }

    // --- stores that take the slow path ------------------------------------------------

    /// Announces a store to the page of `physical`, which may hold code.
    fn begin_store(&mut self, physical: u64) {
        if self.is_single() {
            return;
        }
        self.stores += 1;
        self.storing = true;
        let value = self.stores << 36 | page_mark(physical);
        self.member().storing.swap(value, Ordering::SeqCst);
    }

    /// The announced store, if there is one, has been done or will not be.
    pub(crate) fn end_store(&mut self) {
        if std::mem::take(&mut self.storing) {
            self.member().storing.swap(0, Ordering::SeqCst);
            self.crew.changes.tell();
        }
    }

    /// Whether a store is announced, and to be ended once it is done.
    pub(crate) fn is_storing(&self) -> bool {
        self.storing
    }

    // --- running alone -----------------------------------------------------------------

    /// Whether an access in several steps looks like one to the other vCPUs.
    pub(crate) fn may_be_atomic(&self) -> bool {
        self.is_single() || self.exclusive
    }

    /// Stops all others until [`Seat::end_exclusive`]. The caller holds no host pointers to
    /// guest memory and reads its letters afterwards.
    fn begin_exclusive(&mut self) {
        self.rest();
        let alone = &self.crew.alone;
        let me = self.index as u32 + 1;
        let turn = || {
            alone
                .compare_exchange(0, me, Ordering::SeqCst, Ordering::SeqCst)
                .is_ok()
        };
        self.crew.changes.wait_until(turn);
        self.member().resting.store(false, Ordering::SeqCst);
        self.exclusive = true;
        self.others().for_each(Member::summon);
        self.crew
            .changes
            .wait_until(|| self.others().all(Member::rests));
    }

    /// Lets the others go on, if they were stopped.
    pub(crate) fn end_exclusive(&mut self) {
        if std::mem::take(&mut self.exclusive) {
            self.crew.alone.store(0, Ordering::SeqCst);
            self.crew.changes.tell();
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.end_store();
        self.end_exclusive();
        self.rest();
    }
}

/// What [`Member::storing`] holds of a page, never 0.
fn page_mark(physical: u64) -> u64 {
    (physical / PAGE_SIZE + 1) & ((1 << 36) - 1)
}

impl Core {
    /// Has the vCPU leave translated code before the next block.
    pub(crate) fn look_up(&self) {
        self.state.block().attention.0.store(1, Ordering::SeqCst);
    }

    /// Goes on after a rest, with what happened meanwhile taken in.
    pub(crate) fn resume(&mut self) {
        self.seat.resume();
        self.read_letters();
    }

    /// PAUSE: the guest spins. What it spins for may be up to a vCPU that the host does not
    /// run at the moment, so now and then the host is offered this thread's time.
    pub(crate) fn pause(&mut self) {
        self.seat.pauses += 1;
        if self.seat.pauses < PATIENCE {
            std::hint::spin_loop();
            return;
        }
        self.seat.pauses = 0;
        self.seat.rest();
        std::thread::yield_now();
        self.resume();
    }

    /// Between blocks: stops if another vCPU wants to run alone, and reads letters.
    pub(crate) fn meet_crew(&mut self) {
        if self.seat.crew.alone.load(Ordering::SeqCst) != 0 {
            self.seat.rest();
            self.seat.resume();
        }
        self.read_letters();
    }

    fn read_letters(&mut self) {
        let member = self.seat.member();
        if !member.told.swap(false, Ordering::SeqCst) {
            return;
        }
        let letters = std::mem::take(&mut *member.letters());
        self.stale.extend(letters.written);
        self.all_stale |= letters.all_written;
        if !self.stale.is_empty() || self.all_stale {
            // in case a block is to be entered before they are thrown away
            self.look_up();
        }
        for page in letters.revoked {
            self.revoke_stores(page * PAGE_SIZE);
        }
        self.seat.crew.changes.tell();
    }

    /// Before a store of `length` bytes to RAM at `physical`, within a page, that no TLB line
    /// let through: has code there thrown away, by all who have any. To be followed by
    /// [`Seat::end_store`] once the store is done.
    pub(crate) fn note_store(&mut self, physical: u64, length: u64) {
        self.seat.begin_store(physical);
        let holders = self.memory.code().overlaps(physical, length);
        let own = self.seat.own();
        if holders & own != 0 {
            self.stale.push((physical, length));
        }
        if holders & !own != 0 {
            self.seat
                .crew
                .tell_written(holders & !own, physical, length);
        }
    }

    /// Marks `length` bytes at `physical`, within a page, as translated. When this returns,
    /// every store to them that is not in memory yet will be told of.
    pub(crate) fn mark_code(&mut self, physical: u64, length: u64) {
        let storers = self.memory.code().mark(self.seat.index, physical, length);
        let own = self.seat.own();
        if storers & own != 0 {
            self.revoke_stores(physical);
        }
        if self.seat.is_single() {
            return;
        }
        let crew = Arc::clone(&self.seat.crew);
        let page = physical / PAGE_SIZE;
        for (_, member) in crew.among(storers & !own) {
            member.tell(|letters| {
                letters.revoked.insert(page);
            });
        }
        let mark = page_mark(physical);
        let announced: Vec<(&Member, u64)> = crew
            .among(!own)
            .map(|(_, member)| (member, member.storing.load(Ordering::SeqCst)))
            .filter(|(_, storing)| storing & ((1 << 36) - 1) == mark)
            .collect();
        if storers & !own == 0 && announced.is_empty() {
            return;
        }
        let code = self.memory.code();
        let settled = || {
            let asks = |(index, member): (usize, &Member)| {
                member.rests() || !code.claims_stores(index, physical)
            };
            let done = |(member, storing): &(&Member, u64)| {
                member.storing.load(Ordering::SeqCst) != *storing
            };
            crew.among(storers & !own).all(asks) && announced.iter().all(done)
        };
        self.seat.rest();
        crew.changes.wait_until(settled);
        self.resume();
    }

    /// Between blocks: stops all other vCPUs, for an access that the host cannot do
    /// atomically.
    pub(crate) fn begin_exclusive(&mut self) {
        if !self.seat.is_single() {
            self.seat.begin_exclusive();
            self.read_letters();
        }
    }
}

#[cfg(test)]
mod tests;
