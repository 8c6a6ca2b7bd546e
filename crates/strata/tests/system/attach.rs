//! `strata attach`: input, output, signals and terminals of commands in the background.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdout, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::pty::{COLUMNS, ROWS, Session};
use crate::user::{LIMIT, User};

const DETACH: &str = "\x01d";

#[test]
fn who_attaches_sees_what_comes_passes_signals_and_gets_the_status() {
    let user = User::new();
    let line = "echo before; trap 'echo caught; exit 6' INT; \
        while :; do [ -e /tmp/go ] && { rm /tmp/go; echo after; }; sleep 0.1; done";
    let name = user.start(&[], line);
    user.wait_for_log(&name, "before\n");
    let mut command = user.command(&["attach", &name]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut shown = BufReader::new(child.stdout.take().unwrap());
    let mut next = || {
        let mut line = String::new();
        shown.read_line(&mut line).unwrap();
        line
    };
    // It may not have begun to look yet: then it sees the next one.
    let asking = AtomicBool::new(true);
    thread::scope(|scope| {
        scope.spawn(|| {
            while asking.load(Ordering::Relaxed) {
                user.exec(&name, "touch /tmp/go");
                thread::sleep(Duration::from_millis(200));
            }
        });
        assert_eq!(next(), "after\n");
        asking.store(false, Ordering::Relaxed);
    });
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let mut last = next();
    while last == "after\n" {
        last = next();
    }
    assert_eq!(last, "caught\n");
    assert_eq!(child.wait().unwrap().code(), Some(6));
    let ended = user.strata(&["attach", &name]).expect(1);
    assert!(ended.stderr.contains("is not running"), "{}", ended.stderr);
}

/// Attaches with pipes instead of a terminal.
fn attached(user: &User, options: &[&str], name: &str) -> (Child, BufReader<ChildStdout>) {
    let mut command = user.command(&[&["attach"], options, &[name]].concat());
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let shown = BufReader::new(child.stdout.take().unwrap());
    (child, shown)
}

fn next_line(shown: &mut impl BufRead) -> String {
    let mut line = String::new();
    shown.read_line(&mut line).unwrap();
    line
}

#[test]
fn a_command_in_the_background_takes_input_from_those_who_attach() {
    let user = User::new();
    let line = "while read line; do echo \"<$line>\"; done; echo end; exit 5";
    let name = user.start(&["-i"], line);
    let (mut first, mut shown) = attached(&user, &[], &name);
    let mut keyboard = first.stdin.take().unwrap();
    keyboard.write_all(b"one\n").unwrap();
    assert_eq!(next_line(&mut shown), "<one>\n");

    // Two at once, each of whom sees what both have typed.
    let (mut second, mut shown_too) = attached(&user, &["--end-input"], &name);
    let mut keyboard_too = second.stdin.take().unwrap();
    keyboard_too.write_all(b"two\n").unwrap();
    assert_eq!(next_line(&mut shown_too), "<two>\n");
    assert_eq!(next_line(&mut shown), "<two>\n");

    // The end of the one's input is that one's alone.
    drop(keyboard);
    keyboard_too.write_all(b"three\n").unwrap();
    assert_eq!(next_line(&mut shown_too), "<three>\n");
    assert_eq!(next_line(&mut shown), "<three>\n");

    // Ctrl-\ is how one leaves.
    kill_process(Pid::from_child(&first), Signal::QUIT).unwrap();
    assert_eq!(first.wait().unwrap().code(), Some(0));
    let (mut third, mut shown) = attached(&user, &["--no-input"], &name);
    let is_there = AtomicBool::new(false);
    thread::scope(|scope| {
        let keyboard = &mut keyboard_too;
        let is_there = &is_there;
        scope.spawn(move || {
            while !is_there.load(Ordering::Relaxed) {
                keyboard.write_all(b"again\n").unwrap();
                thread::sleep(Duration::from_millis(100));
            }
        });
        assert_eq!(next_line(&mut shown), "<again>\n");
        is_there.store(true, Ordering::Relaxed);
    });

    // The end of the other's is the command's, whoever else is attached.
    drop(keyboard_too);
    for shown in [&mut shown, &mut shown_too] {
        let mut rest = String::new();
        shown.read_to_string(&mut rest).unwrap();
        assert!(rest.ends_with("end\n"), "{rest}");
    }
    assert_eq!(second.wait().unwrap().code(), Some(5));
    assert_eq!(third.wait().unwrap().code(), Some(5));
}

#[test]
fn who_attaches_late_learns_how_it_ended() {
    let user = User::new();
    let name = user.start(&[], "echo hi; exit 7");
    // It is being booted still, and will not be there for long.
    let ended = user.strata(&["attach", &name]).expect(7);
    assert_eq!(ended.text(), "hi\n");
}

#[test]
fn signals_do_not_wait_behind_input_that_nobody_reads() {
    let user = User::new();
    let line = "echo up; head -c 1 >/dev/null; echo fed; exec sleep 1000";
    let name = user.start(&["-i"], line);
    user.wait_for_log(&name, "up\n");
    let endless = || File::open("/dev/zero").unwrap();

    let mut exec = user.command(&[
        "exec",
        "-i",
        &name,
        "sh",
        "-c",
        "echo up >&2; exec sleep 1000",
    ]);
    let exec = exec.stdin(endless()).stderr(Stdio::piped());
    let mut child = exec.spawn().unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap());
    assert_eq!(next_line(&mut said), "up\n");
    // Until all that can be on its way is.
    thread::sleep(Duration::from_secs(1));
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(128 + 2));

    let mut attach = user.command(&["attach", &name]);
    let attach = attach.stdin(endless()).stdout(Stdio::piped());
    let mut child = attach.spawn().unwrap();
    let mut shown = BufReader::new(child.stdout.take().unwrap());
    assert_eq!(next_line(&mut shown), "fed\n");
    thread::sleep(Duration::from_secs(1));
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(128 + 15));
}

#[test]
fn signals_do_not_wait_behind_output_that_nobody_reads() {
    let user = User::new();
    let name = user.start(&[], "sleep 1000");
    let mut exec = user.command(&["exec", &name, "sh", "-c", "echo up >&2; exec yes"]);
    let exec = exec.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = exec.spawn().unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap());
    assert_eq!(next_line(&mut said), "up\n");
    let full = child.stdout.take().unwrap();
    thread::sleep(Duration::from_secs(1));
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    // It is dead, and what it wrote still waits for us.
    let is_dead = "sed 's/.*) //' /proc/$(pidof yes)/stat | grep ^Z";
    let end = Instant::now() + LIMIT;
    while user.exec(&name, is_dead).status != Some(0) {
        assert!(Instant::now() < end, "the signal did not arrive");
        thread::sleep(Duration::from_millis(100));
    }
    drop(full);
    child.wait().unwrap();
}

#[test]
fn much_input_arrives_whole() {
    let user = User::new();
    let name = user.start(&["-i"], "sha256sum");
    let input: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let ended = user.feed(&["attach", "--end-input", &name], &input);
    let host = {
        let mut sum = std::process::Command::new("sha256sum");
        let mut child = sum
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(&input).unwrap();
        drop(stdin);
        let mut text = String::new();
        child
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        child.wait().unwrap();
        text
    };
    assert_eq!(ended.expect(0).text(), host);
}

#[test]
fn a_command_in_the_background_has_a_terminal_that_follows_ours() {
    let user = User::new();
    let words = [
        "run",
        "-dt",
        "--accel",
        "soft",
        "--timeout",
        "300s",
        "--name",
        "term",
    ];
    user.strata(&words).expect(0);
    let mut session = Session::start_beside(user.command(&["attach", "term"]));
    session.wait_until_raw();
    session.type_keys("echo \"<$(stty size) $(tty) $TERM>\"\r");
    session.wait_for(&format!("<{ROWS} {COLUMNS} /dev/pts/0 xterm>"));
    session.resize(44, 90);
    session
        .type_keys("until [ \"$(stty size)\" = '44 90' ]; do sleep 0.1; done; echo so\"\"it is\r");
    session.wait_for("soit is");
    // What is typed just before the keys that detach is typed.
    session.type_keys(&format!("kept=yes\r{DETACH}"));
    session.wait_for("detached");
    assert_eq!(session.end(), 0);

    // The shell is the same as before, and the keys for signals are its own.
    let mut session = Session::start_beside(user.command(&["attach", "term"]));
    session.wait_until_raw();
    session.type_keys("sh -c 'echo begun; exec sleep 1000'\r");
    session.wait_for("begun\r\n");
    session.type_keys("\x03");
    session.type_keys("echo \"<$kept>\"; exit 6\r");
    session.wait_for("<yes>");
    assert_eq!(session.end(), 6);
    let ended = user.machine("term");
    assert_eq!(ended["status"], 6);
}

#[test]
fn those_who_attach_see_what_has_no_command() {
    let user = User::new();
    user.strata(&["run", "-d", "--accel", "soft", "--name", "idle"])
        .expect(0);
    let (mut child, mut shown) = attached(&user, &[], "idle");
    user.exec(
        "idle",
        "while :; do echo on the console >/dev/ttyS0; sleep 0.2; done & sleep 3",
    );
    assert!(next_line(&mut shown).contains("on the console"));
    user.strata(&["stop", "idle"]).expect(0);
    child.wait().unwrap();
}
