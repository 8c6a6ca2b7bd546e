//! A client that says what it likes. The numbers are those of linux/fuse.h.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Mutex;
use std::thread::{self, JoinHandle};

use strata_share::{Owners, Server};
use tempfile::TempDir;

/// The node of the folder itself.
pub(crate) const ROOT: u64 = 1;

/// The requests' numbers.
pub(crate) mod op {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const READLINK: u32 = 5;
    pub(crate) const SYMLINK: u32 = 6;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const MKDIR: u32 = 9;
    pub(crate) const UNLINK: u32 = 10;
    pub(crate) const RMDIR: u32 = 11;
    pub(crate) const RENAME: u32 = 12;
    pub(crate) const LINK: u32 = 13;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const DESTROY: u32 = 38;
}

/// `FATTR_MODE` and `FATTR_SIZE`.
const FATTR_MODE: u32 = 1;
const FATTR_SIZE: u32 = 8;

/// A server looks at its process's working directory once, when it is first asked.
static DIRECTORY: Mutex<()> = Mutex::new(());

/// A reply.
pub(crate) struct Reply {
    /// 0, or the negative number of an error.
    pub(crate) error: i32,
    pub(crate) data: Vec<u8>,
}

impl Reply {
    fn number(&self, at: usize) -> u64 {
        assert_eq!(self.error, 0);
        u64::from_le_bytes(self.data[at..at + 8].try_into().unwrap())
    }

    /// The node of an entry.
    pub(crate) fn node(&self) -> u64 {
        self.number(0)
    }

    /// The mode of an entry: in `fuse_attr`, which begins at 40.
    pub(crate) fn mode(&self) -> u32 {
        self.number(40 + 60) as u32
    }

    /// The handle of what was opened.
    pub(crate) fn handle(&self) -> u64 {
        self.number(0)
    }

    /// The handle of what was made: behind the entry.
    pub(crate) fn created_handle(&self) -> u64 {
        self.number(128)
    }
}

/// A client, its server, and the folder with a secret beside it.
pub(crate) struct Client {
    directory: TempDir,
    stream: Option<UnixStream>,
    server: Option<JoinHandle<()>>,
    unique: u64,
}

impl Client {
    pub(crate) fn new(read_only: bool) -> Self {
        Self::of(&[], move || {
            Server::new(read_only, Owners::of_this_process())
        })
    }

    /// One whose server has the file `a` of the folder alone, which has a `b`, too.
    pub(crate) fn of_file(read_only: bool) -> Self {
        Self::of(&["a", "b"], move || {
            Server::of_file("a", read_only, Owners::of_this_process())
        })
    }

    fn of(files: &[&str], server: impl FnOnce() -> io::Result<Server> + Send + 'static) -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("folder")).unwrap();
        let secret = directory.path().join("secret");
        fs::write(&secret, "without").unwrap();
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        fs::set_permissions(&secret, private).unwrap();
        for name in files {
            fs::write(directory.path().join("folder").join(name), "before").unwrap();
        }
        let (theirs, ours) = strata_share::pair().unwrap();
        let server = thread::spawn(move || {
            server().unwrap().serve(vec![theirs]).unwrap();
        });
        let mut client = Self {
            directory,
            stream: Some(stream(ours)),
            server: Some(server),
            unique: 0,
        };
        client.start();
        client
    }

    /// Begins anew, as a driver does.
    pub(crate) fn start(&mut self) {
        let _held = DIRECTORY.lock().unwrap();
        std::env::set_current_dir(self.path("")).unwrap();
        let words: [u32; 4] = [7, 38, 1 << 17, !(1 << 30)];
        let body: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(self.ask(op::INIT, 0, &[&body]).error, 0);
    }

    /// A path in the folder, by the host's way.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join("folder").join(name)
    }

    /// A path beside the folder.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Makes a file by the host's way.
    pub(crate) fn make(&self, name: &str, content: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    /// What is in the folder.
    pub(crate) fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("")).unwrap();
        let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name();
        let mut names: Vec<_> = entries
            .map(|entry| name(entry).into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// Sends a request and waits for its reply.
    pub(crate) fn ask(&mut self, opcode: u32, node: u64, body: &[&[u8]]) -> Reply {
        let length = 40 + body.iter().map(|part| part.len()).sum::<usize>();
        self.ask_with_length(opcode, node, body, length as u32)
    }

    /// The same, with any length in the request's header.
    pub(crate) fn ask_with_length(
        &mut self,
        opcode: u32,
        node: u64,
        body: &[&[u8]],
        length: u32,
    ) -> Reply {
        self.unique += 1;
        let body = body.concat();
        let mut frame = (40 + body.len() as u32).to_le_bytes().to_vec();
        frame.extend(length.to_le_bytes());
        frame.extend(opcode.to_le_bytes());
        frame.extend(self.unique.to_le_bytes());
        frame.extend(node.to_le_bytes());
        // user, group and process, padding
        frame.extend([0; 16]);
        frame.extend(body);
        self.send_raw(&frame);
        loop {
            let stream = self.stream.as_mut().unwrap();
            let mut header = [0; 16];
            stream.read_exact(&mut header).unwrap();
            let length = u32::from_le_bytes(header[..4].try_into().unwrap()) as usize;
            let mut data = vec![0; length - 16];
            stream.read_exact(&mut data).unwrap();
            if header[8..] == self.unique.to_le_bytes() {
                let error = i32::from_le_bytes(header[4..8].try_into().unwrap());
                return Reply { error, data };
            }
        }
    }

    pub(crate) fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.as_mut().unwrap().write_all(bytes).unwrap();
    }

    /// Whether the server says nothing more.
    pub(crate) fn is_over(&mut self) -> bool {
        matches!(self.stream.as_mut().unwrap().read(&mut [0]), Ok(0) | Err(_))
    }

    pub(crate) fn lookup(&mut self, parent: u64, name: &[u8]) -> Reply {
        self.ask(op::LOOKUP, parent, &[name, b"\0"])
    }

    /// The node of a name in the folder.
    pub(crate) fn found(&mut self, name: &[u8]) -> u64 {
        self.lookup(ROOT, name).node()
    }

    pub(crate) fn mkdir(&mut self, parent: u64, name: &[u8], mode: u32) -> Reply {
        self.ask(
            op::MKDIR,
            parent,
            &[&mode.to_le_bytes(), &[0; 4], name, b"\0"],
        )
    }

    pub(crate) fn mknod(&mut self, parent: u64, name: &[u8], mode: u32) -> Reply {
        let words = [mode.to_le_bytes(), 0x103_u32.to_le_bytes(), [0; 4], [0; 4]];
        self.ask(op::MKNOD, parent, &[&words.concat(), name, b"\0"])
    }

    pub(crate) fn create(&mut self, parent: u64, name: &[u8], flags: i32, mode: u32) -> Reply {
        let flags = flags | libc::O_CREAT;
        let words = [flags.to_le_bytes(), mode.to_le_bytes(), [0; 4], [0; 4]];
        self.ask(op::CREATE, parent, &[&words.concat(), name, b"\0"])
    }

    pub(crate) fn symlink(&mut self, parent: u64, name: &[u8], target: &[u8]) -> Reply {
        self.ask(op::SYMLINK, parent, &[name, b"\0", target, b"\0"])
    }

    pub(crate) fn rename(&mut self, from: u64, old: &[u8], to: u64, new: &[u8]) -> Reply {
        self.ask(
            op::RENAME,
            from,
            &[&to.to_le_bytes(), old, b"\0", new, b"\0"],
        )
    }

    pub(crate) fn link(&mut self, node: u64, parent: u64, name: &[u8]) -> Reply {
        self.ask(op::LINK, parent, &[&node.to_le_bytes(), name, b"\0"])
    }

    pub(crate) fn open(&mut self, node: u64, flags: i32) -> Reply {
        self.ask(op::OPEN, node, &[&flags.to_le_bytes(), &[0; 4]])
    }

    pub(crate) fn opendir(&mut self, node: u64) -> Reply {
        self.ask(op::OPENDIR, node, &[&[0; 8]])
    }

    pub(crate) fn read(&mut self, node: u64, handle: u64, offset: u64, size: u32) -> Reply {
        let place = [handle.to_le_bytes(), offset.to_le_bytes()].concat();
        self.ask(op::READ, node, &[&place, &size.to_le_bytes(), &[0; 20]])
    }

    pub(crate) fn write(&mut self, node: u64, handle: u64, offset: u64, data: &[u8]) -> Reply {
        let place = [handle.to_le_bytes(), offset.to_le_bytes()].concat();
        let size = (data.len() as u32).to_le_bytes();
        // flags: read and write
        let flags = libc::O_RDWR.to_le_bytes();
        let rest = [[0; 4], [0; 4], [0; 4], flags, [0; 4]].concat();
        self.ask(op::WRITE, node, &[&place, &size, &rest, data])
    }

    pub(crate) fn chmod(&mut self, node: u64, mode: u32) -> Reply {
        let mut body = [0; 88];
        body[..4].copy_from_slice(&FATTR_MODE.to_le_bytes());
        body[68..72].copy_from_slice(&mode.to_le_bytes());
        self.ask(op::SETATTR, node, &[&body])
    }

    pub(crate) fn truncate(&mut self, node: u64, size: u64) -> Reply {
        let mut body = [0; 88];
        body[..4].copy_from_slice(&FATTR_SIZE.to_le_bytes());
        body[16..24].copy_from_slice(&size.to_le_bytes());
        self.ask(op::SETATTR, node, &[&body])
    }
}

fn stream(socket: OwnedFd) -> UnixStream {
    socket.into()
}

impl Drop for Client {
    fn drop(&mut self) {
        drop(self.stream.take());
        let ended = self.server.take().map(JoinHandle::join);
        if !thread::panicking() {
            ended.unwrap().expect("the server has panicked");
        }
    }
}
