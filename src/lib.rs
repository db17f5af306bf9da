//! Ringway: a Layer-4 TCP load balancer on a consistent-hash ring, with self-healing replicas.
//!
//! Two halves that never name each other, and one [`table`] between them: the control plane decides which
//! backends there are and in what state; the data plane reads that and moves bytes.
//!
//! # Layout
//!
//! In the order in which a connection meets them:
//!
//! - [`app`]: the only wiring place; binds, spawns, shuts down
//! - [`proxy`]: the data plane, from accept to the closing account of a connection
//! - [`ring`]: which backend a key belongs to; pure
//! - [`table`]: the snapshot that the data plane reads, and its atomic swap
//! - [`backend`]: one member of a pool: identity, address, state, counters
//! - [`control`]: providers, supervisor and health checks, and the publisher that writes the table
//! - [`api`]: the HTTP side port
//! - [`metrics`]: every metric's name, labels and help
//! - [`config`]: the YAML file and its faults
//!
//! [`http_client`], [`handover`], [`labels`] and [`limits`] are leaves that several of them use.

pub mod api;
pub mod app;
pub mod backend;
pub mod config;
pub mod control;
pub mod handover;
pub mod http_client;
pub mod labels;
pub mod limits;
pub mod metrics;
pub mod proxy;
pub mod ring;
pub mod table;

/// Ringway's version, as in `ringway --version`, status and metrics.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
