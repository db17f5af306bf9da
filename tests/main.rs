//! Black-box tests over real sockets, in one binary.
//!
//! Each starts the real app: in-process ([`harness::Ringway`]) or, where signals, limits or memory matter, as
//! the built program ([`harness::Program`]). Those in [`docker`] need a Docker engine and are ignored by default.
//! Random tests print their seed; `RINGWAY_TEST_SEED` gives it again.

mod harness;
mod health;

mod bytes;
mod changes;
mod closing;
mod command_line;
mod configs;
mod costs;
mod docker;
mod documents;
mod engine;
mod failover;
mod house;
mod limits;
mod reload;
mod replicas;
mod serving;
mod side_port;
mod upgrade;
