//! Providers: where a pool's backends come from. Each says which backends there are; `process` and `docker` have
//! the [supervisor](super::supervisor) fill their slots.
//!
//! # Layout
//!
//! - this file: backends and slots that are known from the config
//! - [`discover`]: containers that somebody else runs

pub mod discover;

use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;

/// A backend as somebody lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
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

impl Listed {
    /// The parts of `host:port`; an IPv6 address is in brackets.
    pub fn host_and_port(text: &str) -> Option<(String, u16)> {
        let (host, port) = text.rsplit_once(':')?;
        let port = port.parse().ok().filter(|&port: &u16| port > 0)?;
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let is_fine = match bare {
            Some(ip) => ip.parse::<Ipv6Addr>().is_ok(),
            None => !host.is_empty() && !host.contains([':', '[', ']', '/', ' ']),
        };
        is_fine.then(|| (bare.unwrap_or(host).to_owned(), port))
    }
}

/// The provider `static`: where a listed backend is. Of several addresses the first is taken, IPv4 before IPv6, so that
/// instances on one network agree.
///
/// # Errors
/// When the name cannot be resolved.
pub async fn resolve(host: &str, port: u16) -> io::Result<SocketAddr> {
    let found = tokio::net::lookup_host((host, port)).await?;
    found.min_by_key(SocketAddr::is_ipv6).ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// The providers `process` and `docker`: the slots of a pool, `echo-1`, `echo-2` and so on.
pub fn slots(pool: &str, replicas: u32) -> Vec<Arc<str>> {
    (1..=replicas).map(|n| format!("{pool}-{n}").into()).collect()
}

/// The number in a slot's name, from 1 to the most replicas that a pool may have.
pub(crate) fn slot_number(pool: &str, name: &str) -> Option<u32> {
    let digits = name.strip_prefix(pool)?.strip_prefix('-')?;
    let number = digits.parse().ok().filter(|number| (1..=1000).contains(number))?;
    // `echo-07` and `echo-+7` are no names of slots.
    (format!("{number}") == digits).then_some(number)
}
