use proptest::prelude::*;

use super::*;

const MOST: usize = 1 << 16;

fn after_length(size: usize, bytes: &[u8]) -> Vec<u8> {
    let length = bytes.len().to_be_bytes();
    [&length[length.len() - size..], bytes].concat()
}

fn extension(kind: u16, value: &[u8]) -> Vec<u8> {
    [&kind.to_be_bytes()[..], &after_length(2, value)].concat()
}

fn name_extension(names: &[&[u8]]) -> Vec<u8> {
    let list: Vec<u8> = names.iter().flat_map(|name| [vec![0], after_length(2, name)].concat()).collect();
    extension(SERVER_NAME, &after_length(2, &list))
}

fn alpn_extension(protocols: &[&[u8]]) -> Vec<u8> {
    let list: Vec<u8> = protocols.iter().flat_map(|name| after_length(1, name)).collect();
    extension(ALPN, &after_length(2, &list))
}

/// The message without a record; `None`: no extensions.
fn message(extensions: Option<&[Vec<u8>]>) -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.extend(after_length(1, &[9; 32]));
    body.extend(after_length(2, &[0x13, 1, 0x13, 2]));
    body.extend(after_length(1, &[0]));
    body.extend(extensions.map_or(Vec::new(), |list| after_length(2, &list.concat())));
    [vec![MESSAGE_IS_CLIENT_HELLO], after_length(3, &body)].concat()
}

fn record(fragment: &[u8]) -> Vec<u8> {
    [&[RECORD_IS_HANDSHAKE, 3, 1][..], &after_length(2, fragment)].concat()
}

fn whole(extensions: &[Vec<u8>]) -> Vec<u8> {
    record(&message(Some(extensions)))
}

fn parsed(extensions: &[Vec<u8>]) -> Hello {
    match parse(&whole(extensions), MOST) {
        Parsed::Hello(hello) => hello,
        other => panic!("{other:?}"),
    }
}

fn fault(extensions: &[Vec<u8>]) -> Fault {
    match parse(&whole(extensions), MOST) {
        Parsed::Invalid(fault) => fault,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_name_and_the_protocols_are_found() {
    let ech = extension(ENCRYPTED_CLIENT_HELLO, &[0; 200]);
    // GREASE (RFC 8701): a client sends unknown values to keep servers tolerant.
    let grease = extension(0x3a3a, &[]);
    let hello = parsed(&[grease, alpn_extension(&[b"h2", b"http/1.1"]), ech, name_extension(&[b"WWW.Example.com."])]);
    assert_eq!(hello.server_name.as_deref(), Some("www.example.com"));
    assert_eq!(hello.protocols().collect::<Vec<_>>(), [&b"h2"[..], b"http/1.1"]);
    assert!(hello.has_ech);
    let bare = parsed(&[]);
    assert_eq!((bare.server_name.clone(), bare.protocols().count(), bare.has_ech), (None, 0, false));
    let old = record(&message(None));
    let Parsed::Hello(hello) = parse(&old, MOST) else { panic!("TLS 1.2 without extensions") };
    assert_eq!((hello.server_name, hello.length), (None, old.len()));
}

#[test]
fn only_host_names_are_names() {
    for (name, wanted) in [
        (&b"a"[..], Some("a")),
        (b"xn--bcher-kva.example", Some("xn--bcher-kva.example")),
        (b"_sip.example", Some("_sip.example")),
        (b"192.0.2.1", None),
        (b"2001:db8::1", None),
    ] {
        assert_eq!(parsed(&[name_extension(&[name])]).server_name.as_deref(), wanted);
    }
    let long = [b'a'; 64];
    let longest = [&[b'a'; 63][..], &[b'b'; 63], &[b'c'; 63], &[b'd'; 62]].join(&b'.');
    for name in
        [&b""[..], b".", b"a..b", b".a", b"a b", b"a\nb", b"a\0", b"b\xc3\xbccher.example", b"\xff", &long, &longest]
    {
        assert_eq!(fault(&[name_extension(&[name])]), Fault::ServerName, "{name:?}");
    }
    assert_eq!(fault(&[name_extension(&[b"a", b"b"])]), Fault::ServerName);
    assert_eq!(parsed(&[name_extension(&[&longest[..253]])]).server_name.unwrap().len(), 253);
}

#[test]
fn wrong_fields_are_found() {
    for (extensions, wanted) in [
        (vec![extension(SERVER_NAME, &[])], Fault::Field),
        (vec![extension(SERVER_NAME, &[0, 0])], Fault::Field),
        (vec![extension(SERVER_NAME, &[0, 4, 0, 0, 1, b'a', 0])], Fault::Field),
        (vec![extension(SERVER_NAME, &[0, 9, 0, 0, 1, b'a'])], Fault::Field),
        (vec![extension(ALPN, &[])], Fault::Field),
        (vec![extension(ALPN, &[0, 1, 0])], Fault::Field),
        (vec![extension(ALPN, &[0, 2, 9, b'h'])], Fault::Field),
        (vec![vec![0, 1, 2]], Fault::Field),
        (vec![name_extension(&[b"a"]), name_extension(&[b"a"])], Fault::Repeated),
        (vec![alpn_extension(&[b"h2"]), alpn_extension(&[b"h2"])], Fault::Repeated),
    ] {
        assert_eq!(fault(&extensions), wanted, "{extensions:?}");
    }
    let mut trailing = message(Some(&[]));
    trailing[3] += 1;
    trailing.push(0);
    assert_eq!(parse(&record(&trailing), MOST), Parsed::Invalid(Fault::Field));
    // Bytes of the body at which a length or version is: each other value has to be found, or has to make it incomplete.
    for (position, value) in [(4, 2), (38, 33), (72, 0), (72, 3)] {
        let mut wrong = message(Some(&[]));
        wrong[position] = value;
        assert_eq!(parse(&record(&wrong), MOST), Parsed::Invalid(Fault::Field), "byte {position}");
    }
}

#[test]
fn other_protocols_and_other_messages_differ() {
    for plain in [&b"GET / HTTP/1.1\r\n"[..], b"SSH-2.0-x\r\n", &[0x80, 0x2e, 1, 3, 1], b"*1\r\n$4\r\nPING\r\n"] {
        assert_eq!(parse(plain, MOST), Parsed::Plain);
    }
    assert_eq!(parse(&[], MOST), Parsed::Incomplete);
    assert_eq!(parse(&[22, 2], MOST), Parsed::Invalid(Fault::Record));
    assert_eq!(parse(&[22, 3, 1, 0, 0], MOST), Parsed::Invalid(Fault::Record));
    assert_eq!(parse(&[22, 3, 1, 0x40, 1], MOST), Parsed::Invalid(Fault::Record));
    assert_eq!(parse(&[22, 3, 1, 0, 5, 2], MOST), Parsed::Invalid(Fault::Message));
    // Some servers accept these before a ClientHello.
    for record in [&[21, 3, 1, 0, 2, 1, 0x70][..], &[21, 0], &[21, 15], &[20, 3, 3, 0, 1, 1], &[23, 3], &[24, 3]] {
        assert_eq!(parse(record, MOST), Parsed::Invalid(Fault::Record));
        assert_eq!(parse(&record[..1], MOST), Parsed::Incomplete);
    }
    assert_eq!(parse(&[21, 16], MOST), Parsed::Plain);
    // An alert in the middle of the message.
    let begun = [&record(&message(None)[..10])[..], &[21, 3, 1, 0, 2, 1, 0]].concat();
    assert_eq!(parse(&begun, MOST), Parsed::Invalid(Fault::Record));
}

#[test]
fn a_message_that_is_too_large_is_found_by_its_length() {
    let bytes = whole(&[extension(21, &[0; 15_000])]);
    let Parsed::Hello(hello) = parse(&bytes, bytes.len()) else { panic!("it fits") };
    assert_eq!(hello.length, bytes.len());
    assert_eq!(parse(&bytes[..9], bytes.len() - 1), Parsed::TooLarge);
    assert_eq!(parse(&bytes, bytes.len() - 1), Parsed::TooLarge);
    assert_eq!(parse(&[22, 3, 1, 0, 4, 1, 0xff, 0xff, 0xff], MOST), Parsed::TooLarge);
}

#[test]
fn a_message_has_at_most_64_records() {
    let message = message(Some(&[name_extension(&[b"a.example"])]));
    let cut = |records: usize| -> Vec<u8> {
        let (begin, rest) = message.split_at(records - 1);
        begin.iter().flat_map(|&byte| record(&[byte])).chain(record(rest)).collect()
    };
    assert!(matches!(parse(&cut(64), MOST), Parsed::Hello(_)));
    assert_eq!(parse(&cut(65), MOST), Parsed::Invalid(Fault::Record));
}

#[test]
fn a_long_list_of_protocols_is_shortened() {
    let mut hello = parsed(&[alpn_extension(&[b"h2", b"http/1.1", b"x"])]);
    hello.shorten(14);
    assert_eq!((hello.protocols().count(), hello.offers_more), (3, false));
    hello.shorten(13);
    assert_eq!((hello.protocols().collect::<Vec<_>>(), hello.offers_more), (vec![&b"h2"[..], b"http/1.1"], true));
    hello.shorten(0);
    assert_eq!(hello.protocols().count(), 0);
}

/// A message of more than one record, of random parts: some right, some wrong.
fn hellos() -> impl Strategy<Value = Vec<u8>> {
    let names: Vec<&[u8]> = vec![b"a.example", b"A.EXAMPLE.", b"192.0.2.1", b"", b"a b", b"\xff"];
    let name = proptest::collection::vec(proptest::sample::select(names), 0..3);
    let protocols = proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..5), 0..3);
    let others = proptest::collection::vec((any::<u16>(), 0..700_usize), 0..4);
    (name, protocols, others, any::<bool>()).prop_map(|(names, protocols, others, has_extensions)| {
        let protocols: Vec<&[u8]> = protocols.iter().map(Vec::as_slice).collect();
        let mut extensions = vec![name_extension(&names), alpn_extension(&protocols)];
        extensions.extend(others.into_iter().map(|(kind, length)| extension(kind, &vec![5; length])));
        message(has_extensions.then_some(&extensions[..]))
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn the_result_never_depends_on_how_the_bytes_are_cut(
        message in hellos(),
        cuts in proptest::collection::vec(1..200_usize, 0..70),
        damage in proptest::option::of((any::<prop::sample::Index>(), any::<u8>())),
        most in prop_oneof![Just(MOST), 40..2000_usize],
    ) {
        let (mut bytes, mut records) = (Vec::new(), 0);
        let mut rest = &message[..];
        for cut in cuts.into_iter().chain([usize::MAX]) {
            let (fragment, after) = rest.split_at(cut.min(rest.len()));
            if !fragment.is_empty() {
                bytes.extend(record(fragment));
                records += 1;
            }
            rest = after;
        }
        let is_whole = damage.is_none();
        if let Some((position, value)) = damage {
            let position = position.index(bytes.len());
            bytes[position] = value;
        }
        let last = parse(&bytes, most);
        let decided = (0..=bytes.len()).map(|end| parse(&bytes[..end], most)).find(|parsed| *parsed != Parsed::Incomplete);
        prop_assert_eq!(decided.as_ref().unwrap_or(&Parsed::Incomplete), &last, "more bytes changed the result");
        if is_whole && records <= MOST_RECORDS && most == MOST && message.len() <= LARGEST_FRAGMENT {
            let in_one = parse(&record(&message), most);
            match (last, in_one) {
                (Parsed::Hello(cut), Parsed::Hello(one)) => {
                    prop_assert_eq!(Hello { length: 0, ..cut }, Hello { length: 0, ..one });
                }
                (cut, one) => prop_assert_eq!(cut, one),
            }
        }
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), most in 0..400_usize) {
        let begun = [&[22, 3, 1, 0, 200, 1][..], &bytes].concat();
        let (_, _) = (parse(&bytes, most), parse(&begun, most));
    }
}
