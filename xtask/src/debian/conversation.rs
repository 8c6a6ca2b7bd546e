//! A talk with a program through its standard input and output, as a person would have it
//! at a terminal: say something, wait for an answer. Called by `guest`.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::Error;

/// What came of waiting for words.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// The words, and before them this.
    Words(String),
    /// Nothing of the kind in time. What was said stays to be heard.
    Nothing,
    /// The program ended first.
    End,
}

/// The talk. Dropping it kills the program.
pub(super) struct Conversation {
    child: Child,
    stdin: ChildStdin,
    output: Receiver<Vec<u8>>,
    /// What was said and not waited for yet.
    unheard: String,
}

impl Conversation {
    /// Starts `command`; `log` gets all that it says.
    pub(super) fn start(what: &str, command: &mut Command, log: &Path) -> Result<Self, Error> {
        let file = File::create(log).map_err(Error::file("create", log))?;
        let start = |source| Error::Start {
            what: what.to_owned(),
            source,
        };
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(start)?;
        let stdin = child.stdin.take().expect("it is piped");
        let stdout = child.stdout.take().expect("it is piped");
        let (sender, output) = mpsc::channel();
        thread::spawn(move || listen(stdout, &sender, file));
        Ok(Self {
            child,
            stdin,
            output,
            unheard: String::new(),
        })
    }

    /// Says `text`. That nobody listens is found out by waiting for an answer.
    pub(super) fn say(&mut self, text: &str) {
        let _ = self.stdin.write_all(text.as_bytes());
        let _ = self.stdin.flush();
    }

    /// Waits until `words` are said, for `limit` at most.
    pub(super) fn wait_for(&mut self, words: &str, limit: Duration) -> Heard {
        let end = Instant::now() + limit;
        loop {
            if let Some(at) = self.unheard.find(words) {
                let rest = self.unheard.split_off(at + words.len());
                let mut before = std::mem::replace(&mut self.unheard, rest);
                before.truncate(at);
                return Heard::Words(before);
            }
            let left = end.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(bytes) => self.unheard += &String::from_utf8_lossy(&bytes),
                Err(RecvTimeoutError::Timeout) => return Heard::Nothing,
                Err(RecvTimeoutError::Disconnected) => return Heard::End,
            }
        }
    }

    /// Waits until the program ends, for `limit` at most. Whether it ended well.
    pub(super) fn end(&mut self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        while self
            .output
            .recv_timeout(end.saturating_duration_since(Instant::now()))
            .is_ok()
        {}
        // its output has ended, so it has or is about to
        while Instant::now() < end {
            if let Ok(Some(status)) = self.child.try_wait() {
                return status.success();
            }
            thread::sleep(Duration::from_millis(20));
        }
        false
    }

    /// What was said and not waited for.
    pub(super) fn unheard(&self) -> &str {
        &self.unheard
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn listen(mut stdout: ChildStdout, to: &mpsc::Sender<Vec<u8>>, mut log: File) {
    let mut part = [0; 4096];
    while let Ok(count @ 1..) = stdout.read(&mut part) {
        let _ = log.write_all(&part[..count]);
        if to.send(part[..count].to_vec()).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_mins(1);

    fn shell() -> (Conversation, tempfile::TempDir) {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let talk = Conversation::start("sh", &mut Command::new("sh"), &log).unwrap();
        (talk, directory)
    }

    #[test]
    fn words_are_heard_with_what_was_said_before_them() {
        let (mut talk, _directory) = shell();
        talk.say("echo one; echo two; echo three\n");
        assert_eq!(talk.wait_for("two\n", LONG), Heard::Words("one\n".into()));
        assert_eq!(talk.wait_for("ree", LONG), Heard::Words("th".into()));
    }

    #[test]
    fn waiting_for_what_is_not_said_ends_in_time() {
        let (mut talk, _directory) = shell();
        assert_eq!(
            talk.wait_for("word", Duration::from_millis(20)),
            Heard::Nothing
        );
    }

    #[test]
    fn the_end_of_the_program_is_told_from_silence() {
        let (mut talk, _directory) = shell();
        talk.say("echo last; exit 3\n");
        assert_eq!(talk.wait_for("word", LONG), Heard::End);
        assert_eq!(talk.unheard(), "last\n");
        assert!(!talk.end(LONG));
    }
}
