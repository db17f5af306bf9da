//! A client for the side port of Ringway.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context as _;
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Bytes;
use hyper::client::conn::http1::handshake;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

/// The answer to an upgrade comes when the new process is ready.
const TIMEOUT: Duration = Duration::from_secs(90);

/// The side port of a Ringway.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SidePort(SocketAddr);

impl SidePort {
    pub(crate) fn new(address: SocketAddr) -> Self {
        Self(address)
    }

    pub(crate) async fn status(&self) -> anyhow::Result<Value> {
        Ok(serde_json::from_str(&self.call(Method::GET, "/api/status").await?)?)
    }

    pub(crate) async fn metrics(&self) -> anyhow::Result<String> {
        self.call(Method::GET, "/metrics").await
    }

    /// Whether every pool has had a healthy backend. False while the side port does not answer.
    pub(crate) async fn is_ready(&self) -> bool {
        self.call(Method::GET, "/readyz").await.is_ok()
    }

    pub(crate) async fn health(&self) -> anyhow::Result<String> {
        self.call(Method::GET, "/healthz").await
    }

    pub(crate) async fn post(&self, path: &str) -> anyhow::Result<String> {
        self.call(Method::POST, path).await
    }

    async fn call(&self, method: Method, path: &str) -> anyhow::Result<String> {
        let address = self.0;
        let answer = tokio::time::timeout(TIMEOUT, async {
            let stream = TcpStream::connect(address).await?;
            let (mut sender, connection) = handshake(TokioIo::new(stream)).await?;
            tokio::spawn(connection);
            let request = Request::builder().method(method).uri(path).header("host", address.to_string());
            let answer = sender.send_request(request.body(Empty::<Bytes>::new())?).await?;
            let status = answer.status();
            let body = answer.into_body().collect().await?.to_bytes();
            anyhow::Ok((status, String::from_utf8_lossy(&body).into_owned()))
        });
        let (status, body) = answer.await.context("no answer in time").flatten()?;
        anyhow::ensure!(status.is_success(), "{status}: {body}");
        Ok(body)
    }
}
