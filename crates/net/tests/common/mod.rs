//! A guest whose network stack is smoltcp's, on a switch that runs in a thread of its own.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::net::{RecvFlags, SendFlags, recv, send};
use smoltcp::iface::{Config as InterfaceConfig, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{tcp, udp};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr};
use strata_net::{
    Addresses, Config, GATEWAY, GATEWAY_V6, HEADER_SIZE, Hello, MAX_MESSAGE, MTU, Switch, join,
    port_pair,
};

/// A switch with so many ports, and the guests' ends of them.
pub(crate) fn network(config: Config, ports: usize) -> (JoinHandle<()>, Vec<OwnedFd>) {
    let mut switch = Switch::new(config).unwrap();
    let mut ends = Vec::new();
    for _ in 0..ports {
        let (ours, theirs) = port_pair().unwrap();
        switch.add_port(ours).unwrap();
        ends.push(theirs);
    }
    let thread = thread::spawn(move || switch.run().unwrap());
    (thread, ends)
}

/// The wire between guest and switch.
pub(crate) struct Wire {
    socket: OwnedFd,
    /// Frames that are lost on their way to the guest: those whose turn it is.
    pub(crate) lose_every: Option<usize>,
    received: usize,
}

impl Device for Wire {
    type RxToken<'a> = Received;
    type TxToken<'a> = Transmit<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received, Transmit<'_>)> {
        let mut buffer = vec![0; MAX_MESSAGE];
        loop {
            let (_, length) = recv(&self.socket, &mut buffer[..], RecvFlags::DONTWAIT).ok()?;
            if length == 0 {
                return None;
            }
            self.received += 1;
            if self
                .lose_every
                .is_some_and(|every| self.received.is_multiple_of(every))
            {
                continue;
            }
            let frame = buffer[HEADER_SIZE..length].to_vec();
            return Some((Received(frame), Transmit(&self.socket)));
        }
    }

    fn transmit(&mut self, _: Instant) -> Option<Transmit<'_>> {
        Some(Transmit(&self.socket))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = usize::from(MTU) + 14;
        capabilities
    }
}

pub(crate) struct Received(Vec<u8>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

pub(crate) struct Transmit<'a>(&'a OwnedFd);

impl TxToken for Transmit<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut message = vec![0; HEADER_SIZE + length];
        let result = f(&mut message[HEADER_SIZE..]);
        while send(self.0, &message, SendFlags::NOSIGNAL).is_err() {
            thread::yield_now();
        }
        result
    }
}

/// A guest with its stack.
pub(crate) struct Guest {
    pub(crate) addresses: Addresses,
    pub(crate) wire: Wire,
    pub(crate) interface: Interface,
    pub(crate) sockets: SocketSet<'static>,
}

impl Guest {
    /// Joins the network and takes the addresses that were given.
    pub(crate) fn join(socket: OwnedFd, hello: &Hello) -> Self {
        let joined = join(socket, hello).unwrap();
        let addresses = joined.addresses;
        let mut wire = Wire {
            socket: joined.socket,
            lose_every: None,
            received: 0,
        };
        let mac = HardwareAddress::Ethernet(EthernetAddress(addresses.mac.0));
        let mut interface = Interface::new(InterfaceConfig::new(mac), &mut wire, Instant::now());
        interface.update_ip_addrs(|list| {
            list.push(IpCidr::new(addresses.ipv4.into(), 24)).unwrap();
            list.push(IpCidr::new(addresses.ipv6.into(), 64)).unwrap();
        });
        interface
            .routes_mut()
            .add_default_ipv4_route(GATEWAY)
            .unwrap();
        interface
            .routes_mut()
            .add_default_ipv6_route(GATEWAY_V6)
            .unwrap();
        Self {
            addresses,
            wire,
            interface,
            sockets: SocketSet::new(Vec::new()),
        }
    }

    /// Lets the stack go on until `done` gives something.
    pub(crate) fn until<T>(&mut self, mut done: impl FnMut(&mut Self) -> Option<T>) -> T {
        for _ in 0..200_000 {
            self.interface
                .poll(Instant::now(), &mut self.wire, &mut self.sockets);
            if let Some(result) = done(self) {
                self.interface
                    .poll(Instant::now(), &mut self.wire, &mut self.sockets);
                return result;
            }
            thread::sleep(Duration::from_micros(50));
        }
        panic!("the guest waits in vain");
    }

    pub(crate) fn tcp(&mut self) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 60_000]);
        self.sockets.add(tcp::Socket::new(buffer(), buffer()))
    }

    pub(crate) fn stream(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// A connection that is being opened.
    pub(crate) fn connect(&mut self, to: SocketAddr, port: u16) -> SocketHandle {
        let handle = self.tcp();
        let socket = self.sockets.get_mut::<tcp::Socket>(handle);
        let to = (smoltcp::wire::IpAddress::from(to.ip()), to.port());
        socket.connect(self.interface.context(), to, port).unwrap();
        handle
    }

    /// Waits until a connection is open; false if it was refused.
    pub(crate) fn is_open(&mut self, handle: SocketHandle) -> bool {
        self.until(|guest| match guest.stream(handle).state() {
            tcp::State::SynSent | tcp::State::Listen | tcp::State::SynReceived => None,
            state => Some(state == tcp::State::Established || state == tcp::State::CloseWait),
        })
    }

    pub(crate) fn udp(&mut self, port: u16) -> SocketHandle {
        let buffer =
            || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 64], vec![0; 128 << 10]);
        let mut socket = udp::Socket::new(buffer(), buffer());
        socket.bind(port).unwrap();
        self.sockets.add(socket)
    }

    /// Sends a datagram and waits for one.
    pub(crate) fn ask(&mut self, handle: SocketHandle, to: SocketAddr, data: &[u8]) -> Vec<u8> {
        self.say(handle, to, data);
        self.hear(handle).1
    }

    pub(crate) fn say(&mut self, handle: SocketHandle, to: SocketAddr, data: &[u8]) {
        let to = (smoltcp::wire::IpAddress::from(to.ip()), to.port());
        self.sockets
            .get_mut::<udp::Socket>(handle)
            .send_slice(data, to)
            .unwrap();
    }

    pub(crate) fn hear(&mut self, handle: SocketHandle) -> (SocketAddr, Vec<u8>) {
        self.until(|guest| {
            let socket = guest.sockets.get_mut::<udp::Socket>(handle);
            let (data, from) = socket.recv().ok()?;
            let ip: IpAddr = from.endpoint.addr.into();
            Some(((ip, from.endpoint.port).into(), data.to_vec()))
        })
    }
}

/// A network whose guests may reach this host, at the gateway's address.
pub(crate) fn open() -> Config {
    Config {
        host: true,
        ..Config::default()
    }
}

/// The gateway's address with a port.
pub(crate) fn gateway(port: u16) -> SocketAddr {
    (GATEWAY, port).into()
}

/// Serves one connection that comes to this host; gives its port.
pub(crate) fn serve(
    address: IpAddr,
    work: impl FnOnce(std::net::TcpStream) + Send + 'static,
) -> (u16, JoinHandle<()>) {
    let listener = std::net::TcpListener::bind((address, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let thread = thread::spawn(move || work(listener.accept().unwrap().0));
    (port, thread)
}

/// Sends back all that comes, until the other side ends.
pub(crate) fn echo(mut stream: std::net::TcpStream) {
    let mut buffer = vec![0; 32 << 10];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => stream.write_all(&buffer[..count]).unwrap(),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => panic!("{error}"),
        }
    }
}

/// Bytes that tell where they are from.
pub(crate) fn pattern(length: usize) -> Vec<u8> {
    (0..length as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect()
}

pub(crate) const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
