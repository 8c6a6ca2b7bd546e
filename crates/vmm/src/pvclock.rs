//! kvmclock: the MSRs by which a guest asks for KVM's paravirtual clock, and the two
//! structures in guest memory that answer (Linux: Documentation/virt/kvm/x86/msr.rst).
//!
//! The guest's TSC is the host's and runs at a constant rate, so a structure is written
//! once, when the guest asks, and stays true. All vCPUs are told the same, so that no
//! rounding takes one of them back behind another.

use std::time::Duration;

use strata_memory::{Bytes, GuestAddress, GuestMemory};

use crate::clock::{Clock, time_of_day};

const MSR_WALL_CLOCK: u32 = 0x11;
const MSR_SYSTEM_TIME: u32 = 0x12;
const MSR_WALL_CLOCK_NEW: u32 = 0x4b56_4d00;
const MSR_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;

/// System time MSR bit 0: the structure is wanted.
const ENABLE: u64 = 1;
/// `flags` bit 0: time does not go backwards between vCPUs.
const TSC_STABLE: u8 = 1;

/// One vCPU's clock MSRs.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PvClock {
    wall_clock: u64,
    system_time: u64,
}

impl PvClock {
    /// Whether `msr` is one of these.
    pub(crate) fn has(msr: u32) -> bool {
        matches!(
            msr,
            MSR_WALL_CLOCK | MSR_SYSTEM_TIME | MSR_WALL_CLOCK_NEW | MSR_SYSTEM_TIME_NEW
        )
    }

    /// `RDMSR`.
    pub(crate) fn read(&self, msr: u32) -> u64 {
        match msr {
            MSR_WALL_CLOCK | MSR_WALL_CLOCK_NEW => self.wall_clock,
            _ => self.system_time,
        }
    }

    /// `WRMSR`. `None` if the address in `value` is not memory.
    pub(crate) fn write(
        &mut self,
        msr: u32,
        value: u64,
        memory: &GuestMemory,
        clock: &Clock,
    ) -> Option<()> {
        match msr {
            MSR_WALL_CLOCK | MSR_WALL_CLOCK_NEW => {
                write(memory, value, &wall_clock(time_of_day(), clock.now()))?;
                self.wall_clock = value;
            }
            _ => {
                if value & ENABLE != 0 {
                    write(
                        memory,
                        value & !ENABLE,
                        &system_time(clock, clock.start_tsc),
                    )?;
                }
                self.system_time = value;
            }
        }
        Some(())
    }
}

/// Both structures begin with a version that is odd while the rest changes.
fn write(memory: &GuestMemory, address: u64, bytes: &[u8]) -> Option<()> {
    let address = GuestAddress(address);
    memory.ram().write_slice(bytes, address).ok()
}

/// `pvclock_wall_clock`: the time of day when the machine's time was 0.
fn wall_clock(time_of_day: Duration, machine_time: Duration) -> [u8; 12] {
    let boot = time_of_day.saturating_sub(machine_time);
    let mut bytes = [0; 12];
    bytes[0..4].copy_from_slice(&2_u32.to_le_bytes());
    bytes[4..8].copy_from_slice(&(boot.as_secs() as u32).to_le_bytes());
    bytes[8..12].copy_from_slice(&boot.subsec_nanos().to_le_bytes());
    bytes
}

/// `pvclock_vcpu_time_info`: how to make nanoseconds of a TSC value.
fn system_time(clock: &Clock, tsc: u64) -> [u8; 32] {
    let (multiplier, shift) = scale(clock.tsc_khz);
    let nanos = u64::try_from(clock.at(tsc).as_nanos()).unwrap_or(u64::MAX);
    let mut bytes = [0; 32];
    bytes[0..4].copy_from_slice(&2_u32.to_le_bytes());
    bytes[8..16].copy_from_slice(&tsc.to_le_bytes());
    bytes[16..24].copy_from_slice(&nanos.to_le_bytes());
    bytes[24..28].copy_from_slice(&multiplier.to_le_bytes());
    bytes[28] = shift as u8;
    bytes[29] = TSC_STABLE;
    bytes
}

/// A multiplier and shift such that ns = (ticks << shift) * multiplier >> 32, with the
/// multiplier in the upper half of its range for precision. A negative shift is to the
/// right.
fn scale(tsc_khz: u64) -> (u32, i8) {
    let hertz = u128::from(tsc_khz.max(1)) * 1000;
    let mut shift = 0_i8;
    // 1e9 / hertz as a fraction of 2^32, kept below 1.
    let fraction = |shift: i8| {
        let nanos = 1_000_000_000_u128 << 32;
        if shift >= 0 {
            (nanos >> shift) / hertz
        } else {
            (nanos << -shift) / hertz
        }
    };
    while fraction(shift) > u128::from(u32::MAX) {
        shift += 1;
    }
    while fraction(shift) < 1 << 31 && shift > -31 {
        shift -= 1;
    }
    (fraction(shift) as u32, shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Linux's `pvclock_scale_delta` does it.
    fn to_nanos(ticks: u64, (multiplier, shift): (u32, i8)) -> u64 {
        let ticks = if shift < 0 {
            ticks >> -shift
        } else {
            ticks << shift
        };
        ((u128::from(ticks) * u128::from(multiplier)) >> 32) as u64
    }

    #[test]
    fn an_hour_is_right_within_microseconds_at_every_frequency() {
        for khz in [
            500_000, 999_999, 1_000_000, 1_000_001, 2_400_000, 2_650_137, 5_700_000,
        ] {
            let nanos = to_nanos(khz * 1000 * 3600, scale(khz));
            let error = nanos.abs_diff(3_600_000_000_000);
            assert!(error < 2_000, "{khz} kHz: {error} ns");
        }
    }

    #[test]
    fn the_system_time_structure_is_laid_out_as_linux_reads_it() {
        let clock = Clock {
            tsc_khz: 2_000_000,
            start_tsc: 1000,
        };

        let bytes = system_time(&clock, 1000 + 2_000_000);

        assert_eq!(bytes[0..4], [2, 0, 0, 0]);
        assert_eq!(bytes[8..16], 2_001_000_u64.to_le_bytes());
        assert_eq!(bytes[16..24], 1_000_000_u64.to_le_bytes());
        assert_eq!(bytes[28] as i8, 0);
        assert_eq!(bytes[24..28], 0x8000_0000_u32.to_le_bytes());
        assert_eq!(bytes[29], 1);
    }

    #[test]
    fn the_wall_clock_is_the_time_at_which_the_machine_began() {
        let bytes = wall_clock(Duration::new(1_700_000_010, 500), Duration::from_secs(10));

        assert_eq!(bytes[4..8], 1_700_000_000_u32.to_le_bytes());
        assert_eq!(bytes[8..12], 500_u32.to_le_bytes());
    }

    #[test]
    fn an_address_outside_memory_is_refused_and_a_disabled_clock_is_not_written() {
        let memory = GuestMemory::new(0x2000).unwrap();
        let clock = Clock {
            tsc_khz: 1_000_000,
            start_tsc: 0,
        };
        let mut pvclock = PvClock::default();

        assert_eq!(
            pvclock.write(MSR_SYSTEM_TIME_NEW, 0x1ff1, &memory, &clock),
            None
        );
        assert_eq!(
            pvclock.write(MSR_WALL_CLOCK_NEW, 0x2000, &memory, &clock),
            None
        );
        assert_eq!(pvclock.read(MSR_SYSTEM_TIME_NEW), 0);
        assert_eq!(
            pvclock.write(MSR_SYSTEM_TIME_NEW, 0x1000, &memory, &clock),
            Some(())
        );
        assert_eq!(
            memory.ram().read_obj::<u32>(GuestAddress(0x1000)).unwrap(),
            0
        );
        assert_eq!(
            pvclock.write(MSR_SYSTEM_TIME_NEW, 0x1001, &memory, &clock),
            Some(())
        );
        assert_eq!(
            memory.ram().read_obj::<u32>(GuestAddress(0x1000)).unwrap(),
            2
        );
    }
}
