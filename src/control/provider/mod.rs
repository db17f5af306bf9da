//! Providers: where a pool's backends come from. Each says which backends there are; `process` and `docker` have
//! the [supervisor](super::supervisor) fill their slots.
//!
//! # Layout
//!
//! - this file: backends and slots that are known from the config
//! - [`discover`]: containers that somebody else runs

pub mod discover;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use super::Event;

/// A backend listed in the config.
#[derive(Debug, Clone)]
pub struct Listed {
    /// Its identity on the ring.
    pub id: Arc<str>,
    /// An address or a name.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// Multiple of the ring's virtual nodes.
    pub weight: u32,
}

/// The provider `static`: resolves a listed backend once. Of several addresses the first is taken, IPv4 before
/// IPv6, so that instances on one network agree.
///
/// # Errors
/// When the name cannot be resolved.
pub async fn resolve(listed: &Listed) -> io::Result<[Event; 2]> {
    let found = tokio::net::lookup_host((listed.host.as_str(), listed.port)).await?;
    let address = found.min_by_key(SocketAddr::is_ipv6).ok_or(io::ErrorKind::NotFound)?;
    Ok([
        Event::Joined { id: Arc::clone(&listed.id), weight: listed.weight },
        Event::Started { id: Arc::clone(&listed.id), address, replica: None },
    ])
}

/// The providers `process` and `docker`: the slots of a pool, `echo-1`, `echo-2` and so on.
pub fn slots(pool: &str, replicas: u32) -> Vec<Arc<str>> {
    (1..=replicas).map(|n| format!("{pool}-{n}").into()).collect()
}
