//! One connection of a guest, spliced to a socket of the host's.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown, send, shutdown, sockopt};

use super::segment::{Outgoing, Path, Segment, flag};
use crate::ring::Ring;

/// Our window shift: windows of up to 512 KiB.
const SHIFT: u8 = 3;
/// Segment size of a guest that names none (RFC 9293 §3.7.1), and the least that is believed.
const DEFAULT_SEGMENT: u16 = 536;
const LEAST_SEGMENT: u16 = 128;
/// How long an answer of the guest's may take at first, and at most.
const FIRST_TIMEOUT: Duration = Duration::from_millis(400);
const LAST_TIMEOUT: Duration = Duration::from_secs(30);
/// How often a handshake is repeated.
const HANDSHAKES: u32 = 7;
/// Acknowledgements of the same byte that tell of a loss (RFC 5681 §3.2).
const DUPLICATES: u32 = 3;
/// For how long a connection may be silent (RFC 5382, REQ-5).
const IDLE: Duration = Duration::from_mins(2 * 60 + 4);

/// Takes frames to a guest.
pub(crate) trait Link {
    /// Sends a message: header with frame's headers, then payload. False if there is no room;
    /// the flow is pumped again when there is.
    fn send(&mut self, headers: &[u8], payload: [&[u8]; 2]) -> bool;
}

/// What is to become of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum Verdict {
    Keep,
    /// It has ended on both sides, or with a reset.
    Remove,
    /// The link has no room; to be pumped again when it has.
    Blocked,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The guest's SYN has come, the host connects.
    Connecting,
    /// Our SYN is out (port forward).
    SynSent,
    /// Our SYN-ACK is out.
    SynReceived,
    Established,
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Flow {
    pub(crate) path: Path,
    socket: OwnedFd,
    stage: Stage,
    /// What the socket's last events said.
    readable: bool,
    writable: bool,

    /// Towards the guest: what it has not acknowledged, from `acknowledged` on.
    send: Ring,
    acknowledged: u32,
    /// Next to send, and the highest that ever was.
    next: u32,
    highest: u32,
    window: u32,
    shift: u8,
    scaling: bool,
    segment_size: u16,
    host_ended: bool,
    /// The guest has acknowledged our FIN.
    end_acknowledged: bool,
    duplicates: u32,

    /// From the guest: what the host's socket has not taken yet, and what comes next.
    receive: Ring,
    expected: u32,
    guest_ended: bool,
    /// The socket was told so.
    shut: bool,
    acknowledge: bool,
    announced: u32,

    /// When to send again, and how often that was done.
    deadline: Option<Instant>,
    timeouts: u32,
    last_use: Instant,
}

/// Whether `a` comes before `b` in sequence space.
fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

impl Flow {
    /// The guest wants to connect, `socket` is connecting.
    pub(crate) fn connecting(
        path: Path,
        socket: OwnedFd,
        syn: &Segment<'_>,
        initial: u32,
        now: Instant,
    ) -> Self {
        let mut flow = Self::new(path, socket, Stage::Connecting, initial, now);
        flow.take_syn(syn);
        flow
    }

    /// `socket` was accepted for the guest.
    pub(crate) fn accepted(path: Path, socket: OwnedFd, initial: u32, now: Instant) -> Self {
        Self::new(path, socket, Stage::SynSent, initial, now)
    }

    fn new(path: Path, socket: OwnedFd, stage: Stage, initial: u32, now: Instant) -> Self {
        Self {
            path,
            socket,
            stage,
            readable: false,
            writable: false,
            send: Ring::new(path.room),
            acknowledged: initial,
            next: initial,
            highest: initial,
            window: 0,
            shift: 0,
            scaling: false,
            segment_size: DEFAULT_SEGMENT,
            host_ended: false,
            end_acknowledged: false,
            duplicates: 0,
            receive: Ring::new(path.room),
            expected: 0,
            guest_ended: false,
            shut: false,
            acknowledge: false,
            announced: 0,
            deadline: None,
            timeouts: 0,
            last_use: now,
        }
    }

    pub(crate) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// Whether the host's side has still to answer.
    pub(crate) fn is_connecting(&self) -> bool {
        self.stage == Stage::Connecting
    }

    /// Whether this flow was begun by a SYN with this sequence number.
    pub(crate) fn began_with(&self, sequence: u32) -> bool {
        self.expected == sequence.wrapping_add(1)
    }

    /// Whether the guest, or the host it connects to, has still to answer something.
    pub(crate) fn is_waiting(&self) -> bool {
        self.deadline.is_some()
    }

    /// The first bytes of the guest's SYN: ports and sequence number.
    pub(crate) fn syn_start(&self) -> Vec<u8> {
        let mut start = Vec::new();
        start.extend(self.path.guest.port().to_be_bytes());
        start.extend(self.path.remote.port().to_be_bytes());
        start.extend(self.expected.wrapping_sub(1).to_be_bytes());
        start
    }

    fn take_syn(&mut self, syn: &Segment<'_>) {
        let (size, shift) = syn.syn_options();
        let most = if self.path.guest.is_ipv4() {
            1460
        } else {
            1440
        };
        self.segment_size = size.unwrap_or(DEFAULT_SEGMENT).clamp(LEAST_SEGMENT, most);
        self.scaling = shift.is_some();
        self.shift = shift.unwrap_or(0);
        self.expected = syn.sequence.wrapping_add(1);
        // The window of a SYN is never shifted (RFC 7323 §2.2).
        self.window = u32::from(syn.window);
    }

    /// Begins or repeats the handshake: the SYN of a forward, or the SYN-ACK once the host's
    /// side is connected.
    fn shake_hands(&mut self, link: &mut impl Link, now: Instant) -> Verdict {
        let first = self.acknowledged;
        let mut options = vec![2, 4, 0, 0];
        let size: u16 = if self.path.guest.is_ipv4() {
            1460
        } else {
            1440
        };
        options[2..].copy_from_slice(&size.to_be_bytes());
        if self.scaling || self.stage == Stage::SynSent {
            options.extend([1, 3, 3, SHIFT]);
        }
        let flags = match self.stage {
            Stage::SynSent => flag::SYN,
            _ => flag::SYN | flag::ACK,
        };
        let out = Outgoing {
            sequence: first,
            acknowledged: if flags & flag::ACK == 0 {
                0
            } else {
                self.expected
            },
            flags,
            window: u16::MAX,
            options: &options,
            payload: [&[], &[]],
            segment_size: self.segment_size,
        };
        self.next = first.wrapping_add(1);
        self.highest = self.next;
        self.deadline = Some(now + self.timeout());
        self.announced = self.expected.wrapping_add(u32::from(u16::MAX));
        if link.send(&self.path.encode(&out), out.payload) {
            Verdict::Keep
        } else {
            Verdict::Blocked
        }
    }

    fn timeout(&self) -> Duration {
        (FIRST_TIMEOUT * (1 << self.timeouts.min(10))).min(LAST_TIMEOUT)
    }

    /// The host's side is connected: answers the guest's SYN.
    pub(crate) fn connected(&mut self, link: &mut impl Link, now: Instant) -> Verdict {
        self.stage = Stage::SynReceived;
        self.shake_hands(link, now)
    }

    /// Sends the SYN of a port forward.
    pub(crate) fn begin(&mut self, link: &mut impl Link, now: Instant) -> Verdict {
        self.shake_hands(link, now)
    }

    /// The socket can be read from, or written to.
    pub(crate) fn ready(&mut self, readable: bool, writable: bool) {
        self.readable |= readable;
        self.writable |= writable;
    }

    /// Ends the connection with a reset on the guest's side; the host's ends as the flow drops.
    pub(crate) fn reset(&mut self, link: &mut impl Link) {
        let out = match self.stage {
            // An answer to its SYN.
            Stage::Connecting => self.outgoing(0, flag::RST | flag::ACK),
            _ => self.outgoing(self.next, flag::RST | flag::ACK),
        };
        // There is no second try: whoever missed it gets another as it asks.
        link.send(&self.path.encode(&out), [&[], &[]]);
        self.break_off();
    }

    /// Has the host's side end with a reset as the flow drops.
    fn break_off(&self) {
        let _ = sockopt::set_socket_linger(&self.socket, Some(Duration::ZERO));
    }

    fn outgoing(&self, sequence: u32, flags: u8) -> Outgoing<'static> {
        let room = self.receive.room() as u32;
        let window = if self.scaling { room >> SHIFT } else { room };
        Outgoing {
            sequence,
            acknowledged: self.expected,
            flags,
            window: window.min(u32::from(u16::MAX)) as u16,
            options: &[],
            payload: [&[], &[]],
            segment_size: self.segment_size,
        }
    }

    /// Takes a segment from the guest (RFC 9293 §3.10.7). [`Flow::pump`] is to follow.
    pub(crate) fn take(
        &mut self,
        segment: &Segment<'_>,
        link: &mut impl Link,
        now: Instant,
    ) -> Verdict {
        self.last_use = now;
        if segment.has(flag::RST) {
            return self.take_reset(segment);
        }
        match self.stage {
            Stage::SynSent => {
                let answers = segment.acknowledged == self.next;
                if segment.has(flag::ACK) && !answers {
                    // It remembers an earlier connection: that is over. The SYN comes again.
                    let out = Outgoing::reset_for(segment);
                    link.send(&self.path.encode(&out), out.payload);
                }
                if !segment.has(flag::SYN) || !segment.has(flag::ACK) || !answers {
                    return Verdict::Keep;
                }
                self.take_syn(segment);
                self.establish(segment.acknowledged);
                self.acknowledge = true;
                return Verdict::Keep;
            }
            Stage::SynReceived if segment.has(flag::SYN) => {
                if self.began_with(segment.sequence) {
                    return self.shake_hands(link, now);
                }
                return Verdict::Keep;
            }
            Stage::SynReceived if segment.has(flag::ACK) && segment.acknowledged == self.next => {
                self.establish(segment.acknowledged);
            }
            Stage::Connecting | Stage::SynReceived => return Verdict::Keep,
            Stage::Established if segment.has(flag::SYN) => {
                // Something of another life: tells where we are (RFC 5961 §4).
                self.acknowledge = true;
                return Verdict::Keep;
            }
            Stage::Established => {}
        }
        if !segment.has(flag::ACK) || !self.take_acknowledgement(segment, now) {
            return Verdict::Keep;
        }
        self.take_data(segment, link)
    }

    fn take_reset(&mut self, segment: &Segment<'_>) -> Verdict {
        let believed = match self.stage {
            Stage::SynSent => segment.has(flag::ACK) && segment.acknowledged == self.next,
            // RFC 5961 §3: exactly what is expected next.
            _ => segment.sequence == self.expected,
        };
        if believed {
            self.break_off();
            Verdict::Remove
        } else {
            self.acknowledge = self.stage == Stage::Established;
            Verdict::Keep
        }
    }

    fn establish(&mut self, acknowledged: u32) {
        self.stage = Stage::Established;
        self.acknowledged = acknowledged;
        self.deadline = None;
        self.timeouts = 0;
        // What events said while it connected is not known any more: a try will tell.
        self.readable = true;
        self.writable = true;
    }

    /// Takes what the guest acknowledges. False if it never was sent.
    fn take_acknowledgement(&mut self, segment: &Segment<'_>, now: Instant) -> bool {
        let ack = segment.acknowledged;
        if before(self.highest, ack) {
            self.acknowledge = true;
            return false;
        }
        let window = u32::from(segment.window) << self.shift;
        if before(self.acknowledged, ack) {
            let count = ack.wrapping_sub(self.acknowledged) as usize;
            self.end_acknowledged |= self.host_ended && count > self.send.len();
            self.send.consume(count);
            self.acknowledged = ack;
            if before(self.next, ack) {
                self.next = ack;
            }
            self.duplicates = 0;
            self.timeouts = 0;
            self.deadline = (self.next != ack).then(|| now + self.timeout());
        } else if ack == self.acknowledged
            && segment.length() == 0
            && window == self.window
            && self.next != ack
        {
            self.duplicates += 1;
            if self.duplicates == DUPLICATES {
                self.next = ack;
            }
        }
        self.window = window;
        true
    }

    /// Takes the payload that comes next in order, and the end.
    fn take_data(&mut self, segment: &Segment<'_>, link: &mut impl Link) -> Verdict {
        if segment.length() == 0 {
            // A keep-alive probe lies just before what is expected (RFC 9293 §3.8.4).
            self.acknowledge |= segment.sequence != self.expected;
            return Verdict::Keep;
        }
        self.acknowledge = true;
        if before(self.expected, segment.sequence) || self.guest_ended {
            return Verdict::Keep;
        }
        let known = self.expected.wrapping_sub(segment.sequence) as usize;
        let Some(mut fresh) = segment.payload.get(known..) else {
            return Verdict::Keep;
        };
        if self.receive.is_empty() {
            let Ok(count) = self.write_host(fresh) else {
                self.reset(link);
                return Verdict::Remove;
            };
            fresh = self.accept(fresh, count);
        }
        let kept = self.receive.push(fresh);
        fresh = self.accept(fresh, kept);
        if fresh.is_empty() && segment.has(flag::FIN) {
            self.expected = self.expected.wrapping_add(1);
            self.guest_ended = true;
        }
        Verdict::Keep
    }

    fn accept<'a>(&mut self, data: &'a [u8], count: usize) -> &'a [u8] {
        self.expected = self.expected.wrapping_add(count as u32);
        &data[count..]
    }

    /// Gives the host's socket what it takes of `data`.
    fn write_host(&mut self, data: &[u8]) -> Result<usize, ()> {
        let mut done = 0;
        while self.writable && done < data.len() {
            match send(
                &self.socket,
                &data[done..],
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            ) {
                Ok(count) => done += count,
                Err(Errno::AGAIN) => self.writable = false,
                Err(Errno::INTR) => {}
                Err(_) => return Err(()),
            }
        }
        Ok(done)
    }

    /// Moves all that can be moved in both directions, and acknowledges.
    pub(crate) fn pump(&mut self, link: &mut impl Link, now: Instant) -> Verdict {
        if self.stage != Stage::Established {
            return Verdict::Keep;
        }
        if self.flush().is_err() {
            self.reset(link);
            return Verdict::Remove;
        }
        loop {
            let Ok(more) = self.fill() else {
                self.reset(link);
                return Verdict::Remove;
            };
            match self.send_data(link, false) {
                None => return Verdict::Blocked,
                Some(sent) if !sent && !more => break,
                Some(_) => {}
            }
        }
        if !self.send_end(link) || !self.send_acknowledgement(link) {
            return Verdict::Blocked;
        }
        if self.guest_ended && self.shut && self.end_acknowledged {
            return Verdict::Remove;
        }
        let waits = !self.send.is_empty() || self.host_ended && !self.end_acknowledged;
        if !waits {
            self.deadline = None;
        } else if self.deadline.is_none() {
            self.deadline = Some(now + self.timeout());
        }
        Verdict::Keep
    }

    /// Guest to host: what waits in the ring, then the end.
    fn flush(&mut self) -> Result<(), ()> {
        while self.writable && !self.receive.is_empty() {
            let [first, second] = self.receive.range(0, usize::MAX);
            let parts = [IoSlice::new(first), IoSlice::new(second)];
            match rustix::io::writev(&self.socket, &parts) {
                Ok(count) => self.receive.consume(count),
                Err(Errno::AGAIN) => self.writable = false,
                Err(Errno::INTR) => {}
                Err(_) => return Err(()),
            }
        }
        if self.guest_ended && self.receive.is_empty() && !self.shut {
            self.shut = true;
            // A host that has gone meanwhile is noticed by reading.
            let _ = shutdown(&self.socket, Shutdown::Write);
        }
        Ok(())
    }

    /// Host to guest: fills the ring. Returns whether anything came.
    fn fill(&mut self) -> Result<bool, ()> {
        if !self.readable || self.host_ended || self.send.room() == 0 {
            return Ok(false);
        }
        self.send.grow();
        let [first, second] = self.send.spare();
        let mut parts = [IoSliceMut::new(first), IoSliceMut::new(second)];
        match rustix::io::readv(&self.socket, &mut parts) {
            Ok(0) => self.host_ended = true,
            Ok(count) => {
                self.send.commit(count);
                return Ok(true);
            }
            Err(Errno::AGAIN) => self.readable = false,
            Err(Errno::INTR) => {}
            Err(_) => return Err(()),
        }
        Ok(false)
    }

    /// Sends what the guest's window allows; one byte in any case to `probe` it. Returns whether
    /// anything was sent; `None` if the link has no room.
    fn send_data(&mut self, link: &mut impl Link, probe: bool) -> Option<bool> {
        let mut any = false;
        loop {
            let flying = self.next.wrapping_sub(self.acknowledged) as usize;
            let unsent = self.send.len().saturating_sub(flying);
            let mut allowed = (self.window as usize).saturating_sub(flying);
            if probe && flying == 0 {
                allowed = allowed.max(1);
            }
            let most = self.path.most(usize::from(self.segment_size));
            let count = unsent.min(allowed).min(most);
            if count == 0 {
                return Some(any);
            }
            let push = if count == unsent { flag::PSH } else { 0 };
            let mut out = self.outgoing(self.next, flag::ACK | push);
            let payload = self.send.range(flying, count);
            out.payload = payload;
            if !link.send(&self.path.encode(&out), payload) {
                return None;
            }
            self.was_sent(count as u32);
            any = true;
            if probe {
                return Some(any);
            }
        }
    }

    /// Something with our acknowledgement went out, and took `count` sequence numbers.
    fn was_sent(&mut self, count: u32) {
        self.next = self.next.wrapping_add(count);
        if before(self.highest, self.next) {
            self.highest = self.next;
        }
        self.acknowledge = false;
        self.announced = self.expected.wrapping_add(self.receive.room() as u32);
    }

    /// Tells the guest that the host has ended, once all before is sent.
    fn send_end(&mut self, link: &mut impl Link) -> bool {
        let flying = self.next.wrapping_sub(self.acknowledged) as usize;
        if !self.host_ended || self.end_acknowledged || flying != self.send.len() {
            return true;
        }
        let out = self.outgoing(self.next, flag::FIN | flag::ACK);
        if !link.send(&self.path.encode(&out), [&[], &[]]) {
            return false;
        }
        self.was_sent(1);
        true
    }

    fn send_acknowledgement(&mut self, link: &mut impl Link) -> bool {
        // A window that was nearly closed and has opened by half is news (RFC 9293 §3.8.6.2.2).
        let known = self.announced.wrapping_sub(self.expected) as usize;
        let opened = self.receive.room() >= known + self.path.room / 2;
        if !self.acknowledge && !opened {
            return true;
        }
        let out = self.outgoing(self.next, flag::ACK);
        if !link.send(&self.path.encode(&out), [&[], &[]]) {
            return false;
        }
        self.was_sent(0);
        true
    }

    /// To be called now and then: sends again what the guest has not answered in time.
    pub(crate) fn tick(&mut self, link: &mut impl Link, now: Instant) -> Verdict {
        if now.duration_since(self.last_use) > IDLE {
            self.reset(link);
            return Verdict::Remove;
        }
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return Verdict::Keep;
        }
        self.timeouts += 1;
        self.deadline = Some(now + self.timeout());
        match self.stage {
            Stage::Connecting => Verdict::Keep,
            Stage::SynSent | Stage::SynReceived if self.timeouts > HANDSHAKES => {
                self.break_off();
                Verdict::Remove
            }
            Stage::SynSent | Stage::SynReceived => self.shake_hands(link, now),
            Stage::Established => {
                self.next = self.acknowledged;
                match self.send_data(link, true) {
                    None => Verdict::Blocked,
                    Some(_) => self.pump(link, now),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
