//! What a machine is made of, as its owner asks for it.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use strata_disk::{Format, Passphrase};
use strata_net::Joined;
use strata_share::Share;

/// Everything a machine is built from.
#[derive(Debug)]
pub struct MachineConfig {
    /// Number of vCPUs, 1 to [`MAX_CPUS`](crate::MAX_CPUS).
    pub cpus: u8,
    /// Bytes of RAM, a multiple of 4 KiB.
    pub memory: u64,
    /// What runs the vCPUs.
    pub accel: Accel,
    /// A Linux bzImage or ELF `vmlinux`, or a Multiboot kernel.
    pub kernel: PathBuf,
    /// Parts of the initial RAM disk, put together in order, each padded to 4 bytes; to a
    /// Multiboot kernel each is a module. Empty: there is none.
    pub initrd: Vec<InitrdPart>,
    /// Modules of a Multiboot kernel, after the parts of the initial RAM disk.
    pub modules: Vec<BootModule>,
    /// The kernel's command line. `None`: what suits its kind, which for Linux is a console on
    /// the serial port and a reset after a panic. A Multiboot kernel finds its path before it.
    pub command_line: Option<String>,
    /// The first of four ports that end the machine with [`Outcome::DebugExit`] when the guest
    /// writes to one. `None`: there are no such ports.
    ///
    /// [`Outcome::DebugExit`]: crate::Outcome::DebugExit
    pub debug_exit: Option<u16>,
    /// Virtio disks, in order: vda, vdb, ...
    pub disks: Vec<DiskConfig>,
    /// Places on networks, each with a card: eth0, eth1, ...
    pub networks: Vec<Joined>,
    /// A socket device, by which programs of the host reach ports of the guest. `None`: there is
    /// none.
    pub vsock: Option<VsockConfig>,
    /// Folders of the host that the guest may mount by their tags.
    pub shares: Vec<Share>,
    /// The serial port, ttyS0.
    pub console: SerialConsole,
    /// Ports of a virtio console. Empty: there is no such device.
    pub ports: Vec<ConsolePort>,
}

/// What runs the vCPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Accel {
    /// The best that works on this host; so far that is always the software CPU.
    #[default]
    Auto,
    /// The software CPU. Never opens `/dev/kvm`.
    Soft,
}

/// A part of the initial RAM disk.
#[derive(Clone, Debug)]
pub enum InitrdPart {
    /// The content of a file.
    File(PathBuf),
    /// These bytes.
    Bytes(Vec<u8>),
}

/// A module of a Multiboot kernel.
#[derive(Clone, Debug)]
pub struct BootModule {
    /// Its content.
    pub path: PathBuf,
    /// What the kernel is told of it, after the path.
    pub arguments: String,
}

/// A disk.
#[derive(Clone, Debug)]
pub struct DiskConfig {
    /// What is on it.
    pub content: DiskContent,
    /// Whether the guest may only read it.
    pub read_only: bool,
}

impl DiskConfig {
    /// That of one image, which is not encrypted.
    pub fn image(path: impl Into<PathBuf>, format: Option<Format>, read_only: bool) -> Self {
        Self {
            content: DiskContent::Image(DiskImage::new(path, format)),
            read_only,
        }
    }
}

/// What is on a disk.
#[derive(Clone, Debug)]
pub enum DiskContent {
    /// That of an image or block device.
    Image(DiskImage),
    /// Partitions: each with a name, and what is on it. The guest can only read them.
    Partitions(Vec<(String, DiskImage)>),
}

/// A disk image or block device.
#[derive(Clone, Debug)]
pub struct DiskImage {
    /// Where it is on the host.
    pub path: PathBuf,
    /// Its format; without, its name decides.
    pub format: Option<Format>,
    /// What opens it, if it is encrypted.
    pub passphrase: Option<Passphrase>,
}

impl DiskImage {
    /// One that is not encrypted.
    pub fn new(path: impl Into<PathBuf>, format: Option<Format>) -> Self {
        Self {
            path: path.into(),
            format,
            passphrase: None,
        }
    }
}

/// A socket device. A program of the host connects to the listener, writes `CONNECT PORT` and a
/// newline, and reads `OK NUMBER` and a newline when a program of the guest has accepted on that
/// port; what follows are the bytes of the connection. It is closed if nobody accepts.
#[derive(Debug)]
pub struct VsockConfig {
    /// The guest's context ID, one of [`VsockConfig::CIDS`]; [`VsockConfig::CID`] where nobody minds.
    pub cid: u32,
    /// A Unix stream socket that listens.
    pub listener: OwnedFd,
}

impl VsockConfig {
    /// The context ID that a guest usually has.
    pub const CID: u32 = 3;
    /// Those that a guest can have (virtio 1.2 §5.10.4).
    pub const CIDS: std::ops::Range<u32> = 3..u32::MAX;
}

/// Where the serial port is connected to on the host.
pub struct SerialConsole {
    /// Takes what the guest sends. Written to from a thread of its own and flushed
    /// whenever the guest pauses.
    pub output: Box<dyn Write + Send>,
    /// What the guest receives. Its end is not the end of the guest.
    pub input: Option<Box<dyn Read + Send>>,
}

impl std::fmt::Debug for SerialConsole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let input = self.input.is_some();
        f.debug_struct("SerialConsole")
            .field("input", &input)
            .finish_non_exhaustive()
    }
}

/// A port of the virtio console: `/dev/virtio-ports/NAME` in the guest.
pub struct ConsolePort {
    /// Its name.
    pub name: String,
    /// What the guest reads; when it ends, so does the guest's.
    pub input: Option<Box<dyn Read + Send>>,
    /// Takes what the guest writes.
    pub output: Option<Box<dyn Write + Send>>,
}

impl std::fmt::Debug for ConsolePort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConsolePort")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}
