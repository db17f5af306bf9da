//! Images of a registry that asks for a password.

use std::collections::HashMap;
use std::process::Command;
use std::sync::Arc;

use axum::extract::{Path as UrlPath, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use serde_json::{Value, json};

use crate::harness::engine::{IMAGE, Owner};
use crate::harness::eventually_async;

/// `user:??>>~~??>`, whose bytes differ in the two alphabets of Base64.
const RIGHT: &str = "dXNlcjo/Pz4+fn4/Pz4=";

/// `user:wrong`
const WRONG: &str = "dXNlcjp3cm9uZw==";

/// A registry with one image, which it shows to a user with a password.
struct Registry {
    address: std::net::SocketAddr,
    server: tokio::task::JoinHandle<()>,
}

/// What the registry has, by digest, and the digest of the manifest.
struct Content {
    blobs: HashMap<String, Vec<u8>>,
    manifest: String,
}

impl Registry {
    async fn start(owner: &Owner) -> Self {
        let content = Arc::new(content(owner));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = axum::Router::new()
            .route("/v2/", get(async |headers: HeaderMap| refusal(&headers).unwrap_or(StatusCode::OK.into_response())))
            .route("/v2/team/app/{kind}/{reference}", get(blob))
            .with_state(content);
        let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { address, server }
    }

    fn image(&self) -> String {
        format!("{}/team/app:1", self.address)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// The answer to a call without the right password.
fn refusal(headers: &HeaderMap) -> Option<Response> {
    let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    if given == Some(&format!("Basic {RIGHT}")) {
        return None;
    }
    let challenge = [(header::WWW_AUTHENTICATE, "Basic realm=\"test\"")];
    let body = json!({ "errors": [{ "code": "UNAUTHORIZED", "message": "authentication required" }] });
    Some((StatusCode::UNAUTHORIZED, challenge, body.to_string()).into_response())
}

async fn blob(
    State(content): State<Arc<Content>>,
    UrlPath((kind, reference)): UrlPath<(String, String)>,
    headers: HeaderMap,
) -> Response {
    if let Some(refused) = refusal(&headers) {
        return refused;
    }
    let digest = if reference == "1" { &content.manifest } else { &reference };
    let Some(bytes) = content.blobs.get(digest) else { return StatusCode::NOT_FOUND.into_response() };
    let media = if kind == "manifests" { MANIFEST } else { "application/octet-stream" };
    ([("content-type", media), ("docker-content-digest", digest)], bytes.clone()).into_response()
}

const MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// Takes the image of the repository apart.
fn content(owner: &Owner) -> Content {
    let folder = tempfile::tempdir().unwrap();
    let archive = folder.path().join("image.tar");
    owner.docker(&["save", "-o", archive.to_str().unwrap(), IMAGE]);
    let untar = Command::new("tar").arg("-xf").arg(&archive).arg("-C").arg(folder.path()).status().unwrap();
    assert!(untar.success());
    let read = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
    let saved: Value = serde_json::from_slice(&read("manifest.json")).unwrap();
    let mut blobs = HashMap::new();
    let mut add = |media: &str, bytes: Vec<u8>| {
        let file = folder.path().join("blob");
        std::fs::write(&file, &bytes).unwrap();
        let sum = Command::new("sha256sum").arg(&file).output().unwrap().stdout;
        let digest = format!("sha256:{}", String::from_utf8_lossy(&sum).split(' ').next().unwrap());
        let described = json!({ "mediaType": media, "size": bytes.len(), "digest": digest });
        blobs.insert(digest, bytes);
        described
    };
    let config = add("application/vnd.docker.container.image.v1+json", read(saved[0]["Config"].as_str().unwrap()));
    let layers: Vec<_> =
        saved[0]["Layers"].as_array().unwrap().iter().map(|layer| read(layer.as_str().unwrap())).collect();
    let layers: Vec<_> =
        layers.into_iter().map(|layer| add("application/vnd.docker.image.rootfs.diff.tar", layer)).collect();
    let manifest = json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers });
    let manifest = add(MANIFEST, manifest.to_string().into_bytes())["digest"].as_str().unwrap().to_owned();
    Content { blobs, manifest }
}

/// Removes the image in the end.
struct Pulled<'a>(&'a Owner, String);

impl Drop for Pulled<'_> {
    fn drop(&mut self) {
        self.0.try_docker(&["rmi", "-f", &self.1]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a Docker engine"]
async fn an_image_is_pulled_with_the_password_that_the_file_has_at_that_time() {
    let owner = Owner::new().await;
    let registry = Registry::start(&owner).await;
    let _pulled = Pulled(&owner, registry.image());
    let file = tempfile::NamedTempFile::new().unwrap();
    let write = |auth: &str| {
        let auths = json!({ "auths": { registry.address.to_string(): { "auth": auth } } });
        std::fs::write(file.path(), auths.to_string()).unwrap();
    };
    write(WRONG);
    let yaml = owner
        .config(1, "", "health_check: { kind: none }")
        .replace(IMAGE, &registry.image())
        .replace("pull: never", "pull: missing")
        .replacen("docker: {", &format!("docker: {{ auth_file: {},", file.path().display()), 1);
    let program = owner.program(&yaml).await;
    let backend = async || program.status().await["pools"][0]["backends"][0].clone();
    eventually_async("a refusal", async || {
        backend().await["last_exit"]["reason"].as_str().is_some_and(|why| why.contains("cannot pull it"))
    })
    .await;
    let reason = backend().await["last_exit"]["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("cannot pull it: unauthorized") && !reason.contains("wrong"), "{reason}");
    write(RIGHT);
    eventually_async("a replica", async || backend().await["state"] == "healthy").await;
    assert!(owner.docker(&["images", "-q", &registry.image()]).len() > 5);
}
