//! Black-box tests over real sockets, in one binary.
//!
//! Each test starts the app in this process ([`harness::Ringway`]). Tests of signals, limits or memory start the
//! built program ([`harness::program::Program`]). The tests in [`docker`] need a Docker engine and are ignored by
//! default. Random tests print their seed, and `RINGWAY_TEST_SEED` sets it.

mod harness;
mod health;

mod agent;
mod backends_file;
mod balance;
mod bytes;
mod changes;
mod closing;
mod command_line;
mod config_watch;
mod configs;
mod costs;
mod dns;
mod docker;
mod documents;
mod engine;
mod explain;
mod failover;
mod hand_over;
mod house;
mod kubernetes;
mod limits;
mod listeners;
mod moving;
mod names;
mod openapi;
mod page;
mod prometheus;
mod proxy_protocol;
mod real_servers;
mod recipes;
mod reload;
mod replicas;
mod rollouts;
mod routes;
mod scaling;
mod service_manager;
mod serving;
mod sessions;
mod side_port;
mod sources;
mod stalls;
mod terminal;
mod tiers;
mod unix;
mod upgrade;
