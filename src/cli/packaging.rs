//! What packages and editors need: `ringway schema`, `ringway completions` and `ringway man`.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use clap_complete::Shell;
use ringway::config;

use super::help::command;
use super::{Failure, print};

#[derive(Debug, Args)]
pub(crate) struct Schema {
    /// Print the table of keys of docs/configuration.md instead
    #[arg(long)]
    markdown: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Completions {
    /// The shell
    shell: Shell,
}

#[derive(Debug, Args)]
pub(crate) struct Man {
    /// The folder, which must exist
    folder: PathBuf,
}

pub(crate) fn schema(options: &Schema) -> Result<(), Failure> {
    print(&if options.markdown { config::markdown() } else { format!("{:#}\n", config::schema()) })
}

pub(crate) fn completions(options: &Completions) -> Result<(), Failure> {
    let mut text = Vec::new();
    clap_complete::generate(options.shell, &mut command(), "ringway", &mut text);
    print(&String::from_utf8_lossy(&text))
}

pub(crate) fn man(options: &Man) -> Result<(), Failure> {
    let written = clap_mangen::generate_to(command(), &options.folder);
    Ok(written.with_context(|| format!("cannot write to {}", options.folder.display()))?)
}
