//! Reload: moves the app from the running config to another one. Ringway first prepares the whole change, then applies
//! it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{join_all, try_join_all};
use tokio_util::sync::CancellationToken;

use super::bound::{self, Bound, cannot_listen};
use super::capacity::{Capacity, capacity};
use super::changes::Changes;
use super::context::PoolContext;
use super::inheritance::{Sockets, other_interface};
use super::listeners::{self, Listener};
use super::outlook::Outlook;
use super::pools::{self, Prepared, Update};
use super::readiness::is_empty_on_purpose;
use super::{App, Log, StartError, engine, open_log};
use crate::address::Address;
use crate::config::{Config, Fault};
use crate::control::Event;
use crate::control::command::Report;

/// A prepared change to another config. All fallible steps are done.
pub(super) struct ReloadPlan {
    /// The config as the file contains it, without run-time changes.
    file: Arc<Config>,
    changes: Changes,
    /// The config with the run-time changes, and with the running values of the keys that require a restart.
    config: Arc<Config>,
    capacity: Capacity,
    pools: Vec<PoolPlan>,
    listeners: Vec<Option<Bound>>,
    /// The access log, if it was not open before.
    log: Option<Log>,
    pub(super) report: Report,
}

/// How long listeners wait for new pools to get a healthy backend.
const FRESH: Duration = Duration::from_secs(10);

enum PoolPlan {
    New(Box<Prepared>),
    Update(Box<Update>),
}

impl App {
    /// Prepares a reload to `file` with `changes`.
    ///
    /// # Errors
    /// Returns an error if any part of the new config cannot be prepared. In that case nothing has changed.
    pub(super) async fn prepare(&self, file: Arc<Config>, changes: Changes) -> Result<ReloadPlan, StartError> {
        let Outlook { config, changes, report } = self.outlook(Arc::clone(&file), changes).await;
        let engine = match &self.engine {
            None => engine(&config, self.environment.docker_host.as_deref())?,
            some => some.clone(),
        };
        let context = PoolContext {
            config: &config,
            engine: engine.as_ref(),
            environment: &self.environment,
            exporter: &self.state.exporter,
            named: &[],
            refused: &BTreeMap::new(),
            is_start: false,
            stop_replicas: &self.tasks.stop_replicas,
            settled: self.is_settled.clone(),
        };
        check_together(&config)?;
        let capacity = capacity(&config, self.state.workers.len())?;
        let running: HashMap<&str, &pools::Pool> =
            self.pools.iter().map(|pool| (pool.config().name.as_str(), pool)).collect();
        let pools = config.pools.iter().map(|pool| {
            let (key_path, changes, context) = (format!("pools[{}]", pool.name), changes.get(&pool.name), &context);
            let known = running.get(pool.name.as_str()).filter(|known| known.can_become(pool));
            async move {
                let plan = if let Some(known) = known {
                    PoolPlan::Update(Box::new(known.prepare_update(&key_path, pool, changes).await?))
                } else {
                    PoolPlan::New(Box::new(pools::prepare(&key_path, pool, &changes, Vec::new(), context).await?))
                };
                Ok::<_, StartError>(plan)
            }
        });
        // Side by side: each may wait for a name server.
        let pools = try_join_all(pools.collect::<Vec<_>>()).await?;
        let own: Vec<_> =
            self.listeners.iter().flat_map(|listener| listener.bound().filter_map(|bound| bound.ip())).collect();
        let mut listeners = Vec::new();
        for listener in &config.listeners {
            let is_open = self.listeners.iter().any(|open| open.can_become(listener));
            let key_path = format!("listeners[{}]", listener.name);
            let (name, interface) = (listener.name.as_str(), listener.interface.as_deref());
            let shared = |address: &Address| {
                let shared = self.listeners.iter().find_map(|open| open.share(address, interface));
                let is_managed = || self.listeners.iter().any(|open| open.is_managed_at(address));
                match (shared, interface) {
                    (Some(shared), _) => shared.map_err(|error| cannot_listen(&key_path, address.clone(), error)),
                    (None, Some(interface)) if is_managed() => Err(other_interface(name, address, interface)),
                    (None, _) => Ok(Sockets::default()),
                }
            };
            let bind = || bound::bind(&key_path, listener, &config, self.state.workers.len(), shared, &own);
            listeners.push(if is_open { None } else { Some(bind()?) });
        }
        let log = match (&config.access_log, &self.access_log) {
            (Some(log), None) => Some(open_log(log)?),
            // Reopening is the last fallible step, because it cannot be undone. Ringway also reopens an unchanged path,
            // because the file may have been rotated.
            (Some(log), Some((open, _))) => {
                let reopened = open.reopen(&log.path, log.format);
                reopened.map_err(|error| StartError::AccessLog { path: log.path.clone(), error })?;
                None
            }
            (None, _) => None,
        };
        Ok(ReloadPlan { file, changes, config, capacity, pools, listeners, log, report })
    }

    /// Applies a prepared reload. Open connections keep the settings that they started with. `hurry` ends the wait for
    /// new backends.
    pub(super) async fn go(&mut self, plan: ReloadPlan, hurry: CancellationToken) -> Report {
        let before = self.changes.clone();
        let ReloadPlan { file, changes, config, capacity, pools, listeners, log, report } = plan;
        capacity.warn();
        self.proxy.limit().resize(Some(capacity.connections));
        // A log that the new config does not have stays open for the connections that started with it.
        self.access_log = log.or(self.access_log.take());

        let mut old: HashMap<String, pools::Pool> =
            self.pools.drain(..).map(|pool| (pool.config().name.clone(), pool)).collect();
        let (mut gone, mut fresh) = (Vec::new(), Vec::new());
        for (pool, planned) in std::iter::zip(&config.pools, pools) {
            let pool = match (planned, old.remove(&pool.name)) {
                (PoolPlan::Update(update), Some(mut known)) => {
                    known.update(*update, &config, &self.environment).await;
                    let (was, is) = (before.get(&pool.name).drained, changes.get(&pool.name).drained);
                    for id in was.difference(&is) {
                        known.tell(Event::DrainCancelled { id: id.as_str().into() }).await;
                    }
                    known
                }
                (PoolPlan::New(prepared), replaced) => {
                    gone.extend(replaced);
                    // Two supervisors of the same containers would compete.
                    for (_, stop) in self.retiring.extract_if(.., |(name, _)| *name == pool.name) {
                        stop.cancel();
                    }
                    let started = prepared.start(&self.tasks);
                    let may_sleep = pool.provider.scaled().is_some_and(|scaled| scaled.scaling.min == 0);
                    if !may_sleep && !is_empty_on_purpose(&started.route, &started.provider) {
                        fresh.push(started.route.table.clone());
                    }
                    started
                }
                // `prepare` plans an update only for a pool that exists.
                (PoolPlan::Update(_), None) => continue,
            };
            self.pools.push(pool);
        }

        // Listeners switch to new pools only once those have a healthy backend. Until then the old pools serve.
        let all_healthy = async {
            for table in fresh {
                let mut changes = table.watch();
                while !table.load().any_healthy() && changes.changed().await.is_ok() {}
            }
        };
        let _ = hurry.run_until_cancelled(tokio::time::timeout(FRESH, all_healthy)).await;

        let kept = std::iter::zip(&config.listeners, &listeners).flat_map(|(listener, bound)| {
            let shared = bound.iter().flat_map(Bound::shared);
            shared.map(|address| (address.clone(), listener.interface.clone()))
        });
        let kept: HashSet<_> = kept.collect();
        let routes = pools::routes(&self.pools);
        let mut open: Vec<Listener> = std::mem::take(&mut self.listeners);
        for (listener, bound) in std::iter::zip(&config.listeners, listeners) {
            let context = listeners::ListenerContext {
                config: &config,
                routes: &routes,
                exporter: &self.state.exporter,
                intercept: &self.intercept,
                access_log: self.access_log.as_ref().filter(|_| config.access_log.is_some()).map(|(log, _)| log),
                workers: self.state.workers.len(),
            };
            let position = open.iter().position(|open| open.can_become(listener));
            self.listeners.push(match (bound, position) {
                (Some(bound), _) => Listener::open(bound, listener, &context, &mut self.proxy),
                (None, Some(position)) => {
                    let mut known = open.swap_remove(position);
                    known.update(listener, &context, &self.proxy);
                    known
                }
                (None, None) => continue,
            });
        }
        for listener in open {
            listener.close(&self.proxy, &kept);
        }
        gone.extend(old.into_values());
        for pool in gone {
            if pool.has_containers() {
                self.retiring.push((pool.config().name.clone(), pool.stop()));
            }
            pool.retire(&self.tasks);
        }
        // Whoever asks for the status after the answer must see the result.
        join_all(self.pools.iter().map(pools::Pool::settle)).await;
        (self.file, self.changes, self.config) = (file, changes, config);
        self.watch_config();
        self.show();
        report
    }
}

/// Checks again what the config parser has checked. Run-time changes, or keys that keep their running values, can break
/// it.
pub(super) fn check_together(config: &Config) -> Result<(), StartError> {
    if let Some(Fault { path, problem, .. }) = config.loop_fault() {
        return Err(StartError::Unfit { key_path: path, problem });
    }
    for pool in &config.pools {
        let fault = pool.provider.size_fault().or_else(|| pool.too_many_points()).or_else(|| pool.check_port_fault());
        if let Some(problem) = fault {
            return Err(StartError::Unfit { key_path: format!("pools[{}]", pool.name), problem });
        }
    }
    Ok(())
}
