//! The machine that both vCPUs see: a serial port, interrupt controllers, and time that goes on
//! with what the vCPU does. Just enough to boot Linux from its initramfs.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use strata_cpu::Bus;
use strata_devices::ioapic::{IOAPIC_BASE, IOAPIC_SIZE, IoApic, Message};
use strata_devices::lapic::{
    Action, Delivery, LAPIC_BASE, LAPIC_SIZE, Lapic, MSR_APIC_BASE, MSR_TSC_DEADLINE, MSR_X2APIC,
    MSR_X2APIC_END,
};
use strata_devices::serial::Serial;

/// What the guest's time stamp counter runs at, in kHz.
pub(crate) const TSC_KHZ: u32 = 1_000_000;
/// Ticks that a look at the clock takes, so that nobody waits long.
const LOOK: u64 = 200;
const COM1: u16 = 0x3f8;
const COM1_PIN: u8 = 4;
/// Where Linux resets the machine: the keyboard controller, and the reset register.
const RESETS: [(u16, u32); 2] = [(0x64, 0xfe), (0xcf9, 6)];

/// Time, in ticks of the TSC. Clones are the same.
#[derive(Clone, Default)]
pub(crate) struct Time(Arc<AtomicU64>);

impl Time {
    /// Lets time pass.
    pub(crate) fn pass(&self, ticks: u64) {
        self.0.fetch_add(ticks, Ordering::Relaxed);
    }

    /// What time it is.
    pub(crate) fn now(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// As `now`; looking takes time too.
    pub(crate) fn look(&self) -> u64 {
        self.pass(LOOK);
        self.now()
    }

    fn reach(&self, at: u64) {
        self.0.fetch_max(at, Ordering::Relaxed);
    }
}

/// The devices of one vCPU, which is the only user.
pub(crate) struct Machine {
    time: Time,
    inner: RefCell<Inner>,
}

struct Inner {
    serial: Serial,
    lapic: Lapic,
    ioapic: IoApic,
    /// What the guest wrote to its console.
    output: Vec<u8>,
    /// How much of that was shown.
    shown: usize,
    over: bool,
}

impl Machine {
    pub(crate) fn new(time: Time) -> Self {
        Self {
            time,
            inner: RefCell::new(Inner {
                serial: Serial::new(),
                lapic: Lapic::new(0, true, TSC_KHZ.into()),
                ioapic: IoApic::new(),
                output: Vec::new(),
                shown: 0,
                over: false,
            }),
        }
    }

    /// Its time.
    pub(crate) fn time(&self) -> Time {
        self.time.clone()
    }

    /// What the guest wrote to its console.
    pub(crate) fn output(&self) -> String {
        String::from_utf8_lossy(&self.inner.borrow().output).into_owned()
    }

    /// Whether the guest reset the machine, or halted with nothing to wait for.
    pub(crate) fn is_over(&self) -> bool {
        self.inner.borrow().over
    }
}

impl Inner {
    fn deliver(&mut self, messages: impl IntoIterator<Item = Message>) {
        for message in messages {
            self.lapic.accept(message.vector, message.level);
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::None => {}
            Action::Eoi(vector) => {
                let messages = self.ioapic.end_of_interrupt(vector);
                self.deliver(messages);
            }
            // there is nobody else
            Action::Ipi(ipi) => {
                if let Delivery::Fixed(vector) | Delivery::LowestPriority(vector) = ipi.delivery
                    && self.lapic.is_target(ipi.target)
                {
                    self.lapic.accept(vector, false);
                }
            }
        }
    }

    fn update_line(&mut self) {
        let message = self.ioapic.set_line(COM1_PIN, self.serial.interrupt());
        self.deliver(message);
    }
}

impl Bus for Machine {
    fn port_read(&self, port: u16, size: u8) -> u32 {
        let inner = &mut *self.inner.borrow_mut();
        match port {
            COM1..0x400 if size == 1 => {
                let value = inner.serial.read((port - COM1) as u8);
                inner.update_line();
                value.into()
            }
            _ => u32::MAX,
        }
    }

    fn port_write(&self, port: u16, _size: u8, value: u32) {
        let inner = &mut *self.inner.borrow_mut();
        if RESETS.contains(&(port, value)) {
            inner.over = true;
        }
        if (COM1..0x400).contains(&port) {
            let sent = inner.serial.write((port - COM1) as u8, value as u8);
            inner.output.extend(sent);
            if sent == Some(b'\n') {
                eprint!("{}", String::from_utf8_lossy(&inner.output[inner.shown..]));
                inner.shown = inner.output.len();
            }
            inner.update_line();
        }
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        let inner = &mut *self.inner.borrow_mut();
        let now = self.time.now();
        match address {
            IOAPIC_BASE.. if address - IOAPIC_BASE < IOAPIC_SIZE => {
                inner.ioapic.mmio_read(address - IOAPIC_BASE, data);
            }
            LAPIC_BASE.. if address - LAPIC_BASE < LAPIC_SIZE => {
                inner.lapic.mmio_read(address - LAPIC_BASE, data, now);
            }
            _ => data.fill(0xff),
        }
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        let inner = &mut *self.inner.borrow_mut();
        let now = self.time.now();
        match address {
            IOAPIC_BASE.. if address - IOAPIC_BASE < IOAPIC_SIZE => {
                let messages = inner.ioapic.mmio_write(address - IOAPIC_BASE, data);
                inner.deliver(messages);
            }
            LAPIC_BASE.. if address - LAPIC_BASE < LAPIC_SIZE => {
                let action = inner.lapic.mmio_write(address - LAPIC_BASE, data, now);
                inner.act(action);
            }
            _ => {}
        }
    }

    fn msr_read(&self, msr: u32) -> Option<u64> {
        let inner = &mut *self.inner.borrow_mut();
        let now = self.time.now();
        match msr {
            MSR_APIC_BASE => Some(inner.lapic.base()),
            MSR_TSC_DEADLINE => Some(inner.lapic.tsc_deadline(now)),
            MSR_X2APIC..=MSR_X2APIC_END => inner.lapic.msr_read(msr, now).ok(),
            _ => None,
        }
    }

    fn msr_write(&self, msr: u32, value: u64) -> Option<()> {
        let inner = &mut *self.inner.borrow_mut();
        let now = self.time.now();
        match msr {
            MSR_APIC_BASE => inner.lapic.set_base(value).ok(),
            MSR_TSC_DEADLINE => {
                inner.lapic.set_tsc_deadline(value, now);
                Some(())
            }
            MSR_X2APIC..=MSR_X2APIC_END => {
                let action = inner.lapic.msr_write(msr, value, now).ok()?;
                inner.act(action);
                Some(())
            }
            _ => None,
        }
    }

    /// Asked by a halted vCPU only, for which time passes at once.
    fn interrupt_pending(&self) -> bool {
        let inner = &mut *self.inner.borrow_mut();
        if inner.lapic.pending_vector(self.time.now()).is_some() {
            return true;
        }
        match inner.lapic.next_timer() {
            Some(at) => self.time.reach(at),
            None => inner.over = true,
        }
        inner.lapic.pending_vector(self.time.now()).is_some() || inner.over
    }

    fn acknowledge_interrupt(&self) -> Option<u8> {
        self.inner.borrow_mut().lapic.acknowledge(self.time.now())
    }

    fn task_priority(&self) -> u8 {
        self.inner.borrow().lapic.task_priority() >> 4
    }

    fn set_task_priority(&self, priority: u8) {
        let inner = &mut *self.inner.borrow_mut();
        inner.lapic.set_task_priority(priority << 4);
    }

    fn next_timer(&self) -> Option<u64> {
        None
    }
}
