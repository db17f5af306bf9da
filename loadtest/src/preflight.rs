//! What is checked before a load begins, so that it measures its target and not the limits of this machine.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustix::process::{Resource, getrlimit, setrlimit};

use crate::load::{Load, Pace, Work};

/// Descriptors beside those of the connections.
const RESERVE: u64 = 64;

/// How long a port rests after its connection (`TIME_WAIT`).
const REST: Duration = Duration::from_secs(60);

/// Longest run.
const LONGEST: Duration = Duration::from_secs(7 * 24 * 3600);

/// Whether the load can be put on its target from here, as far as that is known beforehand.
///
/// # Errors
/// When it cannot, with the remedy.
pub async fn check(load: &Load, allow_remote: bool) -> anyhow::Result<()> {
    let target = load.target;
    if !target.ip().to_canonical().is_loopback() && !allow_remote {
        bail!("{target} is not this machine: --allow-remote, if it is yours to put load on");
    }
    if load.sources > 0 && !(target.is_ipv4() && target.ip().is_loopback()) {
        bail!("--sources are addresses of 127.0.0.0/8, and {target} is not in it: leave it out");
    }
    if load.duration > LONGEST {
        bail!("--seconds: a run takes a week at most");
    }
    open_files(load.connections as u64)?;
    ports(load)?;
    tracking()?;
    reachable(target, load.timeout).await
}

/// Room for so many connections, from the hard limit where the soft one does not do.
///
/// # Errors
/// When there is none.
pub fn open_files(connections: u64) -> anyhow::Result<()> {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).context("cannot raise the limit on open files to its hard limit")?;
    let most = limit.maximum.unwrap_or(u64::MAX);
    if connections + RESERVE > most {
        bail!(
            "{connections} connections take {} open files and the limit is {most}: ulimit -n {}, or fewer --connections",
            connections + RESERVE,
            connections + RESERVE
        );
    }
    Ok(())
}

/// Whether there are ephemeral ports for the connections, those included that rest after their end.
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
    // On loopback Linux takes a resting port again after a second (tcp_tw_reuse 2, its default), but not for a socket that
    // is bound to its address.
    let rest = if load.target.ip().is_loopback() && load.sources == 0 { Duration::from_secs(1) } else { REST };
    let resting = load.duration.min(rest).as_nanos() / step.as_nanos().max(1);
    let needed = load.connections as u64 + u64::try_from(resting).unwrap_or(u64::MAX);
    if needed > there_are {
        bail!(
            "this takes {needed} ephemeral ports and there are {there_are}: --sources {} (loopback only), or a wider {RANGE}",
            needed / (last - first + 1) + 1
        );
    }
    Ok(())
}

/// Whether the kernel's firewall has room to track connections, where it tracks them (Docker's rules make it do so). It
/// remembers each for two minutes after its end, and drops packets of new ones when it is full.
///
/// # Errors
/// When it is nearly full.
pub fn tracking() -> anyhow::Result<()> {
    let figure = |name: &str| -> Option<u64> {
        std::fs::read_to_string(format!("/proc/sys/net/netfilter/nf_conntrack_{name}")).ok()?.trim().parse().ok()
    };
    if let (Some(count), Some(most)) = (figure("count"), figure("max"))
        && count > most / 10 * 8
    {
        bail!(
            "the firewall tracks {count} connections and {most} at most; past that it drops packets: wait two minutes, or \
             sysctl -w net.netfilter.nf_conntrack_max={}",
            most * 8
        );
    }
    Ok(())
}

async fn reachable(target: SocketAddr, timeout: Duration) -> anyhow::Result<()> {
    tokio::time::timeout(timeout, tokio::net::TcpStream::connect(target))
        .await
        .map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))
        .flatten()
        .map(drop)
        .with_context(|| format!("cannot reach {target}: is the balancer running? (--target)"))
}
