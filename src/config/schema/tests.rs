//! The schema against the parser: every key of the table, with values of all kinds and at the ends of ranges.

use std::collections::BTreeSet;
use std::path::Path;

use jsonschema::Validator;

use super::*;
use crate::config::keys::visit;
use crate::config::{Config, Error};

fn validator() -> Validator {
    jsonschema::draft202012::new(&schema()).unwrap()
}

/// A config that has the key path with the value, and little else.
fn with(path: &str, value: &Value) -> Value {
    let mut config = json!({
        "listeners": [{ "name": "l", "listen": "127.0.0.1:0", "pool": "p" }],
        "pools": [{ "name": "p" }],
    });
    let mut at = &mut config;
    let mut names = path.split('.').peekable();
    while let Some(name) = names.next() {
        let (name, is_list) = name.strip_suffix("[]").map_or((name, false), |name| (name, true));
        let section = at.as_object_mut().unwrap();
        if names.peek().is_none() {
            section.insert(name.to_owned(), value.clone());
            break;
        }
        if is_list {
            at = &mut section.entry(name).or_insert_with(|| json!([{}]))[0];
            continue;
        }
        at = section.entry(name).or_insert_with(|| json!({}));
    }
    if path.rsplit('.').next() == Some("hex") || path.contains(".steps[].") {
        config["pools"][0]["health_check"]["kind"] = "expect".into();
    }
    if let Some(pool) = config.pointer_mut("/pools/0").and_then(Value::as_object_mut) {
        pool.entry("provider").or_insert_with(|| json!({ "static": [{ "address": "h:1" }] }));
    }
    config
}

/// Key paths without what stands for the entries of lists.
fn bare(path: &str) -> String {
    let mut bare = String::new();
    let mut depth = 0;
    for c in path.chars() {
        match c {
            '[' => depth += 1,
            ']' => depth -= 1,
            c if depth == 0 => bare.push(c),
            _ => {}
        }
    }
    bare
}

/// The faults that the parser finds at the key or below it.
fn parser_faults(path: &str, config: &Value) -> Vec<String> {
    let path = bare(path);
    let text = config.to_string();
    match Config::parse(&text, "test") {
        Err(Error::Faulty { faults, .. }) => {
            let faults = faults.into_iter().map(|fault| (bare(&fault.path), fault.problem));
            let below = |of: &str| of.strip_prefix(&path).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
            faults.filter(|(of, _)| below(of)).map(|(of, problem)| format!("{of}: {problem}")).collect()
        }
        Ok(_) => Vec::new(),
        Err(error) => panic!("{text}: {error}"),
    }
}

/// What the schema says about the value of one key.
fn of_key(key: &'static Key, definitions: &Value) -> Validator {
    let mut alone = value(&key.form);
    alone["$defs"] = definitions.clone();
    jsonschema::draft202012::new(&alone).unwrap()
}

/// Values of all kinds, and the ends of the key's ranges.
fn values(key: &'static Key) -> Vec<Value> {
    let mut values = vec![
        json!(null),
        json!(true),
        json!(false),
        json!(0),
        json!(-1),
        json!(1),
        json!(1.5),
        json!(70_000),
        json!(u64::MAX),
        json!(""),
        json!("off"),
        json!("auto"),
        json!("word"),
        json!("7"),
        json!("10s"),
        json!("1m 30s"),
        json!("1.5h"),
        json!("10"),
        json!("999d"),
        json!("1ms"),
        json!("0s"),
        json!("a b"),
        json!("127.0.0.1:80"),
        json!("[::1]:80"),
        json!("64MiB"),
        json!("30/m"),
        json!("1 / s"),
        json!("9001-9002"),
        json!("200-399"),
        json!("0660"),
        json!(660),
        json!([]),
        json!(["word"]),
        json!([1]),
        json!([200]),
        json!(["off"]),
        json!([null]),
        json!([{}]),
        json!({}),
        json!({ "word": 1 }),
        json!({ "name": "x" }),
    ];
    if let Some(range) = key.form.integers() {
        let ends = [range.start().saturating_sub(1), *range.start(), *range.end(), range.end().saturating_add(1)];
        values.extend(ends.map(Value::from));
    }
    for form in key.form.alternatives() {
        if let Form::Choice(names) = form {
            values.extend(names().into_iter().map(Value::from));
        }
        if let Form::Word(word) = form {
            values.push((*word).into());
        }
    }
    values
}

/// Whether the schema knows everything that a single value can have wrong, except for the range of a duration.
fn is_exact(form: &'static Form) -> bool {
    form.alternatives().iter().all(|form| {
        matches!(form, Form::Truth | Form::Integer(_) | Form::Duration(_) | Form::Off | Form::Word(_) | Form::Choice(_))
    })
}

#[test]
fn schema_and_parser_agree_about_every_key() {
    let definitions = schema()["$defs"].clone();
    let (mut wrong, mut compared, mut seen) = (Vec::new(), 0, BTreeSet::new());
    visit(ROOT, "", &mut |path, key| {
        if path == "include" || !seen.insert(path.clone()) {
            return;
        }
        let validator = of_key(key, &definitions);
        // A key with sections is compared through their keys.
        for given in values(key)
            .into_iter()
            .filter(|given| !(given.is_object() || given.is_array()) || key.form.keys().next().is_none())
        {
            let faults = parser_faults(&path, &with(&path, &given));
            let is_accepted = validator.is_valid(&given);
            let unknown = faults
                .iter()
                .find(|fault| fault.contains("unknown key") && bare(&path) == fault.split(':').next().unwrap());
            compared += 1;
            if let Some(unknown) = unknown {
                wrong.push(format!("the parser does not read {path}: {unknown}"));
            } else if faults.is_empty() && !is_accepted {
                wrong.push(format!("{path}: the schema refuses {given}, the parser does not"));
            } else if !faults.is_empty() && is_accepted && is_exact(&key.form) {
                let is_known = faults.iter().all(|fault| {
                    ["is not between", "applies only to", "requires ", "there are no checks", "a check of this kind"]
                        .iter()
                        .any(|words| fault.contains(words))
                });
                if !is_known {
                    wrong.push(format!("{path}: the schema accepts {given}, the parser does not: {faults:?}"));
                }
            }
        }
    });
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(compared > 4000, "only {compared} values");
}

/// The YAML files of a folder of the repository.
fn files(folder: &str) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)).unwrap();
    let files = entries.map(|entry| entry.unwrap().path());
    files.filter(|file| file.extension().is_some_and(|extension| extension == "yaml")).collect()
}

#[test]
fn the_schema_accepts_every_valid_config_as_written_and_in_full() {
    let validator = validator();
    let folders = ["tests/configs/valid", "tests/configs/parts", "examples", "docker", "."];
    let mut checked = 0;
    for file in folders.into_iter().flat_map(files) {
        let text = std::fs::read_to_string(&file).unwrap();
        let written: serde_yaml::Value = serde_yaml::from_str(&text).unwrap();
        let is_config = ["listeners", "pools"].iter().any(|key| written.get(key).is_some());
        if !is_config {
            continue;
        }
        let mut all = vec![written];
        // A part is not a config of its own.
        if let Ok(config) = Config::load(&file) {
            all.push(serde_yaml::from_str(&config.to_yaml()).unwrap());
        }
        for value in all {
            let value = serde_json::to_value(value).unwrap();
            let faults: Vec<_> =
                validator.iter_errors(&value).map(|error| format!("{}: {error}", error.instance_path())).collect();
            assert!(faults.is_empty(), "{}: {faults:#?}", file.display());
            checked += 1;
        }
    }
    assert!(checked > 40, "only {checked} configs");
}

#[test]
fn the_schema_refuses_what_people_mistype() {
    let validator = validator();
    let good = json!({
        "listeners": [{ "name": "l", "listen": "127.0.0.1:0", "pool": "p" }],
        "pools": [{ "name": "p", "provider": { "static": [{ "address": "h:1" }] } }],
    });
    assert!(validator.is_valid(&good));
    for (at, wrong) in [
        ("/listeners", json!({})),
        ("/listeners/0", json!({ "name": "l", "listn": "127.0.0.1:0", "pool": "p" })),
        ("/listeners/0", json!({ "name": "l", "listen": "127.0.0.1:0" })),
        ("/pools/0/provider", json!({})),
        ("/pools/0/provider", json!({ "static": [], "process": {} })),
        ("/pools/0/provider/static/0/address", json!(80)),
        ("/pools/0", json!({ "name": "p", "provider": { "static": [] }, "drain": 30 })),
        ("/pools/0", json!({ "name": "p", "provider": { "static": [] }, "key": "sourceip" })),
        (
            "/pools/0",
            json!({ "name": "p", "provider": { "docker": { "discover": { "label": "a", "port": 1 }, "image": "i" } } }),
        ),
        ("/pools/0", json!({ "name": "p", "provider": { "static": [] }, "health_check": { "kind": "https" } })),
    ] {
        let mut config = good.clone();
        *config.pointer_mut(at).unwrap() = wrong;
        assert!(!validator.is_valid(&config), "{config}");
    }
    assert!(validator.is_valid(&json!({ "include": "conf.d/*.yaml", "x-anchors": { "a": [1] } })));
    assert!(validator.is_valid(&json!({ "pools": [] })));
    assert!(!validator.is_valid(&json!({ "workers": 1 })));
}

#[test]
fn descriptions_have_no_markdown() {
    let text = "see [Access lists](#access-lists), [`unix:/path`](#unix-sockets) or `[10.0.0.0/8]`";
    assert_eq!(plain(text), "see Access lists, unix:/path or [10.0.0.0/8]");
    visit(ROOT, "", &mut |path, key| {
        let text = plain(key.about);
        assert!(!text.is_empty() && !text.contains("](") && !text.contains('`'), "{path}: {text}");
        assert!(!key.about.contains(" | "), "{path}: a bar ends a cell of a table");
    });
}
