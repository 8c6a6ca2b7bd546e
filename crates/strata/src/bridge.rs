//! A machine's place on a bridge of the host's, and the process that keeps it: the warden. That
//! alone has privileges while the machine runs, and reads nothing of any guest's.
//!
//! ```text
//!   strata run ── who it is ──► strata network-warden ── ip, nft ──► bridge, tap, rules
//!              ◄── the tap ────        │      └── NAME.sock ──► strata network-switch --bridge
//!   (jailed, with the tap)             ▼                        (jailed: DHCP, names)
//!              ─── its end ───► takes back what is the machine's, and the bridge if it was the last
//! ```
//!
//! All wardens of a network namespace take turns, by a lock. One that is killed leaves rules and
//! perhaps a bridge: whoever comes or goes next removes what no tap device belongs to.

use std::error::Error;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use rustix::thread::{CapabilitySet, capabilities};
use strata_net::{Bridge, Hello, Joined, answer_hello, listen_on, receive_hello};

use crate::cli::{Sandbox, WardenArgs};
use crate::exit::End;
use crate::network::{self, Fault, Lock};
use crate::report;

/// Name of the hidden subcommand.
pub(crate) const SUBCOMMAND: &str = "network-warden";
/// What the names of switches' sockets end in.
const SOCKET: &str = ".sock";
/// How long a tap device may still be there when its machine is gone, and how often it is looked
/// for.
const LINGERS: Duration = Duration::from_secs(5);
const STEP: Duration = Duration::from_millis(10);

/// Starts the warden of a machine that is to be on the bridge `name`. `socket` is where the
/// machine says who it is.
pub(crate) fn start_warden(
    name: &str,
    options: &[&str],
    sandbox: Sandbox,
    socket: Stdio,
) -> Result<(), Fault> {
    let mut command = Command::new("/proc/self/exe");
    command.args([SUBCOMMAND, "--bridge", name]).args(options);
    command.args(["--sandbox", sandbox.name()]);
    // Of its own group: what the terminal sends to end the machine must not end it before.
    command.process_group(0).stdin(socket).stdout(Stdio::null());
    command
        .spawn()
        .map_err(Fault::host("start the network's warden"))?;
    Ok(())
}

/// What the hidden subcommand does.
pub(crate) fn warden(args: &WardenArgs) -> End {
    match keep(args) {
        Ok(()) => End::Done,
        Err(error) => {
            report::say_error(error.as_ref());
            End::NotStarted
        }
    }
}

fn keep(args: &WardenArgs) -> Result<(), Box<dyn Error>> {
    let machine = io::stdin().as_fd().try_clone_to_owned()?;
    let hello = receive_hello(&machine)?;
    let (place, tap) = match Place::take(args, &hello) {
        Ok(both) => both,
        Err(fault) => return Ok(answer_hello(&machine, Err(report::chain(&fault)))?),
    };
    let Joined {
        addresses, gateway, ..
    } = &place.joined;
    let answered = answer_hello(&machine, Ok((addresses, *gateway, &tap)));
    // The device goes with the machine's descriptor of it.
    drop(tap);
    if answered.is_ok() {
        wait_for_end(&machine);
    }
    Ok(place.leave()?)
}

/// Waits until nobody has the other end of a socket any more.
fn wait_for_end(machine: &OwnedFd) {
    loop {
        match recv(machine, &mut [0_u8; 1][..], RecvFlags::empty()) {
            Ok((_, 0)) => return,
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return,
        }
    }
}

/// A machine's place.
struct Place {
    bridge: Bridge,
    lock: PathBuf,
    joined: Joined,
    /// Ports of the host that lead to the machine: nobody else can take them.
    _ports: Vec<OwnedFd>,
}

impl Place {
    fn take(args: &WardenArgs, hello: &Hello) -> Result<(Self, OwnedFd), Fault> {
        check_privileges()?;
        let bridge = Bridge::new(&args.bridge);
        let lock_path = path(".lock")?;
        let lock = Lock::take(&lock_path)?;
        let (_, fresh) = bridge.set_up(args.host, args.isolated)?;
        let socket = path(&format!("-{}{SOCKET}", args.bridge))?;
        if fresh {
            // The switch of a bridge of this name that is no more.
            let _ = fs::remove_file(&socket);
        }
        forget_switches()?;
        let device = bridge.device();
        let mut options = vec!["--bridge", &*device];
        options.extend(args.isolated.then_some("--isolated"));
        let taken = network::connect_or_start(&socket, &lock, &options, args.sandbox)
            .and_then(|switch| plug(&bridge, hello, switch));
        match taken {
            Ok((joined, ports, tap)) => {
                let place = Self {
                    bridge,
                    lock: lock_path,
                    joined,
                    _ports: ports,
                };
                Ok((place, tap))
            }
            Err(fault) => {
                let _ = bridge.clean_up();
                Err(fault)
            }
        }
    }

    /// Removes what was the machine's.
    fn leave(self) -> Result<(), Fault> {
        let started = Instant::now();
        while self.bridge.is_plugged(&self.joined.addresses)? && started.elapsed() < LINGERS {
            thread::sleep(STEP);
        }
        let _lock = Lock::take(&self.lock)?;
        self.bridge.clean_up()?;
        forget_switches()?;
        // The machine's number is free only now.
        drop(self.joined);
        Ok(())
    }
}

/// Where locks and sockets of bridges are: one place for all of root's sessions, since the bridges
/// are the host's.
fn directory() -> Result<PathBuf, Fault> {
    if rustix::process::geteuid().is_root() {
        network::private(PathBuf::from("/run/strata"))
    } else {
        network::runtime_directory()
    }
}

/// Where something of this network namespace's bridges is.
fn path(end: &str) -> Result<PathBuf, Fault> {
    let namespace = fs::metadata("/proc/self/ns/net")
        .map_err(Fault::host("look at this process's network namespace"))?;
    Ok(directory()?.join(format!("bridge-{}{end}", namespace.ino())))
}

/// Removes the sockets where switches let machines in whose bridges are no more.
fn forget_switches() -> Result<(), Fault> {
    let (directory, start) = (directory()?, path("-")?);
    let files = fs::read_dir(directory).map_err(Fault::host("look for sockets of bridges"))?;
    for file in files.filter_map(Result::ok).map(|file| file.path()) {
        let name = file.to_str().and_then(|file| {
            let name = file.strip_prefix(start.to_str()?)?;
            name.strip_suffix(SOCKET)
        });
        if let Some(name) = name
            && !Bridge::new(name).is_there()?
        {
            let _ = fs::remove_file(file);
        }
    }
    Ok(())
}

/// Joins the bridge's switch, and connects a tap device for it.
fn plug(
    bridge: &Bridge,
    hello: &Hello,
    switch: OwnedFd,
) -> Result<(Joined, Vec<OwnedFd>, OwnedFd), Fault> {
    let mut ports = Vec::new();
    for forward in &hello.forwards {
        let action = format!("use port {} of this host", forward.host);
        ports.push(listen_on(forward).map_err(Fault::host(action))?);
    }
    let named = Hello {
        name: hello.name.clone(),
        forwards: Vec::new(),
    };
    let joined = strata_net::join(switch, &named)?;
    let name = bridge.tap(&joined.addresses);
    let tap = strata_vmm::open_tap(&name).map_err(|error| {
        let action = match error.kind() {
            ErrorKind::NotFound => "find /dev/net/tun; 'modprobe tun' may help".to_owned(),
            _ => format!("make the tap device '{name}'"),
        };
        Fault::host(action)(error)
    })?;
    bridge.plug(&joined.addresses, &hello.forwards)?;
    Ok((joined, ports, tap))
}

fn check_privileges() -> Result<(), Fault> {
    let sets = capabilities(None).map_err(Fault::host("ask for this process's privileges"))?;
    if sets.effective.contains(CapabilitySet::NET_ADMIN) {
        return Ok(());
    }
    let text = "that needs root, or CAP_NET_ADMIN; --network user, or a NAME without 'bridge:', \
                needs nothing";
    let error = io::Error::new(ErrorKind::PermissionDenied, text);
    Err(Fault::host("make a bridge")(error))
}
