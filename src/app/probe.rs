//! What `ringway check` tries out: whether a config could start on this machine. It changes nothing.

use std::io::{self, ErrorKind};
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

use futures_util::future::join_all;
use rustix::fs::{Access, access};

use super::access::guard;
use super::bound::{binding, cannot_listen};
use super::capacity::capacity;
use super::pools::probe_outgoing;
use super::{StartError, engine, provider, reload, workers};
use crate::address::Address;
use crate::config::Config;
use crate::control::docker::engine::Engine;
use crate::proxy::access_log;
use crate::proxy::socket::{Binding, TcpOptions, unbound};

/// Something that a start would find missing.
#[derive(Debug)]
pub struct Finding {
    /// Whether Ringway would not start. Otherwise it starts, without what is missing.
    pub is_fatal: bool,
    /// What is missing, with its key path and the remedy.
    pub problem: StartError,
}

/// Tries what a start with this config needs: names, programs, files, addresses, descriptors and the Docker engine.
/// `docker_host`: the value of `DOCKER_HOST`. `token`: the token of the side port, if the environment has one.
pub async fn probe(config: &Config, docker_host: Option<&str>, token: Option<&str>) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut tell = |is_fatal, problem| findings.push(Finding { is_fatal, problem });
    match capacity(config, workers(config)) {
        Ok(capacity) => {
            for problem in capacity.lowered {
                tell(false, problem);
            }
        }
        Err(problem) => tell(true, problem),
    }
    if let Err(problem) = guard(&config.api, token) {
        tell(true, problem);
    }
    if let Err(problem) = reload::check_together(config) {
        tell(true, problem);
    }
    for problem in addresses(config) {
        tell(true, problem);
    }
    if let Some(log) = &config.access_log
        && let Err(error) = access_log::is_writable(&log.path)
    {
        tell(true, StartError::AccessLog { path: log.path.clone(), error });
    }
    let engine = engine(config, docker_host).unwrap_or_else(|problem| {
        tell(true, problem);
        None
    });
    let engine = match engine {
        Some(engine) => match away(&engine).await {
            Some(problem) => {
                tell(false, problem);
                None
            }
            None => Some(engine),
        },
        None => None,
    };
    for pool in &config.pools {
        if let Err(problem) = probe_outgoing(&format!("pools[{}]", pool.name), pool) {
            tell(true, problem);
        }
    }
    let pools = config.pools.iter().map(|pool| {
        let (key_path, engine) = (format!("pools[{}]", pool.name), engine.as_ref());
        async move { provider::probe(&key_path, pool, engine).await }
    });
    for (is_fatal, problem) in join_all(pools).await.into_iter().flatten() {
        tell(is_fatal, problem);
    }
    findings
}

/// The addresses on which Ringway may not listen. An address that is taken does not count: a running Ringway may have it.
fn addresses(config: &Config) -> Vec<StartError> {
    let refused = |key_path: &str, address: Address, binding: Binding<'_>| {
        let error = bind(&address, binding).err().filter(|error| error.kind() != ErrorKind::AddrInUse)?;
        Some(cannot_listen(key_path, address, error))
    };
    let of_listeners = config.listeners.iter().filter_map(|listener| {
        let key_path = format!("listeners[{}]", listener.name);
        // What one port of a range lacks, the others lack too.
        listener.addresses().find_map(|address| refused(&key_path, address, binding(listener)))
    });
    refused("api", config.api.listen.into(), Binding::default()).into_iter().chain(of_listeners).collect()
}

/// Binds an address without listening, so no client can connect. Creates no file of a Unix socket.
fn bind(address: &Address, binding: Binding<'_>) -> io::Result<()> {
    match address {
        // A Ringway that starts at this moment can still bind the address.
        Address::Ip(ip) => unbound(*ip, &TcpOptions::default(), binding)?.bind(&(*ip).into()),
        Address::Unix(path) => {
            if path.exists() && !std::fs::metadata(path)?.file_type().is_socket() {
                return Err(ErrorKind::AlreadyExists.into());
            }
            let folder = path.parent().unwrap_or(Path::new("/"));
            Ok(access(folder, Access::WRITE_OK | Access::EXEC_OK)?)
        }
    }
}

/// The error of an engine that does not answer.
async fn away(engine: &Engine) -> Option<StartError> {
    let error = engine.has_network("bridge").await.err()?;
    Some(StartError::Docker(format!("the Docker engine at {} does not answer: {error}", engine.host())))
}
