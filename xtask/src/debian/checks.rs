//! What is checked: lines of shell, each with a name and the time that it may take. All of
//! them succeed on the host. They run in this order in one login shell, as root.

use std::time::Duration;

use super::disk::PROGRAM;

/// One check.
#[derive(Debug)]
pub(super) struct Check {
    pub(super) name: String,
    /// Ends with status 0 where all is well.
    pub(super) command: String,
    /// After which it counts as hung.
    pub(super) limit: Duration,
}

/// Python's own tests of what an interpreter asks of a processor and a kernel.
const PYTHON: [&str; 6] = [
    "test_math",
    "test_struct",
    "test_threading",
    "test_signal",
    "test_zlib",
    "test_hashlib",
];

/// Stressors that verify what they compute; some with options of their own.
const STRESSORS: [&str; 13] = [
    "cpu", "matrix", "fp", "atomic", "futex", "mmap", "vm", "signal", "sigsegv", "switch", "fork",
    "pthread", "sem",
];

const PERF: [&str; 4] = [
    "sched messaging --group 2 --nr_loops 10",
    "sched pipe --loop 2000",
    "mem memcpy --nr_loops 10",
    "mem memset --nr_loops 10",
];

/// What the kernel says when something is wrong with it, or with its processor.
const COMPLAINTS: &str = "BUG:|WARNING:|Oops|rcu.*stall|soft lockup|blocked for more than|\
     fault, probably|unstable|I/O error|EXT4-fs error";

/// What the C++ program prints.
const ANSWER: &str = "caught: map::at; words 4; sum 7.48547086055; threads 400000";

/// The checks that have `part` in their names; all without it.
pub(super) fn chosen(part: Option<&str>) -> Vec<Check> {
    let mut checks = all();
    checks.retain(|check| part.is_none_or(|part| check.name.contains(part)));
    checks
}

fn all() -> Vec<Check> {
    let minute = Duration::from_mins(1);
    let check = |name: &str, command: String, limit| Check {
        name: name.to_owned(),
        command,
        limit,
    };
    let mut checks = vec![
        check(
            "systemd is up, and no unit has failed",
            "systemctl is-system-running --wait || { systemctl --failed; false; }".to_owned(),
            minute,
        ),
        check(
            "apt-get --simulate install hello",
            "apt-get --simulate install hello".to_owned(),
            minute,
        ),
    ];
    for test in PYTHON {
        let command = format!("python3 -m test {test}");
        checks.push(check(&command, command.clone(), 5 * minute));
    }
    checks.push(check(
        "g++ compiles a program that runs",
        format!(
            "g++ -O2 -pthread -o /tmp/program {PROGRAM} && /tmp/program | tee /dev/stderr | \
             grep -qxF '{ANSWER}'"
        ),
        3 * minute,
    ));
    for stressor in STRESSORS {
        // as many workers as processors; one that is left out has verified nothing
        let command = format!(
            "stress-ng --verify --{stressor} 0 --vm-bytes 64M --timeout 5 >/tmp/said 2>&1 && \
             ! grep -q skipped /tmp/said || {{ cat /tmp/said; false; }}"
        );
        checks.push(check(
            &format!("stress-ng --verify --{stressor}"),
            command,
            2 * minute,
        ));
    }
    for bench in PERF {
        let command = format!("perf bench {bench}");
        checks.push(check(&command, command.clone(), 2 * minute));
    }
    checks.push(check(
        "the kernel has nothing to complain of",
        format!("! dmesg | grep -E '{COMPLAINTS}'"),
        minute,
    ));
    checks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_fits_into_what_a_terminal_takes() {
        // N_TTY_BUF_SIZE of Linux
        assert!(all().iter().all(|check| check.command.len() < 4000));
    }

    #[test]
    fn checks_are_chosen_by_part_of_their_names() {
        let chosen = chosen(Some("futex"));
        assert_eq!(chosen.len(), 1);
        assert!(chosen[0].command.contains("--futex 0"));
    }
}
