//! Where in the text a place of the document stands. Used only when there is an error to report: the
//! file is parsed a second time, by a parser that keeps positions.

use saphyr::{LoadableYamlNode as _, MarkedYaml, YamlData};

/// Line and column, both from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Line, from 1.
    pub line: usize,
    /// Column, from 1.
    pub column: usize,
}

/// A document that knows where its nodes stand.
pub(super) struct Positions<'a> {
    root: Option<MarkedYaml<'a>>,
}

impl<'a> Positions<'a> {
    pub(super) fn of(text: &'a str) -> Self {
        let root = MarkedYaml::load_from_str(text).ok().and_then(|mut documents| {
            if documents.is_empty() { None } else { Some(documents.swap_remove(0)) }
        });
        Self { root }
    }

    /// Where a text that is no YAML stops being it.
    pub(super) fn of_error(text: &str) -> Option<Position> {
        let error = MarkedYaml::load_from_str(text).err()?;
        Some(Position { line: error.marker().line(), column: error.marker().col() + 1 })
    }

    /// The value at `path`, or the nearest existing node above it.
    pub(super) fn value(&self, path: &[String]) -> Option<Position> {
        let mut node = self.root.as_ref()?;
        for step in path {
            let next = match &node.data {
                YamlData::Mapping(entries) => {
                    entries.iter().find(|(key, _)| is_key(key, step)).map(|(_, value)| value)
                }
                YamlData::Sequence(items) => step.parse().ok().and_then(|i: usize| items.get(i)),
                _ => None,
            };
            match next {
                Some(next) => node = next,
                None => break,
            }
        }
        Some(position(node))
    }

    /// The key `key` of the mapping at `path`.
    pub(super) fn key(&self, path: &[String], key: &str) -> Option<Position> {
        let mut node = self.root.as_ref()?;
        for step in path {
            node = match &node.data {
                YamlData::Mapping(entries) => {
                    entries.iter().find(|(key, _)| is_key(key, step)).map(|(_, value)| value)?
                }
                YamlData::Sequence(items) => items.get(step.parse::<usize>().ok()?)?,
                _ => return None,
            };
        }
        match &node.data {
            YamlData::Mapping(entries) => {
                entries.iter().find(|(found, _)| is_key(found, key)).map(|(found, _)| position(found))
            }
            _ => None,
        }
    }
}

fn position(node: &MarkedYaml<'_>) -> Position {
    Position { line: node.span.start.line(), column: node.span.start.col() + 1 }
}

fn is_key(node: &MarkedYaml<'_>, key: &str) -> bool {
    match &node.data {
        YamlData::Value(scalar) => match scalar.as_str() {
            Some(text) => text == key,
            None => scalar.as_integer().is_some_and(|number| number.to_string() == key),
        },
        YamlData::Representation(text, ..) => text == key,
        _ => false,
    }
}
