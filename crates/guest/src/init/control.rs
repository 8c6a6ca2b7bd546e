//! The port that stands for the main command: the host learns of its end there, and says by which
//! signals and sizes it is to know of what happens at the host.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::process::Pid;
use strata_protocol::{CONTROL_PORT, Input, Reply, read, write};

use super::Fault;
use crate::{sys, terminal};

const TRIES: usize = 5000;
const PAUSE: Duration = Duration::from_millis(2);

/// The open port.
pub(super) struct Control {
    port: File,
    /// The command's process, as long as it is that.
    command: Arc<Mutex<Option<Pid>>>,
}

impl Control {
    /// Waits for the port, whose name arrives a moment after the driver, and opens it.
    pub(super) fn open() -> Result<Self, Fault> {
        let mut tries = 0;
        let path = loop {
            if let Some(path) = find(CONTROL_PORT) {
                break path;
            }
            tries += 1;
            if tries > TRIES {
                return Err(Fault("the ports of the command did not appear".to_owned()));
            }
            thread::sleep(PAUSE);
        };
        let port = OpenOptions::new().read(true).write(true).open(path);
        let port = port.map_err(Fault::of::<io::Error>("open the port of the command"))?;
        let command = Arc::default();
        Ok(Self { port, command })
    }

    pub(super) fn tell(&mut self, reply: &Reply) {
        // Who is not there needs not know.
        let _ = write(&mut self.port, reply);
    }

    /// Passes on what the host says, from now on and for ever, to the command that is process `pid`,
    /// and to its `terminal` if it is on one.
    pub(super) fn listen(&self, pid: u32, terminal: Option<OwnedFd>) {
        *lock(&self.command) = Pid::from_raw(pid as i32);
        let command = Arc::clone(&self.command);
        let Ok(mut port) = self.port.try_clone() else {
            return;
        };
        let listen = move || {
            while let Ok(Some(input)) = read(&mut port) {
                match (input, &terminal) {
                    (Input::Signal(number), _) => {
                        if let (Some(signal), Some(pid)) = (sys::signal(number), *lock(&command)) {
                            let _ = sys::pass(signal, pid);
                        }
                    }
                    (Input::Resize(size), Some(terminal)) => terminal::set_size(terminal, size),
                    _ => {}
                }
            }
        };
        if let Err(error) = thread::Builder::new().spawn(listen) {
            eprintln!("strata: signals to the command are lost: {error}");
        }
    }

    /// The command has ended: its number may be another process's from now on.
    pub(super) fn forget(&self) {
        *lock(&self.command) = None;
    }
}

fn lock(command: &Mutex<Option<Pid>>) -> MutexGuard<'_, Option<Pid>> {
    command.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The device of the port with this name, when it is there.
pub(super) fn find(wanted: &str) -> Option<PathBuf> {
    let ports = fs::read_dir("/sys/class/virtio-ports").ok()?;
    ports.flatten().find_map(|port| {
        let name = fs::read_to_string(port.path().join("name")).ok()?;
        let device = PathBuf::from("/dev").join(port.file_name());
        (name.trim() == wanted && device.exists()).then_some(device)
    })
}
