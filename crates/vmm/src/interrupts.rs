//! Interrupt delivery: from I/O APIC pins, MSIs and IPIs to local APICs and on to the
//! vCPU that has to look up.
//!
//! Called by devices' glue from any thread and by vCPUs for their own local APIC. Lock
//! order: I/O APIC, then a local APIC; neither is held while a vCPU is woken.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use strata_devices::ioapic::{IoApic, Message};
use strata_devices::lapic::{Action, Delivery, Ipi, Lapic, Target};
use strata_hypervisor::Signal;

use crate::clock::Clock;
use crate::sync::lock;
use crate::virtio::MsiSink;

/// MSI addresses are `0xfeexxxxx` (Intel SDM vol. 3A §11.11.1).
const MSI_ADDRESS: u64 = 0xfee0_0000;
const MSI_ADDRESS_MASK: u64 = 0xffff_ffff_fff0_0000;

/// Makes a vCPU look at its interrupts and its stop flag. Never lost, from any thread.
pub(crate) type Wake = Box<dyn Fn() + Send + Sync>;

struct Vcpu {
    lapic: Mutex<Lapic>,
    signals: Signals,
    /// Set once the vCPU's thread has made its processor.
    wake: OnceLock<Wake>,
}

struct Inner {
    vcpus: Vec<Vcpu>,
    ioapic: Mutex<IoApic>,
}

/// What a vCPU was sent beside interrupts and has not taken: the page of a startup message
/// in the low byte, and a bit for each kind.
#[derive(Default)]
struct Signals(AtomicU32);

impl Signals {
    const NMI: u32 = 1 << 8;
    const INIT: u32 = 1 << 9;
    const STARTUP: u32 = 1 << 10;

    /// Adds one. INIT does away with what came before it.
    fn send(&self, signal: Signal) -> bool {
        let add = |word: u32| {
            Some(match signal {
                Signal::Nmi => word | Self::NMI,
                Signal::Init => Self::INIT,
                Signal::Startup(page) => word & !0xff | Self::STARTUP | u32::from(page),
            })
        };
        self.0
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, add)
            .is_ok()
    }

    fn take(&self) -> Option<Signal> {
        let first = |word: u32| {
            [Self::INIT, Self::STARTUP, Self::NMI]
                .into_iter()
                .find(|kind| word & kind != 0)
        };
        let less = |word: u32| first(word).map(|kind| word & !kind);
        let taken = self
            .0
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, less);
        let word = taken.ok()?;
        Some(match first(word)? {
            Self::INIT => Signal::Init,
            Self::STARTUP => Signal::Startup(word as u8),
            _ => Signal::Nmi,
        })
    }
}

/// A machine's interrupt controllers. Clones are the same controllers.
#[derive(Clone)]
pub struct Interrupts(Arc<Inner>);

impl std::fmt::Debug for Interrupts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Interrupts")
            .field("vcpus", &self.0.vcpus.len())
            .finish_non_exhaustive()
    }
}

impl Interrupts {
    pub(crate) fn new(vcpus: u8, clock: &Clock) -> Self {
        let vcpu = |index: u8| Vcpu {
            lapic: Mutex::new(Lapic::new(index.into(), index == 0, clock.tsc_khz)),
            signals: Signals::default(),
            wake: OnceLock::new(),
        };
        let vcpus = (0..vcpus).map(vcpu).collect();
        Self(Arc::new(Inner {
            vcpus,
            ioapic: Mutex::new(IoApic::new()),
        }))
    }

    /// Delivers a message-signalled interrupt: a write of `data` to `address`.
    pub fn deliver_msi(&self, address: u64, data: u32) {
        if address & MSI_ADDRESS_MASK != MSI_ADDRESS {
            return;
        }
        self.deliver_message(Message {
            destination: (address >> 12) as u8,
            logical: address & 1 << 2 != 0,
            delivery_mode: (data >> 8 & 7) as u8,
            vector: data as u8,
            level: data & 1 << 15 != 0,
        });
    }

    /// Drives the line of global system interrupt `gsi` (0 to 23).
    pub fn set_line(&self, gsi: u8, asserted: bool) {
        let message = lock(&self.0.ioapic).set_line(gsi, asserted);
        if let Some(message) = message {
            self.deliver_message(message);
        }
    }

    fn deliver_messages(&self, messages: Vec<Message>) {
        for message in messages {
            self.deliver_message(message);
        }
    }

    fn deliver_message(&self, message: Message) {
        let destination = u32::from(message.destination);
        let target = match message.destination {
            0xff => Target::All,
            _ if message.logical => Target::Logical(destination),
            _ => Target::Physical(destination),
        };
        let delivery = match message.delivery_mode {
            0 => Delivery::Fixed(message.vector),
            1 => Delivery::LowestPriority(message.vector),
            4 => Delivery::Nmi,
            5 => Delivery::Init,
            _ => return,
        };
        self.deliver(None, target, delivery, message.level);
    }

    /// Delivers a message, of vCPU `sender` if it is an IPI.
    fn deliver(&self, sender: Option<usize>, target: Target, delivery: Delivery, level: bool) {
        let one = matches!(delivery, Delivery::LowestPriority(_));
        for (index, vcpu) in self.0.vcpus.iter().enumerate() {
            let meant = match target {
                Target::Sender => sender == Some(index),
                Target::Others => sender != Some(index),
                _ => lock(&vcpu.lapic).is_target(target),
            };
            if meant && vcpu.accept(delivery, level) {
                vcpu.wake();
                if one {
                    return;
                }
            }
        }
    }

    /// Does what a local APIC of vCPU `sender` asked for.
    pub(crate) fn act(&self, sender: usize, action: Action) {
        match action {
            Action::None => {}
            Action::Eoi(vector) => {
                let messages = lock(&self.0.ioapic).end_of_interrupt(vector);
                self.deliver_messages(messages);
            }
            Action::Ipi(Ipi { target, delivery }) => {
                self.deliver(Some(sender), target, delivery, false);
            }
        }
    }

    /// Takes what vCPU `index` was sent beside interrupts, one at a time.
    pub(crate) fn take_signal(&self, index: usize) -> Option<Signal> {
        self.0.vcpus.get(index)?.signals.take()
    }

    /// Runs `f` on the local APIC of vCPU `index`.
    pub(crate) fn with_lapic<T>(&self, index: usize, f: impl FnOnce(&mut Lapic) -> T) -> Option<T> {
        let vcpu = self.0.vcpus.get(index)?;
        Some(f(&mut lock(&vcpu.lapic)))
    }

    /// A load from the I/O APIC's MMIO page.
    pub(crate) fn ioapic_read(&self, offset: u64, data: &mut [u8]) {
        lock(&self.0.ioapic).mmio_read(offset, data);
    }

    /// A store to the I/O APIC's MMIO page.
    pub(crate) fn ioapic_write(&self, offset: u64, data: &[u8]) {
        let messages = lock(&self.0.ioapic).mmio_write(offset, data);
        self.deliver_messages(messages);
    }

    /// Sets how vCPU `index` is woken. The first caller wins.
    pub(crate) fn attach(&self, index: usize, wake: Wake) {
        if let Some(vcpu) = self.0.vcpus.get(index) {
            let _ = vcpu.wake.set(wake);
        }
    }

    /// Wakes vCPU `index`, if it runs already.
    pub(crate) fn wake(&self, index: usize) {
        if let Some(vcpu) = self.0.vcpus.get(index) {
            vcpu.wake();
        }
    }

    /// Wakes every vCPU.
    pub(crate) fn wake_all(&self) {
        self.0.vcpus.iter().for_each(Vcpu::wake);
    }
}

impl Vcpu {
    /// Takes a message. Returns whether the vCPU may have to be woken.
    fn accept(&self, delivery: Delivery, level: bool) -> bool {
        match delivery {
            Delivery::Fixed(vector) | Delivery::LowestPriority(vector) => {
                lock(&self.lapic).accept(vector, level)
            }
            Delivery::Nmi => self.signals.send(Signal::Nmi),
            Delivery::Init => self.signals.send(Signal::Init),
            Delivery::Startup(page) => self.signals.send(Signal::Startup(page)),
        }
    }

    fn wake(&self) {
        if let Some(wake) = self.wake.get() {
            wake();
        }
    }
}

impl MsiSink for Interrupts {
    fn deliver_msi(&self, address: u64, data: u32) {
        Interrupts::deliver_msi(self, address, data);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    const CLOCK: Clock = Clock {
        tsc_khz: 1_000_000,
        start_tsc: 0,
    };
    const SVR: u64 = 0xf0;

    /// Two vCPUs with enabled local APICs, and how often each was woken.
    fn two() -> (Interrupts, [Arc<AtomicU32>; 2]) {
        let interrupts = Interrupts::new(2, &CLOCK);
        let woken: [Arc<AtomicU32>; 2] = Default::default();
        for (index, count) in woken.iter().enumerate() {
            interrupts.with_lapic(index, |l| l.mmio_write(SVR, &0x1ff_u32.to_le_bytes(), 0));
            let count = Arc::clone(count);
            let wake = move || {
                count.fetch_add(1, Ordering::Relaxed);
            };
            interrupts.attach(index, Box::new(wake));
        }
        (interrupts, woken)
    }

    fn pending(interrupts: &Interrupts, index: usize) -> Option<u8> {
        interrupts
            .with_lapic(index, |lapic| lapic.pending_vector(0))
            .unwrap()
    }

    fn counts(woken: &[Arc<AtomicU32>; 2]) -> [u32; 2] {
        [0, 1].map(|i| woken[i].load(Ordering::Relaxed))
    }

    #[test]
    fn an_msi_reaches_the_cpu_in_its_address_and_wakes_only_that() {
        let (interrupts, woken) = two();

        interrupts.deliver_msi(0xfee0_1000, 0x45);

        assert_eq!(
            (pending(&interrupts, 0), pending(&interrupts, 1)),
            (None, Some(0x45))
        );
        assert_eq!(counts(&woken), [0, 1]);
    }

    #[test]
    fn an_msi_to_all_reaches_all_and_one_elsewhere_nobody() {
        let (interrupts, woken) = two();

        interrupts.deliver_msi(0xfeef_f000, 0x45);
        interrupts.deliver_msi(0x1_fee0_0000, 0x46);
        interrupts.deliver_msi(0, 0x46);

        assert_eq!(
            (pending(&interrupts, 0), pending(&interrupts, 1)),
            (Some(0x45), Some(0x45))
        );
        assert_eq!(counts(&woken), [1, 1]);
    }

    #[test]
    fn a_lowest_priority_message_reaches_one_cpu() {
        let (interrupts, woken) = two();

        interrupts.deliver_msi(0xfeef_f000, 1 << 8 | 0x45);

        assert_eq!(counts(&woken), [1, 0]);
    }

    #[test]
    fn a_level_interrupt_is_raised_again_after_its_end_while_the_line_is_up() {
        let (interrupts, _) = two();
        interrupts.ioapic_write(0, &[0x10 + 2 * 9]);
        interrupts.ioapic_write(0x10, &(1_u32 << 15 | 0x51).to_le_bytes());
        interrupts.set_line(9, true);
        let take = || {
            interrupts
                .with_lapic(0, |lapic| lapic.acknowledge(0))
                .unwrap()
        };
        let end = || {
            let action = interrupts.with_lapic(0, |lapic| lapic.mmio_write(0xb0, &[0; 4], 0));
            interrupts.act(0, action.unwrap());
        };
        assert_eq!(take(), Some(0x51));

        end();
        assert_eq!(take(), Some(0x51));

        interrupts.set_line(9, false);
        end();
        assert_eq!(take(), None);
    }

    #[test]
    fn an_ipi_to_the_others_leaves_the_sender_out() {
        let (interrupts, woken) = two();
        let ipi = Ipi {
            target: Target::Others,
            delivery: Delivery::Fixed(0x60),
        };

        interrupts.act(1, Action::Ipi(ipi));

        assert_eq!(
            (pending(&interrupts, 0), pending(&interrupts, 1)),
            (Some(0x60), None)
        );
        assert_eq!(counts(&woken), [1, 0]);
    }

    fn ipi(target: Target, delivery: Delivery) -> Action {
        Action::Ipi(Ipi { target, delivery })
    }

    #[test]
    fn init_and_startup_reach_the_cpu_they_name_in_their_order() {
        let (interrupts, woken) = two();

        interrupts.act(0, ipi(Target::Physical(1), Delivery::Init));
        interrupts.act(0, ipi(Target::Physical(1), Delivery::Startup(0x99)));

        assert_eq!(counts(&woken), [0, 2]);
        let taken = [(); 3].map(|()| interrupts.take_signal(1));
        let expected = [Some(Signal::Init), Some(Signal::Startup(0x99)), None];
        assert_eq!(taken, expected);
        assert_eq!(interrupts.take_signal(0), None);
    }

    #[test]
    fn an_init_does_away_with_an_earlier_startup_and_nmi() {
        let (interrupts, _) = two();
        interrupts.act(0, ipi(Target::Physical(1), Delivery::Startup(1)));
        interrupts.act(0, ipi(Target::Physical(1), Delivery::Nmi));

        interrupts.act(0, ipi(Target::Physical(1), Delivery::Init));

        assert_eq!(interrupts.take_signal(1), Some(Signal::Init));
        assert_eq!(interrupts.take_signal(1), None);
    }

    #[test]
    fn an_nmi_to_the_others_reaches_them_though_their_apics_are_disabled_by_software() {
        let (interrupts, _) = two();
        interrupts.with_lapic(1, |l| l.mmio_write(SVR, &0xff_u32.to_le_bytes(), 0));

        interrupts.act(0, ipi(Target::Others, Delivery::Nmi));

        assert_eq!(interrupts.take_signal(1), Some(Signal::Nmi));
        assert_eq!(interrupts.take_signal(0), None);
    }

    #[test]
    fn an_ipi_to_oneself_reaches_only_the_sender() {
        let (interrupts, woken) = two();

        interrupts.act(1, ipi(Target::Sender, Delivery::Fixed(0x61)));

        assert_eq!(
            (pending(&interrupts, 0), pending(&interrupts, 1)),
            (None, Some(0x61))
        );
        assert_eq!(counts(&woken), [0, 1]);
    }

    #[test]
    fn a_logical_x2apic_destination_reaches_the_cpus_of_its_cluster_that_it_names() {
        let interrupts = Interrupts::new(16, &CLOCK);
        for index in 0..16 {
            interrupts.with_lapic(index, |lapic| {
                lapic.set_base(lapic.base() | 1 << 10).unwrap();
                lapic.msr_write(0x80f, 0x1ff, 0).unwrap();
            });
        }

        interrupts.act(
            3,
            ipi(
                Target::Logical(0b1010_0000_0000_0001),
                Delivery::Fixed(0x71),
            ),
        );
        interrupts.act(
            3,
            ipi(Target::Logical(1 << 16 | 0xffff), Delivery::Fixed(0x72)),
        );

        let reached: Vec<usize> = (0..16)
            .filter(|index| pending(&interrupts, *index).is_some())
            .collect();
        assert_eq!(reached, [0, 13, 15]);
        assert_eq!(pending(&interrupts, 15), Some(0x71));
    }
}
