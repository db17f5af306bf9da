//! No bytes make the parser of ClientHellos panic, and its result never depends on how they are cut.
//!
//! The first two bytes choose the limit and the cut. `tests/hellos` has messages of real clients.

#![no_main]

use libfuzzer_sys::fuzz_target;
use ringway::client_hello::{Parsed, host_name, parse};

fuzz_target!(|input: &[u8]| {
    let [limit, cut, bytes @ ..] = input else { return };
    let most = if *limit == 0 { 1 << 16 } else { usize::from(*limit) * 16 };
    let whole = parse(bytes, most);
    let cut = usize::from(*cut) * bytes.len() / 256;
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
