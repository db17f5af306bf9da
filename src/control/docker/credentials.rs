//! Credentials for registries, from a file as `docker login` writes it: `auths`, `credHelpers` and `credsStore`.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bollard::auth::DockerCredentials;
use serde::Deserialize;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use crate::control::PRIVATE_VARIABLES;
use crate::text::printable;

/// Longest time to read the file, and for a helper to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// The registry of images whose names have no registry.
const HUB: &str = "docker.io";

/// The name of that registry in the file.
const HUB_IN_FILE: &str = "https://index.docker.io/v1/";

/// The user name with which a helper says that its secret is a token.
const TOKEN: &str = "<token>";

/// A file as `docker login` writes it. It may have further fields.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct File {
    auths: BTreeMap<String, Entry>,
    #[serde(rename = "credHelpers")]
    helpers: BTreeMap<String, String>,
    #[serde(rename = "credsStore")]
    store: Option<String>,
}

/// The credentials for one registry.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Entry {
    /// `user:password` in Base64.
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    #[serde(rename = "identitytoken")]
    identity_token: Option<String>,
    #[serde(rename = "registrytoken")]
    registry_token: Option<String>,
}

impl std::fmt::Debug for Entry {
    /// Without its secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Entry")
    }
}

/// What a helper answers.
#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "Username")]
    username: String,
    #[serde(rename = "Secret")]
    secret: String,
}

/// Where the credentials of a registry are.
#[derive(Debug)]
enum Found<'a> {
    /// Nowhere: a registry may let everybody pull.
    Nowhere,
    InFile(&'a Entry),
    /// A program knows them, under this name.
    WithHelper(&'a str, String),
}

/// Reads the file, without its credentials.
///
/// # Errors
/// Why it cannot be used, with the remedy.
pub fn check(file: &Path) -> Result<(), String> {
    parse(file, std::fs::read(file)).map(drop)
}

/// The credentials with which to pull the image; `None`: the file has none for its registry. Reads the file each time, because tokens
/// in it may be short-lived.
///
/// # Errors
/// When the file or a helper does not work.
pub(super) async fn for_image(file: &Path, image: &str) -> Result<Option<DockerCredentials>, String> {
    let path = file.to_owned();
    let read = tokio::task::spawn_blocking(move || std::fs::read(path));
    let read = match tokio::time::timeout(PATIENCE, read).await {
        Ok(read) => read.unwrap_or_else(|panicked| Err(io::Error::other(panicked))),
        Err(_elapsed) => Err(io::Error::other(format!("it was not read within {} s", PATIENCE.as_secs()))),
    };
    let parsed = parse(file, read)?;
    let registry = registry_of(image);
    let fault = |what: String| format!("{}: {registry}: {what}", file.display());
    match parsed.find(image) {
        Found::Nowhere => Ok(None),
        Found::InFile(entry) => entry.credentials(registry).map(Some).map_err(fault),
        Found::WithHelper(helper, name) => ask(helper, &name).await.map_err(fault),
    }
}

fn parse(file: &Path, read: io::Result<Vec<u8>>) -> Result<File, String> {
    let place = file.display();
    let bytes = read.map_err(|error| format!("{place}: {error}"))?;
    let parsed = serde_json::from_slice(&bytes);
    // The message of the parser has no text of the file, which has secrets.
    parsed.map_err(|error| {
        let (line, column) = (error.line(), error.column());
        format!("{place}:{line}:{column}: is not a file as `docker login` writes it: log in again, or correct it")
    })
}

impl File {
    /// A helper of the registry comes first, then the store of all, as for the client of the engine.
    fn find(&self, image: &str) -> Found<'_> {
        let is_named = |name: &&String| !name.is_empty();
        if let Some((name, helper)) = best(&self.helpers, image).filter(|(_, helper)| is_named(helper)) {
            return Found::WithHelper(helper, name.clone());
        }
        let entry = best(&self.auths, image);
        if let Some(store) = self.store.as_ref().filter(is_named) {
            return Found::WithHelper(
                store,
                entry.map_or(server_address(registry_of(image)), |(name, _)| name.clone()),
            );
        }
        match entry {
            Some((_, entry)) if !entry.is_empty() => Found::InFile(entry),
            _ => Found::Nowhere,
        }
    }
}

/// The entry for an image: of those whose names fit, the one with the longest path, as `podman login registry/team` writes it. Of equals
/// the one that `docker login` writes, or the first by name.
fn best<'a, T>(entries: &'a BTreeMap<String, T>, image: &str) -> Option<(&'a String, &'a T)> {
    let fitting = entries.iter().filter_map(|(name, entry)| Some((path_if_fits(name, image)?, name, entry)));
    let first = fitting.rev().max_by_key(|(path, name, _)| (path.len(), *name == HUB_IN_FILE));
    first.map(|(_, name, entry)| (name, entry))
}

/// The path in the name of an entry, if the entry is for this image: `https://registry.example.com/v1/` is for all of a registry.
fn path_if_fits<'a>(name: &'a str, image: &str) -> Option<&'a str> {
    let name = name.split_once("://").map_or(name, |(_, rest)| rest).trim_end_matches('/');
    let (host, path) = name.split_once('/').unwrap_or((name, ""));
    let path = if matches!(path, "v1" | "v2") { "" } else { path };
    if bare(host) != registry_of(image) {
        return None;
    }
    let first = image.split_once('/').map_or("", |(first, _)| first);
    let repository = if bare(first) == registry_of(image) { &image[first.len() + 1..] } else { image };
    let rest = repository.strip_prefix(path)?;
    (path.is_empty() || rest.is_empty() || rest.starts_with(['/', ':', '@'])).then_some(path)
}

/// The host and port of a registry, as names of images have it.
fn bare(host: &str) -> &str {
    if matches!(host, "index.docker.io" | "registry-1.docker.io") { HUB } else { host }
}

/// The registry of an image: the part before the first `/`, if it looks like a host.
fn registry_of(image: &str) -> &str {
    let first = image.split_once('/').map(|(first, _)| first);
    let registry = first.filter(|first| first.contains(['.', ':']) || *first == "localhost").unwrap_or(HUB);
    bare(registry)
}

impl Entry {
    /// Whether nobody is logged in: the entry of a store that keeps the credentials elsewhere.
    fn is_empty(&self) -> bool {
        let Self { auth, username, password, identity_token, registry_token } = self;
        let all = [auth, username, password, identity_token, registry_token];
        all.into_iter().flatten().all(String::is_empty)
    }

    fn credentials(&self, registry: &str) -> Result<DockerCredentials, String> {
        let (mut username, mut password) = (self.username.clone(), self.password.clone());
        if let Some(auth) = self.auth.as_deref().filter(|auth| !auth.is_empty()) {
            let decoded =
                STANDARD.decode(auth.trim_end_matches('\0')).ok().and_then(|bytes| String::from_utf8(bytes).ok());
            let pair = decoded.as_deref().and_then(|pair| pair.split_once(':'));
            let (user, secret) = pair.ok_or("`auth` is not user:password in Base64: log in again")?;
            (username, password) = (Some(user.to_owned()), Some(secret.trim_end_matches('\0').to_owned()));
        }
        let (identitytoken, registrytoken) = (self.identity_token.clone(), self.registry_token.clone());
        if password.is_none() && identitytoken.is_none() && registrytoken.is_none() {
            return Err("the entry has neither a password nor a token: log in again".to_owned());
        }
        let serveraddress = Some(server_address(registry));
        Ok(DockerCredentials {
            username,
            password,
            serveraddress,
            identitytoken,
            registrytoken,
            ..DockerCredentials::default()
        })
    }
}

fn server_address(registry: &str) -> String {
    if registry == HUB { HUB_IN_FILE.to_owned() } else { registry.to_owned() }
}

/// Asks the program `docker-credential-HELPER`. `None`: it has no credentials for the registry.
async fn ask(helper: &str, registry: &str) -> Result<Option<DockerCredentials>, String> {
    if helper.contains('/') {
        return Err(format!(
            "{helper:?} is not the name of a helper: write the part of its name after docker-credential-"
        ));
    }
    ask_program(&format!("docker-credential-{helper}"), registry).await
}

async fn ask_program(program: &str, registry: &str) -> Result<Option<DockerCredentials>, String> {
    let mut command = Command::new(program);
    for name in PRIVATE_VARIABLES {
        command.env_remove(name);
    }
    command.arg("get").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
    let talk = async {
        let mut child = command.spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            // A helper that ends without reading tells why.
            let _ = stdin.write_all(registry.as_bytes()).await;
        }
        child.wait_with_output().await
    };
    let output =
        tokio::time::timeout(PATIENCE, talk).await.unwrap_or_else(|_elapsed| Err(io::ErrorKind::TimedOut.into()));
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        // The protocol of the helpers has no other sign for this.
        return if text.contains("credentials not found") {
            Ok(None)
        } else {
            Err(format!("{program}: {}: {}", output.status, printable(text.lines().next().unwrap_or_default())))
        };
    }
    let Answer { username, secret } =
        serde_json::from_str(&text).map_err(|_| format!("{program}: its answer is not one of a credential helper"))?;
    if username.is_empty() && secret.is_empty() {
        return Ok(None);
    }
    let host = registry.split_once("://").map_or(registry, |(_, rest)| rest).split('/').next().unwrap_or_default();
    let serveraddress = Some(server_address(bare(host)));
    let (username, password, identitytoken) =
        if username == TOKEN { (None, None, Some(secret)) } else { (Some(username), Some(secret), None) };
    Ok(Some(DockerCredentials { username, password, serveraddress, identitytoken, ..DockerCredentials::default() }))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// User, password and registry.
    type Three = (Option<String>, Option<String>, Option<String>);

    async fn found(json: &str, image: &str) -> Result<Option<Three>, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), json).unwrap();
        let place = file.path().display().to_string();
        let found = for_image(file.path(), image).await.map_err(|error| error.replace(&place, "FILE"));
        found.map(|found| found.map(|one| (one.username, one.password, one.serveraddress)))
    }

    fn user(name: &str, password: &str, server: &str) -> Three {
        (Some(name.to_owned()), Some(password.to_owned()), Some(server.to_owned()))
    }

    #[tokio::test]
    async fn an_image_gets_the_credentials_of_its_registry() {
        // `u:p:w` and `hub:secret`
        let json = r#"{ "auths": {
            "https://registry.example.com:5000/v2/": { "auth": "dTpwOnc=" },
            "https://index.docker.io/v1/": { "auth": "aHViOnNlY3JldA==" },
            "docker.io": { "auth": "b3RoZXI6eA==" },
            "https://index.docker.io/v1/access-token": { "auth": "dG9rZW46eA==" },
            "plain.example": { "username": "a", "password": "b" },
            "plain.example/team": { "username": "t", "password": "b" },
            "half.example": { "username": "a" },
            "empty.example": {}
        }, "HttpHeaders": { "User-Agent": "x" } }"#;
        for (image, wanted) in [
            ("registry.example.com:5000/team/app:1", Some(user("u", "p:w", "registry.example.com:5000"))),
            ("registry.example.com/team/app", None),
            ("nginx", Some(user("hub", "secret", HUB_IN_FILE))),
            ("team/app:2", Some(user("hub", "secret", HUB_IN_FILE))),
            ("docker.io/library/nginx", Some(user("hub", "secret", HUB_IN_FILE))),
            ("plain.example/app@sha256:00", Some(user("a", "b", "plain.example"))),
            ("plain.example/team/app:1", Some(user("t", "b", "plain.example"))),
            ("plain.example/team", Some(user("t", "b", "plain.example"))),
            ("plain.example/teams/app", Some(user("a", "b", "plain.example"))),
            ("empty.example/app", None),
            ("localhost/app", None),
        ] {
            assert_eq!(found(json, image).await.unwrap(), wanted, "{image}");
        }
        let error = found(json, "half.example/app").await.unwrap_err();
        assert_eq!(error, "FILE: half.example: the entry has neither a password nor a token: log in again");
    }

    #[tokio::test]
    async fn faults_name_the_file_and_show_no_secret() {
        let error = found(r#"{ "auths": { "a.example": { "auth": "secret" } } }"#, "a.example/x").await.unwrap_err();
        assert_eq!(error, "FILE: a.example: `auth` is not user:password in Base64: log in again");
        for json in ["", "7", r#"{ "auths": { "a.example": "secret" } }"#] {
            let error = found(json, "a.example/x").await.unwrap_err();
            assert!(
                error.starts_with("FILE:") && error.contains("log in again") && !error.contains("secret"),
                "{error}"
            );
        }
        let missing = for_image(Path::new("/no/such/file"), "x").await.unwrap_err();
        assert_eq!(missing, "/no/such/file: No such file or directory (os error 2)");
        assert_eq!(check(Path::new("/no/such/file")).unwrap_err(), missing);
    }

    #[tokio::test]
    async fn helpers_are_asked_and_their_failures_are_told() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, script: &str| {
            let path = folder.path().join(format!("docker-credential-{name}"));
            std::fs::write(&path, format!("#!/bin/sh\nread -r registry\n{script}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        };
        write("user", r#"echo "{\"ServerURL\":\"$registry\",\"Username\":\"u-$registry\",\"Secret\":\"s\"}""#);
        write("token", r#"echo '{"Username":"<token>","Secret":"t"}'"#);
        write("nobody", r#"echo '{"Username":"","Secret":""}'"#);
        write("none", "echo credentials not found in native keychain; exit 1");
        write("broken", "echo no keychain; exit 3");
        // The programs are found by their full names, because tests share the variable PATH.
        let with = async |name: &str, registry: &str| {
            let program = folder.path().join(format!("docker-credential-{name}"));
            ask_program(&program.display().to_string(), registry).await
        };
        let of_user = with("user", "r.example").await.unwrap().unwrap();
        assert_eq!((of_user.username.as_deref(), of_user.password.as_deref()), (Some("u-r.example"), Some("s")));
        assert_eq!(with("token", "r.example").await.unwrap().unwrap().identitytoken.as_deref(), Some("t"));
        assert!(with("none", "r.example").await.unwrap().is_none());
        assert!(with("nobody", "r.example").await.unwrap().is_none());
        assert!(with("broken", "r.example").await.unwrap_err().ends_with("exit status: 3: no keychain"));
        assert!(with("absent", "r.example").await.unwrap_err().contains("No such file"));

        let json =
            r#"{ "auths": { "a.example": {} }, "credHelpers": { "b.example": "../../sh" }, "credsStore": "no-such" }"#;
        let error = found(json, "a.example/x").await.unwrap_err();
        assert!(error.contains("a.example: docker-credential-no-such: No such file"), "{error}");
        let json = json.replace("../../sh", "");
        let error = found(&json, "b.example/x").await.unwrap_err();
        assert!(error.contains("docker-credential-no-such"), "an empty name means no helper: {error}");
        let json = json.replace("\"b.example\": \"\"", "\"b.example\": \"../../sh\"");
        let error = found(&json, "b.example/x").await.unwrap_err();
        assert!(error.contains("is not the name of a helper"), "{error}");
    }
}
