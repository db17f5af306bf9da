//! What the status shows of a pool's provider.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::api::ProviderView;
use crate::control::provider::{dns, file};
use crate::control::supervisor::rollout::RolloutStatus;
use crate::control::supervisor::scaling::{ScalingStatus, ScalingView};
use crate::labels::Label as _;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/api.md explains each field")]
pub struct Provider {
    pub kind: String,
    pub engine: Option<Engine>,
    #[serde(default)]
    pub dns: Option<Dns>,
    #[serde(default)]
    pub file: Option<File>,
    /// `None`: Ringway does not start the backends.
    #[serde(default)]
    pub rollout: Option<Rollout>,
    /// `None`: the pool does not scale by itself.
    #[serde(default)]
    pub scaling: Option<Scaling>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/api.md explains each field")]
pub struct Scaling {
    pub min: u32,
    pub max: u32,
    pub wanted: u32,
    pub waiting: usize,
    pub since_seconds: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/api.md explains each field")]
pub struct Rollout {
    pub state: String,
    pub updated: usize,
    pub total: usize,
    #[serde(default)]
    pub held: bool,
    pub since_seconds: f64,
    pub reason: Option<String>,
    pub last: Option<LastRollout>,
    pub ended: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/api.md explains each field")]
pub struct LastRollout {
    pub result: String,
    pub seconds_ago: f64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/api.md explains each field")]
pub struct File {
    pub path: String,
    pub backends: usize,
    /// `None`: Ringway could not apply the file so far.
    pub applied_seconds_ago: Option<f64>,
    pub error: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/api.md explains each field")]
pub struct Dns {
    pub question: String,
    pub backends: usize,
    /// `None`: there has been no complete answer yet.
    pub answered_seconds_ago: Option<f64>,
    pub ttl_seconds: Option<f64>,
    pub next_in_seconds: f64,
    pub error: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/api.md explains each field")]
pub struct Engine {
    pub host: String,
    pub reachable: bool,
    pub synced_seconds_ago: f64,
    pub error: Option<String>,
}

impl Provider {
    pub(super) fn of(provider: &ProviderView) -> Self {
        let engine = provider.status.engine().map(|engine| Engine {
            host: engine.host().to_owned(),
            reachable: engine.is_fresh(),
            synced_seconds_ago: engine.age().as_secs_f64(),
            error: engine.error().map(|error| error.to_string()),
        });
        let dns = provider.status.dns().map(|dns| Dns::of(&dns.last(), Instant::now()));
        let file = provider.status.file().map(|file| File::of(&file.last(), Instant::now()));
        let rollout = provider.rollout.as_ref().map(|rollout| Rollout::of(rollout, Instant::now()));
        let scaling = provider.scaling.as_ref().and_then(|scaling| Scaling::of(scaling, Instant::now()));
        Self { kind: provider.kind.to_owned(), engine, dns, file, rollout, scaling }
    }
}

impl Scaling {
    fn of(scaling: &ScalingStatus, now: Instant) -> Option<Self> {
        let ScalingView { min, max, wanted, since } = scaling.view()?;
        let since_seconds = now.saturating_duration_since(since).as_secs_f64();
        Some(Self { min, max, wanted, waiting: scaling.waiting.now(), since_seconds })
    }
}

impl Rollout {
    fn of(rollout: &RolloutStatus, now: Instant) -> Self {
        let view = rollout.view();
        let ago = |then: Instant| now.saturating_duration_since(then).as_secs_f64();
        Self {
            state: view.stage.as_str().to_owned(),
            updated: view.updated,
            total: view.total,
            held: view.is_held,
            since_seconds: ago(view.since),
            reason: view.reason.as_deref().map(str::to_owned),
            last: view
                .last
                .map(|(result, at)| LastRollout { result: result.as_str().to_owned(), seconds_ago: ago(at) }),
            ended: rollout.results.total(),
        }
    }
}

impl File {
    fn of(last: &file::Last, now: Instant) -> Self {
        Self {
            path: last.path.to_string(),
            backends: last.backends,
            applied_seconds_ago: last.applied.map(|at| now.saturating_duration_since(at).as_secs_f64()),
            error: last.error.as_deref().map(str::to_owned),
        }
    }
}

impl Dns {
    fn of(last: &dns::status::Last, now: Instant) -> Self {
        let answered = last.answered.map(|at| now.saturating_duration_since(at).as_secs_f64());
        Self {
            question: last.question.to_string(),
            backends: last.backends,
            answered_seconds_ago: answered,
            ttl_seconds: last.ttl.map(|ttl| ttl.as_secs_f64()),
            next_in_seconds: last.next.saturating_duration_since(now).as_secs_f64(),
            error: last.error.as_deref().map(str::to_owned),
        }
    }
}
