//! Every metric's name, labels and help, in one place, and the exporter that renders them.
//!
//! The data plane counts in atomics of its own; a scrape copies them into the exporter. Only histograms are
//! recorded as they happen, once or twice a connection.

use ::metrics::{Counter, Gauge, Histogram, Key, Label, Level, Metadata, Recorder as _, SharedString};
use std::time::Duration;

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use metrics_util::MetricKindMask;

/// A metric as it is documented and exported.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    /// Full name, with prefix and unit.
    pub name: &'static str,
    /// How its value behaves.
    pub kind: Kind,
    /// The names of its labels; their values come from the config and from enums only.
    pub labels: &'static [&'static str],
    /// One line for a person.
    pub help: &'static str,
}

/// How a metric's value behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Durations in seconds, in buckets.
    Histogram,
}

macro_rules! metrics {
    ($($id:ident: $kind:ident $name:literal [$($label:literal),*] $help:literal;)+) => {
        $(
            #[doc = $help]
            pub const $id: Metric =
                Metric { name: concat!("ringway_", $name), kind: Kind::$kind, labels: &[$($label),*], help: $help };
        )+

        /// Every metric there is.
        pub const ALL: &[Metric] = &[$($id),+];
    };
}

metrics! {
    ACCEPTED: Counter "connections_accepted_total" ["listener"] "Connections accepted; each is active, ended or refused";
    ACTIVE: Gauge "connections_active" ["listener"] "Connections open at the moment";
    ENDED: Counter "connections_ended_total" ["listener", "reason"] "Connections that were served and ended, by reason";
    REFUSED: Counter "connections_refused_total" ["listener", "reason"] "Connections reset because no backend could serve them, by reason";
    SOURCES_UNTRACKED: Counter "sources_untracked_total" ["listener"] "Connections let in unlimited because there were too many sources to keep count";
    ACCEPT_ERRORS: Counter "accept_errors_total" ["listener", "error"] "Failed accepts, by error";
    CONNECTION_SECONDS: Histogram "connection_seconds" ["listener"] "Time from accept to the end of a connection";
    CONNECT_ATTEMPTS: Counter "connect_attempts_total" ["pool", "backend"] "Connects to backends that were tried";
    CONNECT_FAILURES: Counter "connect_failures_total" ["pool", "backend", "cause"] "Connects to backends that failed, by cause";
    CONNECT_SECONDS: Histogram "connect_seconds" ["pool"] "Time of successful connects to backends";
    BYTES: Counter "bytes_total" ["pool", "backend", "direction", "path"] "Payload moved, by direction and by path (copied, spliced)";
    BACKEND_UP: Gauge "backend_up" ["pool", "backend"] "1 for a healthy backend, else 0";
    BACKEND_DRAINING: Gauge "backend_draining" ["pool", "backend"] "1 for a backend that gets no new connections, else 0";
    BACKEND_EJECTED: Gauge "backend_ejected" ["pool", "backend"] "1 for a backend that is out because connects to it kept failing, else 0";
    EJECTIONS: Counter "backend_ejections_total" ["pool", "backend"] "Times that a backend was ejected because connects to it kept failing";
    ADMISSION: Gauge "backend_admission_ratio" ["pool", "backend"] "Part of its keys that a backend takes; below 1 while it starts slowly";
    BACKEND_CONNECTIONS: Gauge "backend_connections_active" ["pool", "backend"] "Connections to a backend open at the moment";
    BACKEND_CONNECTIONS_TOTAL: Counter "backend_connections_total" ["pool", "backend"] "Connections made to a backend";
    REPLICA_RESTARTS: Counter "replica_restarts_total" ["pool", "backend"] "Replicas started in place of a dead one";
    CRASH_LOOP: Gauge "replica_crash_loop" ["pool", "backend"] "1 while a slot waits because its replicas keep dying, else 0";
    POOL_HEALTHY: Gauge "pool_backends_healthy" ["pool"] "Healthy backends of the pool";
    PANIC: Gauge "pool_panic" ["pool"] "1 while so few backends are healthy that all are tried, else 0";
    PANIC_PICKS: Counter "pool_panic_picks_total" ["pool"] "Connections whose backend was picked in panic, whatever its checks said";
    WALKED_PAST_FULL: Counter "backends_full_total" ["pool"] "Times that a backend was walked past because it had as many connections as it may have";
    CHANGED: Gauge "pool_runtime_changes" ["pool"] "Things that were changed at run time and differ from the config";
    ENGINE_UP: Gauge "engine_up" ["pool"] "1 while the pool's Docker engine answers, else 0";
    ENGINE_STALE: Gauge "engine_staleness_seconds" ["pool"] "Age of the last full list of containers";
    ENGINE_FAILURES: Counter "engine_failures_total" ["pool"] "Tries to reach the pool's Docker engine that failed";
    HEALTH_CHECKS: Counter "health_checks_total" ["pool", "backend", "result"] "Health checks done, by result (ok, failed)";
    RING_POINTS: Gauge "ring_points" ["pool"] "Points on the ring";
    RING_DIGEST: Gauge "ring_digest" ["pool"] "Upper 52 bits of the ring's digest: equal where instances pick alike";
    TABLE_GENERATION: Gauge "table_generation" ["pool"] "Tables published since the start";
    WORKER_CONNECTIONS: Gauge "worker_connections_active" ["worker"] "Connections that a worker serves at the moment";
    TASKS: Gauge "tasks" ["runtime"] "Tasks of a runtime: of each worker, by its number, and of the control plane";
    PIPES: Gauge "splice_pipes" ["worker"] "Pipes that a worker holds for splicing, in use or pooled";
    PIPE_SHORTAGES: Counter "splice_pipe_shortages_total" ["worker"] "Times a stream was copied because no pipe was to be had";
    ACCESS_LOG_LOST: Counter "access_log_lost_lines_total" [] "Lines that did not get into the access log: its writer was behind, or the file full";
    OPEN_FILES: Gauge "open_files" [] "File descriptors open at the moment";
    OPEN_FILES_LIMIT: Gauge "open_files_limit" [] "Most file descriptors that this process may have open";
    MAX_CONNECTIONS: Gauge "max_connections" [] "Most connections that are open at a time; more wait in the backlog";
    RELOADS: Counter "config_reloads_total" ["result"] "Reloads of the config, by result (ok, failed)";
    UPGRADES: Counter "upgrades_total" ["result"] "Tries to hand over to a new process, by result (ok, failed)";
    READY: Gauge "ready" [] "1 once every pool has had a healthy backend, 0 before and while stopping";
    UPTIME: Gauge "uptime_seconds" [] "Time since the start";
    BUILD_INFO: Gauge "build_info" ["version"] "1, with the version of this binary";
}

/// Bounds of the histograms' buckets, in seconds: from a connect on loopback to a long-lived connection.
const BUCKETS: [f64; 14] =
    [0.0001, 0.000_25, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 10.0, 60.0, 600.0];

/// A scrape sets what is there just before it is rendered. What was not set for this long belongs to a backend that
/// has left.
const GONE_AFTER: Duration = Duration::from_secs(1);

/// Holds the metrics of one app and renders them. Not global: several apps may live in one process.
pub struct Exporter {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
}

impl std::fmt::Debug for Exporter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Exporter")
    }
}

impl Exporter {
    /// An exporter that knows every metric and shows none yet.
    ///
    /// # Errors
    /// When the exporter does not take the buckets.
    pub fn new() -> Result<Self, BuildError> {
        let mut builder =
            PrometheusBuilder::new().idle_timeout(MetricKindMask::COUNTER | MetricKindMask::GAUGE, Some(GONE_AFTER));
        for metric in ALL.iter().filter(|metric| metric.kind == Kind::Histogram) {
            builder = builder.set_buckets_for_metric(Matcher::Full(metric.name.to_owned()), &BUCKETS)?;
        }
        let recorder = builder.build_recorder();
        for metric in ALL {
            let (name, help) = (metric.name.into(), SharedString::const_str(metric.help));
            match metric.kind {
                Kind::Counter => recorder.describe_counter(name, None, help),
                Kind::Gauge => recorder.describe_gauge(name, None, help),
                Kind::Histogram => recorder.describe_histogram(name, None, help),
            }
        }
        let handle = recorder.handle();
        Ok(Self { recorder, handle })
    }

    /// Sets a counter or gauge to what its source says; `values` in the order of the metric's labels.
    pub fn set(&self, metric: &Metric, values: &[&str], value: u64) {
        let key = key(metric, values);
        match metric.kind {
            Kind::Counter => self.counter(&key).absolute(value),
            Kind::Gauge => self.gauge(&key).set(value as f64),
            Kind::Histogram => debug_assert!(false, "{} is recorded, not set", metric.name),
        }
    }

    /// Sets a gauge that is not a whole number.
    pub fn set_fraction(&self, metric: &Metric, values: &[&str], value: f64) {
        self.gauge(&key(metric, values)).set(value);
    }

    /// The handle that a histogram's durations are recorded with.
    pub fn histogram(&self, metric: &Metric, values: &[&str]) -> Histogram {
        self.recorder.register_histogram(&key(metric, values), &METADATA)
    }

    /// Everything as Prometheus text.
    pub fn render(&self) -> String {
        self.handle.render()
    }

    /// Folds recorded durations into buckets. Without it they pile up between scrapes.
    pub fn upkeep(&self) {
        self.handle.run_upkeep();
    }

    fn counter(&self, key: &Key) -> Counter {
        self.recorder.register_counter(key, &METADATA)
    }

    fn gauge(&self, key: &Key) -> Gauge {
        self.recorder.register_gauge(key, &METADATA)
    }
}

static METADATA: Metadata<'static> = Metadata::new("ringway", Level::INFO, None);

fn key(metric: &Metric, values: &[&str]) -> Key {
    debug_assert_eq!(metric.labels.len(), values.len(), "{} has other labels", metric.name);
    let labels = std::iter::zip(metric.labels, values).map(|(&name, &value)| Label::new(name, value.to_owned()));
    Key::from_parts(metric.name, labels.collect::<Vec<_>>())
}
