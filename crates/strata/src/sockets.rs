//! Unix sockets with names in the file system, of any length. Called by `network` and `run`.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, Mode, OFlags, flock, openat};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect as connect_socket,
    listen as listen_on, socket_with,
};

/// Bytes of a path that fit into a socket's address, beside the NUL behind it (unix(7)).
const LONGEST: usize = 107;
/// Those who may be about to come in.
const BACKLOG: i32 = 64;

/// Connects to the socket of this type at `path`.
pub(crate) fn connect(path: &Path, kind: SocketType) -> Result<OwnedFd, Errno> {
    let socket = unix_socket(kind)?;
    let address = Address::of(path)?;
    connect_socket(&socket, &address.name)?;
    Ok(socket)
}

/// Makes a socket of this type at `path`, where nothing is yet, and listens.
pub(crate) fn listen(path: &Path, kind: SocketType) -> Result<OwnedFd, Errno> {
    let socket = unix_socket(kind)?;
    let address = Address::of(path)?;
    bind(&socket, &address.name)?;
    listen_on(&socket, BACKLOG)?;
    Ok(socket)
}

/// Makes a stream socket at `path` and listens, also where a socket is that nobody answers at, as a
/// program that has ended leaves it. Anything else that is there stays there.
pub(crate) fn take_over(path: &Path) -> io::Result<OwnedFd> {
    // Who finds a dead socket is alone until it listens itself.
    let parent = File::open(parent(path))?;
    flock(&parent, FlockOperation::LockExclusive)?;
    match connect(path, SocketType::STREAM) {
        Err(Errno::NOENT) => {}
        Err(Errno::CONNREFUSED) => {
            if !fs::symlink_metadata(path)?.file_type().is_socket() {
                let what = "something is there that is no socket; remove it or choose another path";
                return Err(io::Error::new(ErrorKind::AlreadyExists, what));
            }
            fs::remove_file(path)?;
        }
        Ok(_) | Err(Errno::AGAIN | Errno::PROTOTYPE) => {
            let what = "another program listens there; choose another path";
            return Err(io::Error::new(ErrorKind::AddrInUse, what));
        }
        Err(error) => return Err(error.into()),
    }
    Ok(listen(path, SocketType::STREAM)?)
}

fn unix_socket(kind: SocketType) -> Result<OwnedFd, Errno> {
    socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// The name of a socket as the kernel takes it.
struct Address {
    name: SocketAddrUnix,
    /// What a long one goes through, as long as the address is used.
    _directory: Option<OwnedFd>,
}

impl Address {
    fn of(path: &Path) -> Result<Self, Errno> {
        if path.as_os_str().as_bytes().len() <= LONGEST {
            return Ok(Self {
                name: SocketAddrUnix::new(path)?,
                _directory: None,
            });
        }
        let file = path.file_name().ok_or(Errno::INVAL)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = openat(CWD, parent(path), flags, Mode::empty())?;
        let number = directory.as_raw_fd().to_string();
        let short: PathBuf = ["/proc/self/fd".as_ref(), number.as_ref(), file]
            .iter()
            .collect();
        Ok(Self {
            name: SocketAddrUnix::new(short)?,
            _directory: Some(directory),
        })
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::accept;

    use super::*;

    #[test]
    fn a_long_path_is_as_good_as_a_short_one() {
        let directory = tempfile::tempdir().unwrap();
        let deep = directory.path().join("d".repeat(100)).join("e".repeat(100));
        fs::create_dir_all(&deep).unwrap();
        for path in [deep.join("socket"), directory.path().join("socket")] {
            let listener = listen(&path, SocketType::SEQPACKET).unwrap();
            let _other = connect(&path, SocketType::SEQPACKET).unwrap();
            accept(&listener).unwrap();
            assert!(fs::symlink_metadata(&path).unwrap().file_type().is_socket());
        }
    }

    #[test]
    fn a_socket_that_answers_stays_and_a_dead_one_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s".repeat(80));
        let first = take_over(&path).unwrap();
        let error = take_over(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AddrInUse);
        drop(first);

        let second = take_over(&path).unwrap();

        connect(&path, SocketType::STREAM).unwrap();
        accept(&second).unwrap();
    }

    #[test]
    fn what_is_no_stream_socket_stays_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "content").unwrap();
        let other = directory.path().join("other");
        let _listener = listen(&other, SocketType::SEQPACKET).unwrap();

        assert_eq!(
            take_over(&file).unwrap_err().kind(),
            ErrorKind::AlreadyExists
        );
        assert_eq!(take_over(&other).unwrap_err().kind(), ErrorKind::AddrInUse);

        assert_eq!(fs::read_to_string(file).unwrap(), "content");
        connect(&other, SocketType::SEQPACKET).unwrap();
    }
}
