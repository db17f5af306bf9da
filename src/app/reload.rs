//! From the config that runs to another one: what that takes is prepared as a whole, and only then done.

use std::collections::HashMap;
use std::time::Duration;

use super::changes::Changes;
use super::listeners::{self, Bound, Listener};
use super::pools::{self, Prepared, Update};
use super::{App, Log, StartError, capacity, engine, open_log};
use crate::config::diff::{Difference, differences};
use crate::config::{self, Config, Provider};
use crate::control::Event;
use crate::control::operator::{Moved, Report};
use crate::control::provider;
use crate::ring::{Member, Ring};
use crate::table::Table;

/// Keys that are looked up on the old ring and on the new one. The share that moves is met to within half a percent.
const SAMPLED: u32 = 1 << 16;

/// The way to another config; all that can fail has been done.
pub(super) struct Way {
    /// As the file has it.
    file: Config,
    changes: Changes,
    /// With the changes, and without what takes another process.
    config: Config,
    pools: Vec<PoolStep>,
    listeners: Vec<Option<Bound>>,
    /// A log that was not open before.
    log: Option<Log>,
    pub(super) report: Report,
}

/// How long listeners wait for new pools to have a healthy backend.
const FRESH: Duration = Duration::from_secs(10);

enum PoolStep {
    New(Box<Prepared>),
    Update(Box<Update>),
}

impl App {
    /// What would become of `file` and `changes`, and what that would change.
    pub(super) fn target(&self, file: &Config, changes: &Changes) -> (Config, Report) {
        let mut config = changes.over(file);
        let mut needs_restart = keep_fixed(&mut config, &self.config);
        let shown: Vec<Difference> = differences(&self.config, &config);
        needs_restart.sort();
        let report = Report {
            changes: shown.iter().map(ToString::to_string).collect(),
            moved: self.moved(&config, changes),
            needs_restart,
        };
        (config, report)
    }

    /// Prepares the way to `file` with `changes`.
    ///
    /// # Errors
    /// When anything of it is not to be had; then nothing has changed.
    pub(super) async fn prepare(&self, file: Config, changes: Changes) -> Result<Way, StartError> {
        let changes = changes.pruned(&changes.over(&file));
        let (config, report) = self.target(&file, &changes);
        let engine = match &self.engine {
            None => engine(&config, self.environment.docker_host.as_deref())?,
            some => some.clone(),
        };
        let means = pools::Means {
            config: &config,
            engine: engine.as_ref(),
            environment: &self.environment,
            exporter: &self.state.exporter,
            stop_replicas: &self.tasks.stop_replicas,
            settled: self.is_settled.clone(),
        };
        check_sizes(&config)?;
        let mut pools = Vec::new();
        for (n, pool) in config.pools.iter().enumerate() {
            let (place, changes) = (format!("pools[{n}]"), changes.get(&pool.name));
            let known = self.pools.iter().find(|known| known.config().name == pool.name && known.can_become(pool));
            pools.push(if let Some(known) = known {
                PoolStep::Update(Box::new(known.prepare_update(&place, pool, changes).await?))
            } else {
                PoolStep::New(Box::new(pools::prepare(&place, pool, &changes, Vec::new(), &means).await?))
            });
        }
        let mut listeners = Vec::new();
        for (n, listener) in config.listeners.iter().enumerate() {
            let is_open = self.listeners.iter().any(|open| open.can_become(listener));
            let place = format!("listeners[{n}].listen");
            let bind = || listeners::bind(&place, listener, &config, self.state.workers.len(), Vec::new());
            listeners.push(if is_open { None } else { Some(bind()?) });
        }
        let log = match (&config.access_log, &self.access_log) {
            (Some(log), None) => Some(open_log(log)?),
            // The last that may fail, because it cannot be taken back. Also where it is the same: it may be rotated.
            (Some(log), Some((open, _))) => {
                let reopened = open.reopen(&log.path, log.format);
                reopened.map_err(|error| StartError::AccessLog { path: log.path.clone(), error })?;
                None
            }
            (None, _) => None,
        };
        Ok(Way { file, changes, config, pools, listeners, log, report })
    }

    /// Goes the way. Connections that are open go on as they began.
    pub(super) async fn go(&mut self, way: Way) -> Report {
        let before = self.changes.clone();
        let Way { file, changes, config, pools, listeners, log, report } = way;
        let (_, max_connections) = capacity(&config, self.state.workers.len());
        self.proxy.limit().resize(Some(max_connections));
        // One that is not wanted any more stays open for the connections that began with it.
        self.access_log = log.or(self.access_log.take());

        let mut old: HashMap<String, pools::Pool> =
            self.pools.drain(..).map(|pool| (pool.config().name.clone(), pool)).collect();
        let (mut gone, mut fresh) = (Vec::new(), Vec::new());
        for (pool, step) in std::iter::zip(&config.pools, pools) {
            let pool = match (step, old.remove(&pool.name)) {
                (PoolStep::Update(update), Some(mut known)) => {
                    known.update(*update, &config, &self.environment).await;
                    let (was, is) = (before.get(&pool.name).drained, changes.get(&pool.name).drained);
                    for id in was.difference(&is) {
                        known.tell(Event::Undrained { id: id.as_str().into() }).await;
                    }
                    known
                }
                (PoolStep::New(prepared), replaced) => {
                    gone.extend(replaced);
                    // Two that look after the same containers would fight.
                    for (_, stop) in self.retiring.extract_if(.., |(name, _)| *name == pool.name) {
                        stop.cancel();
                    }
                    let started = prepared.start(&mut self.tasks);
                    fresh.push(started.route.table.clone());
                    started
                }
                // `prepare` has found it among the known ones.
                (PoolStep::Update(_), None) => continue,
            };
            self.pools.push(pool);
        }

        // Listeners change over only once there is somebody to serve: until then the old pools do.
        let _ = tokio::time::timeout(FRESH, async {
            for table in fresh {
                let mut changes = table.watch();
                while !table.load().any_healthy() && changes.changed().await.is_ok() {}
            }
        })
        .await;

        let mut open: Vec<Listener> = std::mem::take(&mut self.listeners);
        for (listener, bound) in std::iter::zip(&config.listeners, listeners) {
            let Some(pool) = self.pools.iter().find(|pool| pool.config().name == listener.pool) else { continue };
            let means = listeners::Means {
                config: &config,
                exporter: &self.state.exporter,
                intercept: &self.intercept,
                access_log: self.access_log.as_ref().filter(|_| config.access_log.is_some()).map(|(log, _)| log),
            };
            let position = open.iter().position(|open| open.can_become(listener));
            self.listeners.push(match (bound, position) {
                (Some(bound), _) => bound.open(listener, &pool.route, &means, &mut self.proxy),
                (None, Some(position)) => {
                    let mut known = open.swap_remove(position);
                    known.update(listener, &pool.route, &means, &self.proxy);
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
            pool.retire(&mut self.tasks);
        }
        (self.file, self.changes, self.config) = (file, changes, config);
        self.show();
        report
    }

    /// For each pool whose ring would be another, the share of keys that get another backend.
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
            // What a person compares.
            Some(Moved { pool: pool.name.clone(), share: (share * 1e4).round() / 1e4 })
        });
        moved.collect()
    }
}

/// What reading the config has seen to, and changes at run time or keys that take another process may have undone.
pub(super) fn check_sizes(config: &Config) -> Result<(), StartError> {
    for (n, pool) in config.pools.iter().enumerate() {
        let fault = match &pool.provider {
            Provider::Static(backends) if backends.is_empty() => {
                Some("has no backend left: put back one that was removed at run time".to_owned())
            }
            Provider::Process(process) => process.ports.and_then(|(first, last)| {
                let too_few = u32::from(last - first) + 1 < process.replicas;
                too_few.then(|| format!("{} replicas do not fit into the ports {first}-{last}", process.replicas))
            }),
            _ => None,
        };
        let fault = fault.or_else(|| pool.too_many_points());
        if let Some(problem) = fault {
            return Err(StartError::Pool { place: format!("pools[{n}]"), problem });
        }
    }
    Ok(())
}

/// The members of a pool's ring, as a config wants them.
fn members(pool: &config::Pool, changes: &Changes, table: &Table) -> Vec<(String, u32)> {
    match &pool.provider {
        Provider::Static(backends) => backends.iter().map(|backend| (backend.id.clone(), backend.weight)).collect(),
        Provider::Discover(_) => {
            table.backends().iter().map(|backend| (backend.id.to_string(), backend.weight)).collect()
        }
        supervised => {
            let weights = changes.get(&pool.name).weights;
            let slots = provider::slots(&pool.name, supervised.replicas().unwrap_or_default());
            slots.iter().map(|slot| (slot.to_string(), weights.get(&**slot).copied().unwrap_or(1))).collect()
        }
    }
}

/// Puts back into `new` what takes another process. Returns the key paths where it differed.
fn keep_fixed(new: &mut Config, running: &Config) -> Vec<String> {
    let wanted = new.clone();
    new.workers = running.workers;
    new.relay = running.relay.clone();
    new.api = running.api.clone();
    new.docker = running.docker.clone();
    for pool in &mut new.pools {
        let Some(known) = running.pools.iter().find(|known| known.name == pool.name) else { continue };
        match (&mut pool.provider, &known.provider) {
            (Provider::Process(pool), Provider::Process(known)) => pool.ports = known.ports,
            (Provider::Containers(pool), Provider::Containers(known)) => pool.network.clone_from(&known.network),
            _ => {}
        }
    }
    differences(new, &wanted).into_iter().map(|difference| difference.path).collect()
}
