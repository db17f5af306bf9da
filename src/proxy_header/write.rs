//! Writes headers.

use std::net::{IpAddr, Ipv6Addr};

use super::{CRC32C, Ends, FIXED, LOCAL, PROXIED, SIGNATURE, Version, checksum};

/// The header with which Ringway speaks for itself, in health checks and for calls to the side port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OwnHeader {
    /// No header.
    Absent,
    /// A header that says that Ringway speaks for itself.
    Local(Version),
    /// A header with the addresses of Ringway's own connection, for servers that do not understand `Local`.
    Addresses(Version),
}

impl OwnHeader {
    /// The bytes of the header. `ends` are those of the connection.
    pub fn bytes(self, ends: impl FnOnce() -> Option<Ends>) -> Vec<u8> {
        match self {
            Self::Absent => Vec::new(),
            Self::Local(Version::V1) => write_line(None),
            Self::Local(Version::V2) => write_binary(LOCAL, None, &[], false),
            Self::Addresses(version) => write(version, ends()),
        }
    }
}

/// Writes a header. If only one address is IPv4, both become IPv6 addresses. Without `ends`, the client is unknown.
pub fn write(version: Version, ends: Option<Ends>) -> Vec<u8> {
    match version {
        Version::V1 => write_line(ends),
        Version::V2 => write_with(ends, &[], false),
    }
}

/// Writes a header of version 2 with further fields, each a type and a value, and with a checksum as the last field.
pub fn write_with(ends: Option<Ends>, fields: &[(u8, &[u8])], with_checksum: bool) -> Vec<u8> {
    write_binary(PROXIED, ends, fields, with_checksum)
}

fn write_line(ends: Option<Ends>) -> Vec<u8> {
    let Some(Ends { source, destination }) = ends else { return b"PROXY UNKNOWN\r\n".to_vec() };
    let (from, to) = (source.port(), destination.port());
    let line = match (source.ip(), destination.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => format!("PROXY TCP4 {source} {destination} {from} {to}\r\n"),
        (source, destination) => {
            // Colons and digits only: some readers do not take the dots of a mapped address.
            let plain = |ip| as_v6(ip).segments().map(|part| format!("{part:x}")).join(":");
            format!("PROXY TCP6 {} {} {from} {to}\r\n", plain(source), plain(destination))
        }
    };
    line.into_bytes()
}

fn as_v6(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

fn write_binary(command: u8, ends: Option<Ends>, fields: &[(u8, &[u8])], with_checksum: bool) -> Vec<u8> {
    let mut header = SIGNATURE.to_vec();
    header.push(command);
    // The family and the length follow below.
    header.extend([0; 3]);
    if let Some(Ends { source, destination }) = ends {
        match (source.ip(), destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                header[13] = 0x11;
                header.extend(source.octets().into_iter().chain(destination.octets()));
            }
            (source, destination) => {
                header[13] = 0x21;
                header.extend(as_v6(source).octets().into_iter().chain(as_v6(destination).octets()));
            }
        }
        header.extend(source.port().to_be_bytes().into_iter().chain(destination.port().to_be_bytes()));
    }
    let checksum_at = with_checksum.then_some((CRC32C, &[0; 4][..]));
    for (kind, value) in fields.iter().copied().chain(checksum_at) {
        header.push(kind);
        header.extend((value.len() as u16).to_be_bytes());
        header.extend(value);
    }
    let length = (header.len() - FIXED) as u16;
    header[14..FIXED].copy_from_slice(&length.to_be_bytes());
    if with_checksum {
        let at = header.len() - 4;
        let sum = checksum(&header, at);
        header[at..].copy_from_slice(&sum.to_be_bytes());
    }
    header
}
