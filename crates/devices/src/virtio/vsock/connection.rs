//! One connection between a host port and a guest port: how far it is, what each side may still
//! send (virtio 1.2 §5.10.6.3), and what the driver is still to be told of it.

use std::num::Wrapping;

use super::packet::{HOST_CID, Header, STREAM, Shutdown, op};

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// The driver has not heard of it yet.
    Waiting,
    /// The driver was asked.
    Requested,
    /// Somebody in the guest has accepted.
    Open,
}

/// What the driver is still to be told.
#[derive(Clone, Copy, Debug, Default)]
struct Words {
    request: bool,
    shutdown: bool,
    credit: bool,
    ask: bool,
}

#[derive(Debug)]
pub(super) struct Connection {
    guest_cid: u64,
    host_port: u32,
    pub(super) guest_port: u32,
    pub(super) state: State,
    /// Ends of which the guest has spoken, and those of which it was or will be told.
    pub(super) guest_ends: Shutdown,
    host_ends: Shutdown,
    /// Bytes that the owner takes before it has passed any on.
    room: u32,
    /// Bytes that came from the guest, and of those: passed on, told as passed on.
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    told: Wrapping<u32>,
    /// Bytes sent to the guest, and what it said last of its own room and of what left that.
    sent: Wrapping<u32>,
    guest_room: u32,
    guest_forwarded: Wrapping<u32>,
    /// The guest was asked for credit, and has given none since.
    asked: bool,
    words: Words,
    /// It is among those that have something to say.
    pub(super) queued: bool,
}

impl Connection {
    /// One that nobody has told the driver of.
    pub(super) fn new(guest_cid: u64, host_port: u32, guest_port: u32, room: u32) -> Self {
        Self {
            guest_cid,
            host_port,
            guest_port,
            state: State::Waiting,
            guest_ends: Shutdown::empty(),
            host_ends: Shutdown::empty(),
            room,
            received: Wrapping(0),
            forwarded: Wrapping(0),
            told: Wrapping(0),
            sent: Wrapping(0),
            guest_room: 0,
            guest_forwarded: Wrapping(0),
            asked: false,
            words: Words {
                request: true,
                ..Words::default()
            },
            queued: false,
        }
    }

    /// The header of a packet to the guest, which tells the credit too.
    pub(super) fn header(&mut self, op: u16, length: u32) -> Header {
        self.told = self.forwarded;
        self.words.credit = false;
        Header {
            source_cid: HOST_CID,
            destination_cid: self.guest_cid,
            source_port: self.host_port,
            destination_port: self.guest_port,
            length,
            kind: STREAM,
            op,
            flags: 0,
            buf_alloc: self.room,
            fwd_cnt: self.forwarded.0,
        }
    }

    /// Learns what the guest says of its room.
    pub(super) fn learn(&mut self, header: &Header) {
        self.guest_room = header.buf_alloc;
        self.guest_forwarded = Wrapping(header.fwd_cnt);
        if self.credit() > 0 {
            self.asked = false;
        }
    }

    /// Bytes that the guest has room for. Counts that make no sense leave none.
    pub(super) fn credit(&self) -> u32 {
        let under_way = self.sent - self.guest_forwarded;
        self.guest_room.saturating_sub(under_way.0)
    }

    /// Bytes were sent to the guest.
    pub(super) fn sent(&mut self, bytes: u32) {
        self.sent += bytes;
    }

    /// The guest sends bytes. False if it had no credit for them.
    pub(super) fn receive(&mut self, bytes: u32) -> bool {
        let held = self.received - self.forwarded;
        if u64::from(held.0) + u64::from(bytes) > u64::from(self.room) {
            return false;
        }
        self.received += bytes;
        true
    }

    /// Bytes of the guest's were passed on.
    pub(super) fn forward(&mut self, bytes: u32) {
        let held = self.received - self.forwarded;
        self.forwarded += bytes.min(held.0);
        // What the guest believes to have left; it goes on by itself while that is enough.
        let believed = self.room.saturating_sub((self.received - self.told).0);
        if self.told != self.forwarded && believed < self.room / 2 {
            self.words.credit = true;
        }
    }

    /// The guest is to be told of its credit, whether or not that has changed.
    pub(super) fn tell_credit(&mut self) {
        self.words.credit = true;
    }

    /// The guest is to be asked for credit, if it was not already.
    pub(super) fn ask_credit(&mut self) {
        if !self.asked {
            self.asked = true;
            self.words.ask = true;
        }
    }

    /// The guest is to be told that the host's side has ended so far.
    pub(super) fn end(&mut self, ends: Shutdown) {
        if !self.host_ends.contains(ends) {
            self.host_ends |= ends;
            self.words.shutdown = true;
        }
    }

    /// Whether there is something to tell.
    pub(super) fn has_words(&self) -> bool {
        let Words {
            request,
            shutdown,
            credit,
            ask,
        } = self.words;
        request || shutdown || credit || ask
    }

    /// The next packet without data.
    pub(super) fn next_word(&mut self) -> Option<Header> {
        if std::mem::take(&mut self.words.request) {
            self.state = State::Requested;
            return Some(self.header(op::REQUEST, 0));
        }
        if std::mem::take(&mut self.words.shutdown) {
            let flags = self.host_ends.bits();
            let header = self.header(op::SHUTDOWN, 0);
            return Some(Header { flags, ..header });
        }
        if std::mem::take(&mut self.words.ask) {
            return Some(self.header(op::CREDIT_REQUEST, 0));
        }
        (self.words.credit).then(|| self.header(op::CREDIT_UPDATE, 0))
    }

    /// The packet that ends it at once.
    pub(super) fn reset(&mut self) -> Header {
        self.header(op::RST, 0)
    }
}
