//! Notifications to the service manager, and its watchdog.

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr as UnixAddress, UnixDatagram};
use std::time::Duration;

use tokio::time::MissedTickBehavior;

/// Notifies the service manager, if there is one (`sd_notify(3)`): systemd, or Ringway's own process 1 in a container.
/// The address of the latter is an abstract one.
pub(super) fn notify(message: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let send = || {
        let socket = UnixDatagram::unbound()?;
        match path.as_bytes().strip_prefix(b"@") {
            Some(name) => socket.connect_addr(&UnixAddress::from_abstract_name(name)?)?,
            None => socket.connect(&path)?,
        }
        socket.send(message.as_bytes())
    };
    if let Err(error) = send() {
        tracing::warn!(%error, ?path, "cannot notify the service manager");
    }
}

/// How long the service manager waits for a sign of life before it restarts Ringway (`sd_watchdog_enabled(3)`); `None`: it does
/// not watch this process. It watches a successor in place of its predecessor, although the variables have the id of the latter.
pub(super) fn watchdog(is_successor: bool) -> Option<Duration> {
    let variable = |name| std::env::var(name).ok();
    watchdog_of(variable("WATCHDOG_USEC").as_deref(), variable("WATCHDOG_PID").as_deref(), is_successor)
}

fn watchdog_of(micros: Option<&str>, pid: Option<&str>, is_successor: bool) -> Option<Duration> {
    let is_own = is_successor || pid.is_none_or(|pid| pid.parse() == Ok(std::process::id()));
    let micros = micros?.parse().ok().filter(|&micros| micros > 0 && is_own)?;
    Some(Duration::from_micros(micros))
}

/// Calls `tell` twice in each `interval`, as long as every part of Ringway answers `pulse`.
pub(super) async fn keep_alive(interval: Duration, pulse: impl AsyncFn(), tell: impl Fn()) {
    let mut ticks = tokio::time::interval(interval / 2);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        pulse().await;
        tell();
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn the_watchdog_concerns_the_process_that_the_manager_names_or_its_successor() {
        let own = std::process::id().to_string();
        let second = Some(Duration::from_secs(1));
        assert_eq!(watchdog_of(Some("1000000"), Some(&own), false), second);
        assert_eq!(watchdog_of(Some("1000000"), None, false), second);
        assert_eq!(watchdog_of(Some("1000000"), Some("1"), true), second);
        for (micros, pid) in [(None, None), (Some("0"), None), (Some("x"), None), (Some("1000000"), Some("1"))] {
            assert_eq!(watchdog_of(micros, pid, false), None, "{micros:?} {pid:?}");
        }
    }

    #[tokio::test]
    async fn there_is_no_sign_of_life_while_a_part_hangs() {
        let (told, hangs) = (Cell::new(0), Cell::new(false));
        let pulse = async || {
            if hangs.get() {
                std::future::pending::<()>().await;
            }
        };
        // It hangs after the third sign, and would make the fourth at once.
        let tell = || {
            told.set(told.get() + 1);
            hangs.set(told.get() == 3);
        };
        let interval = Duration::from_millis(2);
        let _ = tokio::time::timeout(Duration::from_millis(200), keep_alive(interval, pulse, tell)).await;
        assert_eq!(told.get(), 3);
    }
}
