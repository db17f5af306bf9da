//! Stage key: selects the bytes of a connection that are hashed.

use std::net::IpAddr;

use crate::label_enum;
use crate::stream::Client;

label_enum! {
    /// The part of a connection that is hashed.
    pub enum KeyKind {
        /// The client's address and port: each connection is balanced independently, so load spreads evenly. On a Unix
        /// socket: the client's user id and the connection's number.
        Source => "source",
        /// The client's address: all connections of a client go to the same backend. On a Unix socket: the client's user
        /// id.
        SourceIp => "source_ip",
    }
}

/// A key: 4 or 16 bytes of address in network order; [`KeyKind::Source`] appends 2 bytes of port. For a client on a Unix
/// socket: `u` and 4 bytes of user id; [`KeyKind::Source`] appends the 8 bytes of the connection's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    bytes: [u8; 18],
    length: u8,
}

impl Key {
    /// The key of a client. An IPv4-mapped IPv6 address gives the same key as the IPv4 address.
    pub fn of(kind: KeyKind, client: Client) -> Self {
        let mut key = Self { bytes: [0; 18], length: 0 };
        match client {
            Client::Ip(address) => {
                match address.ip().to_canonical() {
                    IpAddr::V4(ip) => key.push(&ip.octets()),
                    IpAddr::V6(ip) => key.push(&ip.octets()),
                }
                if kind == KeyKind::Source {
                    key.push(&address.port().to_be_bytes());
                }
            }
            Client::Unix { user, number, .. } => {
                key.push(b"u");
                key.push(&user.to_be_bytes());
                if kind == KeyKind::Source {
                    key.push(&number.to_be_bytes());
                }
            }
        }
        key
    }

    /// The bytes to hash.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }

    fn push(&mut self, part: &[u8]) {
        for &byte in part {
            self.bytes[usize::from(self.length)] = byte;
            self.length += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(kind: KeyKind, client: &str) -> Vec<u8> {
        Key::of(kind, Client::Ip(client.parse().unwrap())).as_bytes().to_vec()
    }

    #[test]
    fn clients_on_unix_sockets_differ_by_user_and_number() {
        let key = |kind, user, number| Key::of(kind, Client::Unix { user, pid: 1, number });
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
    fn an_ipv4_mapped_address_gives_the_same_key() {
        assert_eq!(key(KeyKind::Source, "[::ffff:10.1.2.3]:258"), key(KeyKind::Source, "10.1.2.3:258"));
    }
}
