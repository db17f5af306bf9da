//! The demo backend: one port, or Unix socket, that speaks HTTP and echoes everything else.
//!
//! If the first bytes of a connection begin an HTTP/1.x request, hyper serves the connection. Otherwise the
//! server echoes every byte and the half-close. Every HTTP answer has the name of the server, which shows the
//! backend that a balancer has chosen.
//!
//! # Layout
//!
//! - this file: options, the accept loop and its shutdown
//! - [`listen`]: the listening socket
//! - [`sniff`]: the detection of the protocol
//! - [`http`]: the routes
//! - [`raw`]: the echo

mod http;
mod listen;
mod raw;
mod sniff;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::listen::Accepted;
pub use self::listen::{Listen, Listener};

/// Arguments of the echo server.
#[derive(Debug, Clone, clap::Parser)]
#[command(name = "echo-server", version, about = "Demo backend: HTTP and a byte-for-byte echo on one port")]
pub struct Options {
    /// Address to listen on, like 0.0.0.0:9000 or `unix:/run/echo.sock`. With port 0 the system chooses a free port
    #[arg(long, default_value = "127.0.0.1:9000")]
    pub listen: Listen,
    /// Name in answers and in the header `x-server`
    #[arg(long, env = "ECHO_SERVER_NAME", default_value = "echo")]
    pub name: String,
    /// Wait this many milliseconds before each HTTP answer (simulated work)
    #[arg(long, default_value_t = 0, value_name = "MS")]
    pub delay_ms: u64,
    /// Serve this many HTTP requests at a time. Others wait. 0 means no limit
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub concurrency: u32,
    /// On SIGTERM, wait this many milliseconds for open connections
    #[arg(long, default_value_t = 3000, value_name = "MS")]
    pub grace_ms: u64,
}

/// The state that all connections of a server share.
#[derive(Debug)]
struct Server {
    name: String,
    delay: Duration,
    turns: Semaphore,
    started: Instant,
    active: AtomicU64,
    total: AtomicU64,
    stopping: CancellationToken,
}

/// Runs until SIGTERM or SIGINT. Prints the address that it listens on to standard output.
///
/// # Errors
/// When the address cannot be bound or a signal handler cannot be installed.
pub async fn run_until_signalled(options: Options) -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};

    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let listener = Listener::bind(&options.listen)
        .map_err(|error| anyhow::anyhow!("cannot listen on {}: {error}", options.listen))?;
    let address = listener.address()?;
    println!("{} listens on {address}", options.name);
    run(listener, options, async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
    .await;
    if let Listen::Unix(path) = address {
        // Fails if the directory no longer exists.
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

/// Serves `listener` until `shutdown` completes. Then waits for open connections within the grace period.
pub async fn run(listener: impl Into<Listener>, options: Options, shutdown: impl Future<Output = ()>) {
    let listener = listener.into();
    let server = Arc::new(Server {
        name: options.name,
        delay: Duration::from_millis(options.delay_ms),
        turns: Semaphore::new(if options.concurrency == 0 {
            Semaphore::MAX_PERMITS
        } else {
            options.concurrency as usize
        }),
        started: Instant::now(),
        active: AtomicU64::new(0),
        total: AtomicU64::new(0),
        stopping: CancellationToken::new(),
    });
    let connections = TaskTracker::new();
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut shutdown => break,
        };
        match accepted {
            Ok(Accepted::Tcp(stream)) => {
                connections.spawn(serve(Arc::clone(&server), stream));
            }
            Ok(Accepted::Unix(stream)) => {
                connections.spawn(serve(Arc::clone(&server), stream));
            }
            // The process has no descriptors or no memory left. The pause keeps the loop from spinning.
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
    drop(listener);
    server.stopping.cancel();
    connections.close();
    let grace = Duration::from_millis(options.grace_ms);
    // After the grace period the runtime drops the tasks, which closes their connections.
    let _ = tokio::time::timeout(grace, connections.wait()).await;
}

async fn serve(server: Arc<Server>, mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    server.total.fetch_add(1, Ordering::Relaxed);
    server.active.fetch_add(1, Ordering::Relaxed);
    // An error of the peer ends only its connection.
    let _ = match sniff::protocol(&mut stream).await {
        Ok((sniff::Protocol::Http, first)) => http::serve(&server, sniff::Resumed::new(first, stream)).await,
        Ok((sniff::Protocol::Raw, first)) => raw::echo(stream, first.bytes()).await,
        Err(error) => Err(error),
    };
    server.active.fetch_sub(1, Ordering::Relaxed);
}
