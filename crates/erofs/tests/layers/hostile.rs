//! Tars that nobody makes in good faith: an error, or an image without harm.

use std::os::unix::fs::MetadataExt;

use tar::EntryType;

use crate::reader::read;
use crate::{Tar, image};

/// The error that a tar gives.
fn error(tar: Tar) -> String {
    image(&tar.bytes()).unwrap_err().to_string()
}

#[test]
fn names_cannot_leave_the_layer() {
    for path in ["../x", "a/../../x", "..", "a/.."] {
        let said = error(Tar::new().file(path, b""));
        assert!(said.contains("'..'"), "{path}: {said}");
    }
    let found = Tar::new().file("/etc/x", b"1").file("//y", b"2").bytes();
    let found = read(&std::fs::read(image(&found).unwrap()).unwrap());
    assert_eq!(found["/etc/x"].content, b"1");
    assert_eq!(found["/y"].content, b"2");
}

#[test]
fn links_lead_to_files_of_the_layer_only() {
    for target in ["missing", "../etc/passwd", "d", "/", "d/missing", "f/x"] {
        let said = error(Tar::new().directory("d").file("f", b"").link("l", target));
        assert!(said.contains("entry"), "{target}: {said}");
    }
}

#[test]
fn symbolic_links_in_a_circle_end() {
    let said = error(
        Tar::new()
            .symlink("a", "b")
            .symlink("b", "a")
            .file("a/x", b""),
    );
    assert!(said.contains("too many symbolic links"), "{said}");
}

#[test]
fn a_file_is_no_directory() {
    assert!(error(Tar::new().file("f", b"").file("f/x", b"")).contains("is none"));
    assert!(error(Tar::new().file("/", b"").directory("d").symlink("./", "d")).contains("root"));
}

#[test]
fn markers_hide_names_only() {
    for path in [".wh.", ".wh...", "d/.wh.."] {
        assert!(
            error(Tar::new().file(path, b"")).contains("hides nothing"),
            "{path}"
        );
    }
}

#[test]
fn unknown_kinds_are_refused() {
    let said = error(Tar::new().add(EntryType::new(b'V'), "volume", "", b""));
    assert!(said.contains("kind"), "{said}");
}

#[test]
fn truncated_tars_are_errors() {
    let tar = Tar::new()
        .pax(&[("mtime", b"1")])
        .file("f", &[1; 5000])
        .bytes();
    let content = tar.len() - 1024 - 5120;
    for keep in [1, 512, 700, content - 1, content, content + 4999] {
        let said = image(&tar[..keep]).unwrap_err().to_string();
        assert!(said.contains("it ends within"), "{keep}: {said}");
    }
}

#[test]
fn sizes_that_cannot_be_are_errors() {
    for (key, value) in [
        ("size", &b"18446744073709551615"[..]),
        ("size", b"99999999999999999999"),
        ("uid", b"4294967296"),
        ("uid", b"-1"),
        ("gid", b"x"),
        ("mtime", b"soon"),
    ] {
        let tar = Tar::new().pax(&[(key, value)]).file("f", b"x").bytes();
        assert!(image(&tar).is_err(), "{key}");
    }
}

#[test]
fn maps_of_sparse_files_must_fit_them() {
    let major = ("GNU.sparse.major", &b"1"[..]);
    let minor = ("GNU.sparse.minor", &b"0"[..]);
    for (size, map) in [
        ("100", "1\n200\n5\n"),
        ("100", "2\n10\n5\n12\n5\n"),
        ("100", "1\n18446744073709551615\n5\n"),
        ("100", "99999999\n"),
        ("99999999999999999", "1\n0\n5\n"),
    ] {
        let mut content = map.as_bytes().to_vec();
        content.resize(512, 0);
        content.extend_from_slice(b"12345");
        let records = [major, minor, ("GNU.sparse.realsize", size.as_bytes())];
        let tar = Tar::new().pax(&records).file("f", &content).bytes();
        assert!(image(&tar).is_err(), "{map}");
    }
}

#[test]
fn a_huge_hole_takes_no_room() {
    let records = [
        ("GNU.sparse.major", &b"1"[..]),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.realsize", b"17592186044416"),
    ];
    let mut content = b"1\n8796093022208\n5\n".to_vec();
    content.resize(512, 0);
    content.extend_from_slice(b"12345");
    let tar = Tar::new().pax(&records).file("f", &content).bytes();

    let image = image(&tar).unwrap();
    assert!(image.as_file().metadata().unwrap().blocks() * 512 < 1 << 20);
}

#[test]
fn a_header_without_an_end_is_an_error() {
    let records = [
        ("GNU.sparse.major", &b"1"[..]),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.realsize", b"100"),
    ];
    let content = vec![b'1'; 20 << 20];
    let said = error(Tar::new().pax(&records).file("f", &content));
    assert!(said.contains("do not end"), "{said}");
}

#[test]
fn bytes_at_random_never_panic() {
    let tar = Tar::new()
        .pax(&[("mtime", b"1.5"), ("SCHILY.xattr.user.a", b"b")])
        .file("d/f", &[1; 700])
        .symlink("s", "d")
        .link("s/l", "d/f")
        .file("d/.wh.x", b"")
        .bytes();
    // xorshift, so that a failure comes back
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..20_000 {
        let mut bad = tar.clone();
        for _ in 0..3 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let at = (random >> 20) as usize % bad.len();
            bad[at] = random as u8;
            fix_checksum(&mut bad, at);
        }
        let file = tempfile::tempfile().unwrap();
        if let Ok(layer) = strata_erofs::Layer::read(&*bad, &file) {
            layer.finish([0; 16]).unwrap();
        }
    }
}

/// Makes the checksum of the record at `at` right again, if it is a header.
fn fix_checksum(tar: &mut [u8], at: usize) {
    let record = &mut tar[at / 512 * 512..][..512];
    if &record[257..262] == b"ustar" {
        record[148..156].fill(b' ');
        let sum: u32 = record.iter().map(|byte| u32::from(*byte)).sum();
        record[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
}
