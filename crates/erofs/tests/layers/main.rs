//! Layers made into file systems: what a tar has is what an image has. `fsck.erofs` and a small
//! reader of EROFS look at the images.
#![forbid(unsafe_code)]

mod hostile;
mod reader;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Command;

use strata_erofs::{Error, Layer, Replay};
use tar::{Builder, EntryType, Header};
use tempfile::NamedTempFile;

use crate::reader::{Found, read};

const UUID: [u8; 16] = [7; 16];

/// A tar of a layer in the making.
pub(crate) struct Tar(Builder<Vec<u8>>);

impl Tar {
    pub(crate) fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    /// Adds an entry: mode 0640, owner 1000:100, time 1 700 000 000.
    pub(crate) fn add(mut self, kind: EntryType, path: &str, link: &str, content: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o640);
        header.set_uid(1000);
        header.set_gid(100);
        header.set_mtime(1_700_000_000);
        header.set_size(content.len() as u64);
        header.set_device_major(8).unwrap();
        header.set_device_minor(300).unwrap();
        let name = header.as_mut_bytes();
        name[..path.len()].copy_from_slice(path.as_bytes());
        name[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        self.0.append(&header, content).unwrap();
        self
    }

    pub(crate) fn file(self, path: &str, content: &[u8]) -> Self {
        self.add(EntryType::Regular, path, "", content)
    }

    pub(crate) fn directory(self, path: &str) -> Self {
        self.add(EntryType::Directory, path, "", b"")
    }

    pub(crate) fn symlink(self, path: &str, target: &str) -> Self {
        self.add(EntryType::Symlink, path, target, b"")
    }

    pub(crate) fn link(self, path: &str, target: &str) -> Self {
        self.add(EntryType::Link, path, target, b"")
    }

    /// Adds PAX records for the next entry.
    pub(crate) fn pax(mut self, records: &[(&str, &[u8])]) -> Self {
        let records = records.iter().copied();
        self.0.append_pax_extensions(records).unwrap();
        self
    }

    pub(crate) fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }

    fn image(self) -> BTreeMap<String, Found> {
        let image = image(&self.bytes()).unwrap();
        read(&fs::read(image.path()).unwrap())
    }
}

/// The image of a tar, which `fsck.erofs` finds to be sound, and from which the tar can be had
/// back.
pub(crate) fn image(tar: &[u8]) -> Result<NamedTempFile, Error> {
    let image = NamedTempFile::new().unwrap();
    let mut record = Vec::new();
    let layer = Layer::read_recorded(tar, image.as_file(), &mut record)?;
    let summary = layer.finish(UUID)?;
    assert_eq!(summary.size, image.as_file().metadata().unwrap().len());
    let check = Command::new("fsck.erofs").arg(image.path()).output();
    let check = check.expect("fsck.erofs of erofs-utils, which 'cargo xtask test' installs");
    let said = String::from_utf8_lossy(&check.stderr);
    assert!(check.status.success(), "{said}");
    let mut again = Vec::new();
    let mut replay = Replay::new(&*record, image.as_file());
    replay.read_to_end(&mut again).unwrap();
    assert!(again == tar, "the tar comes back changed");
    Ok(image)
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at % 251 + 1) as u8).collect()
}

#[test]
fn files_of_every_size_keep_their_contents() {
    let sizes = [
        0,
        1,
        2047,
        2048,
        2049,
        4095,
        4096,
        4097,
        6144,
        6145,
        8192,
        3 << 20,
    ];
    let mut tar = Tar::new();
    for size in sizes {
        tar = tar.file(&format!("f{size}"), &pattern(size));
    }
    let found = tar.image();
    for size in sizes {
        assert!(
            found[&format!("/f{size}")].content == pattern(size),
            "{size}"
        );
    }
}

#[test]
fn an_entry_keeps_mode_owner_and_time() {
    let found = Tar::new()
        .pax(&[("mtime", b"-1.5"), ("uid", b"3000000")])
        .file("early", b"x")
        .file("plain", b"")
        .image();
    let plain = &found["/plain"];
    assert_eq!(plain.mode, 0o100_640);
    assert_eq!(plain.owner, (1000, 100));
    assert_eq!(plain.time, (1_700_000_000, 0));
    assert_eq!(plain.links, 1);
    assert_eq!(found["/early"].time, (-2, 500_000_000));
    assert_eq!(found["/early"].owner, (3_000_000, 100));
}

#[test]
fn every_kind_of_file_is_what_it_was() {
    let found = Tar::new()
        .directory("d/")
        .symlink("s", "../anywhere/at all")
        .add(EntryType::Char, "c", "", b"")
        .add(EntryType::Block, "b", "", b"")
        .add(EntryType::Fifo, "p", "", b"")
        .image();
    let modes = ["/d", "/s", "/c", "/b", "/p"].map(|path| found[path].mode >> 12);
    assert_eq!(modes, [0o4, 0o12, 0o2, 0o6, 0o1]);
    assert_eq!(found["/s"].content, b"../anywhere/at all");
    // major 8, minor 300 as Linux keeps them
    assert_eq!(found["/c"].place, 0x0010_082c);
}

#[test]
fn long_names_and_targets_are_kept() {
    let long = format!("{}/{}", "d".repeat(200), "f".repeat(200));
    let target = "t".repeat(3000);
    let found = Tar::new()
        .pax(&[("path", long.as_bytes()), ("linkpath", target.as_bytes())])
        .symlink("short", "t")
        .add(EntryType::GNULongName, "././@LongLink", "", b"gnu/long\0")
        .file("gnu", b"1")
        .image();
    assert_eq!(found[&format!("/{long}")].content, target.as_bytes());
    assert_eq!(found["/gnu/long"].content, b"1");
}

#[test]
fn names_of_a_hard_link_are_one_file() {
    let found = Tar::new()
        .file("a", b"shared")
        .link("d/b", "./a")
        .link("a", "a")
        .file("c", b"gone")
        .link("c", "/a")
        .image();
    assert_eq!(found["/a"], found["/d/b"]);
    assert_eq!(found["/a"], found["/c"]);
    assert_eq!(found["/a"].links, 3);
}

#[test]
fn parents_that_are_missing_are_made() {
    let found = Tar::new().file("a/b/c", b"x").directory("a/b").image();
    assert_eq!((found["/a"].mode, found["/a"].owner), (0o040_755, (0, 0)));
    assert_eq!(found["/a/b"].owner, (1000, 100));
    assert_eq!(found["/a/b/c"].content, b"x");
    assert_eq!(found["/a"].links, 3);
}

#[test]
fn later_entries_replace_earlier_ones() {
    let found = Tar::new()
        .file("x", b"old")
        .file("x", b"new")
        .file("d/inside", b"")
        .symlink("d", "x")
        .file("f", b"")
        .directory("f")
        .file("kept/inside", b"kept")
        .directory("kept")
        .image();
    assert_eq!(found["/x"].content, b"new");
    assert_eq!(found["/d"].content, b"x");
    assert_eq!(found["/f"].mode >> 12, 0o4);
    assert_eq!(found["/kept/inside"].content, b"kept");
    assert_eq!(found.len(), 6, "{:?}", found.keys());
}

#[test]
fn symbolic_links_on_the_way_are_followed_within_the_layer() {
    let found = Tar::new()
        .symlink("lib", "usr/lib")
        .file("lib/a", b"a")
        .symlink("usr/up", "../../../..")
        .file("usr/up/b", b"b")
        .symlink("abs", "/usr")
        .file("abs/c", b"c")
        .image();
    assert_eq!(found["/usr/lib/a"].content, b"a");
    assert_eq!(found["/b"].content, b"b");
    assert_eq!(found["/usr/c"].content, b"c");
}

#[test]
fn whiteouts_are_what_overlayfs_takes_for_them() {
    let found = Tar::new()
        .file("d/.wh.gone", b"")
        .file("o/.wh..wh..opq", b"")
        .file("o/own", b"")
        .file(".wh..wh.plnk", b"")
        .image();
    assert_eq!(
        (found["/d/gone"].mode, found["/d/gone"].place),
        (0o020_000, 0)
    );
    assert_eq!(found["/o"].xattrs["trusted.overlay.opaque"], b"y");
    assert!(found["/d"].xattrs.is_empty());
    assert_eq!(found.len(), 5, "{:?}", found.keys());
}

#[test]
fn a_whiteout_hides_nothing_of_its_own_layer() {
    let found = Tar::new()
        .file("a", b"here")
        .file(".wh.a", b"")
        .file(".wh.b", b"")
        .file("b", b"here")
        .directory("c")
        .file(".wh.c", b"")
        .file(".wh.d", b"")
        .file("d/inside", b"here")
        .image();
    for path in ["/a", "/b", "/d/inside"] {
        assert_eq!(found[path].content, b"here");
    }
    // what lower layers have in directories of these names is hidden
    for path in ["/c", "/d"] {
        assert_eq!(found[path].xattrs["trusted.overlay.opaque"], b"y");
    }
}

#[test]
fn attributes_are_kept_but_for_those_of_overlayfs() {
    let found = Tar::new()
        .pax(&[
            ("SCHILY.xattr.user.note", b"some\0 bytes"),
            ("SCHILY.xattr.security.capability", b"\x01\0\0\x02"),
            ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
            ("SCHILY.xattr.system.unknown", b"x"),
        ])
        .file("f", &pattern(100))
        .image();
    let xattrs = &found["/f"].xattrs;
    assert_eq!(xattrs["user.note"], b"some\0 bytes");
    assert_eq!(xattrs["security.capability"], b"\x01\0\0\x02");
    assert_eq!(xattrs.len(), 2);
    assert_eq!(found["/f"].content, pattern(100));
}

#[test]
fn a_directory_of_many_names_fills_several_blocks() {
    let mut tar = Tar::new();
    let names: Vec<String> = (0..2000).map(|n| format!("/d/{n:0>40}")).collect();
    for name in names.iter().rev() {
        tar = tar.file(name, name.as_bytes());
    }
    let found = tar.image();
    for name in &names {
        assert_eq!(found[name].content, name.as_bytes());
    }
}

#[test]
fn sparse_files_in_all_forms_of_gnu_tar_take_room_for_their_data_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sparse");
    let file = fs::File::create(&path).unwrap();
    file.set_len(40 << 20).unwrap();
    let mut expected = vec![0; 40 << 20];
    for at in [0, 5000, 1 << 20, (3 << 20) + 123, (40 << 20) - 4096] {
        let data = pattern(4096);
        file.write_all_at(&data, at as u64).unwrap();
        expected[at..at + data.len()].copy_from_slice(&data);
    }
    for format in [
        &["--format=gnu"][..],
        &["--format=pax", "--sparse-version=0.0"],
        &["--format=pax", "--sparse-version=0.1"],
        &["--format=pax", "--sparse-version=1.0"],
    ] {
        let tar = Command::new("tar")
            .args(["--sparse", "-C"])
            .arg(directory.path())
            .args(format)
            .args(["-cf", "-", "sparse"])
            .output()
            .unwrap();
        assert!(tar.status.success() && tar.stdout.len() < 1 << 20);
        let image = image(&tar.stdout).unwrap();
        let bytes = fs::read(image.path()).unwrap();
        assert!(bytes.len() < 1 << 20, "{format:?}: {}", bytes.len());
        assert!(read(&bytes)["/sparse"].content == expected, "{format:?}");
    }
}

#[test]
fn zeros_in_plain_files_take_no_room_on_the_host() {
    let image = image(&Tar::new().file("zeros", &vec![0; 16 << 20]).bytes()).unwrap();
    let metadata = image.as_file().metadata().unwrap();
    assert!(metadata.len() > 16 << 20);
    assert!(metadata.blocks() * 512 < 1 << 20, "{}", metadata.blocks());
}

#[test]
fn the_same_tar_gives_the_same_bytes() {
    let tar = Tar::new().file("b", b"1").file("a", &pattern(9000)).bytes();
    let images = [(); 2].map(|()| fs::read(image(&tar).unwrap().path()).unwrap());
    assert!(images[0] == images[1]);
    assert_eq!(images[0][1024 + 48..][..16], UUID);
}

#[test]
fn a_tar_without_its_end_marker_is_read() {
    let mut tar = Tar::new().file("a", b"1").bytes();
    tar.truncate(tar.len() - 1024);
    assert_eq!(
        read(&fs::read(image(&tar).unwrap()).unwrap())["/a"].content,
        b"1"
    );
    tar.write_all(&[0; 512]).unwrap();
    assert!(image(&tar).is_ok());
}
