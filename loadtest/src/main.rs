//! `loadtest`: puts load on a balancer and says what became of it.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use loadtest::{compare, run, scale, soak, tune};

#[derive(Debug, Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// One load on whatever listens at the target
    Run(run::Options),
    /// Balancers beside each other on the same work
    Compare(compare::Options),
    /// What a setting of Ringway changes
    Tune(tune::Options),
    /// What more servers bring
    Scale(scale::Options),
    /// Requests, transfers and broken connections for long, with reloads, upgrades and kills: does anything grow?
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
            Command::Soak(options) => soak::soak(&options).await,
        }
    };
    // What is dropped on the way out ends the balancers that were started.
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
