//! A port of the switch: the socket to one machine, and frames that wait for room in it.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};

use crate::config::Addresses;
use crate::fragments::Fragments;
use crate::offload::{HEADER_SIZE, Header, Offloads};
use crate::tcp;

/// Bytes of frames that may wait for a machine; more are dropped, as on any switch.
const QUEUE_LIMIT: usize = 512 << 10;
/// What a guest does against the rules is logged this many times for each port.
const MAX_COMPLAINTS: u32 = 8;

/// A machine's port.
#[derive(Debug)]
pub(crate) struct Port {
    pub(crate) socket: OwnedFd,
    pub(crate) addresses: Addresses,
    /// It has said who it is.
    pub(crate) joined: bool,
    pub(crate) name: Option<String>,
    pub(crate) offloads: Offloads,
    queue: VecDeque<Vec<u8>>,
    queued: usize,
    /// The socket has no room.
    pub(crate) blocked: bool,
    /// The event loop watches for room.
    pub(crate) watched: bool,
    /// Flows that wait for room.
    pub(crate) waiting: Vec<u64>,
    /// Connections, and exchanges of datagrams, through the NAT.
    pub(crate) connections: usize,
    pub(crate) exchanges: usize,
    /// IPv6 addresses that it has claimed.
    pub(crate) claims: usize,
    /// Packets of the guest's that are not whole yet.
    pub(crate) fragments: Fragments,
    complaints: u32,
}

impl Port {
    pub(crate) fn new(socket: OwnedFd, addresses: Addresses) -> Self {
        Self {
            socket,
            addresses,
            joined: false,
            name: None,
            offloads: Offloads::default(),
            queue: VecDeque::new(),
            queued: 0,
            blocked: false,
            watched: false,
            waiting: Vec::new(),
            connections: 0,
            exchanges: 0,
            claims: 0,
            fragments: Fragments::default(),
            complaints: 0,
        }
    }

    /// Sends what makes up one message. False if there is no room.
    fn try_send(&mut self, parts: &[IoSlice<'_>]) -> bool {
        if self.blocked {
            return false;
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        loop {
            let mut control = SendAncillaryBuffer::default();
            match sendmsg(&self.socket, parts, &mut control, flags) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN | Errno::NOBUFS) => {
                    self.blocked = true;
                    return false;
                }
                // A machine that has gone is noticed by reading.
                Ok(_) | Err(_) => return true,
            }
        }
    }

    /// Sends a frame, now or when there is room; drops it if too much waits already.
    pub(crate) fn deliver(&mut self, header: Header, frame: &[u8]) {
        let header = header.encode();
        if self.queue.is_empty() && self.try_send(&[IoSlice::new(&header), IoSlice::new(frame)]) {
            return;
        }
        let size = HEADER_SIZE + frame.len();
        if self.queued + size <= QUEUE_LIMIT {
            self.queued += size;
            self.queue.push_back([&header, frame].concat());
        }
    }

    /// There is room in the socket: sends what waits. Returns the flows that wait for room, if
    /// there still is some.
    pub(crate) fn flush(&mut self) -> Vec<u64> {
        self.blocked = false;
        while let Some(message) = self.queue.pop_front() {
            if !self.try_send(&[IoSlice::new(&message)]) {
                self.queue.push_front(message);
                return Vec::new();
            }
            self.queued -= message.len();
        }
        std::mem::take(&mut self.waiting)
    }

    /// Tells of something that the guest does against the rules, the first few times.
    pub(crate) fn complain(&mut self, what: &'static str) {
        if self.complaints < MAX_COMPLAINTS {
            self.complaints += 1;
            tracing::warn!(guest = %self.addresses.ipv4, "dropped {what}");
        }
    }
}

impl tcp::Link for Port {
    fn send(&mut self, headers: &[u8], payload: [&[u8]; 2]) -> bool {
        let parts = [headers, payload[0], payload[1]].map(IoSlice::new);
        self.queue.is_empty() && self.try_send(&parts)
    }
}
