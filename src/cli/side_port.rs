//! Questions to a running Ringway's side port, or to another server that speaks HTTP.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONNECTION, HOST};
use hyper::{Request, Response};
use ringway::http_client::exchange;
use tokio::net::TcpStream;

const TIMEOUT: Duration = Duration::from_secs(5);

const ANSWER_LIMIT: usize = 64 * 1024 * 1024;

/// The answer to a `GET`, whatever its status. An address that stands for all of this machine's is taken for its
/// loopback.
pub(super) async fn get(address: SocketAddr, path: &str) -> anyhow::Result<Response<Bytes>> {
    let address = reachable(address);
    let request =
        Request::get(path).header(HOST, address.to_string()).header(CONNECTION, "close").body(Full::default())?;
    let answer = tokio::time::timeout(TIMEOUT, async {
        let stream = TcpStream::connect(address).await?;
        anyhow::Ok(exchange(stream, request, ANSWER_LIMIT).await?)
    });
    answer.await.context("no answer in time").flatten()
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
