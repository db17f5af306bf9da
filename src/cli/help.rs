//! The help of `ringway`: its commands in groups.

use std::fmt::Write as _;

use clap::{ColorChoice, CommandFactory as _, FromArgMatches as _};

use super::{Arguments, terminal};

/// The commands in the order in which the help shows them.
const GROUPS: [(&str, &[&str]); 5] = [
    ("Run", &["run", "init", "schema", "check", "echo-server"]),
    ("Look", &["status", "top", "sessions", "explain"]),
    ("Change", &["drain", "undrain", "weight", "rebalance", "scale", "rollout", "add", "remove", "kill", "log"]),
    ("Update", &["reload", "upgrade"]),
    ("Containers", &["reap", "healthcheck"]),
];

impl Arguments {
    /// The arguments of this process. Ends it with a message if they are wrong.
    pub(crate) fn from_command_line() -> Self {
        let matches = command().get_matches();
        Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
    }
}

/// The commands and arguments, with grouped help.
pub(super) fn command() -> clap::Command {
    let mut command = Arguments::command();
    let mut groups = String::new();
    // Writing to a String cannot fail.
    for (group, names) in GROUPS {
        let _ = writeln!(groups, "{group}:");
        for name in names {
            let about = command.find_subcommand(name).and_then(|known| known.get_about()).map(ToString::to_string);
            let _ = writeln!(groups, "  {name:<12} {}", about.unwrap_or_default());
        }
        groups.push('\n');
    }
    let has_colours = terminal::has_colours(&std::io::stdout());
    let choice = if has_colours { ColorChoice::Auto } else { ColorChoice::Never };
    let template = format!(
        "{{about-with-newline}}\n{{usage-heading}} {{usage}}\n\n{groups}{{options}}\n\nWithout a command, Ringway runs `run`.\n\
         `ringway COMMAND --help` explains a command."
    );
    command = command.color(choice).help_template(template);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_visible_command_is_in_one_group_and_all_help_fits_into_80_columns() {
        let mut command = command();
        let mut grouped: Vec<_> = GROUPS.iter().flat_map(|(_, names)| names.iter().copied()).collect();
        let visible = command.get_subcommands().filter(|known| !known.is_hide_set());
        let mut known: Vec<_> = visible.map(|known| known.get_name().to_owned()).collect();
        grouped.sort_unstable();
        known.sort_unstable();
        assert_eq!(grouped, known);
        command.build();
        let pages = command.get_subcommands().filter(|known| !known.is_hide_set()).cloned();
        for mut page in pages.chain([command.clone()]).collect::<Vec<_>>() {
            for help in [page.render_help().to_string(), page.render_long_help().to_string()] {
                let wide = help.lines().find(|line| line.chars().count() > 80);
                assert!(wide.is_none(), "{}: {wide:?}", page.get_name());
            }
        }
    }

    #[test]
    fn global_options_stand_apart_from_those_of_a_command() {
        let mut command = command();
        command.build();
        let help = command.find_subcommand_mut("drain").unwrap().render_help().to_string();
        let (own, global) = help.split_once("Global options:").unwrap();
        assert!(own.contains("--within") && own.contains("--api"), "{help}");
        assert!(["--config", "--log"].iter().all(|option| global.contains(option) && !own.contains(option)), "{help}");
    }
}
