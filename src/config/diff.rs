//! Compares two configs and describes each difference for a person, with its key path. Pure: no I/O.

use std::collections::HashMap;

use serde_yaml::{Mapping, Value};

use super::Config;

/// One key whose value differs between two configs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Key path, like `pools[echo].timeouts.idle`. List members are identified by their name or id.
    pub path: String,
    /// The old and the new value as text: `1 -> 3`, `added: ...`, `removed` or `changed`.
    pub words: String,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.path, self.words)
    }
}

/// Returns every key that differs, in the order of the old config. Keys that only the new config has follow.
pub fn differences(old: &Config, new: &Config) -> Vec<Difference> {
    let mut found = Vec::new();
    let values = [old, new].map(|config| super::effective::value(config, super::effective::Lists::PathsAndContents));
    compare("", Some(&values[0]), Some(&values[1]), &mut found);
    found
}

fn compare(path: &str, old: Option<&Value>, new: Option<&Value>, found: &mut Vec<Difference>) {
    let mut tell = |words: String| found.push(Difference { path: path.to_owned(), words });
    match (old, new) {
        _ if old == new => {}
        (Some(Value::Mapping(old)), Some(Value::Mapping(new))) => {
            for key in keys(old, new) {
                let path = if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
                compare(&path, old.get(key), new.get(key), found);
            }
        }
        (Some(Value::Sequence(old)), Some(Value::Sequence(new))) if names(old).is_some() && names(new).is_some() => {
            let (listed, added) = (by_name(old), by_name(new));
            let (old, new): (HashMap<_, _>, HashMap<_, _>) =
                (listed.iter().copied().collect(), added.iter().copied().collect());
            // The first route that matches decides, so their order counts.
            let order = |list: &[(&str, _)], other: &HashMap<&str, _>| -> Vec<String> {
                list.iter().filter(|(name, _)| other.contains_key(name)).map(|(name, _)| (*name).to_owned()).collect()
            };
            let (was, is) = (order(&listed, &new), order(&added, &old));
            if path.ends_with(".routes") && was != is {
                tell(format!("order: {} -> {}", was.join(", "), is.join(", ")));
            }
            for (name, _) in listed.iter().chain(added.iter().filter(|(name, _)| !old.contains_key(name))) {
                let (old, new) = (old.get(name).copied(), new.get(name).copied());
                // Most of a long list is the same.
                if old != new {
                    compare(&format!("{path}[{name}]"), old, new, found);
                }
            }
        }
        // The environment of replicas often holds secrets, so its values are never shown.
        _ if path.contains(".env") => tell("changed".to_owned()),
        (None, Some(new)) => tell(format!("added: {}", show(new))),
        (Some(_), None) => tell("removed".to_owned()),
        (Some(old), Some(new)) => tell(format!("{} -> {}", show(old), show(new))),
        (None, None) => {}
    }
}

fn keys<'a>(old: &'a Mapping, new: &'a Mapping) -> Vec<&'a str> {
    let of_new = new.keys().filter(|key| !old.contains_key(*key));
    old.keys().chain(of_new).filter_map(Value::as_str).collect()
}

/// Returns the name or id of every member of a list, or `None` if a member has neither.
fn names(list: &[Value]) -> Option<Vec<&str>> {
    list.iter().map(|item| item.get("name").or_else(|| item.get("id"))?.as_str()).collect()
}

fn by_name(list: &[Value]) -> Vec<(&str, &Value)> {
    names(list).unwrap_or_default().into_iter().zip(list).collect()
}

/// Formats a value on one line. The values of `env` are hidden.
fn show(value: &Value) -> String {
    match value {
        Value::String(text) if text.contains(char::is_control) => format!("{text:?}"),
        Value::String(text) => text.clone(),
        Value::Sequence(list) => format!("[{}]", list.iter().map(show).collect::<Vec<_>>().join(", ")),
        Value::Mapping(map) => {
            let pairs: Vec<_> = map
                .iter()
                .map(|(key, value)| {
                    let key = show(key);
                    let value = if key == "env" { "…".to_owned() } else { show(value) };
                    format!("{key}: {value}")
                })
                .collect();
            format!("{{ {} }}", pairs.join(", "))
        }
        Value::Null => "nothing".to_owned(),
        Value::Bool(truth) => truth.to_string(),
        Value::Number(number) => number.to_string(),
        Value::Tagged(_) => "a tagged value".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(pools: &str) -> Config {
        let yaml = format!("listeners: [{{ name: web, listen: \"127.0.0.1:0\", pool: p }}]\npools: [{pools}]");
        Config::parse(&yaml, "test").unwrap()
    }

    fn words(old: &str, new: &str) -> Vec<String> {
        differences(&config(old), &config(new)).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn list_members_are_matched_by_name_regardless_of_order() {
        let backend = |id: &str, weight: u32| format!("{{ address: \"127.0.0.1:1\", id: {id}, weight: {weight} }}");
        let pool = |backends: &[String]| format!("{{ name: p, provider: {{ static: [{}] }} }}", backends.join(", "));
        let old = pool(&[backend("a", 1), backend("b", 1)]);
        assert_eq!(words(&old, &pool(&[backend("b", 1), backend("a", 1)])), [] as [&str; 0]);
        let new = pool(&[backend("b", 3), backend("c", 1)]);
        assert_eq!(
            words(&old, &new),
            [
                "pools[p].provider.static[a]: removed",
                "pools[p].provider.static[b].weight: 1 -> 3",
                "pools[p].provider.static[c]: added: { address: 127.0.0.1:1, id: c, weight: 1, tier: 0, state: ready, max_connections: auto, resolve: refresh }",
            ]
        );
    }

    #[test]
    fn env_values_never_appear_in_a_difference() {
        let pool = |env: &str| {
            format!(
                "{{ name: p, provider: {{ process: {{ replicas: 1, command: [x, \"{{port}}\"], env: {{ {env} }} }} }} }}"
            )
        };
        for (old, new) in [("A: secret1", "A: secret2"), ("", "A: secret"), ("A: secret", "")] {
            let words = words(&pool(old), &pool(new));
            assert_eq!(words.len(), 1, "{words:?}");
            assert!(!words[0].contains("secret"), "{words:?}");
        }
        let added = words("{ name: p, provider: { static: [{ address: \"127.0.0.1:1\" }] } }", &pool("A: secret"));
        assert!(!added.concat().contains("secret"), "{added:?}");
    }
}
