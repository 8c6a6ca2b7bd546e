//! The machine's time: the host's TSC, which is also the guest's, and how fast it runs.

// One host instruction has no safe form.
#![allow(unsafe_code)]

use std::arch::x86_64::{__cpuid, __cpuid_count, _rdtsc};
use std::num::NonZeroU64;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The timing leaf of KVM and others: EAX is the TSC frequency in kHz.
const CPUID_HYPERVISOR_TIMING: u32 = 0x4000_0010;
/// How long a measurement takes at least.
const MEASURING_TIME: Duration = Duration::from_millis(10);

/// The host's TSC now. The guest's has the same value.
pub(crate) fn tsc() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 CPU and has no operands.
    unsafe { _rdtsc() }
}

/// Lets the calling thread wake from timed waits when they are due, not up to 50 µs later
/// as is the host's default.
pub(crate) fn wake_on_time() {
    // A host that refuses makes the guest's timers late and nothing worse.
    let _ = rustix::thread::set_current_timer_slack(Some(NonZeroU64::MIN));
}

/// The time since the Unix epoch.
pub(crate) fn time_of_day() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

/// A machine's clock, which begins when the machine does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    /// Frequency of the TSC in kHz.
    pub(crate) tsc_khz: u64,
    /// The TSC at the machine's time 0.
    pub(crate) start_tsc: u64,
}

impl Clock {
    /// Nanoseconds of the machine's time at `tsc`.
    pub(crate) fn at(&self, tsc: u64) -> Duration {
        self.duration(tsc.saturating_sub(self.start_tsc))
    }

    /// How long `ticks` of the TSC take.
    pub(crate) fn duration(&self, ticks: u64) -> Duration {
        let nanos = u128::from(ticks) * 1_000_000 / u128::from(self.tsc_khz);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// The machine's time now.
    pub(crate) fn now(&self) -> Duration {
        self.at(tsc())
    }
}

/// Measures the TSC against the host's monotonic clock between its making and
/// [`Calibration::finish`], in case the host's CPUID does not tell the frequency.
#[derive(Debug)]
pub(crate) struct Calibration {
    start: Sample,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    tsc: u64,
    time: Instant,
}

impl Sample {
    /// The tightest of a few readings, so that being interrupted between the two clocks
    /// does not count.
    fn take() -> Self {
        let reading = |_| {
            let before = tsc();
            let time = Instant::now();
            let after = tsc();
            (
                after.wrapping_sub(before),
                Self {
                    tsc: before + (after - before) / 2,
                    time,
                },
            )
        };
        let best = (0..8).map(reading).min_by_key(|(width, _)| *width);
        best.map_or_else(
            || Self {
                tsc: tsc(),
                time: Instant::now(),
            },
            |(_, sample)| sample,
        )
    }
}

impl Calibration {
    /// Begins to measure.
    pub(crate) fn start() -> Self {
        Self {
            start: Sample::take(),
        }
    }

    /// The TSC's frequency in kHz.
    pub(crate) fn finish(self) -> u64 {
        if let Some(khz) = frequency_from_cpuid() {
            return khz;
        }
        sleep(MEASURING_TIME.saturating_sub(self.start.time.elapsed()));
        let end = Sample::take();
        let nanos = (end.time - self.start.time).as_nanos().max(1);
        let ticks = u128::from(end.tsc.saturating_sub(self.start.tsc));
        ((ticks * 1_000_000 + nanos / 2) / nanos).max(1) as u64
    }
}

/// What the CPU (Intel SDM vol. 2A, CPUID leaves 15H and 16H) or the hypervisor says.
fn frequency_from_cpuid() -> Option<u64> {
    let basic = __cpuid(0);
    let hypervisor_present = __cpuid(1).ecx & 1 << 31 != 0;
    if hypervisor_present && __cpuid(0x4000_0000).eax >= CPUID_HYPERVISOR_TIMING {
        let khz = __cpuid(CPUID_HYPERVISOR_TIMING).eax;
        if khz != 0 {
            return Some(khz.into());
        }
    }
    // Hypervisors pass leaf 15H through although they may scale the TSC.
    if basic.eax < 0x15 || hypervisor_present {
        return None;
    }
    let ratio = __cpuid_count(0x15, 0);
    if ratio.eax == 0 || ratio.ebx == 0 || ratio.ecx == 0 {
        return None;
    }
    Some(u64::from(ratio.ecx) * u64::from(ratio.ebx) / u64::from(ratio.eax) / 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calibrated_tsc_agrees_with_the_hosts_clock() {
        let tsc_khz = Calibration::start().finish();
        let clock = Clock {
            tsc_khz,
            start_tsc: tsc(),
        };
        let start = Instant::now();
        sleep(Duration::from_millis(20));

        let (by_tsc, by_host) = (clock.now().as_secs_f64(), start.elapsed().as_secs_f64());

        assert!(
            (by_tsc / by_host - 1.0).abs() < 0.05,
            "{by_tsc} against {by_host}"
        );
    }

    #[test]
    fn ticks_convert_to_time_at_the_frequency() {
        let clock = Clock {
            tsc_khz: 2_500_000,
            start_tsc: 1000,
        };

        assert_eq!(clock.at(1000 + 2_500_000_000), Duration::from_secs(1));
        assert_eq!(clock.at(0), Duration::ZERO);
        assert_eq!(clock.duration(u64::MAX).as_secs(), 7_378_697_629);
    }
}
