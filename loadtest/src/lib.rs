//! Load for a balancer, and honest figures of what became of it. The program and the tests share these functions.
//!
//! # Layout
//!
//! - [`load`]: the loads, each on a [`client`]; [`record`] and [`report`] take what becomes of them, in figures or one by one
//! - [`run`]: one load on any target; [`soak`]: all kinds for long, with orders to the balancer in between
//! - [`compare`]: balancers beside each other, as [`balancers`] starts them, on a [`bench`]; [`findings`] is what it came to
//! - [`tune`]: settings of Ringway on that bench; [`scale`]: more servers
//! - [`preflight`], [`process`]: what this machine can do, and what a process on it uses
//! - [`plot`], [`table`]: how results look

pub mod balancers;
pub mod compare;
pub mod findings;
pub mod load;
pub mod plot;
pub mod preflight;
pub mod process;
pub mod record;
pub mod report;
pub mod run;
pub mod scale;
pub mod soak;
pub mod table;
pub mod tune;

mod bench;

mod client;
mod side_port;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::net::TcpStream;

pub use self::client::Protocol;
use self::load::{Load, Pace, Work};
pub use self::report::Report;

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
