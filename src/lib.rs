//! Ringway: a Layer-4 TCP load balancer on a consistent-hash ring, with self-healing replicas.
//!
//! The control plane and the data plane do not depend on each other; the [`table`] connects them. The control plane
//! decides which backends exist and sets their states. The data plane reads the table and moves bytes.
//!
//! # Layout
//!
//! From the wiring down to the parts:
//!
//! - [`app`]: connects all other modules; binds sockets, starts tasks and shuts down
//! - [`proxy`]: the data plane, from accept to the final accounting of a connection
//! - [`ring`]: maps keys to backends; pure
//! - [`table`]: the snapshot that the data plane reads, and its atomic swap
//! - [`backend`]: one member of a pool: identity, address, state and counters
//! - [`control`]: providers, supervisor, health checks, and the publisher that writes the table
//! - [`api`]: the HTTP side port; [`events`]: the last events, which it shows
//! - [`metrics`]: the name, labels and help text of every metric
//! - [`config`]: the YAML file and its validation
//!
//! Several of these modules use [`address`], [`stream`], [`networks`], [`proxy_header`], [`client_hello`], [`http_client`],
//! [`handover`], [`file_watch`], [`labels`], [`limits`], [`lossy_writer`], [`outgoing`] and [`text`].

pub mod address;
pub mod api;
pub mod app;
pub mod backend;
pub mod client_hello;
pub mod config;
pub mod control;
pub mod events;
pub mod file_watch;
pub mod handover;
pub mod http_client;
pub mod labels;
pub mod limits;
pub mod lossy_writer;
pub mod metrics;
pub mod networks;
pub mod outgoing;
pub mod proxy;
pub mod proxy_header;
pub mod ring;
pub mod stream;
pub mod table;
pub mod text;

/// Ringway's version, as shown by `ringway --version`, the status and the metrics.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
