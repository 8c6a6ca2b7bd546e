//! The process of a running machine is locked up (docs/security.md). What each layer forbids is
//! tested in the crate `sandbox`.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use crate::guest::{STRATA, Slot, feed, guest_with, run};
use crate::host::find;

/// A machine whose guest waits for the end of its input.
struct Running {
    strata: Child,
    _slot: Slot,
}

impl Running {
    /// Starts it and waits until the guest's command runs.
    fn start(options: &[&str]) -> Self {
        let slot = Slot::take();
        let mut command = run(options);
        command.args(["--", "sh", "-c", "echo ready; cat"]);
        Self::started(command, slot)
    }

    fn started(mut command: Command, slot: Slot) -> Self {
        let mut strata = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = strata.stdout.as_mut().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        Self {
            strata,
            _slot: slot,
        }
    }

    fn proc(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}", self.strata.id()))
    }

    /// The values of a field of every thread's status.
    fn statuses(&self, field: &str) -> Vec<String> {
        let threads = fs::read_dir(self.proc().join("task")).unwrap();
        let value = |thread: PathBuf| {
            let status = fs::read_to_string(thread.join("status")).unwrap();
            let line = status.lines().find(|line| line.starts_with(field)).unwrap();
            line.split_once(':').unwrap().1.trim().to_owned()
        };
        threads
            .map(|thread| value(thread.unwrap().path()))
            .collect()
    }

    fn end(mut self) {
        drop(self.strata.stdin.take());
        assert_eq!(self.strata.wait().unwrap().code(), Some(0));
    }
}

/// Whether this host gives a layer of the sandbox, as `strata doctor` finds.
fn host_gives(layer: &str) -> bool {
    let doctor = Command::new(STRATA)
        .args(["doctor", "--output", "json"])
        .output()
        .unwrap();
    let report: serde_json::Value = serde_json::from_slice(&doctor.stdout).unwrap();
    let findings = report["findings"].as_array().unwrap();
    let subject = format!("sandbox: {layer}");
    let finding = findings.iter().find(|f| f["subject"] == *subject).unwrap();
    finding["grade"] == "good"
}

#[track_caller]
fn all(values: &[String], expected: &str) {
    assert!(values.len() > 3, "{values:?}");
    assert!(values.iter().all(|value| value == expected), "{values:?}");
}

#[test]
fn every_thread_of_a_running_machine_is_behind_seccomp_and_without_capabilities() {
    let machine = Running::start(&[]);

    all(&machine.statuses("Seccomp"), "2");
    all(&machine.statuses("NoNewPrivs"), "1");
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        all(&machine.statuses(set), "0000000000000000");
    }
    machine.end();
}

#[test]
fn a_running_machine_has_namespaces_of_its_own() {
    if !host_gives("namespaces") {
        eprintln!("skipped: this host gives no namespaces");
        return;
    }
    let machine = Running::start(&[]);

    for name in ["user", "mnt", "net", "ipc", "uts", "cgroup"] {
        let of = |process: PathBuf| fs::read_link(process.join("ns").join(name));
        match of(machine.proc()) {
            Ok(its) => assert_ne!(its, of("/proc/self".into()).unwrap(), "{name}"),
            // A process that gave up being traced shows its namespaces to root alone.
            Err(error) => assert!(!rustix::process::geteuid().is_root(), "{name}: {error}"),
        }
    }
    machine.end();
}

#[test]
fn without_a_sandbox_a_machine_runs_as_any_program() {
    let machine = Running::start(&["--sandbox", "off"]);

    all(&machine.statuses("Seccomp"), "0");
    machine.end();
}

#[test]
fn a_required_sandbox_is_there_or_no_machine_is_started() {
    let layers = ["namespaces", "privileges", "Landlock", "seccomp"];
    let complete = layers.iter().all(|layer| host_gives(layer));

    let ended = guest_with(&["--sandbox", "require"], &["true"], b"");

    if complete {
        ended.expect(0);
    } else {
        let ended = ended.expect(125);
        assert!(ended.stderr.contains("--sandbox"), "{}", ended.stderr);
    }
}

/// `strata run` where no namespaces are to be had: in a user namespace that allows no more of
/// them, without capabilities. `None` where this host does not let us make one.
fn without_namespaces(options: &[&str]) -> Option<Command> {
    let (unshare, setpriv) = (find("unshare")?, find("setpriv")?);
    let script = "echo 0 >/proc/sys/user/max_user_namespaces && exec \"$@\"";
    let prepare = |mut command: Command| {
        command.args(["--user", "--map-root-user", "sh", "-c", script, "sh"]);
        command
            .arg(&setpriv)
            .args(["--bounding-set=-all", "--inh-caps=-all"]);
        command
    };
    let mut trial = prepare(Command::new(&unshare));
    let trial = trial.arg("true").stderr(Stdio::null()).status();
    if !trial.is_ok_and(|status| status.success()) {
        eprintln!("skipped: this host gives no user namespace to try it in");
        return None;
    }
    let strata = run(options);
    let mut command = prepare(Command::new(&unshare));
    command.arg(strata.get_program()).args(strata.get_args());
    Some(command)
}

#[test]
fn a_host_without_namespaces_still_gives_the_other_layers() {
    let Some(mut command) = without_namespaces(&[]) else {
        return;
    };
    command.args(["--", "sh", "-c", "echo ready; cat"]);

    let machine = Running::started(command, Slot::take());

    all(&machine.statuses("Seccomp"), "2");
    all(&machine.statuses("CapEff"), "0000000000000000");
    machine.end();
}

#[test]
fn a_required_layer_that_is_missing_is_named() {
    let Some(mut command) = without_namespaces(&["--sandbox", "require"]) else {
        return;
    };
    command.args(["--", "true"]);

    let ended = feed(command, b"").expect(125);

    assert!(ended.stderr.contains("no namespaces"), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("max_user_namespaces"),
        "{}",
        ended.stderr
    );
    assert!(ended.stderr.contains("--sandbox auto"), "{}", ended.stderr);
}
