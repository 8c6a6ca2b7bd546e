//! A user of `strata` with machines of their own, in the background for the most part.

use std::io::Write;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::guest::{Ended, STRATA, Slot};

/// Nothing that these tests wait for takes this long.
pub(crate) const LIMIT: Duration = Duration::from_mins(2);

/// A user with no machines. Those that a test leaves are ended.
pub(crate) struct User {
    /// A directory of theirs, with the machines in it.
    pub(crate) home: TempDir,
    _slot: Slot,
}

impl User {
    pub(crate) fn new() -> Self {
        Self {
            home: tempfile::tempdir().unwrap(),
            _slot: Slot::take(),
        }
    }

    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(STRATA);
        command.args(words).env("XDG_STATE_HOME", self.home.path());
        command
    }

    /// Runs `strata` with these words.
    pub(crate) fn strata(&self, words: &[&str]) -> Ended {
        self.command(words).output().unwrap().into()
    }

    /// The same with `input` on its standard input.
    pub(crate) fn feed(&self, words: &[&str], input: &[u8]) -> Ended {
        let mut command = self.command(words);
        let command = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_vec();
        let writer = thread::spawn(move || drop(stdin.write_all(&input)));
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap();
        output.into()
    }

    /// Starts a machine in the background with these options and a line of shell.
    pub(crate) fn start(&self, options: &[&str], line: &str) -> String {
        let words = [
            &["run", "-d", "--accel", "soft", "--timeout", "300s"],
            options,
            &["--", "sh", "-c", line],
        ];
        let ended = self.strata(&words.concat()).expect(0);
        ended.text().trim_end().to_owned()
    }

    pub(crate) fn exec(&self, name: &str, line: &str) -> Ended {
        self.strata(&["exec", name, "sh", "-c", line])
    }

    /// All machines as `ps` tells programs of them.
    pub(crate) fn machines(&self) -> Vec<Value> {
        let text = self
            .strata(&["ps", "-a", "--output", "json"])
            .expect(0)
            .text();
        serde_json::from_str(&text).unwrap()
    }

    pub(crate) fn machine(&self, name: &str) -> Value {
        let all = self.machines();
        let found = all.into_iter().find(|machine| machine["name"] == name);
        found.unwrap_or_else(|| panic!("no machine {name}"))
    }

    pub(crate) fn state(&self, name: &str) -> String {
        self.machine(name)["state"].as_str().unwrap().to_owned()
    }

    /// Waits until the machine's log has this text.
    #[track_caller]
    pub(crate) fn wait_for_log(&self, name: &str, text: &str) {
        let end = Instant::now() + LIMIT;
        loop {
            let log = self.strata(&["logs", name]).expect(0).text();
            if log.contains(text) {
                return;
            }
            assert!(Instant::now() < end, "{text:?} is not in the log:\n{log}");
            thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for User {
    fn drop(&mut self) {
        for machine in self.strata(&["ps", "-a", "-q"]).text().lines() {
            self.strata(&["rm", "-f", machine]);
        }
    }
}
