//! Limits per source address on a listener: concurrent connections, and new connections per second by a token bucket.
//!
//! Memory is bounded: up to 262,144 sources are tracked. When a shard is full, Ringway forgets sources that have no
//! connection and a full bucket. If that frees no room, a new source is not tracked and its connection is counted as
//! untracked.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

use super::key::{Key, KeyKind};
use super::stats::RefusalReason;
use crate::stream::Client;

/// Number of shards. Each has its own lock, so workers seldom wait for each other.
const SHARDS: usize = 64;

/// Maximum sources per shard: 262,144 in all, about 20 MB.
const MOST_IN_SHARD: usize = 4096;

/// The limits of one source address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SourceLimits {
    /// Maximum concurrent connections.
    pub max_connections: u32,
    /// Maximum rate of new connections; `None`: unlimited.
    pub rate: Option<Rate>,
}

/// A rate of new connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Number of connections on average; at least 1.
    pub count: u32,
    /// The time for which they count.
    pub per: Duration,
    /// Number of connections that may come at once; at least 1.
    pub burst: u32,
}

/// The sources of a listener, shared by all workers.
#[derive(Debug)]
pub struct Sources {
    limits: ArcSwap<SourceLimits>,
    shards: Box<[Mutex<HashMap<u64, Source>>]>,
    untracked: AtomicU64,
}

#[derive(Debug)]
struct Source {
    connections: u32,
    /// When the bucket will be full again if no more connections arrive. This is the generic cell rate algorithm (ITU-T
    /// I.371), which stores one time instead of a fill level and a time.
    full_at: Instant,
}

/// A connection's permit under the limits of its source. Dropping it returns it.
#[derive(Debug)]
pub(super) struct SourcePermit {
    sources: Arc<Sources>,
    source: u64,
}

impl Sources {
    /// Creates an empty table of sources.
    pub fn new(limits: SourceLimits) -> Self {
        Self {
            limits: ArcSwap::from_pointee(limits),
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            untracked: AtomicU64::new(0),
        }
    }

    /// Changes the limits. The open connections of each source still count.
    pub fn set_limits(&self, limits: SourceLimits) {
        if **self.limits.load() != limits {
            self.limits.store(Arc::new(limits));
        }
    }

    /// Connections admitted without tracking because the table was full.
    pub fn untracked(&self) -> u64 {
        self.untracked.load(Ordering::Relaxed)
    }

    /// Admits a connection, or refuses it if its source exceeds a limit; `Ok(None)`: admitted, but not tracked.
    pub(super) fn admit(self: &Arc<Self>, source: Client, now: Instant) -> Result<Option<SourcePermit>, RefusalReason> {
        let source = source_of(source);
        let limits = **self.limits.load();
        let mut shard = self.shard(source);
        if shard.len() >= MOST_IN_SHARD && !shard.contains_key(&source) {
            shard.retain(|_, other| other.connections > 0 || other.full_at > now);
            if shard.len() >= MOST_IN_SHARD {
                self.untracked.fetch_add(1, Ordering::Relaxed);
                return Ok(None);
            }
        }
        let entry = shard.entry(source).or_insert(Source { connections: 0, full_at: now });
        if entry.connections >= limits.max_connections {
            return Err(RefusalReason::SourceConnections);
        }
        if let Some(rate) = limits.rate {
            let each = rate.per / rate.count.max(1);
            let full_at = entry.full_at.max(now) + each;
            if full_at > now + each.saturating_mul(rate.burst.max(1)) {
                return Err(RefusalReason::SourceRate);
            }
            entry.full_at = full_at;
        }
        entry.connections += 1;
        drop(shard);
        Ok(Some(SourcePermit { sources: Arc::clone(self), source }))
    }

    /// Counts a connection that was open before, whatever the limits are; `None`: it is not tracked.
    pub(super) fn count_open(self: &Arc<Self>, source: Client, now: Instant) -> Option<SourcePermit> {
        let source = source_of(source);
        let mut shard = self.shard(source);
        if shard.len() >= MOST_IN_SHARD && !shard.contains_key(&source) {
            self.untracked.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        shard.entry(source).or_insert(Source { connections: 0, full_at: now }).connections += 1;
        drop(shard);
        Some(SourcePermit { sources: Arc::clone(self), source })
    }

    fn shard(&self, source: u64) -> MutexGuard<'_, HashMap<u64, Source>> {
        self.shards[(source >> 58) as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for SourcePermit {
    fn drop(&mut self) {
        let mut shard = self.sources.shard(self.source);
        if let Some(source) = shard.get_mut(&self.source) {
            source.connections -= 1;
            // Without a rate limit there is no bucket to remember.
            if source.connections == 0 && self.sources.limits.load().rate.is_none() {
                shard.remove(&self.source);
            }
        }
    }
}

/// The hash of an IPv4 address, or of an IPv6 address's /64, which one host usually owns. Hashing fills the shards
/// evenly. Two sources with the same 64-bit hash share their limits. On a Unix socket, the user is the source.
fn source_of(client: Client) -> u64 {
    let Client::Ip(address) = client else {
        return seahash::hash(Key::of(KeyKind::SourceIp, client, None).as_bytes());
    };
    match address.ip().to_canonical() {
        IpAddr::V4(ip) => seahash::hash(&ip.octets()),
        IpAddr::V6(ip) => seahash::hash(&ip.octets()[..8]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(max_connections: u32, rate: Option<(u32, u32)>) -> Arc<Sources> {
        let rate = rate.map(|(count, burst)| Rate { count, per: Duration::from_secs(1), burst });
        Arc::new(Sources::new(SourceLimits { max_connections, rate }))
    }

    fn ip(text: &str) -> Client {
        Client::Ip((text.parse::<IpAddr>().unwrap(), 1).into())
    }

    fn v4(n: u32) -> Client {
        Client::Ip((IpAddr::V4(n.into()), 1).into())
    }

    #[test]
    fn each_source_is_limited_and_a_closed_connection_frees_its_permit() {
        let (sources, now) = (sources(2, None), Instant::now());
        let first = sources.admit(ip("10.0.0.1"), now).unwrap();
        let _second = sources.admit(ip("::ffff:10.0.0.1"), now).unwrap();
        assert_eq!(sources.admit(ip("10.0.0.1"), now).unwrap_err(), RefusalReason::SourceConnections);
        assert!(sources.admit(ip("10.0.0.2"), now).is_ok());
        drop(first);
        assert!(sources.admit(ip("10.0.0.1"), now).is_ok());
    }

    #[test]
    fn an_ipv6_64_network_counts_as_one_source() {
        let (sources, now) = (sources(1, None), Instant::now());
        let _permit = sources.admit(ip("2001:db8:0:1::1"), now).unwrap();
        assert!(sources.admit(ip("2001:db8:0:1:ffff::2"), now).is_err());
        assert!(sources.admit(ip("2001:db8:0:2::1"), now).is_ok());
    }

    #[test]
    fn a_source_gets_a_burst_and_then_its_average_rate() {
        let (sources, begin) = (sources(u32::MAX, Some((10, 5))), Instant::now());
        let at = |ms: u64| sources.admit(ip("10.0.0.1"), begin + Duration::from_millis(ms)).is_ok();
        assert_eq!((0..20).filter(|_| at(0)).count(), 5);
        assert!(!at(99) && at(100) && !at(100));
        let in_ten_seconds = (0..1000).filter(|n| at(200 + n * 10)).count();
        assert!((100..=101).contains(&in_ten_seconds), "{in_ten_seconds}");
        assert_eq!((0..20).filter(|_| at(60_000)).count(), 5, "a long silence allows at most one burst");
    }

    #[test]
    fn a_rate_can_count_connections_of_a_minute() {
        let rate = Some(Rate { count: 30, per: Duration::from_secs(60), burst: 1 });
        let (sources, begin) =
            (Arc::new(Sources::new(SourceLimits { max_connections: u32::MAX, rate })), Instant::now());
        let at = |ms: u64| sources.admit(ip("10.0.0.1"), begin + Duration::from_millis(ms)).is_ok();
        assert!(at(0) && !at(1999) && at(2000) && !at(3999) && at(4000));
    }

    #[test]
    fn memory_is_bounded_and_tracked_sources_stay_limited_under_many_sources() {
        let (sources, now) = (sources(1, Some((1, 1))), Instant::now());
        let _permit = sources.admit(ip("192.0.2.1"), now).unwrap();
        for n in 0..2 * (SHARDS * MOST_IN_SHARD) as u32 {
            let _ = sources.admit(v4(n), now);
        }
        let known = |sources: &Sources| sources.shards.iter().map(|shard| shard.lock().unwrap().len()).sum::<usize>();
        assert!(known(&sources) <= SHARDS * MOST_IN_SHARD);
        assert!(sources.untracked() > 0);
        assert!(sources.admit(ip("192.0.2.1"), now).is_err());
        let later = now + Duration::from_secs(2);
        let before = sources.untracked();
        assert!((0..1000_u32).all(|n| sources.admit(v4(n | 0xf000_0000), later).is_ok()));
        assert_eq!(sources.untracked(), before, "idle sources make room for new ones");
    }
}
