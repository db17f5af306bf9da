//! How Ringway sees a Docker engine. The engine may be away, hang or be restarted at any time: every call has a
//! deadline, and what was seen last holds until something newer is seen.
//!
//! # Layout
//!
//! - [`engine`]: the calls that Ringway makes, and whose fault it is when they fail
//! - [`container`]: a container as a full list shows it
//! - [`watch`]: full lists, whenever something may have changed
//! - [`place`]: which container, owner and network Ringway itself has
//! - [`reap`]: removes what is not needed any more

pub mod container;
pub mod engine;
pub mod place;
pub mod reap;
pub mod watch;

/// Labels of the containers that Ringway makes.
pub mod label {
    /// Whose it is: no other Ringway touches it.
    pub const OWNER: &str = "ringway.owner";
    /// The pool that it was made for.
    pub const POOL: &str = "ringway.pool";
    /// The slot that it fills.
    pub const SLOT: &str = "ringway.slot";
    /// The network that it was put on.
    pub const NETWORK: &str = "ringway.network";
    /// The port on which it listens.
    pub const PORT: &str = "ringway.port";
    /// Digest of the settings that it was made from.
    pub const SPEC: &str = "ringway.spec";
    /// Labels that compose writes on the images it builds. Containers of such an image must not inherit them, or
    /// compose would take them for its own.
    pub const OF_IMAGES: [&str; 2] = [super::place::COMPOSE_PROJECT, super::place::COMPOSE_SERVICE];
    /// What all labels of Ringway's own begin with.
    pub const PREFIX: &str = "ringway.";
}
