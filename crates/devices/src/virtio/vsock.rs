//! virtio-vsock (virtio 1.2 §5.10): stream connections from ports of the host to ports of the
//! guest.
//!
//! ```text
//!   owner: connect ─────────────► REQUEST ──► driver          owner's number: the host port
//!          Accepted, or Reset ◄── RESPONSE, RST ◄──
//!          take_buffers, received ──► RW ──► driver            no more than its credit
//!          Data, taken, forwarded ◄── RW ◄── driver            no more than ours
//!          end, close ──► SHUTDOWN, RST ──► driver
//!          Ended, Over, Reset ◄── SHUTDOWN, RST ◄──
//! ```
//!
//! The owner has a stream for each connection and moves the bytes. It calls
//! [`Vsock::next_event`] for what the driver sends and [`Vsock::settle`] before it sleeps. What
//! waits for buffers of the driver's is bounded: a word or two for each connection, and resets,
//! beyond which no more packets are taken.
//!
//! Connections that the guest asks for are refused with a reset (`request` is the place).

use std::collections::{HashMap, VecDeque};

use strata_memory::Ram;

use super::queue::{Chain, QueueError, Segment, slice};
use super::transport::Transport;
use super::{DeviceType, QUEUE_SIZE, VirtioDevice, copy_config};
use connection::{Connection, State};
pub use packet::Shutdown;
use packet::{HEADER_SIZE, HOST_CID, Header, STREAM, op};

mod connection;
mod packet;

/// Connections at once, at most.
pub const MAX_CONNECTIONS: usize = 1024;
/// Bytes of data in a packet, at most, both ways.
pub const MAX_DATA: u32 = 64 << 10;
/// Bytes of a connection's that the owner holds, at most, if there are few connections.
const ROOM: u32 = 256 << 10;
/// The same for each connection beyond the first [`FEW`].
const SMALL_ROOM: u32 = 16 << 10;
const FEW: usize = 64;
/// Resets that may wait for buffers of the driver's before no more of its packets are taken.
const MAX_RESETS: usize = QUEUE_SIZE as usize;
/// `VIRTIO_VSOCK_F_STREAM` (§5.10.3).
const FEATURE_STREAM: u64 = 1 << 0;

/// The queues, by their numbers (§5.10.2). The third, for events, is not used: only a machine that
/// has moved would have any.
pub mod vsock_queue {
    /// Buffers for packets to the driver.
    pub const RECEIVE: usize = 0;
    /// Packets from the driver.
    pub const TRANSMIT: usize = 1;
}

use vsock_queue::{RECEIVE, TRANSMIT};

/// What the owner has to do after a packet of the driver's. A connection is named by its host
/// port.
#[derive(Debug)]
pub enum VsockEvent {
    /// Nothing.
    Nothing,
    /// Somebody in the guest has accepted the connection.
    Accepted(u32),
    /// Bytes for the host, to be given back with [`Vsock::taken`].
    Data(OutgoingData),
    /// The guest may have room for data.
    Credit(u32),
    /// The guest will not do these any more, of which at least one is left.
    Ended(u32, Shutdown),
    /// The guest has ended the connection, which is no more: what it sent is to be passed on.
    Over(u32),
    /// The guest has refused the connection or cut it off; it is no more.
    Reset(u32),
}

/// Bytes from the driver, on their way to the host.
#[derive(Debug)]
#[must_use = "data is to be given back with Vsock::taken"]
pub struct OutgoingData {
    chain: Chain,
    connection: u32,
    length: u32,
}

impl OutgoingData {
    /// The host port of the connection.
    pub fn connection(&self) -> u32 {
        self.connection
    }

    /// Bytes, at most [`MAX_DATA`].
    pub fn length(&self) -> u32 {
        self.length
    }

    /// Where the bytes are, in order.
    pub fn segments(&self) -> Vec<Segment> {
        let (offset, length) = (HEADER_SIZE as u64, u64::from(self.length));
        slice(self.chain.readable(), offset, length)
    }

    /// A copy of the bytes behind the first `offset`.
    pub fn copy_from(&self, memory: &Ram, offset: u32) -> Vec<u8> {
        let mut bytes = vec![0; self.length.saturating_sub(offset) as usize];
        let offset = HEADER_SIZE as u64 + u64::from(offset);
        let copied = self.chain.read(memory, offset, &mut bytes);
        bytes.truncate(copied);
        bytes
    }
}

/// Buffers of the driver's for data of one connection.
#[derive(Debug)]
#[must_use = "buffers are to be given back with Vsock::received"]
pub struct IncomingBuffers {
    connection: u32,
    /// Each with the bytes of data that are to go into it.
    chains: Vec<(Chain, u32)>,
}

impl IncomingBuffers {
    /// Where data goes, in order: at most [`MAX_DATA`] bytes.
    pub fn segments(&self) -> impl Iterator<Item = Segment> {
        let data = |(chain, room): &(Chain, u32)| {
            slice(chain.writable(), HEADER_SIZE as u64, u64::from(*room))
        };
        self.chains.iter().flat_map(data)
    }
}

/// Why no data can be sent to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// The guest has no room for it until [`VsockEvent::Credit`].
    Credit,
    /// The driver has given no buffers.
    Buffers,
    /// There is no such connection.
    Gone,
}

/// A virtio socket device.
#[derive(Debug)]
pub struct Vsock {
    cid: u32,
    /// By host port. Guest-initiated ones would be told apart by the guest port too.
    connections: HashMap<u32, Connection>,
    /// Those that have something to tell the driver, in order.
    talkers: VecDeque<u32>,
    /// Resets for the driver, of connections that are no more or never were.
    resets: VecDeque<Header>,
    was_reset: bool,
}

impl Vsock {
    /// A device whose guest has the context ID `cid`.
    pub fn new(cid: u32) -> Self {
        Self {
            cid,
            connections: HashMap::new(),
            talkers: VecDeque::new(),
            resets: VecDeque::new(),
            was_reset: false,
        }
    }

    /// Makes a connection from `host_port` to `guest_port`; the driver hears of it when it is
    /// there. False if the host port is taken or there are [`MAX_CONNECTIONS`].
    pub fn connect(&mut self, host_port: u32, guest_port: u32) -> bool {
        let count = self.connections.len();
        if count >= MAX_CONNECTIONS || self.connections.contains_key(&host_port) {
            return false;
        }
        let room = if count < FEW { ROOM } else { SMALL_ROOM };
        let connection = Connection::new(self.cid.into(), host_port, guest_port, room);
        self.connections.insert(host_port, connection);
        self.speak(host_port);
        true
    }

    /// Whether there is such a connection.
    pub fn has(&self, connection: u32) -> bool {
        self.connections.contains_key(&connection)
    }

    /// Whether the device was reset since the last call. Connections of which the driver knew are
    /// no more.
    pub fn take_reset(&mut self) -> bool {
        std::mem::take(&mut self.was_reset)
    }

    /// Takes the driver's next packet; `None` if there is none, or none can be taken before the
    /// driver has given buffers for what it is to be told.
    pub fn next_event(&mut self, transport: &mut Transport) -> Option<VsockEvent> {
        if self.resets.len() >= MAX_RESETS {
            return None;
        }
        let chain = transport.pop(TRANSMIT)?;
        let mut bytes = [0; HEADER_SIZE];
        let mut event = VsockEvent::Nothing;
        if chain.read(transport.memory(), 0, &mut bytes) == HEADER_SIZE {
            let header = Header::parse(&bytes);
            let there = chain.readable_length() - HEADER_SIZE as u64;
            let whole = header.length <= MAX_DATA && u64::from(header.length) <= there;
            event = self.handle(&header, whole);
            if header.op == op::RW
                && header.length > 0
                && let VsockEvent::Credit(connection) = event
            {
                return Some(VsockEvent::Data(OutgoingData {
                    chain,
                    connection,
                    length: header.length,
                }));
            }
        }
        transport.push(TRANSMIT, chain, 0);
        Some(event)
    }

    /// What a packet means. `whole`: its data is there, and no more than may be.
    fn handle(&mut self, header: &Header, whole: bool) -> VsockEvent {
        // From somebody that the guest is not, or to somebody who is not here.
        if header.source_cid != u64::from(self.cid) || header.destination_cid != HOST_CID {
            return VsockEvent::Nothing;
        }
        let id = header.destination_port;
        let known = |c: &&mut Connection| {
            header.kind == STREAM && c.guest_port == header.source_port && c.state != State::Waiting
        };
        let Some(connection) = self.connections.get_mut(&id).filter(known) else {
            self.request(header);
            return VsockEvent::Nothing;
        };
        connection.learn(header);
        let sent = connection.guest_ends.contains(Shutdown::SEND);
        match (header.op, connection.state) {
            (op::RST, _) => {
                self.forget(id);
                // It had said all it had to say.
                return if sent {
                    VsockEvent::Over(id)
                } else {
                    VsockEvent::Reset(id)
                };
            }
            (op::RESPONSE, State::Requested) => {
                connection.state = State::Open;
                return VsockEvent::Accepted(id);
            }
            (op::RW, State::Open) if whole && !sent && connection.receive(header.length) => {
                return VsockEvent::Credit(id);
            }
            (op::CREDIT_UPDATE, State::Open) => return VsockEvent::Credit(id),
            (op::CREDIT_REQUEST, State::Open) => {
                connection.tell_credit();
                self.speak(id);
                return VsockEvent::Credit(id);
            }
            (op::SHUTDOWN, State::Open) => {
                connection.guest_ends |= Shutdown::from_bits_truncate(header.flags);
                if !connection.guest_ends.is_all() {
                    return VsockEvent::Ended(id, connection.guest_ends);
                }
                // Both ends: a reset is the answer (§5.10.6.6.1).
                self.close(id);
                return VsockEvent::Over(id);
            }
            _ => {}
        }
        // It breaks the rules.
        self.close(id);
        VsockEvent::Reset(id)
    }

    /// A packet that belongs to no connection. A request (`op::REQUEST`) is one from the guest: an
    /// owner that offered ports would be asked here; none does, and so all are refused.
    fn request(&mut self, header: &Header) {
        if header.op != op::RST {
            self.resets.push_back(header.refusal());
        }
    }

    /// Gives data back that was passed on, or copied to be passed on later.
    pub fn taken(&mut self, transport: &mut Transport, data: OutgoingData) {
        transport.push(TRANSMIT, data.chain, 0);
    }

    /// `bytes` of a connection's data have gone to where they were to go: the guest may send as
    /// many again.
    pub fn forwarded(&mut self, connection: u32, bytes: u32) {
        if let Some(found) = self.connections.get_mut(&connection) {
            found.forward(bytes);
            self.speak(connection);
        }
    }

    /// Takes buffers of the driver's for data to the guest, as many as it has credit for, of up to
    /// [`MAX_DATA`] bytes.
    pub fn take_buffers(
        &mut self,
        transport: &mut Transport,
        connection: u32,
    ) -> Result<IncomingBuffers, Hold> {
        let found = self.connections.get_mut(&connection).ok_or(Hold::Gone)?;
        let limit = found.credit().min(MAX_DATA);
        if limit == 0 {
            found.ask_credit();
            self.speak(connection);
            return Err(Hold::Credit);
        }
        let mut chains = Vec::new();
        let mut left = limit;
        while left > 0 && chains.len() < usize::from(QUEUE_SIZE) {
            let Some(chain) = transport.pop(RECEIVE) else {
                break;
            };
            let room = chain.writable_length().saturating_sub(HEADER_SIZE as u64);
            if room == 0 {
                transport.fail(&QueueError::Protocol(
                    "a receive buffer has no room for data",
                ));
                return Err(Hold::Buffers);
            }
            let part = room.min(left.into()) as u32;
            left -= part;
            chains.push((chain, part));
        }
        if chains.is_empty() {
            return Err(Hold::Buffers);
        }
        Ok(IncomingBuffers { connection, chains })
    }

    /// The first `length` bytes of `buffers` are filled, possibly none: gives those to the driver
    /// and puts the others back.
    pub fn received(&mut self, transport: &mut Transport, buffers: IncomingBuffers, length: usize) {
        let IncomingBuffers { connection, chains } = buffers;
        let mut left = length as u64;
        let (mut used, mut unused) = (Vec::new(), Vec::new());
        let mut found = self.connections.get_mut(&connection);
        for (chain, room) in chains {
            let part = left.min(room.into()) as u32;
            match &mut found {
                Some(connection) if part > 0 => {
                    let header = connection.header(op::RW, part);
                    connection.sent(part);
                    chain.write(transport.memory(), 0, &header.bytes());
                    used.push((chain, HEADER_SIZE as u32 + part));
                    left -= u64::from(part);
                }
                _ => unused.push(chain),
            }
        }
        transport.unpop(RECEIVE, unused);
        transport.push_all(RECEIVE, used);
    }

    /// The host's side will not do these any more. Data is to have been given before.
    pub fn end(&mut self, connection: u32, ends: Shutdown) {
        if let Some(found) = self.connections.get_mut(&connection) {
            found.end(ends);
            self.speak(connection);
        }
    }

    /// Cuts a connection off, both ways.
    pub fn close(&mut self, connection: u32) {
        if let Some(mut found) = self.forget(connection)
            && found.state != State::Waiting
        {
            self.resets.push_back(found.reset());
        }
    }

    fn forget(&mut self, connection: u32) -> Option<Connection> {
        let found = self.connections.remove(&connection)?;
        if found.queued {
            self.talkers.retain(|id| *id != connection);
        }
        Some(found)
    }

    /// Tells the driver what there is to tell. Returns true if there may be more to do at once:
    /// packets to take, or buffers, which the owner may want too. Otherwise it is notified when
    /// there is.
    pub fn settle(&mut self, transport: &mut Transport, wants_buffers: bool) -> bool {
        self.tell(transport);
        let mut more = false;
        if wants_buffers || !self.resets.is_empty() || !self.talkers.is_empty() {
            more |= transport.rearm(RECEIVE);
        }
        if self.resets.len() < MAX_RESETS {
            more |= transport.rearm(TRANSMIT);
        }
        more
    }

    /// Sends packets without data as long as there are buffers for them. Requests come behind
    /// resets, so that those who connect and leave do not make resets grow.
    fn tell(&mut self, transport: &mut Transport) {
        while !self.resets.is_empty() || !self.talkers.is_empty() {
            let Some(chain) = transport.pop(RECEIVE) else {
                return;
            };
            if chain.writable_length() < HEADER_SIZE as u64 {
                transport.fail(&QueueError::Protocol(
                    "a receive buffer has no room for a header",
                ));
                return;
            }
            let reset = self.resets.pop_front();
            let Some(header) = reset.or_else(|| self.next_word()) else {
                transport.unpop(RECEIVE, vec![chain]);
                return;
            };
            chain.write(transport.memory(), 0, &header.bytes());
            transport.push(RECEIVE, chain, HEADER_SIZE as u32);
        }
    }

    fn next_word(&mut self) -> Option<Header> {
        while let Some(id) = self.talkers.pop_front() {
            let Some(connection) = self.connections.get_mut(&id) else {
                continue;
            };
            connection.queued = false;
            let word = connection.next_word();
            self.speak(id);
            if word.is_some() {
                return word;
            }
        }
        None
    }

    /// Puts a connection that has something to tell behind the others that have.
    fn speak(&mut self, connection: u32) {
        if let Some(found) = self.connections.get_mut(&connection)
            && !found.queued
            && found.has_words()
        {
            found.queued = true;
            self.talkers.push_back(connection);
        }
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> DeviceType {
        DeviceType {
            id: 19,
            class: 0x07_80_00,
        }
    }

    fn features(&self) -> u64 {
        FEATURE_STREAM
    }

    fn queue_count(&self) -> u16 {
        3
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&u64::from(self.cid).to_le_bytes(), offset, data);
    }

    fn reset(&mut self) {
        // A driver resets its device before it starts: who waits for that goes on waiting.
        self.connections.retain(|_, c| c.state == State::Waiting);
        let waiting = &self.connections;
        self.talkers.retain(|id| waiting.contains_key(id));
        self.resets.clear();
        self.was_reset = true;
    }
}

#[cfg(test)]
mod tests;
