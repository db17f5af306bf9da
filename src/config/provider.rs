//! The kinds of providers: their settings, and what each kind implies for the rest of the config.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::backends_file::FileFormat;
use crate::backend::Membership;
use crate::control::provider::Location;
use crate::control::provider::dns::{self, Question};
use crate::control::provider::names::Resolve;
use crate::control::supervisor::docker::Spec;
use crate::control::supervisor::handover;
use crate::control::supervisor::plan::{OnFailure, Order, Policy};
use crate::control::supervisor::scaling::Scaling;
use crate::label_enum;

/// The source of a pool's backends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Provider {
    /// Backends that the config lists.
    Static(Arc<Vec<StaticBackend>>),
    /// Child processes that Ringway starts and supervises.
    Process(Process),
    /// Containers that Ringway creates and supervises.
    Containers(Containers),
    /// Containers that something else runs and Ringway discovers by label.
    Discover(Discover),
    /// The addresses of a name.
    Dns(Arc<dns::Settings>),
    /// A file that lists backends.
    File(BackendsFile),
}

/// A backend listed in the config.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StaticBackend {
    /// Id, unique within the pool.
    pub id: String,
    /// Where it listens.
    #[serde(flatten)]
    pub location: Location,
    /// How it takes part in the pool.
    #[serde(flatten)]
    pub membership: Membership,
    /// How often Ringway looks a host name up.
    #[serde(default)]
    pub resolve: Resolve,
}

label_enum! {
    /// Whether a listed backend gets new connections.
    pub(super) enum ListedState {
        /// It does.
        Ready => "ready",
        /// It does not.
        Drained => "drained",
    }
}

impl ListedState {
    /// The state of a backend in its pool.
    pub(super) fn of(membership: Membership) -> Self {
        if membership.is_drained { Self::Drained } else { Self::Ready }
    }
}

/// A file that lists backends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendsFile {
    /// The path.
    pub path: Arc<Path>,
    /// The form of the list.
    pub format: FileFormat,
}

/// Settings of a pool of child processes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Number of replicas, or the maximum if the pool scales by itself.
    pub replicas: u32,
    /// How the pool scales by itself; `None`: it does not.
    pub scaled: Option<Scaled>,
    /// Command and environment variables of each replica.
    pub spec: handover::Spec,
    /// First and last port of a range; `None`: the system chooses the ports.
    pub ports: Option<(u16, u16)>,
    /// Restart policy for replicas.
    pub restart: Restart,
    /// How replicas from other settings are replaced.
    pub rollout: Rollout,
    /// Time between SIGTERM and SIGKILL when Ringway stops a replica.
    pub stop_grace: Duration,
}

/// Settings of a pool of containers that Ringway creates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Containers {
    /// Number of replicas, or the maximum if the pool scales by itself.
    pub replicas: u32,
    /// How the pool scales by itself; `None`: it does not.
    pub scaled: Option<Scaled>,
    /// Image, command and resources of each container.
    pub spec: Spec,
    /// Docker network on which Ringway reaches the containers; `None`: the network that Ringway itself is on.
    pub network: Option<String>,
    /// Restart policy for replicas.
    pub restart: Restart,
    /// How replicas from other settings are replaced.
    pub rollout: Rollout,
    /// Time between SIGTERM and SIGKILL when Ringway stops a container.
    pub stop_grace: Duration,
}

/// Settings of a pool of containers that something else runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Discover {
    /// Label that selects the containers: `name` or `name=value`. `None`: `ringway.pool` with the name of the pool.
    pub label: Option<String>,
    /// Whether labels of the containers say how they take part, and how they are checked.
    pub reads_labels: bool,
    /// TCP port on which the containers listen; `None`: the only one that a container exposes.
    pub port: Option<u16>,
    /// Docker network on which Ringway reaches the containers; `None`: the network that Ringway itself is on.
    pub network: Option<String>,
}

/// When Ringway starts and replaces replicas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Restart {
    /// When a dead or unhealthy replica is replaced.
    pub policy: Policy,
    /// How long a new replica may fail its health checks and still count as starting.
    pub start_grace: Duration,
}

/// How a pool scales by itself, between a minimum and the number of replicas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scaled {
    /// When the number changes.
    pub scaling: Scaling,
    /// How long a connection may wait for a healthy backend while the pool wakes.
    pub wake_timeout: Duration,
    /// Connections that may wait at the same time.
    pub max_waiting: u32,
}

/// How Ringway replaces replicas that were started from other settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rollout {
    /// Which replica of a slot is there first.
    pub order: Order,
    /// Slots at a time.
    pub parallel: u32,
    /// Wait between two replacements; none on the way back.
    pub pause: Duration,
    /// How long a new replica must have been healthy.
    pub healthy_for: Duration,
    /// What happens when a new replica fails.
    pub on_failure: OnFailure,
    /// How long the connections of a replaced replica may go on; `None`: as long as the pool says.
    pub drain: Option<Duration>,
}

/// Backends that Ringway reserves file descriptors for in a pool of discovered containers, of a name or of a file. Nobody knows the
/// real number in advance.
const DISCOVERED: usize = 32;

/// How long a discovered backend may fail its checks and still count as starting.
const DISCOVERED_GRACE: Duration = Duration::from_secs(10);

impl Provider {
    /// The name of the kind, as the side port shows it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Static(_) => "static",
            Self::Process(_) => "process",
            Self::Containers(_) | Self::Discover(_) => "docker",
            Self::Dns(_) => "dns",
            Self::File(_) => "file",
        }
    }

    /// Whether both are of the same kind.
    pub fn is_same_kind(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }

    /// The configured number of replicas, or the maximum; `None` if Ringway does not start the pool's backends.
    pub fn replicas(&self) -> Option<u32> {
        match self {
            Self::Process(process) => Some(process.replicas),
            Self::Containers(containers) => Some(containers.replicas),
            Self::Static(_) | Self::Discover(_) | Self::Dns(_) | Self::File(_) => None,
        }
    }

    /// How the pool scales by itself; `None`: it does not.
    pub fn scaled(&self) -> Option<Scaled> {
        match self {
            Self::Process(process) => process.scaled,
            Self::Containers(containers) => containers.scaled,
            Self::Static(_) | Self::Discover(_) | Self::Dns(_) | Self::File(_) => None,
        }
    }

    /// Sets the number of replicas, if the pool has replicas.
    pub fn set_replicas(&mut self, replicas: u32) {
        match self {
            Self::Process(process) => process.replicas = replicas,
            Self::Containers(containers) => containers.replicas = replicas,
            Self::Static(_) | Self::Discover(_) | Self::Dns(_) | Self::File(_) => {}
        }
    }

    /// The image of the containers that Ringway creates.
    pub fn image(&self) -> Option<&str> {
        if let Self::Containers(containers) = self { Some(&containers.spec.image) } else { None }
    }

    /// Sets the image, if Ringway creates containers.
    pub fn set_image(&mut self, image: &str) {
        if let Self::Containers(containers) = self {
            image.clone_into(&mut containers.spec.image);
        }
    }

    /// Whether this is an image name.
    pub fn is_image(name: &str) -> bool {
        !name.is_empty() && !name.contains(char::is_whitespace)
    }

    /// The listed backends; `None` if the config does not list them.
    pub fn static_backends(&self) -> Option<&[StaticBackend]> {
        if let Self::Static(backends) = self { Some(backends) } else { None }
    }

    /// The listed backends, to change them.
    pub fn static_backends_mut(&mut self) -> Option<&mut Vec<StaticBackend>> {
        if let Self::Static(backends) = self { Some(Arc::make_mut(backends)) } else { None }
    }

    /// The expected number of backends. For discovered ones this is an estimate.
    pub fn backends(&self) -> usize {
        match self {
            Self::Static(backends) => backends.len(),
            Self::Process(process) => process.replicas as usize,
            Self::Containers(containers) => containers.replicas as usize,
            Self::Discover(_) | Self::Dns(_) | Self::File(_) => DISCOVERED,
        }
    }

    /// The most descriptors that the control plane needs for a backend. Every backend needs one, for its check. A process
    /// also needs its port, lifeline and output, and duplicates of them for a handover.
    pub fn descriptors_per_backend(&self) -> usize {
        if matches!(self, Self::Process(_)) { 12 } else { 1 }
    }

    /// Whether a command may change the weights of backends.
    pub fn has_weights(&self) -> bool {
        !matches!(self, Self::Discover(_) | Self::Dns(_) | Self::File(_))
    }

    /// The weight of a backend with as many points as `ring.virtual_nodes`. SRV records have proportions: one step has to be
    /// a fraction of the usual points, or a pool would need many times as many.
    pub fn usual_weight(&self) -> u32 {
        match self {
            Self::Dns(dns) if matches!(dns.question, Question::Services { .. }) => dns::WEIGHTS,
            _ => 1,
        }
    }

    /// Whether the pool needs a Docker engine.
    pub fn needs_engine(&self) -> bool {
        matches!(self, Self::Containers(_) | Self::Discover(_))
    }

    /// Whether a backend listens on a Unix socket.
    pub fn has_unix_sockets(&self) -> bool {
        match self {
            Self::Static(backends) => backends.iter().any(|one| matches!(one.location, Location::Unix { .. })),
            Self::Process(process) => process.spec.uses_sockets(),
            Self::Containers(_) | Self::Discover(_) | Self::Dns(_) | Self::File(_) => false,
        }
    }

    /// The first and last port of the replicas, if the config has a range.
    pub fn port_range(&self) -> Option<(u16, u16)> {
        match self {
            Self::Process(process) if !process.spec.uses_sockets() => process.ports,
            _ => None,
        }
    }

    /// How long a new backend may fail its checks and still count as starting. Ringway knows when its own replicas
    /// started, and nothing of listed backends.
    pub fn start_grace(&self) -> Duration {
        match self {
            Self::Static(_) | Self::File(_) => Duration::ZERO,
            Self::Process(process) => process.restart.start_grace,
            Self::Containers(containers) => containers.restart.start_grace,
            Self::Discover(_) | Self::Dns(_) => DISCOVERED_GRACE,
        }
    }

    /// Takes the settings that require a restart from the running provider.
    pub fn keep_fixed(&mut self, running: &Self) {
        match (self, running) {
            (Self::Process(new), Self::Process(running)) => new.ports = running.ports,
            (Self::Containers(new), Self::Containers(running)) => new.network.clone_from(&running.network),
            _ => {}
        }
    }

    /// Why the pool cannot have these numbers of backends, in words. The parser has checked the file; run-time changes
    /// and kept settings can break it again.
    pub fn size_fault(&self) -> Option<String> {
        let ((first, last), replicas) = (self.port_range()?, self.replicas()?);
        (u32::from(last - first) + 1 < replicas).then(|| {
            format!("{replicas} replicas need more ports than {first}-{last}: widen the range or lower replicas")
        })
    }
}
