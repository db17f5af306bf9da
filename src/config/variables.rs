//! Variables in values: `${NAME}` and `${NAME:-default}` stand for variables of the environment, `$${` for the characters `${`.

use serde_yaml::Value;

use super::reader::{Faults, join, labels};

/// How to look a variable up; `None`: the text comes from a caller, who must not learn the variables of this process.
pub(super) type Lookup<'a> = Option<&'a dyn Fn(&str) -> Option<String>>;

const REMEDY: &str = "write ${NAME} or ${NAME:-default}, or $${ for the characters ${";

/// Replaces the variables in a value and in everything in it.
pub(super) fn replace(value: &mut Value, path: &str, lookup: Lookup<'_>, faults: &Faults) {
    match value {
        Value::String(text) if text.contains("${") => match replaced(text, lookup) {
            Ok(new) => *value = plain(new),
            Err(problem) => faults.add(path, problem),
        },
        Value::Sequence(list) => {
            let labels: Vec<_> = labels(list).collect();
            for (label, value) in labels.iter().zip(list) {
                replace(value, &format!("{path}[{label}]"), lookup, faults);
            }
        }
        Value::Mapping(map) => {
            for (key, value) in map {
                replace(value, &join(path, key.as_str().unwrap_or_default()), lookup, faults);
            }
        }
        Value::Tagged(tagged) => {
            faults.add(path, format_args!("has the tag {}, which Ringway does not know: remove it", tagged.tag));
        }
        _ => {}
    }
}

/// Replaces the variables in a text, or says what is wrong.
fn replaced(text: &str, lookup: Lookup<'_>) -> Result<String, String> {
    let (mut new, mut rest) = (String::new(), text);
    while let Some(at) = rest.find("${") {
        let before = &rest[..at];
        let after = &rest[at + 2..];
        if let Some(before) = before.strip_suffix('$') {
            new.push_str(before);
            new.push_str("${");
            rest = after;
            continue;
        }
        new.push_str(before);
        let (inside, after) = after.split_once('}').ok_or_else(|| format!("${{{after} has no closing }}: {REMEDY}"))?;
        let (name, default) = inside.split_once(":-").map_or((inside, None), |(name, default)| (name, Some(default)));
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) || !name.chars().all(is_name) {
            return Err(format!("${{{inside}}} is not a variable: {REMEDY}"));
        }
        let Some(lookup) = lookup else {
            return Err(format!(
                "has the variable {name}, but Ringway replaces variables only in files: use `ringway check --diff FILE`, or write \
                 $${{ for the characters ${{"
            ));
        };
        let found = lookup(name).filter(|value| !value.is_empty() || default.is_none());
        let value = found.or_else(|| default.map(str::to_owned)).ok_or_else(|| {
            format!("the environment variable {name} is not set: set it, or write a default like ${{{name}:-text}}")
        })?;
        new.push_str(&value);
        rest = after;
    }
    new.push_str(rest);
    Ok(new)
}

/// The value of a text after a replacement: a number or a boolean if the text is exactly how YAML writes it.
fn plain(text: String) -> Value {
    if let Ok(number) = text.parse::<u64>()
        && number.to_string() == text
    {
        return number.into();
    }
    match text.as_str() {
        "true" => true.into(),
        "false" => false.into(),
        _ => match text.parse::<f64>() {
            Ok(number) if number.is_finite() && number.to_string() == text => number.into(),
            _ => text.into(),
        },
    }
}

/// Writes the characters `${` so that [`replace`] leaves them alone.
pub(super) fn escape(value: &mut Value) {
    match value {
        Value::String(text) if text.contains("${") => *text = text.replace("${", "$${"),
        Value::Sequence(list) => list.iter_mut().for_each(escape),
        Value::Mapping(map) => map.values_mut().for_each(escape),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<String, String> {
        let lookup = |name: &str| match name {
            "HOST" => Some("db.local".to_owned()),
            "EMPTY" => Some(String::new()),
            _ => None,
        };
        replaced(text, Some(&lookup))
    }

    #[test]
    fn variables_and_defaults_are_replaced() {
        for (text, wanted) in [
            ("${HOST}:5432", "db.local:5432"),
            ("${HOST}${HOST}", "db.localdb.local"),
            ("${NONE:-a:-b}", "a:-b"),
            ("${EMPTY:-x}", "x"),
            ("${EMPTY}", ""),
            ("$HOST $$ {x}", "$HOST $$ {x}"),
            ("$${HOST} ${HOST}", "${HOST} db.local"),
        ] {
            assert_eq!(of(text).as_deref(), Ok(wanted), "{text}");
        }
        for (text, part) in [
            ("${NONE}", "NONE is not set"),
            ("${HOST", "no closing"),
            ("${a b}", "is not a variable"),
            ("${}", "not a variable"),
        ] {
            assert!(of(text).unwrap_err().contains(part), "{text}: {:?}", of(text));
        }
        assert!(replaced("${HOST}", None).unwrap_err().contains("only in files"));
    }

    #[test]
    fn only_text_that_a_number_would_print_becomes_a_number() {
        assert_eq!(plain("30".to_owned()), Value::from(30));
        assert_eq!(plain("0.5".to_owned()), Value::from(0.5));
        assert_eq!(plain("true".to_owned()), Value::from(true));
        for text in ["030", "1e3", "+5", "yes", "0x10", ".5"] {
            assert_eq!(plain(text.to_owned()), Value::from(text));
        }
    }

    #[test]
    fn escaped_text_survives_a_replacement() {
        let text = "a ${X} $${Y} $";
        let mut value = Value::from(text);
        escape(&mut value);
        assert_eq!(replaced(value.as_str().unwrap(), None).as_deref(), Ok(text));
    }
}
