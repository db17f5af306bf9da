//! How Ringway sees a Docker engine. The engine may be unreachable, hang or restart at any time: every call has a
//! deadline, and the last known state stays in use until Ringway sees a newer one.
//!
//! # Layout
//!
//! - [`engine`]: the calls that Ringway makes, and their errors
//! - [`credentials`]: credentials for registries
//! - [`mod@pull`]: pulls an image
//! - [`container`]: a container as a full list shows it
//! - [`watch`]: fetches a full list whenever something may have changed
//! - [`scope`]: the owner of the containers, and the network on which Ringway reaches them
//! - [`signals`]: the numbers of signals
//! - [`reap`]: removes containers that are no longer needed

pub mod container;
pub mod credentials;
pub mod engine;
pub mod reap;
pub mod scope;
pub mod watch;

mod pull;
mod signals;

/// Labels of containers.
pub mod label {
    /// The owner of the container. A Ringway with another owner does not touch it.
    pub const OWNER: &str = "ringway.owner";
    /// The pool of the container, which Ringway has created or discovers.
    pub const POOL: &str = "ringway.pool";
    /// The slot that the container fills.
    pub const SLOT: &str = "ringway.slot";
    /// The network of the container.
    pub const NETWORK: &str = "ringway.network";
    /// The port on which the container listens.
    pub const PORT: &str = "ringway.port";
    /// Digest of the settings that the container was created from.
    pub const SPEC: &str = "ringway.spec";
    /// Weight of a discovered container, 0 to 1000.
    pub const WEIGHT: &str = "ringway.weight";
    /// Tier of a discovered container.
    pub const TIER: &str = "ringway.tier";
    /// Maximum of open connections of a discovered container.
    pub const MAX_CONNECTIONS: &str = "ringway.max_connections";
    /// How a discovered container is checked: `tcp`, `off`, or a path for HTTP.
    pub const CHECK: &str = "ringway.check";
    /// The port of this check.
    pub const CHECK_PORT: &str = "ringway.check.port";
    /// The labels of discovered containers, which their owners write.
    pub const OF_BACKENDS: [&str; 7] = [POOL, PORT, WEIGHT, TIER, MAX_CONNECTIONS, CHECK, CHECK_PORT];
    /// The labels that only Ringway writes, on the containers that it creates.
    pub const OF_REPLICAS: [&str; 4] = [OWNER, SLOT, NETWORK, SPEC];
    /// Labels that compose writes on the images it builds. Containers of such an image must not inherit them, or
    /// compose would treat them as its own.
    pub const OF_IMAGES: [&str; 2] = [super::scope::COMPOSE_PROJECT, super::scope::COMPOSE_SERVICE];
    /// Prefix of all of Ringway's own labels.
    pub const PREFIX: &str = "ringway.";
}
