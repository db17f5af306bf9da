//! Why the app could not start, or ended before it was told to.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use metrics_exporter_prometheus::BuildError;

/// Why the app could not start. The message names the place in the config and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An address cannot be listened on.
    #[error("{place}: cannot listen on {address}: {error}{}", remedy(error))]
    Listen {
        /// Key path.
        place: String,
        /// The address.
        address: SocketAddr,
        /// What the system says.
        error: io::Error,
    },
    /// A host name is unknown.
    #[error("{place}: cannot resolve {host:?}: {error}; check the name, or give an address")]
    Resolve {
        /// Key path.
        place: String,
        /// The name.
        host: String,
        /// What the system says.
        error: io::Error,
    },
    /// A program is not there.
    #[error(
        "{place}: there is no program {program:?} that could be run; install it, make it executable, or give its full path"
    )]
    NoProgram {
        /// Key path.
        place: String,
        /// The command's first word.
        program: String,
    },
    /// A pool cannot be as it is wanted.
    #[error("{place}: {problem}")]
    Pool {
        /// Key path.
        place: String,
        /// What is wrong, and the remedy.
        problem: String,
    },
    /// There are not enough free ports.
    #[error("{place}: cannot reserve ports for the replicas: {error}; choose another range, or auto")]
    NoPorts {
        /// Key path.
        place: String,
        /// What the system says.
        error: io::Error,
    },
    /// `DOCKER_HOST` is not an address.
    #[error("{0}")]
    Docker(String),
    /// The side port's token cannot be had.
    #[error("api.token_file: {}: {problem}", path.display())]
    Token {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The access log cannot be opened.
    #[error("access_log.path: cannot write {}: {error}", path.display())]
    AccessLog {
        /// The file.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// Threads cannot be started.
    #[error("cannot start the workers: {0}")]
    Workers(io::Error),
    /// The control plane's runtime does not take a socket.
    #[error("cannot serve the side port: {0}")]
    Runtime(io::Error),
    /// The metrics exporter cannot be built.
    #[error("cannot set up metrics: {0}")]
    Metrics(#[from] BuildError),
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            "; another program listens there, perhaps another Ringway: stop it, or choose another port"
        }
        io::ErrorKind::PermissionDenied => "; ports below 1024 need root or CAP_NET_BIND_SERVICE: choose a higher one",
        io::ErrorKind::AddrNotAvailable => "; this machine does not have that address: see `ip address`",
        _ => "",
    }
}

/// Why the app ended before it was told to.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A worker's thread ended.
    #[error("worker {0} ended unexpectedly")]
    WorkerEnded(usize),
    /// A task of the control plane panicked.
    #[error("a task of the control plane panicked; the log has its words")]
    TaskPanicked,
    /// The side port's server ended.
    #[error("the side port ended: {0}")]
    Api(io::Error),
}
