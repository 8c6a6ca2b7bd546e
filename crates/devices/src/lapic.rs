//! The local APIC of one CPU: xAPIC by MMIO, x2APIC by MSRs, and its timer
//! (Intel SDM vol. 3A chapter 11).
//!
//! Called by the machine, which hands in the current TSC wherever the timer matters and
//! delivers what comes back: an [`Ipi`] to send, or the vector of an [`Action::Eoi`] to
//! broadcast to the I/O APIC. It never reads a clock and never wakes anybody.

mod registers;
mod timer;

use registers::{Bits, DeliveryMode, Esr, Icr, Lvt, offset};
use timer::Timer;

/// Where every CPU's local APIC is, in guest physical memory. It is not relocatable.
pub const LAPIC_BASE: u64 = 0xfee0_0000;
/// Bytes of MMIO.
pub const LAPIC_SIZE: u64 = 0x1000;
/// `IA32_APIC_BASE`.
pub const MSR_APIC_BASE: u32 = 0x1b;
/// `IA32_TSC_DEADLINE`.
pub const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// The first x2APIC MSR; register at MMIO offset `o` is `0x800 + o / 16`.
pub const MSR_X2APIC: u32 = 0x800;
/// The last x2APIC MSR.
pub const MSR_X2APIC_END: u32 = 0x8ff;
/// The frequency that the timer counts at before its divider, in Hz: KVM's.
pub const TIMER_FREQUENCY: u64 = 1_000_000_000;

/// `IA32_APIC_BASE` bit 8: this is the bootstrap processor.
const BASE_BSP: u64 = 1 << 8;
/// `IA32_APIC_BASE` bit 10: x2APIC mode.
const BASE_EXTD: u64 = 1 << 10;
/// `IA32_APIC_BASE` bit 11: enabled.
const BASE_ENABLE: u64 = 1 << 11;
/// Spurious-interrupt vector register bit 8: the APIC is enabled by software.
const SVR_ENABLE: u32 = 1 << 8;
/// Version 0x14, six LVT entries, no suppression of EOI broadcasts.
const VERSION: u32 = 5 << 16 | 0x14;
/// Below this, vectors are reserved for exceptions (§11.5.2).
const FIRST_VECTOR: u8 = 16;

/// The access is not allowed: the CPU raises #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GeneralProtection;

/// What the machine has to do after a register write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    None,
    /// Deliver an interprocessor interrupt.
    Ipi(Ipi),
    /// A level-triggered interrupt of this vector ended: tell the I/O APIC.
    Eoi(u8),
}

/// An interprocessor interrupt on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipi {
    /// Who is meant.
    pub target: Target,
    /// What to deliver.
    pub delivery: Delivery,
}

/// Whom an interrupt message addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The sender alone.
    Sender,
    /// Every CPU.
    All,
    /// Every CPU but the sender.
    Others,
    /// The CPU with this APIC ID.
    Physical(u32),
    /// The CPUs whose logical ID matches.
    Logical(u32),
}

/// What an interrupt message delivers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Vector to every target.
    Fixed(u8),
    /// Vector to one of the targets.
    LowestPriority(u8),
    /// Nonmaskable interrupt.
    Nmi,
    /// Reset to wait-for-SIPI.
    Init,
    /// Start at this page in real mode.
    Startup(u8),
}

/// The state of one local APIC.
#[derive(Clone, Debug)]
pub struct Lapic {
    /// APIC ID, also the x2APIC ID.
    id: u32,
    base: u64,
    task_priority: u8,
    logical_id: u32,
    destination_format: u32,
    spurious: u32,
    in_service: Bits,
    requested: Bits,
    level: Bits,
    errors: Esr,
    errors_seen: Esr,
    icr: u64,
    lvt: [u32; Lvt::COUNT],
    timer: Timer,
}

impl Lapic {
    /// The state after power-up (§11.4.7.1): xAPIC mode, disabled by software.
    /// `tsc_khz` converts timer counts to TSC ticks.
    pub fn new(id: u32, bootstrap: bool, tsc_khz: u64) -> Self {
        let bsp = if bootstrap { BASE_BSP } else { 0 };
        Self {
            id,
            base: LAPIC_BASE | BASE_ENABLE | bsp,
            task_priority: 0,
            logical_id: 0,
            destination_format: u32::MAX,
            spurious: 0xff,
            in_service: Bits::default(),
            requested: Bits::default(),
            level: Bits::default(),
            errors: Esr::empty(),
            errors_seen: Esr::empty(),
            icr: 0,
            lvt: [Lvt::MASKED; Lvt::COUNT],
            timer: Timer::new(tsc_khz),
        }
    }

    /// An INIT has come: all but the APIC's ID and mode is as after power-up (§11.4.7.3).
    pub fn init(&mut self) {
        self.reset();
    }

    /// As after power-up, but for `IA32_APIC_BASE`.
    fn reset(&mut self) {
        let bootstrap = self.base & BASE_BSP != 0;
        *self = Self {
            base: self.base,
            ..Self::new(self.id, bootstrap, self.timer.tsc_khz())
        };
    }

    fn enabled(&self) -> bool {
        self.base & BASE_ENABLE != 0
    }

    fn x2apic(&self) -> bool {
        self.base & BASE_EXTD != 0
    }

    fn software_enabled(&self) -> bool {
        self.enabled() && self.spurious & SVR_ENABLE != 0
    }

    // --- IA32_APIC_BASE and modes ---------------------------------------------------

    /// `IA32_APIC_BASE`.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Writes `IA32_APIC_BASE`: only the legal mode changes (§11.12.5), and no relocation.
    pub fn set_base(&mut self, value: u64) -> Result<(), GeneralProtection> {
        let modes = BASE_ENABLE | BASE_EXTD;
        if value & !(modes | BASE_BSP) != LAPIC_BASE {
            return Err(GeneralProtection);
        }
        let (old, new) = (self.base & modes, value & modes);
        let legal = match new {
            // x2APIC without enable does not exist.
            BASE_EXTD => false,
            BASE_ENABLE => old != modes,
            m if m == modes => old != 0,
            _ => true,
        };
        if !legal {
            return Err(GeneralProtection);
        }
        self.base = value & !BASE_BSP | self.base & BASE_BSP;
        if new == 0 && old != 0 {
            self.reset();
        }
        Ok(())
    }

    /// Whether MMIO at [`LAPIC_BASE`] reaches this APIC (it does in xAPIC mode only).
    pub fn decodes_mmio(&self) -> bool {
        self.enabled() && !self.x2apic()
    }

    // --- register access ------------------------------------------------------------

    /// A load from MMIO, `register` bytes into the page. Loads that are not within the low
    /// four bytes of a register read 0.
    pub fn mmio_read(&mut self, register: u64, data: &mut [u8], now: u64) {
        data.fill(0);
        let inside = (register & 0xf) as usize;
        if inside + data.len() > 4 {
            return;
        }
        let value = self
            .read((register & 0xff0) as u32, now)
            .unwrap_or_else(|_| {
                self.error(Esr::ILLEGAL_REGISTER);
                0
            });
        data.copy_from_slice(&value.to_le_bytes()[inside..inside + data.len()]);
    }

    /// A store to MMIO. Only aligned 32-bit stores have an effect.
    pub fn mmio_write(&mut self, register: u64, data: &[u8], now: u64) -> Action {
        let (Ok(value), 0) = (data.try_into().map(u32::from_le_bytes), register & 0xf) else {
            return Action::None;
        };
        let register = (register & 0xff0) as u32;
        let result = match register {
            offset::ICR_HIGH => {
                self.icr = self.icr & 0xffff_ffff | u64::from(value) << 32;
                Ok(Action::None)
            }
            offset::ICR => {
                let high = self.icr >> 32 << 32;
                Ok(self.write_icr(high | u64::from(value)))
            }
            offset::ID => Ok(Action::None),
            offset::LDR => {
                self.logical_id = value & 0xff00_0000;
                Ok(Action::None)
            }
            offset::DFR => {
                self.destination_format = value | 0x0fff_ffff;
                Ok(Action::None)
            }
            offset::ESR | offset::EOI => self.write(register, 0, now),
            offset::SELF_IPI => Err(GeneralProtection),
            _ => self.write(register, value & registers::writable(register), now),
        };
        result.unwrap_or_else(|_| {
            self.error(Esr::ILLEGAL_REGISTER);
            Action::None
        })
    }

    /// `RDMSR` of an x2APIC register.
    pub fn msr_read(&mut self, msr: u32, now: u64) -> Result<u64, GeneralProtection> {
        let register = self.msr_offset(msr)?;
        match register {
            offset::ICR => Ok(self.icr),
            offset::ICR_HIGH | offset::DFR | offset::EOI | offset::SELF_IPI => {
                Err(GeneralProtection)
            }
            _ => self.read(register, now).map(u64::from),
        }
    }

    /// `WRMSR` of an x2APIC register.
    pub fn msr_write(
        &mut self,
        msr: u32,
        value: u64,
        now: u64,
    ) -> Result<Action, GeneralProtection> {
        let register = self.msr_offset(msr)?;
        if register == offset::ICR {
            return if value & !Icr::WRITABLE_X2APIC == 0 {
                Ok(self.write_icr(value))
            } else {
                Err(GeneralProtection)
            };
        }
        let read_only = matches!(
            register,
            offset::ID | offset::LDR | offset::DFR | offset::ICR_HIGH
        );
        if read_only || value & !u64::from(registers::writable(register)) != 0 {
            return Err(GeneralProtection);
        }
        self.write(register, value as u32, now)
    }

    fn msr_offset(&self, msr: u32) -> Result<u32, GeneralProtection> {
        match msr.checked_sub(MSR_X2APIC) {
            Some(index) if index <= 0xff && self.x2apic() => Ok(index << 4),
            _ => Err(GeneralProtection),
        }
    }

    /// `IA32_TSC_DEADLINE`: 0 when disarmed or in another timer mode.
    pub fn tsc_deadline(&mut self, now: u64) -> u64 {
        self.advance(now);
        self.timer.tsc_deadline(self.lvt[Lvt::TIMER])
    }

    /// Writes `IA32_TSC_DEADLINE`; ignored in another timer mode (§11.5.4.1).
    pub fn set_tsc_deadline(&mut self, deadline: u64, now: u64) {
        self.advance(now);
        self.timer.set_tsc_deadline(self.lvt[Lvt::TIMER], deadline);
        self.advance(now);
    }

    fn read(&mut self, register: u32, now: u64) -> Result<u32, GeneralProtection> {
        let bank = (register >> 4 & 7) as usize;
        Ok(match register {
            offset::ID if self.x2apic() => self.id,
            offset::ID => self.id << 24,
            offset::VERSION => VERSION,
            offset::TPR => u32::from(self.task_priority),
            offset::PPR => u32::from(self.processor_priority()),
            offset::LDR if self.x2apic() => x2apic_logical_id(self.id),
            offset::LDR => self.logical_id,
            offset::DFR => self.destination_format,
            offset::SVR => self.spurious,
            offset::ISR..=offset::ISR_END => self.in_service.word(bank),
            offset::TMR..=offset::TMR_END => self.level.word(bank),
            offset::IRR..=offset::IRR_END => {
                self.advance(now);
                self.requested.word(bank)
            }
            offset::ESR => self.errors_seen.bits(),
            offset::ICR => self.icr as u32,
            offset::ICR_HIGH => (self.icr >> 32) as u32,
            offset::LVT_TIMER..=offset::LVT_ERROR => self.lvt[Lvt::index(register)],
            offset::INITIAL_COUNT => self.timer.initial_count(),
            offset::CURRENT_COUNT => {
                self.advance(now);
                self.timer.current_count(self.lvt[Lvt::TIMER], now)
            }
            offset::DIVIDE => self.timer.divide(),
            // Write-only in xAPIC mode; reads give 0 there.
            offset::EOI => 0,
            _ => return Err(GeneralProtection),
        })
    }

    fn write(&mut self, register: u32, value: u32, now: u64) -> Result<Action, GeneralProtection> {
        match register {
            offset::TPR => self.task_priority = value as u8,
            offset::EOI => return Ok(self.end_of_interrupt()),
            offset::SVR => {
                self.spurious = value;
                if value & SVR_ENABLE == 0 {
                    self.lvt.iter_mut().for_each(|entry| *entry |= Lvt::MASKED);
                }
            }
            offset::ESR => {
                self.errors_seen = self.errors;
                self.errors = Esr::empty();
            }
            offset::LVT_TIMER..=offset::LVT_ERROR => self.write_lvt(register, value, now),
            offset::INITIAL_COUNT => {
                self.advance(now);
                self.timer
                    .set_initial_count(self.lvt[Lvt::TIMER], value, now);
            }
            offset::DIVIDE => {
                self.advance(now);
                self.timer.set_divide(self.lvt[Lvt::TIMER], value, now);
            }
            offset::SELF_IPI => {
                let delivery = Delivery::Fixed(value as u8);
                return Ok(Action::Ipi(Ipi {
                    target: Target::Sender,
                    delivery,
                }));
            }
            _ => return Err(GeneralProtection),
        }
        Ok(Action::None)
    }

    fn write_lvt(&mut self, register: u32, value: u32, now: u64) {
        let index = Lvt::index(register);
        let forced = if self.spurious & SVR_ENABLE == 0 {
            Lvt::MASKED
        } else {
            0
        };
        if index == Lvt::TIMER {
            self.advance(now);
            self.timer.mode_written(self.lvt[index], value);
        }
        self.lvt[index] = value | forced;
    }

    fn write_icr(&mut self, value: u64) -> Action {
        // Delivery is at once, so the delivery status bit always reads idle.
        self.icr = value & Icr::WRITABLE_X2APIC;
        let icr = Icr(value);
        let delivery = match icr.mode() {
            DeliveryMode::Fixed => Delivery::Fixed(icr.vector()),
            DeliveryMode::LowestPriority => Delivery::LowestPriority(icr.vector()),
            DeliveryMode::Nmi => Delivery::Nmi,
            // A level de-assert INIT does nothing on processors with this APIC version.
            DeliveryMode::Init if icr.is_deassert() => return Action::None,
            DeliveryMode::Init => Delivery::Init,
            DeliveryMode::Startup => Delivery::Startup(icr.vector()),
            DeliveryMode::Smi | DeliveryMode::Reserved => return Action::None,
        };
        if let Delivery::Fixed(vector) | Delivery::LowestPriority(vector) = delivery
            && vector < FIRST_VECTOR
        {
            self.error(Esr::SEND_ILLEGAL_VECTOR);
            return Action::None;
        }
        let destination = if self.x2apic() {
            icr.high()
        } else {
            icr.high() >> 24
        };
        let broadcast = if self.x2apic() { u32::MAX } else { 0xff };
        let target = match icr.shorthand() {
            1 => Target::Sender,
            2 => Target::All,
            3 => Target::Others,
            _ if destination == broadcast => Target::All,
            _ if icr.is_logical() => Target::Logical(destination),
            _ => Target::Physical(destination),
        };
        Action::Ipi(Ipi { target, delivery })
    }

    // --- interrupts -----------------------------------------------------------------

    /// Whether a message to `target` means this APIC. The sender's own cases
    /// ([`Target::Sender`], [`Target::Others`]) are the machine's to settle.
    pub fn is_target(&self, target: Target) -> bool {
        if !self.enabled() {
            return false;
        }
        match target {
            Target::Sender => false,
            Target::All | Target::Others => true,
            Target::Physical(id) => id == self.id,
            Target::Logical(mask) if self.x2apic() => {
                let own = x2apic_logical_id(self.id);
                mask >> 16 == own >> 16 && mask & own & 0xffff != 0
            }
            Target::Logical(mask) => {
                let own = self.logical_id >> 24;
                if self.destination_format >> 28 == 0xf {
                    mask & own != 0
                } else {
                    mask >> 4 == own >> 4 && mask & own & 0xf != 0
                }
            }
        }
    }

    /// Takes a fixed interrupt. Returns whether the CPU may have to be woken.
    pub fn accept(&mut self, vector: u8, level: bool) -> bool {
        if !self.software_enabled() {
            return false;
        }
        if vector < FIRST_VECTOR {
            self.error(Esr::RECEIVE_ILLEGAL_VECTOR);
            return false;
        }
        self.level.set(vector, level);
        self.requested.set(vector, true);
        true
    }

    /// The vector that the CPU should take now, if any is above the processor priority.
    /// Expired timers count.
    pub fn pending_vector(&mut self, now: u64) -> Option<u8> {
        self.advance(now);
        if !self.software_enabled() {
            return None;
        }
        let vector = self.requested.highest()?;
        (vector >> 4 > self.processor_priority() >> 4).then_some(vector)
    }

    /// The CPU takes the pending interrupt: from requested to in service.
    pub fn acknowledge(&mut self, now: u64) -> Option<u8> {
        let vector = self.pending_vector(now)?;
        self.requested.set(vector, false);
        self.in_service.set(vector, true);
        Some(vector)
    }

    /// The task priority register; CR8 is bits 7:4 of it.
    pub fn task_priority(&self) -> u8 {
        self.task_priority
    }

    /// Sets the task priority register.
    pub fn set_task_priority(&mut self, priority: u8) {
        self.task_priority = priority;
    }

    /// §11.8.3.1: the higher class of the task priority and what is in service.
    fn processor_priority(&self) -> u8 {
        let in_service = self.in_service.highest().unwrap_or(0) & 0xf0;
        if self.task_priority & 0xf0 >= in_service {
            self.task_priority
        } else {
            in_service
        }
    }

    fn end_of_interrupt(&mut self) -> Action {
        let Some(vector) = self.in_service.highest() else {
            return Action::None;
        };
        self.in_service.set(vector, false);
        if self.level.get(vector) {
            Action::Eoi(vector)
        } else {
            Action::None
        }
    }

    fn error(&mut self, error: Esr) {
        self.errors |= error;
        // Raised without a look at the vector: an illegal one must not end up here again.
        let entry = self.lvt[Lvt::ERROR];
        if entry & Lvt::MASKED == 0 && entry as u8 >= FIRST_VECTOR {
            self.accept(entry as u8, false);
        }
    }

    // --- timer ----------------------------------------------------------------------

    /// Fires the timer if its time has come.
    fn advance(&mut self, now: u64) {
        let entry = self.lvt[Lvt::TIMER];
        if self.timer.expire(entry, now) && entry & Lvt::MASKED == 0 {
            self.accept(entry as u8, false);
        }
    }

    /// The TSC at which the timer next raises an interrupt; `None` if it is not armed or
    /// masked.
    pub fn next_timer(&self) -> Option<u64> {
        if self.lvt[Lvt::TIMER] & Lvt::MASKED != 0 {
            None
        } else {
            self.timer.deadline()
        }
    }
}

/// §11.12.10.2: cluster in the high half, a bit within it in the low.
fn x2apic_logical_id(id: u32) -> u32 {
    (id >> 4) << 16 | 1 << (id & 0xf)
}

#[cfg(test)]
mod tests;
