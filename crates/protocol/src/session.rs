//! What one boot asks of a guest.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use crate::Size;

/// Names of the virtio-console ports that carry a main command's streams: what it reads, what it
/// writes, and what it writes as errors.
pub const STREAM_PORTS: [&str; 3] = ["strata.stdin", "strata.stdout", "strata.stderr"];

/// Name of the virtio-console port that stands for the main command itself. In frames, and without
/// a [`crate::Greeting`], as the session has said the version: the guest tells
/// [`crate::Reply::Starting`] and [`crate::Reply::Ended`], the host [`crate::Input::Signal`] and
/// [`crate::Input::Resize`]. A machine has this port behind those of the streams: the guest
/// concludes from it that they are open.
pub const CONTROL_PORT: &str = "strata.control";

/// What a guest is to do. It learns it at boot, from a file of its initramfs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    /// What runs.
    pub run: Run,
    /// `TERM` for what runs on the console.
    pub term: Option<Vec<u8>>,
    /// Size of the console's terminal.
    pub size: Option<Size>,
    /// The host name: of a-z, 0-9 and hyphens.
    pub name: Option<String>,
    /// How the first network card is to be set up; not at all where `None`.
    pub network: Option<Network>,
    /// The file system of a container image, if not the appliance's own.
    pub container: Option<Container>,
    /// Programs use vsock as soon as they start: its driver is loaded before them.
    pub sockets_first: bool,
    /// Folders of the host's, in the order in which they are mounted.
    pub mounts: Vec<Mount>,
}

/// What runs in a guest, and with which streams.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Run {
    /// A shell on the console, for those who boot the guest's file system without Strata.
    #[default]
    Shell,
    /// A command; the machine ends with it.
    Command {
        /// The program and its arguments.
        words: Vec<Vec<u8>>,
        /// Where they lead.
        streams: Streams,
    },
    /// Nothing by itself: the machine waits for what is executed in it, until it is stopped.
    Wait,
    /// The container image's own init, which has the machine to itself.
    Init,
}

/// Where a main command's streams lead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Streams {
    /// To the console, which is its terminal.
    Console,
    /// To the [`STREAM_PORTS`].
    Ports,
    /// The output to the ports; the input comes from whoever attaches ([`crate::Request::Attach`]).
    Attached,
    /// To a terminal of its own. What it shows goes to the port of the standard output; what is
    /// typed comes from whoever attaches.
    Terminal(Size),
}

impl Streams {
    /// Whether those who attach give the input.
    pub fn takes_input(self) -> bool {
        matches!(self, Self::Attached | Self::Terminal(_))
    }
}

/// What a guest is told of its network instead of having it ask.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Its address.
    pub address: Ipv4Addr,
    /// Bits of the network's mask.
    pub bits: u8,
    /// The way out, where names are asked for, too.
    pub gateway: Ipv4Addr,
    /// The domain in which names of one label are looked for.
    pub domain: String,
}

/// The file system of a container image, and how commands run in it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// Block devices of the layers, such as `vda1`, the lowest first.
    pub layers: Vec<String>,
    /// The block device of an ext4 file system for what is written; memory if `None`.
    pub scratch: Option<String>,
    /// `NAME=value`, each.
    pub environment: Vec<Vec<u8>>,
    /// A user's name or number, and after a colon a group's; root where empty.
    pub user: String,
    /// Where commands start; the root where empty.
    pub directory: String,
    /// Places whose content is the machine's own: made if they are not there.
    pub volumes: Vec<String>,
    /// The signal that asks the command to end.
    pub stop_signal: Option<u8>,
}

/// A folder of the host's in the guest, or a single file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// By which name the virtio-fs device offers it.
    pub tag: String,
    /// Where it is to be.
    pub path: Vec<u8>,
    /// It cannot be written to.
    pub read_only: bool,
    /// What is to be there is not the folder, but the file of this name in it.
    pub file: Option<String>,
}
