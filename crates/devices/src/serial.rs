//! A 16550A serial port (National Semiconductor PC16550D data sheet).
//!
//! Called by the machine for the eight ports from [`COM1_PORT`]. A transmitted byte is
//! handed back at once (the line is infinitely fast), received bytes are handed in while
//! [`Serial::receive_space`] allows. It holds no bytes on their way out and never blocks.

use std::collections::VecDeque;

use bitflags::bitflags;

/// First of the eight ports of COM1.
pub const COM1_PORT: u16 = 0x3f8;
/// Global system interrupt of COM1.
pub const COM1_GSI: u8 = 4;
/// Number of registers.
pub const PORTS: u16 = 8;

/// Depth of the receive FIFO, bytes.
const FIFO_SIZE: usize = 16;

/// RBR and THR; DLL with DLAB.
const DATA: u8 = 0;
/// IER; DLM with DLAB.
const INTERRUPT_ENABLE: u8 = 1;
/// IIR on reads, FCR on writes.
const IDENTIFICATION: u8 = 2;
const LINE_CONTROL: u8 = 3;
const MODEM_CONTROL: u8 = 4;
const LINE_STATUS: u8 = 5;
const MODEM_STATUS: u8 = 6;
const SCRATCH: u8 = 7;

bitflags! {
    /// Interrupt enable register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Ier: u8 {
        const RECEIVED_DATA = 1 << 0;
        const TRANSMITTER_EMPTY = 1 << 1;
        const LINE_STATUS = 1 << 2;
        const MODEM_STATUS = 1 << 3;
    }

    /// FIFO control register; the trigger level is bits 7:6.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Fcr: u8 {
        const ENABLE = 1 << 0;
        const CLEAR_RECEIVE = 1 << 1;
        const CLEAR_TRANSMIT = 1 << 2;
        const _ = !0;
    }

    /// Line control register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Lcr: u8 {
        const DIVISOR_LATCH = 1 << 7;
        const _ = !0;
    }

    /// Modem control register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Mcr: u8 {
        const DTR = 1 << 0;
        const RTS = 1 << 1;
        const OUT1 = 1 << 2;
        /// Gates the interrupt line on a PC.
        const OUT2 = 1 << 3;
        const LOOPBACK = 1 << 4;
    }

    /// Line status register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Lsr: u8 {
        const DATA_READY = 1 << 0;
        const OVERRUN = 1 << 1;
        const PARITY = 1 << 2;
        const FRAMING = 1 << 3;
        const BREAK = 1 << 4;
        const TRANSMITTER_EMPTY = 1 << 5;
        const TRANSMITTER_IDLE = 1 << 6;
    }

    /// Modem status register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Msr: u8 {
        const DELTA_CTS = 1 << 0;
        const DELTA_DSR = 1 << 1;
        const TRAILING_RI = 1 << 2;
        const DELTA_DCD = 1 << 3;
        const CTS = 1 << 4;
        const DSR = 1 << 5;
        const RI = 1 << 6;
        const DCD = 1 << 7;
    }
}

/// IIR bits 7:6: FIFOs are enabled.
const FIFOS_ENABLED: u8 = 0xc0;

/// Interrupt causes by IIR bits 3:0, most urgent first in [`Serial::cause`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Cause {
    ModemStatus = 0b0000,
    None = 0b0001,
    TransmitterEmpty = 0b0010,
    ReceivedData = 0b0100,
    LineStatus = 0b0110,
    ReceiveTimeout = 0b1100,
}

/// The registers of a serial port.
#[derive(Clone, Debug)]
pub struct Serial {
    ier: Ier,
    fcr: Fcr,
    lcr: Lcr,
    mcr: Mcr,
    /// Errors since the last read of the line status.
    line_errors: Lsr,
    msr: Msr,
    scratch: u8,
    divisor: u16,
    received: VecDeque<u8>,
    /// THR became empty and nobody has been told yet.
    transmitter_pending: bool,
}

impl Default for Serial {
    fn default() -> Self {
        Self::new()
    }
}

impl Serial {
    /// The state after a master reset, with a terminal attached that is always ready.
    pub fn new() -> Self {
        Self {
            ier: Ier::empty(),
            fcr: Fcr::empty(),
            lcr: Lcr::empty(),
            mcr: Mcr::empty(),
            line_errors: Lsr::empty(),
            msr: Msr::CTS | Msr::DSR | Msr::DCD,
            scratch: 0,
            divisor: 12,
            received: VecDeque::with_capacity(FIFO_SIZE),
            transmitter_pending: false,
        }
    }

    /// `IN` of register 0 to 7.
    pub fn read(&mut self, register: u8) -> u8 {
        let latch = self.lcr.contains(Lcr::DIVISOR_LATCH);
        match register {
            DATA if latch => self.divisor as u8,
            DATA => self.received.pop_front().unwrap_or(0),
            INTERRUPT_ENABLE if latch => (self.divisor >> 8) as u8,
            INTERRUPT_ENABLE => self.ier.bits(),
            IDENTIFICATION => self.read_identification(),
            LINE_CONTROL => self.lcr.bits(),
            MODEM_CONTROL => self.mcr.bits(),
            LINE_STATUS => {
                let status = self.line_status();
                self.line_errors = Lsr::empty();
                status.bits()
            }
            MODEM_STATUS => {
                let status = self.msr;
                self.msr &= !Self::DELTAS;
                status.bits()
            }
            SCRATCH => self.scratch,
            _ => 0xff,
        }
    }

    /// `OUT` to register 0 to 7. Returns the byte that leaves on the line, if one does.
    pub fn write(&mut self, register: u8, value: u8) -> Option<u8> {
        let latch = self.lcr.contains(Lcr::DIVISOR_LATCH);
        match register {
            DATA if latch => self.divisor = self.divisor & 0xff00 | u16::from(value),
            DATA => return self.transmit(value),
            INTERRUPT_ENABLE if latch => {
                self.divisor = self.divisor & 0x00ff | u16::from(value) << 8;
            }
            INTERRUPT_ENABLE => {
                let old = self.ier;
                self.ier = Ier::from_bits_truncate(value);
                // Enabling the interrupt while THR is empty raises it: Linux starts
                // transmission this way.
                if (self.ier & !old).contains(Ier::TRANSMITTER_EMPTY) {
                    self.transmitter_pending = true;
                }
            }
            IDENTIFICATION => self.write_fifo_control(Fcr::from_bits_retain(value)),
            LINE_CONTROL => self.lcr = Lcr::from_bits_retain(value),
            MODEM_CONTROL => self.write_modem_control(Mcr::from_bits_truncate(value)),
            SCRATCH => self.scratch = value,
            _ => {}
        }
        None
    }

    fn transmit(&mut self, value: u8) -> Option<u8> {
        self.transmitter_pending = true;
        if self.mcr.contains(Mcr::LOOPBACK) {
            self.push(value);
            return None;
        }
        Some(value)
    }

    fn read_identification(&mut self) -> u8 {
        let cause = self.cause();
        if cause == Cause::TransmitterEmpty {
            // Reading it as the source is what clears it.
            self.transmitter_pending = false;
        }
        let fifos = if self.fcr.contains(Fcr::ENABLE) {
            FIFOS_ENABLED
        } else {
            0
        };
        cause as u8 | fifos
    }

    fn write_fifo_control(&mut self, value: Fcr) {
        let toggled = (value ^ self.fcr).contains(Fcr::ENABLE);
        if toggled || value.contains(Fcr::CLEAR_RECEIVE) {
            self.received.clear();
        }
        if toggled || value.contains(Fcr::CLEAR_TRANSMIT) {
            self.transmitter_pending = true;
        }
        self.fcr = value & !(Fcr::CLEAR_RECEIVE | Fcr::CLEAR_TRANSMIT);
    }

    const DELTAS: Msr = Msr::DELTA_CTS
        .union(Msr::DELTA_DSR)
        .union(Msr::TRAILING_RI)
        .union(Msr::DELTA_DCD);

    /// In loopback mode the four outputs are the four inputs.
    fn write_modem_control(&mut self, value: Mcr) {
        self.mcr = value;
        let lines = if value.contains(Mcr::LOOPBACK) {
            let wired = [
                (Mcr::RTS, Msr::CTS),
                (Mcr::DTR, Msr::DSR),
                (Mcr::OUT1, Msr::RI),
                (Mcr::OUT2, Msr::DCD),
            ];
            let looped = wired.into_iter().filter(|(out, _)| value.contains(*out));
            looped.fold(Msr::empty(), |lines, (_, line)| lines | line)
        } else {
            Msr::CTS | Msr::DSR | Msr::DCD
        };
        let changed = (self.msr ^ lines) & !Self::DELTAS;
        self.msr = self.msr & Self::DELTAS | lines;
        self.msr.set(
            Msr::DELTA_CTS,
            self.msr.contains(Msr::DELTA_CTS) || changed.contains(Msr::CTS),
        );
        self.msr.set(
            Msr::DELTA_DSR,
            self.msr.contains(Msr::DELTA_DSR) || changed.contains(Msr::DSR),
        );
        self.msr.set(
            Msr::DELTA_DCD,
            self.msr.contains(Msr::DELTA_DCD) || changed.contains(Msr::DCD),
        );
        // RI counts when it falls.
        let fell = changed.contains(Msr::RI) && !lines.contains(Msr::RI);
        self.msr.set(
            Msr::TRAILING_RI,
            self.msr.contains(Msr::TRAILING_RI) || fell,
        );
    }

    fn line_status(&self) -> Lsr {
        let mut status = self.line_errors | Lsr::TRANSMITTER_EMPTY | Lsr::TRANSMITTER_IDLE;
        status.set(Lsr::DATA_READY, !self.received.is_empty());
        status
    }

    /// The most urgent interrupt that is enabled.
    fn cause(&self) -> Cause {
        let trigger = self.trigger_level();
        if self.ier.contains(Ier::LINE_STATUS) && !self.line_errors.is_empty() {
            Cause::LineStatus
        } else if self.ier.contains(Ier::RECEIVED_DATA) && self.received.len() >= trigger {
            Cause::ReceivedData
        } else if self.ier.contains(Ier::RECEIVED_DATA) && !self.received.is_empty() {
            // No time passes on this line, so the character timeout is at once.
            Cause::ReceiveTimeout
        } else if self.ier.contains(Ier::TRANSMITTER_EMPTY) && self.transmitter_pending {
            Cause::TransmitterEmpty
        } else if self.ier.contains(Ier::MODEM_STATUS) && self.msr.intersects(Self::DELTAS) {
            Cause::ModemStatus
        } else {
            Cause::None
        }
    }

    fn trigger_level(&self) -> usize {
        if !self.fcr.contains(Fcr::ENABLE) {
            return 1;
        }
        [1, 4, 8, 14][usize::from(self.fcr.bits() >> 6)]
    }

    /// The level of the interrupt line.
    pub fn interrupt(&self) -> bool {
        // On a PC, OUT2 drives the buffer to the interrupt controller; in loopback mode
        // the pin is inactive.
        let gate = self.mcr.contains(Mcr::OUT2) && !self.mcr.contains(Mcr::LOOPBACK);
        gate && self.cause() != Cause::None
    }

    /// How many bytes [`Serial::receive`] would take now. None until a driver has enabled
    /// the receive interrupt: what arrives before would be cleared with the FIFO when the
    /// driver starts up.
    pub fn receive_space(&self) -> usize {
        if !self.ier.contains(Ier::RECEIVED_DATA) || self.mcr.contains(Mcr::LOOPBACK) {
            return 0;
        }
        self.capacity() - self.received.len().min(self.capacity())
    }

    fn capacity(&self) -> usize {
        if self.fcr.contains(Fcr::ENABLE) {
            FIFO_SIZE
        } else {
            1
        }
    }

    /// Bytes arrive on the line. Returns how many were taken.
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        let count = bytes.len().min(self.receive_space());
        self.received.extend(&bytes[..count]);
        count
    }

    fn push(&mut self, byte: u8) {
        if self.received.len() < self.capacity() {
            self.received.push_back(byte);
        } else {
            self.line_errors |= Lsr::OVERRUN;
        }
    }
}

#[cfg(test)]
mod tests;
