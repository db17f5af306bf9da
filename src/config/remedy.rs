//! The words of faults: what is wrong with a value, and what to write instead.

use std::ops::RangeInclusive;

use serde_yaml::Value;

use super::keys::Form;
use super::reader::show;

/// Keys and values of other balancers, and Ringway's.
const SYNONYMS: [(&str, &str); 29] = [
    ("address", "listen"),
    ("backend", "pool"),
    ("backends", "pools"),
    ("backends", "static"),
    ("client", "idle"),
    ("bind", "listen"),
    ("cmd", "command"),
    ("endpoints", "static"),
    ("environment", "env"),
    ("frontends", "listeners"),
    ("hash", "ring"),
    ("healthcheck", "health_check"),
    ("host", "address"),
    ("host", "name"),
    ("least_conn", "least_connections"),
    ("leastconn", "least_connections"),
    ("maxconn", "max_connections"),
    ("maxconn", "max_connections_per_backend"),
    ("nameservers", "servers"),
    ("pool_name", "pool"),
    ("port", "listen"),
    ("resolvers", "servers"),
    ("server", "idle"),
    ("servers", "static"),
    ("strict_dns", "dns"),
    ("timeout", "timeouts"),
    ("ttl", "refresh"),
    ("type", "kind"),
    ("upstreams", "pools"),
];

/// A value that is not a section.
pub(super) fn not_a_section(path: &str, value: &Value, form: &'static Form) -> String {
    let what = show(value);
    if path.is_empty() {
        return match value {
            Value::Null => {
                "the file is empty: write listeners and pools, or let `ringway init` write a config".to_owned()
            }
            _ => format!("{what} is not a config: write sections like `listeners:` and `pools:`"),
        };
    }
    let key = path.rsplit('.').next().unwrap_or_default();
    let or = form.word().map(|word| format!(", or {word}")).unwrap_or_default();
    let example = form.example().map(|example| format!("{key}: {example}{or}"));
    match (example, value) {
        (Some(example), _) => format!("{what} is not a section: write {example}"),
        (None, Value::Sequence(_)) => format!("{what} is not a section: write `key: value` lines, without `- `"),
        (None, _) => format!("{what} is not a section: write `key: value` lines"),
    }
}

/// A value that is not a list.
pub(super) fn not_a_list(value: &Value) -> String {
    let what = show(value);
    match value {
        Value::Mapping(_) => format!("{what} is not a list: begin each entry with `- `"),
        Value::String(text) => {
            let words = text.split([',', ' ']).filter(|word| !word.is_empty());
            let words: Vec<_> = words.map(|word| format!("{word:?}")).collect();
            format!("{what} is not a list: write [{}]", words.join(", "))
        }
        _ => format!("{what} is not a list: write [a, b], or one line with `- ` for each entry"),
    }
}

/// A value that is not text.
pub(super) fn not_text(value: &Value) -> String {
    let what = show(value);
    // `{port}` without quotes is a section with the key `port`.
    let placeholder = value.as_mapping().filter(|map| map.len() == 1).and_then(|map| {
        let (key, value) = map.iter().next()?;
        key.as_str().filter(|_| value.is_null())
    });
    placeholder.map_or_else(
        || format!("{what} is not text"),
        |key| format!("{what} is not text: write \"{{{key}}}\" in quotes"),
    )
}

/// A value that is not a whole number of the range. `other`: a word that the key accepts too.
pub(super) fn not_a_number(value: &Value, other: Option<&str>, range: &RangeInclusive<u64>) -> String {
    let (what, least, most) = (show(value), range.start(), range.end());
    let neither = other.map_or("not".to_owned(), |other| format!("neither {other} nor"));
    let remedy = match value {
        Value::String(text) if text.parse().is_ok_and(|number| range.contains(&number)) => {
            format!(": write {text} without quotes")
        }
        Value::String(text) if text.starts_with(|c: char| c.is_ascii_digit()) => ": write only digits".to_owned(),
        _ => String::new(),
    };
    format!("{what} is {neither} a whole number from {least} to {most}{remedy}")
}

/// A value that is not a duration. `other`: a word that the key accepts too.
pub(super) fn duration_fault(value: &Value, other: Option<&str>) -> String {
    let what = show(value);
    let neither = other.map_or("not".to_owned(), |other| format!("neither {other} nor"));
    let remedy = match value {
        Value::Number(number) if number.is_u64() => format!("write the unit too, like {number}s"),
        Value::String(text) if text.starts_with('-') => "a duration cannot be negative".to_owned(),
        Value::String(text) if text.parse::<u64>().is_ok() => format!("write the unit too, like {text}s"),
        _ => "write it like 500ms, 10s or 5m".to_owned(),
    };
    format!("{what} is {neither} a duration: {remedy}")
}

/// Returns `, did you mean "name"?` if the value is close to one of the names, or another balancer's word for one, else an
/// empty text.
pub(super) fn hint(value: &Value, names: &[&str]) -> String {
    let Some(text) = value.as_str() else { return String::new() };
    let same = |a: &str, b: &str| {
        let letters = |text: &str| text.to_ascii_lowercase().replace(['-', '_', ' '], "");
        letters(a) == letters(b)
    };
    // One wrong letter in four: a word that shares less is another word.
    let is_near = |name: &str| strsim::damerau_levenshtein(text, name) <= (name.len() / 4).clamp(1, 3);
    let nearest = names
        .iter()
        .filter(|name| name.len() > 2 && (same(text, name) || is_near(name)))
        .min_by_key(|name| (!same(text, name), strsim::damerau_levenshtein(text, name)));
    let synonym = || {
        let known = SYNONYMS.iter().filter(|(other, name)| *other == text && names.contains(name));
        known.map(|(_, name)| name).next()
    };
    nearest.or_else(synonym).map_or(String::new(), |name| format!(", did you mean {name:?}?"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_names_only_near_misses_and_known_synonyms() {
        let names = ["name", "listen", "pool", "health_check", "timeouts", "key"];
        for (text, wanted) in [
            ("listn", "listen"),
            ("helth_check", "health_check"),
            ("healthCheck", "health_check"),
            ("health-check", "health_check"),
            ("bind", "listen"),
            ("timeout", "timeouts"),
            ("Pool", "pool"),
        ] {
            assert_eq!(hint(&text.into(), &names), format!(", did you mean {wanted:?}?"), "{text}");
        }
        for text in ["mode", "kubernetes", "weight", "pick", "tls", "no", "option"] {
            assert_eq!(hint(&text.into(), &names), "", "{text}");
        }
    }
}
