//! The `ringway` program: arguments, command, exit code.
//!
//! Exit codes: 0 fine, 1 failed while starting or running, 2 bad arguments or config, 3 a drain ended connections.

mod cli;

use std::io::Write as _;
use std::process::ExitCode;

use crate::cli::{Arguments, Command, Failure};

fn main() -> ExitCode {
    let arguments = Arguments::from_command_line();
    let outcome = match arguments.command {
        None | Some(Command::Run) if cli::init::is_needed() => {
            return cli::init::run().unwrap_or_else(|failure| tell(&failure));
        }
        None | Some(Command::Run) => return cli::run::run(&arguments.common).unwrap_or_else(|failure| tell(&failure)),
        Some(Command::Check(ref check)) => cli::check::check(&arguments.common, check),
        Some(Command::Status(ref options)) => cli::status::status(&arguments.common, options),
        Some(Command::Top(ref options)) => cli::top::top(&arguments.common, options),
        Some(Command::Init(ref options)) => cli::new_config::init(options),
        Some(Command::Schema(ref options)) => cli::packaging::schema(options),
        Some(Command::Completions(ref options)) => cli::packaging::completions(options),
        Some(Command::Man(ref options)) => cli::packaging::man(options),
        Some(Command::Explain(ref options)) => cli::explain::explain(&arguments.common, options),
        Some(Command::Sessions(ref list)) => cli::sessions::list(&arguments.common, list),
        Some(Command::Kill(ref kill)) => cli::sessions::kill(&arguments.common, kill),
        Some(Command::Reap(ref options)) => cli::reap::reap(&arguments.common, options),
        Some(Command::Healthcheck { live }) => cli::healthcheck::healthcheck(live),
        Some(Command::Runtime(command)) => cli::commands::run(&arguments.common, command),
        Some(Command::EchoServer(options)) => cli::echo_server(options),
        Some(Command::Shim(ref shim)) => cli::shim(shim),
        Some(Command::Launch(ref launch)) => cli::launch(launch),
    };
    outcome.map_or_else(|failure| tell(&failure), |()| ExitCode::SUCCESS)
}

fn tell(failure: &Failure) -> ExitCode {
    // Nobody may be reading it any more.
    let _ = writeln!(std::io::stderr(), "ringway: {failure}");
    failure.exit_code()
}
