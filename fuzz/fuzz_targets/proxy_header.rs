//! No bytes make the parser of PROXY headers panic. Its result never depends on how the bytes are cut. Ringway can write each
//! parsed header and read it again. `fuzz/seeds/proxy_header` has headers to begin with.

#![no_main]

use libfuzzer_sys::fuzz_target;
use ringway::proxy_header::{CRC32C, LONGEST, Parsed, Version, fields, parse, write, write_with};

fuzz_target!(|bytes: &[u8]| {
    let whole = parse(bytes);
    // The bytes themselves choose the cut.
    let cut = bytes.iter().map(|&byte| usize::from(byte)).sum::<usize>() % (bytes.len() + 1);
    let part = parse(&bytes[..cut]);
    assert!(part == Parsed::Incomplete || part == whole, "{part:?} after {cut} bytes, then {whole:?}");
    let Parsed::Header(header) = whole else { return };
    assert!(header.length <= bytes.len() && header.length <= LONGEST && header.fields <= header.length);
    // A checksum belongs to one header only, and the new one needs some room.
    let list: Vec<_> = fields(&bytes[header.fields..header.length]).filter(|(kind, _)| *kind != CRC32C).collect();
    if header.length > LONGEST / 2 {
        return;
    }
    for sent in [write(Version::V1, header.ends), write_with(header.ends, &list, true)] {
        let Parsed::Header(again) = parse(&sent) else { panic!("{sent:?}") };
        // A header of both families has mapped addresses.
        assert_eq!(again.ends, header.ends);
        assert_eq!(again.length, sent.len());
    }
});
