//! The host's own programs and files: ip(8), nft(8), /proc.

use std::fs;
use std::io::{self, ErrorKind, Write};
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde::Deserialize;

use super::BridgeError;
use crate::config::Subnet;

/// Where administrators' programs are, which a user's PATH may not name.
const SBIN: &str = "/usr/local/sbin:/usr/sbin:/sbin";

fn failed(action: impl Into<String>) -> impl FnOnce(io::Error) -> BridgeError {
    let action = action.into();
    move |source| BridgeError::Host { action, source }
}

/// Runs a program with `input`.
fn run(program: &'static str, words: &[&str], input: &str) -> Result<Output, BridgeError> {
    let path = std::env::var("PATH").unwrap_or_default();
    let started = Command::new(program)
        .args(words)
        .env("PATH", format!("{path}:{SBIN}"))
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = started.map_err(|error| match error.kind() {
        ErrorKind::NotFound => BridgeError::Program(program),
        _ => failed(format!("start '{program}'"))(error),
    })?;
    if let Some(mut pipe) = child.stdin.take() {
        // One that ends early says why.
        let _ = pipe.write_all(input.as_bytes());
    }
    let output = child
        .wait_with_output()
        .map_err(failed(format!("wait for '{program}'")))?;
    if output.status.success() {
        return Ok(output);
    }
    let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(BridgeError::Refused { program, text })
}

/// Loads rules in one transaction.
pub(super) fn nft(rules: &str) -> Result<(), BridgeError> {
    run("nft", &["-f", "-"], rules).map(drop)
}

/// Carries out commands of ip(8), one a line, up to the first that fails.
pub(super) fn ip(commands: &str) -> Result<(), BridgeError> {
    run("ip", &["-batch", "-"], commands).map(drop)
}

/// Family and name of every table of rules.
pub(super) fn tables() -> Result<Vec<(String, String)>, BridgeError> {
    #[derive(Deserialize)]
    struct Listing {
        nftables: Vec<Item>,
    }
    #[derive(Deserialize)]
    struct Item {
        table: Option<Table>,
    }
    #[derive(Deserialize)]
    struct Table {
        family: String,
        name: String,
    }
    let output = run("nft", &["-j", "list", "tables"], "")?;
    let listing: Listing = serde_json::from_slice(&output.stdout)
        .map_err(|error| failed("read the list of nft(8)")(error.into()))?;
    let tables = listing.nftables.into_iter().filter_map(|item| item.table);
    Ok(tables.map(|table| (table.family, table.name)).collect())
}

/// Reads a file of /proc, which is of this process's own network namespace.
fn read(path: &str) -> Result<String, BridgeError> {
    fs::read_to_string(path).map_err(failed(format!("read '{path}'")))
}

/// The names of all interfaces.
pub(super) fn devices() -> Result<Vec<String>, BridgeError> {
    let text = read("/proc/net/dev")?;
    let names = text.lines().filter_map(|line| line.split_once(':'));
    Ok(names.map(|(name, _)| name.trim().to_owned()).collect())
}

pub(super) fn has_device(name: &str) -> Result<bool, BridgeError> {
    Ok(devices()?.iter().any(|device| device == name))
}

/// A route of the host's main table, as `/proc/net/route` has it.
#[derive(Debug, PartialEq, Eq)]
struct Route {
    device: String,
    destination: Ipv4Addr,
    mask: Ipv4Addr,
}

fn routes(text: &str) -> Vec<Route> {
    let address = |word: &str| {
        // In the byte order of this host.
        let bits = u32::from_str_radix(word, 16).ok()?;
        Some(Ipv4Addr::from(bits.to_ne_bytes()))
    };
    let route = |line: &str| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        Some(Route {
            device: (*words.first()?).to_owned(),
            destination: address(words.get(1)?)?,
            mask: address(words.get(7)?)?,
        })
    };
    text.lines().skip(1).filter_map(route).collect()
}

/// Interfaces that lead to the world: those of default routes.
pub(super) fn uplinks() -> Result<Vec<String>, BridgeError> {
    let mut names: Vec<String> = routes(&read("/proc/net/route")?)
        .into_iter()
        .filter(|route| route.mask.is_unspecified())
        .map(|route| route.device)
        .collect();
    if let Ok(text) = fs::read_to_string("/proc/net/ipv6_route") {
        let default = |words: &Vec<&str>| words.get(1) == Some(&"00");
        let lines = text.lines().map(|line| line.split_ascii_whitespace());
        let found = lines.map(Iterator::collect).filter(default);
        names.extend(found.filter_map(|words| Some((*words.last()?).to_owned())));
    }
    names.retain(|name| name != "lo");
    names.sort();
    names.dedup();
    Ok(names)
}

/// Addresses that this host has no route to.
pub(super) fn free_subnet() -> Result<Subnet, BridgeError> {
    let routes = routes(&read("/proc/net/route")?);
    let subnet = free_of(&routes).ok_or(BridgeError::Addresses)?;
    Ok(Subnet::of_bridge(subnet))
}

fn free_of(routes: &[Route]) -> Option<u8> {
    let taken = |number: u8| {
        let subnet = Subnet::of_bridge(number).ipv4(0).to_bits();
        routes.iter().any(|route| {
            // Either lies in the other, unless it is a route to everywhere.
            let mask = route.mask.to_bits() & 0xffff_ff00;
            mask != 0 && (subnet ^ route.destination.to_bits()) & mask == 0
        })
    };
    (0..=u8::MAX).find(|number| !taken(*number))
}

/// The addresses of a bridge that is there; `None` if it has none of ours.
pub(super) fn subnet_of(device: &str) -> Result<Option<Subnet>, BridgeError> {
    let text = read("/proc/net/route")?;
    let own = routes(&text)
        .into_iter()
        .find(|route| route.device == device);
    let subnet = own.and_then(|route| {
        let [a, b, number, _] = route.destination.octets();
        let subnet = Subnet::of_bridge(number);
        (subnet.ipv4(0).octets()[..2] == [a, b]).then_some(subnet)
    });
    Ok(subnet)
}

/// Whether interfaces get IPv6 addresses.
pub(super) fn has_ipv6() -> bool {
    let text = fs::read_to_string("/proc/sys/net/ipv6/conf/default/disable_ipv6");
    text.is_ok_and(|text| text.trim() == "0")
}

/// Whether the host is a router for IPv6.
pub(super) fn forwards_ipv6() -> bool {
    let text = fs::read_to_string("/proc/sys/net/ipv6/conf/all/forwarding");
    text.is_ok_and(|text| text.trim() == "1")
}

/// The number of an interface.
pub(super) fn index(device: &str) -> io::Result<u32> {
    // Not /sys, which may be another namespace's.
    let path = Path::new("/proc/net/dev_snmp6").join(device);
    let text = fs::read_to_string(path)?;
    let word = text.split_ascii_whitespace().nth(1);
    word.and_then(|word| word.parse().ok())
        .ok_or_else(|| ErrorKind::InvalidData.into())
}

/// Lets IPv4 packets through between a bridge and the interfaces `others`, and those of the host's
/// loopback to the bridge, for forwards.
pub(super) fn forward_between(device: &str, others: &[String]) -> Result<(), BridgeError> {
    let set = |device: &str, key: &str| {
        let path = format!("/proc/sys/net/ipv4/conf/{device}/{key}");
        match fs::read_to_string(&path) {
            Ok(text) if text.trim() == "1" => Ok(()),
            _ => fs::write(&path, "1").map_err(failed(format!("write to '{path}'"))),
        }
    };
    set(device, "route_localnet")?;
    set(device, "forwarding")?;
    others
        .iter()
        .filter(|other| *other != "lo")
        .try_for_each(|other| set(other, "forwarding"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\n\
        eth0\t00000000\t0102A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
        docker0\t0000530A\t00000000\t0001\t0\t0\t0\t0000FEFF\t0\t0\t0\n\
        x\t0502530A\t00000000\t0001\t0\t0\t0\tFFFFFFFF\t0\t0\t0\n";

    #[test]
    fn routes_are_read_as_the_kernel_writes_them() {
        let routes = routes(TEXT);
        assert_eq!(routes.len(), 3);
        assert_eq!(routes[1].destination, Ipv4Addr::new(10, 83, 0, 0));
        assert_eq!(routes[1].mask, Ipv4Addr::new(255, 254, 0, 0));
        assert!(routes[0].mask.is_unspecified());
    }

    #[test]
    fn a_bridge_gets_addresses_that_the_host_has_no_route_to() {
        let mut routes = routes(TEXT);
        assert_eq!(free_of(&routes), None);
        routes[1].mask = Ipv4Addr::new(255, 255, 254, 0);
        // 0 and 1 are docker0's, and in 2 one address is somebody's.
        assert_eq!(free_of(&routes), Some(3));
    }
}
