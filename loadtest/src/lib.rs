//! A load generator for balancers. The program and the tests share these functions.
//!
//! # Layout
//!
//! - [`load`]: the loads, each on a [`client`]; [`record`] collects figures, and [`report`] collects single outcomes
//! - [`run`]: one load on any target; [`soak`]: a long mixed load, with commands to the balancer
//! - [`compare`]: a comparison of the balancers that [`balancers`] starts on a [`mod@bench`]; [`findings`]: its results
//! - [`tls`]: the first message of a TLS client
//! - [`tune`]: settings of Ringway on the same bench; [`scale`]: more servers; [`mod@large`]: large configs
//! - [`even`]: how evenly connections are spread; [`mod@rollouts`]: what clients notice of rollouts;
//!   [`mod@upgrades`]: and of upgrades, with [`streams`] whose every byte is checked
//! - [`preflight`], [`process`]: the limits of this machine, and the resources that a process uses
//! - [`spread`], [`plot`], [`table`]: figures of repeated runs, and the presentation of results

pub mod balancers;
pub mod compare;
pub mod even;
pub mod findings;
pub mod large;
pub mod load;
pub mod plot;
pub mod preflight;
pub mod process;
pub mod record;
pub mod report;
pub mod rollouts;
pub mod run;
pub mod scale;
pub mod soak;
pub mod spread;
pub mod streams;
pub mod table;
pub mod tls;
pub mod tune;
pub mod upgrades;

mod bench;
mod client;
mod short;
mod side_port;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::net::TcpStream;

pub use self::client::Protocol;
use self::load::{Load, Pace, Work};
pub use self::report::Report;
pub use self::tls::client_hello;

/// Opens `count` connections and sends nothing on them. Returns all of them, or the first error.
///
/// # Errors
/// The error of `connect`.
pub async fn open(target: SocketAddr, count: usize) -> std::io::Result<Vec<TcpStream>> {
    let mut open = Vec::with_capacity(count);
    for _ in 0..count {
        open.push(TcpStream::connect(target).await?);
    }
    Ok(open)
}

/// For `duration`, opens `rate` connections per second, sends one request (`GET /home`) on each, and closes it.
/// A slow answer does not reduce the rate.
pub async fn churn(target: SocketAddr, rate: u32, duration: Duration, timeout: Duration) -> Report {
    let load = Load {
        target,
        sources: 0,
        work: Work::Connections,
        protocol: Protocol::Http,
        connections: 0,
        share: None,
        pace: Pace::Open(f64::from(rate)),
        duration,
        timeout,
        precise: false,
    };
    let report = Arc::new(Mutex::new(Report::default()));
    load::run(&load, &report).await;
    std::mem::take(&mut *report.lock().unwrap_or_else(PoisonError::into_inner))
}
