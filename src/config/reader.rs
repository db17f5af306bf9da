//! Typed access to YAML, by the table of keys. The reader collects each fault with its key path and continues, so one run
//! reports all faults.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt::Display;
use std::rc::Rc;
use std::time::Duration;

use serde_yaml::{Mapping, Value};

use super::Fault;
use super::keys::{Default as Usual, Form, Key, ROOT};
use super::remedy::{duration_fault, hint, not_a_list, not_a_number, not_a_section, not_text};
use crate::labels::Label;
use crate::text;

/// Begins keys of the whole config that Ringway does not read. They hold sections for anchors, as in Compose files.
pub(super) const EXTENSION: &str = "x-";

/// Collects the faults of a document. Clones share one list.
#[derive(Debug, Clone, Default)]
pub(super) struct Faults(Rc<RefCell<Vec<Fault>>>);

impl Faults {
    pub(super) fn add(&self, path: &str, problem: impl Display) {
        // A key of the config could move the cursor of a terminal.
        let path = if path.contains(char::is_control) { path.escape_debug().to_string() } else { path.to_owned() };
        self.0.borrow_mut().push(Fault { path, problem: problem.to_string(), place: None });
    }

    pub(super) fn count(&self) -> usize {
        self.0.borrow().len()
    }

    pub(super) fn into_vec(self) -> Vec<Fault> {
        self.0.take()
    }
}

/// A YAML value with its key path.
#[derive(Debug, Clone)]
pub(super) struct Item<'a> {
    pub(super) value: &'a Value,
    pub(super) path: String,
    pub(super) faults: Faults,
    form: &'static Form,
}

impl<'a> Item<'a> {
    /// The whole config.
    pub(super) fn root(value: &'a Value, faults: &Faults) -> Self {
        static WHOLE: Form = Form::Section(ROOT, "");
        Self { value, path: String::new(), faults: faults.clone(), form: &WHOLE }
    }

    /// A value outside of the config, with a form of its own.
    pub(super) fn of(value: &'a Value, faults: &Faults, form: &'static Form) -> Self {
        Self { value, path: String::new(), faults: faults.clone(), form }
    }

    pub(super) fn fault(&self, problem: impl Display) {
        self.faults.add(&self.path, problem);
    }

    /// Reads the value as a mapping. If it is not a mapping, adds a fault and returns an empty section.
    pub(super) fn section(self) -> Section<'a> {
        let map = self.value.as_mapping();
        if map.is_none() {
            self.fault(not_a_section(&self.path, self.value, self.form));
        }
        Section { map, path: self.path, faults: self.faults, form: self.form, known: Vec::new() }
    }

    /// Returns an item for a value of this mapping whose key the user chose, like a variable name in `env`.
    pub(super) fn entry(&self, key: &str, value: &'a Value) -> Item<'a> {
        Item { value, path: join(&self.path, key), faults: self.faults.clone(), form: &Form::Text }
    }

    /// Whether the value is the word that the key accepts in place of a number.
    fn is_word(&self) -> bool {
        self.form.word().is_some_and(|word| self.value.as_str() == Some(word) || (word == "off" && self.is_off()))
    }

    /// Whether the value is `off`. YAML 1.1 reads an unquoted `off` as false, so false counts too.
    pub(super) fn is_off(&self) -> bool {
        self.value.as_str() == Some("off") || self.value.as_bool() == Some(false)
    }

    pub(super) fn list(&self) -> Vec<Item<'a>> {
        let Some(list) = self.value.as_sequence() else {
            self.fault(not_a_list(self.value));
            return Vec::new();
        };
        let form = self.form.entries().unwrap_or_else(|| not_in_table(&self.path, &Form::Text));
        let item =
            |(label, value)| Item { value, path: format!("{}[{label}]", self.path), faults: self.faults.clone(), form };
        labels(list).zip(list).map(item).collect()
    }

    /// Reads text. A number or boolean counts as text too, as in `command: [nc, -p, 80]`.
    pub(super) fn text(&self) -> Option<String> {
        match self.value {
            Value::String(text) if text.contains('\0') => {
                self.fault("contains a NUL character: remove it");
                None
            }
            Value::String(text) => Some(text.clone()),
            Value::Number(number) => Some(number.to_string()),
            Value::Bool(truth) => Some(truth.to_string()),
            other => {
                self.fault(not_text(other));
                None
            }
        }
    }

    /// Reads a whole number. If the key accepts a word too, like `auto`, the caller has asked for it.
    pub(super) fn integer(&self) -> Option<u64> {
        let range = self.form.integers().unwrap_or_else(|| not_in_table(&self.path, &(0..=u64::MAX)));
        let number = self.value.as_u64().filter(|number| range.contains(number));
        if number.is_none() {
            self.fault(not_a_number(self.value, self.form.word(), range));
        }
        number
    }

    /// Whether a whole number is in the key's range.
    pub(super) fn fits(&self, number: u64) -> bool {
        self.form.integers().is_some_and(|range| range.contains(&number))
    }

    pub(super) fn truth(&self) -> Option<bool> {
        let truth = self.value.as_bool();
        if truth.is_none() {
            let remedy = match self.value.as_str() {
                Some("yes" | "on" | "1") => ": write true",
                Some("no" | "off" | "0") => ": write false",
                _ => "",
            };
            self.fault(format_args!("{} is neither true nor false{remedy}", show(self.value)));
        }
        truth
    }

    /// Reads a duration. If the key accepts a word too, like `off`, the caller has asked for it.
    pub(super) fn duration(&self) -> Option<Duration> {
        let range =
            self.form.durations().unwrap_or_else(|| not_in_table(&self.path, &(Duration::ZERO..=Duration::MAX)));
        let duration = self.value.as_str().and_then(text::duration);
        let Some(duration) = duration else {
            self.fault(duration_fault(self.value, self.form.word()));
            return None;
        };
        if range.contains(&duration) {
            return Some(duration);
        }
        let [least, most] = [range.start(), range.end()].map(|&bound| humantime::format_duration(bound));
        self.fault(format_args!("{} is not between {least} and {most}", show(self.value)));
        None
    }
}

/// A mapping that is being read. [`Section::finish`] reports unknown keys.
#[derive(Debug)]
pub(super) struct Section<'a> {
    map: Option<&'a Mapping>,
    pub(super) path: String,
    faults: Faults,
    form: &'static Form,
    known: Vec<&'static str>,
}

impl<'a> Section<'a> {
    pub(super) fn fault(&self, problem: impl Display) {
        self.faults.add(&self.path, problem);
    }

    /// Whether there is a mapping to read. Otherwise the section is missing, or its fault has been reported.
    pub(super) fn is_mapping(&self) -> bool {
        self.map.is_some()
    }

    /// A key that something else reads.
    pub(super) fn know(&mut self, key: &'static str) {
        self.known.push(key);
    }

    fn has(&self, key: &str) -> bool {
        self.map.is_some_and(|map| map.contains_key(key))
    }

    /// The table's entry for a key.
    fn key(&self, name: &str) -> &'static Key {
        self.form.keys().find(|key| key.name == name).unwrap_or_else(|| not_in_table(&join(&self.path, name), &ROOT[0]))
    }

    /// Returns the value of `key`, if the section has one. An empty value is a fault.
    pub(super) fn item(&mut self, key: &'static str) -> Option<Item<'a>> {
        self.known.push(key);
        let value = self.map?.get(key)?;
        let form = &self.key(key).form;
        let item = Item { value, path: join(&self.path, key), faults: self.faults.clone(), form };
        if value.is_null() {
            item.fault("has no value: set one, or remove the key to use the default");
            return None;
        }
        Some(item)
    }

    /// Returns the value of `key`, or adds a fault if the key is missing. `what` describes the expected value.
    pub(super) fn required(&mut self, key: &'static str, what: &str) -> Option<Item<'a>> {
        let item = self.item(key);
        let is_missing = self.map.is_some_and(|map| !map.contains_key(key));
        if is_missing {
            self.faults.add(&join(&self.path, key), format_args!("missing: give {what}"));
        }
        item
    }

    /// Returns a nested section. It is empty if the key is missing.
    pub(super) fn section(&mut self, key: &'static str) -> Section<'a> {
        match self.item(key) {
            Some(item) => item.section(),
            None => self.empty(key),
        }
    }

    /// Returns an empty section in place of a missing one.
    pub(super) fn empty(&self, key: &str) -> Section<'a> {
        let form = &self.key(key).form;
        Section { map: None, path: join(&self.path, key), faults: self.faults.clone(), form, known: Vec::new() }
    }

    pub(super) fn integer(&mut self, key: &'static str) -> u64 {
        let Usual::Number(usual) = self.key(key).default else { return *not_in_table(&join(&self.path, key), &0) };
        self.item(key).and_then(|item| item.integer()).unwrap_or(usual)
    }

    /// Reads a whole number; a missing key, or the word `auto` or `off` where the key accepts it, gives `None`.
    pub(super) fn optional_integer(&mut self, key: &'static str) -> Option<u64> {
        self.item(key).filter(|item| !item.is_word())?.integer()
    }

    /// Reads a duration; `off` gives `None`.
    pub(super) fn off_or_duration(&mut self, key: &'static str) -> Option<Duration> {
        let usual = match self.key(key).default {
            Usual::Time(usual) => Some(usual),
            _ => None,
        };
        match self.item(key) {
            Some(item) if item.is_off() => None,
            Some(item) => item.duration().or(usual),
            None => usual,
        }
    }

    pub(super) fn truth(&mut self, key: &'static str) -> bool {
        let Usual::Truth(usual) = self.key(key).default else { return *not_in_table(&join(&self.path, key), &false) };
        self.item(key).and_then(|item| item.truth()).unwrap_or(usual)
    }

    pub(super) fn duration(&mut self, key: &'static str) -> Duration {
        let Usual::Time(usual) = self.key(key).default else {
            return *not_in_table(&join(&self.path, key), &Duration::ZERO);
        };
        self.item(key).and_then(|item| item.duration()).unwrap_or(usual)
    }

    /// Reads one of the names of the enum `L`.
    pub(super) fn choice<L: Label>(&mut self, key: &'static str) -> L {
        let names: Vec<_> = L::ALL.iter().map(|label| label.as_str()).collect();
        let usual = match self.key(key).default {
            Usual::Text(usual) => names.iter().position(|&name| name == usual),
            _ => None,
        };
        let usual = L::ALL[usual.unwrap_or_else(|| *not_in_table(&join(&self.path, key), &0))];
        let Some(item) = self.item(key) else { return usual };
        let found = item.value.as_str().and_then(|text| names.iter().position(|&name| name == text));
        if found.is_none() {
            item.fault(format_args!(
                "{} is not one of {}{}",
                show(item.value),
                names.join(", "),
                hint(item.value, &names)
            ));
        }
        found.map_or(usual, |index| L::ALL[index])
    }

    /// Adds a fault for every unknown key: a key that no call has read.
    pub(super) fn finish(self) {
        for key in self.map.into_iter().flat_map(Mapping::keys) {
            let name = key.as_str().map_or_else(|| show(key), str::to_owned);
            let is_extension = self.path.is_empty() && name.starts_with(EXTENSION);
            if !self.known.contains(&name.as_str()) && !is_extension {
                let absent: Vec<_> = self.known.iter().filter(|key| !self.has(key)).copied().collect();
                let hint = hint(key, &absent);
                let known = self.known.join(", ");
                self.faults.add(&join(&self.path, &name), format_args!("unknown key{hint}; known keys: {known}"));
            }
        }
    }
}

/// What the reader goes on with if the table lacks a key, which is a mistake in the code and no reason to stop a running Ringway.
fn not_in_table<T: ?Sized>(path: &str, instead: &'static T) -> &'static T {
    debug_assert!(false, "the table of keys does not have {path} in this form");
    instead
}

/// Longest name of a network interface or a congestion control (`IFNAMSIZ` and `TCP_CA_NAME_MAX` in Linux, less the zero).
const LONGEST_KERNEL_NAME: usize = 15;

/// Longest text that a fault shows, in characters.
const LONGEST_SHOWN: usize = 100;

/// Formats a value for a fault message, close to how the user wrote it.
pub(super) fn show(value: &Value) -> String {
    match value {
        Value::Null => "an empty value".to_owned(),
        Value::String(text) if text.chars().count() > LONGEST_SHOWN => {
            format!("{:?} (and more)", text.chars().take(LONGEST_SHOWN).collect::<String>())
        }
        Value::String(text) => format!("{text:?}"),
        Value::Number(number) => number.to_string(),
        Value::Bool(truth) => truth.to_string(),
        Value::Sequence(_) => "a list".to_owned(),
        Value::Mapping(_) => "a section".to_owned(),
        Value::Tagged(tagged) => format!("a value with the tag {}", tagged.tag),
    }
}

/// What stands for each entry of a list in key paths: its name, id or address if no other entry has the same, else its position
/// from 0.
pub(super) fn labels(list: &[Value]) -> impl Iterator<Item = String> + use<> {
    let own = |value: &Value| {
        let text = |value: &Value| match value {
            Value::String(text) => Some(text.clone()),
            Value::Number(number) => Some(number.to_string()),
            _ => None,
        };
        let text = ["name", "id", "address"].iter().find_map(|key| text(value.get(key)?))?;
        let is_fine = !text.is_empty() && text.len() <= 253 && !text.chars().any(char::is_control);
        is_fine.then_some(text)
    };
    let names: Vec<_> = list.iter().map(own).collect();
    let mut counts = HashMap::new();
    for name in names.iter().flatten() {
        *counts.entry(name.clone()).or_insert(0) += 1;
    }
    let label = move |(n, name): (usize, Option<String>)| {
        name.filter(|name| counts.get(name) == Some(&1)).unwrap_or_else(|| n.to_string())
    };
    names.into_iter().enumerate().map(label)
}

/// The key path of a key in a section.
pub(super) fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

/// Reads and checks the required key `name` of a section.
pub(super) fn name(section: &mut Section<'_>) -> String {
    let Some(item) = section.required("name", "a name") else { return String::new() };
    let name = item.text().unwrap_or_default();
    check_name(&item, &name);
    name
}

/// Checks the characters and the length of a name, because names become metric labels, slot ids and container names.
pub(super) fn check_name(item: &Item<'_>, name: &str) {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > 63 || !name.chars().all(fits) {
        item.fault(format_args!("{name:?} is not a valid name: use 1 to 63 letters, digits, '-', '_' and '.'"));
    }
}

/// Converts a number to a smaller type. The caller has checked that the number fits.
pub(super) fn narrow<T: TryFrom<u64> + Default>(number: u64) -> T {
    T::try_from(number).unwrap_or_default()
}

/// Reads the name of a network interface or of a congestion control.
pub(super) fn kernel_name(item: &Item<'_>) -> Option<String> {
    let name = item.text()?;
    let is_fine = (1..=LONGEST_KERNEL_NAME).contains(&name.len())
        && name.chars().all(|c| c.is_ascii_graphic() && c != '/')
        && !matches!(&*name, "." | "..");
    if !is_fine {
        item.fault(format_args!(
            "{name:?} is not a name of 1 to {LONGEST_KERNEL_NAME} letters, digits and signs without /"
        ));
    }
    is_fine.then_some(name)
}
