//! `ringway drain`, `scale`, `reload` and the like: orders to a running Ringway, by its side port.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use hyper::Method;
use ringway::api::status::{Member, Status};
use ringway::control::operator::Report;
use serde_json::{Value, json};

use super::{Common, Failure, print, runtime, side_port};

/// Between looks at a drain.
const LOOK: Duration = Duration::from_millis(250);

/// How the side port is reached, and by what right.
#[derive(Debug, Args)]
pub(crate) struct Port {
    /// The side port's address; without it the config's
    #[arg(long, value_name = "ADDRESS")]
    pub(super) api: Option<SocketAddr>,
    /// A file with the side port's token; without it the variable `RINGWAY_TOKEN`, and then the config's
    #[arg(long, value_name = "FILE")]
    pub(super) token_file: Option<PathBuf>,
}

/// Orders to a running Ringway.
#[derive(Debug, Subcommand)]
pub(crate) enum Order {
    /// Give a backend no new connections; those that are open may finish until the deadline
    Drain {
        /// POOL/BACKEND, like echo/echo-2
        #[arg(value_parser = backend)]
        backend: Backend,
        /// The deadline; without it the pool's `drain`
        #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
        within: Option<Duration>,
        /// Show the connections that are left until there are none
        #[arg(long)]
        wait: bool,
        #[command(flatten)]
        port: Port,
    },
    /// Give a drained backend connections again
    Undrain {
        /// POOL/BACKEND
        #[arg(value_parser = backend)]
        backend: Backend,
        #[command(flatten)]
        port: Port,
    },
    /// Give a backend another weight
    Weight {
        /// POOL/BACKEND
        #[arg(value_parser = backend)]
        backend: Backend,
        /// 1 to 1000
        weight: u32,
        #[command(flatten)]
        port: Port,
    },
    /// Add a backend to a static pool
    Add {
        /// The pool
        pool: String,
        /// host:port
        address: String,
        /// Identity on the ring; without it the address
        #[arg(long)]
        id: Option<String>,
        /// 1 to 1000
        #[arg(long, default_value_t = 1)]
        weight: u32,
        #[command(flatten)]
        port: Port,
    },
    /// Drain a backend of a static pool and take it out
    Remove {
        /// POOL/BACKEND
        #[arg(value_parser = backend)]
        backend: Backend,
        /// Show the connections that are left until there are none
        #[arg(long)]
        wait: bool,
        #[command(flatten)]
        port: Port,
    },
    /// Keep another number of replicas alive
    Scale {
        /// The pool
        pool: String,
        /// 1 to 1000
        replicas: u32,
        #[command(flatten)]
        port: Port,
    },
    /// Read the config file again and apply what has changed
    Reload {
        #[command(flatten)]
        port: Port,
    },
    /// Hand over to a new process, from the binary and the config as they are now
    Upgrade {
        #[command(flatten)]
        port: Port,
    },
}

/// POOL/BACKEND.
#[derive(Debug, Clone)]
pub(crate) struct Backend {
    pool: String,
    id: String,
}

fn backend(text: &str) -> Result<Backend, String> {
    let parts = text.split_once('/').filter(|(pool, id)| !pool.is_empty() && !id.is_empty());
    let (pool, id) = parts.ok_or("write it as POOL/BACKEND, like echo/echo-2; see `ringway status`")?;
    Ok(Backend { pool: pool.to_owned(), id: id.to_owned() })
}

impl Backend {
    fn path(&self, what: &str) -> String {
        let (pool, id) = (encoded(&self.pool), encoded(&self.id));
        format!("/api/pools/{pool}/backends/{id}{what}")
    }
}

/// For a part of a path.
fn encoded(text: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~:".contains(&byte);
    text.bytes()
        .map(|byte| if is_plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

pub(crate) fn order(common: &Common, order: Order) -> Result<(), Failure> {
    runtime()?.block_on(async {
        match order {
            Order::Drain { backend, within, wait, port } => {
                let body = within.map(|within| json!({ "within_seconds": within.as_secs_f64() }));
                give(common, &port, Method::POST, &backend.path("/drain"), body).await?;
                if wait { wait_for(common, &port, &backend).await } else { Ok(()) }
            }
            Order::Undrain { backend, port } => {
                give(common, &port, Method::POST, &backend.path("/undrain"), None).await
            }
            Order::Weight { backend, weight, port } => {
                let body = json!({ "weight": weight });
                give(common, &port, Method::POST, &backend.path("/weight"), Some(body)).await
            }
            Order::Add { pool, address, id, weight, port } => {
                let mut body = json!({ "address": address, "weight": weight });
                if let Some(id) = id {
                    body["id"] = id.into();
                }
                let path = format!("/api/pools/{}/backends", encoded(&pool));
                give(common, &port, Method::POST, &path, Some(body)).await
            }
            Order::Remove { backend, wait, port } => {
                give(common, &port, Method::DELETE, &backend.path(""), None).await?;
                if wait { wait_for(common, &port, &backend).await } else { Ok(()) }
            }
            Order::Scale { pool, replicas, port } => {
                let path = format!("/api/pools/{}/scale", encoded(&pool));
                give(common, &port, Method::POST, &path, Some(json!({ "replicas": replicas }))).await
            }
            Order::Upgrade { port } => give(common, &port, Method::POST, "/api/upgrade", None).await,
            Order::Reload { port } => give(common, &port, Method::POST, "/api/reload", None).await,
        }
    })
}

async fn give(common: &Common, port: &Port, method: Method, path: &str, body: Option<Value>) -> Result<(), Failure> {
    let body = body.map(|body| body.to_string()).unwrap_or_default();
    let report = side_port::change(common, port, method, path, body).await?;
    print(&told(&report, "nothing to change\n"))
}

/// A report for a person.
pub(super) fn told(report: &Report, nothing: &str) -> String {
    use std::fmt::Write as _;

    let mut text = String::new();
    // Writing to a String cannot fail.
    for change in &report.changes {
        let _ = writeln!(text, "{change}");
    }
    for moved in &report.moved {
        let _ = writeln!(text, "pool {}: {:.1} % of the keys move to another backend", moved.pool, moved.share * 100.0);
    }
    if !report.needs_restart.is_empty() {
        let _ = writeln!(text, "not without a restart: {}", report.needs_restart.join(", "));
    }
    if text.is_empty() { nothing.to_owned() } else { text }
}

/// Shows the connections that are left, a line for each change, until there are none or the backend is gone.
async fn wait_for(common: &Common, port: &Port, backend: &Backend) -> Result<(), Failure> {
    let began = Instant::now();
    let mut shown = None;
    loop {
        let status = side_port::status(common, port).await?;
        let Some(member) = find(&status, backend) else {
            return print(&format!(
                "{}/{} is gone after {:.1} s\n",
                backend.pool,
                backend.id,
                began.elapsed().as_secs_f64()
            ));
        };
        let left = member.connections.active;
        let Some(drain) = &member.drain else {
            return Err(anyhow::anyhow!("{}/{} is not drained any more", backend.pool, backend.id).into());
        };
        if shown != Some(left) {
            let deadline = drain
                .deadline_in_seconds
                .map_or("no deadline".to_owned(), |left| format!("{left:.0} s to the deadline"));
            print(&format!("{}/{}: {left} connections left, {deadline}\n", backend.pool, backend.id))?;
            shown = Some(left);
        }
        if left == 0 && !drain.leaves {
            return Ok(());
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn find<'a>(status: &'a Status, backend: &Backend) -> Option<&'a Member> {
    let pool = status.pool(&backend.pool)?;
    pool.backends.iter().find(|member| member.id == backend.id)
}

/// `ringway check --diff`: what a reload of this config would change.
pub(super) async fn diff(common: &Common, port: &Port, text: String) -> Result<Report, Failure> {
    let report = side_port::change(common, port, Method::POST, "/api/reload?dry_run=true", text).await;
    Ok(report.context("cannot compare with a running Ringway")?)
}
