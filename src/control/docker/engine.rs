//! The calls that Ringway makes to a Docker engine. Each has a deadline; a new connection for each, so that no
//! call meets one that died with an engine.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bollard::Docker;
use bollard::errors::Error;
use bollard::models::{ContainerCreateBody, ContainerInspectResponse, EventMessage};
use bollard::query_parameters::{
    CreateContainerOptionsBuilder, CreateImageOptionsBuilder, EventsOptionsBuilder, InspectContainerOptions,
    InspectNetworkOptions, ListContainersOptionsBuilder, LogsOptionsBuilder, RemoveContainerOptionsBuilder,
    StartContainerOptions, StopContainerOptionsBuilder,
};
use futures_util::stream::{BoxStream, StreamExt as _};

use super::container::Container;

/// Where an engine listens unless `DOCKER_HOST` says otherwise.
const DEFAULT_HOST: &str = "unix:///var/run/docker.sock";

/// Longest silence while an image is pulled.
const PULL_SILENCE: Duration = Duration::from_secs(120);

/// Longest line of a container's output that is kept, in bytes.
const LONGEST_LINE: usize = 1024;

/// A Docker engine, whether it is there or not. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Engine {
    host: Arc<str>,
    deadline: Duration,
}

/// Why a call came to nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The engine is not there, or does not answer.
    #[error("cannot reach the Docker engine at {host}: {error}{}", remedy(host, error))]
    Away {
        /// Where it should be.
        host: Arc<str>,
        /// What the system says.
        error: String,
    },
    /// The engine is there and says no.
    #[error("the Docker engine says: {message}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// In the engine's words.
        message: String,
    },
}

fn remedy(host: &str, error: &str) -> &'static str {
    if error.contains("ermission denied") {
        "; run Ringway as a user who may use the socket"
    } else if host.starts_with("unix:") && (error.contains("ocket not found") || error.contains("No such file")) {
        "; is it running? In a container: mount its socket, or set DOCKER_HOST"
    } else {
        ""
    }
}

impl EngineError {
    /// Whether the engine has answered with this HTTP status.
    pub fn is_status(&self, wanted: u16) -> bool {
        matches!(self, Self::Refused { status, .. } if *status == wanted)
    }

    /// Whether it says nothing about what was asked for.
    pub fn is_away(&self) -> bool {
        matches!(self, Self::Away { .. })
    }

    /// Whether the engine lacks the image.
    pub fn is_no_image(&self) -> bool {
        matches!(self, Self::Refused { status: 404, message } if message.contains("No such image"))
    }
}

impl Engine {
    /// The engine at `host`, the value of `DOCKER_HOST`, or else that of this machine. `deadline` is for each call.
    ///
    /// # Errors
    /// When that is nothing that could be connected to.
    pub fn new(host: Option<&str>, deadline: Duration) -> Result<Self, String> {
        let host = host.filter(|host| !host.is_empty()).unwrap_or(DEFAULT_HOST);
        match Docker::connect_with_host(host) {
            Ok(_) | Err(Error::SocketNotFoundError(_)) => Ok(Self { host: host.into(), deadline }),
            Err(Error::UnsupportedURISchemeError { .. }) if host.starts_with("https:") || host.starts_with("ssh:") => {
                Err(format!(
                    "DOCKER_HOST={host:?}: neither TLS nor SSH is spoken here; forward the engine's socket, as by `ssh -nNT -L \
                 /run/engine.sock:/var/run/docker.sock host`, and set DOCKER_HOST=unix:///run/engine.sock"
                ))
            }
            Err(Error::UnsupportedURISchemeError { .. }) => {
                Err(format!("DOCKER_HOST={host:?} is not an address like {DEFAULT_HOST} or tcp://10.0.0.5:2375"))
            }
            Err(error) => Err(format!("DOCKER_HOST={host:?}: {error}")),
        }
    }

    /// Where it is: `unix:///var/run/docker.sock`.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Every container with all these labels (`name` or `name=value`), whatever its state.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn list(&self, labels: &[String]) -> Result<Vec<Container>, EngineError> {
        let options = ListContainersOptionsBuilder::new().all(true).filters(&with_labels(labels)).build();
        let listed = self.call(self.deadline, async |docker| docker.list_containers(Some(options)).await).await?;
        Ok(listed.into_iter().map(Container::from).collect())
    }

    /// What happens to containers with these labels, from now on. Ends when the engine does.
    ///
    /// # Errors
    /// When the engine is away.
    pub fn events(
        &self,
        labels: &[String],
    ) -> Result<BoxStream<'static, Result<EventMessage, EngineError>>, EngineError> {
        let mut filters = with_labels(labels);
        filters.insert("type".to_owned(), vec!["container".to_owned()]);
        let options = EventsOptionsBuilder::new().filters(&filters).build();
        let events = self.docker()?.events(Some(options));
        let engine = self.clone();
        Ok(events.map(move |event| event.map_err(|error| engine.error(&error))).boxed())
    }

    /// Makes a container; its id.
    ///
    /// # Errors
    /// Status 409 where the name is taken, 404 where the image is not there.
    pub async fn create(&self, name: &str, body: ContainerCreateBody) -> Result<String, EngineError> {
        let options = CreateContainerOptionsBuilder::new().name(name).build();
        let made = self.call(self.deadline, async |docker| docker.create_container(Some(options), body).await).await?;
        Ok(made.id)
    }

    /// Starts a container; one that runs is left as it is.
    ///
    /// # Errors
    /// When its process cannot be run, among others.
    pub async fn start(&self, id: &str) -> Result<(), EngineError> {
        self.call(self.deadline, async |docker| docker.start_container(id, None::<StartContainerOptions>).await).await
    }

    /// Stops a container: SIGTERM, and after `grace` SIGKILL.
    ///
    /// # Errors
    /// When there is no such container, or no answer.
    pub async fn stop(&self, id: &str, grace: Duration) -> Result<(), EngineError> {
        let seconds = i32::try_from(grace.as_secs_f64().ceil() as i64).unwrap_or(i32::MAX);
        let options = StopContainerOptionsBuilder::new().t(seconds).build();
        self.call(self.deadline + grace, async |docker| docker.stop_container(id, Some(options)).await).await
    }

    /// Removes a container with its anonymous volumes; `force`: also one that runs. One that is gone, or going,
    /// is as good as removed.
    ///
    /// # Errors
    /// Status 409 where it runs.
    pub async fn remove(&self, id: &str, force: bool) -> Result<(), EngineError> {
        let options = RemoveContainerOptionsBuilder::new().force(force).v(true).build();
        let removed = self.call(self.deadline, async |docker| docker.remove_container(id, Some(options)).await).await;
        match removed {
            Err(EngineError::Refused { status: 404, .. }) => Ok(()),
            Err(EngineError::Refused { status: 409, message }) if message.contains("already in progress") => Ok(()),
            other => other,
        }
    }

    /// Stops a container and removes it. One that is gone already is as good.
    ///
    /// # Errors
    /// When the engine is away or does not do it.
    pub async fn end(&self, id: &str, grace: Duration) -> Result<(), EngineError> {
        match self.stop(id, grace).await {
            Err(error) if error.is_away() => Err(error),
            // Removing it by force ends it too.
            _ => self.remove(id, true).await,
        }
    }

    /// A container's details, by id or name.
    ///
    /// # Errors
    /// When there is no such container, or no answer.
    pub async fn inspect(&self, id: &str) -> Result<ContainerInspectResponse, EngineError> {
        self.call(self.deadline, async |docker| docker.inspect_container(id, None::<InspectContainerOptions>).await)
            .await
    }

    /// Whether there is an image of this name.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn has_image(&self, name: &str) -> Result<bool, EngineError> {
        is_there(self.call(self.deadline, async |docker| docker.inspect_image(name).await.map(drop)).await)
    }

    /// Whether there is a network of this name or id.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn has_network(&self, name: &str) -> Result<bool, EngineError> {
        let options = None::<InspectNetworkOptions>;
        is_there(self.call(self.deadline, async |docker| docker.inspect_network(name, options).await.map(drop)).await)
    }

    /// The last lines that a container has written. Empty where they are not to be had.
    pub async fn last_lines(&self, id: &str, count: usize) -> Vec<String> {
        let options = LogsOptionsBuilder::new().stdout(true).stderr(true).tail(&count.to_string()).build();
        let lines = async |docker: Docker| {
            let mut output = docker.logs(id, Some(options));
            let mut lines = Vec::new();
            while let Some(line) = output.next().await {
                let bytes = line?.into_bytes();
                let line = String::from_utf8_lossy(&bytes[..bytes.len().min(LONGEST_LINE)]);
                lines.push(line.trim_end().to_owned());
            }
            Ok(lines)
        };
        self.call(self.deadline, lines).await.unwrap_or_default()
    }

    /// Gets an image from its registry, without credentials.
    ///
    /// # Errors
    /// When there is no registry, no such image, or nothing happens any more.
    pub async fn pull(&self, image: &str) -> Result<(), EngineError> {
        let (name, tag) = name_and_tag(image);
        let options = CreateImageOptionsBuilder::new().from_image(name).tag(tag).build();
        let mut progress = self.docker()?.create_image(Some(options), None, None);
        loop {
            match tokio::time::timeout(PULL_SILENCE, progress.next()).await {
                Ok(None) => return Ok(()),
                Ok(Some(Ok(_))) => {}
                Ok(Some(Err(error))) => return Err(self.error(&error)),
                Err(_) => return Err(self.away("nothing happens any more")),
            }
        }
    }

    async fn call<T>(
        &self,
        deadline: Duration,
        call: impl AsyncFnOnce(Docker) -> Result<T, Error>,
    ) -> Result<T, EngineError> {
        // Its own would cut ours short, and is in whole seconds.
        let docker = self.docker()?.with_timeout(deadline + Duration::from_secs(1));
        match tokio::time::timeout(deadline, call(docker)).await {
            Ok(answer) => answer.map_err(|error| self.error(&error)),
            Err(_) => Err(self.away(&format!("no answer within {} s", deadline.as_secs()))),
        }
    }

    fn docker(&self) -> Result<Docker, EngineError> {
        Docker::connect_with_host(&self.host).map_err(|error| self.error(&error))
    }

    fn error(&self, error: &Error) -> EngineError {
        match error {
            Error::DockerResponseServerError { status_code: 503, message } => self.away(message),
            Error::DockerResponseServerError { status_code, message } => {
                EngineError::Refused { status: *status_code, message: message.trim_end().to_owned() }
            }
            Error::DockerStreamError { error } => {
                EngineError::Refused { status: 500, message: error.trim_end().to_owned() }
            }
            other => self.away(&chain(other)),
        }
    }

    fn away(&self, error: &str) -> EngineError {
        EngineError::Away { host: Arc::clone(&self.host), error: error.to_owned() }
    }
}

fn is_there(inspected: Result<(), EngineError>) -> Result<bool, EngineError> {
    match inspected {
        Err(error) if error.is_status(404) => Ok(false),
        other => other.map(|()| true),
    }
}

fn with_labels(labels: &[String]) -> HashMap<String, Vec<String>> {
    HashMap::from([("label".to_owned(), labels.to_vec())])
}

/// An image without a tag means `latest`; the API would pull all its tags.
fn name_and_tag(image: &str) -> (&str, &str) {
    let has_tag = image.rsplit('/').next().is_some_and(|last| last.contains([':', '@']));
    if has_tag { (image, "") } else { (image, "latest") }
}

/// The error of an HTTP client says little; what caused it says what happened.
fn chain(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_cannot_be_is_refused_with_a_remedy() {
        let engine = |host| Engine::new(host, Duration::from_secs(1)).map(|engine| engine.host().to_owned());
        assert_eq!(engine(None).as_deref(), Ok(DEFAULT_HOST));
        assert_eq!(engine(Some("")).as_deref(), Ok(DEFAULT_HOST));
        assert_eq!(engine(Some("unix:///not/there.sock")).as_deref(), Ok("unix:///not/there.sock"), "not yet");
        assert_eq!(engine(Some("tcp://10.0.0.5:2375")).as_deref(), Ok("tcp://10.0.0.5:2375"));
        assert!(
            engine(Some("https://10.0.0.5:2376")).unwrap_err().contains("neither TLS nor SSH is spoken here; forward")
        );
        assert!(engine(Some("ssh://host")).unwrap_err().contains("forward the engine's socket"));
        assert!(engine(Some("engine.local")).unwrap_err().contains("is not an address like unix:///"));
    }

    #[test]
    fn an_image_without_a_tag_is_the_latest() {
        assert_eq!(name_and_tag("nginx"), ("nginx", "latest"));
        assert_eq!(name_and_tag("nginx:1.25"), ("nginx:1.25", ""));
        assert_eq!(name_and_tag("host:5000/nginx"), ("host:5000/nginx", "latest"));
        assert_eq!(name_and_tag("nginx@sha256:00"), ("nginx@sha256:00", ""));
    }
}
