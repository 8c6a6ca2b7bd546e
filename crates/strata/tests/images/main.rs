//! `strata image`, as a user has it: pulls from registries, good ones and bad ones, and from
//! files; several at once, broken and killed; and what is listed, removed and collected.
#![forbid(unsafe_code)]

mod content;
mod files;
mod registry;
mod server;

use std::path::Path;
use std::process::{Command, Output};

/// A user with a store and credentials of their own.
pub(crate) struct User {
    home: tempfile::TempDir,
}

/// What `strata image` said, and whether it went well.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) well: bool,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl User {
    pub(crate) fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        Self { home }
    }

    pub(crate) fn home(&self) -> &Path {
        self.home.path()
    }

    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_strata"));
        command.arg("image").args(words).current_dir(self.home());
        command.env("XDG_DATA_HOME", self.home().join("data"));
        command.env("DOCKER_CONFIG", self.home());
        command
    }

    pub(crate) fn image(&self, words: &[&str]) -> Said {
        said(self.command(words).output().unwrap())
    }

    /// Runs it and expects it to go well. Gives what it wrote.
    #[track_caller]
    pub(crate) fn done(&self, words: &[&str]) -> String {
        let said = self.image(words);
        assert!(said.well, "{words:?}: {}", said.err);
        said.out
    }

    /// Runs it and expects it to fail. Gives what it wrote as errors.
    #[track_caller]
    pub(crate) fn refused(&self, words: &[&str]) -> String {
        let said = self.image(words);
        assert!(!said.well, "{words:?}: {}", said.out);
        said.err
    }

    /// Names of the files in a directory of the store.
    pub(crate) fn kept(&self, directory: &str) -> Vec<String> {
        let path = self.home().join("data/strata/images").join(directory);
        let entries = std::fs::read_dir(path).into_iter().flatten();
        let names = entries.map(|entry| entry.unwrap().file_name());
        let mut names: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Panics unless every layer of the store is a sound file system.
    #[track_caller]
    pub(crate) fn check_layers(&self) {
        for name in self.kept("layers") {
            let path = self.home().join("data/strata/images/layers").join(name);
            let check = Command::new("fsck.erofs").arg(path).output();
            assert!(check.expect("erofs-utils is installed").status.success());
        }
    }
}

pub(crate) fn said(output: Output) -> Said {
    Said {
        well: output.status.success(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}
