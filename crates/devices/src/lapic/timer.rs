//! The local APIC's timer (Intel SDM vol. 3A §11.5.4): one-shot, periodic and
//! TSC-deadline, kept as the TSC value of the next expiry.

use super::TIMER_FREQUENCY;

/// LVT timer bits 18:17.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    OneShot,
    Periodic,
    TscDeadline,
    Reserved,
}

impl Mode {
    fn of(lvt: u32) -> Self {
        match lvt >> 17 & 3 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::Reserved,
        }
    }
}

#[derive(Clone, Debug)]
pub(super) struct Timer {
    tsc_khz: u64,
    /// Divide configuration register: bits 3 and 1:0.
    divide: u32,
    initial_count: u32,
    /// TSC of the next expiry, in any mode.
    deadline: Option<u64>,
}

impl Timer {
    pub(super) fn new(tsc_khz: u64) -> Self {
        Self {
            tsc_khz: tsc_khz.max(1),
            divide: 0,
            initial_count: 0,
            deadline: None,
        }
    }

    /// What TSC ticks were given as, in kHz; at least 1.
    pub(super) fn tsc_khz(&self) -> u64 {
        self.tsc_khz
    }

    pub(super) fn deadline(&self) -> Option<u64> {
        self.deadline
    }

    pub(super) fn initial_count(&self) -> u32 {
        self.initial_count
    }

    pub(super) fn divide(&self) -> u32 {
        self.divide
    }

    /// Encodings 0 to 6 divide by 2 to 128, 7 by 1.
    fn divisor(&self) -> u64 {
        let code = self.divide >> 1 & 4 | self.divide & 3;
        1 << ((code + 1) & 7)
    }

    /// TSC ticks in `count` counts of the divided clock.
    fn ticks(&self, count: u32) -> u64 {
        let hertz = u128::from(self.tsc_khz) * 1000;
        let counts = u128::from(count) * u128::from(self.divisor());
        (counts * hertz / u128::from(TIMER_FREQUENCY)) as u64
    }

    /// Software wrote the LVT entry: a change to or from TSC-deadline mode disarms.
    pub(super) fn mode_written(&mut self, old: u32, new: u32) {
        let (old, new) = (Mode::of(old), Mode::of(new));
        if old != new && (old == Mode::TscDeadline || new == Mode::TscDeadline) {
            self.deadline = None;
            self.initial_count = 0;
        }
    }

    pub(super) fn set_initial_count(&mut self, lvt: u32, count: u32, now: u64) {
        if Mode::of(lvt) == Mode::TscDeadline {
            return;
        }
        self.initial_count = count;
        self.deadline = (count != 0).then(|| now.saturating_add(self.ticks(count)));
    }

    /// Changes the divider; what is left of a running count goes on at the new speed.
    pub(super) fn set_divide(&mut self, lvt: u32, value: u32, now: u64) {
        let left = self.current_count(lvt, now);
        self.divide = value;
        if Mode::of(lvt) != Mode::TscDeadline && self.deadline.is_some() {
            self.deadline = Some(now.saturating_add(self.ticks(left)));
        }
    }

    pub(super) fn current_count(&self, lvt: u32, now: u64) -> u32 {
        let Some(deadline) = self.deadline else {
            return 0;
        };
        if Mode::of(lvt) == Mode::TscDeadline {
            return 0;
        }
        let left = u128::from(deadline.saturating_sub(now)) * u128::from(TIMER_FREQUENCY);
        let counts = left / (u128::from(self.tsc_khz) * 1000) / u128::from(self.divisor());
        counts.min(u128::from(self.initial_count)) as u32
    }

    pub(super) fn tsc_deadline(&self, lvt: u32) -> u64 {
        if Mode::of(lvt) == Mode::TscDeadline {
            self.deadline.unwrap_or(0)
        } else {
            0
        }
    }

    pub(super) fn set_tsc_deadline(&mut self, lvt: u32, deadline: u64) {
        if Mode::of(lvt) == Mode::TscDeadline {
            self.deadline = (deadline != 0).then_some(deadline);
        }
    }

    /// Whether the timer has expired by `now`. Rearms a periodic one, leaving out the
    /// periods that nobody was there to take.
    pub(super) fn expire(&mut self, lvt: u32, now: u64) -> bool {
        let Some(deadline) = self.deadline.filter(|deadline| *deadline <= now) else {
            return false;
        };
        self.deadline = None;
        if Mode::of(lvt) == Mode::Periodic {
            let period = self.ticks(self.initial_count).max(1);
            let missed = (now - deadline) / period;
            self.deadline = Some(deadline.saturating_add((missed + 1).saturating_mul(period)));
        }
        true
    }
}
