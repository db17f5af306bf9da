//! `echo-server`: the demo backend as a separate program.

use clap::Parser as _;

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    echo_server::run_until_signalled(echo_server::Options::parse()).await
}
