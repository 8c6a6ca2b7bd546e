//! Every way in which a machine ends, and the status that tells of it (docs/run.md).

use crate::guest::{feed, guest, guest_with, run, shell};

const TIMEOUT: i32 = 124;
const NOT_STARTED: i32 = 125;
const KERNEL_PANIC: i32 = 240;

#[test]
fn power_off_ends_a_run_with_0() {
    guest(&["poweroff"]).expect(0);
    shell("poweroff -f").expect(0);
}

#[test]
fn a_reboot_ends_a_run_with_0() {
    guest(&["reboot"]).expect(0);
    shell("reboot -f").expect(0);
}

#[test]
fn a_kernel_panic_has_its_own_status_and_shows_why() {
    let ended = shell("echo c >/proc/sysrq-trigger").expect(KERNEL_PANIC);
    assert!(ended.stderr.contains("sysrq"), "{}", ended.stderr);
    assert_eq!(ended.text(), "");
}

#[test]
fn a_panic_without_a_driver_for_it_is_recognised_on_the_console() {
    // no init: the kernel panics before any module is loaded
    let mut command = run(&["--append", "rdinit=/nowhere init=/nowhere"]);
    command.args(["--", "true"]);
    let ended = feed(command, b"").expect(KERNEL_PANIC);
    assert!(ended.stderr.contains("Kernel panic"), "{}", ended.stderr);
}

#[test]
fn a_timeout_stops_a_guest_that_sleeps_and_one_that_spins() {
    guest_with(&["--timeout", "20s"], &["sleep", "100000"], b"").expect(TIMEOUT);
    guest_with(
        &["--timeout", "20s"],
        &["sh", "-c", "while :; do :; done"],
        b"",
    )
    .expect(TIMEOUT);
}

#[test]
fn what_is_wrong_with_a_kernel_is_said_with_its_name() {
    let directory = tempfile::tempdir().unwrap();
    let text = directory.path().join("not-a-kernel");
    std::fs::write(&text, "no kernel ".repeat(10_000)).unwrap();
    for path in ["/no/such/kernel", text.to_str().unwrap()] {
        let ended = feed(run(&["--kernel", path]), b"").expect(NOT_STARTED);
        assert!(ended.stderr.contains(path), "{}", ended.stderr);
    }
}

#[test]
fn too_little_memory_is_refused_before_the_boot() {
    let ended = guest_with(&["--memory", "8M"], &["true"], b"").expect(NOT_STARTED);
    assert!(ended.stderr.contains("memory"), "{}", ended.stderr);
}
