//! A network on a bridge of the host's, for whoever may make one.
//!
//! ```text
//!   machine ── tap st-NAME.2 ──┐             table bridge st-NAME.2: only what is its own leaves it
//!                              ├── bridge strata-NAME: the gateway
//!   machine ── tap st-NAME.3 ──┘             table inet strata-NAME: NAT, and what may be reached
//!                                            table inet st-NAME.3: its port forwards
//! ```
//!
//! All that is made is named after the device that it belongs to, so what is left over by
//! a process that was killed is known by its device being gone, and no list is kept of anything.
//! Devices are made by ip(8), rules by nft(8), each call all or nothing. The caller holds
//! a lock of this network namespace's around all calls.

mod host;
mod rules;
mod services;

use std::io::{self, ErrorKind};

pub(crate) use services::Services;

use crate::config::{Addresses, GATEWAY_LINK, GATEWAY_MAC, Subnet};
use crate::protocol::Forward;
use crate::switch::Switch;

/// Letters of a network's name: with what stands before, the kernel takes 15 (`IFNAMSIZ`).
const NAME_LENGTH: usize = 8;
/// What the names of bridges and of taps begin with.
const BRIDGE: &str = "strata-";
const TAP: &str = "st-";

/// Why a bridge or its rules cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BridgeError {
    /// A program is missing.
    #[error("a bridge needs the program '{0}', which is not there: install nftables and iproute2")]
    Program(&'static str),
    /// A program refuses.
    #[error("'{program}' refuses: {text}")]
    Refused {
        /// Its name.
        program: &'static str,
        /// What it said.
        text: String,
    },
    /// An interface of this name is somebody else's.
    #[error("there is an interface '{0}' that is no bridge of Strata's")]
    Foreign(String),
    /// No addresses are left.
    #[error("this host has routes to all of 10.83.0.0/16, where bridges have their addresses")]
    Addresses,
    /// The host's files say otherwise.
    #[error("cannot {action}")]
    Host {
        /// To be read after "cannot".
        action: String,
        /// What the host said.
        source: io::Error,
    },
}

/// Whether a bridge's network can have this name: a host name of at most eight letters.
pub fn is_bridge_name(name: &str) -> bool {
    crate::is_host_name(name) && name.len() <= NAME_LENGTH
}

/// A network on a bridge.
#[derive(Clone, Debug)]
pub struct Bridge {
    name: String,
}

impl Bridge {
    /// The one of this name; see [`is_bridge_name`].
    pub fn new(name: &str) -> Self {
        let name = name.to_owned();
        Self { name }
    }

    /// The name of the bridge's interface.
    pub fn device(&self) -> String {
        format!("{BRIDGE}{}", self.name)
    }

    /// The name of the tap device of a machine.
    pub fn tap(&self, addresses: &Addresses) -> String {
        let [.., number] = addresses.ipv4.octets();
        format!("{TAP}{}.{number}", self.name)
    }

    /// Makes the bridge, unless machines are on it already. Returns its addresses, and whether it
    /// is new. Removes what others have left. Guests of a new one reach the host and all of its
    /// networks with `host`, with `isolated` only each other.
    pub fn set_up(&self, host: bool, isolated: bool) -> Result<(Subnet, bool), BridgeError> {
        sweep()?;
        let device = self.device();
        if host::has_device(&device)? {
            let subnet = host::subnet_of(&device)?.ok_or(BridgeError::Foreign(device))?;
            return Ok((subnet, false));
        }
        let subnet = host::free_subnet()?;
        let uplinks = host::uplinks()?;
        let rules = rules::of_network(&rules::Network {
            device: &device,
            subnet,
            host,
            isolated,
            uplinks: &uplinks,
        });
        host::nft(&rules)?;
        let made = make(&device, subnet).and_then(|()| {
            let others = match (isolated, host) {
                (true, _) => Vec::new(),
                (false, true) => host::devices()?,
                (false, false) => uplinks,
            };
            host::forward_between(&device, &others)
        });
        if let Err(error) = made {
            // It may be that there is none.
            let _ = host::ip(&format!("link delete {device}\n"));
            let _ = host::nft(&rules::without("inet", &device));
            return Err(error);
        }
        Ok((subnet, true))
    }

    /// Connects a machine's tap device, behind rules that let only its own addresses through, and
    /// leads ports of the host to the machine.
    pub fn plug(&self, addresses: &Addresses, forwards: &[Forward]) -> Result<(), BridgeError> {
        let (device, tap) = (self.device(), self.tap(addresses));
        host::nft(&rules::of_machine(&tap, addresses, forwards))?;
        host::ip(&format!(
            "link set {tap} addrgenmode none\nlink set {tap} master {device}\nlink set {tap} up\n"
        ))
    }

    /// Whether the bridge is there.
    pub fn is_there(&self) -> Result<bool, BridgeError> {
        host::has_device(&self.device())
    }

    /// Whether a machine's tap device is there.
    pub fn is_plugged(&self, addresses: &Addresses) -> Result<bool, BridgeError> {
        host::has_device(&self.tap(addresses))
    }

    /// Removes what belongs to machines that are gone, and bridges without machines.
    pub fn clean_up(&self) -> Result<(), BridgeError> {
        sweep()
    }
}

/// Makes a bridge's interface with the gateway's addresses.
fn make(device: &str, subnet: Subnet) -> Result<(), BridgeError> {
    let mut addresses = vec![format!("{}/24", subnet.gateway())];
    if host::has_ipv6() {
        let v6 = [subnet.gateway_v6(), GATEWAY_LINK];
        addresses.extend(v6.map(|address| format!("{address}/64 nodad")));
    }
    let mut commands = vec![
        format!("link add {device} address {GATEWAY_MAC} type bridge"),
        format!("link set {device} addrgenmode none"),
    ];
    let add = |address| format!("address add dev {device} {address}");
    commands.extend(addresses.into_iter().map(add));
    commands.push(format!("link set {device} up\n"));
    host::ip(&commands.join("\n"))
}

/// Removes tables whose device is gone, and bridges that no tap is left of.
fn sweep() -> Result<(), BridgeError> {
    let devices = host::devices()?;
    let tables = host::tables()?;
    let mut rules = String::new();
    for (family, name) in &tables {
        let gone = match name.strip_prefix(BRIDGE) {
            Some(network) => !devices
                .iter()
                .any(|device| device.starts_with(&format!("{TAP}{network}."))),
            None => name.starts_with(TAP) && name.contains('.') && !devices.contains(name),
        };
        if gone {
            rules += &rules::without(family, name);
            if name.starts_with(BRIDGE) && devices.contains(name) {
                host::ip(&format!("link delete {name}\n"))?;
            }
        }
    }
    if rules.is_empty() {
        return Ok(());
    }
    host::nft(&rules)
}

impl Switch {
    /// Serves the guests of the bridge with this interface: addresses, names, word of the router.
    /// Machines take their places through [`Switch::open_door`]; their frames never come here.
    pub fn serve_bridge(&mut self, device: &str) -> io::Result<()> {
        let subnet = host::subnet_of(device).map_err(io::Error::other)?;
        self.config.subnet = subnet.ok_or(ErrorKind::NotFound)?;
        let services = Services::open(device, self.config.subnet)?;
        services.watch(&self.poll)?;
        self.services = Some(services);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_devices_fit_into_what_the_kernel_takes() {
        assert!(is_bridge_name("backend1"));
        assert!(!is_bridge_name("backend12") && !is_bridge_name("a.b") && !is_bridge_name(""));
        let bridge = Bridge::new("backend1");
        assert!(bridge.device().len() <= 15);
        assert!(bridge.tap(&Subnet::of_bridge(9).guest(254)).len() <= 15);
    }

    #[test]
    fn bridges_have_addresses_of_their_own() {
        let subnet = Subnet::of_bridge(7);
        let guest = subnet.guest(5);
        assert_eq!(subnet.gateway().to_string(), "10.83.7.1");
        assert_eq!(subnet.gateway_v6().to_string(), "fd53:7472:6174:6207::1");
        assert_eq!(guest.ipv4.to_string(), "10.83.7.5");
        assert_eq!(
            guest.ipv6.to_string(),
            "fd53:7472:6174:6207:53:74ff:fe72:6105"
        );
    }
}
