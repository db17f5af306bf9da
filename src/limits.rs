//! The process's limit on open files: raises it to the maximum and derives the connection limit from it.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors reserved for logs, runtimes, the Docker engine and name lookups.
const RESERVED: u64 = 40;

/// Maximum connection limit, more than any machine serves; keeps sums small if open files are unlimited.
const MOST: u64 = 1_000_000;

/// Raises the soft limit on open files to the hard limit. Returns the soft limit before and after.
pub fn raise_open_files() -> (u64, u64) {
    let limit = getrlimit(Resource::Nofile);
    let before = limit.current.unwrap_or(u64::MAX);
    if limit.current != limit.maximum {
        // Only a sandbox refuses this. The old limit then stays, and `connections` uses it.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    }
    (before, open_files())
}

/// The soft limit on open files.
pub fn open_files() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Number of files that this process has open now; 0 if the system does not report it.
pub fn open_files_now() -> u64 {
    std::fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count() as u64)
}

/// The relay never uses more pipes.
pub const MOST_PIPES: u64 = 1024;

/// Number of pipes that the relay may use under `open_files`: an eighth of the descriptors, two per pipe.
pub fn pipes(open_files: u64) -> u64 {
    (open_files / 16).min(MOST_PIPES)
}

/// Number of connections to the side port under `open_files`. Each may need a second descriptor, for a forwarded request.
pub fn side_port(open_files: u64) -> u64 {
    (open_files / 16).clamp(8, 128)
}

/// Number of connections that fit under `open_files`, with two descriptors each, beside `pipes` pipes and `others`
/// other descriptors; `None`: not a single one.
pub fn connections(open_files: u64, pipes: u64, others: u64) -> Option<u64> {
    let most = open_files.saturating_sub(RESERVED + 2 * pipes + others) / 2;
    (most > 0).then(|| most.min(MOST))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_and_pipes_fit_under_the_limit() {
        for files in [128, 256, 1024, 20_000, 1 << 30] {
            let pipes = pipes(files);
            let others = 20 + 2 * side_port(files);
            let connections = connections(files, pipes, others).unwrap();
            assert!(2 * connections + 2 * pipes + RESERVED + others <= files, "{files}");
            assert!(connections >= 14, "{files}");
        }
        assert_eq!(connections(u64::MAX, pipes(u64::MAX), 0), Some(MOST));
        assert_eq!(connections(10, 0, 0), None);
    }
}
