//! What a run needs of the host: no /dev/kvm with the software CPU, and no root.

use std::env;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::guest::{STRATA, feed, guest, run};

/// A user with no rights of its own: nobody.
const NOBODY: u32 = 65534;

/// Where a program of the host is, also among the administrators'.
pub(crate) fn program(name: &str) -> PathBuf {
    find(name).unwrap_or_else(|| {
        panic!("{name} is missing: 'cargo xtask test', run as root, installs what tests need")
    })
}

pub(crate) fn find(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(name))
        .find(|file| file.is_file())
}

#[test]
fn the_software_cpu_never_opens_dev_kvm() {
    let Some(strace) = find("strace") else {
        eprintln!("skipped: strace is missing");
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    let inner = run(&["--", "true"]);
    let mut command = Command::new(strace);
    command.args(["-f", "-q", "-e", "trace=open,openat,openat2", "-o"]);
    command
        .arg(&log)
        .arg(inner.get_program())
        .args(inner.get_args());
    feed(command, b"").expect(0);

    let log = fs::read_to_string(log).unwrap();
    assert!(
        log.contains("vmlinuz"),
        "the trace is not one of a boot:\n{log}"
    );
    let opened: Vec<&str> = log.lines().filter(|line| line.contains("kvm")).collect();
    assert!(opened.is_empty(), "{opened:?}");
}

#[test]
fn an_ordinary_user_runs_guests_from_an_appliance_that_is_there() {
    // whoever runs the tests has it after this
    guest(&["true"]).expect(0);
    let home = Home::new();
    copy(
        &user_cache().join("strata"),
        &home.directory.path().join("cache/strata"),
    );

    let mut command = home.run();
    command.args(["--", "sh", "-c", "id -u; exit 5"]);
    // root in the guest, whoever runs it
    assert_eq!(feed(command, b"").expect(5).text(), "0\n");
}

#[test]
fn files_that_a_guest_makes_in_a_folder_of_an_ordinary_user_are_that_users() {
    guest(&["true"]).expect(0);
    let home = Home::new();
    copy(
        &user_cache().join("strata"),
        &home.directory.path().join("cache/strata"),
    );
    let shared = home.directory.path().join("cache/shared");
    fs::create_dir(&shared).unwrap();
    let id = if is_root() {
        NOBODY
    } else {
        rustix::process::geteuid().as_raw()
    };
    if is_root() {
        chown(&shared, Some(NOBODY), Some(NOBODY)).unwrap();
    }

    let mut command = home.run();
    command.args(["-v", &format!("{}:/srv", shared.display()), "--"]);
    command.args(["sh", "-c"]);
    command.arg(
        "cd /srv; echo x >made; mkdir -m 700 dir; chown 0:0 made; chown 7 made 2>/dev/null || echo no
         stat -c '%u:%g' made dir .",
    );
    // The user is the guest's root.
    assert_eq!(feed(command, b"").expect(0).text(), "no\n0:0\n0:0\n0:0\n");

    for name in ["made", "dir"] {
        let made = fs::metadata(shared.join(name)).unwrap();
        assert_eq!(made.uid(), id, "{name}");
    }
}

#[test]
fn a_root_that_shares_passes_owners_through() {
    if !is_root() {
        eprintln!("skipped: not root");
        return;
    }
    let shared = tempfile::tempdir().unwrap();
    fs::write(shared.path().join("given"), "x").unwrap();
    chown(shared.path().join("given"), Some(1234), Some(77)).unwrap();
    let volume = format!("{}:/srv", shared.path().display());
    let line = "cd /srv; stat -c '%u:%g' given; echo x >made; chown 5:6 made; stat -c '%u:%g' made
        chmod 777 .; adduser -D -H -u 4321 me 2>/dev/null || echo me:x:4321:4321::/:/bin/sh >>/etc/passwd
        start-stop-daemon -S -c 4321:4321 -x /bin/touch -- /srv/own; stat -c '%u:%g' own";
    let mut command = run(&["-v", &volume]);
    command.args(["--", "sh", "-c", line]);
    let text = feed(command, b"").expect(0).text();
    assert_eq!(text, "1234:77\n5:6\n4321:4321\n");
    let made = fs::metadata(shared.path().join("made")).unwrap();
    assert_eq!((made.uid(), made.gid()), (5, 6));
}

#[test]
fn the_first_run_of_an_ordinary_user_builds_the_appliance() {
    let home = Home::new();
    let mut command = home.run();
    command.args(["--", "echo", "first"]);
    assert_eq!(feed(command, b"").expect(0).text(), "first\n");
    let appliances = fs::read_dir(home.directory.path().join("cache/strata/appliance")).unwrap();
    let manifests = appliances
        .filter(|entry| {
            entry
                .as_ref()
                .unwrap()
                .path()
                .join("manifest.json")
                .is_file()
        })
        .count();
    assert_eq!(manifests, 1);
}

/// The cache of whoever runs the tests.
fn user_cache() -> PathBuf {
    env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .unwrap_or_else(|| PathBuf::from(env::var_os("HOME").unwrap()).join(".cache"))
}

/// A home of its own for a user without rights: `nobody` where the tests run as root, else
/// whoever runs them.
struct Home {
    directory: tempfile::TempDir,
}

impl Home {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        // the target directory may be closed to others
        let program = directory.path().join("strata");
        fs::copy(STRATA, &program).unwrap();
        let cache = directory.path().join("cache");
        fs::create_dir(&cache).unwrap();
        if is_root() {
            chown(&cache, Some(NOBODY), Some(NOBODY)).unwrap();
        }
        Self { directory }
    }

    /// `strata run` as that user.
    fn run(&self) -> Command {
        let strata = self.directory.path().join("strata");
        let cache = self.directory.path().join("cache");
        let mut command = if is_root() {
            let mut command = Command::new(program("setpriv"));
            let id = NOBODY.to_string();
            command.args(["--reuid", &id, "--regid", &id, "--clear-groups", "--"]);
            command.arg(strata);
            command
        } else {
            eprintln!("not root: runs as the user of the tests");
            Command::new(strata)
        };
        let inner = run(&[] as &[&str]);
        command.args(inner.get_args());
        command.env("HOME", &cache).env("XDG_CACHE_HOME", &cache);
        command.current_dir(&cache);
        command
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    if is_root() {
        chown(to, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), &target).unwrap();
            if is_root() {
                chown(&target, Some(NOBODY), Some(NOBODY)).unwrap();
            }
        }
    }
}
