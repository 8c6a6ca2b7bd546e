//! The threads of a shared folder: each takes a request from a queue, sends it to the folder's
//! server over a socket of its own, and waits for the reply. Data go between the sockets and guest
//! memory without a copy of our own. A server that has gone is an error of every request.

use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use strata_devices::virtio::{EIO, Fs, FsRequest, MAX_FS_MESSAGE, OUT_HEADER, Segment};
use strata_memory::Ram;
use strata_memory::vm_memory::Permissions;

use super::disk::{Slices, slices};
use super::doorbell::Doorbell;
use super::root::Shared;
use super::sys;

// What the device lets through, the server takes.
const _: () = assert!(MAX_FS_MESSAGE == strata_share::MAX_MESSAGE);

/// A way to a folder's server, of one thread.
pub(super) struct Line {
    socket: OwnedFd,
    memory: Ram,
    /// Whether nobody is to be told, or has been told, that the server has gone; of all the lines
    /// to one server.
    known: Arc<AtomicBool>,
}

/// What became of a request.
enum Answer {
    /// A reply, of which the data are in the guest's buffers.
    Reply([u8; OUT_HEADER]),
    /// None that the driver has room for.
    None,
}

impl Line {
    /// One of the lines to a server, which have `known` in common.
    pub(super) fn new(socket: OwnedFd, memory: Ram, known: Arc<AtomicBool>) -> Self {
        Self {
            socket,
            memory,
            known,
        }
    }

    /// Ends what goes over the line, now.
    pub(super) fn cut(&self) {
        self.known.store(true, Ordering::Relaxed);
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }

    /// Has a request carried out. Fails when the server has gone.
    fn ask(&self, request: &FsRequest) -> io::Result<Answer> {
        let Ok(buffers) = self.slices(request.request(), Permissions::Read) else {
            return Ok(Answer::None);
        };
        self.send(&request.length().to_le_bytes(), buffers)?;
        loop {
            let mut header = [0; OUT_HEADER];
            self.receive_exactly(&mut header)?;
            let length = u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as usize;
            if !(OUT_HEADER..=MAX_FS_MESSAGE).contains(&length) {
                return Err(ErrorKind::InvalidData.into());
            }
            // A server may say more than once that it does not understand.
            if header[8..] != request.unique().to_le_bytes() {
                self.pass_over(length - OUT_HEADER)?;
                continue;
            }
            let place = request.reply_data(length);
            let Some(Ok(buffers)) = place.map(|p| self.slices(&p, Permissions::Write)) else {
                self.pass_over(length - OUT_HEADER)?;
                return Ok(Answer::None);
            };
            self.receive(buffers)?;
            return Ok(Answer::Reply(header));
        }
    }

    fn slices(&self, segments: &[Segment], access: Permissions) -> io::Result<Slices<'_>> {
        slices(&self.memory, segments.iter().copied(), access)
    }

    fn send(&self, mut head: &[u8], mut buffers: Slices<'_>) -> io::Result<()> {
        while !head.is_empty() || !buffers.is_empty() {
            let mut sent = retry(|| sys::send_behind(&self.socket, head, &buffers))?;
            let of_head = sent.min(head.len());
            head = &head[of_head..];
            sent -= of_head;
            skip(&mut buffers, sent);
        }
        Ok(())
    }

    fn receive(&self, mut buffers: Slices<'_>) -> io::Result<()> {
        while !buffers.is_empty() {
            match retry(|| sys::receive(&self.socket, &buffers))? {
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                received => skip(&mut buffers, received),
            }
        }
        Ok(())
    }

    fn receive_exactly(&self, bytes: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        while filled < bytes.len() {
            let read = || rustix::io::read(&self.socket, &mut bytes[filled..]);
            match rustix::io::retry_on_intr(read)? {
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                read => filled += read,
            }
        }
        Ok(())
    }

    fn pass_over(&self, mut length: usize) -> io::Result<()> {
        let mut room = [0; 4096];
        while length > 0 {
            let part = length.min(room.len());
            self.receive_exactly(&mut room[..part])?;
            length -= part;
        }
        Ok(())
    }
}

fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Leaves out the first `done` bytes of `buffers`.
fn skip(buffers: &mut Slices<'_>, mut done: usize) {
    let whole = buffers.iter().position(|buffer| {
        let ends = done >= buffer.len();
        if ends {
            done -= buffer.len();
        }
        !ends
    });
    buffers.drain(..whole.unwrap_or(buffers.len()));
    if let Some(first) = buffers.first_mut()
        && let Ok(rest) = first.offset(done)
    {
        *first = rest;
    }
}

/// Serves a queue, together with others, until the doorbell stops it.
pub(super) fn serve(shared: &Arc<Shared<Fs>>, line: &Line, queue: usize, bell: &Doorbell) {
    let mut gone = false;
    while bell.wait() {
        loop {
            let (request, more) = shared.with(|fs, transport| {
                let request = fs.next_request(transport, queue);
                // What comes while this thread waits for the reply is for the others.
                (request, transport.rearm(queue))
            });
            let Some(request) = request else {
                if more {
                    continue;
                }
                break;
            };
            if more {
                bell.ring();
            }
            let answer = if gone {
                Ok(Answer::None)
            } else {
                line.ask(&request)
            };
            if answer.is_err() {
                gone = true;
                if !line.known.swap(true, Ordering::Relaxed) {
                    tracing::warn!("the server of a shared folder has gone");
                }
            }
            shared.with(|fs, transport| match answer {
                Ok(Answer::Reply(header)) => fs.complete(transport, queue, request, &header),
                _ => fs.fail(transport, queue, request, EIO),
            });
        }
    }
}

#[cfg(test)]
mod tests;
