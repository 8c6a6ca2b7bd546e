//! Disks: what the guest writes is a clean file system on the host, and what it may not
//! write stays as it is.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::guest::{Ended, guest_with};
use crate::host::program;

/// An ext4 image, with the files of `content` in it.
fn ext4(megabytes: u64, content: Option<&Path>) -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    File::create(&image)
        .unwrap()
        .set_len(megabytes << 20)
        .unwrap();
    let mut mke2fs = Command::new(program("mke2fs"));
    mke2fs.args(["-q", "-F", "-t", "ext4"]);
    if let Some(content) = content {
        mke2fs.arg("-d").arg(content);
    }
    assert!(mke2fs.arg(&image).status().unwrap().success());
    (directory, image)
}

/// A shell script in the guest with one disk.
fn with_disk(disk: &str, script: &str) -> Ended {
    guest_with(&["--disk", disk], &["sh", "-ec", script], b"")
}

/// An ext4 image with the files of `content`, for programs to be run from.
pub(crate) fn image_of(content: &Path) -> (TempDir, PathBuf) {
    ext4(64, Some(content))
}

#[test]
fn what_the_guest_writes_is_clean_and_readable_on_the_host() {
    let (directory, image) = ext4(64, None);
    let script = "mount -t ext4 /dev/vda /mnt
        mkdir /mnt/many
        dd if=/dev/urandom of=/mnt/random bs=64k count=200 2>/dev/null
        for i in $(seq 500); do echo file $i >/mnt/many/$i; done
        rm /mnt/many/*7
        sync
        sha256sum </mnt/random
        umount /mnt";
    let ended = with_disk(image.to_str().unwrap(), script).expect(0);

    let check = Command::new(program("e2fsck"))
        .args(["-f", "-n"])
        .arg(&image)
        .output()
        .unwrap();
    assert!(
        check.status.success(),
        "{}",
        String::from_utf8_lossy(&check.stdout)
    );
    let random = read_back(&image, "/random", directory.path());
    assert_eq!(random.len(), 200 * 65536);
    assert_eq!(
        sha256(&random, directory.path()),
        ended.text().split_once(' ').unwrap().0
    );
    assert_eq!(
        read_back(&image, "/many/42", directory.path()),
        b"file 42\n"
    );
    assert!(read_back(&image, "/many/47", directory.path()).is_empty());
}

#[test]
fn a_disk_keeps_its_contents_from_one_guest_to_the_next() {
    let (_directory, image) = ext4(16, None);
    let disk = image.to_str().unwrap();
    // no umount: the shutdown of the appliance leaves it clean
    with_disk(disk, "mount -t ext4 /dev/vda /mnt; echo kept >/mnt/note").expect(0);
    let ended = with_disk(disk, "mount -t ext4 -o ro /dev/vda /mnt; cat /mnt/note").expect(0);
    assert_eq!(ended.text(), "kept\n");
}

#[test]
fn a_read_only_disk_can_be_read_and_is_never_changed() {
    let (_directory, image) = ext4(16, None);
    let before = fs::read(&image).unwrap();
    let disk = format!("{},ro", image.to_str().unwrap());
    let script = "mount -t ext4 -o ro,noload /dev/vda /mnt; ls /mnt; umount /mnt
        cat /sys/block/vda/ro
        if dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=fsync 2>/dev/null; then echo written; fi";
    let ended = with_disk(&disk, script).expect(0);
    assert_eq!(ended.text(), "lost+found\n1\n");
    assert!(fs::read(&image).unwrap() == before, "the image changed");
}

#[test]
fn raw_sectors_are_where_the_guest_put_them() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("raw.img");
    File::create(&image).unwrap().set_len(8 << 20).unwrap();
    let script = "blockdev --getsize64 /dev/vda
        printf first | dd of=/dev/vda conv=notrunc 2>/dev/null
        printf last | dd of=/dev/vda bs=512 seek=16383 conv=notrunc 2>/dev/null
        sync";
    let ended = with_disk(image.to_str().unwrap(), script).expect(0);
    assert_eq!(ended.text().trim(), (8 << 20).to_string());
    let bytes = fs::read(&image).unwrap();
    assert_eq!(bytes.len(), 8 << 20);
    assert!(bytes.starts_with(b"first\0"));
    assert!(bytes[16383 * 512..].starts_with(b"last\0"));
}

#[test]
fn discarded_blocks_are_given_back_to_the_host() {
    use std::os::unix::fs::MetadataExt;
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("raw.img");
    fs::write(&image, vec![7; 8 << 20]).unwrap();
    let before = fs::metadata(&image).unwrap().blocks();
    with_disk(image.to_str().unwrap(), "blkdiscard /dev/vda").expect(0);
    let after = fs::metadata(&image).unwrap();
    assert_eq!(after.len(), 8 << 20);
    assert!(
        after.blocks() < before / 2,
        "{} of {before} blocks",
        after.blocks()
    );
}

#[test]
fn several_disks_keep_their_order() {
    let directory = tempfile::tempdir().unwrap();
    let mut options = Vec::new();
    for name in ["one", "two", "three"] {
        let path = directory.path().join(name);
        let mut bytes = name.as_bytes().to_vec();
        bytes.resize(4096, b'\n');
        fs::write(&path, bytes).unwrap();
        options.extend(["--disk".to_owned(), path.to_str().unwrap().to_owned()]);
    }
    let words = ["sh", "-c", "head -qn1 /dev/vda /dev/vdb /dev/vdc"];
    let ended = guest_with(&options, &words, b"").expect(0);
    assert_eq!(ended.text(), "one\ntwo\nthree\n");
}

#[test]
fn a_disk_that_cannot_be_used_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let odd = directory.path().join("odd.img");
    fs::write(&odd, vec![0; 1000]).unwrap();
    for path in ["/no/such/disk", odd.to_str().unwrap()] {
        let ended = with_disk(path, "true").expect(125);
        assert!(ended.stderr.contains(path), "{}", ended.stderr);
    }
}

#[test]
fn a_disk_in_use_is_refused_to_a_second_machine() {
    let (_directory, image) = ext4(16, None);
    let disk = image.to_str().unwrap().to_owned();
    let lock = File::open(&image).unwrap();
    lock.lock().unwrap();
    let ended = with_disk(&disk, "true").expect(125);
    assert!(ended.stderr.contains(&disk), "{}", ended.stderr);
}

fn read_back(image: &Path, file: &str, directory: &Path) -> Vec<u8> {
    let out = directory.join("read-back");
    fs::write(&out, b"").unwrap();
    let request = format!("dump {file} {}", out.display());
    let debugfs = Command::new(program("debugfs"))
        .args(["-R", &request])
        .arg(image)
        .output();
    assert!(debugfs.unwrap().status.success());
    fs::read(out).unwrap()
}

fn sha256(data: &[u8], directory: &Path) -> String {
    let file = directory.join("hashed");
    fs::write(&file, data).unwrap();
    let output = Command::new("sha256sum").arg(&file).output().unwrap();
    String::from_utf8(output.stdout)
        .unwrap()
        .split_once(' ')
        .unwrap()
        .0
        .to_owned()
}
