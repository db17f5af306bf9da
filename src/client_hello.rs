//! Reads the first message of a TLS client, the ClientHello (RFC 8446, section 4.1.2): the server name and the protocols
//! that it asks for. Pure: it gets the bytes that have arrived so far, and keeps nothing.
//!
//! Ringway has its own parser. `tls-parser` needs the message in one piece, but a message can be cut over TLS records, and
//! the bytes stay in the socket until the connection has a backend.

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// Length of a record's header: its type, version and length.
const RECORD_HEADER: usize = 5;

/// Length of a handshake message's header: its type and length.
const MESSAGE_HEADER: usize = 4;

/// Largest fragment of a message in one record (RFC 8446, section 5.1).
const LARGEST_FRAGMENT: usize = 1 << 14;

/// Records in which a message may be cut. Real clients use a few; each look at the bytes goes through all of them.
const MOST_RECORDS: usize = 64;

const RECORD_IS_HANDSHAKE: u8 = 22;
/// The other types of records: change cipher spec, alert, application data and heartbeat.
const OTHER_RECORDS: [u8; 4] = [20, 21, 23, 24];
const MESSAGE_IS_CLIENT_HELLO: u8 = 1;
/// The versions 3.1 to 3.4 of the protocol are TLS 1.0 to 1.3.
const MAJOR_VERSION: u8 = 3;

const SERVER_NAME: u16 = 0;
const ALPN: u16 = 16;
/// Encrypted ClientHello (RFC 9849).
const ENCRYPTED_CLIENT_HELLO: u16 = 0xfe0d;

/// Longest host name, without a dot at its end (RFC 1035, section 2.3.4).
const LONGEST_NAME: usize = 253;
const LONGEST_LABEL: usize = 63;

/// What the first bytes of a connection are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parsed {
    /// A whole ClientHello.
    Hello(Hello),
    /// Not TLS: the first two bytes say so. The message of an SSL 2 client counts as that too.
    Plain,
    /// More bytes are needed. No bytes at all are incomplete too.
    Incomplete,
    /// TLS, but not a ClientHello that a server would accept.
    Invalid(Fault),
    /// The message would be longer than the caller allows.
    TooLarge,
}

/// What is wrong with a ClientHello.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// A record is not a handshake record, or its version or length is wrong.
    Record,
    /// The first message is not a ClientHello.
    Message,
    /// The length of a field does not fit into what contains it, or is not allowed.
    Field,
    /// An extension is there twice.
    Repeated,
    /// The server name is not a host name, or there are two.
    ServerName,
}

/// What a ClientHello asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The server's host name (SNI): lower case, without a dot at its end. An IP address is not a host name (RFC 6066,
    /// section 3), so it counts as no name.
    pub server_name: Option<Box<str>>,
    /// The application protocols (ALPN) that the client offers, each after a byte with its length.
    alpn: Box<[u8]>,
    /// Whether the client offers more protocols than these.
    pub offers_more: bool,
    /// Whether the client sends an encrypted ClientHello. Many browsers send random bytes in its place, which look the same.
    pub has_ech: bool,
    /// Length of the message in bytes, with the headers of its records.
    pub length: usize,
}

impl Hello {
    /// A message with this server name, in the form of [`host_name`], and with these protocols, of 1 to 255 bytes each.
    pub fn new(server_name: Option<Box<str>>, protocols: &[String]) -> Self {
        let length = |name: &str| u8::try_from(name.len()).unwrap_or_default();
        let alpn = protocols.iter().flat_map(|name| [&[length(name)], name.as_bytes()].concat());
        Self { server_name, alpn: alpn.collect(), offers_more: false, has_ech: false, length: 0 }
    }

    /// Keeps only the first protocols, of at most this many bytes. A client can offer thousands.
    pub fn shorten(&mut self, most: usize) {
        let mut kept = 0;
        for length in self.protocols().map(|name| 1 + name.len()) {
            if kept + length > most {
                break;
            }
            kept += length;
        }
        if kept < self.alpn.len() {
            (self.alpn, self.offers_more) = (self.alpn[..kept].into(), true);
        }
    }

    /// The application protocols that the client offers, in its order of preference.
    pub fn protocols(&self) -> impl Iterator<Item = &[u8]> {
        let mut fields = Fields(&self.alpn);
        // The parser has checked the lengths.
        std::iter::from_fn(move || fields.short())
    }
}

/// Reads the beginning of a connection. The message, with the headers of its records, has at most `most` bytes.
///
/// The result never depends on how the bytes were cut: once it is not [`Parsed::Incomplete`], more bytes do not change it.
pub fn parse(bytes: &[u8], most: usize) -> Parsed {
    match *bytes {
        // Some servers accept other records before the message, so such a client may still speak TLS. Go takes an alert with
        // any version below 16.0.
        [first, version, ..] if OTHER_RECORDS.contains(&first) && version < 0x10 => {
            return Parsed::Invalid(Fault::Record);
        }
        [first] if OTHER_RECORDS.contains(&first) => return Parsed::Incomplete,
        [first, ..] if first != RECORD_IS_HANDSHAKE => return Parsed::Plain,
        _ => {}
    }
    let mut rest = bytes;
    // Borrowed unless the message is cut over several records.
    let mut message = Cow::Borrowed(&[][..]);
    let mut records = 0;
    loop {
        let length = match record_length(rest) {
            Ok(Some(length)) => length,
            Ok(None) => return Parsed::Incomplete,
            Err(fault) => return Parsed::Invalid(fault),
        };
        records += 1;
        if records > MOST_RECORDS {
            return Parsed::Invalid(Fault::Record);
        }
        let fragment = &rest[RECORD_HEADER..];
        let (fragment, after) = fragment.split_at(length.min(fragment.len()));
        if message.is_empty() {
            message = Cow::Borrowed(fragment);
        } else {
            message.to_mut().extend_from_slice(fragment);
        }
        if message.first().is_some_and(|&first| first != MESSAGE_IS_CLIENT_HELLO) {
            return Parsed::Invalid(Fault::Message);
        }
        if let &[_, high, middle, low, ..] = &*message {
            let end = MESSAGE_HEADER + u32::from_be_bytes([0, high, middle, low]) as usize;
            let length = end + records * RECORD_HEADER;
            if length > most {
                return Parsed::TooLarge;
            }
            if let Some(body) = message.get(MESSAGE_HEADER..end) {
                return match hello(body, length) {
                    Ok(hello) => Parsed::Hello(hello),
                    Err(fault) => Parsed::Invalid(fault),
                };
            }
        }
        rest = after;
    }
}

/// The length of the fragment in the record at the beginning of these bytes; `None`: more bytes are needed.
fn record_length(bytes: &[u8]) -> Result<Option<usize>, Fault> {
    let is = |position: usize, wanted: u8| bytes.get(position).is_none_or(|&byte| byte == wanted);
    if !is(0, RECORD_IS_HANDSHAKE) || !is(1, MAJOR_VERSION) {
        return Err(Fault::Record);
    }
    let &[_, _, _, high, low, ..] = bytes else { return Ok(None) };
    let length = usize::from(u16::from_be_bytes([high, low]));
    if length == 0 || length > LARGEST_FRAGMENT {
        return Err(Fault::Record);
    }
    Ok(Some(length))
}

/// Reads the body of the message.
fn hello(body: &[u8], length: usize) -> Result<Hello, Fault> {
    let mut hello = Hello { server_name: None, alpn: Box::default(), offers_more: false, has_ech: false, length };
    let mut body = Fields(body);
    let mut extensions = Fields(body.before_extensions().ok_or(Fault::Field)?);
    let mut seen = [false; 3];
    while !extensions.0.is_empty() {
        let (kind, value) = extensions.extension().ok_or(Fault::Field)?;
        let nth = match kind {
            SERVER_NAME => {
                hello.server_name = server_name(value)?;
                0
            }
            ALPN => {
                hello.alpn = protocols(value).ok_or(Fault::Field)?;
                1
            }
            ENCRYPTED_CLIENT_HELLO => {
                hello.has_ech = true;
                2
            }
            _ => continue,
        };
        if std::mem::replace(&mut seen[nth], true) {
            return Err(Fault::Repeated);
        }
    }
    Ok(hello)
}

fn server_name(value: &[u8]) -> Result<Option<Box<str>>, Fault> {
    const HOST_NAME: u8 = 0;
    let mut outer = Fields(value);
    let mut list = Fields(outer.long().filter(|list| !list.is_empty()).ok_or(Fault::Field)?);
    let mut found = None;
    while !list.0.is_empty() {
        let kind = list.take(1).ok_or(Fault::Field)?[0];
        let name = list.long().ok_or(Fault::Field)?;
        if kind == HOST_NAME && found.replace(name).is_some() {
            return Err(Fault::ServerName);
        }
    }
    if !outer.0.is_empty() {
        return Err(Fault::Field);
    }
    let Some(name) = found else { return Ok(None) };
    let name = str::from_utf8(name).map_err(|_| Fault::ServerName)?;
    if name.strip_suffix('.').unwrap_or(name).parse::<IpAddr>().is_ok() {
        return Ok(None);
    }
    host_name(name).map(Some).ok_or(Fault::ServerName)
}

/// A host name in the form in which Ringway compares names: lower case, without a dot at its end. `None` if it is not a
/// host name. Names with other than ASCII letters have to be in their `xn--` form.
pub fn host_name(name: &str) -> Option<Box<str>> {
    let name = name.strip_suffix('.').unwrap_or(name);
    let is_label = |label: &str| {
        let is_letter = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        (1..=LONGEST_LABEL).contains(&label.len()) && label.bytes().all(is_letter)
    };
    let is_name = name.len() <= LONGEST_NAME && name.split('.').all(is_label) && name.parse::<IpAddr>().is_err();
    is_name.then(|| name.to_ascii_lowercase().into())
}

/// The list of protocols, if each has a name.
fn protocols(value: &[u8]) -> Option<Box<[u8]>> {
    let mut outer = Fields(value);
    let list = outer.long().filter(|list| !list.is_empty() && outer.0.is_empty())?;
    let mut fields = Fields(list);
    while !fields.0.is_empty() {
        fields.short().filter(|name| !name.is_empty())?;
    }
    Some(list.into())
}

/// Takes fields from the beginning of a piece of the message. Each method returns `None` if the piece is too short.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    /// A field after one byte with its length.
    fn short(&mut self) -> Option<&'a [u8]> {
        let length = self.take(1)?[0];
        self.take(length.into())
    }

    fn number(&mut self) -> Option<u16> {
        self.take(2).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    /// A field after two bytes with its length.
    fn long(&mut self) -> Option<&'a [u8]> {
        let length = self.number()?;
        self.take(length.into())
    }

    fn extension(&mut self) -> Option<(u16, &'a [u8])> {
        Some((self.number()?, self.long()?))
    }

    /// The extensions of a ClientHello. They end the message; TLS 1.2 and older have messages without them.
    fn before_extensions(&mut self) -> Option<&'a [u8]> {
        let version = self.take(2)?;
        let _random = self.take(32)?;
        let session_id = self.short()?;
        let cipher_suites = self.long()?;
        let compression_methods = self.short()?;
        let is_valid = version[0] == MAJOR_VERSION
            && session_id.len() <= 32
            && !cipher_suites.is_empty()
            && cipher_suites.len().is_multiple_of(2)
            && !compression_methods.is_empty();
        let extensions = if self.0.is_empty() { &[] } else { self.long()? };
        (is_valid && self.0.is_empty()).then_some(extensions)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Record => "a TLS record is wrong, or there are too many",
            Self::Message => "the first TLS message is not a ClientHello",
            Self::Field => "a field of the ClientHello is wrong",
            Self::Repeated => "the ClientHello has an extension twice",
            Self::ServerName => "the ClientHello has a server name that is not a host name, or two names",
        })
    }
}

#[cfg(test)]
mod tests;
