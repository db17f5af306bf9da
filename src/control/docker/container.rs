//! A container as a full list shows it.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use bollard::models::{ContainerSummary, ContainerSummaryStateEnum, EndpointSettings};

/// A container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    /// The engine's id of it.
    pub id: Arc<str>,
    /// Its name, without the slash that the API puts before it.
    pub name: Arc<str>,
    /// Its labels.
    pub labels: HashMap<String, String>,
    /// Whether it runs.
    pub state: State,
    /// What the health check in its image says; `None` without one or before its first verdict.
    pub healthy: Option<bool>,
    /// Its address on each network.
    pub addresses: HashMap<String, IpAddr>,
}

/// Whether a container runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It was never started.
    Created,
    /// It runs, or is paused: its processes are there.
    Running,
    /// It has ended.
    Dead,
    /// It is being removed, and will be gone in a moment.
    Removing,
}

impl Container {
    /// The value of a label; empty where there is none.
    pub fn label(&self, name: &str) -> &str {
        self.labels.get(name).map_or("", String::as_str)
    }
}

impl From<ContainerSummary> for Container {
    fn from(summary: ContainerSummary) -> Self {
        let name = summary.names.unwrap_or_default().into_iter().next().unwrap_or_default();
        let state = match summary.state {
            Some(ContainerSummaryStateEnum::CREATED) => State::Created,
            Some(ContainerSummaryStateEnum::REMOVING) => State::Removing,
            Some(ContainerSummaryStateEnum::EXITED | ContainerSummaryStateEnum::DEAD) => State::Dead,
            _ => State::Running,
        };
        let networks = summary.network_settings.and_then(|settings| settings.networks).unwrap_or_default();
        Self {
            id: summary.id.unwrap_or_default().into(),
            name: name.trim_start_matches('/').into(),
            labels: summary.labels.unwrap_or_default(),
            state,
            healthy: health(&summary.status.unwrap_or_default()),
            addresses: networks
                .into_iter()
                .filter_map(|(network, endpoint)| Some((network, address(&endpoint)?)))
                .collect(),
        }
    }
}

/// The list has health as a field only from API 1.52 on, and in this text always: `Up 3 minutes (unhealthy)`.
fn health(status: &str) -> Option<bool> {
    if status.ends_with("(unhealthy)") { Some(false) } else { status.ends_with("(healthy)").then_some(true) }
}

fn address(endpoint: &EndpointSettings) -> Option<IpAddr> {
    let texts = [&endpoint.ip_address, &endpoint.global_ipv6_address];
    texts.into_iter().flatten().find_map(|text| text.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_of_api_1_41_is_understood() {
        let json = r#"[{"Id": "d43c", "Names": ["/ringway-echo-1"], "Image": "ringway:latest", "ImageID": "sha256:1", "Command": "/ringway",
            "Created": 1790000000, "Ports": [], "Labels": {"ringway.slot": "echo-1"}, "State": "running",
            "Status": "Up 3 minutes (unhealthy)", "HostConfig": {"NetworkMode": "net"}, "Mounts": [],
            "NetworkSettings": {"Networks": {"net": {"IPAddress": "172.18.0.2", "GlobalIPv6Address": ""}, "off": {"IPAddress": ""}}}}]"#;
        let summaries: Vec<ContainerSummary> = serde_json::from_str(json).unwrap();
        let containers: Vec<Container> = summaries.into_iter().map(Container::from).collect();
        let [container] = &containers[..] else { panic!("{containers:?}") };
        assert_eq!((&*container.id, &*container.name), ("d43c", "ringway-echo-1"));
        assert_eq!((container.label("ringway.slot"), container.label("other")), ("echo-1", ""));
        assert_eq!((container.state, container.healthy), (State::Running, Some(false)));
        assert_eq!(container.addresses, HashMap::from([("net".to_owned(), IpAddr::from([172, 18, 0, 2]))]));
    }

    #[test]
    fn health_is_in_the_status_text() {
        assert_eq!(health("Up 3 minutes"), None);
        assert_eq!(health("Up 3 minutes (health: starting)"), None);
        assert_eq!(health("Up 3 minutes (healthy)"), Some(true));
        assert_eq!(health("Up 3 minutes (healthy) (Paused)"), None);
    }
}
