//! The MC146818 real-time clock and its CMOS memory, at ports 0x70 and 0x71.
//!
//! Called by the machine, which hands in the time of day (UTC); it never reads a clock.
//! It raises no interrupts: the alarm and periodic enables can be set and do nothing.

use std::time::Duration;

/// The index port; the data port follows it.
pub const RTC_PORT: u16 = 0x70;
/// Number of ports.
pub const PORTS: u16 = 2;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
/// Where PCs keep the century; named by the FADT.
pub const CENTURY: u8 = 0x32;

/// Status A: the time is about to change.
const UPDATE_IN_PROGRESS: u8 = 1 << 7;
/// Status A: 32.768 kHz time base, 1,024 Hz periodic rate.
const STATUS_A_DEFAULT: u8 = 0x26;
/// Status B: hours count to 24.
const HOUR_24: u8 = 1 << 1;
/// Status B: values are binary, not BCD.
const BINARY: u8 = 1 << 2;
/// Status B: updates are held while software sets the time.
const SET: u8 = 1 << 7;
/// Status D: the battery is good.
const VALID_RAM: u8 = 1 << 7;
/// For how long before a second ends an update is announced (`t_BUC` of the data sheet).
const UPDATE_TIME: Duration = Duration::from_micros(244);

/// The clock's registers.
#[derive(Clone, Debug)]
pub struct Rtc {
    index: u8,
    memory: [u8; 128],
    /// Seconds that the guest's clock is ahead of the time handed in.
    offset: i64,
}

impl Default for Rtc {
    fn default() -> Self {
        Self::new()
    }
}

/// Seconds, minutes, hours, weekday (1 is Sunday), day, month, year, century.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Date {
    second: u8,
    minute: u8,
    hour: u8,
    weekday: u8,
    day: u8,
    month: u8,
    year: u8,
    century: u8,
}

impl Rtc {
    /// A clock that shows the time handed in, in BCD and 24-hour form.
    pub fn new() -> Self {
        let mut memory = [0; 128];
        memory[usize::from(STATUS_A)] = STATUS_A_DEFAULT;
        memory[usize::from(STATUS_B)] = HOUR_24;
        Self {
            index: 0,
            memory,
            offset: 0,
        }
    }

    /// `IN` from port 0x70 (`register` 0) or 0x71 (1). `now` is the time since the Unix
    /// epoch.
    pub fn read(&mut self, register: u8, now: Duration) -> u8 {
        if register != 1 {
            return 0xff;
        }
        let status_b = self.memory[usize::from(STATUS_B)];
        match self.index {
            STATUS_A => {
                let left = Duration::from_nanos((1_000_000_000 - now.subsec_nanos()).into());
                let updating = left <= UPDATE_TIME && status_b & SET == 0;
                let flag = if updating { UPDATE_IN_PROGRESS } else { 0 };
                self.memory[usize::from(STATUS_A)] & !UPDATE_IN_PROGRESS | flag
            }
            STATUS_C => 0,
            STATUS_D => VALID_RAM,
            index if is_time(index) => {
                if status_b & SET == 0 {
                    self.store_date(date(self.guest_seconds(now)));
                }
                self.memory[usize::from(index)]
            }
            index => self.memory[usize::from(index)],
        }
    }

    /// `OUT` to port 0x70 (`register` 0) or 0x71 (1).
    pub fn write(&mut self, register: u8, value: u8, now: Duration) {
        match (register, self.index) {
            // Bit 7 of the index masks NMI, which nothing here raises.
            (0, _) => self.index = value & 0x7f,
            (1, STATUS_C | STATUS_D) => {}
            (1, STATUS_B) => self.write_status_b(value, now),
            (1, index) if is_time(index) => {
                let running = self.memory[usize::from(STATUS_B)] & SET == 0;
                if running {
                    self.store_date(date(self.guest_seconds(now)));
                }
                self.memory[usize::from(index)] = value;
                if running {
                    self.adopt_date(now);
                }
            }
            (1, index) => self.memory[usize::from(index)] = value,
            _ => {}
        }
    }

    fn guest_seconds(&self, now: Duration) -> i64 {
        (now.as_secs() as i64).saturating_add(self.offset)
    }

    fn write_status_b(&mut self, value: u8, now: Duration) {
        let old = self.memory[usize::from(STATUS_B)];
        if old & SET == 0 && value & SET != 0 {
            self.store_date(date(self.guest_seconds(now)));
        }
        self.memory[usize::from(STATUS_B)] = value;
        if old & SET != 0 && value & SET == 0 {
            self.adopt_date(now);
        }
    }

    fn encode(&self, value: u8) -> u8 {
        if self.memory[usize::from(STATUS_B)] & BINARY != 0 {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    fn decode(&self, index: u8) -> u8 {
        let value = self.memory[usize::from(index)];
        if self.memory[usize::from(STATUS_B)] & BINARY != 0 {
            value
        } else {
            (value >> 4).saturating_mul(10).saturating_add(value & 0xf)
        }
    }

    fn store_date(&mut self, date: Date) {
        let hour_24 = self.memory[usize::from(STATUS_B)] & HOUR_24 != 0;
        let hour = if hour_24 {
            self.encode(date.hour)
        } else {
            let afternoon = if date.hour >= 12 { 0x80 } else { 0 };
            self.encode((date.hour + 11) % 12 + 1) | afternoon
        };
        let fields = [
            (SECONDS, date.second),
            (MINUTES, date.minute),
            (WEEKDAY, date.weekday),
            (DAY, date.day),
            (MONTH, date.month),
            (YEAR, date.year),
            (CENTURY, date.century),
        ];
        for (index, value) in fields {
            self.memory[usize::from(index)] = self.encode(value);
        }
        self.memory[usize::from(HOURS)] = hour;
    }

    /// The guest has set the time: keeps how far it is from the time handed in.
    fn adopt_date(&mut self, now: Duration) {
        let hour_24 = self.memory[usize::from(STATUS_B)] & HOUR_24 != 0;
        let raw = self.memory[usize::from(HOURS)];
        let hour = if hour_24 {
            self.decode(HOURS)
        } else {
            self.memory[usize::from(HOURS)] = raw & 0x7f;
            let hour = self.decode(HOURS) % 12 + if raw & 0x80 != 0 { 12 } else { 0 };
            self.memory[usize::from(HOURS)] = raw;
            hour
        };
        let year = i64::from(self.decode(CENTURY)) * 100 + i64::from(self.decode(YEAR));
        let days = days_from_civil(year, self.decode(MONTH).into(), self.decode(DAY).into());
        let seconds = days * 86400
            + i64::from(hour) * 3600
            + i64::from(self.decode(MINUTES)) * 60
            + i64::from(self.decode(SECONDS));
        self.offset = seconds - now.as_secs() as i64;
    }
}

/// Registers that show the time, not an alarm or memory.
fn is_time(index: u8) -> bool {
    matches!(index, SECONDS | MINUTES | HOURS | WEEKDAY..=YEAR | CENTURY)
}

/// Days from the Unix epoch to a date of the Gregorian calendar. Months and days out of
/// range count on into the neighbouring ones.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    // Years begin in March, so that the leap day is the last.
    let months = year * 12 + month - 3;
    let (year, month) = (months.div_euclid(12), months.rem_euclid(12));
    let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    year * 365 + leap_days + (153 * month + 2) / 5 + day - 1 - 719_468
}

/// The date at `seconds` from the Unix epoch.
fn date(seconds: i64) -> Date {
    let (days, second) = (seconds.div_euclid(86400), seconds.rem_euclid(86400));
    // Search from an estimate that is at most a year off: a year is 365.2425 days.
    let mut year = 1970 + (days * 400).div_euclid(146_097);
    while days_from_civil(year + 1, 1, 1) <= days {
        year += 1;
    }
    while days_from_civil(year, 1, 1) > days {
        year -= 1;
    }
    let month = (1..=12)
        .rfind(|month| days_from_civil(year, *month, 1) <= days)
        .unwrap_or(1);
    Date {
        second: (second % 60) as u8,
        minute: (second / 60 % 60) as u8,
        hour: (second / 3600) as u8,
        // 1970-01-01 was a Thursday, day 5 when Sunday is 1.
        weekday: ((days + 4).rem_euclid(7) + 1) as u8,
        day: (days - days_from_civil(year, month, 1) + 1) as u8,
        month: month as u8,
        year: year.rem_euclid(100) as u8,
        century: year.div_euclid(100).rem_euclid(100) as u8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2024-02-29 23:59:58 UTC, a Thursday.
    const LEAP_DAY: Duration = Duration::from_secs(1_709_251_198);

    fn get(rtc: &mut Rtc, index: u8, now: Duration) -> u8 {
        rtc.write(0, index, now);
        rtc.read(1, now)
    }

    fn set(rtc: &mut Rtc, index: u8, value: u8, now: Duration) {
        rtc.write(0, index, now);
        rtc.write(1, value, now);
    }

    fn all(rtc: &mut Rtc, now: Duration) -> [u8; 8] {
        [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS].map(|i| get(rtc, i, now))
    }

    #[test]
    fn the_time_is_shown_in_bcd_at_first() {
        let shown = all(&mut Rtc::new(), LEAP_DAY);

        assert_eq!(shown, [0x20, 0x24, 0x02, 0x29, 5, 0x23, 0x59, 0x58]);
    }

    #[test]
    fn the_time_is_shown_in_binary_when_asked() {
        let mut rtc = Rtc::new();
        set(&mut rtc, STATUS_B, HOUR_24 | BINARY, LEAP_DAY);

        let shown = all(&mut rtc, LEAP_DAY + Duration::from_secs(2));

        assert_eq!(shown, [20, 24, 3, 1, 6, 0, 0, 0]);
    }

    #[test]
    fn twelve_hour_form_marks_the_afternoon() {
        let mut rtc = Rtc::new();
        set(&mut rtc, STATUS_B, 0, LEAP_DAY);
        assert_eq!(get(&mut rtc, HOURS, LEAP_DAY), 0x91);
        let midnight = LEAP_DAY + Duration::from_secs(2);
        assert_eq!(get(&mut rtc, HOURS, midnight), 0x12);
        assert_eq!(
            get(&mut rtc, HOURS, midnight + Duration::from_hours(12)),
            0x92
        );
    }

    #[test]
    fn an_update_is_announced_just_before_the_second_ends() {
        let mut rtc = Rtc::new();
        let at = |micros| LEAP_DAY + Duration::from_micros(micros);

        assert_eq!(get(&mut rtc, STATUS_A, at(0)), 0x26);
        assert_eq!(get(&mut rtc, STATUS_A, at(999_700)), 0x26);
        assert_eq!(get(&mut rtc, STATUS_A, at(999_800)), 0xa6);
    }

    #[test]
    fn linux_finds_a_working_clock() {
        let mut rtc = Rtc::new();
        assert_eq!(get(&mut rtc, STATUS_D, LEAP_DAY), 0x80);
        assert_eq!(get(&mut rtc, STATUS_B, LEAP_DAY) & HOUR_24, HOUR_24);
        assert_eq!(get(&mut rtc, STATUS_C, LEAP_DAY), 0);
    }

    #[test]
    fn a_time_that_the_guest_sets_runs_on_from_there() {
        let mut rtc = Rtc::new();
        set(&mut rtc, STATUS_B, HOUR_24 | SET, LEAP_DAY);
        set(&mut rtc, YEAR, 0x31, LEAP_DAY);
        set(&mut rtc, MONTH, 0x12, LEAP_DAY);
        set(&mut rtc, DAY, 0x31, LEAP_DAY);
        set(&mut rtc, STATUS_B, HOUR_24, LEAP_DAY);

        let shown = all(&mut rtc, LEAP_DAY + Duration::from_secs(1));
        assert_eq!(shown, [0x20, 0x31, 0x12, 0x31, 4, 0x23, 0x59, 0x59]);
        let shown = all(&mut rtc, LEAP_DAY + Duration::from_secs(2));
        assert_eq!(shown, [0x20, 0x32, 0x01, 0x01, 5, 0x00, 0x00, 0x00]);
    }

    #[test]
    fn memory_beyond_the_clock_keeps_what_is_written() {
        let mut rtc = Rtc::new();
        set(&mut rtc, 0x40, 0x5a, LEAP_DAY);

        assert_eq!(get(&mut rtc, 0x40, LEAP_DAY), 0x5a);
        // Bit 7 of the index is the NMI mask, not part of it.
        assert_eq!(get(&mut rtc, 0xc0, LEAP_DAY), 0x5a);
    }

    #[test]
    fn dates_over_four_centuries_convert_there_and_back() {
        for day in (0..160_000).step_by(13) {
            let Date {
                day: d,
                month,
                year,
                century,
                ..
            } = date(day * 86400);
            let year = i64::from(century) * 100 + i64::from(year);
            assert_eq!(days_from_civil(year, month.into(), d.into()), day);
        }
    }

    #[test]
    fn no_value_written_to_any_register_panics() {
        let mut rtc = Rtc::new();
        for value in [0, 0x7f, 0x99, 0xff] {
            for index in 0..=0xff {
                for now in [Duration::ZERO, LEAP_DAY, Duration::from_secs(1 << 40)] {
                    set(&mut rtc, index, value, now);
                    get(&mut rtc, index, now);
                }
            }
        }
    }
}
