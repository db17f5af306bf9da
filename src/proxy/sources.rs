//! What one source address may do on a listener: connections at a time, and new ones per second by a token bucket.
//!
//! Memory is bounded: sources that have no connection and a full bucket are forgotten when room is needed, and where there
//! is none to be had a new source goes untracked, which is counted.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::stats::Refusal;

/// Parts of the table, each with a lock of its own, so that workers seldom wait for each other.
const SHARDS: usize = 64;

/// Sources in one part: 262,144 in all, about 20 MB.
const MOST_IN_SHARD: usize = 4096;

/// What one source may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SourceLimits {
    /// Connections at a time.
    pub max_connections: u32,
    /// New connections per second on average, and how many at once; `None`: any number.
    pub rate: Option<(u32, u32)>,
}

/// The sources of a listener, shared by all workers.
#[derive(Debug)]
pub struct Sources {
    limits: SourceLimits,
    shards: Box<[Mutex<HashMap<u64, Source>>]>,
    untracked: AtomicU64,
}

#[derive(Debug)]
struct Source {
    connections: u32,
    /// When the bucket will be full again, if nobody takes from it (the generic cell rate algorithm, ITU-T I.371: one
    /// time instead of a level and a time).
    full_at: Instant,
}

/// A connection's place among those of its source. Dropping it gives it back.
#[derive(Debug)]
pub(super) struct SourcePlace {
    sources: Arc<Sources>,
    source: u64,
}

impl Sources {
    /// No source yet.
    pub fn new(limits: SourceLimits) -> Self {
        Self { limits, shards: (0..SHARDS).map(|_| Mutex::default()).collect(), untracked: AtomicU64::new(0) }
    }

    /// What each may do.
    pub fn limits(&self) -> SourceLimits {
        self.limits
    }

    /// Connections that were let in uncounted because there were too many sources.
    pub fn untracked(&self) -> u64 {
        self.untracked.load(Ordering::Relaxed)
    }

    /// Lets a connection in; `Ok(None)`: uncounted.
    pub(super) fn admit(self: &Arc<Self>, source: IpAddr, now: Instant) -> Result<Option<SourcePlace>, Refusal> {
        let source = source_of(source);
        let mut shard = self.shard(source);
        if shard.len() >= MOST_IN_SHARD && !shard.contains_key(&source) {
            shard.retain(|_, other| other.connections > 0 || other.full_at > now);
            if shard.len() >= MOST_IN_SHARD {
                self.untracked.fetch_add(1, Ordering::Relaxed);
                return Ok(None);
            }
        }
        let entry = shard.entry(source).or_insert(Source { connections: 0, full_at: now });
        if entry.connections >= self.limits.max_connections {
            return Err(Refusal::SourceConnections);
        }
        if let Some((rate, burst)) = self.limits.rate {
            let each = Duration::from_secs(1) / rate.max(1);
            let full_at = entry.full_at.max(now) + each;
            if full_at > now + each * burst.max(1) {
                return Err(Refusal::SourceRate);
            }
            entry.full_at = full_at;
        }
        entry.connections += 1;
        drop(shard);
        Ok(Some(SourcePlace { sources: Arc::clone(self), source }))
    }

    fn shard(&self, source: u64) -> MutexGuard<'_, HashMap<u64, Source>> {
        self.shards[(source >> 58) as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for SourcePlace {
    fn drop(&mut self) {
        let mut shard = self.sources.shard(self.source);
        if let Some(source) = shard.get_mut(&self.source) {
            source.connections -= 1;
            // Without a bucket to remember there is nothing to keep.
            if source.connections == 0 && self.sources.limits.rate.is_none() {
                shard.remove(&self.source);
            }
        }
    }
}

/// An IPv4 address, or the /64 of an IPv6 one: that much one host has to itself. Hashed, so that the parts fill evenly; two
/// that hash alike, of 2^64, share their limits.
fn source_of(ip: IpAddr) -> u64 {
    match ip.to_canonical() {
        IpAddr::V4(ip) => seahash::hash(&ip.octets()),
        IpAddr::V6(ip) => seahash::hash(&ip.octets()[..8]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(max_connections: u32, rate: Option<(u32, u32)>) -> Arc<Sources> {
        Arc::new(Sources::new(SourceLimits { max_connections, rate }))
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn connections_of_a_source_are_counted_and_given_back() {
        let (sources, now) = (sources(2, None), Instant::now());
        let first = sources.admit(ip("10.0.0.1"), now).unwrap();
        let _second = sources.admit(ip("::ffff:10.0.0.1"), now).unwrap();
        assert_eq!(sources.admit(ip("10.0.0.1"), now).unwrap_err(), Refusal::SourceConnections);
        assert!(sources.admit(ip("10.0.0.2"), now).is_ok());
        drop(first);
        assert!(sources.admit(ip("10.0.0.1"), now).is_ok());
    }

    #[test]
    fn a_network_of_64_bits_is_one_source() {
        let (sources, now) = (sources(1, None), Instant::now());
        let _place = sources.admit(ip("2001:db8:0:1::1"), now).unwrap();
        assert!(sources.admit(ip("2001:db8:0:1:ffff::2"), now).is_err());
        assert!(sources.admit(ip("2001:db8:0:2::1"), now).is_ok());
    }

    #[test]
    fn a_source_gets_a_burst_and_then_its_rate() {
        let (sources, begin) = (sources(u32::MAX, Some((10, 5))), Instant::now());
        let at = |ms: u64| sources.admit(ip("10.0.0.1"), begin + Duration::from_millis(ms)).is_ok();
        assert_eq!((0..20).filter(|_| at(0)).count(), 5);
        assert!(!at(99) && at(100) && !at(100));
        let in_ten_seconds = (0..1000).filter(|n| at(200 + n * 10)).count();
        assert!((100..=101).contains(&in_ten_seconds), "{in_ten_seconds}");
        assert_eq!((0..20).filter(|_| at(60_000)).count(), 5, "never more than a burst, however long it was silent");
    }

    #[test]
    fn however_many_sources_there_are_memory_is_bounded_and_those_known_stay_limited() {
        let (sources, now) = (sources(1, Some((1, 1))), Instant::now());
        let _place = sources.admit(ip("192.0.2.1"), now).unwrap();
        for n in 0..2 * (SHARDS * MOST_IN_SHARD) as u32 {
            let _ = sources.admit(IpAddr::V4(n.into()), now);
        }
        let known = |sources: &Sources| sources.shards.iter().map(|shard| shard.lock().unwrap().len()).sum::<usize>();
        assert!(known(&sources) <= SHARDS * MOST_IN_SHARD);
        assert!(sources.untracked() > 0);
        assert!(sources.admit(ip("192.0.2.1"), now).is_err());
        let later = now + Duration::from_secs(2);
        let before = sources.untracked();
        assert!((0..1000_u32).all(|n| sources.admit(IpAddr::V4((n | 0xf000_0000).into()), later).is_ok()));
        assert_eq!(sources.untracked(), before, "idle sources have made room");
    }
}
