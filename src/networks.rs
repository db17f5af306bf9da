//! A set of networks, like `10.0.0.0/8`, that tells quickly whether a client is in it.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::stream::Client;

/// A set of networks. Clients on Unix sockets have no address; the word `unix` stands for all of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Networks {
    /// As the user has written them.
    list: Box<[Network]>,
    /// First and last addresses, sorted. The ranges do not overlap.
    v4: Box<[(u128, u128)]>,
    v6: Box<[(u128, u128)]>,
    has_unix: bool,
}

/// One entry of a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// The addresses of a network.
    Ip(IpNet),
    /// All clients on Unix sockets.
    Unix,
}

impl std::str::FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "unix" {
            return Ok(Self::Unix);
        }
        match text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from)) {
            Ok(IpNet::V6(network)) if network.addr().to_ipv4_mapped().is_some() => {
                Err(format!("{text} has mapped IPv4 addresses: write the IPv4 network, like 10.0.0.0/8"))
            }
            Ok(network) => Ok(Self::Ip(network)),
            Err(_) => Err(format!(
                "{text:?} is neither a network nor an address: write it like 10.0.0.0/8, fd00::/8, 10.0.0.5 or unix"
            )),
        }
    }
}

impl std::fmt::Display for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ip(network) => network.fmt(f),
            Self::Unix => f.write_str("unix"),
        }
    }
}

impl FromIterator<Network> for Networks {
    fn from_iter<T: IntoIterator<Item = Network>>(list: T) -> Self {
        let list: Box<[_]> = list.into_iter().collect();
        let range = |network: &IpNet| (number(network.network()), number(network.broadcast()));
        let of = |is_ipv4: bool| {
            let ranges = list.iter().filter_map(|network| match network {
                Network::Ip(network) if network.addr().is_ipv4() == is_ipv4 => Some(range(network)),
                Network::Ip(_) | Network::Unix => None,
            });
            joined(ranges.collect())
        };
        Self { v4: of(true), v6: of(false), has_unix: list.contains(&Network::Unix), list }
    }
}

impl Networks {
    /// Whether the client is in one of the networks. An IPv4-mapped IPv6 address counts as the IPv4 address.
    pub fn contains(&self, client: Client) -> bool {
        let Client::Ip(address) = client else { return self.has_unix };
        let ip = address.ip().to_canonical();
        let (ranges, ip) = (if ip.is_ipv4() { &self.v4 } else { &self.v6 }, number(ip));
        // Of the ranges that begin at the address or before it, only the last one can reach it.
        let after = ranges.partition_point(|&(first, _)| first <= ip);
        after > 0 && ip <= ranges[after - 1].1
    }

    /// The entries, in the order in which the user has written them.
    pub fn list(&self) -> &[Network] {
        &self.list
    }

    /// Whether every client with an IPv4 address is in the set, or every one with an IPv6 address.
    pub fn has_everybody(&self) -> bool {
        let is_whole = |ranges: &[(u128, u128)], last: u128| ranges == [(0, last)];
        is_whole(&self.v4, u32::MAX.into()) || is_whole(&self.v6, u128::MAX)
    }

    /// Whether every client of `other` is also in this set.
    pub fn covers(&self, other: &Self) -> bool {
        let within = |(first, last): &(u128, u128), ranges: &[(u128, u128)]| {
            let after = ranges.partition_point(|(begin, _)| begin <= first);
            after > 0 && *last <= ranges[after - 1].1
        };
        (self.has_unix || !other.has_unix)
            && other.v4.iter().all(|range| within(range, &self.v4))
            && other.v6.iter().all(|range| within(range, &self.v6))
    }
}

fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u32::from(ip).into(),
        IpAddr::V6(ip) => ip.into(),
    }
}

/// Sorts ranges and joins those that overlap or touch.
fn joined(mut ranges: Vec<(u128, u128)>) -> Box<[(u128, u128)]> {
    ranges.sort_unstable();
    let mut joined: Vec<(u128, u128)> = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        match joined.last_mut() {
            Some(before) if first <= before.1.saturating_add(1) => before.1 = before.1.max(last),
            _ => joined.push((first, last)),
        }
    }
    joined.into()
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    fn set(list: &[&str]) -> Networks {
        list.iter().map(|text| text.parse::<Network>().unwrap()).collect()
    }

    fn client(ip: &str) -> Client {
        Client::Ip((ip.parse::<IpAddr>().unwrap(), 1).into())
    }

    #[test]
    fn a_set_contains_the_clients_of_its_networks() {
        let networks = set(&["10.0.0.0/8", "192.0.2.7", "2001:db8::/32", "10.1.0.0/16"]);
        for inside in ["10.0.0.0", "10.255.255.255", "192.0.2.7", "2001:db8::1", "::ffff:10.1.1.1"] {
            assert!(networks.contains(client(inside)), "{inside}");
        }
        for outside in ["9.255.255.255", "11.0.0.0", "192.0.2.6", "192.0.2.8", "2001:db9::", "::a00:1"] {
            assert!(!networks.contains(client(outside)), "{outside}");
        }
        let on_unix = Client::Unix { user: 0, pid: 1, number: 1 };
        assert!(!networks.contains(on_unix) && set(&["unix"]).contains(on_unix));
        assert!(!Networks::default().contains(client("10.0.0.1")));
    }

    #[test]
    fn wrong_entries_say_what_to_write() {
        for (text, says) in
            [("10.0.0.0/33", "neither"), ("", "neither"), ("::ffff:10.0.0.0/104", "mapped"), ("host", "neither")]
        {
            assert!(text.parse::<Network>().unwrap_err().contains(says), "{text}");
        }
    }

    #[test]
    fn two_halves_are_everybody() {
        assert!(set(&["0.0.0.0/1", "128.0.0.0/1"]).has_everybody());
        assert!(set(&["::/0"]).has_everybody());
        assert!(!set(&["0.0.0.0/1", "10.0.0.0/8"]).has_everybody());
        assert!(set(&["10.0.0.0/8", "unix"]).covers(&set(&["10.1.0.0/16", "unix"])));
        assert!(!set(&["10.0.0.0/8"]).covers(&set(&["10.1.0.0/16", "unix"])));
        assert!(!set(&["10.0.0.0/8"]).covers(&set(&["11.0.0.0/16"])));
    }

    proptest! {
        #[test]
        fn the_set_finds_what_a_search_of_the_list_finds(
            nets in proptest::collection::vec((any::<u32>(), 0_u8..=32), 0..12),
            six in proptest::collection::vec((any::<u128>(), 0_u8..=128), 0..6),
            probes in proptest::collection::vec(any::<u32>(), 20),
        ) {
            let four = nets.iter().map(|&(ip, length)| IpNet::new(Ipv4Addr::from(ip).into(), length).unwrap());
            let six = six.iter().map(|&(ip, length)| IpNet::new(Ipv6Addr::from(ip).into(), length).unwrap());
            let list: Vec<IpNet> = four.chain(six).collect();
            let networks: Networks = list.iter().copied().map(Network::Ip).collect();
            // The edges of each network are where a mistake would be.
            let edges = list.iter().flat_map(|net| [net.network(), net.broadcast()]);
            let near = nets.iter().flat_map(|&(ip, _)| [ip.wrapping_sub(1), ip.wrapping_add(1)]);
            let ips = probes.into_iter().chain(near).map(|ip| IpAddr::V4(ip.into())).chain(edges);
            for ip in ips {
                let ip = ip.to_canonical();
                let expected = list.iter().any(|net| net.contains(&ip));
                prop_assert_eq!(networks.contains(Client::Ip((ip, 1).into())), expected, "{}", ip);
            }
        }
    }
}
