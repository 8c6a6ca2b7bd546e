//! The server as a hostile guest sees it: raw requests over a socket, without a sandbox around it,
//! so that what keeps them in the folder here is the server alone.

mod client;
mod single;

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rustix::fs::{CWD, RenameFlags, renameat_with};

use client::{Client, ROOT, Reply, op};

/// Names that lead, or might lead, out of a directory, or that no directory has.
const BAD_NAMES: [&[u8]; 9] = [
    b"",
    b".",
    b"..",
    b"/",
    b"a/b",
    b"../secret",
    b"/etc/passwd",
    b"./a",
    b"a/../../secret",
];

/// Whether a reply is an error of this number.
#[track_caller]
fn fails(reply: &Reply, error: i32) {
    assert_eq!(reply.error, -error);
}

#[test]
fn no_name_leads_out_of_a_directory() {
    let mut client = Client::new(false);
    client.make("a/b", "x");
    let below = client.lookup(ROOT, b"a").node();
    for parent in [ROOT, below] {
        for name in BAD_NAMES {
            let text = [name, b"\0"].concat();
            fails(&client.ask(op::LOOKUP, parent, &[&text]), libc::EINVAL);
            fails(&client.ask(op::UNLINK, parent, &[&text]), libc::EINVAL);
            fails(&client.ask(op::RMDIR, parent, &[&text]), libc::EINVAL);
            fails(&client.mkdir(parent, name, 0o755), libc::EINVAL);
            fails(
                &client.mknod(parent, name, libc::S_IFREG | 0o644),
                libc::EINVAL,
            );
            fails(
                &client.create(parent, name, libc::O_RDWR, 0o644),
                libc::EINVAL,
            );
            fails(&client.symlink(parent, name, b"target"), libc::EINVAL);
            fails(&client.rename(parent, name, parent, b"new"), libc::EINVAL);
            fails(&client.rename(ROOT, b"a", parent, name), libc::EINVAL);
            fails(&client.link(below, parent, name), libc::EINVAL);
        }
    }
    assert_eq!(fs::read(client.beside("secret")).unwrap(), b"without");
    assert_eq!(client.names(), ["a"]);
}

#[test]
fn a_name_that_is_too_long_is_one() {
    let mut client = Client::new(false);
    for length in [256, 4096, 100_000] {
        let name = vec![b'n'; length];
        let text = [&name[..], b"\0"].concat();
        fails(&client.ask(op::LOOKUP, ROOT, &[&text]), libc::ENAMETOOLONG);
        fails(&client.mkdir(ROOT, &name, 0o755), libc::ENAMETOOLONG);
    }
    assert_eq!(client.mkdir(ROOT, &[b'n'; 255], 0o755).error, 0);
}

#[test]
fn a_name_ends_at_its_first_nul_or_is_none() {
    let mut client = Client::new(false);
    client.make("a", "x");
    assert_eq!(client.ask(op::LOOKUP, ROOT, &[b"a\0../secret\0"]).error, 0);
    for text in [&b""[..], b"a", b"..", b"a/b"] {
        assert_ne!(client.ask(op::LOOKUP, ROOT, &[text]).error, 0, "{text:?}");
        assert_ne!(client.ask(op::UNLINK, ROOT, &[text]).error, 0, "{text:?}");
    }
    assert_eq!(client.names(), ["a"]);
}

#[test]
fn links_are_told_and_never_followed() {
    let mut client = Client::new(false);
    let secret = client.beside("secret");
    symlink(&secret, client.path("absolute")).unwrap();
    symlink("../secret", client.path("up")).unwrap();
    symlink("/proc/self/root/etc", client.path("magic")).unwrap();
    symlink("..", client.path("parent")).unwrap();
    for name in ["absolute", "up", "magic", "parent"] {
        let found = client.lookup(ROOT, name.as_bytes());
        assert_eq!(found.mode() & libc::S_IFMT, libc::S_IFLNK, "{name}");
        let node = found.node();
        // It opens as nothing, has nothing in it, and changes nothing of what it points to.
        assert_ne!(client.open(node, libc::O_RDWR).error, 0, "{name}");
        assert_ne!(client.opendir(node).error, 0, "{name}");
        assert_ne!(client.ask(op::LOOKUP, node, &[b"secret\0"]).error, 0);
        let made = client.create(node, b"new", libc::O_RDWR, 0o644);
        assert_ne!(made.error, 0, "{name}");
        assert_ne!(client.truncate(node, 0).error, 0, "{name}");
        // Made anew over it, it is still the link.
        let made = client.create(ROOT, name.as_bytes(), libc::O_RDWR | libc::O_TRUNC, 0o600);
        assert_ne!(made.error, 0, "{name}");
        let _ = client.chmod(node, 0o777);
    }
    let up = client.found(b"up");
    let told = client.ask(op::READLINK, up, &[]);
    assert_eq!(told.data, b"../secret");
    assert_eq!(fs::read(&secret).unwrap(), b"without");
    assert_eq!(fs::metadata(&secret).unwrap().mode() & 0o777, 0o600);
}

#[test]
fn a_directory_that_becomes_a_link_between_two_requests_leads_nowhere() {
    let mut client = Client::new(false);
    client.make("dir/inner", "x");
    let node = client.lookup(ROOT, b"dir").node();
    fs::rename(client.path("dir"), client.path("old")).unwrap();
    symlink("..", client.path("dir")).unwrap();

    // The node is still the directory that it was.
    assert_eq!(client.ask(op::LOOKUP, node, &[b"inner\0"]).error, 0);
    fails(&client.ask(op::LOOKUP, node, &[b"secret\0"]), libc::ENOENT);
    let link = client.lookup(ROOT, b"dir").node();
    assert_ne!(client.ask(op::LOOKUP, link, &[b"secret\0"]).error, 0);
}

#[test]
fn renames_during_the_walk_lead_nowhere() {
    let mut client = Client::new(false);
    client.make("dir/inner", "x");
    symlink("..", client.path("link")).unwrap();
    let (dir, link) = (client.path("dir"), client.path("link"));
    let done = AtomicBool::new(false);
    let (mut seen, mut reached) = ([0; 2], 0);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                renameat_with(CWD, &dir, CWD, &link, RenameFlags::EXCHANGE).unwrap();
            }
        });
        for _ in 0..3000 {
            let found = client.lookup(ROOT, b"dir");
            if found.error != 0 {
                continue;
            }
            seen[usize::from(found.mode() & libc::S_IFMT == libc::S_IFLNK)] += 1;
            let node = found.node();
            reached += u32::from(client.ask(op::LOOKUP, node, &[b"secret\0"]).error == 0);
            let _ = client.create(node, b"planted", libc::O_RDWR, 0o600);
            let _ = client.ask(op::UNLINK, node, &[b"secret\0"]);
        }
        done.store(true, Ordering::Relaxed);
    });
    assert!(seen.iter().all(|times| *times > 0), "{seen:?}");
    assert_eq!(reached, 0);
    assert!(client.beside("secret").exists() && !client.beside("planted").exists());
}

#[test]
fn nodes_and_handles_that_nobody_gave_are_errors() {
    let mut client = Client::new(false);
    client.make("a", "x");
    let node = client.found(b"a");
    for wrong in [0, 2, 77, u64::MAX] {
        if wrong == node {
            continue;
        }
        assert_ne!(client.ask(op::GETATTR, wrong, &[&[0; 16]]).error, 0);
        assert_ne!(client.ask(op::LOOKUP, wrong, &[b"a\0"]).error, 0);
        assert_ne!(client.read(node, wrong, 0, 100).error, 0);
        assert_ne!(client.write(node, wrong, 0, b"y").error, 0);
    }
    let open = client.open(node, libc::O_RDONLY);
    // A handle belongs to its node, and to what it was opened for.
    assert_ne!(client.read(ROOT, open.handle(), 0, 100).error, 0);
    assert_ne!(client.write(node, open.handle(), 0, b"y").error, 0);
    assert_eq!(client.read(node, open.handle(), 0, 100).data, b"x");
}

#[test]
fn what_would_mean_something_to_others_on_the_host_is_not_made() {
    let mut client = Client::new(false);
    for kind in [libc::S_IFCHR, libc::S_IFBLK, libc::S_IFDIR, libc::S_IFLNK] {
        fails(&client.mknod(ROOT, b"node", kind | 0o666), libc::EPERM);
    }
    assert_eq!(client.mknod(ROOT, b"fifo", libc::S_IFIFO | 0o644).error, 0);
    assert_eq!(client.create(ROOT, b"made", libc::O_RDWR, 0o6755).error, 0);
    assert_eq!(client.mkdir(ROOT, b"dir", 0o2755).error, 0);
    let node = client.found(b"made");
    assert_eq!(client.chmod(node, 0o6711).error, 0);

    let mode = |name| fs::metadata(client.path(name)).unwrap().mode() & 0o7777;
    assert_eq!(mode("made"), 0o711);
    assert_eq!(mode("dir"), 0o755);
    let fifo = fs::metadata(client.path("fifo")).unwrap();
    assert!(fifo.file_type().is_fifo());
    // A file that waits for a partner would hold the server up.
    let node = client.found(b"fifo");
    assert_ne!(client.open(node, libc::O_RDONLY).error, 0);
}

#[test]
fn a_folder_that_is_read_only_stays_as_it_is() {
    let mut client = Client::new(true);
    client.make("a", "x");
    client.make("dir/b", "y");
    let node = client.lookup(ROOT, b"a").node();
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_TRUNC] {
        fails(&client.open(node, flags), libc::EROFS);
    }
    fails(
        &client.create(ROOT, b"a", libc::O_RDONLY, 0o644),
        libc::EROFS,
    );
    fails(&client.create(ROOT, b"n", libc::O_RDWR, 0o644), libc::EROFS);
    fails(&client.mkdir(ROOT, b"n", 0o755), libc::EROFS);
    fails(
        &client.mknod(ROOT, b"n", libc::S_IFREG | 0o644),
        libc::EROFS,
    );
    fails(&client.symlink(ROOT, b"n", b"t"), libc::EROFS);
    fails(&client.link(node, ROOT, b"n"), libc::EROFS);
    fails(&client.rename(ROOT, b"a", ROOT, b"n"), libc::EROFS);
    fails(&client.ask(op::UNLINK, ROOT, &[b"a\0"]), libc::EROFS);
    fails(&client.ask(op::RMDIR, ROOT, &[b"dir\0"]), libc::EROFS);
    fails(&client.chmod(node, 0o777), libc::EROFS);
    fails(&client.truncate(node, 0), libc::EROFS);
    let open = client.open(node, libc::O_RDONLY);
    fails(&client.write(node, open.handle(), 0, b"z"), libc::EROFS);

    assert_eq!(client.read(node, open.handle(), 0, 9).data, b"x");
    assert_eq!(client.names(), ["a", "dir"]);
}

#[test]
fn requests_that_are_cut_off_or_lie_about_themselves_are_answered() {
    let mut client = Client::new(false);
    client.make("a", "x");
    for opcode in (0..60).filter(|opcode| *opcode != op::DESTROY) {
        for length in [0, 1, 7, 8, 15, 16, 24, 40, 60] {
            // Everything of a request that is there is 0, then all ones.
            for byte in [0, 0xff] {
                client.ask(opcode, ROOT, &[&vec![byte; length]]);
            }
        }
    }
    // A length in the header that is not the frame's.
    for length in [0, 39, 41, 1 << 20, u32::MAX] {
        client.ask_with_length(op::LOOKUP, ROOT, &[b"a\0"], length);
    }
    assert_eq!(client.ask(99, ROOT, &[]).error, -libc::ENOSYS);
    client.start();
    assert_eq!(client.lookup(ROOT, b"a").error, 0);
    assert!(fs::metadata(client.beside("secret")).is_ok());
}

/// xorshift64*: enough to stir with, and the same on every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % limit
    }
}

#[test]
fn random_requests_break_nothing_and_touch_nothing_outside() {
    let mut client = Client::new(false);
    client.make("a/b", "x");
    symlink("../secret", client.path("up")).unwrap();
    let mut random = Random(0x5eed_0007);
    let mut well = 0;
    for _ in 0..20_000 {
        let opcode = 1 + random.below(51) as u32;
        if matches!(opcode, op::INIT | op::DESTROY) {
            // These look at the working directory, which other tests change.
            continue;
        }
        let node = random.below(8);
        let words = random.below(9);
        let mut body = Vec::new();
        for _ in 0..words {
            let word = match random.below(4) {
                0 => random.below(4),
                1 => 1 << random.below(40),
                2 => 1 + random.below(8),
                _ => 0,
            };
            body.extend(word.to_le_bytes());
        }
        let names: [&[u8]; 6] = [b"a\0", b"b\0", b"..\0", b"up\0", b"c\0d\0", b"new\0"];
        body.extend(names[random.below(6) as usize]);
        well += u32::from(client.ask(opcode, node, &[&body]).error == 0);
    }
    assert!(well > 500, "the requests are not understood: {well}");
    let secret = client.beside("secret");
    assert_eq!(fs::read(&secret).unwrap(), b"without");
    assert_eq!(
        fs::metadata(&secret).unwrap().permissions().mode() & 0o7777,
        0o600
    );
    let mut beside: Vec<_> = fs::read_dir(client.beside("")).unwrap().collect();
    assert_eq!(beside.len(), 2, "{beside:?}");
    beside.clear();
}

#[test]
fn data_go_in_and_out_up_to_the_largest_request() {
    let mut client = Client::new(false);
    let made = client.create(ROOT, b"large", libc::O_RDWR, 0o640);
    let (node, handle) = (made.node(), made.created_handle());
    let data: Vec<u8> = (0..1_u32 << 20).map(|n| (n * 7) as u8).collect();
    assert_eq!(client.write(node, handle, 4096, &data).error, 0);
    let read = client.read(node, handle, 4096, 1 << 20);
    assert!(read.data == data);
    // More than there is room for, and none at all.
    assert_ne!(client.read(node, handle, 0, (1 << 20) + 8192).error, 0);
    assert_ne!(client.read(node, handle, 0, u32::MAX).error, 0);
    assert_eq!(client.read(node, handle, 1 << 40, 4096).data, b"");
    assert!(fs::read(client.path("large")).unwrap()[4096..] == data);
}

#[test]
fn a_frame_that_no_machine_sends_ends_the_conversation() {
    for frame in [&[0, 0, 0, 0][..], &[39, 0, 0, 0], &[0xff; 8]] {
        let mut client = Client::new(false);
        client.send_raw(frame);
        assert!(client.is_over());
    }
}
