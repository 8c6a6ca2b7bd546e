//! Where a guest's packets may go on the host's side.
//!
//! Not to this host, unless the network was told so: its loopback, link-local addresses (where
//! clouds keep credentials) and its own addresses. Which those are is asked of the kernel's
//! routing each time, since they come and go: the source of a packet from this host to itself is
//! the address it goes to. Group addresses and those that are no host's are never reached.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, getsockname, socket_with};

use crate::config::{Config, is_gateway, is_inside};
use crate::wire::Unreachable;

/// The port of name servers.
pub(crate) const DNS_PORT: u16 = 53;

/// What becomes of a packet to some destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// It goes to this address of the host's side.
    Host(SocketAddr),
    /// To the host's name server.
    Resolver,
    /// Nobody listens there.
    Refused,
    /// It goes nowhere.
    Unreachable(Unreachable),
}

/// The route to `destination`.
pub(crate) fn route(config: &Config, destination: SocketAddr) -> Route {
    let address = destination.ip();
    if is_gateway(address) {
        return match address {
            _ if destination.port() == DNS_PORT => Route::Resolver,
            IpAddr::V4(_) if config.host => {
                Route::Host((Ipv4Addr::LOCALHOST, destination.port()).into())
            }
            IpAddr::V6(_) if config.host => {
                Route::Host((Ipv6Addr::LOCALHOST, destination.port()).into())
            }
            _ => Route::Refused,
        };
    }
    if is_inside(address) {
        return Route::Unreachable(Unreachable::Host);
    }
    let forbidden =
        config.isolated || is_special(address) || !config.host && is_own(address) == Some(true);
    if forbidden {
        Route::Unreachable(Unreachable::Prohibited)
    } else {
        Route::Host(destination)
    }
}

/// Whether `address` is nobody's in particular, or means this host to the host.
fn is_special(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let [first, ..] = v4.octets();
            first == 0
                || first >= 240
                || v4.is_loopback()
                || v4.is_link_local()
                || v4.is_multicast()
        }
        IpAddr::V6(v6) => {
            let [first, ..] = v6.segments();
            // ::/96 and ::ffff:0:0/96 stand for IPv4 addresses.
            let embeds_v4 = v6.segments()[..5] == [0; 5];
            embeds_v4 || first & 0xffc0 == 0xfe80 || v6.is_multicast()
        }
    }
}

/// Whether `address` is one of this host's; `None` if it does not know a way to it.
fn is_own(address: IpAddr) -> Option<bool> {
    let family = match address {
        IpAddr::V4(_) => AddressFamily::INET,
        IpAddr::V6(_) => AddressFamily::INET6,
    };
    let probe = socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None).ok()?;
    // Nothing is sent: a UDP socket only looks up its route.
    connect(&probe, &SocketAddr::new(address, DNS_PORT)).ok()?;
    let local = SocketAddr::try_from(getsockname(&probe).ok()?).ok()?;
    Some(local.ip() == address)
}

/// Whether the host has a way to the IPv6 internet: 2000::/3, by the address of a root server.
pub(crate) fn has_ipv6() -> bool {
    let root = Ipv6Addr::new(0x2001, 0x503, 0xba3e, 0, 0, 0, 2, 0x30);
    is_own(root.into()).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to(config: &Config, address: &str) -> Route {
        route(config, address.parse().unwrap())
    }

    const NOWHERE: [Route; 2] = [
        Route::Unreachable(Unreachable::Prohibited),
        Route::Unreachable(Unreachable::Host),
    ];

    #[test]
    fn this_host_is_out_of_reach() {
        let config = Config::default();
        for address in [
            "127.0.0.1:22",
            "127.9.9.9:22",
            "0.0.0.0:22",
            "169.254.169.254:80",
            "[::1]:22",
            "[::]:22",
            "[::ffff:127.0.0.1]:22",
            "[::127.0.0.1]:22",
            "[fe80::5]:22",
            "224.0.0.1:22",
            "255.255.255.255:67",
            "[ff02::1]:22",
        ] {
            assert!(NOWHERE.contains(&to(&config, address)), "{address}");
        }
        assert_eq!(to(&config, "10.0.2.1:22"), Route::Refused);
        assert_eq!(to(&config, "10.0.2.1:53"), Route::Resolver);
        assert!(NOWHERE.contains(&to(&config, "10.0.2.77:22")));
    }

    #[test]
    fn the_kernel_tells_this_hosts_own_addresses() {
        assert_eq!(is_own(IpAddr::V4(Ipv4Addr::LOCALHOST)), Some(true));
        // The documentation's own network (RFC 5737): ours would be a strange host.
        assert_ne!(is_own("203.0.113.77".parse().unwrap()), Some(true));
    }

    #[test]
    fn a_network_that_may_reach_the_host_finds_its_loopback_at_the_gateway() {
        let config = Config {
            host: true,
            ..Config::default()
        };
        let loopback = Route::Host("127.0.0.1:8080".parse().unwrap());
        assert_eq!(to(&config, "10.0.2.1:8080"), loopback);
        assert!(NOWHERE.contains(&to(&config, "127.0.0.1:8080")));
    }

    #[test]
    fn an_isolated_network_reaches_nobody() {
        let config = Config {
            isolated: true,
            ..Config::default()
        };
        assert!(NOWHERE.contains(&to(&config, "192.0.2.1:80")));
    }
}
