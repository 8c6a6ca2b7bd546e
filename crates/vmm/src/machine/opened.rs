//! A machine whose files are open, and no thread of it started.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use strata_memory::GuestMemory;
use strata_net::Joined;
use strata_share::Share;

use super::Machine;
use crate::chipset::{self, Parts};
use crate::clock::Clock;
use crate::config::{ConsolePort, SerialConsole};
use crate::console::{Output, SerialPort};
use crate::ending::Ending;
use crate::error::Error;
use crate::interrupts::Interrupts;
use crate::layout;
use crate::timers::Timers;
use crate::vcpu::{Shared, Vcpu};
use crate::virtio::{Devices, Disk, Door, Port};

/// A machine that has all it will ever ask of the host but threads: the kernel and RAM disk are
/// in guest memory, the disks are open and locked, the vCPUs have their code caches.
///
/// From here on neither [`Opened::build`] nor [`Machine::run`] opens a file, makes a file
/// descriptor (but for those whom a [`VsockConfig`](crate::VsockConfig) lets in) or maps memory that
/// can be executed. A process that means to lock itself up does so
/// now: what it forbids itself holds for all threads, since none has been started.
pub struct Opened {
    pub(super) clock: Clock,
    pub(super) memory: GuestMemory,
    pub(super) vcpus: Vec<Box<dyn Vcpu>>,
    pub(super) disks: Vec<Disk>,
    pub(super) networks: Vec<Joined>,
    /// The guest's context ID, and where its visitors come in.
    pub(super) vsock: Option<(u32, Door)>,
    pub(super) shares: Vec<Share>,
    pub(super) console: SerialConsole,
    pub(super) ports: Vec<ConsolePort>,
    pub(super) debug_exit: Option<u16>,
}

impl std::fmt::Debug for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Opened")
            .field("vcpus", &self.vcpus.len())
            .field("disks", &self.disks)
            .finish_non_exhaustive()
    }
}

impl Opened {
    /// Sets up the devices and starts their threads and the console's. Nothing of the guest runs
    /// yet.
    pub fn build(self) -> Result<Machine, Error> {
        let Self {
            clock,
            memory,
            vcpus,
            disks,
            networks,
            vsock,
            shares,
            console,
            ports,
            debug_exit,
        } = self;
        let cpus = u8::try_from(vcpus.len()).unwrap_or(u8::MAX);
        let interrupts = Interrupts::new(cpus, &clock);
        let sink = Arc::new(interrupts.clone());
        let mut devices = Devices::new(memory.clone(), sink, layout::pci(), cpus)?;
        for disk in disks {
            devices.add_disk(disk)?;
        }
        for joined in networks {
            devices.add_net(joined)?;
        }
        if let Some((cid, door)) = vsock {
            devices.add_vsock(cid, door)?;
        }
        for share in shares {
            devices.add_share(share)?;
        }
        devices.add_entropy()?;
        if !ports.is_empty() {
            let port = |p: ConsolePort| Port {
                name: p.name,
                input: p.input,
                output: p.output,
            };
            devices.add_console(ports.into_iter().map(port).collect())?;
        }

        let ending = Arc::new(Ending::default());
        let output = Arc::new(Output::default());
        let serial = SerialPort::new(Arc::clone(&output), interrupts.clone(), Arc::clone(&ending));
        let serial = Arc::new(serial);
        let buses = chipset::buses(Parts {
            clock,
            ending: Arc::clone(&ending),
            interrupts: interrupts.clone(),
            serial: Arc::clone(&serial),
            pci: devices.pci(),
            debug_exit,
        })?;
        let shared = Shared {
            memory,
            buses,
            interrupts,
            timers: Timers::new(cpus),
            clock,
            ending,
            stop: Arc::new(AtomicBool::new(false)),
        };
        shared.ending.set_halt(Box::new(shared.halt()));
        output.start(console.output).map_err(Error::Thread)?;
        let machine = Machine {
            shared: Arc::new(shared),
            vcpus,
            devices: Some(devices),
            serial,
            output,
        };
        if let Some(input) = console.input {
            machine.serial.start_input(input).map_err(Error::Thread)?;
        }
        Ok(machine)
    }
}
