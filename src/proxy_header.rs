//! The header of the PROXY protocol, in which a balancer tells the next server who the client is.
//!
//! Source: "The PROXY protocol, versions 1 & 2" (<https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt>). We parse it
//! ourselves: the parser must tell an incomplete header from a wrong one at every byte, name the exact length, check the
//! checksum and allocate nothing. No published parser does all four.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::label_enum;

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

/// Type of the field with the checksum (section 2.2.3 of the specification).
const CRC32C: u8 = 0x03;

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
        ends => Parsed::Header(Header { version: Version::V1, length: end + 2, ends }),
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
        return Parsed::Header(Header { version: Version::V2, length, ends: None });
    }
    let size = [0, 12, 36, 216][usize::from(family)];
    let Some((addresses, fields)) = body.split_at_checked(size) else { return Parsed::Invalid(Fault::Addresses) };
    // Unix sockets and datagrams have no address that a TCP client could have.
    let is_tcp = transport == 1 && (family == 1 || family == 2);
    let ends = if is_tcp { ends_of_block(addresses) } else { None };
    match check_fields(&bytes[..length], fields) {
        Ok(()) => Parsed::Header(Header { version: Version::V2, length, ends }),
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

/// Writes a header. If only one address is IPv4, both become IPv6 addresses. Without `ends`, the client is unknown.
pub fn write(version: Version, ends: Option<Ends>) -> Vec<u8> {
    match version {
        Version::V1 => write_line(ends),
        Version::V2 => write_binary(PROXIED, ends),
    }
}

/// The header with which Ringway speaks for itself, in health checks and for calls to the side port. `None` gives no bytes.
pub fn local(version: Option<Version>) -> Vec<u8> {
    match version {
        None => Vec::new(),
        Some(Version::V1) => write_line(None),
        Some(Version::V2) => write_binary(LOCAL, None),
    }
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

fn write_binary(command: u8, ends: Option<Ends>) -> Vec<u8> {
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
    let length = (header.len() - FIXED) as u16;
    header[14..FIXED].copy_from_slice(&length.to_be_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::unnecessary_wraps, reason = "compared with what the parser returns")]
    fn ends(source: &str, destination: &str) -> Option<Ends> {
        Some(Ends { source: source.parse().unwrap(), destination: destination.parse().unwrap() })
    }

    fn ends_of(bytes: &[u8]) -> Option<Ends> {
        match parse(bytes) {
            Parsed::Header(header) => {
                assert_eq!(header.length, bytes.len());
                header.ends
            }
            other => panic!("{other:?}"),
        }
    }

    fn binary(kind: [u8; 2], body: &[u8]) -> Vec<u8> {
        [&SIGNATURE[..], &kind, &(body.len() as u16).to_be_bytes(), body].concat()
    }

    #[test]
    fn lines_of_the_specification() {
        let line = b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n";
        assert_eq!(ends_of(line), ends("192.168.0.1:56324", "192.168.0.11:443"));
        assert_eq!(ends_of(b"PROXY UNKNOWN\r\n"), None);
        let longest = b"PROXY UNKNOWN ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535\r\n";
        assert_eq!((longest.len(), ends_of(longest)), (LONGEST_LINE, None));
        assert_eq!(ends_of(b"PROXY TCP6 2001:db8::1 ::1 1 2\r\n"), ends("[2001:db8::1]:1", "[::1]:2"));
        assert_eq!(ends_of(b"PROXY TCP6 ::ffff:10.0.0.1 ::ffff:a00:2 1 2\r\n"), ends("10.0.0.1:1", "10.0.0.2:2"));
    }

    #[test]
    fn lines_that_are_wrong() {
        for line in [
            "PROXY\r\n",
            "PROXY \r\n",
            "PROXY TCP4 10.0.0.1 10.0.0.2 1\r\n",
            "PROXY TCP4 10.0.0.1 10.0.0.2 1 2 3\r\n",
            "PROXY TCP4 10.0.0.1 10.0.0.2 01 2\r\n",
            "PROXY TCP4 10.0.0.1 10.0.0.2 +1 2\r\n",
            "PROXY TCP4 10.0.0.1 10.0.0.2 1 65536\r\n",
            "PROXY TCP4 10.0.0.01 10.0.0.2 1 2\r\n",
            "PROXY TCP4 ::1 ::1 1 2\r\n",
            "PROXY TCP6 10.0.0.1 10.0.0.2 1 2\r\n",
            "PROXY TCP5 10.0.0.1 10.0.0.2 1 2\r\n",
            "PROXY  TCP4 10.0.0.1 10.0.0.2 1 2\r\n",
            "PROXY TCP4 10.0.0.1 10.0.0.2 1 2 \r\n",
        ] {
            let parsed = parse(line.as_bytes());
            let is_absent = line == "PROXY\r\n" && parsed == Parsed::Absent;
            assert!(is_absent || parsed == Parsed::Invalid(Fault::Line), "{line:?}: {parsed:?}");
        }
        assert_eq!(parse(format!("PROXY {}", "x".repeat(101)).as_bytes()), Parsed::Invalid(Fault::Line));
        assert_eq!(parse(b"PROXY TCP4 \xff\xfe\r\n"), Parsed::Invalid(Fault::Line));
    }

    #[test]
    fn binary_headers() {
        let v4 = [10, 0, 0, 1, 10, 0, 0, 2, 0x1f, 0x90, 1, 0xbb];
        assert_eq!(ends_of(&binary([0x21, 0x11], &v4)), ends("10.0.0.1:8080", "10.0.0.2:443"));
        let mut v6 = [0; 36];
        (v6[15], v6[31], v6[33], v6[35]) = (1, 2, 80, 81);
        assert_eq!(ends_of(&binary([0x21, 0x21], &v6)), ends("[::1]:80", "[::2]:81"));
        // No address of a TCP client: the sender itself, an unknown one, a datagram, a Unix socket.
        for (kind, size) in [
            ([0x20, 0], 0),
            ([0x20, 0xff], 3),
            ([0x20, 0x11], 0),
            ([0x20, 0x11], 12),
            ([0x21, 0], 0),
            ([0x21, 0], 7),
            ([0x21, 0x12], 12),
            ([0x21, 0x31], 216),
        ] {
            assert_eq!(ends_of(&binary(kind, &vec![0; size])), None, "{kind:?}");
        }
        for (kind, size, fault) in [
            ([0x31, 0x11], 12, Fault::Kind),
            ([0x22, 0x11], 12, Fault::Kind),
            ([0x21, 0x41], 12, Fault::Kind),
            ([0x21, 0x13], 12, Fault::Kind),
            ([0x21, 0x11], 11, Fault::Addresses),
            ([0x21, 0x21], 35, Fault::Addresses),
            ([0x21, 0x11], 13, Fault::Field),
            ([0x21, 0x11], LONGEST, Fault::Length),
        ] {
            assert_eq!(parse(&binary(kind, &vec![0; size])), Parsed::Invalid(fault), "{kind:?} {size}");
        }
    }

    /// A header with some fields, the last of which is the checksum.
    fn with_checksum() -> Vec<u8> {
        let v4 = [10, 0, 0, 1, 10, 0, 0, 2, 0, 80, 0, 81];
        let fields = [0xea, 0, 2, 0xff, 0xfe, 0xea, 0, 0, 0x04, 0, 1, 0, CRC32C, 0, 4, 0, 0, 0, 0];
        let mut header = binary([PROXIED, 0x11], &[&v4[..], &fields].concat());
        let at = header.len() - 4;
        let sum = checksum(&header, at);
        header[at..].copy_from_slice(&sum.to_be_bytes());
        header
    }

    #[test]
    fn the_checksum_is_checked() {
        let header = with_checksum();
        assert_eq!(ends_of(&header), ends("10.0.0.1:80", "10.0.0.2:81"));
        // Without its type, the checksum is a field like others.
        let kind = header.len() - 7;
        for at in (FIXED..header.len()).filter(|&at| at != kind) {
            let mut damaged = header.clone();
            damaged[at] ^= 1;
            assert!(matches!(parse(&damaged), Parsed::Invalid(Fault::Checksum | Fault::Field)), "byte {at}");
        }
        // RFC 3720, appendix B.4: 32 bytes of zeros.
        assert_eq!(!crc32c(!0, &[0; 32]), 0x8a91_36aa);
    }

    #[test]
    fn what_ringway_sends_it_also_reads() {
        for version in [Version::V1, Version::V2] {
            for (source, destination) in
                [("10.0.0.1:1", "10.0.0.2:65535"), ("[2001:db8::1]:1", "[::1]:2"), ("10.0.0.1:1", "[::1]:2")]
            {
                let ends = ends(source, destination);
                let sent = write(version, ends);
                assert_eq!(ends_of(&sent), ends, "{version:?}");
                assert!(version == Version::V2 || sent.len() <= LONGEST_LINE);
            }
            assert_eq!((ends_of(&write(version, None)), ends_of(&local(Some(version)))), (None, None));
        }
        let widest =
            ends("[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535", "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535");
        assert!(write_line(widest).len() <= LONGEST_LINE);
    }

    /// Wherever the network divides a header, the parser asks for more until it is complete.
    #[test]
    fn a_header_is_incomplete_until_its_last_byte() {
        for header in [write(Version::V1, ends("10.0.0.1:1", "10.0.0.2:2")), with_checksum()] {
            let followed = [&header[..], &vec![0xff; 100_000]].concat();
            for length in 0..header.len() {
                assert_eq!(parse(&header[..length]), Parsed::Incomplete, "{length}");
            }
            assert_eq!(parse(&followed), parse(&header));
        }
        for other in ["GET / HTTP/1.1", "PROXX", "\r\n\r\n\r", "x"] {
            assert_eq!(parse(other.as_bytes()), Parsed::Absent, "{other:?}");
        }
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig { failure_persistence: None, cases: 2000, ..Default::default() })]

        #[test]
        fn no_bytes_break_the_parser_and_more_bytes_change_no_decision(
            kind in proptest::prelude::any::<[u8; 2]>(),
            length in 0_u16..300,
            body in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300),
            is_line in proptest::prelude::any::<bool>(),
        ) {
            let mut bytes = if is_line { LINE.to_vec() } else { [&SIGNATURE[..], &kind, &length.to_be_bytes()].concat() };
            bytes.extend(body);
            let whole = parse(&bytes);
            for cut in 0..bytes.len() {
                match parse(&bytes[..cut]) {
                    Parsed::Incomplete => {}
                    decided => proptest::prop_assert_eq!(&decided, &whole),
                }
            }
        }
    }
}
