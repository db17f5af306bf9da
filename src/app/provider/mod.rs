//! Where the backends of a pool come from, one file for each kind of provider. The rest of the app does not know which
//! kind a pool has.
//!
//! To add a kind, add its settings in `config/provider.rs`, a file here with a [`Source`], and one line in [`prepare`].

mod discover;
mod dns;
mod docker;
mod file;
mod fixed;
mod list;
mod process;
mod source;

use std::collections::HashMap;
use std::io;

use tokio::sync::oneshot;

pub(super) use self::fixed::listed;
pub(super) use self::source::{Prepared, Source, Start, Update, change};
use super::StartError;
use super::changes::OfPool;
use super::context::PoolContext;
use crate::config::{self, Provider};
use crate::control::docker::engine::Engine;
use crate::control::provider::Location;
pub(super) use crate::control::provider::names::Addresses;
use crate::control::supervisor::handover::{Handed, Handover};

/// Prepares the provider of a pool. Key paths in errors start with `key_path`.
pub(super) async fn prepare(
    key_path: &str,
    pool: &config::Pool,
    changes: &OfPool,
    taken_over: Vec<Handed>,
    context: &PoolContext<'_>,
) -> Result<Prepared, StartError> {
    match &pool.provider {
        Provider::Static(backends) => fixed::prepare(key_path, pool, backends, context).await,
        Provider::Process(process) => process::prepare(key_path, pool, process, changes, taken_over, context),
        Provider::Containers(containers) => docker::prepare(pool, containers, changes, context),
        Provider::Discover(settings) => discover::prepare(pool, settings, context),
        Provider::Dns(settings) => dns::prepare(key_path, pool, settings, context).await,
        Provider::File(file) => file::prepare(key_path, pool, file, context).await,
    }
}

/// What a start of the pool would find missing on this machine now. True: the pool could not start at all.
pub(super) async fn probe(key_path: &str, pool: &config::Pool, engine: Option<&Engine>) -> Vec<(bool, StartError)> {
    match &pool.provider {
        Provider::Static(backends) => {
            let key_path = format!("{key_path}.provider.static");
            let unknown = list::unknown_names(&key_path, backends, &pool.connect.outgoing).await;
            unknown.into_iter().map(|error| (false, error)).collect()
        }
        Provider::Process(process) => {
            let missing = process::check_program(&format!("{key_path}.provider.process"), process).err();
            missing.map(|error| (true, error)).into_iter().collect()
        }
        Provider::Containers(containers) => {
            let Some(engine) = engine else { return Vec::new() };
            docker::missing_image(key_path, containers, engine).await.map(|error| (false, error)).into_iter().collect()
        }
        Provider::Discover(_) => Vec::new(),
        Provider::File(file) => {
            file::faults(key_path, pool, file).await.into_iter().map(|error| (false, error)).collect()
        }
        Provider::Dns(settings) => {
            dns::fault(key_path, settings).await.map(|error| (false, error)).into_iter().collect()
        }
    }
}

/// The names that Ringway looks up to get the addresses of backends.
pub(super) enum Names<'a> {
    /// One name has led to all of them.
    Common(String),
    /// By the ids of backends. The others have an address that needs no look-up.
    Own(HashMap<&'a str, &'a Location>),
}

impl<'a> Names<'a> {
    pub(super) fn of(provider: &'a Provider) -> Self {
        match provider {
            Provider::Dns(settings) => Self::Common(settings.question.to_string()),
            Provider::Static(backends) => {
                let named = backends.iter().filter(|backend| backend.location.is_name());
                Self::Own(named.map(|backend| (backend.id.as_str(), &backend.location)).collect())
            }
            Provider::File(file) => Self::Common(file.path.display().to_string()),
            Provider::Process(_) | Provider::Containers(_) | Provider::Discover(_) => Self::Own(HashMap::new()),
        }
    }

    /// What Ringway looks up for this backend; `None`: nothing.
    pub(super) fn get(&self, id: &str) -> Option<String> {
        match self {
            Self::Common(name) => Some(name.clone()),
            Self::Own(names) => names.get(id).map(ToString::to_string),
        }
    }
}

/// Whether a provider takes over the replicas of a predecessor.
pub(super) fn takes_over(provider: &Provider) -> bool {
    matches!(provider, Provider::Process(_))
}

/// Whether new settings are enough to turn a running provider into a new one. Otherwise a new pool must replace it.
pub(super) fn can_become(running: &Provider, new: &Provider) -> bool {
    match (running, new) {
        (Provider::Discover(running), Provider::Discover(new)) => running == new,
        (Provider::File(running), Provider::File(new)) => running == new,
        (Provider::Dns(running), Provider::Dns(new)) => running.question == new.question,
        (running, new) => running.is_same_kind(new),
    }
}

/// Pauses the supervisor and returns its replicas for a handover. If the decision is true, the supervisor leaves the
/// replicas to the successor; otherwise it resumes.
pub(super) async fn hand_over(source: &dyn Source, decision: oneshot::Receiver<bool>) -> io::Result<Vec<Handed>> {
    let Some(line) = source.supervisor() else { return Ok(Vec::new()) };
    let (sender, handed) = oneshot::channel();
    // A supervisor that has ended has no replicas.
    let _ = line.handovers.send(Handover { handed: sender, decision }).await;
    handed.await.unwrap_or_else(|_| Ok(Vec::new()))
}
