//! Machines in the background: started, looked into, stopped, found again after a kill.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use strata_protocol::{AGENT_PORT, Greeting, Reply, Request};

use crate::pty::Session;
use crate::user::{LIMIT, User};

#[test]
fn a_machine_lives_in_the_background_until_it_is_removed() {
    let user = User::new();
    let name = user.start(
        &["--name", "web"],
        "echo out; echo err >&2; exec sleep 1000",
    );
    assert_eq!(name, "web");

    let listed = user.strata(&["ps"]).expect(0).text();
    assert!(
        listed
            .lines()
            .any(|line| line.starts_with("web ") && line.contains("up ")),
        "{listed}"
    );
    user.wait_for_log("web", "out\n");
    let log = user.strata(&["logs", "web"]).expect(0);
    assert_eq!(
        (log.text().as_str(), log.stderr.as_str()),
        ("out\n", "err\n")
    );

    let taken = user
        .strata(&["run", "-d", "--name", "web", "--", "true"])
        .expect(1);
    assert!(
        taken.stderr.contains("named 'web' already"),
        "{}",
        taken.stderr
    );
    let running = user.strata(&["rm", "web"]).expect(1);
    assert!(
        running.stderr.contains("strata stop web"),
        "{}",
        running.stderr
    );
    user.strata(&["start", "web"]).expect(1);

    user.strata(&["stop", "web"]).expect(0);
    let ended = user.machine("web");
    assert_eq!(
        (&ended["state"], &ended["status"]),
        (&"exited".into(), &143.into())
    );
    assert_eq!(user.strata(&["ps", "-q"]).expect(0).text(), "");
    let gone = user.strata(&["exec", "web", "true"]).expect(1);
    assert!(gone.stderr.contains("strata start web"), "{}", gone.stderr);

    user.strata(&["start", "web"]).expect(0);
    assert_eq!(user.state("web"), "running");
    user.exec("web", "exit 9").expect(9);
    user.strata(&["rm", "-f", "web"]).expect(0);
    assert!(user.machines().is_empty());
    let missing = user.strata(&["logs", "web"]).expect(1);
    assert!(
        missing.stderr.contains("strata ps -a"),
        "{}",
        missing.stderr
    );
}

#[test]
fn the_status_of_a_command_in_the_background_is_kept() {
    let user = User::new();
    let name = user.start(&[], "echo last words; exit 7");
    user.strata(&["wait", &name]).expect(7);
    let ended = user.machine(&name);
    assert_eq!(
        (&ended["status"], &ended["reason"]),
        (&7.into(), &"exited".into())
    );
    assert_eq!(
        user.strata(&["logs", "-f", &name]).expect(0).text(),
        "last words\n"
    );
}

#[test]
fn a_killed_machine_is_known_to_be_lost() {
    let user = User::new();
    let name = user.start(&[], "sleep 1000");
    let pid = user.machine(&name)["pid"].as_i64().unwrap();
    kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL).unwrap();
    let end = Instant::now() + LIMIT;
    while user.state(&name) == "running" {
        assert!(Instant::now() < end, "still running");
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(user.state(&name), "lost");
    // and is as good as one that ended
    user.strata(&["start", &name]).expect(0);
    assert_eq!(user.state(&name), "running");
}

#[test]
fn a_machine_that_does_nothing_any_more_can_be_stopped() {
    let user = User::new();
    let name = user.start(&[], "sleep 1000");
    user.exec(&name, "true").expect(0);
    let pid = user.machine(&name)["pid"].as_i64().unwrap();
    kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::STOP).unwrap();
    user.strata(&["stop", "-t", "1s", &name]).expect(0);
    assert_eq!(user.state(&name), "lost");
}

#[test]
fn what_is_wrong_with_a_machine_in_the_background_is_said_at_once() {
    let user = User::new();
    let ended = user
        .strata(&["run", "-d", "--kernel", "/no/such/kernel"])
        .expect(125);
    assert!(ended.stderr.contains("/no/such/kernel"), "{}", ended.stderr);
    assert!(user.machines().is_empty());
}

#[test]
fn a_program_is_executed_as_if_it_ran_here() {
    let user = User::new();
    let name = user.start(&[], "sleep 1000");

    let ended = user.exec(&name, "echo out; echo err >&2; exit 3").expect(3);
    assert_eq!(
        (ended.text().as_str(), ended.stderr.as_str()),
        ("out\n", "err\n")
    );
    user.exec(&name, "kill -SEGV $$").expect(128 + 11);
    let missing = user.strata(&["exec", &name, "no-such-program"]).expect(127);
    assert!(
        missing.stderr.contains("no-such-program"),
        "{}",
        missing.stderr
    );
    user.strata(&["exec", &name, "/etc/profile"]).expect(126);

    // without -i there is no input; with it all of it arrives, and its end
    assert_eq!(
        user.feed(&["exec", &name, "cat"], b"x").expect(0).text(),
        ""
    );
    let input: Vec<u8> = (0..1_500_000_u32).map(|i| (i / 7) as u8).collect();
    let ended = user.feed(&["exec", "-i", &name, "cat"], &input).expect(0);
    assert!(
        ended.stdout == input,
        "{} bytes came back",
        ended.stdout.len()
    );

    let words = [
        "exec",
        "-w",
        "/tmp",
        "-e",
        "A=b c",
        &name,
        "sh",
        "-c",
        "echo $PWD $A",
    ];
    assert_eq!(user.strata(&words).expect(0).text(), "/tmp b c\n");
    let nowhere = user
        .strata(&["exec", "-w", "/no/where", &name, "true"])
        .expect(127);
    assert!(nowhere.stderr.contains("/no/where"), "{}", nowhere.stderr);
}

#[test]
fn what_is_executed_hears_of_signals_and_of_our_end() {
    let user = User::new();
    let name = user.start(&[], "sleep 1000");
    let begin = |line: &str| {
        let mut command = user.command(&["exec", &name, "sh", "-c", line]);
        command.stdout(Stdio::piped()).spawn().unwrap()
    };
    let wait_for = |file: &str| {
        let end = Instant::now() + LIMIT;
        while user.exec(&name, &format!("test -e {file}")).status != Some(0) {
            assert!(Instant::now() < end, "{file} does not appear");
        }
    };

    let mut child = begin("trap 'exit 5' TERM; touch /tmp/a; while :; do sleep 0.1; done");
    wait_for("/tmp/a");
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(5));

    let mut child =
        begin("trap 'touch /tmp/c; exit' HUP; touch /tmp/b; while :; do sleep 0.1; done");
    wait_for("/tmp/b");
    child.kill().unwrap();
    child.wait().unwrap();
    wait_for("/tmp/c");
}

#[test]
fn a_thousand_programs_in_a_row_leave_nothing_behind() {
    let user = User::new();
    let name = user.start(&[], "sleep 1000");
    let count = |user: &User| {
        // Threads of the kernel come and go, and have no command line.
        let line = "for p in /proc/[0-9]*; do tr -d '\\0' <$p/cmdline; echo; done | grep -c .; \
            for p in /proc/[0-9]*; do read c <$p/comm; [ $c = strata-agent ] && \
            { ls $p/fd | wc -l; ls $p/task | wc -l; }; done; true";
        user.exec(&name, line).expect(0).text()
    };
    user.exec(&name, "true").expect(0);
    let agent = user.exec(
        &name,
        "cat /proc/*/cmdline | tr '\\0' '\\n' | grep -c strata-agent",
    );
    assert_ne!(agent.text().trim(), "0");
    let pid = user.machine(&name)["pid"].as_u64().unwrap();
    let descriptors = || fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let before = (count(&user), descriptors());
    for number in 0..1000_u32 {
        let status = (number % 7).to_string();
        user.strata(&["exec", &name, "sh", "-c", &format!("exit {status}")])
            .expect(number as i32 % 7);
    }
    // Connections end a moment after their programs.
    let end = Instant::now() + LIMIT;
    loop {
        let after = (count(&user), descriptors());
        if after == before {
            return;
        }
        assert!(Instant::now() < end, "{before:?} became {after:?}");
        thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn files_are_copied_both_ways() {
    let user = User::new();
    let name = user.start(&[], "sleep 1000");
    let here = tempfile::tempdir().unwrap();
    let at = |path: &str| here.path().join(path).to_str().unwrap().to_owned();
    let there = |path: &str| format!("{name}:{path}");
    fs::create_dir_all(here.path().join("d/sub")).unwrap();
    let data: Vec<u8> = (0..3_000_000_u32).map(|i| (i / 11) as u8).collect();
    fs::write(at("d/sub/data"), &data).unwrap();
    std::os::unix::fs::symlink("/no/where", at("d/link")).unwrap();

    user.strata(&["cp", &at("d"), &there("/tmp/new")]).expect(0);
    user.strata(&["cp", &there("/tmp/new"), &at("back")])
        .expect(0);
    assert!(fs::read(at("back/sub/data")).unwrap() == data);
    assert_eq!(
        fs::read_link(at("back/link")).unwrap(),
        Path::new("/no/where")
    );

    user.strata(&["cp", &there("/etc/hostname"), &at("d")])
        .expect(0);
    assert_eq!(
        fs::read_to_string(at("d/hostname")).unwrap(),
        format!("{name}\n")
    );

    let missing = user
        .strata(&["cp", &there("/no/such"), &at("x")])
        .expect(127);
    assert!(missing.stderr.contains("/no/such"), "{}", missing.stderr);
    assert!(!here.path().join("x").exists());
    user.strata(&["cp", &at("none"), &there("/tmp")]).expect(1);
    user.strata(&["cp", &at("d"), &there("/no/such/place")])
        .expect(127);
    user.strata(&["cp", "a", "b"]).expect(1);
}

#[test]
fn a_terminal_in_the_guest_has_our_size_and_follows_it() {
    let user = User::new();
    let name = user.start(&[], "sleep 1000");
    let mut session = Session::start_beside(user.command(&["exec", "-it", &name, "sh"]));
    session.wait_for("# ");
    session.wait_until_raw();
    session.type_keys("echo \"<$(stty size) $TERM>\"\r");
    session.wait_for(&format!(
        "<{} {} vt220>",
        crate::pty::ROWS,
        crate::pty::COLUMNS
    ));
    session.resize(44, 90);
    session
        .type_keys("until [ \"$(stty size)\" = '44 90' ]; do sleep 0.1; done; echo so\"\"it is\r");
    session.wait_for("soit is");
    // the keys for signals are the program's
    session.type_keys("sh -c 'echo begun; exec sleep 1000'\r");
    session.wait_for("begun\r\n");
    session.type_keys("\x03");
    session.type_keys("exit 6\r");
    assert_eq!(session.end(), 6);
}

#[test]
fn a_machine_in_the_foreground_can_be_reached_by_its_name() {
    let user = User::new();
    let mut command = user.command(&[
        "run",
        "--accel",
        "soft",
        "--timeout",
        "300s",
        "--name",
        "front",
    ]);
    command.args(["--", "sh", "-c", "sleep 1000"]);
    let mut child = command.spawn().unwrap();
    let end = Instant::now() + LIMIT;
    while user.machines().is_empty() {
        assert!(Instant::now() < end, "it is not listed");
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(user.exec("front", "hostname").expect(0).text(), "front\n");
    assert!(user.machine("front")["ephemeral"].as_bool().unwrap());
    user.strata(&["stop", "front"]).expect(0);
    assert_eq!(child.wait().unwrap().code(), Some(143));
    assert!(user.machines().is_empty());
}

#[test]
fn what_machines_use_is_told() {
    let user = User::new();
    let name = user.start(&["--memory", "256M"], "while :; do :; done");
    user.exec(&name, "true").expect(0);
    let text = user.strata(&["stats", "--output", "json"]).expect(0).text();
    let stats: Value = serde_json::from_str(&text).unwrap();
    let usage = &stats[0];
    assert_eq!(usage["name"], name.as_str());
    assert!(usage["cpu"].as_f64().unwrap() > 0.05, "{text}");
    assert!(usage["host_memory"].as_u64().unwrap() > 16 << 20, "{text}");
    let total = usage["guest"]["memory_total"].as_u64().unwrap();
    assert!((128 << 20..256 << 20).contains(&total), "{text}");
    assert!(usage["guest"]["processes"].as_u64().unwrap() > 3, "{text}");
}

#[test]
fn a_machine_without_a_command_waits_for_programs() {
    let user = User::new();
    let ended = user
        .strata(&["run", "-d", "--accel", "soft", "--name", "idle"])
        .expect(0);
    assert_eq!(ended.text(), "idle\n");
    assert_eq!(user.exec("idle", "echo here").expect(0).text(), "here\n");
    user.strata(&["stop", "idle"]).expect(0);
    let ended = user.machine("idle");
    assert_eq!(
        (&ended["status"], &ended["reason"]),
        (&0.into(), &"powered off".into())
    );
}

#[test]
fn input_is_typed_at_no_machine_in_the_background() {
    let user = User::new();
    let words = [
        "run", "-d", "--accel", "soft", "--name", "deaf", "--", "wc", "-c",
    ];
    user.feed(&words, b"not for the guest").expect(0);
    user.strata(&["wait", "deaf"]).expect(0);
    assert_eq!(user.strata(&["logs", "deaf"]).expect(0).text().trim(), "0");
}

/// Asks the agent of the guest behind the socket at `path`, as any program of the host can.
fn ask(path: &str, request: &Request) -> Reply {
    let mut stream = UnixStream::connect(path).unwrap();
    stream
        .write_all(format!("CONNECT {AGENT_PORT}\n").as_bytes())
        .unwrap();
    let mut answer = String::new();
    while !answer.ends_with('\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        answer.push(char::from(byte[0]));
    }
    assert!(answer.starts_with("OK "), "{answer}");
    Greeting::OURS.send(&mut stream).unwrap();
    Greeting::receive(&mut stream).unwrap();
    strata_protocol::write(&mut stream, request).unwrap();
    strata_protocol::read(&mut stream).unwrap().unwrap()
}

#[test]
fn the_agent_sets_the_clock_and_takes_random_numbers() {
    let user = User::new();
    let path = user.home.path().join("agent");
    let path = path.to_str().unwrap();
    let name = user.start(&["--vsock", path], "sleep 1000");
    user.exec(&name, "true").expect(0);

    let Reply::Information(guest) = ask(path, &Request::Inform) else {
        panic!("no information");
    };
    assert!(guest.kernel.ends_with("-cloud-amd64"), "{guest:?}");
    assert_eq!(guest.version, env!("CARGO_PKG_VERSION"));

    let now = Duration::from_secs(2_000_000_000);
    assert_eq!(ask(path, &Request::SetClock { now }), Reply::Done);
    let there: u64 = user.exec(&name, "date +%s").text().trim().parse().unwrap();
    assert!((2_000_000_000..2_000_000_600).contains(&there), "{there}");

    let seed = vec![7; 1000];
    assert_eq!(ask(path, &Request::Reseed { seed }), Reply::Done);
    // What cannot be done is an answer, too, and the next is asked as ever.
    let refused = ask(path, &Request::Signal(200));
    assert!(matches!(refused, Reply::Failed(_)), "{refused:?}");
    user.exec(&name, "true").expect(0);
}

#[test]
fn nonsense_on_the_agents_port_ends_that_conversation_alone() {
    let user = User::new();
    let path = user.home.path().join("agent");
    let path = path.to_str().unwrap();
    let name = user.start(&["--vsock", path], "sleep 1000");
    user.exec(&name, "true").expect(0);
    let mut state = 0x1234_5678_9abc_def1_u64;
    for round in 0..60 {
        let mut stream = UnixStream::connect(path).unwrap();
        stream
            .write_all(format!("CONNECT {AGENT_PORT}\n").as_bytes())
            .unwrap();
        let mut bytes = Vec::new();
        if round % 3 > 0 {
            Greeting::OURS.send(&mut bytes).unwrap();
        }
        if round % 3 > 1 {
            bytes.extend((round * 7_u32).to_le_bytes());
        }
        for _ in 0..200 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.push(state as u8);
        }
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    }
    user.exec(&name, "true").expect(0);
}
