//! The signal with which an image wants to be stopped.

use std::str::FromStr as _;

use nix::sys::signal::Signal;

/// The first real-time signal, as the engine counts them.
const RTMIN: i32 = 34;

/// The number of a signal that an image names: `SIGQUIT`, `QUIT`, `3` or `SIGRTMIN+3`.
pub(super) fn number(name: &str) -> Option<i32> {
    let name = name.trim().to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    if let Ok(number) = name.parse() {
        return Some(number);
    }
    if let Some(more) = name.strip_prefix("RTMIN") {
        let more = more.strip_prefix('+').map_or(Some(0), |more| more.parse().ok());
        return more.map(|more: i32| RTMIN + more);
    }
    Signal::from_str(&format!("SIG{name}")).ok().map(|signal| signal as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_has_a_name_or_a_number() {
        let names = ["SIGQUIT", "quit", "3", "SIGTERM", "SIGWINCH", "SIGRTMIN+3", "SIGRTMIN", "SIGNOTHING", ""];
        let numbers = [Some(3), Some(3), Some(3), Some(15), Some(28), Some(37), Some(34), None, None];
        assert_eq!(names.map(number), numbers);
    }
}
