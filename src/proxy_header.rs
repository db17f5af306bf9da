//! The header of the PROXY protocol, in which a balancer tells the next server who the client is.
//!
//! Source: "The PROXY protocol, versions 1 & 2" (<https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt>). We parse it
//! ourselves: the parser must tell an incomplete header from a wrong one at every byte, name the exact length, check the
//! checksum and allocate nothing. No published parser does all four.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

pub use self::write::{OwnHeader, write, write_with};
use crate::label_enum;

mod write;

label_enum! {
    /// Version of a header.
    pub enum Version {
        /// A line of text.
        V1 => "v1",
        /// Binary, with room for further fields.
        V2 => "v2",
    }
}

label_enum! {
    /// What is wrong with a header.
    pub enum Fault {
        /// A line of version 1 that does not follow the grammar.
        Line => "line",
        /// Version, command, family or transport of version 2 have a value that does not exist.
        Kind => "kind",
        /// The addresses do not fit into the length of the header.
        Addresses => "addresses",
        /// A field does not fit into the length of the header.
        Field => "field",
        /// The checksum is wrong.
        Checksum => "checksum",
        /// The header is longer than [`LONGEST`].
        Length => "length",
    }
}

/// Longest header in bytes that [`parse`] accepts. The format allows 64 KiB; known senders use up to 536 bytes.
pub const LONGEST: usize = 4096;

/// Longest line of version 1 in bytes, with its end.
const LONGEST_LINE: usize = 107;

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
const LINE: &[u8] = b"PROXY ";

/// Length of the fixed part of version 2.
const FIXED: usize = 16;

/// Length of a field's type and length.
const FIELD_HEAD: usize = 3;

/// Types of fields (section 2.2 of the specification): the protocol that the client speaks, such as `h2`.
pub const ALPN: u8 = 0x01;
/// The server name for which the client asks.
pub const AUTHORITY: u8 = 0x02;
/// The checksum of the header.
pub const CRC32C: u8 = 0x03;
/// Nothing: padding.
pub const NOOP: u8 = 0x04;
/// A name of the connection, of at most 128 bytes.
pub const UNIQUE_ID: u8 = 0x05;

/// Version and command: the sender speaks for itself, or for a client.
const LOCAL: u8 = 0x20;
const PROXIED: u8 = 0x21;

/// Client and destination of a connection, as the balancer that accepted it saw them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends {
    /// The client's address and port.
    pub source: SocketAddr,
    /// The address and port to which the client connected.
    pub destination: SocketAddr,
}

/// A complete header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Its version.
    pub version: Version,
    /// Its length in bytes. What follows belongs to the connection.
    pub length: usize,
    /// Client and destination. `None`: the sender speaks for itself (a health check), or does not know the client's address.
    pub ends: Option<Ends>,
    /// Where its further fields begin; they reach to its end. Equal to `length` without any.
    pub fields: usize,
}

label_enum! {
    /// A field that Ringway can add to a header of version 2.
    pub enum Tlv {
        /// The server name for which the client asks.
        Authority => "authority",
        /// The protocol that the client prefers.
        Alpn => "alpn",
        /// The id of the connection, as in the access log.
        UniqueId => "unique_id",
        /// A checksum.
        Crc32c => "crc32c",
    }
}

/// The header that a pool's backends get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SendProxy {
    /// Its version. Version 1 has no further fields.
    pub version: Version,
    /// Fields that Ringway adds.
    pub tlvs: Vec<Tlv>,
    /// Types of fields that Ringway passes on from the header that it has received.
    pub pass: Vec<u8>,
}

/// The result of [`parse`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parsed {
    /// The bytes begin with this header.
    Header(Header),
    /// The bytes are the beginning of a header.
    Incomplete,
    /// The bytes are not the beginning of a header.
    Absent,
    /// The bytes begin as a header, and have this fault.
    Invalid(Fault),
}

/// Parses the header at the beginning of `bytes`.
pub fn parse(bytes: &[u8]) -> Parsed {
    let begins = |with: &[u8]| bytes.iter().zip(with).all(|(byte, wanted)| byte == wanted);
    if begins(&SIGNATURE) {
        return parse_binary(bytes);
    }
    if begins(LINE) {
        return parse_line(bytes);
    }
    Parsed::Absent
}

fn parse_line(bytes: &[u8]) -> Parsed {
    let most = &bytes[..bytes.len().min(LONGEST_LINE)];
    let Some(end) = most.windows(2).position(|pair| pair == b"\r\n") else {
        return if bytes.len() < LONGEST_LINE { Parsed::Incomplete } else { Parsed::Invalid(Fault::Line) };
    };
    let line = std::str::from_utf8(&most[..end]).unwrap_or_default();
    let words = || line.split(' ').skip(1);
    // The rest of such a line has no meaning.
    let is_unknown = words().next() == Some("UNKNOWN");
    match if is_unknown { None } else { ends_of_line(words()) } {
        None if !is_unknown => Parsed::Invalid(Fault::Line),
        ends => Parsed::Header(Header { version: Version::V1, length: end + 2, ends, fields: end + 2 }),
    }
}

/// The ends that the words of a line name.
fn ends_of_line<'a>(mut words: impl Iterator<Item = &'a str>) -> Option<Ends> {
    let is_v6 = match words.next()? {
        "TCP4" => false,
        "TCP6" => true,
        _ => return None,
    };
    let mut ip = || {
        let word = words.next()?;
        let ip: IpAddr =
            if is_v6 { word.parse::<Ipv6Addr>().ok()?.into() } else { word.parse::<Ipv4Addr>().ok()?.into() };
        Some(ip.to_canonical())
    };
    let (source, destination) = (ip()?, ip()?);
    let mut port = || {
        let word = words.next()?;
        let is_plain = word.bytes().all(|byte| byte.is_ascii_digit()) && (word == "0" || !word.starts_with('0'));
        word.parse::<u16>().ok().filter(|_| is_plain)
    };
    let (from, to) = (port()?, port()?);
    let ends = Ends { source: SocketAddr::new(source, from), destination: SocketAddr::new(destination, to) };
    words.next().is_none().then_some(ends)
}

fn parse_binary(bytes: &[u8]) -> Parsed {
    let Some(&[version_and_command, family_and_transport, high, low]) = bytes.get(SIGNATURE.len()..FIXED) else {
        return Parsed::Incomplete;
    };
    let is_local = match version_and_command {
        LOCAL => true,
        PROXIED => false,
        _ => return Parsed::Invalid(Fault::Kind),
    };
    let (family, transport) = (family_and_transport >> 4, family_and_transport & 0xf);
    // The family of a sender that speaks for itself has no meaning.
    if !is_local && (family > 3 || transport > 2) {
        return Parsed::Invalid(Fault::Kind);
    }
    let length = FIXED + usize::from(u16::from_be_bytes([high, low]));
    if length > LONGEST {
        return Parsed::Invalid(Fault::Length);
    }
    let Some(body) = bytes.get(FIXED..length) else { return Parsed::Incomplete };
    if is_local || family == 0 {
        // Nor have the addresses of such a sender, or of an unknown client. Some senders leave them out (CVE-2024-23327).
        return Parsed::Header(Header { version: Version::V2, length, ends: None, fields: length });
    }
    let size = [0, 12, 36, 216][usize::from(family)];
    let Some((addresses, fields)) = body.split_at_checked(size) else { return Parsed::Invalid(Fault::Addresses) };
    // Unix sockets and datagrams have no address that a TCP client could have.
    let is_tcp = transport == 1 && (family == 1 || family == 2);
    let ends = if is_tcp { ends_of_block(addresses) } else { None };
    match check_fields(&bytes[..length], fields) {
        Ok(()) => Parsed::Header(Header { version: Version::V2, length, ends, fields: FIXED + size }),
        Err(fault) => Parsed::Invalid(fault),
    }
}

/// The ends in an address block of 12 or 36 bytes.
fn ends_of_block(block: &[u8]) -> Option<Ends> {
    let width = (block.len() - 4) / 2;
    let ip = |bytes: &[u8]| -> Option<IpAddr> {
        let v4 = || <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from);
        let v6 = || <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from);
        v4().or_else(v6).map(|ip| ip.to_canonical())
    };
    let port = |at: usize| u16::from_be_bytes([block[at], block[at + 1]]);
    Some(Ends {
        source: SocketAddr::new(ip(&block[..width])?, port(2 * width)),
        destination: SocketAddr::new(ip(&block[width..2 * width])?, port(2 * width + 2)),
    })
}

/// Checks the lengths of all fields, which end the header, and the checksum if there is one.
fn check_fields(header: &[u8], fields: &[u8]) -> Result<(), Fault> {
    let mut at = header.len() - fields.len();
    for field in Fields(fields) {
        let (kind, value) = field?;
        at += FIELD_HEAD;
        if kind == CRC32C {
            let sum = <[u8; 4]>::try_from(value).map_err(|_| Fault::Field)?;
            if checksum(header, at) != u32::from_be_bytes(sum) {
                return Err(Fault::Checksum);
            }
        }
        at += value.len();
    }
    Ok(())
}

/// The checksum of a header, with zeros in place of the four bytes at `at`, where the checksum itself is.
fn checksum(header: &[u8], at: usize) -> u32 {
    !crc32c(crc32c(crc32c(!0, &header[..at]), &[0; 4]), &header[at + 4..])
}

/// Splits the fields of version 2: a byte of type, two of length, and the value.
struct Fields<'a>(&'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u8, &'a [u8]), Fault>;

    fn next(&mut self) -> Option<Self::Item> {
        let (&kind, rest) = self.0.split_first()?;
        let split = rest
            .split_first_chunk()
            .and_then(|(length, rest)| rest.split_at_checked(usize::from(u16::from_be_bytes(*length))));
        self.0 = split.map_or(&[], |(_, rest)| rest);
        Some(split.map(|(value, _)| (kind, value)).ok_or(Fault::Field))
    }
}

/// Continues a CRC-32C (RFC 3720, appendix B.4) over more bytes. It begins with all bits set, and ends inverted.
fn crc32c(sum: u32, bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut n = 0;
        while n < 256 {
            let (mut rest, mut bit) = (n as u32, 0);
            while bit < 8 {
                rest = if rest & 1 == 1 { (rest >> 1) ^ 0x82f6_3b78 } else { rest >> 1 };
                bit += 1;
            }
            table[n] = rest;
            n += 1;
        }
        table
    };
    bytes.iter().fold(sum, |sum, &byte| TABLE[(sum as u8 ^ byte) as usize] ^ (sum >> 8))
}

/// The fields at the end of a header, each with its type. `bytes` begin with the first one. A wrong field ends the list.
pub fn fields(bytes: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    Fields(bytes).map_while(Result::ok)
}

#[cfg(test)]
mod tests;
