//! What pools are prepared with.

use std::collections::BTreeMap;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::Environment;
use super::inheritance::Named;
use crate::config::Config;
use crate::control::docker::engine::Engine;
use crate::control::supervisor::rollout::Refused;
use crate::metrics::Exporter;

/// What every pool needs for its preparation.
pub(super) struct PoolContext<'a> {
    pub(super) config: &'a Config,
    pub(super) engine: Option<&'a Engine>,
    pub(super) environment: &'a Environment,
    pub(super) exporter: &'a Exporter,
    /// Backends of an old process whose addresses came from a name server.
    pub(super) named: &'a [Named],
    /// By pool: what a rollout of an old process has failed with.
    pub(super) refused: &'a BTreeMap<String, Refused>,
    /// Ringway starts; otherwise a reload adds the pool.
    pub(super) is_start: bool,
    /// Cancelled when all replicas must stop.
    pub(super) stop_replicas: &'a CancellationToken,
    /// True if there is no old Ringway process, or once it has exited.
    pub(super) settled: watch::Receiver<bool>,
}

impl PoolContext<'_> {
    /// The backends of this pool whose addresses an old process had from a name server.
    pub(super) fn known(&self, pool: &str) -> impl Iterator<Item = &Named> {
        self.named.iter().filter(move |named| named.pool == pool)
    }
}
