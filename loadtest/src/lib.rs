//! Load for a balancer, and counts of what became of it. The programs and the tests share these functions.
//!
//! # Layout
//!
//! - this file: one request, and the three kinds of load
//! - [`report`]: what became of it
//! - [`soak`]: all kinds for long, with orders to the balancer in between; [`plot`] draws it

pub mod plot;
pub mod soak;

mod report;
mod side_port;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt as _, Empty};
use hyper::Request;
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

pub use self::report::{Outcome, Report, Summary};

/// After this long a request counts as failed.
pub const TIMEOUT: Duration = Duration::from_secs(10);

/// Opens `count` connections and gives them all, or the first error. Nothing is sent on them.
///
/// # Errors
/// The system's, as from `connect`.
pub async fn open(target: SocketAddr, count: usize) -> std::io::Result<Vec<TcpStream>> {
    let mut open = Vec::with_capacity(count);
    for _ in 0..count {
        open.push(TcpStream::connect(target).await?);
    }
    Ok(open)
}

/// For `duration`, begins `rate` connections a second, each with one request (`GET /home`) and closed after it.
/// A slow answer never slows the rate down.
pub async fn churn(target: SocketAddr, rate: u32, duration: Duration, timeout: Duration) -> Report {
    let began = Instant::now();
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / rate.max(1));
    let mut exchanges = JoinSet::new();
    while began.elapsed() < duration {
        ticks.tick().await;
        exchanges.spawn(one(target, timeout, began));
    }
    let mut report = Report::default();
    while let Some(outcome) = exchanges.join_next().await {
        report.extend(outcome.ok());
    }
    report
}

/// For `duration`, keeps `connections` connections busy with one request after another.
pub async fn requests(target: SocketAddr, connections: usize, duration: Duration, timeout: Duration) -> Report {
    let began = Instant::now();
    let mut clients = JoinSet::new();
    for _ in 0..connections {
        clients.spawn(async move {
            let mut outcomes = Vec::new();
            let mut sender = None;
            while began.elapsed() < duration {
                let start = began.elapsed();
                let answer = tokio::time::timeout(timeout, request_on(target, &mut sender)).await;
                let server = answer.unwrap_or_else(|_| Err("no answer in time".to_owned()));
                if server.is_err() {
                    sender = None;
                }
                outcomes.push(Outcome { start, took: began.elapsed().saturating_sub(start), server });
            }
            outcomes
        });
    }
    let mut report = Report::default();
    while let Some(outcomes) = clients.join_next().await {
        report.extend(outcomes.into_iter().flatten());
    }
    report
}

/// One connection with one request.
async fn one(target: SocketAddr, timeout: Duration, began: Instant) -> Outcome {
    let start = began.elapsed();
    let mut sender = None;
    let answer = tokio::time::timeout(timeout, request_on(target, &mut sender)).await;
    let server = answer.unwrap_or_else(|_| Err("no answer in time".to_owned()));
    Outcome { start, took: began.elapsed().saturating_sub(start), server }
}

type Sender = SendRequest<Empty<Bytes>>;

/// One request, on a new connection where there is none. Gives who answered.
async fn request_on(target: SocketAddr, sender: &mut Option<Sender>) -> Result<String, String> {
    let sender = match sender {
        Some(sender) => sender,
        None => sender.insert(connect(target).await?),
    };
    sender.ready().await.map_err(|error| describe(&error))?;
    let request = Request::get("/home").header("host", target.to_string()).body(Empty::new());
    let request = request.map_err(|error| error.to_string())?;
    let answer = sender.send_request(request).await.map_err(|error| describe(&error))?;
    let server = answer.headers().get("x-server").and_then(|name| name.to_str().ok()).unwrap_or("?").to_owned();
    let status = answer.status();
    answer.into_body().collect().await.map_err(|error| describe(&error))?;
    if status.is_success() { Ok(server) } else { Err(format!("status {}", status.as_u16())) }
}

async fn connect(target: SocketAddr) -> Result<Sender, String> {
    let stream = TcpStream::connect(target).await.map_err(|error| format!("connect: {error}"))?;
    let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(|error| describe(&error))?;
    tokio::spawn(connection);
    Ok(sender)
}

/// An error with its causes, which is where hyper keeps the system's words.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
