//! How many connections and pipes fit under the limit on open files.

use crate::config::Config;
use crate::limits;

/// Pipes and connections that fit under the limit on open files, or less where the config says so.
pub(super) fn capacity(config: &Config, workers: usize) -> (usize, usize) {
    let open_files = limits::open_files();
    let fitting = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
    let share = fitting(limits::pipes(open_files));
    let pipes = match (config.relay.splice, config.relay.max_pipes) {
        (false, _) => 0,
        (true, None) => share,
        (true, Some(wanted)) => at_most("relay.max_pipes", wanted, share, open_files),
    };
    // A listening socket for each worker, its copy, and what the runtime needs; a check for each backend, and for a
    // replica its port, its lifeline and its output too, and copies of them where they are handed over.
    let sockets = workers * (2 * config.listeners.len() + 3);
    let backends: usize = config.pools.iter().map(|pool| 12 * pool.provider.backends()).sum();
    let most = fitting(limits::connections(open_files, pipes as u64, (sockets + backends) as u64));
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
            "{key} is more than the limit on open files allows: raise it (ulimit -n), or lower {key}"
        );
    }
    wanted.min(most)
}
