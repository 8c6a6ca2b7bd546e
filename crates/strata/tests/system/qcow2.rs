//! qcow2 images: made and looked at by `strata disk`, written by guests, and whole to `qemu-img`,
//! also when the machine is killed.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tempfile::TempDir;

use crate::guest::{Ended, STRATA, Slot, guest_with, run};
use crate::host::program;

/// How often a machine is killed, unless the environment says otherwise.
const KILLS: u32 = 2;

struct Folder(TempDir);

impl Folder {
    /// With `base.qcow2`, an ext4 file system of 64 MiB.
    fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        let raw = folder.path("base.raw");
        File::create(&raw).unwrap().set_len(64 << 20).unwrap();
        let mut mke2fs = Command::new(program("mke2fs"));
        mke2fs.args(["-q", "-F", "-t", "ext4"]).arg(&raw);
        assert!(mke2fs.status().unwrap().success());
        folder
            .disk(&["convert", "base.raw", "base.qcow2"])
            .expect(0);
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `strata disk`, in the folder.
    fn disk(&self, arguments: &[&str]) -> Ended {
        let mut command = Command::new(STRATA);
        command
            .arg("disk")
            .args(arguments)
            .current_dir(self.0.path());
        command.output().unwrap().into()
    }

    fn qemu_img(&self, arguments: &[&str]) -> String {
        let mut command = Command::new(program("qemu-img"));
        command.args(arguments).current_dir(self.0.path());
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{arguments:?}: {text}");
        text
    }

    /// Runs a script in a guest with the file system of an image at /mnt.
    fn guest(&self, image: &str, script: &str) -> Ended {
        let path = self.path(image);
        let script = format!("mount -t ext4 /dev/vda /mnt; {script}; umount /mnt");
        guest_with(
            &["--disk", path.to_str().unwrap()],
            &["sh", "-ec", &script],
            b"",
        )
    }

    /// A file of the file system in an image, which is made clean first.
    fn read_back(&self, image: &str, file: &str) -> String {
        let raw = self.path("read-back.raw");
        let _ = fs::remove_file(&raw);
        self.qemu_img(&["convert", "-O", "raw", image, "read-back.raw"]);
        let e2fsck = Command::new(program("e2fsck"))
            .arg("-fy")
            .arg(&raw)
            .output();
        // 0: nothing to do, 1: the journal was replayed
        let e2fsck = e2fsck.unwrap();
        assert!(e2fsck.status.code().unwrap() <= 1, "{e2fsck:?}");
        let request = format!("cat {file}");
        let debugfs = Command::new(program("debugfs"))
            .args(["-R", &request])
            .arg(&raw)
            .output();
        String::from_utf8(debugfs.unwrap().stdout).unwrap()
    }
}

#[test]
fn a_clone_keeps_what_a_guest_writes_until_it_is_committed() {
    let folder = Folder::new();
    let base = fs::read(folder.path("base.qcow2")).unwrap();
    folder
        .disk(&["clone", "base.qcow2", "clone.qcow2"])
        .expect(0);
    folder
        .guest("clone.qcow2", "echo kept >/mnt/note")
        .expect(0);
    assert!(fs::read(folder.path("base.qcow2")).unwrap() == base);
    assert_eq!(folder.read_back("clone.qcow2", "/note"), "kept\n");
    folder.qemu_img(&["check", "clone.qcow2"]);

    folder.disk(&["commit", "clone.qcow2"]).expect(0);

    folder.disk(&["check", "clone.qcow2"]).expect(0);
    folder.disk(&["check", "base.qcow2"]).expect(0);
    folder.qemu_img(&["check", "base.qcow2"]);
    assert_eq!(folder.read_back("base.qcow2", "/note"), "kept\n");
    let seen = folder.guest("clone.qcow2", "cat /mnt/note").expect(0);
    assert_eq!(seen.text(), "kept\n");
}

#[test]
fn a_snapshot_brings_back_what_a_guest_removed() {
    let folder = Folder::new();
    folder.guest("base.qcow2", "echo one >/mnt/note").expect(0);
    folder
        .disk(&["snapshot", "create", "base.qcow2", "before"])
        .expect(0);
    folder.guest("base.qcow2", "rm /mnt/note").expect(0);
    let listed = folder
        .disk(&["snapshot", "ls", "base.qcow2", "--output", "json"])
        .expect(0);
    assert!(listed.text().contains("\"before\""), "{}", listed.text());
    folder
        .disk(&["snapshot", "apply", "base.qcow2", "before"])
        .expect(0);
    let seen = folder.guest("base.qcow2", "cat /mnt/note").expect(0);
    assert_eq!(seen.text(), "one\n");
    folder.qemu_img(&["check", "base.qcow2"]);
}

#[test]
fn images_are_told_and_refused_in_words_that_help() {
    let folder = Folder::new();
    let info = folder
        .disk(&["info", "base.qcow2", "--output", "json"])
        .expect(0);
    for word in ["\"qcow2\"", "\"cluster_size\": 65536", "\"size\": 67108864"] {
        assert!(info.text().contains(word), "{}", info.text());
    }
    let exists = folder.disk(&["create", "base.qcow2", "1G"]).expect(125);
    assert!(
        exists.stderr.contains("exists already"),
        "{}",
        exists.stderr
    );
    let small = folder.disk(&["resize", "base.qcow2", "1M"]).expect(125);
    assert!(small.stderr.contains("--shrink"), "{}", small.stderr);
    let raw = folder.disk(&["check", "base.raw"]).expect(125);
    assert!(raw.stderr.contains("no qcow2 image"), "{}", raw.stderr);

    let mut image = fs::read(folder.path("base.qcow2")).unwrap();
    // a refcount too many
    image[2 * 65536 + 40_001] = 1;
    fs::write(folder.path("leaky.qcow2"), image).unwrap();
    folder.disk(&["check", "leaky.qcow2"]).expect(3);
    folder
        .disk(&["check", "--repair", "leaks", "leaky.qcow2"])
        .expect(0);
    folder.disk(&["check", "leaky.qcow2"]).expect(0);
}

/// Numbers are appended to a file, each durable before it is told.
const APPENDS: &str = "mount -t ext4 /dev/vda /mnt
    for i in $(seq 100000); do
        echo $i >>/mnt/log
        dd if=/dev/urandom of=/mnt/noise bs=4k count=20 seek=$((i * 37 % 2000)) conv=notrunc 2>/dev/null
        sync
        echo $i
    done";

#[test]
fn an_encrypted_disk_is_written_by_a_guest_and_secret_on_the_host() {
    let folder = Folder::new();
    fs::write(folder.path("key"), "a long passphrase").unwrap();
    fs::write(folder.path("other"), "a wrong passphrase").unwrap();
    let encrypted = ["convert", "base.qcow2", "secret.qcow2", "--encrypt", "key"];
    folder.disk(&encrypted).expect(0);
    let told = folder.disk(&["info", "secret.qcow2"]).expect(0).text();
    assert!(told.contains("LUKS, aes-256-xts-plain64, sha256"), "{told}");

    let disk = |key: &str| {
        let [image, key] = ["secret.qcow2", key].map(|name| folder.path(name));
        format!("{},key-file={}", image.display(), key.display())
    };
    let script = "mount -t ext4 /dev/vda /mnt; echo hidden-words >/mnt/file; umount /mnt";
    guest_with(&["--disk", &disk("key")], &["sh", "-ec", script], b"").expect(0);
    let bytes = fs::read(folder.path("secret.qcow2")).unwrap();
    assert!(!bytes.windows(12).any(|part| part == b"hidden-words"));

    let refused = guest_with(&["--disk", &disk("other")], &["true"], b"");
    assert!(refused.stderr.contains("passphrase"), "{}", refused.stderr);
    let refused = folder.disk(&["convert", "secret.qcow2", "plain.qcow2"]);
    assert!(refused.stderr.contains("--key-file"), "{}", refused.stderr);
    let plain = [
        "convert",
        "secret.qcow2",
        "plain.qcow2",
        "--key-file",
        "key",
    ];
    folder.disk(&plain).expect(0);
    assert_eq!(folder.read_back("plain.qcow2", "file"), "hidden-words\n");
}

#[test]
fn what_a_guest_was_told_is_durable_survives_the_kill_of_its_machine() {
    let kills = std::env::var("STRATA_TEST_KILLS").map_or(KILLS, |n| n.parse().unwrap());
    let folder = Folder::new();
    for kill in 1..=kills {
        let _ = fs::remove_file(folder.path("clone.qcow2"));
        folder
            .disk(&["clone", "base.qcow2", "clone.qcow2"])
            .expect(0);
        let told = kill_while_appending(&folder.path("clone.qcow2"));

        folder.disk(&["check", "clone.qcow2"]).expect(0);
        folder.qemu_img(&["check", "clone.qcow2"]);
        let log = folder.read_back("clone.qcow2", "/log");
        let lines: Vec<u32> = log.lines().map_while(|line| line.parse().ok()).collect();
        assert!(
            lines.len() as u32 >= told,
            "{told} were told, {} are there",
            lines.len()
        );
        assert!(lines.iter().zip(1..).all(|(line, number)| *line == number));
        // the next machine goes on with it, and leaves it whole
        folder.guest("clone.qcow2", "rm /mnt/log").expect(0);
        folder.qemu_img(&["check", "clone.qcow2"]);
        eprintln!("kill {kill} of {kills}, after {told}");
    }
}

/// Returns the last number that the guest told.
fn kill_while_appending(image: &Path) -> u32 {
    let _slot = Slot::take();
    let mut child = run(&["--disk", image.to_str().unwrap()])
        .args(["--", "sh", "-ec", APPENDS])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap())
        .lines()
        .map_while(Result::ok);
    let mut told = lines.next().unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let wait = u64::from(now.subsec_nanos()) / 7 % 1500;
    std::thread::sleep(Duration::from_millis(wait));
    child.kill().unwrap();
    for line in lines {
        told = line;
    }
    child.wait().unwrap();
    told.parse().unwrap()
}

/// A loop device, which is given back in the end.
struct Loop(String);

impl Loop {
    /// None where there are no loop devices, or not for this user.
    fn new(file: &Path) -> Option<Self> {
        let losetup = Command::new(program("losetup"))
            .args(["-f", "--show"])
            .arg(file)
            .output();
        let output = losetup.ok()?;
        let name = String::from_utf8(output.stdout).ok()?.trim().to_owned();
        (output.status.success() && !name.is_empty()).then_some(Self(name))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new(program("losetup"))
            .args(["-d", &self.0])
            .status();
    }
}

#[test]
fn a_real_disk_is_captured_run_and_restored() {
    let folder = Folder::new();
    let Some(disk) = Loop::new(&folder.path("base.raw")) else {
        eprintln!("skipped: no loop devices here");
        return;
    };
    folder
        .disk(&["capture", &disk.0, "captured.qcow2"])
        .expect(0);
    folder.qemu_img(&["check", "captured.qcow2"]);
    folder.qemu_img(&["compare", "captured.qcow2", "base.raw"]);
    folder
        .guest("captured.qcow2", "echo ran >/mnt/note")
        .expect(0);
    drop(disk);

    File::create(folder.path("target.raw"))
        .unwrap()
        .set_len(80 << 20)
        .unwrap();
    let disk = Loop::new(&folder.path("target.raw")).unwrap();
    let asked = folder
        .disk(&["restore", "captured.qcow2", &disk.0])
        .expect(125);
    assert!(asked.stderr.contains("--yes"), "{}", asked.stderr);
    folder
        .disk(&["restore", "--yes", "captured.qcow2", &disk.0])
        .expect(0);
    drop(disk);
    let target = fs::read(folder.path("target.raw")).unwrap();
    fs::write(folder.path("target.raw"), &target[..64 << 20]).unwrap();
    assert_eq!(folder.read_back("target.raw", "/note"), "ran\n");

    let file = folder
        .disk(&["restore", "--yes", "captured.qcow2", "new.raw"])
        .expect(125);
    assert!(!folder.path("new.raw").exists(), "{}", file.stderr);
}
