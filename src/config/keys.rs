//! The table of keys: the name, form, default and meaning of every key of the config.
//!
//! The parser takes ranges and defaults from it, [`schema`](super::schema) makes a JSON Schema of it, and the table of keys in
//! docs/configuration.md is its text.
//!
//! # Layout
//!
//! - this file: what a key is, and how to find one
//! - [`root`], [`listener`], [`pool`], [`provider`]: the keys

mod listener;
mod pool;
mod provider;
mod replicas;
mod root;

use std::fmt::Write as _;
use std::ops::RangeInclusive;
use std::time::Duration;

pub(super) use self::provider::{GROUPS, LISTED, MOST_CPUS};
pub(super) use self::root::ROOT;
use crate::labels::Label;

/// A key of a section.
#[derive(Debug)]
pub(super) struct Key {
    pub(super) name: &'static str,
    pub(super) form: Form,
    pub(super) default: Default,
    /// What the key means, in Markdown. Links lead to headings of docs/configuration.md and to pages of docs/.
    pub(super) about: &'static str,
}

/// What applies if a key is absent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Default {
    /// The key must not be absent.
    Required,
    /// Something that no value of the key stands for. The words are in parentheses.
    Words(&'static str),
    /// A value, as a user writes it.
    Text(&'static str),
    Truth(bool),
    Number(u64),
    Time(Duration),
}

/// The values that a key accepts.
#[derive(Debug)]
pub(super) enum Form {
    Truth,
    Integer(RangeInclusive<u64>),
    /// A number with decimals, from the first bound to the second.
    Decimal(f64, f64),
    Duration(RangeInclusive<Duration>),
    /// `off`, which older YAML reads as false.
    Off,
    Word(&'static str),
    /// One of these names.
    Choice(fn() -> Vec<&'static str>),
    /// Text, also a number or boolean without quotes.
    Text,
    /// Text that YAML must take for text. The regular expression is empty, or every accepted value matches it.
    Quoted(&'static str),
    List(&'static Form),
    /// A section with these keys, and an example of one for faults; empty if the parser has a message of its own.
    Section(&'static [Key], &'static str),
    /// `name: value` lines whose names the user chooses.
    Pairs,
    Any(&'static [Form]),
}

/// The name of a listener, a pool or a route.
const NAME: Form = Form::Text;

impl Key {
    const fn new(name: &'static str, form: Form, default: Default, about: &'static str) -> Self {
        Self { name, form, default, about }
    }

    const fn required(name: &'static str, form: Form, about: &'static str) -> Self {
        Self::new(name, form, Default::Required, about)
    }

    const fn optional(name: &'static str, form: Form, words: &'static str, about: &'static str) -> Self {
        Self::new(name, form, Default::Words(words), about)
    }

    const fn usual(name: &'static str, form: Form, text: &'static str, about: &'static str) -> Self {
        Self::new(name, form, Default::Text(text), about)
    }

    const fn usual_time(name: &'static str, form: Form, time: Duration, about: &'static str) -> Self {
        Self::new(name, form, Default::Time(time), about)
    }

    const fn truth(name: &'static str, default: bool, about: &'static str) -> Self {
        Self::new(name, Form::Truth, Default::Truth(default), about)
    }

    const fn integer(name: &'static str, range: RangeInclusive<u64>, default: u64, about: &'static str) -> Self {
        Self::new(name, Form::Integer(range), Default::Number(default), about)
    }

    const fn duration(
        name: &'static str,
        range: RangeInclusive<Duration>,
        default: Duration,
        about: &'static str,
    ) -> Self {
        Self::new(name, Form::Duration(range), Default::Time(default), about)
    }

    const fn choice(
        name: &'static str,
        names: fn() -> Vec<&'static str>,
        default: &'static str,
        about: &'static str,
    ) -> Self {
        Self::new(name, Form::Choice(names), Default::Text(default), about)
    }

    const fn section(name: &'static str, keys: &'static [Key], example: &'static str, about: &'static str) -> Self {
        Self::new(name, Form::Section(keys, example), Default::Words("(the keys below)"), about)
    }
}

impl Form {
    /// This form, or its alternatives.
    pub(super) fn alternatives(&'static self) -> &'static [Form] {
        match self {
            Self::Any(forms) => forms,
            one => std::slice::from_ref(one),
        }
    }

    /// The keys of the section that a value may be, with those of all alternatives.
    pub(super) fn keys(&'static self) -> impl Iterator<Item = &'static Key> {
        self.alternatives().iter().flat_map(|form| match form {
            Self::Section(keys, _) => *keys,
            _ => &[],
        })
    }

    /// The range of the whole number that a value may be.
    pub(super) fn integers(&'static self) -> Option<&'static RangeInclusive<u64>> {
        self.alternatives().iter().find_map(|form| match form {
            Self::Integer(range) => Some(range),
            _ => None,
        })
    }

    /// The range of the duration that a value may be.
    pub(super) fn durations(&'static self) -> Option<&'static RangeInclusive<Duration>> {
        self.alternatives().iter().find_map(|form| match form {
            Self::Duration(range) => Some(range),
            _ => None,
        })
    }

    /// The word that a value may be in place of a number or a section.
    pub(super) fn word(&'static self) -> Option<&'static str> {
        self.alternatives().iter().find_map(|form| match form {
            Self::Off => Some("off"),
            Self::Word(word) => Some(*word),
            _ => None,
        })
    }

    /// The form of the entries of the list that a value may be.
    pub(super) fn entries(&'static self) -> Option<&'static Form> {
        self.alternatives().iter().find_map(|form| match form {
            Self::List(entry) => Some(*entry),
            _ => None,
        })
    }

    /// An example of the section that a value may be.
    pub(super) fn example(&'static self) -> Option<&'static str> {
        let examples = self.alternatives().iter().filter_map(|form| match form {
            Self::Section(_, example) => Some(*example),
            _ => None,
        });
        examples.into_iter().find(|example| !example.is_empty())
    }

    /// Whether the form is only a way to other keys.
    fn is_only_sections(&'static self) -> bool {
        self.alternatives().iter().all(|form| match form {
            Self::Section(..) => true,
            Self::List(entry) => matches!(entry, Self::Section(..)),
            _ => false,
        })
    }
}

impl std::fmt::Display for Default {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Required => f.write_str("(required)"),
            Self::Words(text) | Self::Text(text) => f.write_str(text),
            Self::Truth(truth) => truth.fmt(f),
            Self::Number(number) => number.fmt(f),
            Self::Time(time) => humantime::format_duration(*time).fmt(f),
        }
    }
}

/// The names of a [`Label`].
fn names<L: Label>() -> Vec<&'static str> {
    L::ALL.iter().map(|label| label.as_str()).collect()
}

/// The table of keys in Markdown, as docs/configuration.md has it.
pub fn markdown() -> String {
    let mut text = "| key | default | meaning |\n|---|---|---|\n".to_owned();
    let mut seen = Vec::new();
    visit(ROOT, "", &mut |path, key| {
        if !key.form.is_only_sections() && !seen.contains(&path) {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "| `{path}` | {} | {} |", key.default, key.about);
            seen.push(path);
        }
    });
    text
}

/// Visits all keys below these with their paths, like `pools[].connect.timeout`.
pub(super) fn visit(
    keys: impl IntoIterator<Item = &'static Key>,
    path: &str,
    act: &mut impl FnMut(String, &'static Key),
) {
    for key in keys {
        let path = super::reader::join(path, key.name);
        act(path.clone(), key);
        visit(key.form.keys(), &path, act);
        if let Some(entry) = key.form.entries() {
            visit(entry.keys(), &format!("{path}[]"), act);
        }
    }
}

const fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

const fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

const fn minutes(count: u64) -> Duration {
    seconds(60 * count)
}

const fn hours(count: u64) -> Duration {
    minutes(60 * count)
}

const fn days(count: u64) -> Duration {
    hours(24 * count)
}
