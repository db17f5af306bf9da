//! Errors that keep the app from starting or make it exit unexpectedly.

use std::io;
use std::path::PathBuf;

use metrics_exporter_prometheus::BuildError;

use crate::address::Address;

/// The app cannot start, or cannot apply a config. The message names the config key and how to fix it.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A listen address cannot be bound.
    #[error("{key_path}: cannot listen on {address}: {error}{}", remedy(address, error))]
    Listen {
        /// Key path of the setting in the config.
        key_path: String,
        /// The configured listen address.
        address: Address,
        /// The error that the system reported.
        error: io::Error,
    },
    /// A host name cannot be resolved.
    #[error("{key_path}: cannot resolve {host:?}: {error}; check the name, or write an IP address")]
    Resolve {
        /// Key path of the setting in the config.
        key_path: String,
        /// The host name.
        host: String,
        /// The error that the system reported.
        error: io::Error,
    },
    /// A program does not exist or is not executable.
    #[error(
        "{key_path}: cannot find an executable program {program:?}; install it, make it executable, or write its full path"
    )]
    NoProgram {
        /// Key path of the setting in the config.
        key_path: String,
        /// The first element of the command.
        program: String,
    },
    /// The settings do not fit together, with run-time changes or with this machine.
    #[error("{key_path}: {problem}")]
    Unfit {
        /// Key path of the setting in the config.
        key_path: String,
        /// What is wrong and how to fix it.
        problem: String,
    },
    /// The system does not have enough free ports for the replicas.
    #[error("{key_path}: cannot reserve ports for the replicas: {error}; choose another range, or use auto")]
    NoPorts {
        /// Key path of the setting in the config.
        key_path: String,
        /// The error that the system reported.
        error: io::Error,
    },
    /// A pool needs a Docker engine, and `DOCKER_HOST` is not valid or no engine is set up.
    #[error("{0}")]
    Docker(String),
    /// The token of the side port cannot be read.
    #[error("api.token_file: {}: {problem}", path.display())]
    Token {
        /// Path of the token file.
        path: PathBuf,
        /// What is wrong with the file.
        problem: String,
    },
    /// The access log cannot be opened.
    #[error("access_log.path: cannot write {}: {error}", path.display())]
    AccessLog {
        /// Path of the access log.
        path: PathBuf,
        /// The error that the system reported.
        error: io::Error,
    },
    /// A thread cannot be started.
    #[error("cannot start the threads: {0}")]
    Threads(io::Error),
    /// The metrics exporter cannot be created.
    #[error("cannot set up metrics: {0}")]
    Metrics(#[from] BuildError),
}

impl StartError {
    /// Key path of the setting that the error is about; `None`: it is about none.
    pub fn key_path(&self) -> Option<&str> {
        match self {
            Self::Listen { key_path, .. }
            | Self::Resolve { key_path, .. }
            | Self::NoProgram { key_path, .. }
            | Self::Unfit { key_path, .. }
            | Self::NoPorts { key_path, .. } => Some(key_path),
            Self::Token { .. } => Some("api.token_file"),
            Self::AccessLog { .. } => Some("access_log.path"),
            Self::Docker(_) | Self::Threads(_) | Self::Metrics(_) => None,
        }
    }
}

fn remedy(address: &Address, error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse | io::ErrorKind::AlreadyExists if address.ip().is_none() => {
            "; another process already listens there, or the file is not a socket: stop the process, remove the file, or \
             choose another path"
        }
        io::ErrorKind::PermissionDenied if address.ip().is_none() => {
            "; Ringway's user may not create a file in this directory: change its permissions, or choose another path"
        }
        io::ErrorKind::NotFound if address.ip().is_none() => {
            "; the directory does not exist: create it, or choose another path"
        }
        io::ErrorKind::AddrInUse => {
            "; another program, perhaps another Ringway, already listens there: stop it, or choose another port"
        }
        io::ErrorKind::PermissionDenied => "; ports below 1024 need root or CAP_NET_BIND_SERVICE: choose a higher port",
        io::ErrorKind::AddrNotAvailable => {
            "; this machine does not have that address: choose an address that `ip address` lists"
        }
        _ => "",
    }
}

/// The app exited unexpectedly.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A worker thread ended. Its number counts from 0.
    #[error("worker {0} ended unexpectedly")]
    WorkerEnded(usize),
    /// A task of the control plane panicked.
    #[error("a task of the control plane panicked; see the log for the panic message")]
    TaskPanicked,
    /// The server of the side port stopped.
    #[error("the side port stopped")]
    SidePort,
}
