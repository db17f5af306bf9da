//! The text of a scrape: reads all counters of the data plane and the control plane, metric by metric.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use super::{ListenerView, State};
use crate::backend::{Backend, Counters, Moved, State as BackendState};
use crate::control::docker::watch::EngineStatus;
use crate::control::provider::ChangeKind;
use crate::control::provider::dns::status::DnsStatus;
use crate::control::provider::file::FileStatus;
use crate::control::supervisor::rollout::RolloutStatus;
use crate::control::supervisor::scaling::ScalingStatus;
use crate::labels::{Label, Tally};
use crate::limits;
use crate::lossy_writer::LostLines;
use crate::metrics::text::{Format, Labels, Samples, Text};
use crate::metrics::{self, Metric, PerBackend};
use crate::proxy::Route;
use crate::proxy::stats::WorkerStats;
use crate::table::Table;

/// All metrics in this format, in pieces.
pub(super) fn text(state: &State, format: Format) -> Vec<Bytes> {
    let (mut text, view) = (Text::new(format), state.view());
    let pools: Vec<_> = view.pools.iter().map(OfPool::new).collect();
    listeners(&mut text, &view.listeners);
    for_pools(&mut text, &pools, &view.differs);
    let of_pools = std::iter::zip(&pools, &view.providers);
    engines(&mut text, of_pools.clone().filter_map(|(pool, view)| Some((&pool.labels, view.status.engine()?))));
    names(&mut text, of_pools.clone().filter_map(|(pool, view)| Some((&pool.labels, view.status.dns()?))));
    files(&mut text, of_pools.clone().filter_map(|(pool, view)| Some((&pool.labels, view.status.file()?))));
    rollouts(&mut text, of_pools.clone().filter_map(|(pool, view)| Some((&pool.labels, view.rollout.as_deref()?))));
    scalings(&mut text, of_pools.clone().filter_map(|(pool, view)| Some((&pool.labels, view.scaling.as_deref()?))));
    changes(&mut text, of_pools.filter_map(|(pool, view)| Some((&pool.labels, view.status.changes()?))));
    backends(&mut text, &pools, view.per_backend);
    limits_of_backends(&mut text, &pools, view.per_backend);
    workers(&mut text, state);
    process(&mut text, state);
    state.exporter.write(&mut text);
    text.finish()
}

/// A pool with the table of this scrape, and its labels.
struct OfPool<'a> {
    route: &'a Route,
    table: Arc<Table>,
    labels: Labels,
}

impl<'a> OfPool<'a> {
    fn new(route: &'a Route) -> Self {
        Self { route, table: route.table.load(), labels: Labels::new(&["pool"], &[&route.pool]) }
    }
}

fn listeners(text: &mut Text, listeners: &[ListenerView]) {
    let of = |listener: &ListenerView| Labels::new(&["listener"], &[&listener.name]);
    let listeners: Vec<_> = listeners.iter().map(|listener| (listener, of(listener))).collect();
    let mut each = |metric, add: &dyn Fn(&mut Samples<'_>, &Labels, &ListenerView)| {
        let mut samples = text.metric(metric);
        for (listener, labels) in &listeners {
            add(&mut samples, labels, listener);
        }
    };
    each(&metrics::ACCEPTED, &|samples, labels, listener| samples.add(labels, listener.stats.accepted()));
    each(&metrics::TAKEN_OVER, &|samples, labels, listener| samples.add(labels, listener.stats.taken_over()));
    each(&metrics::ACTIVE, &|samples, labels, listener| samples.add(labels, listener.stats.active()));
    each(&metrics::ENDED, &|samples, labels, listener| tally(samples, labels, |reason| listener.stats.ended(reason)));
    each(&metrics::REFUSED, &|samples, labels, listener| {
        tally(samples, labels, |reason| listener.stats.refused(reason));
    });
    each(&metrics::PROXY_HEADERS, &|samples, labels, listener| {
        counted(samples, labels, |result| listener.stats.proxy_headers(result));
    });
    each(&metrics::ROUTED, &|samples, _, listener| {
        for rule in listener.routing.rules.iter().filter(|_| listener.routing.has_rules()) {
            let labels = Labels::new(&["listener", "route"], &[&listener.name, &rule.name]);
            samples.add(&labels, rule.matched.load(Ordering::Relaxed));
        }
    });
    each(&metrics::HELLOS, &|samples, labels, listener| {
        counted(samples, labels, |result| listener.stats.hellos(result));
    });
    each(&metrics::HELLOS_WITH_ECH, &|samples, labels, listener| samples.add(labels, listener.stats.hellos_with_ech()));
    each(&metrics::ACCEPT_ERRORS, &|samples, labels, listener| {
        tally(samples, labels, |error| listener.stats.accept_errors(error));
    });
    each(&metrics::SOURCES_UNTRACKED, &|samples, labels, listener| {
        samples.add(labels, listener.sources.as_ref().map_or(0, |sources| sources.untracked()));
    });
}

fn for_pools<T>(text: &mut Text, pools: &[OfPool<'_>], differs: &[Vec<T>]) {
    let mut each = |metric, value: &dyn Fn(&OfPool<'_>) -> u64| {
        let mut samples = text.metric(metric);
        for pool in pools {
            samples.add(&pool.labels, value(pool));
        }
    };
    each(&metrics::PANIC, &|pool| pool.table.is_panic().into());
    each(&metrics::SPILLED, &|pool| pool.table.has_spilled().into());
    each(&metrics::PANIC_PICKS, &|pool| load(&pool.route.stats.picked_in_panic));
    each(&metrics::WALKED_PAST_FULL, &|pool| load(&pool.route.stats.walked_past_full));
    each(&metrics::RING_POINTS, &|pool| pool.table.ring().points() as u64);
    // A gauge is a double with 53 bits of precision, which holds the upper 52 bits of the digest exactly.
    each(&metrics::RING_DIGEST, &|pool| pool.table.ring().digest() >> 12);
    each(&metrics::TABLE_GENERATION, &|pool| pool.table.generation());
    each(&metrics::POOL_HEALTHY, &|pool| pool.table.healthy() as u64);
    let mut bounds = text.metric(&metrics::POOL_BOUND);
    for pool in pools {
        pool.route.bound.iter().for_each(|bound| bounds.add(&pool.labels, bound.percent()));
    }
    let mut skipped = text.metric(&metrics::SOURCES_SKIPPED);
    for pool in pools {
        for source in pool.route.outgoing.iter().flat_map(|outgoing| &outgoing.sources) {
            let labels = Labels::new(&["pool", "source"], &[&pool.route.pool, &source.to_string()]);
            skipped.add(&labels, pool.route.stats.source_skipped(*source));
        }
    }
    let mut changed = text.metric(&metrics::CHANGED);
    std::iter::zip(pools, differs).for_each(|(pool, differs)| changed.add(&pool.labels, differs.len()));
}

fn engines<'a>(text: &mut Text, pools: impl Iterator<Item = (&'a Labels, &'a EngineStatus)> + Clone) {
    let mut up = text.metric(&metrics::ENGINE_UP);
    pools.clone().for_each(|(labels, engine)| up.add(labels, u8::from(engine.is_fresh())));
    let mut stale = text.metric(&metrics::ENGINE_STALE);
    pools.clone().for_each(|(labels, engine)| stale.add(labels, engine.age().as_secs_f64()));
    let mut failures = text.metric(&metrics::ENGINE_FAILURES);
    pools.for_each(|(labels, engine)| failures.add(labels, engine.failures()));
}

fn names<'a>(text: &mut Text, pools: impl Iterator<Item = (&'a Labels, &'a DnsStatus)> + Clone) {
    let mut lookups = text.metric(&metrics::DNS_LOOKUPS);
    pools.clone().for_each(|(labels, dns)| counted(&mut lookups, labels, |outcome| dns.lookups.of(outcome)));
    let mut stale = text.metric(&metrics::DNS_STALE);
    pools.clone().for_each(|(labels, dns)| stale.add(labels, dns.age().as_secs_f64()));
    let mut backends = text.metric(&metrics::DNS_BACKENDS);
    pools.for_each(|(labels, dns)| backends.add(labels, dns.last().backends));
}

fn files<'a>(text: &mut Text, pools: impl Iterator<Item = (&'a Labels, &'a FileStatus)>) {
    let mut faulty = text.metric(&metrics::PROVIDER_FILE_FAULTY);
    pools.for_each(|(labels, file)| faulty.add(labels, u8::from(file.last().error.is_some())));
}

fn changes<'a>(text: &mut Text, pools: impl Iterator<Item = (&'a Labels, &'a Tally<ChangeKind>)>) {
    let mut changes = text.metric(&metrics::PROVIDER_CHANGES);
    pools.for_each(|(labels, of_pool)| tally(&mut changes, labels, |kind| of_pool.of(kind)));
}

fn rollouts<'a>(text: &mut Text, pools: impl Iterator<Item = (&'a Labels, &'a RolloutStatus)> + Clone) {
    let mut ended = text.metric(&metrics::ROLLOUTS);
    pools.clone().for_each(|(labels, rollout)| tally(&mut ended, labels, |result| rollout.results.of(result)));
    let mut progress = text.metric(&metrics::ROLLOUT_PROGRESS);
    for (labels, rollout) in pools {
        let view = rollout.view();
        progress.add(labels, if view.total == 0 { 1.0 } else { view.updated as f64 / view.total as f64 });
    }
}

fn scalings<'a>(text: &mut Text, pools: impl Iterator<Item = (&'a Labels, &'a ScalingStatus)>) {
    let scaling: Vec<_> = pools.filter_map(|(labels, scaling)| Some((labels, scaling, scaling.view()?))).collect();
    let mut replicas = text.metric(&metrics::SCALING_REPLICAS);
    for (labels, _, view) in &scaling {
        replicas.add(labels, view.wanted);
    }
    let mut changes = text.metric(&metrics::SCALING_CHANGES);
    for (labels, scaling, _) in &scaling {
        tally(&mut changes, labels, |one| scaling.changes.of(one));
    }
    let mut waiting = text.metric(&metrics::WAITING);
    for (labels, scaling, _) in scaling {
        waiting.add(labels, scaling.waiting.now() as u64);
    }
}

fn backends(text: &mut Text, pools: &[OfPool<'_>], per_backend: PerBackend) {
    if per_backend == PerBackend::Off {
        return;
    }
    let backends: Vec<(Labels, &Backend)> = pools
        .iter()
        .flat_map(|pool| {
            let labels = |backend: &Backend| Labels::new(&["pool", "backend"], &[&pool.route.pool, &backend.id]);
            pool.table.backends().iter().map(move |backend| (labels(backend), backend))
        })
        .collect();
    let mut each = |metric: &'static Metric, add: &dyn Fn(&mut Samples<'_>, &Labels, &Backend)| {
        if per_backend.shows(metric) {
            let mut samples = text.metric(metric);
            for (labels, backend) in &backends {
                add(&mut samples, labels, backend);
            }
        }
    };
    each(&metrics::BACKEND_CONNECTIONS, &|samples, labels, backend| samples.add(labels, load(&backend.live.active)));
    each(&metrics::BACKEND_DRAINING, &|samples, labels, backend| {
        samples.add(labels, u8::from(backend.state == BackendState::Draining));
    });
    // What stands beside a slot gets no connections: only the slot may be down.
    let mut of_slot = |metric, add: &dyn Fn(&mut Samples<'_>, &Labels, &Backend)| {
        each(metric, &|samples, labels, backend| {
            if backend.beside.is_none() {
                add(samples, labels, backend);
            }
        });
    };
    let mut is = |metric, states: &[BackendState]| {
        of_slot(metric, &|samples, labels, backend| samples.add(labels, u8::from(states.contains(&backend.state))));
    };
    is(&metrics::BACKEND_UP, &[BackendState::Healthy, BackendState::Standby]);
    is(&metrics::BACKEND_STANDBY, &[BackendState::Standby]);
    is(&metrics::BACKEND_EJECTED, &[BackendState::Ejected]);
    is(&metrics::CRASH_LOOP, &[BackendState::CrashLoop]);
    of_slot(&metrics::ADMISSION, &|samples, labels, backend| samples.add(labels, backend.admission.as_part()));
    of_slot(&metrics::REPLICA_RESTARTS, &|samples, labels, backend| samples.add(labels, backend.restarts));
    // An incarnation beside a slot continues the counters of the slot.
    let mut count = |metric, add: &dyn Fn(&mut Samples<'_>, &Labels, &Counters)| {
        each(metric, &|samples, labels, backend| {
            backend.counters().into_iter().for_each(|counters| add(samples, labels, counters));
        });
    };
    count(&metrics::EJECTIONS, &|samples, labels, of| samples.add(labels, load(&of.ejections)));
    count(&metrics::OUTPUT_LOST, &|samples, labels, of| samples.add(labels, load(&of.output_lost)));
    count(&metrics::BACKEND_CONNECTIONS_TOTAL, &|samples, labels, of| samples.add(labels, load(&of.total)));
    count(&metrics::CONNECT_ATTEMPTS, &|samples, labels, of| samples.add(labels, load(&of.attempts)));
    // Most backends never see most causes: a cause appears with its first failure.
    count(&metrics::CONNECT_FAILURES, &|samples, labels, of| counted(samples, labels, |cause| of.failures.of(cause)));
    count(&metrics::HEALTH_CHECKS, &|samples, labels, of| {
        samples.add_with(labels, "ok", load(&of.checks_passed));
        samples.add_with(labels, "failed", load(&of.checks_failed));
    });
    count(&metrics::BYTES, &|samples, labels, of| {
        for (direction, moved) in [("from_client", &of.from_client), ("to_client", &of.to_client)] {
            let Moved { copied, spliced } = moved;
            let labels = labels.and("direction", direction);
            samples.add_with(&labels, "copied", load(copied));
            samples.add_with(&labels, "spliced", load(spliced));
        }
    });
}

/// What bounds the connections of single backends. A pool without such a limit has none of these.
fn limits_of_backends(text: &mut Text, pools: &[OfPool<'_>], per_backend: PerBackend) {
    let labels =
        |pool: &OfPool<'_>, backend: &Backend| Labels::new(&["pool", "backend"], &[&pool.route.pool, &backend.id]);
    if per_backend.shows(&metrics::BACKEND_LIMIT) {
        let mut limits = text.metric(&metrics::BACKEND_LIMIT);
        for pool in pools {
            let of_pool = std::iter::zip(pool.table.backends(), pool.route.limits(&pool.table));
            of_pool
                .for_each(|(backend, limit)| limit.iter().for_each(|&limit| limits.add(&labels(pool, backend), limit)));
        }
    }
    if per_backend.shows(&metrics::BOUND_DISPLACED) {
        let mut displaced = text.metric(&metrics::BOUND_DISPLACED);
        for pool in pools.iter().filter(|pool| pool.route.bound.is_some()) {
            let backends = pool.table.backends().iter();
            backends.for_each(|backend| {
                let counters = backend.counters().into_iter();
                counters.for_each(|of| displaced.add(&labels(pool, backend), load(&of.displaced)));
            });
        }
    }
}

fn workers(text: &mut Text, state: &State) {
    let numbers: Vec<_> = (0..state.workers.len()).map(|number| number.to_string()).collect();
    let mut each = |metric: &'static Metric, of: fn(&WorkerStats) -> &AtomicU64| {
        let mut samples = text.metric(metric);
        for (number, stats) in std::iter::zip(&numbers, &state.workers) {
            samples.add(&Labels::new(metric.labels, &[number]), load(of(stats)));
        }
    };
    each(&metrics::WORKER_CONNECTIONS, |stats| &stats.connections);
    each(&metrics::PIPES, |stats| &stats.pipes);
    each(&metrics::PIPE_SHORTAGES, |stats| &stats.pipe_shortages);
    let mut tasks = text.metric(&metrics::TASKS);
    for (number, stats) in std::iter::zip(&numbers, &state.workers) {
        tasks.add(&Labels::new(&["runtime"], &[number]), load(&stats.tasks));
    }
    for (name, runtime) in &state.runtimes {
        tasks.add(&Labels::new(&["runtime"], &[name]), runtime.metrics().num_alive_tasks());
    }
}

fn process(text: &mut Text, state: &State) {
    let view = state.view();
    let none = Labels::new(&[], &[]);
    let mut one = |metric, value: u64| text.metric(metric).add(&none, value);
    let lost = |lines: &Option<LostLines>| lines.as_ref().map_or(0, LostLines::count);
    one(&metrics::ACCESS_LOG_LOST, lost(&view.access_log_lost));
    one(&metrics::LOG_LOST, lost(&view.log_lost));
    one(&metrics::OPEN_FILES, limits::open_files_now());
    one(&metrics::OPEN_FILES_LIMIT, limits::open_files());
    one(&metrics::MAX_CONNECTIONS, state.limit.size() as u64);
    one(&metrics::READY, state.ready.load(Ordering::Relaxed).into());
    tally(&mut text.metric(&metrics::RELOADS), &none, |outcome| state.reloads.of(outcome));
    let differs = state.config_error.load().is_some();
    text.metric(&metrics::CONFIG_DIFFERS).add(&none, u8::from(differs));
    tally(&mut text.metric(&metrics::UPGRADES), &none, |outcome| state.upgrades.of(outcome));
    tally(&mut text.metric(&metrics::API_REJECTED), &none, |rejection| state.guard.rejections().of(rejection));
    text.metric(&metrics::UPTIME).add(&none, state.started.elapsed().as_secs_f64());
    text.metric(&metrics::BUILD_INFO).add(&Labels::new(&["version"], &[crate::VERSION]), 1);
}

/// Adds every counter.
fn tally<L: Label>(samples: &mut Samples<'_>, labels: &Labels, count: impl Fn(L) -> u64) {
    for &label in L::ALL {
        samples.add_with(labels, label.as_str(), count(label));
    }
}

/// Adds the counters that are not zero.
fn counted<L: Label>(samples: &mut Samples<'_>, labels: &Labels, count: impl Fn(L) -> u64) {
    let counted = L::ALL.iter().map(|&label| (label, count(label))).filter(|(_, count)| *count > 0);
    counted.for_each(|(label, count)| samples.add_with(labels, label.as_str(), count));
}

fn load(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}
