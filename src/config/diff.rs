//! What differs between two configs, in words with key paths, for a person. Pure.

use serde_yaml::{Mapping, Value};

use super::Config;

/// Where the difference is, and in what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// `pools[echo].timeouts.idle`: members of lists by name or id.
    pub path: String,
    /// Old and new value in words.
    pub words: String,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.path, self.words)
    }
}

/// Every key that differs, in the order of the old config.
pub fn differences(old: &Config, new: &Config) -> Vec<Difference> {
    let mut found = Vec::new();
    compare("", Some(&super::effective::value(old)), Some(&super::effective::value(new)), &mut found);
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
            let (old, new) = (by_name(old), by_name(new));
            for (name, _) in old.iter().chain(new.iter().filter(|(name, _)| find(&old, name).is_none())) {
                compare(&format!("{path}[{name}]"), find(&old, name), find(&new, name), found);
            }
        }
        // Secrets are kept in the environment of replicas.
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

/// The names of a list's members, if they have any.
fn names(list: &[Value]) -> Option<Vec<&str>> {
    list.iter().map(|item| item.get("name").or_else(|| item.get("id"))?.as_str()).collect()
}

fn by_name(list: &[Value]) -> Vec<(&str, &Value)> {
    names(list).unwrap_or_default().into_iter().zip(list).collect()
}

fn find<'a>(list: &[(&str, &'a Value)], name: &str) -> Option<&'a Value> {
    list.iter().find(|(other, _)| *other == name).map(|&(_, value)| value)
}

/// On one line, durations as they are written.
fn show(value: &Value) -> String {
    match value {
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
    fn members_of_lists_are_told_by_name_and_order_does_not_matter() {
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
                "pools[p].provider.static[c]: added: { address: 127.0.0.1:1, id: c, weight: 1 }",
            ]
        );
    }

    #[test]
    fn secrets_are_not_shown() {
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
