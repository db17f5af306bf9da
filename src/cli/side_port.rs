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
use ringway::address::host_and_port;
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
#[command(next_help_heading = "Side port")]
pub(crate) struct Port {
    /// Address of the side port, like localhost:8001 [default: the one in the config]
    #[arg(long, value_name = "ADDRESS", value_parser = address)]
    pub(super) api: Option<String>,
    /// File with the token of the side port [default: `api.token_file` of the config, then `RINGWAY_TOKEN`]
    #[arg(long, value_name = "FILE")]
    pub(super) token_file: Option<PathBuf>,
}

/// An address as the option takes it: `host:port`.
fn address(text: &str) -> Result<String, String> {
    match host_and_port(text)? {
        ("" | "*", port) => Err(format!("has no host: write it like localhost:{port}")),
        (_, 0) => Err("port 0 is not an address: write the port of the side port, like 8001".to_owned()),
        _ => Ok(text.to_owned()),
    }
}

/// Sends a `GET` and returns the answer, whatever its status. `address` is `host:port`.
pub(super) async fn get(address: &str, path: &str) -> anyhow::Result<Response<Bytes>> {
    ask(address, Request::get(path), String::new(), TIMEOUT).await
}

async fn ask(address: &str, request: Builder, body: String, timeout: Duration) -> anyhow::Result<Response<Bytes>> {
    let address = reachable(address);
    let request = request.header(HOST, &address).header(CONNECTION, "close").body(Full::new(Bytes::from(body)))?;
    let answer = tokio::time::timeout(timeout, async {
        let stream = TcpStream::connect(&address).await?;
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

/// Sends a `GET`, and returns the body of its answer.
pub(super) async fn body(common: &Common, port: &Port, path: &str) -> anyhow::Result<Bytes> {
    call(common, port, Request::get(path), String::new()).await
}

/// Sends a `DELETE`, and returns its answer.
pub(super) async fn delete<T: DeserializeOwned>(common: &Common, port: &Port, path: &str) -> anyhow::Result<T> {
    with_token(common, port, Request::delete(path), String::new()).await
}

/// Why the side port refuses a call.
fn refusal(answer: &Response<Bytes>) -> String {
    let error: serde_json::Value = serde_json::from_slice(answer.body()).unwrap_or_default();
    let message = error["error"]["message"].as_str().unwrap_or_default();
    if message.is_empty() {
        format!("refused with the status {}", answer.status())
    } else {
        format!("refused: {message}")
    }
}

/// Asks what a command other than a reload would do.
pub(super) async fn dry_run(common: &Common, port: &Port, command: &Command) -> anyhow::Result<Report> {
    let HttpCall { method, path, body } = HttpCall::of(command);
    with_token(common, port, Request::builder().method(method).uri(path + "?dry_run=true"), body).await
}

/// Sends a command and waits for its report.
pub(super) async fn run(common: &Common, port: &Port, command: &Command) -> anyhow::Result<Report> {
    let HttpCall { method, path, body } = HttpCall::of(command);
    with_token(common, port, Request::builder().method(method).uri(path), body).await
}

async fn with_token<T: DeserializeOwned>(
    common: &Common,
    port: &Port,
    request: Builder,
    body: String,
) -> anyhow::Result<T> {
    let answer = call(common, port, request, body).await?;
    serde_json::from_slice(&answer).context("the side port's answer is of another version")
}

/// Sends a call with the token, if there is one.
async fn call(common: &Common, port: &Port, request: Builder, body: String) -> anyhow::Result<Bytes> {
    let api = Api::of(common, port)?;
    let mut request = request;
    if let Some(token) = &api.token {
        request = request.header(AUTHORIZATION, format!("Bearer {token}"));
    }
    let answer = ask(&api.address, request, body, COMMAND_TIMEOUT).await.with_context(|| unreachable(&api))?;
    if answer.status().is_success() {
        return Ok(answer.into_body());
    }
    anyhow::ensure!(answer.status() != StatusCode::UNAUTHORIZED, "wrong or missing token: use --token-file or {TOKEN}");
    anyhow::bail!(refusal(&answer))
}

fn unreachable(api: &Api) -> String {
    let Api { address, from, .. } = api;
    format!(
        "cannot reach the side port at {address}{from}; check that Ringway runs there, or give --api ADDRESS or --config FILE"
    )
}

/// Where the side port is, and its token.
struct Api {
    address: String,
    /// Who says so, if the user did not.
    from: String,
    token: Option<String>,
}

impl Api {
    /// From the options, then from the section `api` of the config. The rest of the config may be wrong: a command must work
    /// while somebody edits it.
    fn of(common: &Common, port: &Port) -> anyhow::Result<Self> {
        let source = common.source();
        let configured = source.api();
        // The same order as the server: the file named in the config comes before the environment.
        let file = port.token_file.clone().or_else(|| configured.as_ref().ok()?.token_file.clone());
        let address = if let Some(address) = &port.api {
            address.clone()
        } else {
            let help = "cannot read the address of the side port; give it with --api ADDRESS";
            configured.context(help)?.listen.to_string()
        };
        let token = match file {
            Some(file) => {
                let text = std::fs::read_to_string(&file).with_context(|| format!("{}", file.display()))?;
                Some(text.trim().to_owned())
            }
            None => std::env::var(TOKEN).ok().filter(|token| !token.is_empty()),
        };
        let from = if port.api.is_some() { String::new() } else { format!(" (from {source})") };
        Ok(Self { address, from, token })
    }
}

/// Replaces an unspecified address (0.0.0.0, ::) by loopback.
pub(super) fn reachable(address: &str) -> String {
    let Ok(parsed) = address.parse::<SocketAddr>() else { return address.to_owned() };
    let ip = match parsed.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, parsed.port()).to_string()
}
