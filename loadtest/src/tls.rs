//! The first message of a TLS client, without the rest of TLS: enough for a balancer that routes by it.

/// A ClientHello of TLS 1.2 in one record, for a server name (none if it is empty) and application protocols.
///
/// # Panics
/// If a name or the message is longer than its length field allows.
pub fn client_hello(name: &str, protocols: &[&str]) -> Vec<u8> {
    let mut extensions = Vec::new();
    if !name.is_empty() {
        let entry = [&[0][..], &after_length(name.as_bytes())].concat();
        extensions.extend(extension(0, &after_length(&entry)));
    }
    if !protocols.is_empty() {
        let length = |name: &str| u8::try_from(name.len()).expect("the name of a protocol has at most 255 bytes");
        let list: Vec<u8> = protocols.iter().flat_map(|name| [&[length(name)][..], name.as_bytes()].concat()).collect();
        extensions.extend(extension(16, &after_length(&list)));
    }
    let (version, random, session_id) = ([3, 3], [7; 32], [0]);
    let (cipher_suites, compression_methods) = (after_length(&[0x13, 1, 0xc0, 0x2f]), [1, 0]);
    let body =
        [&version[..], &random, &session_id, &cipher_suites, &compression_methods, &after_length(&extensions)].concat();
    // The length of a message has three bytes.
    let message = [&[1, 0][..], &after_length(&body)].concat();
    record(&message)
}

/// A TLS record with a piece of a handshake.
///
/// # Panics
/// If the piece has more than 65,535 bytes.
pub fn record(piece: &[u8]) -> Vec<u8> {
    [&[22, 3, 1][..], &after_length(piece)].concat()
}

fn extension(kind: u16, value: &[u8]) -> Vec<u8> {
    [&kind.to_be_bytes()[..], &after_length(value)].concat()
}

/// The bytes after two bytes with their length.
fn after_length(bytes: &[u8]) -> Vec<u8> {
    let length = u16::try_from(bytes.len()).expect("a part has at most 65,535 bytes");
    [&length.to_be_bytes()[..], bytes].concat()
}
