//! The threads of a network card: one takes frames to the network's socket, one from it. Both
//! move them between the socket and guest memory without a copy of their own.

use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use strata_devices::virtio::net_queue::{RECEIVE, TRANSMIT};
use strata_devices::virtio::{Accepts, Buffers, MAX_MESSAGE, Net, OutgoingFrame};
use strata_memory::Ram;
use strata_memory::vm_memory::Permissions;
use strata_net::Offloads;

use super::disk::slices;
use super::doorbell::Doorbell;
use super::root::Shared;
use super::sys;

/// A card's place on its network.
pub(super) struct Cable {
    socket: OwnedFd,
    memory: Ram,
}

impl Cable {
    /// Takes a place on a network, as `strata_net::join` gives it.
    pub(super) fn new(socket: OwnedFd, memory: Ram) -> Self {
        Self { socket, memory }
    }

    /// Ends the thread that takes frames from the network. What is sent still goes out.
    pub(super) fn cut(&self) {
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Read);
    }

    /// Waits until the socket can be written to, or read from.
    fn wait(&self, events: PollFlags) {
        let mut sockets = [PollFd::new(&self.socket, events)];
        // A signal ends it early; the caller tries again.
        let _ = poll(&mut sockets, None);
    }

    /// Sends all of a message; returns false if there is nobody any more.
    fn send(&self, frame: &OutgoingFrame) -> bool {
        let segments = frame.buffers().iter().copied();
        let Ok(buffers) = slices(&self.memory, segments, Permissions::Read) else {
            return true;
        };
        loop {
            match sys::send(&self.socket, &buffers) {
                Ok(_) => return true,
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.wait(PollFlags::OUT),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
    }

    fn tell(&self, accepts: Accepts) {
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
        let flags = RecvFlags::PEEK | RecvFlags::TRUNC | RecvFlags::DONTWAIT;
        match recv(&self.socket, &mut [0_u8; 1][..], flags) {
            Ok((_, length)) => Some(length),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => None,
            Err(_) => Some(0),
        }
    }

    fn drop_message(&self) {
        let _ = recv(&self.socket, &mut [0_u8; 1][..], RecvFlags::DONTWAIT);
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
        match sys::receive(&cable.socket, &buffers) {
            Ok(0) => return Pause::End,
            Ok(length) => shared.with(|net, transport| net.received(transport, held, length)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Pause::Frame,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return Pause::End,
        }
    }
}
