//! The scope of Ringway's containers: their owner, and the network on which Ringway reaches them. Both may follow from
//! the container that Ringway itself runs in.

use bollard::models::ContainerInspectResponse;

use super::engine::{Engine, EngineError};
use super::label;
use super::watch::{EngineStatus, Retry};

/// The owner outside of a compose project.
const DEFAULT_OWNER: &str = "ringway";

/// The engine's own default network.
const DEFAULT_NETWORK: &str = "bridge";

/// Labels that compose writes on its containers.
pub(super) const COMPOSE_PROJECT: &str = "com.docker.compose.project";
pub(super) const COMPOSE_SERVICE: &str = "com.docker.compose.service";

/// A label that compose writes on each of its containers too. Unlike the two above, compose never writes it on the
/// images that it builds, from which other containers would inherit it.
pub(super) const COMPOSE_ONEOFF: &str = "com.docker.compose.oneoff";

/// Owner and network as configured; `None` stands for `auto`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScopeSettings {
    /// Owner of the containers.
    pub owner: Option<String>,
    /// Network on which Ringway reaches them.
    pub network: Option<String>,
}

/// The resolved owner and network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    /// Owner of the containers.
    pub owner: String,
    /// Network on which Ringway reaches them.
    pub network: String,
}

impl Scope {
    /// The labels of all containers of a pool, as the engine's filters take them.
    pub(in crate::control) fn labels(&self, pool: &str) -> Vec<String> {
        vec![format!("{}={}", label::OWNER, self.owner), format!("{}={pool}", label::POOL), label::SLOT.to_owned()]
    }
}

/// Why Ringway could not find its scope.
#[derive(Debug, thiserror::Error)]
pub enum ScopeError {
    /// The engine did not answer.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Ringway's own container is on no usable network, or on several.
    #[error(
        "network: auto is ambiguous: Ringway's own container is on {0:?}; name the network on which it \
         reaches the replicas"
    )]
    Ambiguous(Vec<String>),
}

/// Retries [`find`] until it succeeds.
pub async fn wait_for(engine: &Engine, settings: &ScopeSettings, pool: &str, engine_status: &EngineStatus) -> Scope {
    let mut retry = Retry::default();
    loop {
        match find(engine, settings).await {
            Ok(scope) => return scope,
            Err(error) => engine_status.failed(pool, &error),
        }
        retry.wait().await;
    }
}

/// Finds owner and network. Inspects Ringway's own container if one of them is `auto`.
///
/// # Errors
/// When the engine does not answer, or `auto` is ambiguous.
pub async fn find(engine: &Engine, settings: &ScopeSettings) -> Result<Scope, ScopeError> {
    if let (Some(owner), Some(network)) = (&settings.owner, &settings.network) {
        return Ok(Scope { owner: owner.clone(), network: network.clone() });
    }
    let own = own_container(engine).await?;
    let owner = settings.owner.clone().or_else(|| project(own.as_ref()?)).unwrap_or_else(|| DEFAULT_OWNER.to_owned());
    let network = match (&settings.network, &own) {
        (Some(network), _) => network.clone(),
        (None, None) => DEFAULT_NETWORK.to_owned(),
        (None, Some(own)) => only_network(own)?,
    };
    Ok(Scope { owner, network })
}

/// Like [`find`], and also returns the compose project of Ringway's own container.
///
/// # Errors
/// When the engine does not answer, or `auto` is ambiguous.
pub async fn find_in_project(engine: &Engine, settings: &ScopeSettings) -> Result<(Scope, Option<String>), ScopeError> {
    let scope = find(engine, settings).await?;
    let own = own_container(engine).await?;
    Ok((scope, own.as_ref().and_then(project)))
}

fn project(own: &ContainerInspectResponse) -> Option<String> {
    let labels = own.config.as_ref()?.labels.as_ref()?;
    labels.contains_key(COMPOSE_ONEOFF).then(|| labels.get(COMPOSE_PROJECT).cloned())?
}

fn only_network(own: &ContainerInspectResponse) -> Result<String, ScopeError> {
    let networks = own.network_settings.as_ref().and_then(|settings| settings.networks.as_ref());
    let mut names: Vec<String> = networks.into_iter().flat_map(|networks| networks.keys().cloned()).collect();
    names.sort();
    match names.as_slice() {
        // From the host network Ringway reaches every bridge.
        [host] if host == "host" => Ok(DEFAULT_NETWORK.to_owned()),
        [network] if network != "none" => Ok(network.clone()),
        _ => Err(ScopeError::Ambiguous(names)),
    }
}

/// The container that Ringway runs in; `None` outside of a container, or if the engine does not know it.
async fn own_container(engine: &Engine) -> Result<Option<ContainerInspectResponse>, EngineError> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let Some(id) = id_in_mounts(&mounts) else { return Ok(None) };
    match engine.inspect(id).await {
        Ok(own) => Ok(Some(own)),
        Err(error) if error.is_status(404) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Finds the container's id in the mounts. The engine mounts `/etc/hostname` from a folder named by the container's id.
/// Unlike the host name and the control group, this does not depend on the container's name or on the version of
/// control groups in the kernel.
fn id_in_mounts(mounts: &str) -> Option<&str> {
    let line = mounts.lines().find(|line| line.split(' ').nth(4) == Some("/etc/hostname"))?;
    let id = line.split("/containers/").nth(1)?.split('/').next()?;
    (id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit())).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_finds_its_id_among_its_mounts() {
        let id = "d43c".repeat(16);
        let mounts = format!(
            "622 620 0:5 / /proc rw - proc proc rw\n\
             640 610 8:1 /var/lib/docker/containers/{id}/resolv.conf /etc/resolv.conf rw - ext4 /dev/sda1 rw\n\
             641 610 8:1 /var/lib/docker/containers/{id}/hostname /etc/hostname rw,relatime - ext4 /dev/sda1 rw\n"
        );
        assert_eq!(id_in_mounts(&mounts), Some(id.as_str()));
        assert_eq!(id_in_mounts("641 610 8:1 /etc/hostname /etc/hostname rw - ext4 /dev/sda1 rw"), None);
        assert_eq!(id_in_mounts(""), None);
    }
}
