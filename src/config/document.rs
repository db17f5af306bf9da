//! A config as YAML: the file with its included files, without variables and merge keys, and the places of its values.

use std::collections::HashSet;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_yaml::{Mapping, Value};

use super::places::{Node, Places};
use super::reader::{EXTENSION, Faults, show};
use super::variables::{self, Lookup};
use super::{Api, Config, Error, Fault, Place, parse, source};

/// The key of the files that belong to the config too.
pub(super) const INCLUDE: &str = "include";

/// What an included file can have: entries of these lists.
const LISTS: [&str; 2] = ["listeners", "pools"];

/// Most faults whose lines are looked up.
const MOST_PLACES: usize = 1000;

/// Most included files.
const MOST_FILES: usize = 1000;

/// A config as YAML.
pub(super) struct Document {
    value: Value,
    origin: String,
    main: String,
    included: Vec<Text>,
    /// The files that it includes, and the folders in which it looks for them.
    parts: Vec<PathBuf>,
    /// Faults of variables and of included files.
    faults: Vec<Fault>,
}

/// A file with its text.
struct Text {
    origin: String,
    text: String,
}

impl Document {
    /// Reads a file with the files that it includes. Variables come from the environment of this process.
    pub(super) fn read(path: &Path) -> Result<Self, Error> {
        let lookup = |name: &str| std::env::var(name).ok();
        let folder = path.parent().unwrap_or(Path::new(""));
        Self::build(source::read(path)?, &path.display().to_string(), Some(&lookup), Some(folder))
    }

    /// Reads a file without those that it includes. The section `api` is in the main file.
    pub(super) fn read_main(path: &Path) -> Result<Self, Error> {
        let lookup = |name: &str| std::env::var(name).ok();
        let (origin, main) = (path.display().to_string(), source::read(path)?);
        let mut value = yaml(&main, &origin)?;
        let faults = Faults::default();
        variables::replace(&mut value, "", Some(&lookup), &faults);
        Ok(Self { value, origin, main, included: Vec::new(), parts: Vec::new(), faults: faults.into_vec() })
    }

    /// Reads a text, which can neither include files nor use variables.
    pub(super) fn parse(text: String, origin: &str) -> Result<Self, Error> {
        Self::build(text, origin, None, None)
    }

    fn build(text: String, origin: &str, lookup: Lookup<'_>, folder: Option<&Path>) -> Result<Self, Error> {
        let mut value = yaml(&text, origin)?;
        let mut document = Self {
            value: Value::Null,
            origin: origin.to_owned(),
            main: text,
            included: Vec::new(),
            parts: Vec::new(),
            faults: Vec::new(),
        };
        let faults = Faults::default();
        let include = value.as_mapping_mut().and_then(|map| map.shift_remove(INCLUDE));
        if let Some(mut include) = include {
            variables::replace(&mut include, INCLUDE, lookup, &faults);
            match folder {
                Some(folder) if faults.count() == 0 => document.include(&include, folder, &mut value, &faults),
                Some(_) => {}
                None => faults.add(INCLUDE, "only a file can include others: use `ringway check --diff FILE`"),
            }
        }
        variables::replace(&mut value, "", lookup, &faults);
        document.value = value;
        document.faults.extend(faults.into_vec());
        Ok(document)
    }

    /// Appends the listeners and pools of the included files to those of `value`.
    fn include(&mut self, include: &Value, folder: &Path, value: &mut Value, faults: &Faults) {
        let patterns = match include {
            Value::Sequence(list) => list.iter().collect(),
            one => vec![one],
        };
        let main = std::fs::canonicalize(&self.origin).ok();
        let mut seen = HashSet::new();
        for pattern in patterns {
            let Some(pattern) = pattern.as_str().filter(|pattern| !pattern.is_empty()) else {
                let problem = format!("{} is not the path of a file: write it like conf.d/*.yaml", show(pattern));
                faults.add(INCLUDE, problem);
                continue;
            };
            if pattern.contains('*') {
                let parent = folder.join(pattern).parent().map(Path::to_owned).unwrap_or_default();
                self.parts.push(if parent.as_os_str().is_empty() { PathBuf::from(".") } else { parent });
            }
            match files(folder, pattern) {
                Ok(files) if self.included.len() + files.len() > MOST_FILES => {
                    faults.add(INCLUDE, format_args!("includes more than {MOST_FILES} files: use fewer"));
                }
                Ok(files) => {
                    for file in files {
                        self.parts.push(file.clone());
                        let path = std::fs::canonicalize(&file).unwrap_or_else(|_| file.clone());
                        if Some(&path) == main.as_ref() {
                            faults.add(INCLUDE, "the config includes itself: choose another pattern");
                        } else if seen.insert(path) {
                            // Two patterns may have the same file.
                            self.include_file(&file, value, faults);
                        }
                    }
                }
                Err(problem) => faults.add(INCLUDE, problem),
            }
        }
    }

    fn include_file(&mut self, file: &Path, value: &mut Value, faults: &Faults) {
        let origin = file.display().to_string();
        let read = source::read(file).and_then(|text| Ok((yaml(&text, &origin)?, text)));
        let (part, text) = match read {
            Ok(read) => read,
            Err(Error::NotYaml { line: Some(line), problem, .. }) => {
                let place = Some(Place { file: origin.into(), line });
                self.faults.push(Fault { path: String::new(), problem, place });
                return;
            }
            Err(error) => {
                faults.add(INCLUDE, error);
                return;
            }
        };
        let place = |key: &str| Node::of(&text, &origin).map(|node| node.place_of(key));
        let mut fault = |key: &str, problem: String| {
            self.faults.push(Fault { path: key.to_owned(), problem, place: place(key) });
        };
        match part {
            // An empty file, perhaps with all lines commented out.
            Value::Null => {}
            Value::Mapping(part) => {
                for (key, more) in part {
                    let name = key.as_str().unwrap_or_default();
                    match more {
                        _ if name.starts_with(EXTENSION) => {}
                        _ if !LISTS.contains(&name) => fault(
                            name,
                            "an included file can have only listeners and pools: move this key to the main config"
                                .to_owned(),
                        ),
                        Value::Sequence(more) => append(value, name, more),
                        other => fault(name, format!("{} is not a list: begin each entry with `- `", show(&other))),
                    }
                }
            }
            _ => fault("", "is not a config: write listeners or pools".to_owned()),
        }
        self.included.push(Text { origin, text });
    }

    /// The files and folders beside the main file on which the config depends.
    pub(super) fn parts(&self) -> Vec<PathBuf> {
        let listeners = self.value.get("listeners").and_then(Value::as_sequence);
        let lists = listeners.into_iter().flatten().flat_map(|listener| {
            let file = |key: &str| listener.get(key)?.get("file")?.as_str().map(PathBuf::from);
            [file("allow"), file("deny")].into_iter().flatten()
        });
        self.parts.iter().cloned().chain(lists).collect()
    }

    /// The places of all values.
    pub(super) fn places(&self) -> Places<'_> {
        let mut root = Node::of(&self.main, &self.origin);
        for Text { origin, text } in &self.included {
            let Some(part) = Node::of(text, origin) else { continue };
            root = root.map(|root| LISTS.iter().fold(root, |root, key| root.extended(key, &part)));
        }
        Places::of(&self.value, root)
    }

    /// The config, or all of its faults.
    pub(super) fn config(self) -> Result<Config, Error> {
        let parsed = parse::config(&self.value);
        self.without_faults(parsed)
    }

    /// The section `api`, or its faults.
    pub(super) fn api(mut self) -> Result<Api, Error> {
        self.faults.retain(|fault| fault.path.starts_with("api."));
        let parsed = parse::only_api(&self.value);
        self.without_faults(parsed)
    }

    /// What was parsed, unless it or the document has faults.
    fn without_faults<T>(mut self, parsed: Result<T, Vec<Fault>>) -> Result<T, Error> {
        let faults = match parsed {
            Ok(parsed) if self.faults.is_empty() => return Ok(parsed),
            Ok(_) => Vec::new(),
            Err(faults) => faults,
        };
        // A variable without a value causes further faults in its place.
        let known: HashSet<String> = self.faults.iter().map(|fault| fault.path.clone()).collect();
        let mut all = std::mem::take(&mut self.faults);
        all.extend(faults.into_iter().filter(|fault| !known.contains(&fault.path)));
        let places = self.places();
        for fault in all.iter_mut().take(MOST_PLACES) {
            fault.place = fault.place.take().or_else(|| places.find(&fault.path));
        }
        self.faults = all;
        let origin = self.origin;
        self.faults.sort_by_cached_key(|fault| {
            fault.place.as_ref().map(|place| (*place.file != *origin, Arc::clone(&place.file), place.line))
        });
        Err(Error::Faulty { origin, faults: self.faults })
    }

    /// The config as one YAML text that includes no files and has no variables.
    pub(super) fn rendered(mut self) -> Result<String, Error> {
        if !self.faults.is_empty() {
            // Reports them with the others.
            self.config()?;
            return Ok(String::new());
        }
        if let Some(map) = self.value.as_mapping_mut() {
            map.retain(|key, _| !key.as_str().is_some_and(|key| key.starts_with(EXTENSION)));
        }
        variables::escape(&mut self.value);
        // A value that has been read always serializes.
        Ok(serde_yaml::to_string(&self.value).unwrap_or_default())
    }
}

/// Adds entries to a list of the config. A value in its place that is no list stays, and the reader reports it.
fn append(value: &mut Value, key: &str, more: Vec<Value>) {
    if value.is_null() {
        *value = Value::Mapping(Mapping::new());
    }
    let Some(map) = value.as_mapping_mut() else { return };
    let list = map.entry(key.into()).or_insert_with(|| Value::Sequence(Vec::new()));
    if let Some(list) = list.as_sequence_mut() {
        list.extend(more);
    }
}

/// The files that a pattern stands for, in the order of their names. Only its last part can have a `*`.
fn files(folder: &Path, pattern: &str) -> Result<Vec<PathBuf>, String> {
    let path = folder.join(pattern);
    if !pattern.contains('*') {
        return Ok(vec![path]);
    }
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let parent = path.parent().unwrap_or(Path::new(""));
    let parts = name.split_once('*').filter(|(_, last)| !last.contains('*'));
    let Some((first, last)) = parts.filter(|_| pattern.matches('*').count() == 1) else {
        return Err(format!("{pattern:?} has a * in the wrong place: use one * in the last part of the path"));
    };
    let unreadable = |error: io::Error| match error.kind() {
        ErrorKind::NotFound => format!("the folder {} does not exist", parent.display()),
        _ => format!("cannot read the folder {}: {error}", parent.display()),
    };
    let parent_or_here = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(parent_or_here).map_err(unreadable)? {
        let name = entry.map_err(unreadable)?.file_name();
        let Some(text) = name.to_str() else {
            return Err(format!("the name of {} is not UTF-8: rename the file", name.display()));
        };
        // A `*` does not stand for hidden files, as in a shell.
        let matches = text.len() >= first.len() + last.len()
            && text.starts_with(first)
            && text.ends_with(last)
            && (text.starts_with('.') == first.starts_with('.'));
        if matches {
            names.push(text.to_owned());
        }
    }
    names.sort();
    Ok(names.into_iter().map(|name| parent.join(name)).collect())
}

/// Parses YAML, and replaces merge keys (`<<`) by what they bring.
pub(super) fn yaml(text: &str, origin: &str) -> Result<Value, Error> {
    let fault = |line: Option<usize>, problem: String| Error::NotYaml { origin: origin.to_owned(), line, problem };
    let of_line = |is_it: &dyn Fn(&str) -> bool| {
        text.lines().enumerate().filter(|(_, line)| is_it(line)).last().map(|(at, _)| at + 1)
    };
    let mut value: Value = serde_yaml::from_str(text).map_err(|error| {
        let (line, words) = (error.location().map(|location| location.line()), error.to_string());
        if words.contains("duplicate entry")
            && let Some((key, first, second)) = Node::of(text, origin).and_then(|node| node.duplicate())
        {
            return fault(Some(second), format!("the key {key} is on line {first} already: remove one of the two"));
        }
        if words.contains("more than one document") {
            let line = of_line(&|line| line.starts_with("---"));
            return fault(
                line,
                "the file has more than one YAML document: remove the lines that consist of ---".to_owned(),
            );
        }
        let hint = hint(text, line, &words).map(|hint| format!("; {hint}")).unwrap_or_default();
        fault(line, format!("not valid YAML: {words}{hint}"))
    })?;
    merge(&mut value).map_err(|NotASection| {
        let line = of_line(&|line| line.trim_start_matches(['-', ' ']).starts_with("<<:"));
        fault(line, "a merge key (<<) needs a section or a list of sections: write it like <<: *name".to_owned())
    })?;
    Ok(value)
}

/// The value of a merge key is no section.
struct NotASection;

/// Replaces merge keys (`<<`) by what they bring. A key of the section itself wins, then one of the first source that has it. A
/// source's own merge keys come before those of the next source.
fn merge(value: &mut Value) -> Result<(), NotASection> {
    match value {
        Value::Sequence(list) => list.iter_mut().try_for_each(merge),
        Value::Mapping(map) => {
            map.values_mut().try_for_each(merge)?;
            let sources = match map.shift_remove("<<") {
                None => return Ok(()),
                Some(Value::Sequence(list)) => list,
                Some(one) => vec![one],
            };
            for source in sources {
                let Value::Mapping(source) = source else { return Err(NotASection) };
                for (key, value) in source {
                    map.entry(key).or_insert(value);
                }
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// What to write instead, for common mistakes in YAML.
fn hint(text: &str, line: Option<usize>, error: &str) -> Option<&'static str> {
    let number = line.unwrap_or(1);
    let line = text.lines().nth(number.saturating_sub(1)).unwrap_or_default();
    let has_tab = |line: &str| line[..line.len() - line.trim_start().len()].contains('\t');
    Some(if has_tab(line) || error.contains("token") && text.lines().take(number).any(has_tab) {
        "indent with spaces: a line begins with a tab"
    } else if error.contains("while scanning an alias") {
        "put text that begins with * in quotes; to listen on all IPv4 addresses, write 0.0.0.0:PORT"
    } else if error.contains("unknown anchor") {
        "define the anchor before, like &name, or put the text in quotes"
    } else if error.contains("mapping values are not allowed") {
        "put text with `: ` in it in quotes, and check the indentation"
    } else if error.contains("could not find expected ':'") || error.contains("did not find expected key") {
        "write `key: value`, and indent the lines of a section alike"
    } else if error.contains("did not find expected ','")
        || error.contains("flow node")
        || error.contains("quoted scalar")
    {
        "close the quotes and brackets before this place"
    } else if error.contains("as u128") || error.contains("as i128") {
        "the number is too large"
    } else if error.contains("cannot start any token") {
        "put the text in quotes"
    } else {
        return None;
    })
}
