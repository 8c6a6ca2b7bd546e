//! A command in the guest: its streams and its status are ours.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Stdio};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::guest::{Slot, guest, guest_with, run, shell};

/// Bytes that no text has, and that repeat late.
fn noise(size: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    (0..size)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

#[test]
fn uname_is_the_guests_and_nothing_else_is_on_stdout() {
    let ended = guest(&["uname", "-srm"]).expect(0);
    let text = ended.text();
    let words: Vec<&str> = text.split_ascii_whitespace().collect();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(words[1].ends_with("-cloud-amd64"), "{text}");
    assert_eq!((words[0], words[2]), ("Linux", "x86_64"));
    assert_eq!(ended.stderr, "");
}

#[test]
fn the_exit_status_is_the_commands() {
    guest(&["true"]).expect(0);
    guest(&["false"]).expect(1);
    shell("exit 77").expect(77);
}

#[test]
fn a_command_that_a_signal_ends_has_the_shells_status() {
    shell("kill -SEGV $$").expect(128 + 11);
}

/// Starts a line of shell in the guest that says `up` when it listens; gives what is shown from then
/// on.
fn listening(line: &str) -> (Child, BufReader<ChildStdout>) {
    let mut command = run(&[] as &[&str]);
    command.args(["--", "sh", "-c", line]).stdin(Stdio::null());
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut shown = BufReader::new(child.stdout.take().unwrap());
    let mut first = String::new();
    shown.read_line(&mut first).unwrap();
    assert_eq!(first, "up\n");
    (child, shown)
}

#[test]
fn signals_reach_the_command_as_if_it_ran_here() {
    let _slot = Slot::take();
    let line = "for s in HUP INT QUIT TERM USR1 USR2; do trap \"echo $s\" $s; done; echo up; \
        i=0; while [ $i -lt 600 ]; do sleep 0.1; i=$((i + 1)); done";
    let (mut child, mut shown) = listening(line);
    for (signal, name) in [
        (Signal::HUP, "HUP"),
        (Signal::USR1, "USR1"),
        (Signal::USR2, "USR2"),
        (Signal::TERM, "TERM"),
    ] {
        kill_process(Pid::from_child(&child), signal).unwrap();
        let mut line = String::new();
        shown.read_line(&mut line).unwrap();
        assert_eq!(line.trim_end(), name);
    }
    // It does not end by any, so one more, soon, ends the machine.
    let status = loop {
        kill_process(Pid::from_child(&child), Signal::INT).unwrap();
        thread::sleep(Duration::from_millis(200));
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
    };
    assert_eq!(status.code(), Some(128 + 2));
}

#[test]
fn a_signal_that_ends_the_command_ends_the_run_with_its_status() {
    let _slot = Slot::take();
    let (mut child, _shown) = listening("echo up; exec sleep 1000");
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(128 + 2));
    // As on a terminal the whole group hears of it, such as a shell's child, for which it waits.
    let (mut child, mut shown) = listening(
        "trap 'echo shell' INT; sh -c 'trap \"echo child; exit\" INT; echo up; while :; do sleep 0.1; done'",
    );
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let mut heard = String::new();
    shown.read_to_string(&mut heard).unwrap();
    assert_eq!(heard, "child\nshell\n");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let (mut child, _shown) = listening("trap 'exit 4' TERM; echo up; while :; do sleep 0.1; done");
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(4));
}

#[test]
fn a_signal_before_the_command_runs_ends_the_machine() {
    let _slot = Slot::take();
    let mut command = run(&["--verbose"]);
    command.args(["--", "sleep", "1000"]).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut boot = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("Linux version") {
        line.clear();
        assert!(boot.read_line(&mut line).unwrap() > 0, "it did not boot");
    }
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let rest = thread::spawn(move || std::io::copy(&mut boot, &mut std::io::sink()));
    assert_eq!(child.wait().unwrap().code(), Some(128 + 15));
    rest.join().unwrap().unwrap();
}

#[test]
fn a_command_that_does_not_exist_is_127() {
    let ended = guest(&["no-such-command"]).expect(127);
    assert!(ended.stderr.contains("no-such-command"), "{}", ended.stderr);
}

#[test]
fn stdout_and_stderr_arrive_apart() {
    let ended = shell("echo out; echo err >&2; echo more").expect(0);
    assert_eq!(ended.text(), "out\nmore\n");
    assert_eq!(ended.stderr, "err\n");
}

#[test]
fn binary_input_comes_back_unchanged() {
    let input = noise((1 << 20) + 13);
    let ended = guest_with(&[] as &[&str], &["cat"], &input).expect(0);
    assert_eq!(ended.stdout.len(), input.len());
    assert!(ended.stdout == input, "the bytes differ");
}

#[test]
fn the_end_of_input_is_the_commands() {
    let ended = guest_with(&[] as &[&str], &["wc", "-c"], &noise(100_000)).expect(0);
    assert_eq!(ended.text().trim(), "100000");
    guest(&["cat"]).expect(0);
}

#[test]
fn arguments_arrive_unchanged() {
    let ended = guest(&[
        "printf", "%s|", "a b", "'", "$HOME", "\\", "", "*", "\u{e9}\n",
    ])
    .expect(0);
    assert_eq!(ended.text(), "a b|'|$HOME|\\||*|\u{e9}\n|");
}

#[test]
fn memory_is_as_much_as_asked_for() {
    let total = |size: &str| -> u64 {
        let ended = guest_with(&["--memory", size], &["cat", "/proc/meminfo"], b"").expect(0);
        let text = ended.text();
        let line = text.lines().find(|l| l.starts_with("MemTotal")).unwrap();
        line.split_ascii_whitespace()
            .nth(1)
            .unwrap()
            .parse()
            .unwrap()
    };
    let (small, large) = (total("256M"), total("5G"));
    assert!((180 << 10..256 << 10).contains(&small), "{small} KiB");
    // some of it lies above 4 GiB
    assert!((4700 << 10..5 << 20).contains(&large), "{large} KiB");
}

#[test]
fn time_passes_and_the_date_is_the_hosts() {
    let before = unix_time();
    let ended = shell("date +%s; sleep 1; date +%s").expect(0);
    let after = unix_time();
    let times: Vec<u64> = ended.text().lines().map(|l| l.parse().unwrap()).collect();
    assert!(times[0] < times[1], "{times:?}");
    // the real-time clock has whole seconds
    assert!(
        before <= times[0] + 2 && times[1] <= after + 2,
        "{before} {times:?} {after}"
    );
}

fn unix_time() -> u64 {
    std::time::UNIX_EPOCH.elapsed().unwrap().as_secs()
}
