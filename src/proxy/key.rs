//! Stage key: selects the bytes of a connection that are hashed.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::stream::Client;

/// The part of a connection that is hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyKind {
    /// The client's address and port: each connection is balanced independently, so load spreads evenly. On a Unix
    /// socket: the client's user id and the connection's number.
    Source,
    /// The client's address: all connections of a client go to the same backend. On a Unix socket: the client's user
    /// id.
    SourceIp,
    /// The client's network: all clients of a network go to the same backend. On a Unix socket as [`KeyKind::SourceIp`].
    SourceNet {
        /// Prefix length for IPv4, 1 to 32.
        v4: u8,
        /// Prefix length for IPv6, 1 to 128.
        v6: u8,
    },
    /// The server name of the client's TLS handshake: all connections for a name go to the same backend. Without a name
    /// as [`KeyKind::SourceIp`].
    Sni,
}

impl KeyKind {
    /// The names of all kinds.
    pub const NAMES: [&str; 4] = ["source", "source_ip", "source_net", "sni"];

    /// The name in the config and in the status.
    pub fn as_str(self) -> &'static str {
        let nth = match self {
            Self::Source => 0,
            Self::SourceIp => 1,
            Self::SourceNet { .. } => 2,
            Self::Sni => 3,
        };
        Self::NAMES[nth]
    }
}

/// A key: 4 or 16 bytes of address in network order; [`KeyKind::Source`] appends 2 bytes of port, [`KeyKind::SourceNet`]
/// sets the bits behind the prefix to 0. For a client on a Unix socket: `u` and 4 bytes of user id; [`KeyKind::Source`]
/// appends the 8 bytes of the connection's number. [`KeyKind::Sni`]: the name in lower case, without a dot at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key<'a>(Bytes<'a>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bytes<'a> {
    OfClient { bytes: [u8; 18], length: u8 },
    Name(&'a str),
}

impl<'a> Key<'a> {
    /// The key of a client that asks for this server name. An IPv4-mapped IPv6 address gives the same key as the IPv4
    /// address.
    pub fn of(kind: KeyKind, client: Client, server_name: Option<&'a str>) -> Self {
        if let (KeyKind::Sni, Some(name)) = (kind, server_name) {
            return Self(Bytes::Name(name));
        }
        let (mut bytes, mut length) = ([0; 18], 0);
        let mut push = |part: &[u8]| {
            bytes[length..][..part.len()].copy_from_slice(part);
            length += part.len();
        };
        match client {
            Client::Ip(address) => {
                match (address.ip().to_canonical(), kind) {
                    (IpAddr::V4(ip), KeyKind::SourceNet { v4, .. }) => push(&(ip & first_bits_v4(v4)).octets()),
                    (IpAddr::V6(ip), KeyKind::SourceNet { v6, .. }) => push(&(ip & first_bits_v6(v6)).octets()),
                    (IpAddr::V4(ip), _) => push(&ip.octets()),
                    (IpAddr::V6(ip), _) => push(&ip.octets()),
                }
                if kind == KeyKind::Source {
                    push(&address.port().to_be_bytes());
                }
            }
            Client::Unix { user, number, .. } => {
                push(b"u");
                push(&user.to_be_bytes());
                if kind == KeyKind::Source {
                    push(&number.to_be_bytes());
                }
            }
        }
        Self(Bytes::OfClient { bytes, length: length as u8 })
    }

    /// The bytes to hash.
    pub fn as_bytes(&self) -> &[u8] {
        match &self.0 {
            Bytes::OfClient { bytes, length } => &bytes[..usize::from(*length)],
            Bytes::Name(name) => name.as_bytes(),
        }
    }
}

fn first_bits_v4(prefix: u8) -> Ipv4Addr {
    Ipv4Addr::from(u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0))
}

fn first_bits_v6(prefix: u8) -> Ipv6Addr {
    Ipv6Addr::from(u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(kind: KeyKind, client: &str) -> Vec<u8> {
        Key::of(kind, Client::Ip(client.parse().unwrap()), None).as_bytes().to_vec()
    }

    #[test]
    fn clients_on_unix_sockets_differ_by_user_and_number() {
        let key = |kind, user, number| Key::of(kind, Client::Unix { user, pid: 1, number }, None);
        assert_eq!(key(KeyKind::SourceIp, 1, 1), key(KeyKind::SourceIp, 1, 2));
        assert_ne!(key(KeyKind::SourceIp, 1, 1), key(KeyKind::SourceIp, 2, 1));
        assert_ne!(key(KeyKind::Source, 1, 1), key(KeyKind::Source, 1, 2));
    }

    #[test]
    fn keys_are_address_and_port_in_network_order() {
        assert_eq!(key(KeyKind::Source, "10.1.2.3:258"), [10, 1, 2, 3, 1, 2]);
        assert_eq!(key(KeyKind::SourceIp, "10.1.2.3:258"), [10, 1, 2, 3]);
        assert_eq!(key(KeyKind::Source, "[2001:db8::1]:80").len(), 18);
        assert_eq!(key(KeyKind::SourceIp, "[2001:db8::1]:80").len(), 16);
    }

    #[test]
    fn a_network_is_an_address_with_zeros_behind_the_prefix() {
        let kind = KeyKind::SourceNet { v4: 20, v6: 64 };
        assert_eq!(key(kind, "10.1.255.3:258"), [10, 1, 240, 0]);
        assert_eq!(key(kind, "[::ffff:10.1.241.9]:1"), [10, 1, 240, 0]);
        assert_eq!(key(kind, "[2001:db8::1:2:3:4]:80"), [&[0x20, 1, 0xd, 0xb8][..], &[0; 12]].concat());
        let one = KeyKind::SourceNet { v4: 32, v6: 128 };
        assert_eq!(key(one, "10.1.2.3:258"), key(KeyKind::SourceIp, "10.1.2.3:258"));
        assert_eq!(key(one, "[2001:db8::1]:80"), key(KeyKind::SourceIp, "[2001:db8::1]:80"));
    }

    #[test]
    fn a_server_name_is_the_key_and_without_one_the_address_is() {
        let client = Client::Ip("10.1.2.3:258".parse().unwrap());
        assert_eq!(Key::of(KeyKind::Sni, client, Some("www.example.com")).as_bytes(), b"www.example.com");
        assert_eq!(Key::of(KeyKind::Sni, client, None), Key::of(KeyKind::SourceIp, client, None));
        assert_eq!(Key::of(KeyKind::SourceIp, client, Some("a")), Key::of(KeyKind::SourceIp, client, None));
    }

    #[test]
    fn an_ipv4_mapped_address_gives_the_same_key() {
        assert_eq!(key(KeyKind::Source, "[::ffff:10.1.2.3]:258"), key(KeyKind::Source, "10.1.2.3:258"));
    }
}
