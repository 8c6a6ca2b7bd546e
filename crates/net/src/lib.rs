//! A network for virtual machines that needs no privileges: a switch between them, and a gateway
//! that gives them addresses, names and a way out through sockets of its own process.
//!
//! ```text
//!   machine ══ socket, one frame a message ══► Port ─┐
//!   machine ══════════════════════════════════► Port ─┤ Switch: who may send what, to whom
//!                                                     │
//!                            other guests ◄───────────┤
//!        Gateway: ARP, NDP, DHCP, RA, echo ◄──────────┤
//!                    DNS: names of guests ◄───────────┤
//!                                                     ▼
//!        host sockets ◄── Flow (TCP), Exchange (UDP, echo) ◄── policy: what may be reached
//!        host sockets ──► Forwarding: ports of the host that lead to guests
//! ```
//!
//! Where there are privileges, a [`Bridge`] of the host's carries the frames instead, and its kernel
//! does the rest; the switch is then its DHCP and name server.
//!
//! One thread and one event loop, [`Switch::run`]. Whoever owns the process makes the [`Switch`],
//! gives it ports, locks the process up, and lets it run; a machine gets its place with [`join`].
//! A guest's frames are hostile: all of it is checked, bounded, and never makes the switch panic.
//! This crate must never know of virtio devices or machines; that the header before each frame is
//! virtio's spares a copy, no more.
#![forbid(unsafe_code)]

mod bridge;
mod config;
mod dns;
mod fragments;
mod gateway;
mod nat;
mod offload;
mod policy;
mod port;
mod protocol;
mod ring;
mod run;
mod switch;
mod tcp;
mod wire;

#[cfg(test)]
mod fuzz_tests;

pub use bridge::{Bridge, BridgeError, is_bridge_name};
pub use config::{
    Addresses, Config, DOMAIN, GATEWAY, GATEWAY_LINK, GATEWAY_MAC, GATEWAY_V6, MTU, PREFIX,
    SUBNET_BITS, Subnet,
};
pub use dns::is_host_name;
pub use nat::listen_on;
pub use offload::{HEADER_SIZE, Offloads};
pub use protocol::{
    Forward, Hello, JoinError, Joined, MAX_MESSAGE, Protocol, answer_hello, join, port_pair,
    receive_hello,
};
pub use switch::Switch;
pub use wire::MacAddress;
