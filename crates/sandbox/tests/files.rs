//! What a server of files can do, and can no longer do, behind each layer alone. The folder is in a
//! directory with a secret beside it.

// The raw system calls of a process that was taken over.
#![allow(unsafe_code)]

mod common;

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use strata_sandbox::{Folder, Layer, Role};
use tempfile::TempDir;

use common::{End, error_of, open, told_as};

/// Layers that alone keep a server from files outside.
const WALLS: [Layer; 2] = [Layer::Namespaces, Layer::Landlock];

struct Ground(TempDir);

impl Ground {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let folder = directory.path().join("folder");
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("file"), "within").unwrap();
        fs::write(directory.path().join("secret"), "without").unwrap();
        std::os::unix::fs::symlink(directory.path().join("secret"), folder.join("link")).unwrap();
        Self(directory)
    }

    fn folder(&self) -> std::path::PathBuf {
        self.0.path().join("folder").canonicalize().unwrap()
    }

    fn secret(&self) -> CString {
        let path = self.0.path().join("secret");
        CString::new(path.as_os_str().as_bytes()).unwrap()
    }

    /// How an attempt of a server of the folder ended.
    fn try_it(
        &self,
        layers: &[Layer],
        read_only: bool,
        attempt: impl FnOnce(i32) -> i32,
    ) -> Option<(End, String)> {
        let path = self.folder();
        // Tests of this file run in processes, or one after the other, of which each goes there.
        std::env::set_current_dir(&path).unwrap();
        let descriptors = File::open("/proc/self/fd").unwrap();
        let number = descriptors.as_raw_fd();
        let role = Role::Files(Folder {
            path: &path,
            file: None,
            read_only,
            descriptors: Some(number),
        });
        told_as(role, layers, || attempt(number))
    }

    /// How an attempt of a server of the single file `file` ended.
    fn try_file(
        &self,
        layer: Layer,
        read_only: bool,
        attempt: impl FnOnce() -> i32,
    ) -> Option<(End, String)> {
        std::env::set_current_dir(self.folder()).unwrap();
        let role = Role::Files(Folder {
            path: &self.folder().join("file"),
            file: Some("file"),
            read_only,
            descriptors: None,
        });
        told_as(role, &[layer], attempt)
    }

    #[track_caller]
    fn ends(
        &self,
        layers: &[Layer],
        read_only: bool,
        expected: i32,
        attempt: impl FnOnce(i32) -> i32,
    ) {
        if let Some((end, text)) = self.try_it(layers, read_only, attempt) {
            assert_eq!(end, End::Errno(expected), "{layers:?}: {text}");
        }
    }
}

fn open_at(directory: i32, path: &CStr) -> i32 {
    // SAFETY: a string with NUL.
    error_of(unsafe { libc::openat(directory, path.as_ptr(), libc::O_RDONLY) })
}

const NEW: i32 = libc::O_CREAT | libc::O_WRONLY;

/// All in one test, since the working directory is the process's.
#[test]
fn a_server_reaches_its_folder_and_nothing_else() {
    let ground = Ground::new();
    let secret = ground.secret();
    let reaches = |layers: &[Layer]| {
        ground.ends(layers, false, 0, |_| open(c"file", libc::O_RDWR));
        ground.ends(layers, false, 0, |_| open(c"made", NEW));
        ground.ends(layers, true, 0, |_| open(c"file", libc::O_RDONLY));
    };
    // Without a sandbox the attempts below succeed, so that their failure says something.
    reaches(&[]);
    ground.ends(&[], false, 0, |_| open(&secret, libc::O_RDONLY));
    ground.ends(&[], false, 0, |_| open(c"../secret", libc::O_RDONLY));
    ground.ends(&[], false, 0, |_| open(c"link", libc::O_RDONLY));
    ground.ends(&[], false, 0, |number| open_at(number, c"../status"));

    for layer in Layer::ALL {
        reaches(&[layer]);
    }
    for layer in WALLS {
        let outside = |path: &CStr| {
            if let Some((end, text)) =
                ground.try_it(&[layer], false, |_| open(path, libc::O_RDONLY))
            {
                assert_ne!(end, End::Errno(0), "{layer}: {path:?}: {text}");
            }
        };
        outside(&secret);
        outside(c"../secret");
        outside(c"link");
        outside(c"/proc/self/status");
        let denied = match layer {
            Layer::Landlock => libc::EACCES,
            _ => libc::EROFS,
        };
        ground.ends(&[layer], true, denied, |_| open(c"file", libc::O_WRONLY));
        ground.ends(&[layer], true, denied, |_| open(c"made2", NEW));
    }
    // Descriptors can be opened again, and nothing beside them.
    for layers in [&[Layer::Namespaces][..], &Layer::ALL] {
        ground.ends(layers, false, libc::ENOENT, |number| {
            open_at(number, c"../status")
        });
        ground.ends(layers, false, 0, |number| {
            let file = File::open("file").unwrap();
            let name = CString::new(file.as_raw_fd().to_string()).unwrap();
            open_at(number, &name)
        });
    }
    assert!(Path::new("file").exists());
    reaches_a_single_file_alone(&ground);
    ends_at_forbidden_calls(&ground);
}

/// A server of a single file does not reach what is beside it, nor puts anything there.
fn reaches_a_single_file_alone(ground: &Ground) {
    fs::write(ground.folder().join("beside"), "secret").unwrap();
    for layer in Layer::ALL {
        for (read_only, flags) in [(true, libc::O_RDONLY), (false, libc::O_RDWR)] {
            if let Some((end, text)) = ground.try_file(layer, read_only, || open(c"file", flags)) {
                assert_eq!(end, End::Errno(0), "{layer}: {text}");
            }
        }
    }
    for layer in WALLS {
        let attempts: [(bool, &CStr, i32); 5] = [
            (true, c"file", libc::O_WRONLY),
            (false, c"beside", libc::O_RDONLY),
            (false, c"new", NEW),
            (false, c".", libc::O_RDONLY | libc::O_DIRECTORY),
            (false, c"/etc/passwd", libc::O_RDONLY),
        ];
        for (read_only, path, flags) in attempts {
            // The root directory, which can be read, holds the file alone.
            if layer == Layer::Namespaces && path == c"." {
                continue;
            }
            if let Some((end, text)) = ground.try_file(layer, read_only, || open(path, flags)) {
                assert_ne!(end, End::Errno(0), "{layer}: {path:?}: {text}");
            }
        }
    }
    assert!(!ground.folder().join("new").exists());
}

/// What seccomp keeps from a server: programs, sockets, and files that mean something to others.
fn ends_at_forbidden_calls(ground: &Ground) {
    let stopped = |name: &str, call: &dyn Fn() -> i64| {
        let told = ground.try_it(&[Layer::Seccomp], false, |_| error_of(call()));
        if let Some((end, text)) = told {
            assert_eq!(end, End::Signal(libc::SIGSYS), "{name}: {text}");
        }
    };
    let name = c"new".as_ptr();
    let here = libc::AT_FDCWD;
    // SAFETY: in all of them strings with NUL, or no pointers that are used.
    unsafe {
        stopped("mknodat", &|| {
            i64::from(libc::mknodat(here, name, libc::S_IFCHR | 0o600, 0x103))
        });
        stopped("mknodat", &|| {
            i64::from(libc::mknodat(here, name, libc::S_IFBLK | 0o600, 0x800))
        });
        stopped("openat", &|| {
            i64::from(libc::openat(here, name, NEW, 0o4755))
        });
        stopped("mkdirat", &|| i64::from(libc::mkdirat(here, name, 0o2755)));
        stopped("fchmodat", &|| {
            i64::from(libc::fchmodat(here, c"file".as_ptr(), 0o4755, 0))
        });
        stopped("execve", &|| libc::syscall(libc::SYS_execve, 0, 0, 0));
        stopped("socket", &|| {
            i64::from(libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0))
        });
        stopped("open_by_handle_at", &|| {
            libc::syscall(libc::SYS_open_by_handle_at, here, 0, 0)
        });
        stopped("mount", &|| libc::syscall(libc::SYS_mount, 0, 0, 0, 0, 0));
        stopped("clone", &|| {
            libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0)
        });
    }
    assert!(!Path::new("new").exists());
}
