//! A container as a full list of the engine shows it.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use bollard::models::{ContainerSummary, ContainerSummaryStateEnum, EndpointSettings, PortSummaryTypeEnum};

/// A container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    /// The engine's id of the container.
    pub id: Arc<str>,
    /// The container's name, without the slash that the API puts in front.
    pub name: Arc<str>,
    /// The engine's id of the image that it was created from.
    pub image: Arc<str>,
    /// The container's labels.
    pub labels: HashMap<String, String>,
    /// The container's state.
    pub state: State,
    /// The result of the image's own health check; `None` without one, or before its first verdict. A paused container
    /// is not healthy.
    pub healthy: Option<bool>,
    /// The container's address on each network.
    pub addresses: HashMap<String, IpAddr>,
    /// The TCP ports that the container exposes, in order.
    pub ports: Vec<u16>,
    /// The container still runs, but has got the signal to stop.
    pub is_stopping: bool,
}

/// The state of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The container was never started.
    Created,
    /// The container runs or is paused: its processes exist.
    Running,
    /// The container has ended.
    Dead,
    /// The engine is removing the container.
    Removing,
}

impl Container {
    /// The value of a label; empty if the container lacks the label.
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
        let is_paused = summary.state == Some(ContainerSummaryStateEnum::PAUSED);
        let of_tcp =
            summary.ports.unwrap_or_default().into_iter().filter(|port| port.typ == Some(PortSummaryTypeEnum::TCP));
        // A port that is published on IPv4 and IPv6 is there twice.
        let ports: BTreeSet<_> = of_tcp.map(|port| port.private_port).collect();
        let networks = summary.network_settings.and_then(|settings| settings.networks).unwrap_or_default();
        Self {
            id: summary.id.unwrap_or_default().into(),
            name: name.trim_start_matches('/').into(),
            image: summary.image_id.unwrap_or_default().into(),
            labels: summary.labels.unwrap_or_default(),
            state,
            healthy: if is_paused { Some(false) } else { health(&summary.status.unwrap_or_default()) },
            addresses: networks
                .into_iter()
                .filter_map(|(network, endpoint)| Some((network, address(&endpoint)?)))
                .collect(),
            ports: ports.into_iter().collect(),
            is_stopping: false,
        }
    }
}

/// Reads health from the status text, like `Up 3 minutes (unhealthy)`: only API 1.52 and later has a field for it.
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
    fn ringway_reads_the_list_of_an_engine_with_api_1_41() {
        let json = r#"[{"Id": "d43c", "Names": ["/ringway-echo-1"], "Image": "ringway:latest", "ImageID": "sha256:1", "Command": "/ringway",
            "Created": 1790000000, "Ports": [{"IP": "0.0.0.0", "PrivatePort": 80, "PublicPort": 8080, "Type": "tcp"},
            {"IP": "::", "PrivatePort": 80, "PublicPort": 8080, "Type": "tcp"}, {"PrivatePort": 53, "Type": "udp"}], "Labels": {"ringway.slot": "echo-1"}, "State": "running",
            "Status": "Up 3 minutes (unhealthy)", "HostConfig": {"NetworkMode": "net"}, "Mounts": [],
            "NetworkSettings": {"Networks": {"net": {"IPAddress": "172.18.0.2", "GlobalIPv6Address": ""}, "off": {"IPAddress": ""}}}}]"#;
        let summaries: Vec<ContainerSummary> = serde_json::from_str(json).unwrap();
        let containers: Vec<Container> = summaries.into_iter().map(Container::from).collect();
        let [container] = &containers[..] else { panic!("{containers:?}") };
        assert_eq!((&*container.id, &*container.name), ("d43c", "ringway-echo-1"));
        assert_eq!(&*container.image, "sha256:1");
        assert_eq!((container.label("ringway.slot"), container.label("other")), ("echo-1", ""));
        assert_eq!((container.state, container.healthy), (State::Running, Some(false)));
        assert_eq!((&container.ports[..], container.is_stopping), (&[80][..], false));
        assert_eq!(container.addresses, HashMap::from([("net".to_owned(), IpAddr::from([172, 18, 0, 2]))]));
    }

    #[test]
    fn health_is_read_from_the_status_text() {
        assert_eq!(health("Up 3 minutes"), None);
        assert_eq!(health("Up 3 minutes (health: starting)"), None);
        assert_eq!(health("Up 3 minutes (healthy)"), Some(true));
        assert_eq!(health("Up 3 minutes (healthy) (Paused)"), None);
    }
}
