//! Power management: the ways in which a guest turns its machine off or resets it, and
//! the ACPI timer.
//!
//! A PM1 event and control block (ACPI 6.5 §4.8.3) without an SMI command port, so the
//! machine is always in ACPI mode and no event is ever raised. Not "hardware-reduced":
//! Linux takes that for an EFI machine and resets through firmware that is not there.
//! Resets come by the FADT's reset register at 0xcf9 (as on Intel chipsets) and by the
//! keyboard controller's reset line.
//! Called by the machine; time is handed in.

use std::time::Duration;

/// PM1a event block: status and enable registers of 2 bytes each.
pub const EVENT_PORT: u16 = 0x600;
/// Bytes of the PM1a event block.
pub const EVENT_LENGTH: u8 = 4;
/// PM1a control block: one register.
pub const CONTROL_PORT: u16 = 0x604;
/// Bytes of the PM1a control block.
pub const CONTROL_LENGTH: u8 = 2;
/// Global system interrupt of the SCI, which never comes.
pub const SCI_GSI: u16 = 9;
/// Port of the ACPI timer, 4 bytes.
pub const TIMER_PORT: u16 = 0x608;
/// The reset control register.
pub const RESET_PORT: u16 = 0xcf9;
/// What to write there to reset.
pub const RESET_VALUE: u8 = 0x06;
/// Status and command port of the keyboard controller.
pub const KEYBOARD_PORT: u16 = 0x64;
/// `SLP_TYP` of S5, soft off.
pub const SLEEP_TYPE_S5: u8 = 5;
/// Frequency of the ACPI timer, Hz (ACPI 6.5 §4.8.2.1).
pub const TIMER_FREQUENCY: u64 = 3_579_545;

/// PM1 enable register.
const ENABLE_PORT: u16 = EVENT_PORT + 2;
/// PM1 control bit 0: in ACPI mode.
const SCI_ENABLE: u16 = 1;
/// PM1 control bit 13: enter the state.
const SLEEP_ENABLE: u16 = 1 << 13;
/// PM1 control bits 12:10: which state.
const SLEEP_TYPE_SHIFT: u16 = 10;
/// Reset control bit 2: reset the CPU when it goes from 0 to 1.
const RESET_CPU: u8 = 1 << 2;
/// Keyboard controller command: pulse output bit 0, wired to the CPU's reset.
const KEYBOARD_PULSE_RESET: u8 = 0xfe;

/// What the guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Turn the machine off.
    PowerOff,
    /// Reset it.
    Reset,
}

/// The power management registers.
#[derive(Clone, Debug, Default)]
pub struct PowerManagement {
    enable: u16,
    reset_control: u8,
}

impl PowerManagement {
    /// The state after reset.
    pub fn new() -> Self {
        Self::default()
    }

    /// `IN` from one of the ports above, the timer excepted; PM1 registers are read whole.
    pub fn read(&self, port: u16) -> u16 {
        match port {
            ENABLE_PORT => self.enable,
            CONTROL_PORT => SCI_ENABLE,
            RESET_PORT => self.reset_control.into(),
            // No event has happened; the keyboard controller has room for a command.
            _ => 0,
        }
    }

    /// `OUT` to one of the ports above; PM1 registers are written whole.
    pub fn write(&mut self, port: u16, word: u16) -> Option<Request> {
        let value = word as u8;
        match port {
            ENABLE_PORT => {
                self.enable = word;
                None
            }
            CONTROL_PORT if word & SLEEP_ENABLE != 0 => {
                let kind = word >> SLEEP_TYPE_SHIFT & 7;
                (kind == u16::from(SLEEP_TYPE_S5)).then_some(Request::PowerOff)
            }
            RESET_PORT => {
                let rising = value & !self.reset_control & RESET_CPU != 0;
                self.reset_control = value & 0x0e;
                rising.then_some(Request::Reset)
            }
            KEYBOARD_PORT if value == KEYBOARD_PULSE_RESET => Some(Request::Reset),
            _ => None,
        }
    }

    /// The ACPI timer at `now`, the time since the machine started: 24 bits that wrap.
    pub fn timer(now: Duration) -> u32 {
        let ticks = now.as_nanos() * u128::from(TIMER_FREQUENCY) / 1_000_000_000;
        ticks as u32 & 0x00ff_ffff
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s5_with_sleep_enable_powers_off() {
        let mut pm = PowerManagement::new();

        assert_eq!(pm.write(CONTROL_PORT, 5 << 10), None);
        assert_eq!(pm.write(CONTROL_PORT, 3 << 10 | SLEEP_ENABLE), None);
        assert_eq!(
            pm.write(CONTROL_PORT, 5 << 10 | SLEEP_ENABLE),
            Some(Request::PowerOff)
        );
    }

    #[test]
    fn the_machine_is_always_in_acpi_mode_and_has_no_events() {
        let mut pm = PowerManagement::new();

        pm.write(ENABLE_PORT, 0x0120);

        assert_eq!(pm.read(CONTROL_PORT) & 1, 1);
        assert_eq!(pm.read(EVENT_PORT), 0);
        assert_eq!(pm.read(ENABLE_PORT), 0x0120);
    }

    #[test]
    fn the_reset_register_resets_when_its_reset_bit_rises() {
        let mut pm = PowerManagement::new();

        assert_eq!(pm.write(RESET_PORT, 0x02), None);
        assert_eq!(
            pm.write(RESET_PORT, RESET_VALUE.into()),
            Some(Request::Reset)
        );
        assert_eq!(pm.read(RESET_PORT), u16::from(RESET_VALUE));
        assert_eq!(pm.write(RESET_PORT, RESET_VALUE.into()), None);
    }

    #[test]
    fn the_keyboard_controller_resets_on_its_pulse_command_only() {
        let mut pm = PowerManagement::new();

        assert_eq!(pm.read(KEYBOARD_PORT) & 2, 0);
        assert_eq!(pm.write(KEYBOARD_PORT, 0xd1), None);
        assert_eq!(pm.write(KEYBOARD_PORT, 0xfe), Some(Request::Reset));
    }

    #[test]
    fn the_timer_runs_at_its_frequency_and_wraps_at_24_bits() {
        assert_eq!(PowerManagement::timer(Duration::from_secs(1)), 3_579_545);
        let wrapped = PowerManagement::timer(Duration::from_secs(5));
        assert_eq!(wrapped, (5 * 3_579_545) & 0xff_ffff);
    }
}
