//! The lines of a config: a second pass over its YAML, made only after a fault, because the first parser gives no positions.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use saphyr_parser::{Event, Parser};
use serde_yaml::Value;

use super::Place;
use super::reader::labels;

/// A YAML value with its lines.
#[derive(Debug)]
pub(super) struct Node {
    file: Arc<str>,
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

/// Finds the places of key paths.
pub(super) struct Places<'a> {
    value: &'a Value,
    root: Option<Rc<Node>>,
    /// The positions of the entries of a list by their labels, for lists that a path has led through.
    labels: RefCell<HashMap<*const Value, Labels>>,
}

type Labels = Rc<HashMap<String, usize>>;

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
        let file: Arc<str> = file.into();
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
                    (anchor, Rc::new(Self { file: Arc::clone(&file), line, shape }))
                }
                Event::Scalar(text, _, anchor, _) => {
                    // A scalar is a key if its mapping waits for one.
                    if let Some(Open { shape: Shape::Map(_), key: key @ None, .. }) = open.last_mut() {
                        *key = Some((text.into_owned(), line));
                        continue;
                    }
                    (anchor, Rc::new(Self { file: Arc::clone(&file), line, shape: Shape::Scalar }))
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
        Place { file: Arc::clone(&self.file), line }
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
        let list = Rc::new(Self { file: Arc::clone(&node.file), line: node.line, shape: Shape::List(list) });
        let mut map: Vec<_> = own.iter().map(|(name, line, node)| (name.clone(), *line, Rc::clone(node))).collect();
        match map.iter_mut().find(|(name, ..)| name == key) {
            Some((.., old)) => *old = list,
            None => map.push((key.to_owned(), line, list)),
        }
        Rc::new(Self { file: Arc::clone(&self.file), line: self.line, shape: Shape::Map(map) })
    }
}

impl<'a> Places<'a> {
    pub(super) fn of(value: &'a Value, root: Option<Rc<Node>>) -> Self {
        Self { value, root, labels: RefCell::default() }
    }

    /// The place of a key path, or of the closest section around it.
    pub(super) fn find(&self, path: &str) -> Option<Place> {
        let root = self.root.as_ref()?;
        Some(self.below(self.value, root, path).unwrap_or_else(|| root.place(root.line)))
    }

    /// The place of a key path, or of the closest section around it that is not the whole config.
    pub(super) fn closest(&self, path: &str) -> Option<Place> {
        self.below(self.value, self.root.as_ref()?, path)
    }

    /// The place of what the rest of a path leads to, as far as it leads; `None`: nowhere.
    fn below(&self, value: &Value, node: &Node, rest: &str) -> Option<Place> {
        match value {
            Value::Mapping(map) => {
                let rest = rest.strip_prefix('.').unwrap_or(rest);
                let is_next = |key: &&str| {
                    let after = rest.strip_prefix(key);
                    after.is_some_and(|after| after.is_empty() || after.starts_with(['.', '[']))
                };
                // The longest: keys can have dots.
                let key = map.keys().filter_map(Value::as_str).filter(is_next).max_by_key(|key| key.len());
                let Some(key) = key else {
                    // A key that its value has no more, like `include`.
                    return node.entry(rest).map(|(line, _)| node.place(line));
                };
                let (line, child) = node.entry(key)?;
                let place = Place { file: Arc::clone(&child.file), line };
                Some(self.below(map.get(key)?, &child, &rest[key.len()..]).unwrap_or(place))
            }
            Value::Sequence(list) => {
                let Shape::List(nodes) = &node.shape else { return None };
                let labels = self.labels_of(value, list);
                let rest = rest.strip_prefix('[')?;
                // A label can have brackets, like that of an IPv6 address.
                let ends = rest.match_indices(']').map(|(end, _)| end);
                let (end, &at) = ends.into_iter().find_map(|end| Some((end, labels.get(&rest[..end])?)))?;
                let child = nodes.get(at)?;
                Some(self.below(&list[at], child, &rest[end + 1..]).unwrap_or_else(|| child.place(child.line)))
            }
            _ => None,
        }
    }

    fn labels_of(&self, value: &Value, list: &[Value]) -> Labels {
        let mut known = self.labels.borrow_mut();
        let new = || Rc::new(labels(list).enumerate().map(|(at, label)| (label, at)).collect());
        Rc::clone(known.entry(std::ptr::from_ref(value)).or_insert_with(new))
    }
}
