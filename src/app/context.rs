//! What pools are prepared with.

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::Environment;
use crate::config::Config;
use crate::control::docker::engine::Engine;
use crate::metrics::Exporter;

/// What every pool needs for its preparation.
pub(super) struct PoolContext<'a> {
    pub(super) config: &'a Config,
    pub(super) engine: Option<&'a Engine>,
    pub(super) environment: &'a Environment,
    pub(super) exporter: &'a Exporter,
    /// Ringway starts; otherwise a reload adds the pool.
    pub(super) is_start: bool,
    /// Cancelled when all replicas must stop.
    pub(super) stop_replicas: &'a CancellationToken,
    /// True if there is no old Ringway process, or once it has exited.
    pub(super) settled: watch::Receiver<bool>,
}
