//! Questions to a running Ringway's side port, or to another server that speaks HTTP.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{AUTHORIZATION, CONNECTION, HOST};
use hyper::http::request::Builder;
use hyper::{Method, Request, Response};
use ringway::api::status::Status;
use ringway::control::operator::Report;
use ringway::http_client::exchange;
use tokio::net::TcpStream;

use super::Common;
use super::orders::Port;

const TIMEOUT: Duration = Duration::from_secs(5);

/// An order may have to look names up, or to wait for a successor.
const ORDER_TIMEOUT: Duration = Duration::from_secs(90);

/// The environment variable with the side port's token.
pub(super) const TOKEN: &str = "RINGWAY_TOKEN";

const ANSWER_LIMIT: usize = 64 * 1024 * 1024;

/// The answer to a `GET`, whatever its status. An address that stands for all of this machine's is taken for its
/// loopback.
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

/// What is running, from the address given or the config's.
pub(super) async fn status(common: &Common, port: &Port) -> anyhow::Result<Status> {
    let address = address(common, port)?;
    let answer = get(address, "/api/status").await.with_context(|| unreachable(address))?;
    anyhow::ensure!(answer.status().is_success(), "the side port at {address} answers {}", answer.status());
    serde_json::from_slice(answer.body()).context("the side port's answer is not a status")
}

/// Makes a call that changes something.
pub(super) async fn change(
    common: &Common,
    port: &Port,
    method: Method,
    path: &str,
    body: String,
) -> anyhow::Result<Report> {
    let address = address(common, port)?;
    let mut request = Request::builder().method(method).uri(path);
    if let Some(token) = token(common, port)? {
        request = request.header(AUTHORIZATION, format!("Bearer {token}"));
    }
    let answer = ask(address, request, body, ORDER_TIMEOUT).await.with_context(|| unreachable(address))?;
    if answer.status().is_success() {
        return serde_json::from_slice(answer.body()).context("the side port's answer is not a report");
    }
    let error: serde_json::Value = serde_json::from_slice(answer.body()).unwrap_or_default();
    let message = error["error"]["message"].as_str().unwrap_or_default();
    anyhow::bail!("refused ({}): {message}", answer.status().as_u16())
}

fn address(common: &Common, port: &Port) -> anyhow::Result<SocketAddr> {
    match port.api {
        Some(address) => Ok(address),
        None => Ok(common.config()?.0.api.listen),
    }
}

fn unreachable(address: SocketAddr) -> String {
    format!("cannot reach the side port at {address}; is Ringway running there")
}

/// The token of `--token-file`, the environment or the config; none where none of them has one.
fn token(common: &Common, port: &Port) -> anyhow::Result<Option<String>> {
    let file = match &port.token_file {
        Some(file) => Some(file.clone()),
        // As the server does it: the config's file before the environment.
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

/// Where an address that stands for all of this machine's can be reached.
pub(super) fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}
