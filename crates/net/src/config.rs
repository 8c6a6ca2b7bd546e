//! What a network is: its addresses, and what of the host its guests may reach.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::wire::MacAddress;

/// The network's IPv4 addresses: 10.0.2.0/24.
const SUBNET: [u8; 3] = [10, 0, 2];
/// Bits of the subnet's mask.
pub const SUBNET_BITS: u8 = 24;
/// Where guests send what is not for a neighbour, and whom they ask for names.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 1);
/// The network's IPv6 prefix, a unique local one (RFC 4193): fd, then "Strata" in ASCII.
pub const PREFIX: Ipv6Addr = Ipv6Addr::new(0xfd53, 0x7472, 0x6174, 0x6100, 0, 0, 0, 0);
/// The gateway in [`PREFIX`]/64.
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfd53, 0x7472, 0x6174, 0x6100, 0, 0, 0, 1);
/// The gateway's link-local address, which router advertisements come from.
pub const GATEWAY_LINK: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// The gateway's Ethernet address: locally administered, then "Stra", then 1.
pub const GATEWAY_MAC: MacAddress = MacAddress([0x02, b'S', b't', b'r', b'a', 1]);
/// The domain of the guests' names.
pub const DOMAIN: &str = "internal";
/// Bytes of the largest IP packet on the network, segments of large ones included.
pub const MTU: u16 = 1500;
/// Guests are numbered from here on, in the last byte of their addresses.
pub(crate) const FIRST_GUEST: u8 = 2;
/// The last number.
pub(crate) const LAST_GUEST: u8 = 254;

/// The addresses of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// Its Ethernet address.
    pub mac: MacAddress,
    /// Its IPv4 address.
    pub ipv4: Ipv4Addr,
    /// The IPv6 address it makes for itself (SLAAC with an EUI-64 identifier).
    pub ipv6: Ipv6Addr,
}

impl Addresses {
    /// Those of the guest with this number on a network of the user's own.
    pub(crate) fn of(number: u8) -> Self {
        Subnet::USER.guest(number)
    }
}

/// The addresses of a network, in which its gateway and its guests have theirs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subnet {
    ipv4: [u8; 3],
    ipv6: Ipv6Addr,
}

impl Default for Subnet {
    fn default() -> Self {
        Self::USER
    }
}

impl Subnet {
    /// That of all networks that need no privileges: nobody but their switch sees it.
    pub const USER: Self = Self {
        ipv4: SUBNET,
        ipv6: PREFIX,
    };

    /// That of a bridge, which shares its host with others: 10.83.`number`.0/24 and the IPv6
    /// prefix that ends in 62 and the number.
    pub fn of_bridge(number: u8) -> Self {
        let mut prefix = PREFIX.octets();
        prefix[6..8].copy_from_slice(&[0x62, number]);
        Self {
            ipv4: [10, 83, number],
            ipv6: prefix.into(),
        }
    }

    /// The IPv4 address with this last byte.
    pub(crate) fn ipv4(self, last: u8) -> Ipv4Addr {
        let [a, b, c] = self.ipv4;
        Ipv4Addr::new(a, b, c, last)
    }

    /// The prefix of its IPv6 addresses, of 64 bits.
    pub(crate) fn prefix(self) -> Ipv6Addr {
        self.ipv6
    }

    /// The gateway's address, which is the name server's too.
    pub fn gateway(self) -> Ipv4Addr {
        self.ipv4(1)
    }

    /// The gateway's IPv6 address.
    pub(crate) fn gateway_v6(self) -> Ipv6Addr {
        (self.ipv6.to_bits() | 1).into()
    }

    /// The addresses of the guest with this number.
    pub(crate) fn guest(self, number: u8) -> Addresses {
        let mac = MacAddress([0x02, b'S', b't', b'r', b'a', number]);
        Addresses {
            mac,
            ipv4: self.ipv4(number),
            ipv6: mac.address_in(self.ipv6),
        }
    }
}

/// Whether `address` lies in the network.
pub(crate) fn is_inside(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.octets()[..3] == SUBNET,
        IpAddr::V6(address) => address.segments()[..4] == PREFIX.segments()[..4],
    }
}

/// Whether `address` is one of the gateway's.
pub(crate) fn is_gateway(address: IpAddr) -> bool {
    address == IpAddr::V4(GATEWAY)
        || address == IpAddr::V6(GATEWAY_V6)
        || address == IpAddr::V6(GATEWAY_LINK)
}

/// What guests may reach, and who answers their questions for names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Its addresses.
    pub subnet: Subnet,
    /// Guests reach this host's loopback under the gateway's address, and this host's own
    /// addresses. Otherwise neither.
    pub host: bool,
    /// Guests reach nobody but each other.
    pub isolated: bool,
    /// Name servers of the host, in the order in which they are asked.
    pub resolvers: Vec<SocketAddr>,
    /// The host has a way to the IPv6 internet, so the gateway is a router for it.
    pub ipv6: bool,
}

impl Config {
    /// The name servers of a `resolv.conf(5)`; those whose address has a zone are left out.
    pub fn resolvers_of(text: &str) -> Vec<SocketAddr> {
        let server = |line: &str| {
            let address: IpAddr = line.strip_prefix("nameserver")?.trim().parse().ok()?;
            Some(SocketAddr::new(address, 53))
        };
        text.lines().filter_map(server).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_are_read_from_resolv_conf() {
        let text =
            "# x\nsearch a b\nnameserver 192.0.2.53\nnameserver\t::1\nnameserver fe80::1%2\n";
        let expected = ["192.0.2.53:53", "[::1]:53"].map(|a| a.parse().unwrap());
        assert_eq!(Config::resolvers_of(text), expected);
    }

    #[test]
    fn every_guests_addresses_are_inside_and_not_the_gateways() {
        for number in FIRST_GUEST..=LAST_GUEST {
            let guest = Addresses::of(number);
            for address in [IpAddr::V4(guest.ipv4), IpAddr::V6(guest.ipv6)] {
                assert!(is_inside(address) && !is_gateway(address));
            }
            assert!(!guest.mac.is_group());
        }
    }
}
