//! The threads of a network card: one takes frames to the network's socket or tap device, one from
//! it. Both move them between that and guest memory without a copy of their own.

use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use strata_devices::virtio::net_queue::{RECEIVE, TRANSMIT};
use strata_devices::virtio::{Accepts, Buffers, MAX_MESSAGE, Net, OutgoingFrame};
use strata_memory::Ram;
use strata_memory::vm_memory::bitmap::BitmapSlice;
use strata_memory::vm_memory::{Permissions, VolatileSlice};
use strata_net::Offloads;

use super::disk::slices;
use super::doorbell::Doorbell;
use super::root::Shared;
use super::sys;
use super::tap::Tap;

/// A card's place on its network.
pub(super) struct Cable {
    socket: OwnedFd,
    /// Carries the frames in the socket's place.
    tap: Option<Tap>,
    memory: Ram,
}

impl Cable {
    /// Takes a place on a network, as `strata_net::join` gives it.
    pub(super) fn new(socket: OwnedFd, tap: Option<OwnedFd>, memory: Ram) -> Self {
        let tap = tap.map(Tap::new);
        Self {
            socket,
            tap,
            memory,
        }
    }

    /// Ends the thread that takes frames from the network. What is sent still goes out.
    pub(super) fn cut(&self) {
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Read);
    }

    /// What frames are read from and written to.
    fn frames(&self) -> &OwnedFd {
        self.tap.as_ref().map_or(&self.socket, Tap::device)
    }

    /// Waits until frames can be written, or read, or there is no network any more.
    fn wait(&self, events: PollFlags) {
        // A signal ends it early; the caller tries again.
        match &self.tap {
            None => drop(poll(&mut [PollFd::new(&self.socket, events)], None)),
            Some(tap) => {
                let mut both = [
                    PollFd::new(tap.device(), events),
                    PollFd::new(&self.socket, PollFlags::IN),
                ];
                let _ = poll(&mut both, None);
                // Nothing ever comes through the socket but its end.
                if !both[1].revents().is_empty() {
                    tap.end();
                }
            }
        }
    }

    /// Whether there will be no more frames, as far as a tap device cannot tell itself.
    fn has_ended(&self) -> bool {
        self.tap.as_ref().is_some_and(Tap::has_ended)
    }

    /// Sends all of a message; returns false if there is nobody any more.
    fn send(&self, frame: &OutgoingFrame) -> bool {
        let segments = frame.buffers().iter().copied();
        let Ok(buffers) = slices(&self.memory, segments, Permissions::Read) else {
            return true;
        };
        loop {
            match sys::send(self.frames(), &buffers) {
                Ok(_) => return true,
                Err(_) if self.has_ended() => return false,
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.wait(PollFlags::OUT),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
    }

    fn tell(&self, accepts: Accepts) {
        if let Some(tap) = &self.tap {
            return tap.accept(accepts);
        }
        let Accepts {
            checksum,
            tso4,
            tso6,
        } = accepts;
        let offloads = Offloads {
            checksum,
            tso4,
            tso6,
        };
        while send(&self.socket, &offloads.message(), SendFlags::NOSIGNAL)
            .is_err_and(|error| error == rustix::io::Errno::AGAIN)
        {
            self.wait(PollFlags::OUT);
        }
    }

    /// Bytes of the next message; 0 if there will be none, `None` if there is none yet.
    fn next_length(&self) -> Option<usize> {
        if let Some(tap) = &self.tap {
            return tap.next_length();
        }
        let flags = RecvFlags::PEEK | RecvFlags::TRUNC | RecvFlags::DONTWAIT;
        match recv(&self.socket, &mut [0_u8; 1][..], flags) {
            Ok((_, length)) => Some(length),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => None,
            Err(_) => Some(0),
        }
    }

    fn drop_message(&self) {
        if let Some(tap) = &self.tap {
            return tap.drop_frame();
        }
        let _ = recv(&self.socket, &mut [0_u8; 1][..], RecvFlags::DONTWAIT);
    }

    /// Fills `buffers` with the next message.
    fn receive<B: BitmapSlice>(&self, buffers: &[VolatileSlice<'_, B>]) -> io::Result<usize> {
        match &self.tap {
            Some(tap) => tap.receive(buffers),
            None => sys::receive(&self.socket, buffers),
        }
    }
}

/// Sends what the driver sends until the doorbell stops it, and then what is still in the queue.
pub(super) fn transmit(shared: &Arc<Shared<Net>>, cable: &Cable, bell: &Doorbell) {
    while bell.wait() {
        drain(shared, cable);
    }
    drain(shared, cable);
}

fn drain(shared: &Arc<Shared<Net>>, cable: &Cable) {
    if let Some(accepts) = shared.with(|net, _| net.take_accepts()) {
        cable.tell(accepts);
    }
    let mut next = shared.with(|net, transport| net.next_frame(transport));
    loop {
        let Some(frame) = next else {
            if !shared.with(|_, transport| transport.rearm(TRANSMIT)) {
                return;
            }
            next = shared.with(|net, transport| net.next_frame(transport));
            continue;
        };
        // A frame for a network that has gone is lost, as without a cable.
        cable.send(&frame);
        next = shared.with(|net, transport| {
            net.sent(transport, frame);
            net.next_frame(transport)
        });
    }
}

/// Why there is no frame to be received right now.
enum Pause {
    /// None has come.
    Frame,
    /// The driver has given no buffers.
    Buffers,
    /// There will be none.
    End,
}

/// Gives the driver what comes until the doorbell stops it or the network ends.
pub(super) fn receive(shared: &Arc<Shared<Net>>, cable: &Cable, bell: &Doorbell) {
    let mut held = Buffers::default();
    loop {
        let pause = take_in(shared, cable, &mut held);
        // While this thread waits it holds nothing, so that the driver can reset the device.
        shared.with(|net, transport| net.give_back(transport, &mut held));
        match pause {
            Pause::Frame => cable.wait(PollFlags::IN),
            Pause::Buffers => {
                if !shared.with(|_, transport| transport.rearm(RECEIVE)) && !bell.wait() {
                    return;
                }
            }
            Pause::End => break,
        }
    }
    if !bell.is_stopping() {
        tracing::warn!("the network has gone");
        shared.with(|net, transport| net.set_link(transport, false));
    }
}

/// Gives the driver frames as long as there are some, and buffers for them.
fn take_in(shared: &Arc<Shared<Net>>, cable: &Cable, held: &mut Buffers) -> Pause {
    loop {
        if cable.has_ended() {
            return Pause::End;
        }
        shared.with(|net, transport| net.take_buffers(transport, held));
        if held.size() < MAX_MESSAGE as u64 {
            // Not room for any message: is there for the next one?
            let size = held.size();
            match cable.next_length() {
                None => return Pause::Frame,
                Some(0) => return Pause::End,
                Some(length) if length as u64 <= size => {}
                Some(_) if size == 0 || shared.with(|net, _| net.is_mergeable()) => {
                    return Pause::Buffers;
                }
                Some(_) => {
                    cable.drop_message();
                    continue;
                }
            }
        }
        let Ok(buffers) = slices(&cable.memory, held.segments(), Permissions::Write) else {
            return Pause::Buffers;
        };
        match cable.receive(&buffers) {
            Ok(0) => return Pause::End,
            Ok(length) => shared.with(|net, transport| net.received(transport, held, length)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Pause::Frame,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return Pause::End,
        }
    }
}
