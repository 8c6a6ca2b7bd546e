//! What goes over the sockets between a machine and the server of a share.
//!
//! Each socket is a stream that carries one request at a time: a frame of four bytes, the length
//! that follows, and the FUSE request; then the FUSE reply, which begins with its own length
//! (`fuse_out_header`, linux/fuse.h). There is exactly one reply that has the request's number,
//! also to requests that FUSE does not reply to; others are to be passed over. Several sockets
//! carry several requests. Another socket hands these over when the server starts.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::sockopt::set_socket_send_buffer_size;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

/// Bytes of data in the largest request, and reply.
const MAX_DATA: usize = 1 << 20;
/// Bytes of the largest request, and of the largest reply: headers and data.
pub const MAX_MESSAGE: usize = MAX_DATA + 0x1000;
/// Bytes before a request that say how long it is, a little-endian number.
const FRAME_HEADER: usize = 4;
/// Bytes of `fuse_in_header`, without which there is no request.
const IN_HEADER: usize = 40;
/// Where in it the request's number is.
const UNIQUE: std::ops::Range<usize> = 8..16;
/// Sockets that can be handed over.
const MAX_SOCKETS: usize = 16;
/// What a server says when it is locked up and serves.
const READY: &[u8] = b"r";

/// A machine's side of a share.
#[derive(Debug)]
pub struct Share {
    /// The name by which the guest mounts it, 1 to 36 bytes.
    pub tag: String,
    /// The sockets to its server: the first for requests that must not wait for others.
    pub sockets: Vec<OwnedFd>,
}

/// Both ends of a socket for requests.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC;
    let ends = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    for end in [&ends.0, &ends.1] {
        // As much of it as the host allows; with less there are more turns.
        let _ = set_socket_send_buffer_size(end, MAX_MESSAGE);
    }
    Ok(ends)
}

/// Hands `sockets`, at most 16, to whoever reads the other end of `control`.
pub fn hand_over(control: impl AsFd, sockets: &[OwnedFd]) -> io::Result<()> {
    let sockets: Vec<BorrowedFd<'_>> = sockets.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SOCKETS))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    if !rights.push(SendAncillaryMessage::ScmRights(&sockets)) {
        return Err(ErrorKind::InvalidInput.into());
    }
    let byte = [IoSlice::new(&[0])];
    sendmsg(control, &byte, &mut rights, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Takes the sockets that [`hand_over`] sends.
pub fn take_over(control: impl AsFd) -> io::Result<Vec<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SOCKETS))];
    let mut rights = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut bytes = [IoSliceMut::new(&mut byte)];
    recvmsg(control, &mut bytes, &mut rights, RecvFlags::CMSG_CLOEXEC)?;
    let sockets = rights.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(sockets) => Some(sockets),
        _ => None,
    });
    Ok(sockets.flatten().collect())
}

/// Says that all that may fail has gone well.
pub fn say_ready(control: impl AsFd) -> io::Result<()> {
    rustix::io::write(control, READY)?;
    Ok(())
}

/// Waits for the server to say so; false if it has ended instead.
pub fn is_ready(control: impl AsFd) -> io::Result<bool> {
    let mut byte = [0];
    loop {
        match rustix::io::read(control.as_fd(), &mut byte) {
            Ok(read) => return Ok(read == READY.len()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// A reply without data to `request`, to say that it is done (0) or has failed (an errno).
pub(crate) fn error_reply(request: &[u8], error: i32) -> [u8; 16] {
    let mut reply = [0; 16];
    let length = reply.len() as u32;
    reply[..4].copy_from_slice(&length.to_le_bytes());
    reply[4..8].copy_from_slice(&(-error).to_le_bytes());
    if let Some(unique) = request.get(UNIQUE) {
        reply[8..].copy_from_slice(unique);
    }
    reply
}

/// Room for one request.
pub(crate) struct Frame {
    room: Vec<u8>,
    end: usize,
}

impl Frame {
    pub(crate) fn new() -> Self {
        Self {
            room: vec![0; FRAME_HEADER + MAX_MESSAGE],
            end: 0,
        }
    }

    /// Waits for the next request. Returns false when there will be none; fails when what comes is
    /// none.
    pub(crate) fn receive(&mut self, socket: &OwnedFd) -> io::Result<bool> {
        let mut filled = 0;
        loop {
            let length = self.room[..filled].first_chunk::<FRAME_HEADER>();
            if let Some(length) = length.map(|bytes| u32::from_le_bytes(*bytes) as usize) {
                if !(IN_HEADER..=MAX_MESSAGE).contains(&length) {
                    return Err(ErrorKind::InvalidData.into());
                }
                self.end = FRAME_HEADER + length;
                // There is one request at a time.
                match filled {
                    filled if filled == self.end => return Ok(true),
                    filled if filled > self.end => return Err(ErrorKind::InvalidData.into()),
                    _ => {}
                }
            }
            match rustix::io::read(socket, &mut self.room[filled..]) {
                Ok(0) => return Ok(false),
                Ok(read) => filled += read,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The request.
    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        &mut self.room[FRAME_HEADER..self.end]
    }
}
