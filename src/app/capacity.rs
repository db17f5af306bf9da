//! Derives the maximum number of connections and pipes from the open-file limit.

use crate::config::{Config, Provider};
use crate::limits;

/// Returns the maximum number of pipes and of connections: the configured values, capped by the open-file limit.
pub(super) fn capacity(config: &Config, workers: usize) -> (usize, usize) {
    let open_files = limits::open_files();
    let fitting = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
    let share = fitting(limits::pipes(open_files));
    let pipes = match (config.relay.splice, config.relay.max_pipes) {
        (false, _) => 0,
        (true, None) => share,
        (true, Some(wanted)) => at_most("relay.max_pipes", wanted, share, open_files),
    };
    // Each worker needs a listening socket and a duplicate of it per listener, and descriptors for its runtime.
    let sockets = workers * (2 * config.listeners.len() + 3);
    let needs = |provider: &Provider| provider.descriptors_per_backend() * provider.backends();
    let backends: usize = config.pools.iter().map(|pool| needs(&pool.provider)).sum();
    let side_port = 2 * limits::side_port(open_files);
    let most = fitting(limits::connections(open_files, pipes as u64, (sockets + backends) as u64 + side_port));
    let connections =
        config.max_connections.map_or(most, |wanted| at_most("max_connections", wanted, most, open_files));
    (pipes, connections)
}

fn at_most(key: &str, wanted: usize, most: usize, open_files: u64) -> usize {
    if wanted > most {
        tracing::warn!(
            wanted,
            open_files,
            using = most,
            "{key} exceeds what the open-file limit allows: raise the limit (ulimit -n), or lower {key}"
        );
    }
    wanted.min(most)
}
