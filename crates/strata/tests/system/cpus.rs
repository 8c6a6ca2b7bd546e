//! Guests with several vCPUs.

use crate::guest::guest_with;
use crate::programs::same_on_cpus;

const KERNEL_PANIC: i32 = 240;

fn shell_on(cpus: u8, line: &str) -> crate::guest::Ended {
    guest_with(&["--cpus", &cpus.to_string()], &["sh", "-c", line], b"")
}

#[test]
fn a_guest_has_as_many_processors_as_were_asked_for() {
    for cpus in [2, 16] {
        let ended = shell_on(cpus, "nproc; cat /sys/devices/system/cpu/online").expect(0);
        assert_eq!(ended.text(), format!("{cpus}\n0-{}\n", cpus - 1));
    }
}

#[test]
fn every_processor_is_a_core_of_one_socket() {
    let line = "cd /sys/devices/system/cpu; \
                cat cpu[0-3]/topology/core_id cpu[0-3]/topology/physical_package_id; \
                cat cpu0/topology/core_siblings_list cpu3/topology/thread_siblings_list";
    let ended = shell_on(4, line).expect(0);
    assert_eq!(
        ended.text().split_whitespace().collect::<Vec<_>>(),
        ["0", "1", "2", "3", "0", "0", "0", "0", "0-3", "3"]
    );
}

#[test]
fn any_processor_can_end_the_machine() {
    shell_on(3, "taskset 4 poweroff -f").expect(0);
    shell_on(3, "taskset 2 reboot -f").expect(0);
    let panic = shell_on(3, "taskset 4 sh -c 'echo c >/proc/sysrq-trigger'");
    assert!(panic.expect(KERNEL_PANIC).stderr.contains("sysrq"));
}

#[test]
fn processors_go_offline_and_come_back() {
    let line = "cd /sys/devices/system/cpu; for i in 1 2 3; do \
                echo 0 >cpu1/online; nproc; echo 1 >cpu1/online; nproc; done; \
                taskset 2 cat cpu1/online";
    assert_eq!(shell_on(2, line).expect(0).text(), "1\n2\n1\n2\n1\n2\n1\n");
}

#[test]
fn an_nmi_reaches_every_processor() {
    // the kernel prints every CPU's registers, which it asks for by NMI
    let line = "echo l >/proc/sysrq-trigger; dmesg | grep -c 'NMI backtrace for cpu'";
    assert_eq!(shell_on(4, line).expect(0).text(), "4\n");
}

#[test]
fn the_memory_order_is_that_of_x86_tso() {
    same_on_cpus(2, "litmus", &[]);
}

#[test]
fn atomic_instructions_of_every_width_lose_nothing() {
    same_on_cpus(2, "atomics", &[]);
}

#[test]
fn code_and_pages_that_change_under_another_processor_are_seen_changed() {
    same_on_cpus(2, "cross", &[]);
}

#[test]
fn clocks_do_not_go_backwards_between_processors() {
    same_on_cpus(2, "clocks", &[]);
}

#[test]
fn processes_threads_and_pipes_hold_on_several_processors() {
    same_on_cpus(3, "processes", &[]);
}
