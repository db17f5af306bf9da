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

/// A header with some fields. The checksum is the last one.
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
        assert_eq!((ends_of(&write(version, None)), ends_of(&OwnHeader::Local(version).bytes(|| None))), (None, None));
    }
    let widest =
        ends("[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535", "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535");
    assert!(write(Version::V1, widest).len() <= LONGEST_LINE);
}

#[test]
fn fields_follow_the_addresses_and_the_checksum_is_the_last_one() {
    let ends = ends("10.0.0.1:1", "10.0.0.2:2");
    let sent = write_with(ends, &[(AUTHORITY, b"a.example"), (0xea, &[0, 0xff])], true);
    let Parsed::Header(header) = parse(&sent) else { panic!("{:?}", parse(&sent)) };
    assert_eq!((header.ends, header.length), (ends, sent.len()));
    let list: Vec<_> = fields(&sent[header.fields..]).collect();
    assert_eq!(list[..2], [(AUTHORITY, &b"a.example"[..]), (0xea, &[0, 0xff])]);
    assert_eq!((list.len(), list[2].0, list[2].1.len()), (3, CRC32C, 4));
    let Parsed::Header(plain) = parse(&write(Version::V1, ends)) else { panic!("version 1") };
    assert_eq!(plain.fields, plain.length);
    // The beginning of a field that does not fit.
    assert_eq!(fields(&[1, 0, 1, 7, 2, 0, 9, 9]).collect::<Vec<_>>(), [(1, &[7][..])]);
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
