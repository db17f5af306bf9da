//! Creates the containers of a pool.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bollard::models::{ContainerCreateBody, HostConfig, RestartPolicy, RestartPolicyNameEnum};
use tokio::sync::Mutex;

use crate::control::docker::container::{Container, State};
use crate::control::docker::engine::{Engine, EngineError};
use crate::control::docker::label;
use crate::control::docker::scope::Scope;
use crate::control::supervisor::plan::Role;
use crate::control::supervisor::rollout::Target;
use crate::label_enum;

label_enum! {
    /// When Ringway pulls an image from its registry.
    pub enum Pull {
        /// Never: the engine must have the image.
        Never => "never",
        /// Only if the engine lacks the image.
        Missing => "missing",
        /// Always, before Ringway creates a container.
        Always => "always",
    }
}

/// What a container is created from. By design it cannot ask for extra privileges, the host's network or its files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// The image's name.
    pub image: String,
    /// Arguments, with the placeholders `{port}` and `{slot}`; `None`: the image's own.
    pub command: Option<Vec<String>>,
    /// The port on which the replica listens, within its container.
    pub port: u16,
    /// Environment variables, with the same placeholders.
    pub env: Vec<(String, String)>,
    /// Labels in addition to Ringway's own.
    pub labels: Vec<(String, String)>,
    /// Memory limit in bytes; `None`: no limit.
    pub memory: Option<u64>,
    /// CPU limit in thousandths of a core; `None`: no limit.
    pub milli_cpus: Option<u64>,
    /// When Ringway pulls the image from its registry.
    pub pull: Pull,
}

/// Wait between a pull that failed and the next one; doubles with each further failure.
const PULL_AGAIN: Duration = Duration::from_secs(10);

/// Longest wait between two pulls.
const PULL_AGAIN_AT_LAST: Duration = Duration::from_secs(300);

/// Why Ringway could not create a container.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// Another process may have created the container; the next list shows it.
    #[error("another process may have created the container")]
    Conflict,
    /// The engine is unreachable.
    #[error(transparent)]
    Engine(EngineError),
    /// The reason, as text for the log and the status.
    #[error("{0}")]
    Refused(String),
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::Away { .. } => Self::Engine(error),
            EngineError::Refused { status: 409, .. } => Self::Conflict,
            EngineError::Refused { message, .. } => Self::Refused(message),
        }
    }
}

/// A spec, and the image for which its name stood when Ringway looked last. The name may stand for another one later.
#[derive(Debug, Clone)]
pub(super) struct Pinned {
    pub(super) spec: Spec,
    /// The engine's id of the image; `None`: not known.
    pub(super) image: Option<Arc<str>>,
}

impl Target for Pinned {
    fn image(&self) -> Option<&str> {
        Some(&self.spec.image)
    }
}

impl PartialEq for Pinned {
    /// An image that is not known may be any.
    fn eq(&self, other: &Self) -> bool {
        let is_other = |(one, other): (&Arc<str>, &Arc<str>)| one != other;
        self.spec == other.spec && !self.image.as_ref().zip(other.image.as_ref()).is_some_and(is_other)
    }
}

/// Creates the containers of one pool.
#[derive(Debug)]
pub(super) struct Maker {
    engine: Engine,
    pool: String,
    scope: Scope,
    spec: Spec,
    /// The image that all containers of the pool have.
    image: Option<Arc<str>>,
    /// A rollout has failed, and these are the settings before. The name may stand for the image that has failed.
    is_rolled_back: bool,
    digest: String,
    /// Limits pulls to one at a time: after the first, the engine has the image.
    pulling: Mutex<Option<FailedPull>>,
}

/// The last pull, which has failed. All slots of the pool need the same image, so one pull counts for all of them.
#[derive(Debug)]
struct FailedPull {
    /// Failures in a row.
    count: u32,
    /// When Ringway may pull again.
    again: Instant,
    reason: String,
}

impl Maker {
    /// Creates containers from `target`, while the settings want `wanted`.
    pub(super) fn new(engine: Engine, pool: &str, scope: &Scope, target: Pinned, wanted: &Pinned) -> Self {
        let is_rolled_back = target != *wanted;
        let Pinned { spec, image } = target;
        let digest = digest(&spec, &scope.network);
        let (pool, scope, pulling) = (pool.to_owned(), scope.clone(), Mutex::new(None));
        Self { engine, pool, scope, spec, image, is_rolled_back, digest, pulling }
    }

    /// What containers are created from.
    pub(super) fn spec(&self) -> &Spec {
        &self.spec
    }

    /// Digest of the settings that containers are created from.
    pub(super) fn digest(&self) -> &str {
        &self.digest
    }

    /// Whether a container of this image, created from settings with this digest, is outdated.
    pub(super) fn is_outdated(&self, digest: &str, image: &str) -> bool {
        digest != self.digest || self.image.as_ref().is_some_and(|wanted| **wanted != *image)
    }

    /// The names of the containers of a slot.
    pub(super) fn names(&self, slot: &str) -> Names {
        Names(format!("{}-{slot}", self.scope.owner))
    }

    /// Creates and starts a container for a seat of a slot. `leftover` is a container of the seat that does not run: Ringway starts
    /// it if it matches the settings and has never run, and removes it otherwise.
    pub(super) async fn make(&self, slot: &str, role: Role, leftover: Option<Container>) -> Result<(), Failure> {
        let name = match role {
            Role::Front => self.names(slot).current(),
            Role::Beside => self.names(slot).next(),
        };
        if let Some(old) = leftover {
            if old.state == State::Created && !self.is_outdated(old.label(label::SPEC), &old.image) {
                return self.start(&old.id).await;
            }
            // Not by force: another process may have started it by now.
            self.engine.remove(&old.id, false).await?;
        }
        if self.pulls_always() {
            self.pull(&mut *self.pulling.lock().await).await?;
        }
        let id = match self.create(slot, &name).await {
            Err(error) if error.is_no_image() && self.spec.pull == Pull::Missing => {
                self.pull_and_create(slot, &name).await?
            }
            Err(error) if error.is_no_image() => return Err(no_image(&self.spec.image)),
            Err(error) if error.is_status(409) => return Err(self.whose(slot, &name).await),
            other => other?,
        };
        self.start(&id).await
    }

    /// Checks that the engine has the network and the image. Pulls a missing image if the settings allow it.
    pub(super) async fn check(&self) -> Result<(), Failure> {
        let network = &self.scope.network;
        if !self.engine.has_network(network).await? {
            return Err(Failure::Refused(format!(
                "the network {network:?} does not exist; create it, or check its name"
            )));
        }
        // After a failed rollout, the name may have no image any more, but the id has.
        if self.engine.has_image(&self.image().await?).await? {
            Ok(())
        } else if self.spec.pull == Pull::Never {
            Err(no_image(&self.spec.image))
        } else {
            self.pull(&mut *self.pulling.lock().await).await
        }
    }

    async fn pull_and_create(&self, slot: &str, name: &str) -> Result<String, Failure> {
        let mut last = self.pulling.lock().await;
        match self.create(slot, name).await {
            Err(error) if error.is_no_image() => {
                self.pull(&mut last).await?;
                Ok(self.create(slot, name).await?)
            }
            other => Ok(other?),
        }
    }

    /// Pulls the image, but not soon after a pull that failed.
    async fn pull(&self, last: &mut Option<FailedPull>) -> Result<(), Failure> {
        let (image, now) = (&self.spec.image, Instant::now());
        if let Some(FailedPull { reason, .. }) = last.as_ref().filter(|failed| failed.again > now) {
            return Err(Failure::Refused(reason.clone()));
        }
        tracing::info!(pool = self.pool, image, "pulling the image");
        let message = match self.engine.pull(image).await {
            Ok(()) => {
                *last = None;
                return Ok(());
            }
            Err(error @ EngineError::Away { .. }) => return Err(Failure::Engine(error)),
            Err(EngineError::Refused { message, .. }) => message,
        };
        let count = last.as_ref().map_or(0, |failed| failed.count);
        let wait = PULL_AGAIN.saturating_mul(1 << count.min(10)).min(PULL_AGAIN_AT_LAST);
        let reason = format!(
            "the engine lacks the image {image:?} and cannot pull it: {message}; build or load it, or check its name. \
             Ringway waits at least {} s before it pulls again",
            wait.as_secs()
        );
        *last = Some(FailedPull { count: count + 1, again: now + wait, reason: reason.clone() });
        Err(Failure::Refused(reason))
    }

    async fn create(&self, slot: &str, name: &str) -> Result<String, EngineError> {
        let image = self.image().await?;
        self.engine.create(name, self.body(slot, image)).await
    }

    /// Whether each container comes from the newest image of the registry.
    fn pulls_always(&self) -> bool {
        self.spec.pull == Pull::Always && !self.is_rolled_back
    }

    /// What to create a container from: the image's name, or its id if the name stands for another image by now. So all containers of a
    /// pool have the same image until a rollout.
    async fn image(&self) -> Result<String, EngineError> {
        let name = &self.spec.image;
        let Some(image) = self.image.as_ref().filter(|_| !self.pulls_always()) else {
            return Ok(name.clone());
        };
        let is_current = self.engine.image_id(name).await?.is_some_and(|id| *id == **image);
        // Somebody may have removed the image.
        let is_by_id = !is_current && self.engine.has_image(image).await?;
        Ok(if is_by_id { image.to_string() } else { name.clone() })
    }

    async fn start(&self, id: &str) -> Result<(), Failure> {
        let started = self.engine.start(id).await;
        match started {
            Ok(()) => Ok(()),
            // Another process has removed the container.
            Err(error) if error.is_status(404) && self.engine.inspect(id).await.is_err() => Err(Failure::Conflict),
            Err(error) => {
                if !error.is_away() {
                    // Remove it: otherwise Ringway would keep starting the same container. A new one may work.
                    let _ = self.engine.remove(id, false).await;
                }
                Err(error.into())
            }
        }
    }

    /// The container's name is taken. Finds out whether the holder fills this slot or must not be touched.
    async fn whose(&self, slot: &str, name: &str) -> Failure {
        let holder = match self.engine.inspect(name).await {
            Ok(holder) => holder,
            // The holder is gone again.
            Err(error) if error.is_status(404) => return Failure::Conflict,
            Err(error) => return error.into(),
        };
        let labels = holder.config.and_then(|config| config.labels).unwrap_or_default();
        let has = |label: &str, value: &str| labels.get(label).is_some_and(|found| found == value);
        if has(label::OWNER, &self.scope.owner) && has(label::POOL, &self.pool) && has(label::SLOT, slot) {
            return Failure::Conflict;
        }
        Failure::Refused(format!(
            "the name {name:?} belongs to a container that this Ringway did not create; remove or rename \
             that container, or set docker.owner"
        ))
    }

    fn body(&self, slot: &str, image: String) -> ContainerCreateBody {
        let fill = |text: &String| text.replace("{port}", &self.spec.port.to_string()).replace("{slot}", slot);
        let port = self.spec.port.to_string();
        let own = [
            (label::OWNER, self.scope.owner.as_str()),
            (label::POOL, &self.pool),
            (label::SLOT, slot),
            (label::NETWORK, &self.scope.network),
            (label::PORT, &port),
            (label::SPEC, &self.digest),
        ];
        let mut labels: HashMap<_, _> = label::OF_IMAGES.map(|name| (name.to_owned(), String::new())).into();
        labels.extend(self.spec.labels.iter().cloned());
        labels.extend(own.map(|(name, value)| (name.to_owned(), value.to_owned())));
        ContainerCreateBody {
            image: Some(image),
            cmd: self.spec.command.as_ref().map(|command| command.iter().map(fill).collect()),
            env: Some(self.spec.env.iter().map(|(name, value)| format!("{name}={}", fill(value))).collect()),
            labels: Some(labels),
            host_config: Some(HostConfig {
                network_mode: Some(self.scope.network.clone()),
                memory: self.spec.memory.and_then(|bytes| i64::try_from(bytes).ok()),
                nano_cpus: self.spec.milli_cpus.and_then(|cpus| i64::try_from(cpus * 1_000_000).ok()),
                // With a restart policy the engine would also restart the container and conflict with Ringway.
                restart_policy: Some(RestartPolicy {
                    name: Some(RestartPolicyNameEnum::NO),
                    maximum_retry_count: None,
                }),
                ..HostConfig::default()
            }),
            ..ContainerCreateBody::default()
        }
    }
}

/// The names of the containers of a slot. They show what each is to the slot, also to the next Ringway.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Names(String);

impl Names {
    /// The container fills the slot.
    pub(super) fn current(&self) -> String {
        self.0.clone()
    }

    /// The container comes next.
    pub(super) fn next(&self) -> String {
        format!("{}-next", self.0)
    }

    /// The container has filled the slot before.
    pub(super) fn former(&self) -> String {
        format!("{}-old", self.0)
    }
}

fn no_image(image: &str) -> Failure {
    Failure::Refused(format!("the engine lacks the image {image:?}, and `pull: never` is set"))
}

/// Digest of every setting that affects a container. Must stay the same across versions of Ringway.
fn digest(spec: &Spec, network: &str) -> String {
    let Spec { image, command, port, env, labels, memory, milli_cpus, pull: _ } = spec;
    let mut text = format!("image={image}\0port={port}\0network={network}\0memory={memory:?}\0cpus={milli_cpus:?}\0");
    for word in command.iter().flatten() {
        text.extend(["command=", word, "\0"]);
    }
    for (kind, pairs) in [("env=", env), ("label=", labels)] {
        for (name, value) in pairs {
            text.extend([kind, name, "=", value, "\0"]);
        }
    }
    format!("{:016x}", seahash::hash(text.as_bytes()))
}
