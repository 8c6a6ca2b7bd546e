//! The rules of a bridge, in the language of nft(8). Pure. Each text replaces whole tables in one
//! transaction of the kernel's.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv6Addr};

use crate::config::{Addresses, GATEWAY_LINK, Subnet};
use crate::protocol::{Forward, Protocol};

/// What the rules of a network are made of.
pub(super) struct Network<'a> {
    pub(super) device: &'a str,
    pub(super) subnet: Subnet,
    /// Guests reach the host and all of its networks.
    pub(super) host: bool,
    /// Guests reach only each other.
    pub(super) isolated: bool,
    /// Interfaces that lead to the world.
    pub(super) uplinks: &'a [String],
}

/// Removes a table, if there is one.
pub(super) fn without(family: &str, table: &str) -> String {
    format!("table {family} {table} {{}}\ndelete table {family} {table}\n")
}

/// The table of a network: what guests reach on the host, through it, and under whose address.
pub(super) fn of_network(network: &Network<'_>) -> String {
    let Network {
        device,
        subnet,
        host,
        isolated,
        uplinks,
    } = *network;
    let (gateway, gateway_v6) = (subnet.gateway(), subnet.gateway_v6());
    let refuse = "reject with icmpx admin-prohibited";
    let quoted: Vec<String> = uplinks.iter().map(|name| format!("\"{name}\"")).collect();
    let outside = match (isolated, host) {
        (true, _) => refuse.to_owned(),
        (false, true) => "accept".to_owned(),
        (false, false) if quoted.is_empty() => refuse.to_owned(),
        (false, false) => format!("oifname != {{ {} }} {refuse}", quoted.join(", ")),
    };
    let to_host = if host && !isolated { "accept" } else { refuse };
    let masquerade = if isolated {
        String::new()
    } else {
        format!(
            "  ip saddr {gateway}/24 oifname != \"{device}\" masquerade\n\
             \x20 ip6 saddr {gateway_v6}/64 oifname != \"{device}\" masquerade\n"
        )
    };
    format!(
        r#"{without}table inet {device} {{
 chain early {{
  type filter hook prerouting priority raw; policy accept;
  iifname "{device}" ip daddr 127.0.0.0/8 drop
 }}
 chain translated {{
  type nat hook postrouting priority srcnat; policy accept;
{masquerade}  oifname "{device}" ip saddr 127.0.0.0/8 masquerade
 }}
 chain through {{
  type filter hook forward priority filter; policy accept;
  iifname "{device}" jump leaving
  oifname "{device}" jump entering
 }}
 chain leaving {{
  oifname "{device}" accept
  ct state established,related accept
  ip daddr {{ 0.0.0.0/8, 127.0.0.0/8, 169.254.0.0/16, 224.0.0.0/3 }} {refuse}
  ip6 daddr {{ ::/96, ::ffff:0:0/96, fe80::/10, ff00::/8 }} {refuse}
  {outside}
 }}
 chain entering {{
  iifname "{device}" accept
  ct state established,related accept
  ct status dnat accept
  drop
 }}
 chain host {{
  type filter hook input priority filter; policy accept;
  iifname "{device}" jump for_host
 }}
 chain for_host {{
  ct state established,related accept
  udp sport 68 udp dport 67 accept
  ip daddr {gateway} meta l4proto {{ tcp, udp }} th dport 53 accept
  ip daddr {gateway} icmp type echo-request accept
  ip6 daddr {gateway_v6} meta l4proto {{ tcp, udp }} th dport 53 accept
  ip6 daddr {{ {gateway_v6}, {GATEWAY_LINK} }} icmpv6 type echo-request accept
  icmpv6 type {{ nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert, mld2-listener-report }} accept
  ip daddr 169.254.0.0/16 {refuse}
  {to_host}
 }}
}}
"#,
        without = without("inet", device),
    )
}

/// The tables of a machine: of the bridge family, what may leave its tap device; of the internet's
/// the ports of the host that lead to it.
pub(super) fn of_machine(tap: &str, addresses: &Addresses, forwards: &[Forward]) -> String {
    let Addresses { mac, ipv4, ipv6 } = addresses;
    let link = mac.address_in(GATEWAY_LINK);
    let own = [*ipv6, link].map(|address| format!("{:#034x}", address.to_bits()));
    let own = own.join(", ");
    let mut text = without("bridge", tap) + &without("inet", tap);
    // What is nobody's but the router's and the DHCP server's to say: RFC 6105, RFC 7610. First
    // what would hide the rest from the rules: VLAN tags, number 0 included, which others take as
    // if there were none; and fragments of IPv6 whose first does not show what is in them
    // (RFC 6980, RFC 7112).
    let _ = write!(
        text,
        r#"table bridge {tap} {{
 chain leaving {{
  type filter hook prerouting priority -300; policy accept;
  iifname "{tap}" jump own
 }}
 chain own {{
  ether saddr != {mac} drop
  ether type != {{ arp, ip, ip6 }} drop
  arp htype 1 arp ptype ip arp saddr ether {mac} arp saddr ip {ipv4} accept
  arp htype 1 arp ptype ip arp saddr ether {mac} arp saddr ip 0.0.0.0 arp daddr ip {ipv4} accept
  ether type ip udp sport 67 drop
  ip saddr {ipv4} accept
  ip saddr 0.0.0.0 ip daddr 255.255.255.255 udp sport 68 udp dport 67 accept
  icmpv6 type {{ nd-router-advert, nd-redirect }} drop
  icmpv6 type 133-137 exthdr frag exists drop
  icmpv6 type nd-neighbor-advert @th,64,128 != {{ {own} }} drop
  ether type ip6 udp sport 547 drop
  ip6 saddr {{ {ipv6}, {link} }} frag frag-off > 0 accept
  ip6 saddr {{ {ipv6}, {link} }} @th,0,8 0-255 accept
  ip6 saddr :: icmpv6 type nd-neighbor-solicit @th,64,128 {{ {own} }} accept
  ip6 saddr :: icmpv6 type {{ nd-router-solicit, mld2-listener-report }} accept
  drop
 }}
}}
"#
    );
    if !forwards.is_empty() {
        let rules: String = forwards.iter().map(|f| lead(f, addresses)).collect();
        let _ = write!(
            text,
            r"table inet {tap} {{
 chain from_outside {{
  type nat hook prerouting priority dstnat; policy accept;
{rules} }}
 chain from_host {{
  type nat hook output priority -100; policy accept;
{rules} }}
}}
"
        );
    }
    text
}

/// The rule of a forward.
fn lead(forward: &Forward, guest: &Addresses) -> String {
    let protocol = match forward.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    };
    let (port, to) = (forward.host.port(), forward.guest);
    let (family, place, target) = match forward.host.ip() {
        IpAddr::V4(address) => (
            "ip",
            (!address.is_unspecified()).then(|| address.to_string()),
            guest.ipv4.to_string(),
        ),
        IpAddr::V6(address) => (
            "ip6",
            (!address.is_unspecified()).then(|| address.to_string()),
            bracketed(guest.ipv6),
        ),
    };
    let place = match place {
        Some(address) => format!("{family} daddr {address}"),
        None => format!(
            "meta nfproto {} fib daddr type local",
            if family == "ip" { "ipv4" } else { "ipv6" }
        ),
    };
    format!("  {place} {protocol} dport {port} dnat {family} to {target}:{to}\n")
}

fn bracketed(address: Ipv6Addr) -> String {
    format!("[{address}]")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(host: bool, isolated: bool) -> String {
        of_network(&Network {
            device: "strata-lab",
            subnet: Subnet::of_bridge(3),
            host,
            isolated,
            uplinks: &["eth0".to_owned(), "eth1".to_owned()],
        })
    }

    #[test]
    fn guests_leave_by_the_uplinks_unless_told_otherwise() {
        let only = r#"oifname != { "eth0", "eth1" } reject with icmpx admin-prohibited"#;
        assert!(network(false, false).contains(only));
        assert!(!network(true, false).contains("oifname != {"));
        assert!(!network(false, true).contains("10.83.3.1/24"));
    }

    #[test]
    fn a_forward_leads_to_the_guests_port() {
        let guest = Subnet::of_bridge(3).guest(2);
        let lead = |protocol, host: &str| {
            let host = host.parse().unwrap();
            lead(
                &Forward {
                    protocol,
                    host,
                    guest: 80,
                },
                &guest,
            )
        };
        assert_eq!(
            lead(Protocol::Tcp, "127.0.0.1:8080").trim(),
            "ip daddr 127.0.0.1 tcp dport 8080 dnat ip to 10.83.3.2:80"
        );
        assert_eq!(
            lead(Protocol::Udp, "[::]:53").trim(),
            "meta nfproto ipv6 fib daddr type local udp dport 53 dnat ip6 to \
             [fd53:7472:6174:6203:53:74ff:fe72:6102]:80"
        );
    }

    #[test]
    fn a_machine_without_forwards_has_rules_for_its_tap_alone() {
        let text = of_machine("st-lab.2", &Subnet::of_bridge(3).guest(2), &[]);
        assert!(text.contains("ether saddr != 02:53:74:72:61:02 drop"));
        assert!(!text.contains("dnat"));
    }
}
