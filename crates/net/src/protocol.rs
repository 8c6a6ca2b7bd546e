//! How a machine joins a network: the first message on its port's socket says who it is and what
//! is to be forwarded to it; the answer says its addresses, or why it may not join. All later
//! messages are frames behind their [header](crate::offload), or [`Offloads`](crate::Offloads).

use std::fmt;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, recvmsg, send, sendmsg,
    socketpair, sockopt,
};
use serde::{Deserialize, Serialize};

use crate::config::Addresses;
use crate::wire::MacAddress;

/// Bytes of the largest message: a frame of 64 KiB with its headers.
pub const MAX_MESSAGE: usize = 12 + 14 + 65_535 + 64;
/// Bytes that a port's socket is asked to hold: several large frames. The host may give less.
const SOCKET_BUFFER: usize = 1 << 20;

/// What a forwarded port speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
}

/// A port of the host that leads to one of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forward {
    /// What it speaks.
    pub protocol: Protocol,
    /// Where the host listens.
    pub host: SocketAddr,
    /// The guest's port.
    pub guest: u16,
}

/// As `127.0.0.1:8080->80/tcp`.
impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        };
        write!(f, "{}->{}/{protocol}", self.host, self.guest)
    }
}

/// The first message on a port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// What other guests find this one by: a host name of one label, in lower case.
    pub name: Option<String>,
    /// Ports of the host's that lead to it.
    pub forwards: Vec<Forward>,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Answer {
    Welcome {
        mac: [u8; 6],
        ipv4: IpAddr,
        ipv6: IpAddr,
        gateway: IpAddr,
    },
    Refused(String),
}

impl Answer {
    pub(crate) fn welcome(addresses: &Addresses, gateway: Ipv4Addr) -> Self {
        Self::Welcome {
            mac: addresses.mac.0,
            ipv4: addresses.ipv4.into(),
            ipv6: addresses.ipv6.into(),
            gateway: gateway.into(),
        }
    }
}

/// Why a machine cannot join a network.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The network says why.
    #[error("the network refuses the machine: {0}")]
    Refused(String),
    /// The switch does not answer as it should.
    #[error("the network's switch does not answer")]
    Lost(#[source] io::Error),
}

/// A place on a network, for one machine.
#[derive(Debug)]
pub struct Joined {
    /// Carries the machine's frames, without blocking. Where there is a tap device it carries
    /// none, and ends when the network does.
    pub socket: OwnedFd,
    /// The tap device that carries the frames, without blocking, behind a header of 12 bytes.
    pub tap: Option<OwnedFd>,
    /// The machine's addresses.
    pub addresses: Addresses,
    /// Its router and name server.
    pub gateway: Ipv4Addr,
}

/// Two connected sockets for the two ends of a port.
pub fn port_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let pair = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    Ok(pair)
}

/// Lets a port's socket hold several large frames, as far as the host allows.
pub(crate) fn widen(socket: impl AsFd) {
    let _ = sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER);
}

/// Joins the network whose switch has the other end of `socket`. Waits for its answer.
pub fn join(socket: OwnedFd, hello: &Hello) -> Result<Joined, JoinError> {
    let lost = |error: rustix::io::Errno| JoinError::Lost(error.into());
    let odd = |text: &'static str| JoinError::Lost(io::Error::new(ErrorKind::InvalidData, text));
    widen(&socket);
    let text = serde_json::to_vec(hello).map_err(|_| odd("the machine's name has no JSON"))?;
    send(&socket, &text, SendFlags::NOSIGNAL).map_err(lost)?;
    let mut buffer = vec![0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        &socket,
        &mut [IoSliceMut::new(&mut buffer)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    );
    let length = received.map_err(lost)?.bytes;
    if length == 0 {
        return Err(JoinError::Lost(ErrorKind::UnexpectedEof.into()));
    }
    let tap = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    rustix::io::ioctl_fionbio(&socket, true).map_err(lost)?;
    let answer = buffer
        .get(..length)
        .and_then(|text| serde_json::from_slice(text).ok());
    match answer {
        Some(Answer::Welcome {
            mac,
            ipv4: IpAddr::V4(ipv4),
            ipv6: IpAddr::V6(ipv6),
            gateway: IpAddr::V4(gateway),
        }) => Ok(Joined {
            socket,
            tap,
            addresses: Addresses {
                mac: MacAddress(mac),
                ipv4,
                ipv6,
            },
            gateway,
        }),
        Some(Answer::Refused(why)) => Err(JoinError::Refused(why)),
        _ => Err(odd("its answer makes no sense")),
    }
}

/// Waits for the first message of a machine that is to have a tap device.
pub fn receive_hello(socket: impl AsFd) -> io::Result<Hello> {
    let mut buffer = vec![0; MAX_MESSAGE];
    let (_, length) = recv(socket, &mut buffer[..], RecvFlags::empty())?;
    Ok(serde_json::from_slice(&buffer[..length])?)
}

/// Answers it: with its place and its tap device, or with why it gets none.
pub fn answer_hello(
    socket: impl AsFd,
    place: Result<(&Addresses, Ipv4Addr, &OwnedFd), String>,
) -> io::Result<()> {
    let (answer, tap) = match place {
        Ok((addresses, gateway, tap)) => (Answer::welcome(addresses, gateway), Some(tap.as_fd())),
        Err(why) => (Answer::Refused(why), None),
    };
    let text = serde_json::to_vec(&answer)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(tap.as_slice()));
    let flags = SendFlags::NOSIGNAL;
    sendmsg(socket, &[IoSlice::new(&text)], &mut control, flags)?;
    Ok(())
}
