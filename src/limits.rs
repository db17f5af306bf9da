//! The process's limit on open files: raised as far as it goes, and turned into a connection limit.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors kept for logs, the side port and forwarded requests.
const RESERVED: u64 = 64;

/// More than any machine serves; keeps sums small where the limit is "unlimited".
const MOST: u64 = 1_000_000;

/// Raises the soft limit on open files to the hard one. Returns the soft limit of before and of now.
pub fn raise_open_files() -> (u64, u64) {
    let limit = getrlimit(Resource::Nofile);
    let before = limit.current.unwrap_or(u64::MAX);
    if limit.current != limit.maximum {
        // Refused only by a sandbox; then the old limit stays and `connections` counts with it.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    }
    (before, open_files())
}

/// The soft limit on open files.
pub fn open_files() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// How many open files this process has at the moment; 0 where the system does not say.
pub fn open_files_now() -> u64 {
    std::fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count() as u64)
}

/// How many pipes the relay may hold under `open_files`: an eighth of the descriptors, two to a pipe.
pub fn pipes(open_files: u64) -> u64 {
    (open_files / 16).min(1024)
}

/// How many connections fit under `open_files`, two descriptors each, beside `pipes` pipes and `others` descriptors.
pub fn connections(open_files: u64, pipes: u64, others: u64) -> u64 {
    (open_files.saturating_sub(RESERVED + 2 * pipes + others) / 2).clamp(1, MOST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_and_pipes_fit_under_the_limit() {
        for files in [128, 256, 1024, 20_000, 1 << 30] {
            let pipes = pipes(files);
            let connections = connections(files, pipes, 20);
            assert!(2 * connections + 2 * pipes + RESERVED + 20 <= files, "{files}");
            assert!(connections >= 14, "{files}");
        }
        assert_eq!(connections(u64::MAX, pipes(u64::MAX), 0), MOST);
        assert_eq!(connections(10, 0, 0), 1);
    }
}
