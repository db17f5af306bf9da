//! The calls that Ringway makes to a Docker engine. Each call has a deadline and its own connection: no call uses a
//! connection that died with an engine.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bollard::Docker;
use bollard::errors::Error;
use bollard::models::{ContainerCreateBody, ContainerInspectResponse, EventMessage};
use bollard::query_parameters::{
    CreateContainerOptionsBuilder, EventsOptionsBuilder, InspectContainerOptions, InspectNetworkOptions,
    ListContainersOptionsBuilder, LogsOptionsBuilder, RemoveContainerOptionsBuilder, RenameContainerOptionsBuilder,
    StartContainerOptions, StopContainerOptionsBuilder,
};
use futures_util::stream::{BoxStream, StreamExt as _};

use super::container::Container;
use super::credentials;
use super::pull::{Failure, pull};
use crate::text::printable;

/// The engine's address unless `DOCKER_HOST` is set.
const DEFAULT_HOST: &str = "unix:///var/run/docker.sock";

/// Longest line of a container's output that Ringway keeps, in bytes.
const LONGEST_LINE: usize = 1024;

/// A client of a Docker engine, which may be unreachable. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Engine {
    host: Arc<str>,
    deadline: Duration,
    /// Credentials for registries.
    auth_file: Option<Arc<Path>>,
}

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The engine is unreachable or does not answer.
    #[error("cannot reach the Docker engine at {host}: {error}{}", remedy(host, error))]
    Away {
        /// The engine's address.
        host: Arc<str>,
        /// The error of the system.
        error: String,
    },
    /// The engine answered with an error.
    #[error("the Docker engine answered: {message}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// The engine's message.
        message: String,
    },
}

fn remedy(host: &str, error: &str) -> &'static str {
    if error.contains("ermission denied") {
        "; run Ringway as a user with access to the socket"
    } else if host.starts_with("unix:") && (error.contains("ocket not found") || error.contains("No such file")) {
        "; is it running? In a container: mount its socket, or set DOCKER_HOST"
    } else {
        ""
    }
}

impl EngineError {
    /// Whether the engine answered with this HTTP status.
    pub fn is_status(&self, wanted: u16) -> bool {
        matches!(self, Self::Refused { status, .. } if *status == wanted)
    }

    /// Whether the engine could not be reached: the error then says nothing about the subject of the call.
    pub fn is_away(&self) -> bool {
        matches!(self, Self::Away { .. })
    }

    /// Whether the engine lacks the image.
    pub fn is_no_image(&self) -> bool {
        matches!(self, Self::Refused { status: 404, message } if message.contains("No such image"))
    }
}

impl Engine {
    /// A client of the engine at `host`, the value of `DOCKER_HOST`; `None`: this machine's engine. `deadline` applies
    /// to each call.
    ///
    /// # Errors
    /// When `host` is not a valid address, or needs TLS or SSH.
    pub fn new(host: Option<&str>, deadline: Duration) -> Result<Self, String> {
        let host = host.filter(|host| !host.is_empty()).unwrap_or(DEFAULT_HOST);
        match Docker::connect_with_host(host) {
            Ok(_) | Err(Error::SocketNotFoundError(_)) => Ok(Self { host: host.into(), deadline, auth_file: None }),
            Err(Error::UnsupportedURISchemeError { .. }) if host.starts_with("https:") || host.starts_with("ssh:") => {
                Err(format!(
                    "DOCKER_HOST={host:?}: Ringway supports neither TLS nor SSH here; forward the engine's socket, \
                     for example with `ssh -nNT -L \
                 /run/engine.sock:/var/run/docker.sock host`, and set DOCKER_HOST=unix:///run/engine.sock"
                ))
            }
            Err(Error::UnsupportedURISchemeError { .. }) => {
                Err(format!("DOCKER_HOST={host:?} is not an address like {DEFAULT_HOST} or tcp://10.0.0.5:2375"))
            }
            Err(error) => Err(format!("DOCKER_HOST={host:?}: {error}")),
        }
    }

    /// The same engine, with a file of credentials for registries.
    #[must_use]
    pub fn with_auth_file(self, file: Option<&Path>) -> Self {
        Self { auth_file: file.map(Arc::from), ..self }
    }

    /// The engine's address, like `unix:///var/run/docker.sock`.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Every container that has all these labels (`name` or `name=value`), in any state.
    ///
    /// # Errors
    /// When the engine does not answer.
    pub async fn list(&self, labels: &[String]) -> Result<Vec<Container>, EngineError> {
        let options = ListContainersOptionsBuilder::new().all(true).filters(&with_labels(labels)).build();
        let listed = self.call(self.deadline, async |docker| docker.list_containers(Some(options)).await).await?;
        Ok(listed.into_iter().map(Container::from).collect())
    }

    /// Events of containers with these labels, from now on. The stream ends when the engine closes it.
    ///
    /// # Errors
    /// When the engine is unreachable.
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

    /// Creates a container and returns its id.
    ///
    /// # Errors
    /// Status 409 if the name is taken, 404 if the engine lacks the image.
    pub async fn create(&self, name: &str, body: ContainerCreateBody) -> Result<String, EngineError> {
        let options = CreateContainerOptionsBuilder::new().name(name).build();
        let made = self.call(self.deadline, async |docker| docker.create_container(Some(options), body).await).await?;
        Ok(made.id)
    }

    /// Starts a container. A running container is unaffected.
    ///
    /// # Errors
    /// When the container's process cannot be run, among others.
    pub async fn start(&self, id: &str) -> Result<(), EngineError> {
        self.call(self.deadline, async |docker| docker.start_container(id, None::<StartContainerOptions>).await).await
    }

    /// Stops a container: sends SIGTERM, and SIGKILL after `grace`.
    ///
    /// # Errors
    /// When the container does not exist, or the engine does not answer.
    pub async fn stop(&self, id: &str, grace: Duration) -> Result<(), EngineError> {
        let seconds = i32::try_from(grace.as_secs_f64().ceil() as i64).unwrap_or(i32::MAX);
        let options = StopContainerOptionsBuilder::new().t(seconds).build();
        self.call(self.deadline + grace, async |docker| docker.stop_container(id, Some(options)).await).await
    }

    /// Removes a container and its anonymous volumes. With `force` it removes a running container too. Succeeds if the
    /// container is already gone or being removed.
    ///
    /// # Errors
    /// Status 409 if the container runs and `force` is not set.
    pub async fn remove(&self, id: &str, force: bool) -> Result<(), EngineError> {
        let options = RemoveContainerOptionsBuilder::new().force(force).v(true).build();
        let removed = self.call(self.deadline, async |docker| docker.remove_container(id, Some(options)).await).await;
        match removed {
            Err(EngineError::Refused { status: 404, .. }) => Ok(()),
            Err(EngineError::Refused { status: 409, message }) if message.contains("already in progress") => Ok(()),
            other => other,
        }
    }

    /// Stops and removes a container. Succeeds if the container is already gone.
    ///
    /// # Errors
    /// When the engine is unreachable or refuses.
    pub async fn end(&self, id: &str, grace: Duration) -> Result<(), EngineError> {
        match self.stop(id, grace).await {
            Err(error) if error.is_away() => Err(error),
            // Removing by force also stops the container.
            _ => self.remove(id, true).await,
        }
    }

    /// A container's details, by id or name.
    ///
    /// # Errors
    /// When the container does not exist, or the engine does not answer.
    pub async fn inspect(&self, id: &str) -> Result<ContainerInspectResponse, EngineError> {
        self.call(self.deadline, async |docker| docker.inspect_container(id, None::<InspectContainerOptions>).await)
            .await
    }

    /// Whether the engine has an image of this name.
    ///
    /// # Errors
    /// When the engine does not answer.
    pub async fn has_image(&self, name: &str) -> Result<bool, EngineError> {
        is_there(self.call(self.deadline, async |docker| docker.inspect_image(name).await.map(drop)).await)
    }

    /// The id of the image with this name; `None` if the engine has none.
    ///
    /// # Errors
    /// When the engine does not answer.
    pub async fn image_id(&self, name: &str) -> Result<Option<String>, EngineError> {
        match self.call(self.deadline, async |docker| docker.inspect_image(name).await).await {
            Ok(image) => Ok(image.id),
            Err(error) if error.is_status(404) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Gives a container another name.
    ///
    /// # Errors
    /// When another container has the name, or the engine does not answer.
    pub async fn rename(&self, id: &str, name: &str) -> Result<(), EngineError> {
        let options = RenameContainerOptionsBuilder::new().name(name).build();
        self.call(self.deadline, async |docker| docker.rename_container(id, options).await).await
    }

    /// Whether the engine has a network of this name or id.
    ///
    /// # Errors
    /// When the engine does not answer.
    pub async fn has_network(&self, name: &str) -> Result<bool, EngineError> {
        let options = None::<InspectNetworkOptions>;
        is_there(self.call(self.deadline, async |docker| docker.inspect_network(name, options).await.map(drop)).await)
    }

    /// The last lines that a container wrote. Empty if the engine does not return them.
    pub async fn last_lines(&self, id: &str, count: usize) -> Vec<String> {
        let options = LogsOptionsBuilder::new().stdout(true).stderr(true).tail(&count.to_string()).build();
        let lines = async |docker: Docker| {
            let mut output = docker.logs(id, Some(options));
            let mut lines = Vec::new();
            while let Some(line) = output.next().await {
                let bytes = line?.into_bytes();
                let line = String::from_utf8_lossy(&bytes[..bytes.len().min(LONGEST_LINE)]);
                lines.push(printable(line.trim_end()));
            }
            Ok(lines)
        };
        self.call(self.deadline, lines).await.unwrap_or_default()
    }

    /// Pulls an image from its registry, with the credentials for it if there are any.
    ///
    /// # Errors
    /// When the registry is unreachable, the image does not exist, the credentials cannot be read, or the pull makes no progress.
    pub async fn pull(&self, image: &str) -> Result<(), EngineError> {
        let (name, tag) = name_and_tag(image);
        let credentials = match &self.auth_file {
            Some(file) => credentials::for_image(file, image).await.map_err(|fault| {
                let message = format!("docker.auth_file: {fault}");
                EngineError::Refused { status: 401, message }
            })?,
            None => None,
        };
        pull(&self.host, (name, tag), credentials.as_ref()).await.map_err(|failure| match failure {
            Failure::Away(error) | Failure::Refused { status: 503, message: error } => self.away(&error),
            Failure::Refused { status, message } => {
                EngineError::Refused { status, message: message.trim_end().to_owned() }
            }
        })
    }

    async fn call<T>(
        &self,
        deadline: Duration,
        call: impl AsyncFnOnce(Docker) -> Result<T, Error>,
    ) -> Result<T, EngineError> {
        // The client's own timeout is in whole seconds and would end the call before ours.
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

/// An image without a tag means `latest`; without a tag the API would pull all of them.
fn name_and_tag(image: &str) -> (&str, &str) {
    let has_tag = image.rsplit('/').next().is_some_and(|last| last.contains([':', '@']));
    if has_tag { (image, "") } else { (image, "latest") }
}

/// The innermost cause of an error: the outer errors of an HTTP client say little.
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
    fn an_invalid_host_is_refused_with_a_remedy() {
        let engine = |host| Engine::new(host, Duration::from_secs(1)).map(|engine| engine.host().to_owned());
        assert_eq!(engine(None).as_deref(), Ok(DEFAULT_HOST));
        assert_eq!(engine(Some("")).as_deref(), Ok(DEFAULT_HOST));
        assert_eq!(
            engine(Some("unix:///not/there.sock")).as_deref(),
            Ok("unix:///not/there.sock"),
            "the socket may appear later"
        );
        assert_eq!(engine(Some("tcp://10.0.0.5:2375")).as_deref(), Ok("tcp://10.0.0.5:2375"));
        assert!(
            engine(Some("https://10.0.0.5:2376"))
                .unwrap_err()
                .contains("Ringway supports neither TLS nor SSH here; forward")
        );
        assert!(engine(Some("ssh://host")).unwrap_err().contains("forward the engine's socket"));
        assert!(engine(Some("engine.local")).unwrap_err().contains("is not an address like unix:///"));
    }

    #[test]
    fn an_image_without_a_tag_means_latest() {
        assert_eq!(name_and_tag("nginx"), ("nginx", "latest"));
        assert_eq!(name_and_tag("nginx:1.25"), ("nginx:1.25", ""));
        assert_eq!(name_and_tag("host:5000/nginx"), ("host:5000/nginx", "latest"));
        assert_eq!(name_and_tag("nginx@sha256:00"), ("nginx@sha256:00", ""));
    }
}
