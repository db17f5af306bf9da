//! The lines of a config: a second pass over its YAML, made only after a fault, because the first parser gives no positions.

use std::collections::HashMap;
use std::rc::Rc;

use saphyr_parser::{Event, Parser};
use serde_yaml::Value;

use super::Place;
use super::reader::{join, labels};

/// A YAML value with its lines.
#[derive(Debug)]
pub(super) struct Node {
    file: Rc<str>,
    line: usize,
    shape: Shape,
}

#[derive(Debug)]
enum Shape {
    Scalar,
    List(Vec<Rc<Node>>),
    /// Keys with their lines and their values.
    Map(Vec<(String, usize, Rc<Node>)>),
}

/// The place of every key path.
#[derive(Debug, Default)]
pub(super) struct Places(HashMap<String, Place>);

/// A list or a mapping whose end has not come yet.
struct Open {
    line: usize,
    anchor: usize,
    shape: Shape,
    /// The key of a mapping that waits for its value.
    key: Option<(String, usize)>,
}

impl Node {
    /// Reads the lines of a YAML text that another parser has taken for valid; `None` if this parser disagrees.
    pub(super) fn of(text: &str, file: &str) -> Option<Rc<Self>> {
        let file: Rc<str> = file.into();
        let (mut open, mut anchors, mut root) = (Vec::<Open>::new(), HashMap::new(), None);
        for event in Parser::new_from_str(text) {
            let (event, span) = event.ok()?;
            let line = span.start.line();
            let begin = |anchor, shape| Open { line, anchor, shape, key: None };
            let (anchor, node) = match event {
                Event::SequenceStart(anchor, _) => {
                    open.push(begin(anchor, Shape::List(Vec::new())));
                    continue;
                }
                Event::MappingStart(anchor, _) => {
                    open.push(begin(anchor, Shape::Map(Vec::new())));
                    continue;
                }
                Event::SequenceEnd | Event::MappingEnd => {
                    let Open { line, anchor, shape, .. } = open.pop()?;
                    (anchor, Rc::new(Self { file: Rc::clone(&file), line, shape }))
                }
                Event::Scalar(text, _, anchor, _) => {
                    // A scalar is a key if its mapping waits for one.
                    if let Some(Open { shape: Shape::Map(_), key: key @ None, .. }) = open.last_mut() {
                        *key = Some((text.into_owned(), line));
                        continue;
                    }
                    (anchor, Rc::new(Self { file: Rc::clone(&file), line, shape: Shape::Scalar }))
                }
                Event::Alias(anchor) => (0, Rc::clone(anchors.get(&anchor)?)),
                _ => continue,
            };
            if anchor > 0 {
                anchors.insert(anchor, Rc::clone(&node));
            }
            match open.last_mut() {
                None => root = Some(node),
                Some(Open { shape: Shape::List(list), .. }) => list.push(node),
                Some(Open { shape: Shape::Map(map), key, .. }) => match key.take() {
                    Some((key, line)) => map.push((key, line, node)),
                    // A list or a mapping as a key: the reader refuses it.
                    None => *key = Some((String::new(), node.line)),
                },
                Some(Open { shape: Shape::Scalar, .. }) => return None,
            }
        }
        root
    }

    /// The value of a key, also one that a merge key (`<<`) brings, and the line of the key.
    fn entry(&self, key: &str) -> Option<(usize, Rc<Self>)> {
        let Shape::Map(map) = &self.shape else { return None };
        let own = map.iter().find(|(name, ..)| name == key).map(|(_, line, node)| (*line, Rc::clone(node)));
        own.or_else(|| {
            let merged = map.iter().filter(|(name, ..)| name == "<<").map(|(.., node)| node);
            merged.into_iter().find_map(|node| match &node.shape {
                Shape::List(list) => list.iter().find_map(|node| node.entry(key)),
                _ => node.entry(key),
            })
        })
    }

    fn place(&self, line: usize) -> Place {
        Place { file: self.file.to_string(), line }
    }

    /// The place of this key, or of the node.
    pub(super) fn place_of(&self, key: &str) -> Place {
        self.place(self.entry(key).map_or(self.line, |(line, _)| line))
    }

    /// A key that a mapping has twice: the key and its two lines.
    pub(super) fn duplicate(&self) -> Option<(String, usize, usize)> {
        match &self.shape {
            Shape::Scalar => None,
            Shape::List(list) => list.iter().find_map(|node| node.duplicate()),
            Shape::Map(map) => map.iter().enumerate().find_map(|(n, (key, line, node))| {
                let first = map[..n].iter().find(|(other, ..)| other == key);
                first.map(|(_, first, _)| (key.clone(), *first, *line)).or_else(|| node.duplicate())
            }),
        }
    }

    /// This node with the entries of a list of another one after its own.
    pub(super) fn extended(self: Rc<Self>, key: &str, other: &Self) -> Rc<Self> {
        let Some((line, node)) = other.entry(key) else { return self };
        let Shape::List(more) = &node.shape else { return self };
        let Shape::Map(own) = &self.shape else { return self };
        let mut list = Vec::new();
        if let Some((_, node)) = self.entry(key)
            && let Shape::List(own) = &node.shape
        {
            list.clone_from(own);
        }
        list.extend(more.iter().cloned());
        let list = Rc::new(Self { file: Rc::clone(&node.file), line: node.line, shape: Shape::List(list) });
        let mut map: Vec<_> = own.iter().map(|(name, line, node)| (name.clone(), *line, Rc::clone(node))).collect();
        match map.iter_mut().find(|(name, ..)| name == key) {
            Some((.., old)) => *old = list,
            None => map.push((key.to_owned(), line, list)),
        }
        Rc::new(Self { file: Rc::clone(&self.file), line: self.line, shape: Shape::Map(map) })
    }
}

impl Places {
    /// The places of a value and of everything in it.
    pub(super) fn of(value: &Value, node: &Node) -> Self {
        let mut places = Self::default();
        places.0.insert(String::new(), node.place(node.line));
        places.record("", value, node);
        places
    }

    fn record(&mut self, path: &str, value: &Value, node: &Node) {
        match value {
            Value::Mapping(map) => {
                // A mapping can have keys that its value has no more, like variables and merge keys.
                if let Shape::Map(entries) = &node.shape {
                    self.0.extend(entries.iter().map(|(key, line, _)| (join(path, key), node.place(*line))));
                }
                for (key, value) in map {
                    let Some(key) = key.as_str() else { continue };
                    let Some((line, child)) = node.entry(key) else { continue };
                    let path = join(path, key);
                    self.0.insert(path.clone(), Place { file: child.file.to_string(), line });
                    self.record(&path, value, &child);
                }
            }
            Value::Sequence(list) => {
                let Shape::List(nodes) = &node.shape else { return };
                for ((label, value), node) in labels(list).zip(list).zip(nodes) {
                    let path = format!("{path}[{label}]");
                    self.0.insert(path.clone(), node.place(node.line));
                    self.record(&path, value, node);
                }
            }
            _ => {}
        }
    }

    /// The place of a key path, or of the closest section around it.
    pub(super) fn find(&self, path: &str) -> Option<Place> {
        let mut path = path;
        loop {
            let place = self.0.get(path);
            if place.is_some() || path.is_empty() {
                return place.cloned();
            }
            path = path.rfind(['.', '[']).map_or("", |end| &path[..end]);
        }
    }
}
