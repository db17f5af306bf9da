//! The loads: the work of the clients, and their pace.
//!
//! In a closed loop each client starts a request when the previous one has ended, so a slow answer reduces the load. In an
//! open loop requests are due at a constant rate. The time of a request starts when the request is due, so a wait in the
//! generator counts too (no coordinated omission; Tene, "How NOT to measure latency").

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use self::schedule::Schedule;
use crate::client::{Client, Protocol};

mod schedule;
#[cfg(test)]
mod tests;

/// Pause of a client after a failure. It limits the load on a dead target.
const AFTER_FAILURE: Duration = Duration::from_millis(10);

/// Bytes of the transfers in a mixed load.
const MIXED_TRANSFER: usize = 256 * 1024;

/// The work of the clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Consecutive requests on open connections.
    Requests,
    /// A connection for each request.
    Connections,
    /// Consecutive transfers of this number of bytes.
    Bulk(Direction, usize),
    /// Open connections without traffic.
    Idle,
    /// Eight requests on an open connection, one request on a new connection, and a transfer of 256 KiB both ways.
    Mixed,
}

/// The direction of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Direction {
    /// To the client
    Down,
    /// To the server
    Up,
    /// An echo: to the server and back at the same time
    Both,
}

/// The pace of the clients.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pace {
    /// Each client sends its next request after the answer.
    Closed,
    /// Requests per second. The time of a request starts when it is due.
    Open(f64),
}

/// A load.
#[derive(Debug, Clone)]
pub struct Load {
    /// The address of the target.
    pub target: SocketAddr,
    /// Number of addresses in 127.1.0.0/16 that clients connect from. With 0 the system chooses the address.
    pub sources: u16,
    /// The work of the clients.
    pub work: Work,
    /// The protocol of the clients.
    pub protocol: Protocol,
    /// Number of concurrent clients. An open loop of new connections has no limit.
    pub connections: usize,
    /// If several generators share the load: the number of the first client of this one, and the number of all clients.
    pub share: Option<(usize, usize)>,
    /// The pace.
    pub pace: Pace,
    /// The duration.
    pub duration: Duration,
    /// After this time an answer counts as missing.
    pub timeout: Duration,
    /// Whether an open loop holds its times to microseconds, which costs the generator's core; otherwise to a millisecond.
    pub precise: bool,
}

/// The outcome of one request, connection or transfer.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// When it started, or was due, since the start of the load.
    pub start: Duration,
    /// The time from then to its end.
    pub took: Duration,
    /// The server that answered, or the failure.
    pub server: Result<Arc<str>, String>,
}

/// Collects the outcomes of a load.
pub trait Collect: Default + Send + 'static {
    /// Adds an outcome.
    fn add(&mut self, outcome: Outcome);

    /// Counts bytes that a transfer has received or sent.
    fn moved(&mut self, at: Duration, bytes: usize);
}

/// Puts the load on its target. The collector gets each outcome immediately.
pub async fn run<C: Collect>(load: &Load, collector: &Arc<Mutex<C>>) {
    let (load, run) = (Arc::new(load.clone()), Run { began: Instant::now(), collector: Arc::clone(collector) });
    match (load.work, load.pace) {
        (Work::Connections, Pace::Open(rate)) => connections_at(&load, rate, &run).await,
        (Work::Idle, _) => idle(&load, &run).await,
        _ => {
            let mut clients = JoinSet::new();
            let first = load.share.map_or(0, |(first, _)| first);
            for number in first..first + load.connections {
                clients.spawn(client(number, Arc::clone(&load), run.clone()));
            }
            clients.join_all().await;
        }
    }
}

/// The state that the clients of a run share.
struct Run<C> {
    began: Instant,
    collector: Arc<Mutex<C>>,
}

impl<C> Clone for Run<C> {
    fn clone(&self) -> Self {
        Self { began: self.began, collector: Arc::clone(&self.collector) }
    }
}

impl<C: Collect> Run<C> {
    fn collector(&self) -> MutexGuard<'_, C> {
        self.collector.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `done` and records its time since `due`.
    async fn timed(
        &self,
        due: Duration,
        timeout: Duration,
        done: impl Future<Output = Result<Arc<str>, String>>,
    ) -> bool {
        let server = tokio::time::timeout(timeout, done).await.unwrap_or_else(|_| Err("no answer in time".to_owned()));
        let (took, is_answer) = (self.began.elapsed().saturating_sub(due), server.is_ok());
        self.collector().add(Outcome { start: due, took, server });
        is_answer
    }
}

/// Runs one client until the time is up.
async fn client<C: Collect>(number: usize, load: Arc<Load>, run: Run<C>) {
    let mut client = Client::new(load.target, source(&load, number), load.protocol);
    let mut schedule = Schedule::of(number, &load);
    let mut round = number;
    loop {
        let Some(due) = schedule.next(&run.began).await.filter(|due| *due < load.duration) else { return };
        round += 1;
        // Without an answer from the target, the load ends here and counts the remaining requests as failed.
        if run.began.elapsed() > load.duration + load.timeout {
            let server = Err("not started in time".to_owned());
            run.collector().add(Outcome { start: due, took: run.began.elapsed().saturating_sub(due), server });
            continue;
        }
        let is_answer = match load.work {
            Work::Requests => run.timed(due, load.timeout, client.request()).await,
            Work::Connections => {
                client.come_from(source(&load, round));
                let is_answer = run.timed(due, load.timeout, client.request()).await;
                client.close();
                is_answer
            }
            Work::Bulk(direction, bytes) => {
                // Of a transfer that is unfinished when the time is up, only the bytes count.
                let left = load.duration.saturating_sub(run.began.elapsed());
                let moved = AtomicBool::new(false);
                let whole = load.timeout.max(load.duration);
                let transfer = transfer(&mut client, direction, bytes, &run, due, whole, &moved);
                match tokio::time::timeout(left, transfer).await {
                    Ok(is_answer) => is_answer,
                    Err(_) if !moved.load(Ordering::Relaxed) && left >= load.timeout => {
                        let server = Err("timed out: no data transferred".to_owned());
                        return run.collector().add(Outcome { start: due, took: left, server });
                    }
                    Err(_) => return,
                }
            }
            Work::Mixed => match round % 10 {
                8 => {
                    client.close();
                    run.timed(due, load.timeout, client.request()).await
                }
                9 => {
                    let moved = AtomicBool::new(false);
                    transfer(&mut client, Direction::Both, MIXED_TRANSFER, &run, due, load.timeout, &moved).await
                }
                _ => run.timed(due, load.timeout, client.request()).await,
            },
            Work::Idle => return,
        };
        if !is_answer {
            client.close();
            tokio::time::sleep(AFTER_FAILURE).await;
        }
    }
}

async fn transfer<C: Collect>(
    client: &mut Client,
    direction: Direction,
    bytes: usize,
    run: &Run<C>,
    due: Duration,
    timeout: Duration,
    any: &AtomicBool,
) -> bool {
    let moved = |bytes| {
        any.store(true, Ordering::Relaxed);
        run.collector().moved(run.began.elapsed(), bytes);
    };
    match direction {
        Direction::Down => run.timed(due, timeout, client.download(bytes, moved)).await,
        Direction::Up => run.timed(due, timeout, client.upload(bytes, moved)).await,
        Direction::Both => run.timed(due, timeout, client.exchange(bytes, moved)).await,
    }
}

/// Opens connections at a constant rate. A slow connection does not delay the next one.
async fn connections_at<C: Collect>(load: &Arc<Load>, rate: f64, run: &Run<C>) {
    let (first, of) = load.share.unwrap_or((0, load.connections));
    // The rate of this generator is in proportion to its clients, and its schedule starts at its first client.
    let part = if of == 0 { 1.0 } else { load.connections as f64 / of as f64 };
    let mut schedule = Schedule {
        next: Duration::from_secs_f64(first as f64 / of.max(1) as f64 / rate),
        step: Duration::from_secs_f64(1.0 / (rate * part)),
        load: Arc::clone(load),
    };
    let mut open = JoinSet::new();
    let mut number = 0;
    while let Some(due) = schedule.next(&run.began).await.filter(|due| *due < load.duration) {
        let (load, run) = (Arc::clone(load), run.clone());
        let mut client = Client::new(load.target, source(&load, number), load.protocol);
        number += 1;
        open.spawn(async move { run.timed(due, load.timeout, client.request()).await });
        while open.try_join_next().is_some() {}
        // The open connections need CPU time even if the schedule is late.
        tokio::task::yield_now().await;
    }
    open.join_all().await;
}

/// Opens connections, waits, and checks which are still open. The time of an outcome is the time of the connect.
async fn idle<C: Collect>(load: &Load, run: &Run<C>) {
    let mut clients = Vec::with_capacity(load.connections);
    for number in 0..load.connections {
        let due = run.began.elapsed();
        let mut client = Client::new(load.target, source(load, number), load.protocol);
        let connected = tokio::time::timeout(load.timeout, client.connect()).await;
        let connected = connected.unwrap_or_else(|_| Err("connect: no answer in time".to_owned())).map(|_| ());
        let took = run.began.elapsed().saturating_sub(due);
        match connected {
            Ok(()) => clients.push((client, due, took)),
            Err(error) => run.collector().add(Outcome { start: due, took, server: Err(error) }),
        }
    }
    tokio::time::sleep_until((run.began + load.duration).into()).await;
    for (client, start, took) in clients {
        let server = if client.is_open() { Ok(Arc::from("idle")) } else { Err("closed while it was idle".to_owned()) };
        run.collector().add(Outcome { start, took, server });
    }
}

/// The source address of a client.
fn source(load: &Load, number: usize) -> Option<IpAddr> {
    let number = u16::try_from(number % usize::from(load.sources.max(1))).unwrap_or(0);
    (load.sources > 0).then_some(loopback(number))
}

/// An address in 127.1.0.0/16.
pub(crate) fn loopback(number: u16) -> IpAddr {
    let [high, low] = number.to_be_bytes();
    IpAddr::V4(Ipv4Addr::new(127, 1, high, low))
}
