//! The definition of every metric (name, kind, labels, help text), the exporter of histograms, and the [`text`] of a scrape.
//!
//! The data plane keeps its counters in its own atomics, and a scrape reads them there. Only histograms are recorded as
//! events happen, once or twice per connection.

use ::metrics::{Histogram, Key, Label, Level, Metadata, Recorder as _, SharedString};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

use self::text::Text;
use crate::label_enum;

pub mod text;

/// The definition of a metric, as documented and exported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metric {
    /// Full name, including the `ringway_` prefix and the unit.
    pub name: &'static str,
    /// Counter, gauge or histogram.
    pub kind: Kind,
    /// Label names. Label values come only from the config and from enums, which bounds the number of series.
    pub labels: &'static [&'static str],
    /// The help text: one line, exported as `# HELP`.
    pub help: &'static str,
}

/// The type of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A count that only increases.
    Counter,
    /// A value that goes up and down.
    Gauge,
    /// A distribution of durations in seconds, or of lengths in bytes, counted in buckets.
    Histogram,
}

macro_rules! metrics {
    ($($id:ident: $kind:ident $name:literal [$($label:literal),*] $help:literal;)+) => {
        $(
            #[doc = $help]
            pub const $id: Metric =
                Metric { name: concat!("ringway_", $name), kind: Kind::$kind, labels: &[$($label),*], help: $help };
        )+

        /// All metrics that Ringway exports.
        pub const ALL: &[Metric] = &[$($id),+];
    };
}

metrics! {
    ACCEPTED: Counter "connections_accepted_total" ["listener"] "Accepted connections. With those taken over, they are the active, ended and refused ones";
    TAKEN_OVER: Counter "connections_taken_over_total" ["listener"] "Open connections that the old process has handed over in an upgrade";
    ACTIVE: Gauge "connections_active" ["listener"] "Open connections";
    ENDED: Counter "connections_ended_total" ["listener", "reason"] "Served connections that ended, by reason";
    REFUSED: Counter "connections_refused_total" ["listener", "reason"] "Connections reset without being served, by reason";
    PROXY_HEADERS: Counter "proxy_headers_total" ["listener", "result"] "Connections that may begin with a PROXY header, by what Ringway found";
    ROUTED: Counter "routes_total" ["listener", "route"] "Connections that took a route of a listener, `default` among them; only for listeners with routes";
    HELLOS: Counter "hellos_total" ["listener", "result"] "Connections whose ClientHello Ringway needs, by what it found";
    HELLOS_WITH_ECH: Counter "hellos_with_ech_total" ["listener"] "ClientHellos with the extension for an encrypted ClientHello; many browsers always send it";
    HELLO_BYTES: Histogram "hello_bytes" ["listener"] "Length of ClientHellos";
    SOURCES_UNTRACKED: Counter "sources_untracked_total" ["listener"] "Connections admitted without limits because the source table was full";
    ACCEPT_ERRORS: Counter "accept_errors_total" ["listener", "error"] "Failed accepts, by error";
    CONNECTION_SECONDS: Histogram "connection_seconds" ["listener"] "Time from accept to the end of a connection";
    CONNECT_ATTEMPTS: Counter "connect_attempts_total" ["pool", "backend"] "Connect attempts to a backend";
    CONNECT_FAILURES: Counter "connect_failures_total" ["pool", "backend", "cause"] "Failed connect attempts to a backend, by cause";
    CONNECT_SECONDS: Histogram "connect_seconds" ["pool"] "Time of successful connects to backends";
    BYTES: Counter "bytes_total" ["pool", "backend", "direction", "path"] "Payload bytes forwarded, by direction and by path (copied, spliced)";
    BACKEND_UP: Gauge "backend_up" ["pool", "backend"] "1 while a backend is healthy or on standby, else 0";
    BACKEND_STANDBY: Gauge "backend_standby" ["pool", "backend"] "1 while a backend of an exclusive pool is on standby and gets no connections, else 0";
    BACKEND_DRAINING: Gauge "backend_draining" ["pool", "backend"] "1 while a backend is draining and receives no new connections, else 0";
    BACKEND_EJECTED: Gauge "backend_ejected" ["pool", "backend"] "1 while a backend is ejected because connects kept failing, else 0";
    EJECTIONS: Counter "backend_ejections_total" ["pool", "backend"] "Ejections of a backend because connects kept failing";
    ADMISSION: Gauge "backend_admission_ratio" ["pool", "backend"] "Share of its keys that a backend accepts; below 1 during slow start and on the advice of its agent";
    BACKEND_CONNECTIONS: Gauge "backend_connections_active" ["pool", "backend"] "Open connections to a backend";
    BACKEND_CONNECTIONS_TOTAL: Counter "backend_connections_total" ["pool", "backend"] "Connections established to a backend";
    REPLICA_RESTARTS: Counter "replica_restarts_total" ["pool", "backend"] "Replicas started in the place of an earlier one, also after planned stops";
    OUTPUT_LOST: Counter "replica_output_lost_lines_total" ["pool", "backend"] "Lines of a replica's output that were not logged because it wrote too many";
    CRASH_LOOP: Gauge "replica_crash_loop" ["pool", "backend"] "1 while a slot is in restart backoff because its replicas keep dying, else 0";
    POOL_HEALTHY: Gauge "pool_backends_healthy" ["pool"] "Healthy backends in the pool";
    PANIC: Gauge "pool_panic" ["pool"] "1 while the pool is in panic mode: too few backends are healthy, so Ringway uses all of them; else 0";
    SPILLED: Gauge "pool_spilled" ["pool"] "1 while backends beyond the lowest tier of the pool get keys, else 0";
    PANIC_PICKS: Counter "pool_panic_picks_total" ["pool"] "Connections whose backend was picked in panic mode, regardless of its health";
    WALKED_PAST_FULL: Counter "backends_full_total" ["pool"] "Times a backend was skipped because it was at its connection limit";
    POOL_BOUND: Gauge "pool_bound" ["pool"] "The most connections of a backend, in percent of its fair share; only for pools with a bound";
    BOUND_DISPLACED: Counter "bound_displaced_total" ["pool", "backend"] "Connections that went to another backend because this one, to which their keys lead, was at its bound; only for pools with a bound";
    BACKEND_LIMIT: Gauge "backend_connection_limit" ["pool", "backend"] "The most connections that a backend may have now; only for backends with a limit or a bound";
    SOURCES_SKIPPED: Counter "connect_source_skipped_total" ["pool", "source"] "Connects that a source address of the pool could not make: all its ports were taken, or the machine did not have it";
    CHANGED: Gauge "pool_runtime_changes" ["pool"] "Settings changed at run time that differ from the config";
    ENGINE_UP: Gauge "engine_up" ["pool"] "1 while the pool's Docker engine answers, else 0";
    ENGINE_STALE: Gauge "engine_staleness_seconds" ["pool"] "Age of the last complete container list";
    ENGINE_FAILURES: Counter "engine_failures_total" ["pool"] "Failed attempts to reach the pool's Docker engine";
    DNS_LOOKUPS: Counter "dns_lookups_total" ["pool", "result"] "Look-ups of the pool's name, by result";
    DNS_STALE: Gauge "dns_staleness_seconds" ["pool"] "Age of the last complete answer to a look-up of the pool's name";
    DNS_BACKENDS: Gauge "dns_addresses" ["pool"] "Addresses, or targets of SRV records, that the pool's name has led to and that have not left";
    ROLLOUTS: Counter "rollouts_total" ["pool", "result"] "Rollouts that have ended, by result; only for pools with replicas";
    ROLLOUT_PROGRESS: Gauge "rollout_progress" ["pool"] "Share of the pool's slots whose replica is from the current settings, from 0 to 1; only for pools with replicas";
    SCALING_REPLICAS: Gauge "scaling_replicas" ["pool"] "Replicas that the pool should have now; 0 while it sleeps. Only for pools that scale by themselves";
    SCALING_CHANGES: Counter "scaling_changes_total" ["pool", "direction"] "Changes of that number, by direction (up, down); only for pools that scale by themselves";
    WAITING: Gauge "pool_waiting_connections" ["pool"] "Connections that wait while the pool wakes; only for pools that scale by themselves";
    PROVIDER_CHANGES: Counter "provider_changes_total" ["pool", "kind"] "Changes of the backends by the pool's name or file, by kind (joined, changed, left)";
    PROVIDER_FILE_FAULTY: Gauge "provider_file_faulty" ["pool"] "1 while the pool's file of backends cannot be applied and the last list stays, else 0";
    HEALTH_CHECKS: Counter "health_checks_total" ["pool", "backend", "result"] "Completed health checks, by result (ok, failed)";
    RING_POINTS: Gauge "ring_points" ["pool"] "Points on the ring";
    RING_DIGEST: Gauge "ring_digest" ["pool"] "Upper 52 bits of the ring digest; instances with equal digests pick the same backend for a key";
    TABLE_GENERATION: Gauge "table_generation" ["pool"] "Tables published since the process started";
    WORKER_CONNECTIONS: Gauge "worker_connections_active" ["worker"] "Open connections of a worker";
    TASKS: Gauge "tasks" ["runtime"] "Live tasks of a runtime (a worker's number, or a thread of the control plane: control, checks, api)";
    PIPES: Gauge "splice_pipes" ["worker"] "Splice pipes of a worker, in use or pooled";
    PIPE_SHORTAGES: Counter "splice_pipe_shortages_total" ["worker"] "Times a stream was copied because the pipe pool was exhausted";
    ACCESS_LOG_LOST: Counter "access_log_lost_lines_total" [] "Access log lines that were dropped because the writer fell behind or a write failed";
    LOG_LOST: Counter "log_lost_lines_total" [] "Log lines that were dropped because standard error was not read in time";
    OPEN_FILES: Gauge "open_files" [] "Open file descriptors";
    OPEN_FILES_LIMIT: Gauge "open_files_limit" [] "Limit of open file descriptors for this process";
    MAX_CONNECTIONS: Gauge "max_connections" [] "Limit of open connections; further connections wait in the backlog";
    RELOADS: Counter "config_reloads_total" ["result"] "Config reloads, by result (ok, failed)";
    CONFIG_DIFFERS: Gauge "config_file_differs" [] "1 while the last reload of the config file failed or was held, so that an earlier config runs, else 0";
    UPGRADES: Counter "upgrades_total" ["result"] "Binary upgrades attempted, by result (ok, failed)";
    API_REJECTED: Counter "api_rejected_total" ["reason"] "Calls to the side port that were rejected, by reason";
    READY: Gauge "ready" [] "1 once every pool has had a healthy backend; 0 before that and during shutdown";
    UPTIME: Gauge "uptime_seconds" [] "Time since the process started";
    BUILD_INFO: Gauge "build_info" ["version"] "Always 1; the label carries the version of this binary";
}

label_enum! {
    /// Which metrics each backend has. A pool of thousands makes a long text of them.
    pub enum PerBackend {
        /// All.
        Full => "full",
        /// Whether it is up or draining, and its connections, failed connects and bytes.
        Compact => "compact",
        /// None: only the pool's.
        Off => "off",
    }
}

impl PerBackend {
    /// Whether a metric with the label `backend` is shown.
    pub fn shows(self, metric: &Metric) -> bool {
        const COMPACT: [&str; 7] = [
            BACKEND_UP.name,
            BACKEND_STANDBY.name,
            BACKEND_DRAINING.name,
            BACKEND_CONNECTIONS.name,
            BACKEND_CONNECTIONS_TOTAL.name,
            CONNECT_FAILURES.name,
            BYTES.name,
        ];
        match self {
            Self::Full => true,
            Self::Compact => COMPACT.contains(&metric.name),
            Self::Off => false,
        }
    }
}

/// Upper bounds of the histogram buckets in seconds, from a loopback connect to a long-lived connection.
const BUCKETS: [f64; 14] =
    [0.0001, 0.000_25, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 10.0, 60.0, 600.0];

/// Upper bounds of the histogram buckets in bytes: from a small ClientHello to the largest that a listener may accept.
const BYTE_BUCKETS: [f64; 8] = [256.0, 512.0, 1024.0, 1536.0, 2048.0, 4096.0, 16384.0, 65536.0];

/// Holds the histograms of one app. It is not global, because several apps can run in one process. All other values are in
/// counters of the parts that count, and each scrape reads them there.
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
    /// Creates an exporter without histograms.
    ///
    /// # Errors
    /// Returns an error if the Prometheus builder rejects the histogram buckets.
    pub fn new() -> Result<Self, BuildError> {
        let mut builder = PrometheusBuilder::new();
        let histograms = ALL.iter().filter(|metric| metric.kind == Kind::Histogram);
        for metric in histograms.clone() {
            let buckets = if *metric == HELLO_BYTES { &BYTE_BUCKETS[..] } else { &BUCKETS };
            builder = builder.set_buckets_for_metric(Matcher::Full(metric.name.to_owned()), buckets)?;
        }
        let recorder = builder.build_recorder();
        for metric in histograms {
            recorder.describe_histogram(metric.name.into(), None, SharedString::const_str(metric.help));
        }
        let handle = recorder.handle();
        Ok(Self { recorder, handle })
    }

    /// Returns the handle that records durations in a histogram.
    pub fn histogram(&self, metric: &Metric, values: &[&str]) -> Histogram {
        self.recorder.register_histogram(&key(metric, values), &METADATA)
    }

    /// Writes all histograms.
    pub fn write(&self, text: &mut Text) {
        // Writing to a text cannot fail.
        let _ = self.handle.render_to_write(text);
    }

    /// Moves recorded durations into buckets. Call it regularly, or durations accumulate in memory between scrapes.
    pub fn upkeep(&self) {
        self.handle.run_upkeep();
    }
}

static METADATA: Metadata<'static> = Metadata::new("ringway", Level::INFO, None);

fn key(metric: &Metric, values: &[&str]) -> Key {
    debug_assert_eq!(metric.labels.len(), values.len(), "{} has a different number of labels", metric.name);
    let labels = std::iter::zip(metric.labels, values).map(|(&name, &value)| Label::new(name, value.to_owned()));
    Key::from_parts(metric.name, labels.collect::<Vec<_>>())
}
