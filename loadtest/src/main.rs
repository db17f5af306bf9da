//! `loadtest`: puts load on a balancer and prints what became of it as JSON.

use std::net::SocketAddr;
use std::time::Duration;

use clap::{Parser, Subcommand};
use loadtest::soak::{Options, soak};
use loadtest::{TIMEOUT, plot};

#[derive(Debug, Parser)]
#[command(version, about)]
struct Arguments {
    /// Where the balancer listens
    #[arg(long, global = true, default_value = "127.0.0.1:8000")]
    target: SocketAddr,
    /// How long, in seconds
    #[arg(long, global = true, default_value_t = 10)]
    seconds: u64,
    #[command(subcommand)]
    load: Load,
}

#[derive(Debug, Subcommand)]
enum Load {
    /// Open connections and leave them idle
    Hold {
        /// How many
        #[arg(long, default_value_t = 1000)]
        connections: usize,
    },
    /// Open, request, close
    Churn {
        /// New connections a second
        #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=100_000))]
        rate: u32,
    },
    /// Requests, transfers and broken connections for long, with reloads, upgrades and kills: does anything grow?
    Soak(Options),
    /// Request after request on open connections
    Request {
        /// How many
        #[arg(long, default_value_t = 50)]
        connections: usize,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let (target, duration) = (arguments.target, Duration::from_secs(arguments.seconds));
    let report = match arguments.load {
        Load::Hold { connections } => {
            let open = loadtest::open(target, connections).await?;
            println!("{} connections are open for {} s", open.len(), duration.as_secs());
            tokio::time::sleep(duration).await;
            return Ok(());
        }
        Load::Soak(options) => {
            let (outcomes, samples) = soak(target, duration, &options).await?;
            println!("{}", serde_json::to_string_pretty(&outcomes)?);
            return options.plot.map_or(Ok(()), |path| plot::draw(&samples, &path));
        }
        Load::Churn { rate } => loadtest::churn(target, rate, duration, TIMEOUT).await,
        Load::Request { connections } => loadtest::requests(target, connections, duration, TIMEOUT).await,
    };
    println!("{}", serde_json::to_string_pretty(&report.summary())?);
    Ok(())
}
