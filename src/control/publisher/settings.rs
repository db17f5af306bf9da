//! The settings of a pool's table.

use std::time::Duration;

use crate::label_enum;
use crate::ring::Parameters;
use crate::table::Rules;

label_enum! {
    /// What Ringway does with the connections of a backend that goes down.
    pub enum OnDown {
        /// Keeps them open until one side closes.
        Keep => "keep",
        /// Resets them, so that clients reconnect and get another backend.
        Reset => "reset",
    }
}

/// Settings of a pool's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Parameters of the ring.
    pub parameters: Parameters,
    /// Whether backends must pass a check before they count as healthy.
    pub is_checked: bool,
    /// What decides which backends get connections.
    pub rules: Rules,
    /// What Ringway does with the connections of a backend that goes down.
    pub on_down: OnDown,
    /// Time that connections have when the provider says that their backend is drained.
    pub drain: Duration,
    /// Time over which a recovered backend gets back all of its keys; zero: at once.
    pub slow_start: Duration,
}

#[cfg(test)]
impl Settings {
    /// For tests: a ring of few points, no checks, and the usual rules.
    pub(crate) fn plain() -> Self {
        Self {
            parameters: Parameters { virtual_nodes: 10, probes: 3, seed: 0 },
            is_checked: false,
            rules: Rules { panic_below: 50, spill_below: 50, is_exclusive: false },
            on_down: OnDown::Keep,
            drain: Duration::ZERO,
            slow_start: Duration::ZERO,
        }
    }
}
