//! HTTP client of a running Ringway's side port.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use clap::Args;
use http_body_util::Full;
use hyper::header::{AUTHORIZATION, CONNECTION, HOST};
use hyper::http::request::Builder;
use hyper::{Request, Response, StatusCode};
use ringway::api::commands::HttpCall;
use ringway::api::status::Status;
use ringway::control::command::{Command, Report};
use ringway::http_client::exchange;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;

use super::Common;

const TIMEOUT: Duration = Duration::from_secs(5);

/// Longer than a read: a command may resolve names or wait for a successor.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(90);

/// Environment variable with the token of the side port.
pub(super) const TOKEN: &str = "RINGWAY_TOKEN";

const ANSWER_LIMIT: usize = 64 * 1024 * 1024;

/// How to reach the side port of a running Ringway.
#[derive(Debug, Args)]
pub(crate) struct Port {
    /// Address of the side port [default: the one in the config]
    #[arg(long, value_name = "ADDRESS")]
    pub(super) api: Option<SocketAddr>,
    /// File with the token of the side port [default: `api.token_file` of the config, then `RINGWAY_TOKEN`]
    #[arg(long, value_name = "FILE")]
    pub(super) token_file: Option<PathBuf>,
}

/// Sends a `GET` and returns the answer, whatever its status. An unspecified address (0.0.0.0, ::) means loopback.
pub(super) async fn get(address: SocketAddr, path: &str) -> anyhow::Result<Response<Bytes>> {
    ask(address, Request::get(path), String::new(), TIMEOUT).await
}

async fn ask(
    address: SocketAddr,
    request: Builder,
    body: String,
    timeout: Duration,
) -> anyhow::Result<Response<Bytes>> {
    let address = reachable(address);
    let request =
        request.header(HOST, address.to_string()).header(CONNECTION, "close").body(Full::new(Bytes::from(body)))?;
    let answer = tokio::time::timeout(timeout, async {
        let stream = TcpStream::connect(address).await?;
        anyhow::Ok(exchange(stream, request, ANSWER_LIMIT).await?)
    });
    answer.await.context("no answer in time").flatten()
}

/// Reads `/api/status`.
pub(super) async fn status(common: &Common, port: &Port) -> anyhow::Result<Status> {
    read(common, port, "/api/status").await
}

/// Sends a `GET`, and returns its answer.
pub(super) async fn read<T: DeserializeOwned>(common: &Common, port: &Port, path: &str) -> anyhow::Result<T> {
    with_token(common, port, Request::get(path), String::new()).await
}

/// Sends a `DELETE`, and returns its answer.
pub(super) async fn delete<T: DeserializeOwned>(common: &Common, port: &Port, path: &str) -> anyhow::Result<T> {
    with_token(common, port, Request::delete(path), String::new()).await
}

/// Why the side port refuses a call.
fn refusal(answer: &Response<Bytes>) -> String {
    let error: serde_json::Value = serde_json::from_slice(answer.body()).unwrap_or_default();
    let message = error["error"]["message"].as_str().unwrap_or_default();
    format!("refused ({}): {message}", answer.status().as_u16())
}

/// Sends a command and waits for its report.
pub(super) async fn run(common: &Common, port: &Port, command: &Command) -> anyhow::Result<Report> {
    let HttpCall { method, path, body } = HttpCall::of(command);
    with_token(common, port, Request::builder().method(method).uri(path), body).await
}

/// Sends a call with the token, if there is one.
async fn with_token<T: DeserializeOwned>(
    common: &Common,
    port: &Port,
    request: Builder,
    body: String,
) -> anyhow::Result<T> {
    let address = address(common, port)?;
    let mut request = request;
    if let Some(token) = token(common, port)? {
        request = request.header(AUTHORIZATION, format!("Bearer {token}"));
    }
    let answer = ask(address, request, body, COMMAND_TIMEOUT).await.with_context(|| unreachable(address))?;
    if answer.status().is_success() {
        return serde_json::from_slice(answer.body()).context("the side port's answer is of another version");
    }
    anyhow::ensure!(answer.status() != StatusCode::UNAUTHORIZED, "wrong or missing token: use --token-file or {TOKEN}");
    anyhow::bail!(refusal(&answer))
}

fn address(common: &Common, port: &Port) -> anyhow::Result<SocketAddr> {
    match port.api {
        Some(address) => Ok(address),
        None => Ok(common.config()?.0.api.listen),
    }
}

fn unreachable(address: SocketAddr) -> String {
    format!("cannot reach the side port at {address}; check that Ringway runs there")
}

/// The token from `--token-file`, the config or the environment, in this order; `None` without any.
fn token(common: &Common, port: &Port) -> anyhow::Result<Option<String>> {
    let file = match &port.token_file {
        Some(file) => Some(file.clone()),
        // The same order as the server: the file named in the config comes before the environment.
        None => common.config().ok().and_then(|(config, _)| config.api.token_file),
    };
    match file {
        Some(file) => {
            let text = std::fs::read_to_string(&file).with_context(|| format!("{}", file.display()))?;
            Ok(Some(text.trim().to_owned()))
        }
        None => Ok(std::env::var(TOKEN).ok().filter(|token| !token.is_empty())),
    }
}

/// Replaces an unspecified address (0.0.0.0, ::) by loopback.
pub(super) fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}
