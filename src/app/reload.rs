//! Reload: moves the app from the running config to another one. Ringway first prepares the whole change, then applies
//! it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use futures_util::future::{join_all, try_join_all};
use tokio_util::sync::CancellationToken;

use super::changes::Changes;
use super::context::PoolContext;
use super::inheritance::Sockets;
use super::listeners::{self, Bound, Listener};
use super::pools::{self, Prepared, Update};
use super::{App, Log, StartError, capacity, engine, open_log};
use crate::config::diff::{Difference, differences};
use crate::config::{self, Config};
use crate::control::Event;
use crate::control::command::{Moved, Report};
use crate::control::provider;
use crate::ring::{Member, Ring};
use crate::table::Table;

/// Number of keys that are looked up on both the old and the new ring. The estimated share of moved keys is accurate to
/// half a percent.
const SAMPLED: u32 = 1 << 16;

/// A prepared change to another config. All fallible steps are done.
pub(super) struct ReloadPlan {
    /// The config as the file contains it, without run-time changes.
    file: Config,
    changes: Changes,
    /// The config with the run-time changes, and with the running values of the keys that require a restart.
    config: Config,
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
    /// Returns the config that would result from `file` and `changes`, and a report of the differences to the running
    /// config.
    pub(super) fn target(&self, file: &Config, changes: &Changes) -> (Config, Report) {
        let mut config = changes.over(file);
        let mut needs_restart = keep_fixed(&mut config, &self.config);
        let shown: Vec<Difference> = differences(&self.config, &config);
        needs_restart.sort();
        let of_slots = config.pools.iter().flat_map(|pool| self.slot_weights(pool, changes));
        let report = Report {
            changes: shown.iter().map(ToString::to_string).chain(of_slots).collect(),
            moved: self.moved(&config, changes),
            needs_restart,
        };
        (config, report)
    }

    /// The changes of the weights of a pool's slots, which no config holds.
    fn slot_weights(&self, pool: &config::Pool, changes: &Changes) -> Vec<String> {
        let (was, is) = (self.changes.get(&pool.name).weights, changes.get(&pool.name).weights);
        let is_supervised = pool.provider.replicas().is_some();
        let ids: BTreeSet<_> = was.keys().chain(is.keys()).filter(|_| is_supervised).collect();
        let weight = |weights: &BTreeMap<String, u32>, id: &String| weights.get(id).copied().unwrap_or(1);
        let pairs = ids.into_iter().map(|id| (id, weight(&was, id), weight(&is, id)));
        let changed = pairs.filter(|(_, was, is)| was != is);
        changed.map(|(id, was, is)| format!("pools[{}].slots[{id}].weight: {was} -> {is}", pool.name)).collect()
    }

    /// Prepares a reload to `file` with `changes`.
    ///
    /// # Errors
    /// Returns an error if any part of the new config cannot be prepared. In that case nothing has changed.
    pub(super) async fn prepare(&self, file: Config, changes: Changes) -> Result<ReloadPlan, StartError> {
        let changes = changes.pruned(&changes.over(&file));
        let (config, report) = self.target(&file, &changes);
        let engine = match &self.engine {
            None => engine(&config, self.environment.docker_host.as_deref())?,
            some => some.clone(),
        };
        let context = PoolContext {
            config: &config,
            engine: engine.as_ref(),
            environment: &self.environment,
            exporter: &self.state.exporter,
            is_start: false,
            stop_replicas: &self.tasks.stop_replicas,
            settled: self.is_settled.clone(),
        };
        check_sizes(&config)?;
        let pools = config.pools.iter().enumerate().map(|(n, pool)| {
            let (key_path, changes, context) = (format!("pools[{n}]"), changes.get(&pool.name), &context);
            let known = self.pools.iter().find(|known| known.config().name == pool.name && known.can_become(pool));
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
        let own: Vec<_> = self.listeners.iter().map(Listener::address).collect();
        let mut listeners = Vec::new();
        for (n, listener) in config.listeners.iter().enumerate() {
            let is_open = self.listeners.iter().any(|open| open.can_become(listener));
            let key_path = format!("listeners[{n}].listen");
            let bind =
                || listeners::bind(&key_path, listener, &config, self.state.workers.len(), Sockets::default(), &own);
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
        Ok(ReloadPlan { file, changes, config, pools, listeners, log, report })
    }

    /// Applies a prepared reload. Open connections keep the settings that they started with. `hurry` ends the wait for
    /// new backends.
    pub(super) async fn go(&mut self, plan: ReloadPlan, hurry: CancellationToken) -> Report {
        let before = self.changes.clone();
        let ReloadPlan { file, changes, config, pools, listeners, log, report } = plan;
        let (_, max_connections) = capacity(&config, self.state.workers.len());
        self.proxy.limit().resize(Some(max_connections));
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
                    fresh.push(started.route.table.clone());
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

        let mut open: Vec<Listener> = std::mem::take(&mut self.listeners);
        for (listener, bound) in std::iter::zip(&config.listeners, listeners) {
            let Some(pool) = self.pools.iter().find(|pool| pool.config().name == listener.pool) else { continue };
            let context = listeners::ListenerContext {
                config: &config,
                exporter: &self.state.exporter,
                intercept: &self.intercept,
                access_log: self.access_log.as_ref().filter(|_| config.access_log.is_some()).map(|(log, _)| log),
            };
            let position = open.iter().position(|open| open.can_become(listener));
            self.listeners.push(match (bound, position) {
                (Some(bound), _) => bound.open(listener, &pool.route, &context, &mut self.proxy),
                (None, Some(position)) => {
                    let mut known = open.swap_remove(position);
                    known.update(listener, &pool.route, &context, &self.proxy);
                    known
                }
                (None, None) => continue,
            });
        }
        for listener in open {
            listener.close(&self.proxy);
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
        self.show();
        report
    }

    /// Returns, for each pool whose ring would change, the share of keys that would move to another backend.
    fn moved(&self, config: &Config, changes: &Changes) -> Vec<Moved> {
        let moved = config.pools.iter().filter_map(|pool| {
            let known = self.pools.iter().find(|known| known.config().name == pool.name)?;
            let table = known.route.table.load();
            let members = members(pool, changes, &table);
            let views: Vec<_> = members.iter().map(|(id, weight)| Member { id, weight: *weight }).collect();
            let new = Ring::build(pool.ring, &views);
            if new.digest() == table.ring().digest() {
                return None;
            }
            let owner = |key: &[u8]| table.ring().lookup(key).map(|owner| &*table.backends()[owner].id);
            let moves = |key: &u32| {
                let key = key.to_le_bytes();
                owner(&key) != new.lookup(&key).map(|owner| views[owner].id)
            };
            let share = (0..SAMPLED).filter(moves).count() as f64 / f64::from(SAMPLED);
            // Four digits are precise enough for a person.
            let share = (share * 1e4).round() / 1e4;
            (share > 0.0).then(|| Moved { pool: pool.name.clone(), share })
        });
        moved.collect()
    }
}

/// Checks again what the config parser has checked. Run-time changes, or keys that keep their running values, can break
/// it.
pub(super) fn check_sizes(config: &Config) -> Result<(), StartError> {
    for (n, pool) in config.pools.iter().enumerate() {
        let fault = pool.provider.size_fault().or_else(|| pool.too_many_points());
        if let Some(problem) = fault {
            return Err(StartError::Pool { key_path: format!("pools[{n}]"), problem });
        }
    }
    Ok(())
}

/// Returns the members of a pool's ring under a config: ids and weights.
fn members(pool: &config::Pool, changes: &Changes, table: &Table) -> Vec<(String, u32)> {
    if let Some(backends) = pool.provider.static_backends() {
        return backends.iter().map(|backend| (backend.id.clone(), backend.weight)).collect();
    }
    if let Some(replicas) = pool.provider.replicas() {
        let weights = changes.get(&pool.name).weights;
        let slots = provider::slots(&pool.name, replicas);
        return slots.iter().map(|slot| (slot.to_string(), weights.get(&**slot).copied().unwrap_or(1))).collect();
    }
    // Nobody but the engine knows the discovered containers: they stay.
    table.backends().iter().map(|backend| (backend.id.to_string(), backend.weight)).collect()
}

/// Resets the keys of `new` that require a restart to their running values. Returns the key paths that differed.
fn keep_fixed(new: &mut Config, running: &Config) -> Vec<String> {
    let wanted = new.clone();
    new.workers = running.workers;
    new.relay = running.relay.clone();
    new.api = running.api.clone();
    new.docker = running.docker.clone();
    for pool in &mut new.pools {
        let Some(known) = running.pools.iter().find(|known| known.name == pool.name) else { continue };
        pool.provider.keep_fixed(&known.provider);
    }
    differences(new, &wanted).into_iter().map(|difference| difference.path).collect()
}
