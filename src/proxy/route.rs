//! The route of a connection: its pool, with the settings that apply to the connection.

use std::sync::Arc;
use std::time::Duration;

use ::metrics::Histogram;
use tokio::sync::mpsc;

use super::key::KeyKind;
use super::stats::PoolStats;
use crate::backend::Failing;
use crate::proxy_header::Version;
use crate::table::TableCell;

/// How a listener's connections are balanced over a pool.
#[derive(Debug, Clone)]
pub struct Route {
    /// The pool's name.
    pub pool: Arc<str>,
    /// The part of a connection that is hashed.
    pub key: KeyKind,
    /// The pool's table.
    pub table: TableCell,
    /// Maximum connections per backend; a backend that has reached it is skipped.
    pub most_per_backend: u64,
    /// Version of the PROXY header that backends get; `None`: none.
    pub send_proxy: Option<Version>,
    /// Timeout of one connect attempt.
    pub connect_timeout: Duration,
    /// Maximum backends tried per connection; at least 1.
    pub connect_attempts: usize,
    /// A connection with no traffic for this long is reset.
    pub idle: Duration,
    /// The idle timeout once one side has ended its stream.
    pub half_closed: Duration,
    /// A connection is reset at this age, or up to a tenth sooner; `None`: never.
    pub max_age: Option<Duration>,
    /// How long open connections may continue after the data plane was told to stop.
    pub drain: Duration,
    /// Histogram of successful connect times, in seconds.
    pub connect_seconds: Histogram,
    /// Reports backends whose connects keep failing; `None`: no reports.
    pub failing: Option<Reports>,
    /// The pool's counters.
    pub stats: Arc<PoolStats>,
}

/// How Ringway reports backends whose connects keep failing.
#[derive(Debug, Clone)]
pub struct Reports {
    /// Consecutive failures per report; at least 1. Every further series of this length makes another report.
    pub after: u32,
    /// Receives the reports. A full channel drops a report; later failures make another.
    pub to: mpsc::Sender<Failing>,
}
