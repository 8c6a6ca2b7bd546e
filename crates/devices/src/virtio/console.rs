//! virtio-console (virtio 1.2 §5.3): named byte channels (ports) between host and guest.
//!
//! The owner moves the bytes: [`Console::take_output`] when it has room for them,
//! [`Console::give_input`] when it has some. Input goes only into buffers that the guest
//! has posted on a port that a guest program has opened (Linux throws away what arrives
//! earlier), so no byte is lost. A port is closed with [`Console::close_input`], which the
//! guest's reader sees as end of file once it has read everything before.

use std::collections::VecDeque;

use super::queue::Chain;
use super::transport::Transport;
use super::{DeviceType, QUEUE_SIZE, VirtioDevice, copy_config};

/// The most ports: each takes two queues, as does the control channel.
pub const MAX_PORTS: usize = super::MAX_QUEUES as usize / 2 - 1;

/// `VIRTIO_CONSOLE_F_MULTIPORT`.
const FEATURE_MULTIPORT: u64 = 1 << 1;
/// Control messages to the driver, and from it (§5.3.2).
const CONTROL_RECEIVE: usize = 2;
const CONTROL_TRANSMIT: usize = 3;
/// Bytes of a control message: port, event, value (§5.3.6.2).
const CONTROL_SIZE: usize = 8;
/// Messages that may wait for the driver to post buffers before more of its own are read.
const MAX_WAITING: usize = 4 * QUEUE_SIZE as usize;
/// Bytes of output that are kept of each port when the device is reset.
const MAX_LATE: usize = 4 << 20;

/// Control events (§5.3.6.2).
mod event {
    pub(super) const DEVICE_READY: u16 = 0;
    pub(super) const DEVICE_ADD: u16 = 1;
    pub(super) const PORT_READY: u16 = 3;
    pub(super) const CONSOLE_PORT: u16 = 4;
    pub(super) const PORT_OPEN: u16 = 6;
    pub(super) const PORT_NAME: u16 = 7;
}

/// What a port is.
#[derive(Clone, Debug, Default)]
pub struct PortConfig {
    /// What the guest finds it by: Linux shows it in `/sys/class/virtio-ports/*/name`.
    pub name: String,
    /// The guest is to make it a console (`hvc`).
    pub console: bool,
}

#[derive(Debug)]
struct Port {
    config: PortConfig,
    /// The driver knows of it.
    ready: bool,
    guest_open: bool,
    host_open: bool,
    /// Output that the owner has taken a part of, and how much.
    sending: Option<(Chain, u64)>,
    /// Output of before a reset that the owner has not taken yet. Linux resets its devices as it
    /// goes down, and does not wait for what it wrote before.
    late: Vec<u8>,
}

/// A console device with one or more ports.
#[derive(Debug)]
pub struct Console {
    ports: Vec<Port>,
    waiting: VecDeque<Vec<u8>>,
}

impl Console {
    /// A device with `ports`, of which the first [`MAX_PORTS`] count.
    pub fn new(ports: Vec<PortConfig>) -> Self {
        let port = |config| Port {
            config,
            ready: false,
            guest_open: false,
            host_open: true,
            sending: None,
            late: Vec::new(),
        };
        Self {
            ports: ports.into_iter().take(MAX_PORTS).map(port).collect(),
            waiting: VecDeque::new(),
        }
    }

    /// The number of ports.
    pub fn port_count(&self) -> usize {
        self.ports.len()
    }

    /// The queue that the guest posts buffers for input on (§5.3.2).
    pub fn receive_queue(port: usize) -> usize {
        if port == 0 { 0 } else { 2 * port + 2 }
    }

    /// The queue that the guest's output comes on.
    pub fn transmit_queue(port: usize) -> usize {
        Self::receive_queue(port) + 1
    }

    /// Whether a guest program has the port open.
    pub fn guest_open(&self, port: usize) -> bool {
        self.ports.get(port).is_some_and(|p| p.guest_open)
    }

    /// Handles control messages, both ways. To be called whenever a queue was notified.
    /// Returns true if the driver may have more to say.
    pub fn process_control(&mut self, transport: &mut Transport) -> bool {
        self.send_waiting(transport);
        for _ in 0..QUEUE_SIZE {
            if self.waiting.len() >= MAX_WAITING {
                return false;
            }
            let Some(chain) = transport.pop(CONTROL_TRANSMIT) else {
                return transport.rearm(CONTROL_TRANSMIT);
            };
            let mut message = [0; CONTROL_SIZE];
            let length = chain.read(transport.memory(), 0, &mut message);
            transport.push(CONTROL_TRANSMIT, chain, 0);
            if length == CONTROL_SIZE {
                let [a, b, c, d, e, f, g, h] = message;
                let event = u16::from_le_bytes([e, f]);
                self.control(
                    u32::from_le_bytes([a, b, c, d]),
                    event,
                    u16::from_le_bytes([g, h]),
                );
                self.send_waiting(transport);
            }
        }
        true
    }

    fn control(&mut self, id: u32, event: u16, value: u16) {
        if event == event::DEVICE_READY {
            if value == 1 {
                for id in 0..self.ports.len() {
                    self.tell(id, event::DEVICE_ADD, 1, b"");
                }
            }
            return;
        }
        let id = id as usize;
        let Some(port) = self.ports.get_mut(id) else {
            return;
        };
        match event {
            event::PORT_READY if value == 1 => {
                port.ready = true;
                let (host_open, PortConfig { name, console }) =
                    (port.host_open, port.config.clone());
                if console {
                    self.tell(id, event::CONSOLE_PORT, 1, b"");
                }
                if !name.is_empty() {
                    self.tell(id, event::PORT_NAME, 1, name.as_bytes());
                }
                if host_open {
                    self.tell(id, event::PORT_OPEN, 1, b"");
                }
            }
            event::PORT_OPEN => port.guest_open = value != 0,
            _ => {}
        }
    }

    fn tell(&mut self, id: usize, event: u16, value: u16, more: &[u8]) {
        let mut message = (id as u32).to_le_bytes().to_vec();
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        message.extend(more);
        self.waiting.push_back(message);
    }

    fn send_waiting(&mut self, transport: &mut Transport) {
        while !self.waiting.is_empty() {
            let Some(chain) = transport.pop(CONTROL_RECEIVE) else {
                if transport.rearm(CONTROL_RECEIVE) {
                    continue;
                }
                return;
            };
            if let Some(message) = self.waiting.pop_front() {
                let written = chain.write(transport.memory(), 0, &message);
                transport.push(CONTROL_RECEIVE, chain, written as u32);
            }
        }
    }

    /// Appends to `out` at most `room` bytes that the guest has written to `port`.
    /// Returns true if there may be more.
    pub fn take_output(
        &mut self,
        transport: &mut Transport,
        port: usize,
        room: usize,
        out: &mut Vec<u8>,
    ) -> bool {
        let Some(state) = self.ports.get_mut(port) else {
            return false;
        };
        let queue = Self::transmit_queue(port);
        let mut room = room;
        let late = state.late.len().min(room);
        out.extend(state.late.drain(..late));
        room -= late;
        // The guest adds while we take, and may add nothing but empty buffers.
        for _ in 0..QUEUE_SIZE {
            if room == 0 {
                return true;
            }
            let next = state
                .sending
                .take()
                .or_else(|| Some((transport.pop(queue)?, 0)));
            let Some((chain, offset)) = next else {
                return transport.rearm(queue);
            };
            let start = out.len();
            let length = (chain.readable_length() - offset).min(room as u64) as usize;
            out.resize(start + length, 0);
            let done = chain.read(transport.memory(), offset, &mut out[start..]);
            out.truncate(start + done);
            room -= done;
            let offset = offset + done as u64;
            if done == length && offset < chain.readable_length() {
                state.sending = Some((chain, offset));
            } else {
                transport.push(queue, chain, 0);
            }
        }
        true
    }

    /// Hands input to the guest. Returns how many of `bytes` it took; the rest is to be
    /// offered again when the port's receive queue or the control queue is notified.
    pub fn give_input(&mut self, transport: &mut Transport, port: usize, bytes: &[u8]) -> usize {
        if !self.guest_open(port) {
            return 0;
        }
        let queue = Self::receive_queue(port);
        let mut given = 0;
        for _ in 0..QUEUE_SIZE {
            if given == bytes.len() {
                break;
            }
            let Some(chain) = transport.pop(queue) else {
                if transport.rearm(queue) {
                    continue;
                }
                break;
            };
            let written = chain.write(transport.memory(), 0, &bytes[given..]);
            given += written;
            transport.push(queue, chain, written as u32);
        }
        given
    }

    /// The host's end of `port` is closed: the guest is told, now or when its driver
    /// comes up. All input before is to have been given.
    pub fn close_input(&mut self, transport: &mut Transport, port: usize) {
        let Some(state) = self.ports.get_mut(port) else {
            return;
        };
        let tell = state.host_open && state.ready;
        state.host_open = false;
        if tell {
            self.tell(port, event::PORT_OPEN, 0, b"");
            self.send_waiting(transport);
        }
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> DeviceType {
        DeviceType {
            id: 3,
            class: 0x07_80_00,
        }
    }

    fn features(&self) -> u64 {
        FEATURE_MULTIPORT
    }

    fn queue_count(&self) -> u16 {
        // The control queues lie behind those of port 0, whether or not there is a port 1.
        2 * (self.ports.len().max(1) as u16 + 1)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut image = [0; 12];
        image[4..8].copy_from_slice(&(self.ports.len() as u32).to_le_bytes());
        copy_config(&image, offset, data);
    }

    fn activate(&mut self, features: u64) {
        // Without control messages nobody says that port 0 is open.
        if let Some(port) = self.ports.first_mut()
            && features & FEATURE_MULTIPORT == 0
        {
            port.guest_open = true;
        }
    }

    fn before_reset(&mut self, transport: &mut Transport) {
        for port in 0..self.ports.len() {
            let mut late = std::mem::take(&mut self.ports[port].late);
            let room = MAX_LATE.saturating_sub(late.len());
            // once round the queue: what a driver adds meanwhile is not of before
            self.take_output(transport, port, room, &mut late);
            self.ports[port].late = late;
        }
    }

    fn reset(&mut self) {
        self.waiting.clear();
        for port in &mut self.ports {
            port.ready = false;
            port.guest_open = false;
            port.sending = None;
        }
    }
}

#[cfg(test)]
mod tests;
