//! A text as a tree whose every node knows its place: HuJSON (JSON with comments and trailing commas) and YAML alike.
//!
//! Both parsers bound how deep a text may nest, so no input exhausts the stack.

use std::collections::HashSet;
use std::fmt::{self, Write as _};
use std::path::Path;

use jsonc_parser::ast;
use saphyr::{LoadableYamlNode as _, MarkedYaml, Scalar, YamlData};
use serde::de::{Deserialize, Deserializer, EnumAccess, MapAccess, SeqAccess, VariantAccess as _, Visitor};
use serde_json::Value;

use crate::problem::{Invalid, Position, Problem};

/// How a text is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Format {
    /// JSON, with comments and trailing commas if it likes.
    #[default]
    HuJson,
    /// YAML.
    Yaml,
}

impl Format {
    /// By the name's ending: `.yaml` and `.yml` are YAML, all others HuJSON.
    pub fn of_path(path: &Path) -> Self {
        match path.extension().and_then(|ending| ending.to_str()) {
            Some(ending) if ending.eq_ignore_ascii_case("yaml") || ending.eq_ignore_ascii_case("yml") => {
                Self::Yaml
            }
            _ => Self::HuJson,
        }
    }
}

/// A node of the tree.
#[derive(Clone, Debug)]
pub(crate) struct Item {
    pub(crate) at: Position,
    pub(crate) data: Data,
}

#[derive(Clone, Debug)]
pub(crate) enum Data {
    Null,
    Bool(bool),
    Number(serde_json::Number),
    Text(String),
    List(Vec<Item>),
    /// In the order of the text; no key twice.
    Map(Vec<(Key, Item)>),
}

#[derive(Clone, Debug)]
pub(crate) struct Key {
    pub(crate) at: Position,
    pub(crate) name: String,
}

impl Item {
    pub(crate) fn to_json(&self) -> Value {
        match &self.data {
            Data::Null => Value::Null,
            Data::Bool(value) => Value::Bool(*value),
            Data::Number(number) => Value::Number(number.clone()),
            Data::Text(text) => Value::String(text.clone()),
            Data::List(items) => Value::Array(items.iter().map(Self::to_json).collect()),
            Data::Map(entries) => {
                Value::Object(entries.iter().map(|(key, item)| (key.name.clone(), item.to_json())).collect())
            }
        }
    }

    /// Levels of lists and objects; 0 for a plain value. Its recursion is bounded as the parsers are.
    pub(crate) fn depth(&self) -> usize {
        match &self.data {
            Data::List(items) => 1 + items.iter().map(Self::depth).max().unwrap_or(0),
            Data::Map(entries) => 1 + entries.iter().map(|(_, item)| item.depth()).max().unwrap_or(0),
            Data::Null | Data::Bool(_) | Data::Number(_) | Data::Text(_) => 0,
        }
    }

    /// What it is, in words.
    pub(crate) fn kind(&self) -> &'static str {
        match &self.data {
            Data::Null => "null",
            Data::Bool(_) => "true or false",
            Data::Number(_) => "a number",
            Data::Text(_) => "a text",
            Data::List(_) => "a list",
            Data::Map(_) => "an object",
        }
    }
}

/// A whole text.
#[derive(Debug)]
pub(crate) struct Document {
    pub(crate) root: Item,
}

impl Document {
    /// # Errors
    /// When it is not such a text, with the place where it stops being one.
    pub(crate) fn parse(text: &str, format: Format) -> Result<Self, Invalid> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let root = match format {
            Format::HuJson => hujson(text),
            Format::Yaml => yaml(text),
        };
        Ok(Self { root: root? })
    }
}

/// One step further down a place.
pub(crate) fn member(place: &str, key: &str) -> String {
    let plain = !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
    match (plain, place.is_empty()) {
        (true, true) => key.to_owned(),
        (true, false) => format!("{place}.{key}"),
        (false, _) => format!("{place}[{key:?}]"),
    }
}

/// One entry of a list.
pub(crate) fn entry(place: &str, at: usize) -> String {
    let mut text = place.to_owned();
    // Writing to a String cannot fail.
    let _ = write!(text, "[{at}]");
    text
}

fn whole(at: Position, message: impl Into<String>) -> Invalid {
    Problem { at: Some(at), place: String::new(), message: message.into(), help: None }.into()
}

/// Where a text begins.
const START: Position = Position { line: 1, column: 1 };

/// Byte offsets of a text as lines and columns.
struct Lines<'a> {
    text: &'a str,
    starts: Vec<usize>,
}

impl<'a> Lines<'a> {
    fn of(text: &'a str) -> Self {
        let ends = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at + 1);
        Self { text, starts: std::iter::once(0).chain(ends).collect() }
    }

    fn position(&self, offset: usize) -> Position {
        let line = self.starts.partition_point(|start| *start <= offset);
        let start = self.starts[line - 1];
        let before = self.text.get(start..offset).unwrap_or_default();
        Position { line, column: before.chars().count() + 1 }
    }
}

fn hujson(text: &str) -> Result<Item, Invalid> {
    let options = jsonc_parser::ParseOptions {
        allow_comments: true,
        allow_trailing_commas: true,
        allow_loose_object_property_names: false,
        allow_missing_commas: false,
        allow_single_quoted_strings: false,
        allow_hexadecimal_numbers: false,
        allow_unary_plus_numbers: false,
        allow_bare_decimal_point_numbers: false,
        allow_non_finite_numbers: false,
        allow_extended_string_escapes: false,
    };
    let lines = Lines::of(text);
    let parsed = jsonc_parser::parse_to_ast(text, &jsonc_parser::CollectOptions::default(), &options)
        .map_err(|error| whole(lines.position(error.range().start), lower(&error.kind().to_string())))?;
    if let Some((offset, what)) = stray(text) {
        return Err(whole(lines.position(offset), what));
    }
    match parsed.value {
        Some(value) => from_ast(&value, &lines, ""),
        None => Err(whole(START, "the text is empty")),
    }
}

/// What the parser lets pass and JSON does not have (RFC 8259, sections 2 and 7): control characters inside strings,
/// line breaks among them, and other blanks between values than the four of JSON.
fn stray(text: &str) -> Option<(usize, String)> {
    let mut chars = text.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        match (c, chars.peek().map(|(_, next)| *next)) {
            ('"', _) => {
                while let Some((at, c)) = chars.next() {
                    match c {
                        '"' => break,
                        '\\' => drop(chars.next()),
                        '\n' | '\r' => {
                            return Some((at, "a line break inside a string is written \\n".to_owned()));
                        }
                        c if c < ' ' => {
                            let code = u32::from(c);
                            let message =
                                format!("a control character inside a string is written \\u{code:04x}");
                            return Some((at, message));
                        }
                        _ => {}
                    }
                }
            }
            ('/', Some('/')) => while chars.next().is_some_and(|(_, c)| c != '\n') {},
            ('/', Some('*')) => {
                chars.next();
                let mut last = ' ';
                while let Some((_, c)) = chars.next().filter(|(_, c)| (last, *c) != ('*', '/')) {
                    last = c;
                }
            }
            (' ' | '\t' | '\n' | '\r', _) => {}
            (c, _) if c.is_whitespace() => {
                return Some((at, format!("U+{:04X} is no blank in JSON", u32::from(c))));
            }
            _ => {}
        }
    }
    None
}

fn lower(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_lowercase().chain(chars).collect())
}

fn twice(at: Position, place: &str, name: &str) -> Invalid {
    let message = format!("the key {name:?} is given twice");
    Problem { at: Some(at), place: place.to_owned(), message, help: None }.into()
}

fn from_ast(value: &ast::Value<'_>, lines: &Lines<'_>, place: &str) -> Result<Item, Invalid> {
    let (start, data) = match value {
        ast::Value::NullKeyword(null) => (null.range.start, Data::Null),
        ast::Value::BooleanLit(literal) => (literal.range.start, Data::Bool(literal.value)),
        ast::Value::StringLit(literal) => {
            (literal.range.start, Data::Text(literal.value.clone().into_owned()))
        }
        ast::Value::NumberLit(literal) => {
            let number = serde_json::from_str(literal.value).map_err(|_| {
                let message = format!("{} is no number that can be used", literal.value);
                whole(lines.position(literal.range.start), message)
            })?;
            (literal.range.start, Data::Number(number))
        }
        ast::Value::Array(array) => {
            let items = array.elements.iter().enumerate();
            let items = items.map(|(at, value)| from_ast(value, lines, &entry(place, at)));
            (array.range.start, Data::List(items.collect::<Result<_, _>>()?))
        }
        ast::Value::Object(object) => {
            let mut entries: Vec<(Key, Item)> = Vec::with_capacity(object.properties.len());
            let mut names = HashSet::new();
            for property in &object.properties {
                let name = property.name.as_str().to_owned();
                let at = lines.position(property.range.start);
                if !names.insert(name.clone()) {
                    return Err(twice(at, place, &name));
                }
                let item = from_ast(&property.value, lines, &member(place, &name))?;
                entries.push((Key { at, name }, item));
            }
            (object.range.start, Data::Map(entries))
        }
    };
    Ok(Item { at: lines.position(start), data })
}

/// Brackets open at once in a YAML text: its reader takes quadratic time for what it will refuse in the end.
const MOST_BRACKETS: usize = 1000;

fn yaml(text: &str) -> Result<Item, Invalid> {
    let mut open = 0_usize;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'[' | b'{' => open += 1,
            b']' | b'}' => open = open.saturating_sub(1),
            _ => {}
        }
        if open > MOST_BRACKETS {
            return Err(whole(Lines::of(text).position(at), "the text nests too deep"));
        }
    }
    // The reader counts these in bytes from the beginning, not in lines.
    if let Some((at, c)) = text.char_indices().find(|(_, c)| !is_printable(*c)) {
        let message = format!("the control character U+{:04X} is not allowed", u32::from(c));
        return Err(whole(Lines::of(text).position(at), message));
    }
    // The first reading bounds nesting and repetition, the second keeps places.
    for document in serde_yaml::Deserializer::from_str(text) {
        if let Err(error) = Bounded::deserialize(document) {
            let at = error.location().map(|at| Position { line: at.line(), column: at.column() });
            let message = error.to_string();
            let message = message.rfind(" at line ").map_or(message.as_str(), |end| &message[..end]);
            return Err(whole(at.unwrap_or(START), message));
        }
    }
    let documents = MarkedYaml::load_from_str(text).map_err(|error| {
        let at = Position { line: error.marker().line(), column: error.marker().col() + 1 };
        whole(at, error.info())
    })?;
    match documents.as_slice() {
        [] => Err(whole(START, "the text is empty")),
        [document] => from_yaml(document, ""),
        [_, second, ..] => Err(whole(place_of(second), "there is a second document")),
    }
}

/// May it stand in a YAML text (YAML 1.2, production `c-printable`)?
fn is_printable(c: char) -> bool {
    match c {
        '\t' | '\n' | '\r' | '\u{85}' => true,
        '\u{feff}' | '\u{fffe}' | '\u{ffff}' => false,
        c => !c.is_control(),
    }
}

/// Any YAML, read for nothing but the bounds of its reader.
struct Bounded;

impl<'de> Deserialize<'de> for Bounded {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Self)
    }
}

impl<'de> Visitor<'de> for Bounded {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_i128<E>(self, _: i128) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_u128<E>(self, _: u128) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_str<E>(self, _: &str) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_unit<E>(self) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_none<E>(self) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self, D::Error> {
        Self::deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self, A::Error> {
        while items.next_element::<Self>()?.is_some() {}
        Ok(self)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self, A::Error> {
        while entries.next_entry::<Self, Self>()?.is_some() {}
        Ok(self)
    }

    fn visit_enum<A: EnumAccess<'de>>(self, tagged: A) -> Result<Self, A::Error> {
        let (Self, content) = tagged.variant()?;
        content.newtype_variant()
    }
}

fn place_of(node: &MarkedYaml<'_>) -> Position {
    Position { line: node.span.start.line(), column: node.span.start.col() + 1 }
}

fn from_yaml(node: &MarkedYaml<'_>, place: &str) -> Result<Item, Invalid> {
    let at = place_of(node);
    let wrong = |message: &str| -> Invalid {
        Problem { at: Some(at), place: place.to_owned(), message: message.to_owned(), help: None }.into()
    };
    let data = match &node.data {
        YamlData::Value(scalar) => match scalar {
            Scalar::Null => Data::Null,
            Scalar::Boolean(value) => Data::Bool(*value),
            Scalar::Integer(number) => Data::Number((*number).into()),
            Scalar::FloatingPoint(number) => match serde_json::Number::from_f64(number.into_inner()) {
                Some(number) => Data::Number(number),
                None => return Err(wrong("this is no number that can be used")),
            },
            Scalar::String(text) => Data::Text(text.clone().into_owned()),
        },
        YamlData::Representation(text, ..) => Data::Text(text.clone().into_owned()),
        YamlData::Sequence(items) => {
            let items = items.iter().enumerate().map(|(at, item)| from_yaml(item, &entry(place, at)));
            Data::List(items.collect::<Result<_, _>>()?)
        }
        YamlData::Mapping(mapping) => {
            let mut entries = Vec::with_capacity(mapping.len());
            let mut names = HashSet::new();
            for (key, value) in mapping {
                let name = match from_yaml(key, place)?.data {
                    Data::Text(text) => text,
                    Data::Number(number) => number.to_string(),
                    _ => {
                        let message = "the keys of an object are texts".to_owned();
                        let place = place.to_owned();
                        return Err(Problem { at: Some(place_of(key)), place, message, help: None }.into());
                    }
                };
                // A number and a text may be one name.
                if !names.insert(name.clone()) {
                    return Err(twice(place_of(key), place, &name));
                }
                let item = from_yaml(value, &member(place, &name))?;
                entries.push((Key { at: place_of(key), name }, item));
            }
            Data::Map(entries)
        }
        YamlData::Tagged(..) => return Err(wrong("tags (!…) mean nothing here")),
        YamlData::Alias(_) | YamlData::BadValue => return Err(wrong("this cannot be read")),
    };
    Ok(Item { at, data })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_formats_make_one_tree() {
        let json = Document::parse(
            "{\n  // why\n  \"a\": [1, true, null, \"x\",],\n  \"b\": {\"c\": 2.5},\n}",
            Format::HuJson,
        );
        let yaml = Document::parse("# why\na: [1, true, null, x]\nb:\n  c: 2.5\n", Format::Yaml);
        let (json, yaml) = (json.unwrap(), yaml.unwrap());
        assert_eq!(json.root.to_json(), yaml.root.to_json());
        let last = |document: &Document| match &document.root.data {
            Data::Map(entries) => (entries[1].0.at, entries[1].1.at),
            _ => panic!("no object"),
        };
        let at = |line, column| Position { line, column };
        assert_eq!(last(&json), (at(4, 3), at(4, 8)));
        assert_eq!(last(&yaml), (at(3, 1), at(4, 3)));
    }

    #[test]
    fn a_text_that_is_none_says_where() {
        let error = |text: &str, format| Document::parse(text, format).unwrap_err().to_string();
        assert!(
            error("{\n  \"a\": [1 2]\n}", Format::HuJson).starts_with("2:"),
            "{}",
            error("{\n  \"a\": [1 2]\n}", Format::HuJson)
        );
        assert_eq!(error("{\"a\": 1,\n \"a\": 2}", Format::HuJson), "2:2: the key \"a\" is given twice");
        assert!(error("a: 1\na: 2\n", Format::Yaml).contains("duplicate"));
        assert!(error("a: [1\nb: 2", Format::Yaml).starts_with("2:"));
        assert_eq!(error("", Format::HuJson), "1:1: the text is empty");
        assert_eq!(error("# nothing\n", Format::Yaml), "1:1: the text is empty");
        for deep in ["[".repeat(100_000), "- ".repeat(100_000), "{\"a\":".repeat(100_000)] {
            error(&deep, Format::HuJson);
            error(&deep, Format::Yaml);
        }
    }

    #[test]
    fn every_mistake_of_yaml_has_line_and_column() {
        let aliases: String = (1..40).fold("a0: &a0 [x, x]\n".to_owned(), |text, at| {
            let last = at - 1;
            text + &format!("a{at}: &a{at} [*a{last}, *a{last}]\n")
        });
        for (text, line) in [
            ("a: 1\nb: 2\na: 3\n", 3),
            ("a:\n  b: {c: 1, c: 2}\n", 2),
            ("a:\n  1: x\n  '1': y\n", 3),
            ("a: 1\n\tb: 2\n", 2),
            ("a: [1\n", 2),
            ("a: 'x\n", 2),
            ("a: 1\n---\nb: 2\n", 3),
            ("a: 1\nb: *x\n", 2),
            ("a: 1\n? [x]\n: 2\n", 2),
            ("a: 1\nb: !x 2\n", 2),
            ("a: 1\nb: .nan\n", 2),
            ("a: 1\nb: \u{7}\n", 2),
            ("a: x: y\n", 1),
            ("%x\n", 1),
            (&("a:\n ".to_owned() + &"[".repeat(2000)), 2),
            (&("a:\n ".to_owned() + &"[".repeat(500)), 2),
            (&("a:\n ".to_owned() + &"- ".repeat(500)), 2),
            (&aliases, 0),
            ("", 1),
            ("~\n...\n", 1),
        ] {
            let Err(invalid) = Document::parse(text, Format::Yaml) else { continue };
            let at = invalid.problems[0].at.unwrap();
            assert!(line == 0 || at.line == line, "{}", invalid.for_file(&text[..text.len().min(60)]));
            assert!(at.column > 0, "{invalid}");
        }
    }

    #[test]
    fn strings_have_no_raw_control_characters_and_blanks_are_those_of_json() {
        let error = |text: &str| Document::parse(text, Format::HuJson).unwrap_err().to_string();
        for (text, place) in [
            ("{\n  \"a\": \"x\ny\"\n}", "2:10"),
            ("{\"a\": \"x\r\ny\"}", "1:9"),
            ("{\"a\": \"\tx\"}", "1:8"),
            ("{\"a\": \"x\u{0}\"}", "1:9"),
            ("{\"a\": \"\\\\\u{1f}\"}", "1:10"),
            ("{\"a\nb\": 1}", "1:4"),
            ("{\"a\":\u{a0}1}", "1:6"),
            ("{\u{b}}", "1:2"),
            ("{\u{2028}}", "1:2"),
        ] {
            let error = error(text);
            assert!(error.starts_with(&format!("{place}: ")), "{text:?}: {error}");
        }
        for text in [
            "{\"a\": \"x\\ny\\t\\u0000\\\"\u{7f}\u{a0}\"}",
            "// \"x\n{} /* \"a\n\u{a0} **/",
            "{ // it's \"\n\"a\": 1, /*\"\n\"*/ }",
        ] {
            assert!(Document::parse(text, Format::HuJson).is_ok(), "{text:?}");
        }
        for text in
            ["{} {}", "[,]", "{\"a\": 1,,}", "{a: 1}", "{'a': 1}", "{\"a\": +1}", "{\"a\": 01}", "{\"a\" 1}"]
        {
            error(text);
        }
    }
}
