//! A machine: opened from its configuration, built, run until it ends.

use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use strata_hypervisor::Statistics;
use strata_hypervisor::state::Registers;
use strata_memory::GuestMemory;

use crate::boot::{self, Loaded};
use crate::clock::{Calibration, Clock, tsc};
use crate::config::MachineConfig;
use crate::console::{Output, SerialPort};
use crate::ending::{Ending, Outcome};
use crate::error::Error;
use crate::vcpu::{self, Shared, Vcpu};
use crate::virtio::{self, Devices, Disk};
pub use opened::Opened;

/// vCPUs of a machine, at most.
pub const MAX_CPUS: u8 = strata_memory::MAX_CPUS as u8;
/// For how long a machine that was told to stop waits for its host to take its output.
const STOP_PATIENCE: Duration = Duration::from_secs(2);

/// Makes this many vCPUs, on this memory, by this clock, the first with these registers.
trait MakeVcpus:
    FnOnce(u8, &GuestMemory, &Clock, &Registers) -> Result<Vec<Box<dyn Vcpu>>, Error>
{
}

impl<F> MakeVcpus for F where
    F: FnOnce(u8, &GuestMemory, &Clock, &Registers) -> Result<Vec<Box<dyn Vcpu>>, Error>
{
}

/// A machine that is ready to run. Dropping it without running it ends its threads.
pub struct Machine {
    shared: Arc<Shared>,
    /// Taken when the machine runs.
    vcpus: Vec<Box<dyn Vcpu>>,
    /// Taken when the machine ends.
    devices: Option<Devices>,
    serial: Arc<SerialPort>,
    output: Arc<Output>,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine")
            .field("vcpus", &self.vcpus.len())
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
    /// Opens all that the machine needs of the host; see [`Opened`].
    pub fn open(config: MachineConfig) -> Result<Opened, Error> {
        Self::open_with(config, vcpu::soft)
    }

    /// Opens a machine whose vCPUs `make_vcpus` makes.
    fn open_with(config: MachineConfig, make_vcpus: impl MakeVcpus) -> Result<Opened, Error> {
        let calibration = Calibration::start();
        let MachineConfig {
            cpus,
            memory: size,
            accel: _,
            kernel,
            initrd,
            modules,
            command_line,
            debug_exit,
            disks,
            networks,
            console,
            ports,
        } = config;
        if !(1..=MAX_CPUS).contains(&cpus) {
            return Err(Error::Cpus(cpus));
        }
        let source = boot::Source {
            kernel: &kernel,
            initrd: &initrd,
            modules: &modules,
            command_line: command_line.as_deref(),
            cpus,
        };
        let loaded = Loaded::read(&source, size)?;
        let memory = GuestMemory::new(size).map_err(|source| Error::Memory { size, source })?;
        let registers = loaded.install(&memory)?;
        drop(loaded);
        let disks: Result<_, _> = disks.iter().map(Disk::open).collect();
        let disks = disks.map_err(virtio::Error::Disk)?;
        let clock = Clock {
            tsc_khz: calibration.finish(),
            start_tsc: tsc(),
        };
        let vcpus = make_vcpus(cpus, &memory, &clock, &registers)?;
        Ok(Opened {
            clock,
            memory,
            vcpus,
            disks,
            networks,
            console,
            ports,
            debug_exit,
        })
    }

    /// A handle that stops the machine.
    pub fn control(&self) -> Control {
        Control {
            ending: Arc::clone(&self.shared.ending),
        }
    }

    /// Runs the machine until it ends. All its output is written when this returns, unless
    /// the machine was stopped and the host does not take it.
    pub fn run(self) -> Outcome {
        self.run_then(|_| ())
    }

    /// As [`Machine::run`]. When the machine has ended, `look` is called with what each vCPU
    /// translated, while all that the machine held of the host's memory is still held.
    pub fn run_then(mut self, look: impl FnOnce(&[Statistics])) -> Outcome {
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
        // One that panicked has ended the machine by itself.
        let vcpus: Vec<_> = vcpus.into_iter().map_while(|v| v.join().ok()).collect();
        let statistics: Vec<_> = vcpus.iter().filter_map(|vcpu| vcpu.statistics()).collect();
        look(&statistics);
        drop(vcpus);
        let patience = (outcome == Outcome::Stopped).then_some(STOP_PATIENCE);
        self.output.finish(patience);
        if let Some(devices) = self.devices.take() {
            shut_down(devices, patience);
        }
        outcome
    }

    /// Starts the timer and the vCPUs.
    fn start(&mut self) -> Result<Vec<JoinHandle<Box<dyn Vcpu>>>, String> {
        let failed = |error| format!("cannot start a thread for the machine: {error}");
        let Shared {
            timers,
            clock,
            interrupts,
            ..
        } = &*self.shared;
        timers.start(*clock, interrupts.clone()).map_err(failed)?;
        let start = |(index, vcpu)| {
            let shared = Arc::clone(&self.shared);
            thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || vcpu::run(&shared, index, vcpu))
                .map_err(failed)
        };
        let vcpus = std::mem::take(&mut self.vcpus);
        vcpus.into_iter().enumerate().map(start).collect()
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

mod opened;
#[cfg(test)]
mod tests;
