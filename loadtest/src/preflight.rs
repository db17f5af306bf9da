//! Checks before a load starts. A load that passes them does not measure the limits of this machine.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustix::process::{Resource, getrlimit, setrlimit};

use crate::load::{Load, Pace, Work};

/// Descriptors for other purposes than connections.
const RESERVE: u64 = 64;

/// How long a port stays in use after its connection (`TIME_WAIT`).
const REST: Duration = Duration::from_secs(60);

/// The longest duration of a run.
const LONGEST: Duration = Duration::from_secs(7 * 24 * 3600);

/// Checks whether this machine can put the load on its target.
///
/// # Errors
/// When it cannot. The error says what to change.
pub async fn check(load: &Load, allow_remote: bool) -> anyhow::Result<()> {
    let target = load.target;
    if !target.ip().to_canonical().is_loopback() && !allow_remote {
        bail!("{target} is not this machine: add --allow-remote if you may put load on it");
    }
    if load.sources > 0 && !(target.is_ipv4() && target.ip().is_loopback()) {
        bail!("--sources uses addresses in 127.0.0.0/8, and {target} is not in it: leave it out");
    }
    if load.duration > LONGEST {
        bail!("--seconds: the maximum is one week");
    }
    open_files(load.connections as u64)?;
    ports(load)?;
    tracking()?;
    reachable(target, load.timeout).await
}

/// Raises the limit on open files to the hard limit, and checks whether it suffices for these connections.
///
/// # Errors
/// When the hard limit is too low.
pub fn open_files(connections: u64) -> anyhow::Result<()> {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).context("cannot raise the limit on open files to its hard limit")?;
    let most = limit.maximum.unwrap_or(u64::MAX);
    if connections + RESERVE > most {
        bail!(
            "{connections} connections need {} open files and the limit is {most}: run ulimit -n {}, or use fewer --connections",
            connections + RESERVE,
            connections + RESERVE
        );
    }
    Ok(())
}

/// Checks whether the ephemeral ports suffice for the open connections and for those in `TIME_WAIT`.
fn ports(load: &Load) -> anyhow::Result<()> {
    const RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
    let text = std::fs::read_to_string(RANGE).unwrap_or_default();
    let mut bounds = text.split_whitespace().filter_map(|bound| bound.parse::<u64>().ok());
    let (Some(first), Some(last)) = (bounds.next(), bounds.next()) else { return Ok(()) };
    let there_are = (last.saturating_sub(first) + 1) * u64::from(load.sources.max(1));
    let step = match (load.work, load.pace) {
        (Work::Connections, Pace::Open(rate)) => Duration::from_secs_f64(1.0 / rate),
        _ => Duration::MAX,
    };
    // On loopback, Linux reuses a port in TIME_WAIT after a second (tcp_tw_reuse 2, the default), but not for a socket that
    // is bound to an address.
    let rest = if load.target.ip().is_loopback() && load.sources == 0 { Duration::from_secs(1) } else { REST };
    let resting = load.duration.min(rest).as_nanos() / step.as_nanos().max(1);
    let needed = load.connections as u64 + u64::try_from(resting).unwrap_or(u64::MAX);
    if needed > there_are {
        bail!(
            "the load needs {needed} ephemeral ports and this machine has {there_are}: use --sources {} (loopback only), or widen {RANGE}",
            needed / (last - first + 1) + 1
        );
    }
    Ok(())
}

/// Checks whether the kernel's connection tracking has room. Docker's firewall rules switch the tracking on. The kernel
/// keeps each connection for two minutes after its end, and drops the packets of new connections when the table is full.
///
/// # Errors
/// When the table is nearly full.
pub fn tracking() -> anyhow::Result<()> {
    let figure = |name: &str| -> Option<u64> {
        std::fs::read_to_string(format!("/proc/sys/net/netfilter/nf_conntrack_{name}")).ok()?.trim().parse().ok()
    };
    if let (Some(count), Some(most)) = (figure("count"), figure("max"))
        && count > most / 10 * 8
    {
        bail!(
            "the kernel tracks {count} connections and drops packets above {most}: wait two minutes, or run \
             sysctl -w net.netfilter.nf_conntrack_max={}",
            most * 8
        );
    }
    Ok(())
}

/// Warns where figures would say little: other work on this machine, time that the hypervisor takes, or few rounds.
pub async fn warn_if_noisy(rounds: u32) {
    if rounds < 5 {
        eprintln!("warning: with {rounds} rounds, small differences mean nothing: use 5 or more");
    }
    let before = ticks();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let passed: Vec<_> = std::iter::zip(ticks(), before).map(|(now, before)| now.saturating_sub(before)).collect();
    if let Some(warning) = noise(&passed) {
        eprintln!("warning: {warning}");
    }
}

/// The ticks of all processors so far, by kind: user, nice, system, idle, iowait, irq, softirq, steal (proc(5)).
fn ticks() -> Vec<u64> {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let line = stat.lines().next().unwrap_or_default();
    line.split_whitespace().skip(1).filter_map(|ticks| ticks.parse().ok()).take(8).collect()
}

/// What disturbs a measurement, by the ticks that passed.
fn noise(passed: &[u64]) -> Option<String> {
    let &[user, nice, system, idle, wait, irq, softirq, steal] = passed else { return None };
    let all = user + nice + system + idle + wait + irq + softirq + steal;
    let percent = |ticks: u64| ticks * 100 / all.max(1);
    let (busy, stolen) = (percent(user + nice + system + irq + softirq), percent(steal));
    match (busy, stolen) {
        (10.., _) => Some(format!("other work takes {busy} % of this machine: the figures are not reliable")),
        (_, 2..) => {
            Some(format!("the hypervisor takes {stolen} % of this machine's time: the figures are not reliable"))
        }
        _ => None,
    }
}

async fn reachable(target: SocketAddr, timeout: Duration) -> anyhow::Result<()> {
    tokio::time::timeout(timeout, tokio::net::TcpStream::connect(target))
        .await
        .map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))
        .flatten()
        .map(drop)
        .with_context(|| format!("cannot reach {target}: is the balancer running? (--target)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_work_and_stolen_time_are_noise() {
        assert_eq!(noise(&[1, 0, 1, 198, 0, 0, 0, 0]), None);
        assert!(noise(&[20, 5, 5, 170, 0, 0, 0, 0]).unwrap().contains("15 %"));
        assert!(noise(&[1, 0, 1, 190, 0, 0, 0, 8]).unwrap().contains("4 %"));
        assert_eq!(noise(&[]), None);
    }
}
