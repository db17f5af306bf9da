//! The signal with which an image wants to be stopped.

use std::str::FromStr as _;

use nix::sys::signal::Signal;

/// The first and the last real-time signal, as the engine counts them.
const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

/// The number of a signal that an image names: `SIGQUIT`, `QUIT`, `3` or `SIGRTMIN+3`.
pub(super) fn number(name: &str) -> Option<i32> {
    let name = name.trim().to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    if let Ok(number) = name.parse() {
        return Some(number);
    }
    // As in moby, `SIGRTMAX-3` counts down from the last one.
    let of_real_time = |begin: &str, sign: char, count: fn(i32, i32) -> Option<i32>, first: i32| {
        let distance = name.strip_prefix(begin)?;
        let distance = if distance.is_empty() { 0 } else { distance.strip_prefix(sign)?.parse().ok()? };
        count(first, distance)
    };
    of_real_time("RTMIN", '+', i32::checked_add, RTMIN)
        .or_else(|| of_real_time("RTMAX", '-', i32::checked_sub, RTMAX))
        .or_else(|| Signal::from_str(&format!("SIG{name}")).ok().map(|signal| signal as i32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_has_a_name_or_a_number() {
        let names = [
            "SIGQUIT",
            "quit",
            "3",
            "SIGTERM",
            "SIGWINCH",
            "SIGRTMIN+3",
            "SIGRTMIN",
            "RTMAX-2",
            "SIGRTMIN+2147483647",
            "SIGNOTHING",
            "",
        ];
        let numbers = [Some(3), Some(3), Some(3), Some(15), Some(28), Some(37), Some(34), Some(62), None, None, None];
        assert_eq!(names.map(number), numbers);
    }
}
