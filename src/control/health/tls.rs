//! The TLS check: sends a ClientHello, and passes if the server answers with a ServerHello (RFC 8446, section 4.1). It does no
//! cryptography: it neither completes the handshake nor looks at a certificate.

use std::hash::{BuildHasher as _, RandomState};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::check::{Reason, Tls, part, start_of};
use crate::stream::Stream;

const HANDSHAKE: u8 = 22;
const ALERT: u8 = 21;
const CLIENT_HELLO: u8 = 1;
const SERVER_HELLO: u8 = 2;
/// The version 3.3 of the protocol is TLS 1.2. TLS 1.3 has it in the same places.
const LEGACY_VERSION: [u8; 2] = [3, 3];

/// Most bytes of warnings before the answer.
const MOST_WARNINGS: usize = 1024;

/// Cipher suites of TLS 1.3 and 1.2 that servers have.
const SUITES: [u16; 15] = [
    0x1301, 0x1302, 0x1303, 0xc02b, 0xc02f, 0xc02c, 0xc030, 0xcca9, 0xcca8, 0xc013, 0xc014, 0x009c, 0x009d, 0x002f,
    0x0035,
];

/// Groups for the key exchange: x25519, secp256r1, secp384r1 and secp521r1. A server without the first asks for another one in a
/// HelloRetryRequest, which is a ServerHello too.
const GROUPS: [u16; 4] = [0x001d, 0x0017, 0x0018, 0x0019];

/// Algorithms for signatures: ECDSA, RSA-PSS, Ed25519 and RSA.
const SIGNATURES: [u16; 10] = [0x0403, 0x0503, 0x0603, 0x0804, 0x0805, 0x0806, 0x0807, 0x0401, 0x0501, 0x0601];

/// The alerts of servers that refuse a ClientHello (RFC 8446, section 6).
const ALERTS: [(u8, &str); 9] = [
    (0, "close_notify"),
    (10, "unexpected_message"),
    (40, "handshake_failure"),
    (47, "illegal_parameter"),
    (50, "decode_error"),
    (70, "protocol_version"),
    (80, "internal_error"),
    (112, "unrecognized_name"),
    (120, "no_application_protocol"),
];

/// Speaks to the server. The error is a short reason.
pub(super) async fn speak(tls: &Tls, mut stream: Stream) -> Result<(), Reason> {
    let written = stream.write_all(&client_hello(tls, random)).await;
    let mut answer = Vec::new();
    let result = loop {
        let read = stream.read_buf(&mut answer).await;
        if let Some(result) = judge(&answer) {
            break result;
        }
        match read {
            Ok(0) if answer.is_empty() => break Err("no TLS answer: the connection was closed".into()),
            Ok(0) => break Err(no_answer(&answer)),
            Ok(_) => {}
            // A server may answer and close without reading everything. Then the answer has been judged.
            Err(error) => break Err(format!("no TLS answer: {}", written.as_ref().err().unwrap_or(&error)).into()),
        }
    };
    tokio::spawn(part(stream, Vec::new()));
    result
}

/// The result by the bytes received so far; `None`: more bytes must decide.
fn judge(answer: &[u8]) -> Option<Result<(), Reason>> {
    let mut rest = answer;
    // Warnings can come first, like that about an unknown name.
    while let [ALERT, 3, _, 0, 2, 1, _, after @ ..] = rest {
        rest = after;
    }
    match *rest {
        [HANDSHAKE, 3, _, _, _, SERVER_HELLO, ..] => Some(Ok(())),
        [ALERT, 3, _, 0, 2, _, alert, ..] => Some(Err(refusal(alert))),
        _ if is_beginning(rest) && answer.len() < MOST_WARNINGS => None,
        _ => Some(Err(no_answer(answer))),
    }
}

/// Whether the bytes can become the answer of a TLS server.
fn is_beginning(bytes: &[u8]) -> bool {
    let decides_at = match bytes.first() {
        None => return true,
        Some(&HANDSHAKE) => 6,
        Some(&ALERT) => 7,
        Some(_) => 0,
    };
    bytes.len() < decides_at && bytes.get(1).is_none_or(|&version| version == 3)
}

fn refusal(alert: u8) -> Reason {
    let name = ALERTS.iter().find(|(code, _)| *code == alert).map(|(_, name)| *name);
    name.map_or_else(|| format!("TLS alert {alert}"), |name| format!("TLS alert {name}")).into()
}

fn no_answer(answer: &[u8]) -> Reason {
    format!("no TLS answer: {:?}", start_of(answer)).into()
}

/// A ClientHello (RFC 8446, section 4.1.2) for TLS 1.3 and 1.2 in one record. `random` gives 32 bytes that nobody can guess.
fn client_hello(tls: &Tls, random: impl Fn() -> [u8; 32]) -> Vec<u8> {
    let numbers = |numbers: &[u16]| numbers.iter().flat_map(|number| number.to_be_bytes()).collect::<Vec<u8>>();
    let mut extensions = Vec::new();
    let mut extension = |kind: u16, value: &[u8]| {
        extensions.extend_from_slice(&kind.to_be_bytes());
        extensions.extend_from_slice(&long(value));
    };
    if let Some(name) = &tls.sni {
        // A list with one entry of the type host name.
        extension(0, &long(&[&[0][..], &long(name.as_bytes())].concat()));
    }
    extension(10, &long(&numbers(&GROUPS)));
    // Points are not compressed.
    extension(11, &short(&[0]));
    extension(13, &long(&numbers(&SIGNATURES)));
    if !tls.alpn.is_empty() {
        extension(16, &long(&tls.alpn.iter().flat_map(|name| short(name.as_bytes())).collect::<Vec<u8>>()));
    }
    // The server must bind the session to the handshake (RFC 7627), and this is no renegotiation (RFC 5746).
    extension(23, &[]);
    extension(0xff01, &short(&[]));
    // TLS 1.3, else 1.2.
    extension(43, &short(&[3, 4, 3, 3]));
    extension(45, &short(&[1]));
    // Every 32 bytes are a public key of x25519 (RFC 7748, section 5). Nobody has its private key, and nobody needs it.
    extension(51, &long(&[&numbers(&GROUPS[..1])[..], &long(&random())].concat()));

    let mut hello = LEGACY_VERSION.to_vec();
    hello.extend_from_slice(&random());
    hello.extend_from_slice(&short(&random()));
    hello.extend_from_slice(&long(&numbers(&SUITES)));
    // No compression.
    hello.extend_from_slice(&short(&[0]));
    hello.extend_from_slice(&long(&extensions));
    let message = [&[CLIENT_HELLO, 0][..], &long(&hello)].concat();
    // Old servers refuse a first record of another version than 3.1.
    [&[HANDSHAKE, 3, 1][..], &long(&message)].concat()
}

/// The bytes with their length in one byte before them. Longer ones are cut; the config accepts none.
fn short(bytes: &[u8]) -> Vec<u8> {
    let length = u8::try_from(bytes.len()).unwrap_or(u8::MAX);
    [&[length][..], &bytes[..length.into()]].concat()
}

/// The bytes with their length in two bytes before them.
fn long(bytes: &[u8]) -> Vec<u8> {
    let length = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
    [&length.to_be_bytes()[..], &bytes[..length.into()]].concat()
}

/// Bytes that differ from check to check. They protect nothing.
fn random() -> [u8; 32] {
    let state = RandomState::new();
    let mut bytes = [0; 32];
    for (n, part) in bytes.chunks_mut(8).enumerate() {
        part.copy_from_slice(&state.hash_one(n).to_ne_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client_hello::{Parsed, parse};

    fn hello(sni: Option<&str>, alpn: &[&str]) -> Vec<u8> {
        let alpn = alpn.iter().map(|&name| name.to_owned()).collect();
        client_hello(&Tls { sni: sni.map(Into::into), alpn }, random)
    }

    #[test]
    fn a_client_hello_is_one_that_ringway_itself_can_read() {
        for (sni, alpn) in [(None, &[][..]), (Some("db.example.com"), &["h2", "http/1.1"])] {
            let Parsed::Hello(read) = parse(&hello(sni, alpn), 16 * 1024) else { panic!("{sni:?}") };
            assert_eq!(read.server_name.as_deref(), sni);
            assert!(read.protocols().eq(alpn.iter().map(|name| name.as_bytes())), "{alpn:?}");
        }
        assert_ne!(hello(None, &[]), hello(None, &[]), "two checks send the same key");
    }

    #[test]
    fn an_answer_passes_if_it_begins_with_a_server_hello() {
        let server_hello = [22, 3, 3, 0, 122, 2, 0, 0, 118];
        let warning = [21, 3, 3, 0, 2, 1, 112];
        let fatal = [21, 3, 1, 0, 2, 2, 40];
        assert_eq!(judge(&server_hello), Some(Ok(())));
        assert_eq!(judge(&[&warning[..], &server_hello].concat()), Some(Ok(())));
        assert_eq!(judge(&fatal), Some(Err("TLS alert handshake_failure".into())));
        assert_eq!(judge(&[21, 3, 3, 0, 2, 2, 99]), Some(Err("TLS alert 99".into())));
        for whole in [&server_hello[..], &warning, &fatal] {
            for length in 0..whole.len().min(6) {
                let judged = judge(&whole[..length]);
                assert!(judged.is_none(), "{:?}: {judged:?}", &whole[..length]);
            }
        }
        assert_eq!(judge(&warning), None, "the answer comes after a warning");
        assert!(matches!(judge(&warning.repeat(100_000)), Some(Err(_))), "a server that only warns does not answer");
        for other in [&b"SSH-2.0-x"[..], b"HTTP/1.1 400 Bad", b"+", &[22, 3, 3, 0, 9, 1, 0, 0]] {
            assert!(matches!(judge(other), Some(Err(reason)) if reason.starts_with("no TLS answer: ")), "{other:?}");
        }
    }
}
