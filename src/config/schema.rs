//! The table of keys as a JSON Schema, with which editors complete and check a config.
//!
//! The schema accepts every valid config in its usual spelling. It does not know the rules between keys, or what stands in other
//! files, so it accepts some invalid ones too: `ringway check` finds the rest.

use serde_json::{Map, Value, json};

use super::keys::{Default, Form, Key, ROOT};
use super::reader::EXTENSION;

/// A duration like `1m 30s` or `1.5h`, in the units of humantime.
const DURATION: &str = concat!(
    r"^\s*(\d+(\.\d+)?\s*(nanos|nsec|ns|usec|us|µs|millis|msec|ms|seconds?|secs?|s|minutes?|mins?|m|hours?|hrs?|h|days?|d|",
    r"weeks?|wks?|w|months?|M|years?|yrs?|y)\s*)+$|^\s*0\s*$"
);

/// The JSON Schema (draft 2020-12) of a config.
pub fn schema() -> Value {
    let mut schema = section(ROOT);
    let extension = format!("^({EXTENSION}|<<$)");
    // An included file has only one of the two, and a file that includes others may have none.
    let needs = ["listeners", "pools", "include"].map(|key| json!({ "required": [key] }));
    for (name, value) in [
        ("$schema", json!("https://json-schema.org/draft/2020-12/schema")),
        ("title", json!("The config of Ringway")),
        ("required", json!([])),
        ("anyOf", json!(needs)),
        ("patternProperties", json!({ extension: true })),
        (
            "$defs",
            json!({ "variable": {
            "description": "a variable of Ringway's environment, like ${NAME} or ${NAME:-default}",
            "type": "string",
            "pattern": r"\$\{",
        } }),
        ),
    ] {
        schema[name] = value;
    }
    schema
}

fn section(keys: &'static [Key]) -> Value {
    let properties: Map<_, _> = keys.iter().map(|key| (key.name.to_owned(), property(key))).collect();
    let required: Vec<_> = keys.iter().filter(|key| key.default == Default::Required).map(|key| key.name).collect();
    json!({
        "type": "object",
        "properties": properties,
        "required": required,
        // Merged sections, which not every editor resolves.
        "patternProperties": { "^<<$": true },
        "additionalProperties": false,
    })
}

fn property(key: &'static Key) -> Value {
    let mut property = value(&key.form);
    property["description"] = plain(key.about).into();
    match key.default {
        Default::Required | Default::Words(_) => {}
        Default::Truth(truth) => property["default"] = truth.into(),
        Default::Number(number) => property["default"] = number.into(),
        Default::Text("[]") => property["default"] = json!([]),
        Default::Text("{}") => property["default"] = json!({}),
        Default::Text(_) | Default::Time(_) => property["default"] = key.default.to_string().into(),
    }
    property
}

/// A value, or a variable.
fn value(of: &'static Form) -> Value {
    let forms = of.alternatives();
    let mut alternatives: Vec<_> = forms.iter().map(form).collect();
    // Lists and sections cannot come from a variable, and text has no rule that a variable breaks.
    let is_checked =
        |form: &Form| !matches!(form, Form::List(_) | Form::Section(..) | Form::Pairs | Form::Text | Form::Quoted(""));
    if forms.iter().any(is_checked) {
        alternatives.push(json!({ "$ref": "#/$defs/variable" }));
    }
    match <[Value; 1]>::try_from(alternatives) {
        Ok([one]) => one,
        Err(alternatives) => json!({ "anyOf": alternatives }),
    }
}

fn form(form: &'static Form) -> Value {
    match form {
        Form::Truth => json!({ "type": "boolean" }),
        Form::Integer(range) => json!({ "type": "integer", "minimum": range.start(), "maximum": range.end() }),
        Form::Decimal(least, most) => json!({ "type": "number", "minimum": least, "maximum": most }),
        Form::Duration(range) => {
            let [least, most] = [range.start(), range.end()].map(|&bound| humantime::format_duration(bound));
            json!({ "type": "string", "pattern": DURATION, "title": format!("a duration from {least} to {most}") })
        }
        Form::Off => json!({ "enum": ["off", false] }),
        Form::Word(word) => json!({ "const": word }),
        Form::Choice(names) => json!({ "enum": names() }),
        Form::Text => json!({ "type": ["string", "number", "boolean"] }),
        Form::Quoted("") => json!({ "type": "string" }),
        Form::Quoted(pattern) => json!({ "type": "string", "pattern": pattern }),
        Form::List(entry) => json!({ "type": "array", "items": value(entry) }),
        Form::Any(_) => value(form),
        Form::Section(keys, _) => section(keys),
        Form::Pairs => {
            json!({ "type": "object", "additionalProperties": { "type": ["string", "number", "boolean"] } })
        }
    }
}

/// Markdown without links and code marks, for editors that show plain text.
fn plain(markdown: &str) -> String {
    let (mut text, mut rest) = (String::new(), markdown);
    while let Some((before, after)) = rest.split_once("](") {
        let (start, label) = before.rsplit_once('[').unwrap_or((before, ""));
        text.push_str(start);
        text.push_str(label);
        rest = after.split_once(')').map_or("", |(_link, rest)| rest);
    }
    text.push_str(rest);
    text.replace('`', "")
}

#[cfg(test)]
mod tests;
