//! What a look-up found, and how it ended.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::label_enum;

label_enum! {
    /// How a look-up ended.
    pub enum Outcome {
        /// With at least one backend.
        Found => "found",
        /// With a complete answer without any backend. The name may not exist.
        Empty => "empty",
        /// With all targets of SRV records, but without the address of some.
        Partial => "partial",
        /// No server answered in time.
        Timeout => "timeout",
        /// A server answered that it failed (SERVFAIL).
        ServerFailure => "server_failure",
        /// A server refused to answer (REFUSED).
        Refused => "refused",
        /// The answer was cut off, even over TCP.
        Truncated => "truncated",
        /// Something else failed: no server could be reached, or it sent something that is no answer.
        Failed => "failed",
    }
}

/// What a look-up found.
#[derive(Debug, Default)]
pub struct Answer {
    /// The backends by id.
    pub found: BTreeMap<Arc<str>, Found>,
    /// Whether a backend that was not found is not there.
    pub is_complete: bool,
    /// How long the answer is valid, if it says so.
    pub ttl: Option<Duration>,
    /// What failed.
    pub fault: Option<Fault>,
}

/// A backend of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Identity on the ring: `address:port`, for SRV records `target:port`.
    pub id: Arc<str>,
    /// Its addresses, IPv4 before IPv6.
    pub addresses: Vec<SocketAddr>,
    /// The look-up of its addresses failed, as a whole or for one family.
    pub is_partial: bool,
    /// Priority and weight, as the SRV record has them. The lowest priority is the best.
    pub rank: (u16, u16),
}

/// Why a look-up failed, as a whole or in part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The kind of the failure.
    pub outcome: Outcome,
    /// What failed, for a person.
    pub text: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Answer {
    /// An answer that failed as a whole.
    pub fn failed(fault: Fault) -> Self {
        Self { fault: Some(fault), ..Self::default() }
    }

    /// How the look-up ended.
    pub fn outcome(&self) -> Outcome {
        match &self.fault {
            Some(_) if self.is_complete => Outcome::Partial,
            Some(fault) => fault.outcome,
            None if self.found.is_empty() => Outcome::Empty,
            None => Outcome::Found,
        }
    }
}
