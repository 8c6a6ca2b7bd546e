//! What the guest is, and what it uses, as the kernel tells it in `/proc` (proc(5)).

use std::fs;
use std::time::Duration;

use rustix::system::uname;
use strata_protocol::{Information, Statistics};

/// Bytes of a sector in `/proc/diskstats`, whatever the disk's own are.
const SECTOR: u64 = 512;
/// What `/proc/stat` counts in: hundredths of a second on x86-64.
const TICK: Duration = Duration::from_millis(10);

/// What the guest is. This very request is among `open` connections.
pub(super) fn inform(open: u32) -> Information {
    let uptime = text("uptime");
    let uptime = uptime
        .split(' ')
        .next()
        .and_then(|seconds| seconds.parse().ok());
    Information {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel: uname().release().to_string_lossy().into_owned(),
        uptime: Duration::try_from_secs_f64(uptime.unwrap_or(0.0)).unwrap_or_default(),
        programs: open.saturating_sub(1),
    }
}

/// What the guest uses.
pub(super) fn measure() -> Statistics {
    let memory = text("meminfo");
    let load = text("loadavg");
    let (received, sent) = network(&text("net/dev"));
    let (read, written) = disks(&text("diskstats"));
    Statistics {
        memory_total: memory_line(&memory, "MemTotal:"),
        memory_available: memory_line(&memory, "MemAvailable:"),
        busy: busy(&text("stat")),
        load: load
            .split(' ')
            .next()
            .and_then(|load| load.parse::<f32>().ok())
            .map_or(0, |load| (load * 100.0) as u32),
        processes: fs::read_dir("/proc").map_or(0, |entries| {
            let names = entries.flatten().map(|entry| entry.file_name());
            names
                .filter(|name| name.as_encoded_bytes().iter().all(u8::is_ascii_digit))
                .count() as u32
        }),
        received,
        sent,
        read,
        written,
    }
}

fn text(name: &str) -> String {
    fs::read_to_string(format!("/proc/{name}")).unwrap_or_default()
}

/// A line of `/proc/meminfo` in bytes.
fn memory_line(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|line| line.split_ascii_whitespace().next());
    number
        .and_then(|number| number.parse::<u64>().ok())
        .unwrap_or(0)
        << 10
}

/// All but idle time and waiting for disks, of all processors.
fn busy(stat: &str) -> Duration {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "));
    let ticks: u64 = line
        .unwrap_or_default()
        .split_ascii_whitespace()
        // user, nice, system, idle, iowait, irq, softirq, steal; guests' are in the user's.
        .take(8)
        .enumerate()
        .filter(|(at, _)| !matches!(at, 3 | 4))
        .filter_map(|(_, number)| number.parse::<u64>().ok())
        .sum();
    TICK * u32::try_from(ticks).unwrap_or(u32::MAX)
}

/// Bytes received and sent by all cards but the loopback.
fn network(dev: &str) -> (u64, u64) {
    let mut sums = (0, 0);
    for line in dev.lines() {
        let Some((name, numbers)) = line.split_once(':') else {
            continue;
        };
        if name.trim() == "lo" {
            continue;
        }
        let number = |at: usize| {
            let word = numbers.split_ascii_whitespace().nth(at);
            word.and_then(|word| word.parse::<u64>().ok()).unwrap_or(0)
        };
        sums = (sums.0 + number(0), sums.1 + number(8));
    }
    sums
}

/// Bytes read from and written to all disks; their partitions are counted with them.
fn disks(diskstats: &str) -> (u64, u64) {
    let mut sums = (0, 0);
    for line in diskstats.lines() {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let Some(name) = words.get(2) else { continue };
        let is_whole =
            name.starts_with("vd") && !name.ends_with(|last: char| last.is_ascii_digit());
        if !is_whole {
            continue;
        }
        let number = |at: usize| {
            let word: Option<&&str> = words.get(at);
            word.and_then(|word| word.parse::<u64>().ok()).unwrap_or(0)
        };
        sums = (sums.0 + number(5) * SECTOR, sums.1 + number(9) * SECTOR);
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_tables_are_read() {
        let stat = "cpu  10 20 30 4000 500 6 7 8 90 10\ncpu0 1 1\n";
        assert_eq!(busy(stat), Duration::from_millis(810));
        let dev = "Inter-| Receive\n face |bytes\n    lo: 9 9 0 0 0 0 0 0 9 9\n  eth0: 100 2 0 0 0 0 0 0 30 4 0\n";
        assert_eq!(network(dev), (100, 30));
        let disk = " 254 0 vda 1 2 3 4 5 6 7 8 9\n 254 1 vda1 1 2 3 4 5 6 7 8 9\n 7 0 loop0 1 2 3 4 5 6 7\n";
        assert_eq!(disks(disk), (3 * 512, 7 * 512));
        assert_eq!(memory_line("MemTotal:      12 kB\n", "MemTotal:"), 12 << 10);
    }

    #[test]
    fn this_very_machine_is_measured() {
        let statistics = measure();
        assert!(statistics.memory_total >= statistics.memory_available);
        assert!(statistics.memory_available > 0 && statistics.processes > 0);
        assert!(inform(1).uptime > Duration::ZERO);
    }
}
