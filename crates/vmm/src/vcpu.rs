//! One vCPU's side of the machine: the [`Bus`] that its processor calls, and the loop of
//! its thread.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use strata_devices::lapic::{
    LAPIC_BASE, LAPIC_SIZE, Lapic, MSR_APIC_BASE, MSR_TSC_DEADLINE, MSR_X2APIC, MSR_X2APIC_END,
};
use strata_hypervisor::soft::{Crew, SoftCpu};
use strata_hypervisor::state::{Activity, Registers};
use strata_hypervisor::{Bus, Halt, Processor, Signal, Statistics};
use strata_memory::GuestMemory;

use crate::bus::Buses;
use crate::clock::{Clock, tsc, wake_on_time};
use crate::ending::{Ending, Outcome};
use crate::error::Error;
use crate::interrupts::{Interrupts, Wake};
use crate::pvclock::PvClock;
use crate::sync::lock;
use crate::timers::Timers;

/// What all vCPUs of a machine share.
pub(crate) struct Shared {
    pub(crate) memory: GuestMemory,
    pub(crate) buses: Buses,
    pub(crate) interrupts: Interrupts,
    pub(crate) timers: Timers,
    pub(crate) clock: Clock,
    pub(crate) ending: Arc<Ending>,
    /// Set to end every vCPU's run, which are then woken.
    pub(crate) stop: Arc<AtomicBool>,
}

impl Shared {
    /// What ends every vCPU's run.
    pub(crate) fn halt(&self) -> impl Fn() + Send + Sync + use<> {
        let (stop, interrupts) = (Arc::clone(&self.stop), self.interrupts.clone());
        move || {
            stop.store(true, Ordering::SeqCst);
            interrupts.wake_all();
        }
    }
}

/// The machine as one vCPU sees it.
pub(crate) struct VcpuBus {
    shared: Arc<Shared>,
    index: usize,
    pvclock: Mutex<PvClock>,
}

impl VcpuBus {
    pub(crate) fn new(shared: Arc<Shared>, index: usize) -> Self {
        Self {
            shared,
            index,
            pvclock: Mutex::default(),
        }
    }

    fn lapic<T>(&self, f: impl FnOnce(&mut Lapic) -> T) -> Option<T> {
        self.shared.interrupts.with_lapic(self.index, f)
    }

    /// Runs `f`, which may change the local APIC's timer, and lets the timer thread know.
    fn with_timer<T>(&self, f: impl FnOnce(&mut Lapic) -> T) -> Option<T> {
        let (result, next) = self.lapic(|lapic| {
            let before = lapic.next_timer();
            let result = f(lapic);
            let after = lapic.next_timer();
            (result, (before != after).then_some(after))
        })?;
        if let Some(deadline) = next {
            self.shared.timers.arm(self.index, deadline);
        }
        Some(result)
    }

    fn lapic_offset(&self, address: u64) -> Option<u64> {
        let offset = address
            .checked_sub(LAPIC_BASE)
            .filter(|offset| *offset < LAPIC_SIZE)?;
        self.lapic(|lapic| lapic.decodes_mmio())?.then_some(offset)
    }
}

impl Bus for VcpuBus {
    fn port_read(&self, port: u16, size: u8) -> u32 {
        self.shared.buses.port_read(port, size)
    }

    fn port_write(&self, port: u16, size: u8, value: u32) {
        self.shared.buses.port_write(port, size, value);
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.lapic_offset(address) {
            Some(offset) => {
                self.lapic(|lapic| lapic.mmio_read(offset, data, tsc()));
            }
            None => self.shared.buses.mmio_read(address, data),
        }
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        let Some(offset) = self.lapic_offset(address) else {
            return self.shared.buses.mmio_write(address, data);
        };
        if let Some(action) = self.with_timer(|lapic| lapic.mmio_write(offset, data, tsc())) {
            self.shared.interrupts.act(self.index, action);
        }
    }

    fn msr_read(&self, msr: u32) -> Option<u64> {
        match msr {
            MSR_APIC_BASE => self.lapic(|lapic| lapic.base()),
            MSR_TSC_DEADLINE => self.lapic(|lapic| lapic.tsc_deadline(tsc())),
            MSR_X2APIC..=MSR_X2APIC_END => self.lapic(|lapic| lapic.msr_read(msr, tsc()))?.ok(),
            _ if PvClock::has(msr) => Some(lock(&self.pvclock).read(msr)),
            _ => None,
        }
    }

    fn msr_write(&self, msr: u32, value: u64) -> Option<()> {
        match msr {
            MSR_APIC_BASE => self.with_timer(|lapic| lapic.set_base(value))?.ok(),
            MSR_TSC_DEADLINE => self.with_timer(|lapic| lapic.set_tsc_deadline(value, tsc())),
            MSR_X2APIC..=MSR_X2APIC_END => {
                let action = self
                    .with_timer(|lapic| lapic.msr_write(msr, value, tsc()))?
                    .ok()?;
                self.shared.interrupts.act(self.index, action);
                Some(())
            }
            _ if PvClock::has(msr) => {
                let Shared { memory, clock, .. } = &*self.shared;
                lock(&self.pvclock).write(msr, value, memory, clock)
            }
            _ => None,
        }
    }

    fn interrupt_pending(&self) -> bool {
        // A periodic timer rearms itself when it is found to have expired.
        self.with_timer(|lapic| lapic.pending_vector(tsc()))
            .flatten()
            .is_some()
    }

    fn acknowledge_interrupt(&self) -> Option<u8> {
        self.with_timer(|lapic| lapic.acknowledge(tsc()))?
    }

    fn task_priority(&self) -> u8 {
        self.lapic(|lapic| lapic.task_priority() >> 4).unwrap_or(0)
    }

    fn set_task_priority(&self, priority: u8) {
        self.lapic(|lapic| lapic.set_task_priority(priority << 4));
    }

    fn next_timer(&self) -> Option<u64> {
        self.lapic(|lapic| lapic.next_timer())?
    }

    fn take_signal(&self) -> Option<Signal> {
        let signal = self.shared.interrupts.take_signal(self.index)?;
        if signal == Signal::Init {
            self.with_timer(Lapic::init);
            if self.index == 0 {
                // It would go on in firmware, which there is none of.
                self.shared.ending.end(Outcome::Reset);
                return None;
            }
        }
        Some(signal)
    }
}

/// A processor as a vCPU's thread uses it.
pub(crate) trait Vcpu: Send {
    /// Runs the guest until it halts for good or `stop` is set.
    fn run(&mut self, stop: &AtomicBool, bus: &dyn Bus) -> Halt;
    /// How other threads make it look up. Called by the thread that will run it.
    fn wake(&self) -> Wake;
    /// What was translated; `None` where nothing is.
    fn statistics(&self) -> Option<Statistics> {
        None
    }
}

impl<P: Processor> Vcpu for P {
    fn run(&mut self, stop: &AtomicBool, bus: &dyn Bus) -> Halt {
        Processor::run(self, stop, bus)
    }

    fn wake(&self) -> Wake {
        let waker = self.waker();
        Box::new(move || waker.wake())
    }

    fn statistics(&self) -> Option<Statistics> {
        Processor::statistics(self)
    }
}

/// The software vCPUs of a machine. The first starts with these registers, the others wait for
/// it to start them. They need nothing of the host afterwards, so that the process can be locked
/// up before they run.
pub(crate) fn soft(
    cpus: u8,
    memory: &GuestMemory,
    clock: &Clock,
    registers: &Registers,
) -> Result<Vec<Box<dyn Vcpu>>, Error> {
    let tsc_khz = u32::try_from(clock.tsc_khz).unwrap_or(u32::MAX);
    let crew = Crew::new(memory.clone(), cpus.into());
    let waiting = Registers {
        activity: Activity::WaitForStartup,
        ..Registers::default()
    };
    let make = |index: u8| {
        let mut cpu = SoftCpu::new(&crew, index.into(), tsc_khz)?;
        cpu.set_registers(if index == 0 { registers } else { &waiting })?;
        Ok(Box::new(cpu) as Box<dyn Vcpu>)
    };
    (0..cpus)
        .map(|index| make(index).map_err(|source| Error::Vcpu { index, source }))
        .collect()
}

/// Ends the machine if its vCPU's thread panics.
struct Watchdog<'a>(&'a Ending);

impl Drop for Watchdog<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.end(Outcome::Failed(
                "a vCPU thread panicked; this is a bug".into(),
            ));
        }
    }
}

/// What a vCPU's thread does: runs the processor, reports how it ended, and gives it back.
pub(crate) fn run(shared: &Arc<Shared>, index: usize, mut vcpu: Box<dyn Vcpu>) -> Box<dyn Vcpu> {
    let _watchdog = Watchdog(&shared.ending);
    wake_on_time();
    shared.interrupts.attach(index, vcpu.wake());
    // What happened before anybody could wake this vCPU must not go unseen.
    shared.interrupts.wake(index);
    let bus = VcpuBus::new(Arc::clone(shared), index);
    match vcpu.run(&shared.stop, &bus) {
        Halt::Stopped => {}
        Halt::TripleFault => shared.ending.end(Outcome::TripleFault),
        Halt::Fatal(reason) => shared.ending.end(Outcome::Failed(reason)),
    }
    vcpu
}
