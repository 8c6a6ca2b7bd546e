//! A single file: what is beside it is not there, and nothing takes its place.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};

use crate::client::{Client, ROOT, op};
use crate::{BAD_NAMES, fails};

/// What the file is called.
const NAME: &[u8] = strata_share::NAME.as_bytes();

#[test]
fn a_single_file_is_read_and_written() {
    let mut client = Client::of_file(false);
    let file = client.found(NAME);

    let handle = client.open(file, libc::O_RDWR).handle();
    assert_eq!(client.read(file, handle, 0, 100).data, b"before");
    assert_eq!(client.write(file, handle, 6, b" and after").error, 0);
    assert_eq!(fs::read(client.path("a")).unwrap(), b"before and after");
    assert_eq!(client.truncate(file, 3).error, 0);
    assert_eq!(client.chmod(file, 0o640).error, 0);

    assert_eq!(fs::read(client.path("a")).unwrap(), b"bef");
    assert_eq!(
        fs::metadata(client.path("a")).unwrap().mode() & 0o7777,
        0o640
    );
}

#[test]
fn a_single_file_that_is_read_only_stays_as_it_is() {
    let mut client = Client::of_file(true);
    let file = client.found(NAME);

    let handle = client.open(file, libc::O_RDONLY).handle();
    assert_eq!(client.read(file, handle, 0, 100).data, b"before");
    fails(&client.open(file, libc::O_WRONLY), libc::EROFS);
    fails(&client.write(file, handle, 0, b"x"), libc::EROFS);
    fails(&client.truncate(file, 0), libc::EROFS);
    fails(&client.chmod(file, 0o777), libc::EROFS);

    assert_eq!(fs::read(client.path("a")).unwrap(), b"before");
}

#[test]
fn nothing_is_found_or_made_beside_a_single_file_or_in_its_place() {
    let mut client = Client::of_file(false);
    symlink("../secret", client.path("link")).unwrap();
    let file = client.found(NAME);

    for name in [&b"a"[..], b"b", b"link", b"new"].iter().chain(&BAD_NAMES) {
        fails(&client.lookup(ROOT, name), libc::ENOENT);
    }
    for name in [NAME, b"a", b"b", b"new", b"../new"] {
        let text = [name, b"\0"].concat();
        fails(&client.ask(op::UNLINK, ROOT, &[&text]), libc::EPERM);
        fails(&client.ask(op::RMDIR, ROOT, &[&text]), libc::EPERM);
        fails(&client.mkdir(ROOT, name, 0o755), libc::EPERM);
        fails(
            &client.mknod(ROOT, name, libc::S_IFREG | 0o644),
            libc::EPERM,
        );
        fails(&client.create(ROOT, name, libc::O_RDWR, 0o644), libc::EPERM);
        fails(&client.symlink(ROOT, name, b"target"), libc::EPERM);
        fails(&client.rename(ROOT, name, ROOT, b"other"), libc::EPERM);
        fails(&client.rename(ROOT, b"other", ROOT, name), libc::EPERM);
        fails(&client.link(file, ROOT, name), libc::EPERM);
    }
    fails(&client.chmod(ROOT, 0o777), libc::EPERM);
    fails(&client.open(ROOT, libc::O_RDONLY), libc::EISDIR);
    fails(&client.open(file + 1, libc::O_RDONLY), libc::EBADF);
    fails(&client.opendir(file), libc::ENOTDIR);
    fails(&client.lookup(file, b"a"), libc::ENOTDIR);

    assert_eq!(client.names(), ["a", "b", "link"]);
    assert_eq!(fs::read(client.path("b")).unwrap(), b"before");
}

#[test]
fn a_single_file_that_is_replaced_on_the_host_stays_what_it_was() {
    let mut client = Client::of_file(false);
    let file = client.found(NAME);
    fs::rename(client.path("b"), client.path("a")).unwrap();
    fs::write(client.path("a"), "another").unwrap();

    let file_again = client.found(NAME);

    assert_eq!(file, file_again);
    let handle = client.open(file, libc::O_RDONLY).handle();
    assert_eq!(client.read(file, handle, 0, 100).data, b"before");
}
