//! The server: a thread for each socket, which takes one request, carries it out, and replies.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::thread;

use fuse_backend_rs::api::server::Server as Fuse;
use fuse_backend_rs::transport::{FuseBuf, FuseDevWriter, Reader, Writer};

use crate::Owners;
use crate::file::SingleFile;
use crate::folder::Folder;
use crate::wire::{Frame, MAX_MESSAGE, error_reply};

/// What is served.
enum Served {
    Folder(Fuse<Folder>),
    File(Fuse<SingleFile>),
}

/// Serves a folder, or a single file, until nobody is at the other ends of its sockets.
pub struct Server {
    served: Served,
    descriptors: Option<RawFd>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").finish_non_exhaustive()
    }
}

impl Server {
    /// A server of the process's working directory, as that is when a guest first asks: the
    /// process may lock itself up in between. Fails where there is no `/proc`.
    pub fn new(read_only: bool, owners: Owners) -> io::Result<Self> {
        let folder = Folder::new(".", read_only, owners)?;
        let descriptors = folder.descriptors();
        Ok(Self {
            served: Served::Folder(Fuse::new(folder)),
            descriptors,
        })
    }

    /// A server of the file `name` in the process's working directory, as both are when a guest
    /// first asks. The guest sees a directory that holds [`NAME`](crate::NAME) alone, for ever.
    pub fn of_file(name: &str, read_only: bool, owners: Owners) -> io::Result<Self> {
        let file = SingleFile::new(name, read_only, owners)?;
        let descriptors = file.descriptors();
        Ok(Self {
            served: Served::File(Fuse::new(file)),
            descriptors,
        })
    }

    /// The open directory `/proc/self/fd` through which files are opened. It leads to the rest of
    /// `/proc`, unless it is replaced by one that does not.
    pub fn descriptors(&self) -> Option<RawFd> {
        self.descriptors
    }

    /// Serves one machine, on all `sockets` at once, until it has gone.
    pub fn serve(&self, sockets: Vec<OwnedFd>) -> io::Result<()> {
        thread::scope(|scope| {
            for (socket, number) in sockets.into_iter().zip(0..) {
                thread::Builder::new()
                    .name(format!("share-{number}"))
                    .spawn_scoped(scope, move || self.attend(&socket))?;
            }
            Ok(())
        })
    }

    /// Serves one socket until its other end has gone, or does what no machine does.
    fn attend(&self, socket: &OwnedFd) {
        let mut request = Frame::new();
        let mut room = vec![0; MAX_MESSAGE];
        while let Ok(true) = request.receive(socket) {
            if self.answer(request.bytes(), &mut room, socket).is_err() {
                return;
            }
        }
    }

    /// Carries a request out. There is a reply to each, even where FUSE has none.
    fn answer(&self, request: &mut [u8], room: &mut [u8], socket: &OwnedFd) -> io::Result<()> {
        let failed = error_reply(request, libc::EIO);
        let done = error_reply(request, 0);
        let reply = |bytes: &[u8]| rustix::io::write(socket, bytes).map(drop);
        let Ok(reader) = Reader::<()>::from_fuse_buffer(FuseBuf::new(request)) else {
            return Ok(reply(&failed)?);
        };
        let Ok(writer) = FuseDevWriter::<()>::new(socket.as_raw_fd(), room) else {
            return Ok(reply(&failed)?);
        };
        let writer = Writer::FuseDev(writer);
        let handled = match &self.served {
            Served::Folder(fuse) => fuse.handle_message(reader, writer, None, None),
            Served::File(fuse) => fuse.handle_message(reader, writer, None, None),
        };
        match handled {
            // A reply has been sent.
            Ok(1..) => Ok(()),
            Ok(0) => Ok(reply(&done)?),
            // One may have been sent: the other end takes the first.
            Err(error) => {
                tracing::debug!(%error, "a request of the guest's cannot be understood");
                Ok(reply(&failed)?)
            }
        }
    }
}
