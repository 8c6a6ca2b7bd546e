//! A machine's PCI bus and virtio devices with their host side: files, random numbers,
//! streams, and a thread for each queue or device that does the I/O.
//!
//! ```text
//!   vCPU ──port, MMIO──► PciRoot ──lock──► VirtioPci<D> ──notified──► Doorbell
//!                                              ▲                         │
//!   Interrupts ◄── MSI ── Shared<D> ──lock─────┘◄── pop, complete ── worker ──► host I/O
//! ```
//!
//! The machine makes a [`Devices`], adds what its configuration asks for, hands
//! [`Devices::pci`] to its bus dispatch, and calls [`Devices::shutdown`] when its vCPUs
//! have stopped. vCPU threads never do host I/O here, and no lock is held during any.

mod block;
mod console;
mod disk;
mod doorbell;
mod entropy;
mod net;
mod pipe;
mod root;
mod share;
mod sys;
mod tap;
mod vsock;

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use strata_devices::pci::{BusFull, PciLayout};
use strata_devices::virtio::{
    Block, BlockConfig, Console, Entropy, Fs, MAX_PORTS, Net, NetConfig, PortConfig, TAG_SIZE,
    Vsock, fs_queue,
};
use strata_memory::GuestMemory;

use console::{Streams, Writer};
pub use disk::Disk;
use doorbell::Doorbell;
use net::Cable;
pub use root::PciRoot;
use root::{Endpoint, Shared};
pub use strata_disk::OpenError;
use strata_net::Joined;
use strata_share::Share;
pub use tap::open_tap;
pub use vsock::Door;

use share::Line;

pub use crate::config::ConsolePort as Port;

/// The most request queues a disk gets.
const MAX_BLOCK_QUEUES: u16 = 4;

/// Where devices send their interrupts.
pub trait MsiSink: Send + Sync {
    /// Delivers a message-signalled interrupt: a write of `data` to `address`. Called from
    /// vCPU and worker threads; must not call back into the PCI bus.
    fn deliver_msi(&self, address: u64, data: u32);
}

/// Why a device could not be added.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A disk's file is not fit for it.
    #[error(transparent)]
    Disk(#[from] OpenError),
    /// There are more devices than the bus holds.
    #[error("the machine has too many devices")]
    Bus(#[from] BusFull),
    /// There are more console ports than the device can have.
    #[error("a machine can have at most {MAX_PORTS} console ports, not {0}")]
    Ports(usize),
    /// A shared folder cannot be the guest's by this name.
    #[error("the tag of a share is of 1 to {TAG_SIZE} bytes and has sockets, which '{0}' is not")]
    Share(String),
    /// A worker thread could not be started.
    #[error("cannot start a thread for a device")]
    Thread(#[source] io::Error),
}

/// What every device is connected to.
struct Connect {
    memory: GuestMemory,
    interrupts: Arc<dyn MsiSink>,
}

struct Worker {
    bell: Arc<Doorbell>,
    thread: JoinHandle<()>,
}

/// A machine's PCI devices and their threads.
pub struct Devices {
    connect: Connect,
    pci: Arc<PciRoot>,
    block_queues: u16,
    disks: usize,
    workers: Vec<Worker>,
    writers: Vec<Writer>,
    cables: Vec<Arc<Cable>>,
    lines: Vec<Arc<Line>>,
}

impl Devices {
    /// A bus with nothing but its host bridge, for a machine of `cpus` vCPUs.
    pub fn new(
        memory: GuestMemory,
        interrupts: Arc<dyn MsiSink>,
        layout: PciLayout,
        cpus: u8,
    ) -> Result<Self, Error> {
        Ok(Self {
            connect: Connect { memory, interrupts },
            pci: Arc::new(PciRoot::new(layout)?),
            block_queues: u16::from(cpus).clamp(1, MAX_BLOCK_QUEUES),
            disks: 0,
            workers: Vec::new(),
            writers: Vec::new(),
            cables: Vec::new(),
            lines: Vec::new(),
        })
    }

    /// The bus, for the machine's port and MMIO dispatch.
    pub fn pci(&self) -> Arc<PciRoot> {
        Arc::clone(&self.pci)
    }

    /// Adds a disk. Its ID in the guest is `diskN`, N counting from 0.
    pub fn add_disk(&mut self, disk: Disk) -> Result<(), Error> {
        let disk = Arc::new(disk);
        let config = BlockConfig {
            sectors: disk.sectors(),
            read_only: disk.is_read_only(),
            queues: self.block_queues,
            id: format!("disk{}", self.disks),
        };
        let bells: Vec<_> = (0..self.block_queues)
            .map(|_| Arc::<Doorbell>::default())
            .collect();
        let device = Block::new(config);
        let shared = Shared::new(device, &self.connect, |queue| Arc::clone(&bells[queue]));
        for (queue, bell) in bells.iter().enumerate() {
            let (shared, disk) = (Arc::clone(&shared), Arc::clone(&disk));
            let memory = self.connect.memory.ram().clone();
            let name = format!("disk{}-{queue}", self.disks);
            self.spawn(&name, bell, move |bell| {
                block::serve(&shared, &disk, &memory, queue, bell);
            })?;
        }
        self.disks += 1;
        self.plug(shared)
    }

    /// Adds a source of entropy.
    pub fn add_entropy(&mut self) -> Result<(), Error> {
        let bell = Arc::<Doorbell>::default();
        let shared = Shared::new(Entropy, &self.connect, |_| Arc::clone(&bell));
        let worker = Arc::clone(&shared);
        self.spawn("entropy", &bell, move |bell| entropy::serve(&worker, bell))?;
        self.plug(shared)
    }

    /// Adds a network card at the place that `joined` is.
    pub fn add_net(&mut self, joined: Joined) -> Result<(), Error> {
        let Joined {
            socket,
            tap,
            addresses,
            ..
        } = joined;
        let memory = self.connect.memory.ram().clone();
        let cable = Arc::new(Cable::new(socket, tap, memory));
        let config = NetConfig {
            mac: addresses.mac.0,
            mtu: strata_net::MTU,
        };
        let bells = [(); 2].map(|()| Arc::<Doorbell>::default());
        let shared = Shared::new(Net::new(config), &self.connect, |queue| {
            Arc::clone(&bells[queue])
        });
        let [receive, transmit] = &bells;
        let (card, wire) = (Arc::clone(&shared), Arc::clone(&cable));
        self.spawn("net-in", receive, move |bell| {
            net::receive(&card, &wire, bell);
        })?;
        let (card, wire) = (Arc::clone(&shared), Arc::clone(&cable));
        self.spawn("net-out", transmit, move |bell| {
            net::transmit(&card, &wire, bell);
        })?;
        self.cables.push(cable);
        self.plug(shared)
    }

    /// Adds a socket device whose guest has the context ID `cid`, for those who come in through
    /// `door`.
    pub fn add_vsock(&mut self, cid: u32, door: Door) -> Result<(), Error> {
        let bell = door.bell();
        let shared = Shared::new(Vsock::new(cid), &self.connect, |_| Arc::clone(&bell));
        let (device, memory) = (Arc::clone(&shared), self.connect.memory.ram().clone());
        self.spawn("vsock", &bell, move |bell| {
            vsock::serve(&device, &memory, &door, bell);
        })?;
        self.plug(shared)
    }

    /// Adds a folder that the server at the other ends of `share`'s sockets serves.
    pub fn add_share(&mut self, share: Share) -> Result<(), Error> {
        let Share { tag, sockets } = share;
        if !(1..=TAG_SIZE).contains(&tag.len()) || sockets.len() < 2 {
            return Err(Error::Share(tag));
        }
        let bells = [(); 2].map(|()| Arc::<Doorbell>::default());
        let shared = Shared::new(Fs::new(&tag), &self.connect, |queue| {
            Arc::clone(&bells[queue])
        });
        let known = Arc::default();
        for (number, socket) in sockets.into_iter().enumerate() {
            let queue = number.min(fs_queue::REQUEST);
            let memory = self.connect.memory.ram().clone();
            let line = Arc::new(Line::new(socket, memory, Arc::clone(&known)));
            self.lines.push(Arc::clone(&line));
            let device = Arc::clone(&shared);
            self.spawn(&format!("{tag}-{number}"), &bells[queue], move |bell| {
                share::serve(&device, &line, queue, bell);
            })?;
        }
        self.plug(shared)
    }

    /// Adds a console device with `ports`, none of them a console in the guest's sense.
    pub fn add_console(&mut self, ports: Vec<Port>) -> Result<(), Error> {
        if ports.len() > MAX_PORTS {
            return Err(Error::Ports(ports.len()));
        }
        let bell = Arc::<Doorbell>::default();
        let name = |p: &Port| PortConfig {
            name: p.name.clone(),
            console: false,
        };
        let device = Console::new(ports.iter().map(name).collect());
        let shared = Shared::new(device, &self.connect, |_| Arc::clone(&bell));
        let mut streams = Vec::new();
        for port in ports {
            let mut ends = Streams::new();
            if let Some(input) = port.input {
                ends.read_from(input, &bell).map_err(Error::Thread)?;
            }
            if let Some(output) = port.output {
                let writer = ends.write_to(output, &bell).map_err(Error::Thread)?;
                self.writers.push(writer);
            }
            streams.push(ends);
        }
        let worker = Arc::clone(&shared);
        self.spawn("console", &bell, move |bell| {
            console::serve(&worker, streams, bell);
        })?;
        self.plug(shared)
    }

    fn plug(&self, endpoint: Arc<dyn Endpoint>) -> Result<(), Error> {
        self.pci.add(endpoint)?;
        Ok(())
    }

    fn spawn(
        &mut self,
        name: &str,
        bell: &Arc<Doorbell>,
        work: impl FnOnce(&Doorbell) + Send + 'static,
    ) -> Result<(), Error> {
        let own = Arc::clone(bell);
        let thread = thread::Builder::new()
            .name(name.into())
            .spawn(move || work(&own))
            .map_err(Error::Thread)?;
        self.workers.push(Worker {
            bell: Arc::clone(bell),
            thread,
        });
        Ok(())
    }

    /// Ends the workers: requests that are queued are served first, and all console
    /// output is written; those to shares, whose server may hang, are not. To be called when the vCPUs have stopped. Waits for host
    /// outputs that are slow; does not wait for host inputs that block.
    pub fn shutdown(&mut self) {
        for worker in &self.workers {
            worker.bell.stop();
        }
        self.cables.drain(..).for_each(|cable| cable.cut());
        self.lines.drain(..).for_each(|line| line.cut());
        for worker in self.workers.drain(..) {
            let _ = worker.thread.join();
        }
        self.writers.drain(..).for_each(Writer::finish);
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        self.shutdown();
    }
}

impl std::fmt::Debug for Devices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Devices")
            .field("workers", &self.workers.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
