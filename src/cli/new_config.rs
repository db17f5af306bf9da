//! `ringway init`: writes a commented config to start from.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Write as _};
use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, ValueEnum};

use super::{Failure, print};

/// The configs, which are examples of the repository too.
const STATIC: &str = include_str!("../../examples/start-static.yaml");
const PROCESS: &str = include_str!("../../examples/start-process.yaml");
const DOCKER: &str = include_str!("../../examples/start-docker.yaml");

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Where the backends come from: servers that already run, child processes, or containers
    #[arg(value_enum, default_value_t = Kind::Static)]
    kind: Kind,
    /// The file; `-` is standard output. Ringway never overwrites a file
    #[arg(long, short, default_value = "config.yaml", value_name = "FILE")]
    output: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    Static,
    Process,
    Docker,
}

pub(crate) fn init(options: &Options) -> Result<(), Failure> {
    let text = match options.kind {
        Kind::Static => STATIC,
        Kind::Process => PROCESS,
        Kind::Docker => DOCKER,
    };
    let file = &options.output;
    if file.as_os_str() == "-" {
        return print(text);
    }
    let mut opened =
        OpenOptions::new().write(true).create_new(true).open(file).map_err(|error| match error.kind() {
            ErrorKind::AlreadyExists => {
                anyhow::anyhow!("{} exists already: choose another file with --output", file.display())
            }
            _ => anyhow::Error::from(error).context(format!("cannot write {}", file.display())),
        })?;
    opened.write_all(text.as_bytes()).with_context(|| format!("cannot write {}", file.display()))?;
    let name = file.display();
    print(&format!(
        "wrote {name}\nNext: edit it, then `ringway check {name}` and `ringway --config {name}`\n\
         For help in editors: `ringway schema > ringway.schema.json` in the folder of {name}\n"
    ))
}
