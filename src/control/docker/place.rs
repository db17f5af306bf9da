//! Where Ringway itself is: the container it runs in, if any, and what follows from that: whose its replicas
//! are, and the network on which it reaches them.

use bollard::models::ContainerInspectResponse;

use super::engine::{Engine, EngineError};
use super::watch::{Freshness, Retry};

/// The owner outside of a compose project.
const DEFAULT_OWNER: &str = "ringway";

/// The engine's own default network.
const DEFAULT_NETWORK: &str = "bridge";

/// What compose writes on its containers.
pub(super) const COMPOSE_PROJECT: &str = "com.docker.compose.project";
pub(super) const COMPOSE_SERVICE: &str = "com.docker.compose.service";

/// Compose writes this on each of its containers too, but unlike the two above never on the images that it
/// builds, from which others would inherit it.
pub(super) const COMPOSE_ONEOFF: &str = "com.docker.compose.oneoff";

/// What the config says of owner and network; `None` stands for `auto`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Whose containers.
    pub owner: Option<String>,
    /// Where they are reached.
    pub network: Option<String>,
}

/// Owner and network, once they are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Whose containers.
    pub owner: String,
    /// Where they are reached.
    pub network: String,
}

/// Why there is no place yet.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// The engine did not answer.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Ringway's container is on no network, or on several.
    #[error(
        "network: auto does not say which network: Ringway's own container is on {0:?}; name the one on which it \
         reaches the replicas"
    )]
    Ambiguous(Vec<String>),
}

/// Tries to [`find`] it until it is found.
pub async fn wait_for(engine: &Engine, wanted: &Wanted, pool: &str, freshness: &Freshness) -> Place {
    let mut retry = Retry::default();
    loop {
        match find(engine, wanted).await {
            Ok(place) => return place,
            Err(error) => freshness.failed(pool, &error),
        }
        retry.wait().await;
    }
}

/// Looks Ringway's own container up where that is needed.
///
/// # Errors
/// When the engine does not answer, or `auto` is ambiguous.
pub async fn find(engine: &Engine, wanted: &Wanted) -> Result<Place, PlaceError> {
    if let (Some(owner), Some(network)) = (&wanted.owner, &wanted.network) {
        return Ok(Place { owner: owner.clone(), network: network.clone() });
    }
    let own = own_container(engine).await?;
    let owner = wanted.owner.clone().or_else(|| project(own.as_ref()?)).unwrap_or_else(|| DEFAULT_OWNER.to_owned());
    let network = match (&wanted.network, &own) {
        (Some(network), _) => network.clone(),
        (None, None) => DEFAULT_NETWORK.to_owned(),
        (None, Some(own)) => only_network(own)?,
    };
    Ok(Place { owner, network })
}

/// The same, and the compose project that Ringway's own container belongs to.
///
/// # Errors
/// When the engine does not answer, or `auto` is ambiguous.
pub async fn find_in_project(engine: &Engine, wanted: &Wanted) -> Result<(Place, Option<String>), PlaceError> {
    let place = find(engine, wanted).await?;
    let own = own_container(engine).await?;
    Ok((place, own.as_ref().and_then(project)))
}

fn project(own: &ContainerInspectResponse) -> Option<String> {
    let labels = own.config.as_ref()?.labels.as_ref()?;
    labels.contains_key(COMPOSE_ONEOFF).then(|| labels.get(COMPOSE_PROJECT).cloned())?
}

fn only_network(own: &ContainerInspectResponse) -> Result<String, PlaceError> {
    let networks = own.network_settings.as_ref().and_then(|settings| settings.networks.as_ref());
    let mut names: Vec<String> = networks.into_iter().flat_map(|networks| networks.keys().cloned()).collect();
    names.sort();
    match names.as_slice() {
        // On the host's own network every bridge can be reached.
        [host] if host == "host" => Ok(DEFAULT_NETWORK.to_owned()),
        [network] if network != "none" => Ok(network.clone()),
        _ => Err(PlaceError::Ambiguous(names)),
    }
}

/// The container that Ringway runs in; `None` outside of one, or with an engine that does not know it.
async fn own_container(engine: &Engine) -> Result<Option<ContainerInspectResponse>, EngineError> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let Some(id) = id_in_mounts(&mounts) else { return Ok(None) };
    match engine.inspect(id).await {
        Ok(own) => Ok(Some(own)),
        Err(error) if error.is_status(404) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The engine mounts `/etc/hostname` from a folder that is named by the container's id. Unlike the host name
/// and the control group this is there whatever the container is called and whichever version of control groups
/// the kernel has.
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
