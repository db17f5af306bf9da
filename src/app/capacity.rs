//! Derives the maximum number of connections and pipes from the open-file limit.

use super::StartError;
use crate::config::{Config, Provider};
use crate::limits;

/// What fits under the open-file limit.
#[derive(Debug)]
pub(super) struct Capacity {
    /// Maximum number of pipes.
    pub(super) pipes: usize,
    /// Maximum number of connections.
    pub(super) connections: usize,
    /// The configured numbers that do not fit. Ringway lowers them.
    pub(super) lowered: Vec<StartError>,
}

/// Returns the maximum number of pipes and of connections: the configured values, capped by the open-file limit.
///
/// # Errors
/// When the limit leaves no room for a single connection.
pub(super) fn capacity(config: &Config, workers: usize) -> Result<Capacity, StartError> {
    let open_files = limits::open_files();
    let fitting = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
    let mut lowered = Vec::new();
    let mut at_most = |key: &str, wanted: usize, most: usize| {
        if wanted > most {
            lowered.push(StartError::Unfit {
                key_path: key.to_owned(),
                problem: format!(
                    "{wanted} is more than the limit on open files ({open_files}) allows, so Ringway uses {most}: raise the limit \
                     (ulimit -n), or lower {key}"
                ),
            });
        }
        wanted.min(most)
    };
    let share = fitting(limits::pipes(open_files));
    let pipes = match (config.relay.splice, config.relay.max_pipes) {
        (false, _) => 0,
        (true, None) => share,
        (true, Some(wanted)) => at_most("relay.max_pipes", wanted.min(limits::MOST_PIPES as usize), share),
    };
    // Each listening socket has a duplicate. Each worker needs descriptors for its runtime.
    let listening: usize = config.listeners.iter().map(|listener| listener.sockets(workers)).sum();
    let sockets = 2 * listening + 3 * workers;
    let needs = |provider: &Provider| provider.descriptors_per_backend() * provider.backends();
    let backends: usize = config.pools.iter().map(|pool| needs(&pool.provider)).sum();
    let others = (sockets + backends) as u64 + 2 * limits::side_port(open_files);
    let Some(most) = limits::connections(open_files, pipes as u64, others) else {
        let problem = format!(
            "the listeners and backends need about {others} descriptors, and the limit on open files is {open_files}: raise the \
             limit (ulimit -n), or configure fewer backends"
        );
        return Err(StartError::Unfit { key_path: "pools".to_owned(), problem });
    };
    let most = fitting(most);
    let connections = config.max_connections.map_or(most, |wanted| at_most("max_connections", wanted, most));
    Ok(Capacity { pipes, connections, lowered })
}

impl Capacity {
    /// Logs the numbers that do not fit.
    pub(super) fn warn(&self) {
        for problem in &self.lowered {
            tracing::warn!("{problem}");
        }
    }
}
