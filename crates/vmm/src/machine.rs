//! A machine: built from its configuration, run until it ends.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use strata_hypervisor::state::Registers;
use strata_memory::GuestMemory;

use crate::boot::{self, Loaded};
use crate::chipset::{self, Parts};
use crate::clock::{Calibration, Clock, tsc};
use crate::config::MachineConfig;
use crate::console::{Output, SerialPort};
use crate::ending::{Ending, Outcome};
use crate::error::Error;
use crate::interrupts::Interrupts;
use crate::layout;
use crate::timers::Timers;
use crate::vcpu::{self, Factory, Shared};
use crate::virtio::{Devices, Port};

/// For how long a machine that was told to stop waits for its host to take its output.
const STOP_PATIENCE: Duration = Duration::from_secs(2);

/// A machine that is ready to run. Dropping it without running it ends its threads.
pub struct Machine {
    shared: Arc<Shared>,
    cpus: u8,
    factory: Arc<Factory>,
    /// Taken when the machine ends.
    devices: Option<Devices>,
    serial: Arc<SerialPort>,
    output: Arc<Output>,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine")
            .field("cpus", &self.cpus)
            .finish_non_exhaustive()
    }
}

/// A handle to a machine from outside.
#[derive(Clone)]
pub struct Control {
    ending: Arc<Ending>,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control")
            .field("over", &self.ending.is_over())
            .finish()
    }
}

impl Control {
    /// Ends [`Machine::run`] with [`Outcome::Stopped`], at once and without asking the
    /// guest. Nothing happens if the machine has ended already.
    pub fn stop(&self) {
        self.ending.end(Outcome::Stopped);
    }
}

impl Machine {
    /// Reads the kernel and the RAM disk, sets up memory and devices, and loads the guest.
    /// Nothing runs yet.
    pub fn build(config: MachineConfig) -> Result<Self, Error> {
        Self::build_with(config, vcpu::soft)
    }

    /// Builds a machine whose vCPUs come from the factory that `vcpus` makes for their first
    /// registers.
    fn build_with(
        config: MachineConfig,
        vcpus: impl FnOnce(Registers) -> Box<Factory>,
    ) -> Result<Self, Error> {
        let calibration = Calibration::start();
        let MachineConfig {
            cpus,
            memory: size,
            accel: _,
            kernel,
            initrd,
            command_line,
            disks,
            console,
            ports,
        } = config;
        if cpus != 1 {
            return Err(Error::Cpus(cpus));
        }
        let source = boot::Source {
            kernel: &kernel,
            initrd: &initrd,
            command_line: &command_line,
            cpus,
        };
        let loaded = Loaded::read(&source, size)?;
        let memory = GuestMemory::new(size).map_err(|source| Error::Memory { size, source })?;
        let registers = loaded.install(&memory)?;
        drop(loaded);

        let clock = Clock {
            tsc_khz: calibration.finish(),
            start_tsc: tsc(),
        };
        let interrupts = Interrupts::new(cpus, &clock);
        let sink = Arc::new(interrupts.clone());
        let mut devices = Devices::new(memory.clone(), sink, layout::pci(), cpus)?;
        for disk in &disks {
            devices.add_disk(&disk.path, disk.read_only)?;
        }
        devices.add_entropy()?;
        if !ports.is_empty() {
            let port = |p: crate::ConsolePort| Port {
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
        });
        let timers = Timers::new(cpus);
        let stop = Arc::new(AtomicBool::new(false));
        let shared = Shared {
            memory,
            buses,
            interrupts,
            timers,
            clock,
            ending,
            stop,
        };
        shared.ending.set_halt(Box::new(shared.halt()));
        output.start(console.output).map_err(Error::Thread)?;
        let machine = Self {
            shared: Arc::new(shared),
            cpus,
            factory: Arc::from(vcpus(registers)),
            devices: Some(devices),
            serial,
            output,
        };
        if let Some(input) = console.input {
            machine.serial.start_input(input).map_err(Error::Thread)?;
        }
        Ok(machine)
    }

    /// A handle that stops the machine.
    pub fn control(&self) -> Control {
        Control {
            ending: Arc::clone(&self.shared.ending),
        }
    }

    /// Runs the machine until it ends. All its output is written when this returns, unless
    /// the machine was stopped and the host does not take it.
    pub fn run(mut self) -> Outcome {
        let vcpus = match self.start() {
            Ok(vcpus) => vcpus,
            Err(reason) => {
                self.shared.ending.end(Outcome::Failed(reason));
                Vec::new()
            }
        };
        let outcome = self.shared.ending.wait();
        // A vCPU may be waiting for room in the output queue.
        self.serial.close();
        self.output.close();
        self.shared.halt()();
        for vcpu in vcpus {
            // One that panicked has ended the machine by itself.
            let _ = vcpu.join();
        }
        let patience = (outcome == Outcome::Stopped).then_some(STOP_PATIENCE);
        self.output.finish(patience);
        if let Some(devices) = self.devices.take() {
            shut_down(devices, patience);
        }
        outcome
    }

    /// Starts the timer and the vCPUs.
    fn start(&self) -> Result<Vec<JoinHandle<()>>, String> {
        let failed = |error| format!("cannot start a thread for the machine: {error}");
        let Shared {
            timers,
            clock,
            interrupts,
            ..
        } = &*self.shared;
        timers.start(*clock, interrupts.clone()).map_err(failed)?;
        let start = |index: u8| {
            let (shared, factory) = (Arc::clone(&self.shared), Arc::clone(&self.factory));
            let body = move || vcpu::run(&shared, index.into(), &*factory);
            thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(body)
                .map_err(failed)
        };
        (0..self.cpus).map(start).collect()
    }
}

/// Ends the devices' threads, which first write what is left to their hosts. With a limit,
/// threads that are held up longer are left to themselves.
fn shut_down(mut devices: Devices, limit: Option<Duration>) {
    let Some(limit) = limit else {
        return devices.shutdown();
    };
    let (done, finished) = mpsc::channel();
    let body = move || {
        devices.shutdown();
        let _ = done.send(());
    };
    if thread::Builder::new()
        .name("shutdown".into())
        .spawn(body)
        .is_ok()
    {
        let _ = finished.recv_timeout(limit);
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.shared.timers.stop();
        self.serial.close();
        self.output.close();
    }
}

#[cfg(test)]
mod tests;
