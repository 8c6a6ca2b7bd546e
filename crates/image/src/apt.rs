//! Debian packages through the host's own apt, as any user.
//!
//! apt checks signatures and hashes, knows mirrors and proxies, and needs no root to download
//! into a directory of ours. Where the host's package lists are empty (a fresh container) or
//! out of date, lists of our own are fetched into a private directory; the host's are never
//! touched. Called by `appliance` only.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use crate::error::Error;
use crate::manifest::{SourceRecord, sha256_of};
use crate::progress::Progress;

/// How often the size of a growing download is looked at.
const POLL: Duration = Duration::from_millis(50);

/// A package that apt can fetch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) depends: Vec<String>,
    pub(crate) size: Option<u64>,
    pub(crate) sha256: Option<String>,
}

/// A package that was fetched.
#[derive(Debug)]
pub(crate) struct Fetched {
    pub(crate) path: PathBuf,
    pub(crate) record: SourceRecord,
}

/// apt, with the host's package lists or, after [`Apt::refresh`], with lists of our own.
pub(crate) struct Apt {
    work: PathBuf,
    private: bool,
    refresh_said: String,
}

/// First line of `apt-get --version`, or `None` where there is no apt.
pub fn apt_version() -> Option<String> {
    let output = Command::new("apt-get").arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Some(text.lines().next()?.trim().to_owned()).filter(|line| !line.is_empty())
}

impl Apt {
    /// `work` is an empty directory of the caller's.
    pub(crate) fn new(work: &Path) -> Self {
        Self {
            work: work.to_owned(),
            private: false,
            refresh_said: String::new(),
        }
    }

    /// Whether lists of our own are in use.
    pub(crate) fn is_private(&self) -> bool {
        self.private
    }

    /// Fetches package lists of our own.
    pub(crate) fn refresh(&mut self, progress: &mut dyn Progress) -> Result<(), Error> {
        for directory in ["state/lists/partial", "cache/archives/partial"] {
            let path = self.work.join(directory);
            fs::create_dir_all(&path).map_err(Error::io("create the directory", &path))?;
        }
        self.private = true;
        progress.step("Fetching Debian's package lists", None);
        let mut update = self.command("apt-get");
        update.args(["-q", "update"]);
        // Sources that have nothing to do with Debian may fail, and apt with them: what
        // counts is whether the packages are found afterwards.
        let output = run(&mut update, "apt-get")?;
        self.refresh_said = last_lines(&output.stderr);
        tracing::debug!(status = output.success, said = %self.refresh_said, "apt-get update");
        Ok(())
    }

    /// The newest version of a package that apt's lists have, if they have it.
    pub(crate) fn find(&self, name: &str) -> Result<Option<Package>, Error> {
        let mut show = self.command("apt-cache");
        show.args(["show", "--no-all-versions", name]);
        let output = run(&mut show, "apt-cache")?;
        Ok(parse_stanza(&String::from_utf8_lossy(&output.stdout)).filter(|p| p.name == name))
    }

    /// The error for a package that [`find`](Self::find) did not find.
    pub(crate) fn not_found(&self, name: &str) -> Error {
        let detail = if self.refresh_said.is_empty() {
            "it is only in Debian's, for amd64".to_owned()
        } else {
            self.refresh_said.clone()
        };
        Error::PackageNotFound {
            package: name.to_owned(),
            detail,
        }
    }

    /// Downloads a package and checks it against apt's record of it.
    pub(crate) fn download(
        &self,
        package: &Package,
        progress: &mut dyn Progress,
    ) -> Result<Fetched, Error> {
        let Package { name, version, .. } = package;
        let directory = self.work.join("download").join(name);
        // A first, failed try may have left something behind.
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory).map_err(Error::io("create the directory", &directory))?;
        progress.step(&format!("Downloading {name} {version}"), package.size);

        let failed = |detail: String| Error::Fetch {
            package: name.clone(),
            detail,
        };
        let mut command = self.command("apt-get");
        command
            .args(["-q", "download", &format!("{name}={version}")])
            .current_dir(&directory)
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().map_err(spawn_error("apt-get"))?;
        let errors = child.stderr.take().map(|mut pipe| {
            thread::spawn(move || {
                let mut text = Vec::new();
                let _ = pipe.read_to_end(&mut text);
                text
            })
        });
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) => thread::sleep(POLL),
                Err(error) => return Err(failed(error.to_string())),
            }
            progress.advance(size_of_files(&directory));
        };
        let errors = errors.and_then(|t| t.join().ok()).unwrap_or_default();
        if !status.success() {
            return Err(failed(last_lines(&errors)));
        }
        let path = the_package_in(&directory).ok_or_else(|| failed(last_lines(&errors)))?;
        check(package, &path)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .env("LC_ALL", "C")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null());
        for option in ["Acquire::Languages=none", "Acquire::Retries=2"] {
            command.args(["-o", option]);
        }
        // Else apt as root warns that its own user cannot write to our directory.
        command.args(["-o", "APT::Sandbox::User=root"]);
        if self.private {
            let at = |key: &str, sub: &str| format!("{key}={}", self.work.join(sub).display());
            for option in [
                at("Dir::State", "state"),
                at("Dir::State::Lists", "state/lists"),
                at("Dir::Cache", "cache"),
                at("Dir::Cache::Archives", "cache/archives"),
                "Dir::State::Status=/var/lib/dpkg/status".to_owned(),
                "Dir::Cache::pkgcache=".to_owned(),
                "Dir::Cache::srcpkgcache=".to_owned(),
            ] {
                command.args(["-o", &option]);
            }
        }
        command
    }
}

struct Output {
    success: bool,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

fn run(command: &mut Command, program: &'static str) -> Result<Output, Error> {
    let output = command.output().map_err(spawn_error(program))?;
    Ok(Output {
        success: output.status.success(),
        stdout: output.stdout,
        stderr: output.stderr,
    })
}

fn spawn_error(program: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| {
        if source.kind() == io::ErrorKind::NotFound {
            Error::AptMissing { program }
        } else {
            Error::Io {
                action: "run the program",
                path: program.into(),
                source,
            }
        }
    }
}

fn check(package: &Package, path: &Path) -> Result<Fetched, Error> {
    let size = fs::metadata(path)
        .map_err(Error::io("read the package", path))?
        .len();
    let sha256 = sha256_of(path).map_err(Error::io("read the package", path))?;
    if package.sha256.as_ref().is_some_and(|sum| *sum != sha256) {
        return Err(Error::bad(
            path,
            format!("its SHA-256 is {sha256}, not the one in apt's lists"),
        ));
    }
    Ok(Fetched {
        path: path.to_owned(),
        record: SourceRecord {
            package: package.name.clone(),
            version: package.version.clone(),
            size,
            sha256,
        },
    })
}

/// Reads the first stanza of `apt-cache show`.
fn parse_stanza(text: &str) -> Option<Package> {
    let stanza = text.split("\n\n").next()?;
    let field = |name: &str| {
        stanza
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .map(|value| value.trim().to_owned())
    };
    Some(Package {
        name: field("Package")?,
        version: field("Version")?,
        depends: field("Depends")
            .unwrap_or_default()
            .split(',')
            .filter_map(|clause| clause.split_whitespace().next())
            .map(str::to_owned)
            .collect(),
        size: field("Size").and_then(|size| size.parse().ok()),
        sha256: field("SHA256").map(|sum| sum.to_ascii_lowercase()),
    })
}

/// What apt said last, on one line, without its warnings about unrelated sources.
fn last_lines(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let errors: Vec<&str> = text.lines().filter(|line| line.starts_with("E:")).collect();
    let lines: Vec<&str> = if errors.is_empty() {
        text.lines()
            .filter(|line| !line.trim().is_empty())
            .collect()
    } else {
        errors
    };
    let from = lines.len().saturating_sub(3);
    if lines.is_empty() {
        return "apt gave no reason".to_owned();
    }
    lines[from..].join("; ")
}

fn size_of_files(directory: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(directory) else {
        return 0;
    };
    entries
        .filter_map(|entry| entry.ok()?.metadata().ok())
        .map(|metadata| metadata.len())
        .sum()
}

fn the_package_in(directory: &Path) -> Option<PathBuf> {
    fs::read_dir(directory)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|suffix| suffix == "deb"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STANZA: &str = "Package: linux-image-cloud-amd64\nVersion: 6.1.192-2\n\
        Depends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2), other | more\n\
        Size: 1504\nSHA256: 00BE\nDescription: x\n Package: not this\n\nPackage: second\n";

    #[test]
    fn the_first_stanza_of_apt_cache_show_is_read() {
        let package = parse_stanza(STANZA).unwrap();
        assert_eq!(package.name, "linux-image-cloud-amd64");
        assert_eq!(package.version, "6.1.192-2");
        assert_eq!(
            package.depends,
            ["linux-image-6.1.0-56-cloud-amd64", "other"]
        );
        assert_eq!(package.size, Some(1504));
        assert_eq!(package.sha256.as_deref(), Some("00be"));
    }

    #[test]
    fn no_output_of_apt_cache_show_is_no_package() {
        assert_eq!(parse_stanza(""), None);
    }

    #[test]
    fn errors_of_apt_come_before_its_warnings() {
        let said = b"W: other source\nE: Failed to fetch http://x  404\nW: more\n";
        assert_eq!(last_lines(said), "E: Failed to fetch http://x  404");
    }

    #[test]
    fn a_package_with_another_hash_than_apts_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.deb");
        fs::write(&path, "abc").unwrap();
        let package = parse_stanza(STANZA).unwrap();

        let error = check(&package, &path).unwrap_err().to_string();

        assert!(
            error.contains("p.deb") && error.contains("SHA-256"),
            "{error}"
        );
    }
}
