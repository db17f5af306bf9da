//! Reads a file that lists backends, for the provider `file`: a list as in `static`, or groups of targets as in the files of
//! Prometheus' `file_sd_configs`. Both may be YAML or JSON, which is YAML too.

use std::collections::HashMap;
use std::path::Path;

use serde_yaml::Value;

use super::document::yaml;
use super::keys::{GROUPS, LISTED};
use super::parse_provider::{pairs, static_backends, unique};
use super::places::{Node, Places};
use super::reader::{Faults, Item, show};
use super::{BackendsFile, Error, StaticBackend, source};
use crate::backend::Membership;
use crate::control::provider::names::Resolve;
use crate::control::provider::{Listed, WEIGHTS};
use crate::label_enum;

label_enum! {
    /// The form of a file that lists backends.
    pub enum FileFormat {
        /// As the file's own entries show.
        Auto => "auto",
        /// A list as in `static`.
        List => "list",
        /// Groups of targets, as Prometheus reads them.
        Prometheus => "prometheus",
    }
}

impl BackendsFile {
    /// Reads the text of the file.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn read(&self) -> Result<String, Error> {
        // Reading a pipe could take forever.
        if std::fs::metadata(&self.path).is_ok_and(|data| !data.is_file() && !data.is_dir()) {
            let problem = "is not a regular file: give the path of a file".to_owned();
            return Err(Error::Unreadable { path: self.path.to_path_buf(), problem });
        }
        source::read(&self.path)
    }

    /// The backends that a text of the file lists.
    ///
    /// # Errors
    /// All faults of the text, with their lines.
    pub fn parse(&self, text: &str) -> Result<Vec<StaticBackend>, Error> {
        parse(text, &self.path, self.format)
    }
}

fn parse(text: &str, path: &Path, format: FileFormat) -> Result<Vec<StaticBackend>, Error> {
    let origin = path.display().to_string();
    let value = yaml(text, &origin)?;
    let faults = Faults::default();
    let has_targets = |entry: &Value| entry.get("targets").is_some();
    let is_grouped = match format {
        FileFormat::Auto => value.as_sequence().is_some_and(|list| list.iter().any(has_targets)),
        format => format == FileFormat::Prometheus,
    };
    let backends = if !value.is_sequence() {
        let what =
            if value.is_null() { "the file is empty".to_owned() } else { format!("{} is not a list", show(&value)) };
        faults.add("", format_args!("{what}: write a list of backends, or [] for none"));
        Vec::new()
    } else if is_grouped {
        groups(&Item::of(&value, &faults, &GROUPS))
    } else {
        static_backends(&Item::of(&value, &faults, &LISTED))
    };
    let mut faults = faults.into_vec();
    if faults.is_empty() {
        return Ok(backends);
    }
    let places = Places::of(&value, Node::of(text, &origin));
    for fault in &mut faults {
        fault.place = places.find(&fault.path);
    }
    Err(Error::Faulty { origin, faults })
}

/// The backends of groups of targets. All targets of a group have its labels. Only the labels `weight` and `tier` count here.
fn groups(list: &Item<'_>) -> Vec<StaticBackend> {
    let (mut backends, mut seen) = (Vec::new(), HashMap::new());
    for group in list.list() {
        let mut section = group.section();
        let targets = section.required("targets", "a list of addresses like 10.0.0.5:80");
        let labels = pairs(&mut section, "labels", |_| Ok(()));
        let label =
            |wanted: &str| labels.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.parse::<u32>());
        let weight = label("weight").unwrap_or(Ok(1)).ok().filter(|weight| WEIGHTS.contains(weight));
        if weight.is_none() {
            section.fault("the label weight is not a whole number from 0 to 1000");
        }
        let tier = label("tier").unwrap_or(Ok(0)).ok().and_then(|tier| u16::try_from(tier).ok());
        if tier.is_none() {
            section.fault("the label tier is not a whole number from 0 to 65535");
        }
        let membership = Membership { tier: tier.unwrap_or(0), ..Membership::weighing(weight.unwrap_or(1)) };
        section.finish();
        for target in targets.iter().flat_map(Item::list) {
            let Some(address) = target.text() else { continue };
            match Listed::parse(&address, None, membership) {
                Ok(Listed { id, location, membership }) => {
                    unique(&mut seen, &id, &target);
                    let id = id.to_string();
                    backends.push(StaticBackend { id, location, membership, resolve: Resolve::Refresh });
                }
                Err(problem) => target.fault(problem),
            }
        }
    }
    backends
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn read(text: &str) -> Result<Vec<String>, String> {
        let file = BackendsFile { path: Arc::from(Path::new("list.yaml")), format: FileFormat::Auto };
        let words = |one: &StaticBackend| format!("{} at {} with {}", one.id, one.location, one.membership.weight);
        file.parse(text).map(|list| list.iter().map(words).collect()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_list_has_the_form_of_the_config() {
        let text = "- { address: \"10.0.0.5:80\" }\n- { address: unix:/run/a, id: a, weight: 3 }";
        assert_eq!(read(text).unwrap(), ["10.0.0.5:80 at 10.0.0.5:80 with 1", "a at unix:/run/a with 3"]);
        assert_eq!(read("[{\"address\": \"web.example:80\"}]").unwrap(), ["web.example:80 at web.example:80 with 1"]);
        assert_eq!(read("[]").unwrap(), [] as [&str; 0]);
    }

    #[test]
    fn groups_have_the_form_of_prometheus() {
        let text = r#"[{"targets": ["10.0.0.5:80", "[::1]:80"], "labels": {"job": "web", "weight": "2"}},
                       {"targets": ["10.0.0.6:80"]}, {"targets": []}]"#;
        assert_eq!(
            read(text).unwrap(),
            ["10.0.0.5:80 at 10.0.0.5:80 with 2", "[::1]:80 at [::1]:80 with 2", "10.0.0.6:80 at 10.0.0.6:80 with 1"]
        );
    }

    #[test]
    fn faults_have_lines_and_remedies() {
        for (text, parts) in [
            ("", &["the file is empty: write a list of backends, or [] for none"][..]),
            ("backends: []", &["is not a list: write a list of backends"]),
            (
                "- address: \"10.0.0.5:80\"\n- address: \"10.0.0.5:80\"",
                &["list.yaml:2", "give each backend its own id"],
            ),
            (
                "- adress: x\n- { address: nothing }",
                &["list.yaml:1", "did you mean \"address\"", "list.yaml:2", "has no port"],
            ),
            ("- targets:\n  - 10.0.0.5:80\n  - 10.0.0.5:80", &["list.yaml:3", "give each backend its own id"]),
            ("- targets: [a:1]\n  labels: { weight: -1 }", &["list.yaml:1", "the label weight is not a whole number"]),
            ("- targets: [a:1]\n- { address: \"b:1\" }", &["list.yaml:2", "[b:1].targets: missing"]),
            ("- [", &["not valid YAML"]),
        ] {
            let error = read(text).unwrap_err();
            assert!(parts.iter().all(|part| error.contains(part)), "{text}: {error}");
        }
    }
}
