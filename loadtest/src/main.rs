//! `loadtest` puts load on a balancer and reports the results.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use loadtest::{compare, even, large, rollouts, run, scale, soak, tune, upgrades};

#[derive(Debug, Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run one load against a target
    Run(run::Options),
    /// Compare several balancers on the same work
    Compare(compare::Options),
    /// Measure the effect of single settings of Ringway
    Tune(tune::Options),
    /// Measure throughput with an increasing number of servers
    Scale(scale::Options),
    /// Measure Ringway with thousands of backends, a thousand pools, and several workers
    Large(large::Options),
    /// Measure how evenly long connections are spread over backends
    Even(even::Options),
    /// Replace the replicas of a pool under load, and count what clients notice
    Rollouts(rollouts::Options),
    /// Upgrade Ringway under load, and count what clients notice
    Upgrades(upgrades::Options),
    /// Run a long mixed load with reloads, upgrades and kills, and measure whether memory or descriptors grow
    Soak(soak::Options),
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let work = async {
        match Arguments::parse().command {
            Command::Run(options) => run::run(&options).await,
            Command::Compare(options) => compare::compare(&options).await,
            Command::Tune(options) => tune::tune(&options).await,
            Command::Scale(options) => scale::scale(&options).await,
            Command::Large(options) => large::large(&options).await,
            Command::Even(options) => even::even(&options).await,
            Command::Rollouts(options) => rollouts::rollouts(&options).await,
            Command::Upgrades(options) => upgrades::upgrades(&options).await,
            Command::Soak(options) => soak::soak(&options).await,
        }
    };
    // After a signal the future is dropped, which ends the balancers that it has started.
    let done = tokio::select! {
        done = work => done,
        stopped = stopped() => stopped,
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("loadtest: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn stopped() -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};

    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    anyhow::bail!("stopped by a signal")
}
