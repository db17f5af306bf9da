//! No bytes make the parser of ClientHellos panic, and its result never depends on how they are cut.
//!
//! `tests/hellos` has messages of real clients to begin with.

#![no_main]

use libfuzzer_sys::fuzz_target;
use ringway::client_hello::{Parsed, host_name, parse};

fuzz_target!(|bytes: &[u8]| {
    // The bytes themselves choose the cut and the limit.
    let sum: usize = bytes.iter().map(|&byte| usize::from(byte)).sum();
    let cut = sum % (bytes.len() + 1);
    let most = if sum % 3 == 0 { cut + 300 } else { 1 << 16 };
    let whole = parse(bytes, most);
    let part = parse(&bytes[..cut], most);
    assert!(part == Parsed::Incomplete || part == whole, "{part:?} after {cut} bytes, then {whole:?}");
    if let Parsed::Hello(mut hello) = whole {
        assert!(hello.length <= most && hello.length <= bytes.len());
        if let Some(name) = &hello.server_name {
            assert_eq!(host_name(name).as_ref(), Some(name), "a name changes if it is read again");
        }
        let before = hello.protocols().count();
        hello.shorten(64);
        assert!(hello.protocols().count() <= before && hello.protocols().all(|name| !name.is_empty()));
    }
});
