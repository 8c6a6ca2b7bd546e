//! Machines that are processes of their own. Each such process is this test program again, which
//! then runs nothing but the test `the_machine` with orders in its environment.

use std::env;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use strata_machines::{End, Error, LogReader, LogSize, LogWriter, Registry, Signal, Spec, State};
use strata_machines::{Entry, Stream};
use tempfile::TempDir;

const ROOT: &str = "STRATA_TEST_ROOT";
const ORDER: &str = "STRATA_TEST_ORDER";

/// Nothing by itself; else the machine that another test asks for.
#[test]
fn the_machine() {
    let Some(root) = env::var_os(ROOT) else {
        return;
    };
    let registry = Registry::at(Path::new(&root));
    let order = env::var(ORDER).unwrap();
    match order.split_once(' ').unwrap() {
        ("hold", name) => {
            let mut claim = registry.find(name).unwrap().claim().unwrap();
            claim.started().unwrap();
            println!("\nready");
            wait_for_end_of_input();
            claim.end(End::now(3, "told to")).unwrap();
        }
        ("ephemeral", name) => {
            let spec = spec(name);
            let (_machine, _claim) = registry.create_ephemeral(&spec).unwrap();
            println!("\nready");
            wait_for_end_of_input();
        }
        ("create", count) => {
            for index in 0..count.parse().unwrap() {
                match registry.create(&spec(&format!("machine-{index}"))) {
                    Ok(_) => println!("\ncreated {index}"),
                    Err(Error::NameTaken { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        }
        ("anything", seed) => {
            for step in 0_u64.. {
                do_anything(&registry, seed.parse::<u64>().unwrap() + step);
                println!("\nstep {step}");
            }
        }
        ("user", _) => match Registry::of_user() {
            Ok(registry) => println!("\nroot {}", registry.root().display()),
            Err(error) => println!("\nroot: {error}"),
        },
        ("print", directory) => {
            let size = LogSize {
                segments: 3,
                bytes: 4096,
            };
            let mut log = LogWriter::open_sized(Path::new(directory), size).unwrap();
            println!("\nready");
            for number in 0_u64.. {
                let text = format!("{number}\n");
                log.write(Stream::Stdout, text.as_bytes()).unwrap();
            }
        }
        (other, _) => panic!("no such order: {other}"),
    }
}

/// Does one of the things that commands do. Some of it has to fail, as others do the same.
fn do_anything(registry: &Registry, number: u64) {
    // scattered, so that neighbours do not do the same (a multiplier of L'Ecuyer's)
    let mixed = number.wrapping_mul(3_935_559_000_370_003_845) >> 32;
    let name = format!("machine-{}", mixed % 3);
    let done = match mixed / 3 % 8 {
        0 | 1 => registry.create(&spec(&name)).map(drop),
        2 => registry.create_ephemeral(&spec(&name)).map(drop),
        3 => registry
            .find(&name)
            .and_then(|it| it.claim())
            .and_then(|mut claim| claim.started()),
        4 => registry
            .find(&name)
            .and_then(|it| it.claim())
            .and_then(|claim| claim.end(End::now(0, "exited"))),
        5 => registry.find(&name).and_then(|it| it.remove()),
        6 => registry.find(&name).and_then(|it| it.state()).map(drop),
        _ => registry.list().map(|machines| {
            assert!(machines.iter().all(Result::is_ok), "{machines:?}");
        }),
    };
    match done {
        Ok(())
        | Err(
            Error::NameTaken { .. }
            | Error::NoSuchMachine(_)
            | Error::Gone(_)
            | Error::AlreadyRunning(_)
            | Error::StillRunning(_),
        ) => {}
        Err(error) => panic!("{error}: {error:?}"),
    }
}

fn spec(name: &str) -> Spec {
    Spec {
        name: Some(name.to_owned()),
        ..Spec::default()
    }
}

fn wait_for_end_of_input() {
    io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

fn command(root: &Path, order: &str) -> Command {
    let mut command = Command::new(env::current_exe().unwrap());
    command
        .args(["--exact", "the_machine", "--nocapture"])
        .env(ROOT, root)
        .env(ORDER, order)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    command
}

fn spawn(root: &Path, order: &str) -> (Child, BufReader<ChildStdout>) {
    let mut child = command(root, order).spawn().unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    (child, output)
}

/// The output is to be kept as long as the child prints.
fn spawn_ready(root: &Path, order: &str) -> (Child, BufReader<ChildStdout>) {
    let (child, mut output) = spawn(root, order);
    let mut lines = output.by_ref().lines().map(Result::unwrap);
    assert!(lines.any(|line| line == "ready"));
    (child, output)
}

#[test]
fn the_users_registry_is_where_the_environment_says() {
    let root = |state: &str, home: &str| {
        let mut command = command(Path::new("/"), "user -");
        command.env("XDG_STATE_HOME", state).env("HOME", home);
        let output = String::from_utf8(command.output().unwrap().stdout).unwrap();
        let line = output.lines().find(|line| line.starts_with("root"));
        line.unwrap().to_owned()
    };

    assert_eq!(root("/state", "/home/me"), "root /state/strata/machines");
    let below_home = "root /home/me/.local/state/strata/machines";
    assert_eq!(root("", "/home/me"), below_home);
    assert_eq!(root("relative", "/home/me"), below_home);
    assert!(root("", "").contains("neither XDG_STATE_HOME nor HOME"));
}

#[test]
fn a_machine_that_is_killed_is_lost_and_can_be_started_again() {
    let root = TempDir::new().unwrap();
    let machine = Registry::at(root.path()).create(&spec("web")).unwrap();
    let (mut child, _output) = spawn_ready(root.path(), "hold web");
    let state = machine.state().unwrap();
    assert!(matches!(state, State::Running { pid, .. } if pid == child.id()));

    child.kill().unwrap();
    let waited = machine.wait(None).unwrap();

    assert!(matches!(waited, Some(State::Lost { .. })), "{waited:?}");
    assert!(matches!(
        machine.signal(Signal::TERM),
        Err(Error::NotRunning(_))
    ));
    child.wait().unwrap();
    assert_eq!(machine.claim().unwrap().run(), 2);
}

#[test]
fn a_machine_says_how_it_ended() {
    let root = TempDir::new().unwrap();
    let machine = Registry::at(root.path()).create(&spec("web")).unwrap();
    let (mut child, _output) = spawn_ready(root.path(), "hold web");
    let waited = machine.wait(Some(Duration::from_millis(1))).unwrap();
    assert_eq!(waited, None);

    drop(child.stdin.take());
    let waited = machine.wait(None).unwrap();

    let Some(State::Ended(end)) = waited else {
        panic!("{waited:?}");
    };
    assert_eq!((end.status, end.reason.as_str()), (3, "told to"));
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_signal_reaches_the_machines_process() {
    let root = TempDir::new().unwrap();
    let machine = Registry::at(root.path()).create(&spec("web")).unwrap();
    let (mut child, _output) = spawn_ready(root.path(), "hold web");

    machine.signal(Signal::TERM).unwrap();

    assert_eq!(child.wait().unwrap().signal(), Some(15));
    assert!(matches!(machine.state().unwrap(), State::Lost { .. }));
}

#[test]
fn an_ephemeral_machine_whose_process_was_killed_is_swept() {
    let root = TempDir::new().unwrap();
    let registry = Registry::at(root.path());
    let (mut child, _output) = spawn_ready(root.path(), "ephemeral web");
    let machine = registry.find("web").unwrap();

    child.kill().unwrap();
    machine.wait(None).unwrap();

    assert!(matches!(registry.find("web"), Err(Error::NoSuchMachine(_))));
    child.wait().unwrap();
}

#[test]
fn of_processes_that_create_the_same_names_one_gets_each() {
    const NAMES: usize = 10;
    let root = TempDir::new().unwrap();
    let order = format!("create {NAMES}");
    let children: Vec<_> = (0..6).map(|_| spawn(root.path(), &order)).collect();

    let mut created = Vec::new();
    for (mut child, output) in children {
        let lines = output.lines().map(Result::unwrap);
        created.extend(lines.filter(|line| line.starts_with("created ")));
        assert!(child.wait().unwrap().success());
    }

    created.sort();
    created.dedup();
    assert_eq!(created.len(), NAMES);
    let listed = Registry::at(root.path()).list().unwrap();
    assert_eq!(listed.iter().filter(|it| it.is_ok()).count(), NAMES);
}

#[test]
fn processes_that_do_anything_and_are_killed_leave_a_registry_that_is_whole() {
    let root = TempDir::new().unwrap();
    let registry = Registry::at(root.path());
    let start = |seed: usize| spawn(root.path(), &format!("anything {}", seed * 1_000_000));
    let mut children: Vec<_> = (0..4).map(start).collect();

    for round in 4..40 {
        let (mut child, output) = children.remove(0);
        let last = format!("step {}", round % 13);
        let mut lines = output.lines().map(Result::unwrap);
        assert!(lines.any(|line| line == last), "it has panicked");
        child.kill().unwrap();
        child.wait().unwrap();
        children.push(start(round));
    }
    for (mut child, _output) in children {
        child.kill().unwrap();
        child.wait().unwrap();
    }

    let machines = registry.list().unwrap().into_iter();
    let machines: Vec<_> = machines.map(Result::unwrap).collect();
    let mut names: Vec<_> = machines.iter().map(|it| it.name().to_owned()).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), machines.len());
    for machine in &machines {
        assert!(!machine.asked().ephemeral);
        assert!(!machine.state().unwrap().is_running());
        machine.claim().unwrap().end(End::now(0, "exited")).unwrap();
        machine.remove().unwrap();
    }
    let left: Vec<_> = std::fs::read_dir(root.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

#[test]
fn a_reader_follows_another_process_until_that_is_killed() {
    const WANTED: u64 = 20_000;
    let directory = TempDir::new().unwrap();
    let order = format!("print {}", directory.path().display());
    let (mut child, _output) = spawn_ready(directory.path(), &order);
    let mut log = LogReader::open(directory.path());

    // Each number is one more than the last, except after a loss, where it is greater.
    let (mut last, mut is_lost, mut read) = (None, true, 0);
    while let Some(entry) = log.follow(Duration::from_secs(10)).unwrap() {
        match entry {
            Entry::Lost(bytes) => {
                assert!(bytes > 0);
                is_lost = true;
            }
            Entry::Record(record) => {
                let text = String::from_utf8(record.bytes).unwrap();
                let number: u64 = text.trim_end().parse().unwrap();
                match last {
                    Some(last) if is_lost => assert!(number > last),
                    Some(last) => assert_eq!(number, last + 1),
                    None => {}
                }
                (last, is_lost, read) = (Some(number), false, read + 1);
            }
        }
        if read == WANTED {
            child.kill().unwrap();
            child.wait().unwrap();
            break;
        }
    }

    // What is there after the kill is whole, and the next writer goes on behind it.
    while log.read().unwrap().is_some() {}
    let mut next = LogWriter::open(directory.path()).unwrap();
    next.write(Stream::Console, b"again").unwrap();
    let Some(Entry::Record(record)) = log.read().unwrap() else {
        panic!("nothing was written");
    };
    assert_eq!(record.bytes, b"again");
    assert_eq!(log.read().unwrap(), None);
}
