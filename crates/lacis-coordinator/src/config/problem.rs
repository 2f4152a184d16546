//! What is wrong with a configuration, in words: the place in the file and in the document, what was
//! expected there, what was found, and the nearest known key.

use std::collections::BTreeSet;
use std::fmt::{self, Write as _};

use jsonschema::JsonType;
use jsonschema::ValidationError;
use jsonschema::error::{TypeKind, ValidationErrorKind};
use serde_json::Value;

use super::position::{Position, Positions};
use super::scalars::FORMATS;

/// Longest piece of the document that a message repeats.
const MAX_QUOTE: usize = 60;

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {file}: {source}")]
    Read {
        /// Its path.
        file: String,
        /// From the system.
        source: std::io::Error,
    },
    /// The file's content is not a configuration.
    #[error("{}", lines(file, problems))]
    Wrong {
        /// Its path.
        file: String,
        /// Everything that is wrong with it, in the order of the file.
        problems: Vec<Problem>,
    },
}

fn lines(file: &str, problems: &[Problem]) -> String {
    let mut text = String::new();
    for (i, problem) in problems.iter().enumerate() {
        let end = if i == 0 { "" } else { "\n" };
        // Writing to a String cannot fail.
        let _ = match problem.position {
            Some(at) => write!(text, "{end}{file}:{}:{}: {problem}", at.line, at.column),
            None => write!(text, "{end}{file}: {problem}"),
        };
    }
    text
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where in the file.
    pub position: Option<Position>,
    /// Where in the document, as a JSON pointer; empty for the whole.
    pub path: String,
    /// What was expected, and what was found.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)
    }
}

impl Problem {
    /// A problem of the whole file.
    pub(super) fn general(message: String) -> Self {
        Self { position: None, path: String::new(), message }
    }

    /// A problem of the value at `path`.
    pub(super) fn at(positions: &Positions<'_>, path: &[&str], message: impl Into<String>) -> Self {
        let path: Vec<String> = path.iter().map(|step| (*step).to_owned()).collect();
        Self { position: positions.value(&path), path: pointer(&path), message: message.into() }
    }
}

fn pointer(path: &[String]) -> String {
    path.iter().fold(String::new(), |mut text, step| {
        text.push('/');
        text.push_str(&step.replace('~', "~0").replace('/', "~1"));
        text
    })
}

fn steps(pointer: &str) -> Vec<String> {
    let unescape = |step: &str| step.replace("~1", "/").replace("~0", "~");
    pointer.split('/').skip(1).map(unescape).collect()
}

/// A text that is no YAML at all.
pub(super) fn syntax(text: &str, error: &serde_yaml::Error) -> Problem {
    let mut position = error.location().map(|at| Position { line: at.line(), column: at.column() });
    let mut message = error.to_string();
    if let Some(end) = message.rfind(" at line ") {
        message.truncate(end);
    }
    if let Some(key) = message.strip_prefix("duplicate entry with key ") {
        // The first parser gives the place of the whole mapping here.
        position = Positions::of_error(text).or(position);
        return Problem { position, path: String::new(), message: format!("the key {key} is given twice") };
    }
    let hint = if text.lines().any(|line| line.starts_with('\t')) {
        " (YAML is indented with spaces, not tabs)"
    } else {
        ""
    };
    Problem { position, path: String::new(), message: format!("not valid YAML: {message}{hint}") }
}

/// Everything in which the document does not follow the schema, in the order of the file.
pub(super) fn find(schema: &Value, document: &Value, positions: &Positions<'_>) -> Vec<Problem> {
    let mut options = jsonschema::options();
    options = options.should_validate_formats(true).should_ignore_unknown_formats(true);
    for format in FORMATS {
        options = options.with_format(format.name, format.accepts);
    }
    let validator = match options.build(schema) {
        Ok(validator) => validator,
        Err(error) => return vec![Problem::general(format!("the schema itself is wrong: {error}"))],
    };
    let finder = Finder { schema, positions };
    let mut found = Vec::new();
    for error in validator.iter_errors(document) {
        finder.describe(&error, &mut found);
    }
    // A key that is only misspelt is not missing as well.
    let misspelt: BTreeSet<String> = found
        .iter()
        .filter_map(|(_, about)| match about {
            About::Misspelt(key) => Some(key.clone()),
            _ => None,
        })
        .collect();
    let missing = |about: &About| matches!(about, About::Missing(key) if misspelt.contains(key));
    let mut problems: Vec<Problem> =
        found.into_iter().filter(|(_, about)| !missing(about)).map(|(problem, _)| problem).collect();
    problems.sort_by_key(|problem| problem.position);
    problems.dedup();
    problems
}

/// What else a problem says about a key, which is given as a pointer.
enum About {
    Missing(String),
    /// The known key that was probably meant.
    Misspelt(String),
    Nothing,
}

struct Finder<'a> {
    schema: &'a Value,
    positions: &'a Positions<'a>,
}

impl Finder<'_> {
    fn describe(&self, error: &ValidationError<'_>, problems: &mut Vec<(Problem, About)>) {
        let path = steps(error.instance_path().as_str());
        let found = error.instance();
        let mut about = About::Nothing;
        let message = match error.kind() {
            ValidationErrorKind::AdditionalProperties { unexpected } => {
                for key in unexpected {
                    problems.push(self.unknown(&path, key));
                }
                return;
            }
            ValidationErrorKind::AnyOf { context } | ValidationErrorKind::OneOfNotValid { context } => {
                // The branch for this kind of value knows better what is wrong inside it.
                let fits = |branch: &&Vec<ValidationError<'_>>| {
                    !branch.iter().any(|inner| {
                        matches!(inner.kind(), ValidationErrorKind::Type { .. })
                            && inner.instance_path() == error.instance_path()
                    })
                };
                if let Some(branch) = context.iter().find(fits) {
                    for inner in branch {
                        self.describe(inner, problems);
                    }
                    return;
                }
                if found.is_null() && !path.is_empty() {
                    return;
                }
                format!("expected {}, found {}", self.expected(&path), quote(found))
            }
            ValidationErrorKind::Required { property } => {
                let key = property.as_str().unwrap_or_default();
                let mut inner = path.clone();
                inner.push(key.to_owned());
                about = About::Missing(pointer(&inner));
                format!("the key \"{key}\" is missing: expected {}", self.expected(&inner))
            }
            ValidationErrorKind::Type { kind } => {
                // `key: null` is the same as no key, where the key may be left out.
                if found.is_null() && self.may_be_absent(&path) {
                    return;
                }
                let expected = match self.schema_at(&path) {
                    Some(_) => self.expected(&path),
                    None => type_words(kind),
                };
                format!("expected {expected}, found {}", quote(found))
            }
            ValidationErrorKind::Format { .. } => {
                format!("expected {}, found {}", self.expected(&path), quote(found))
            }
            ValidationErrorKind::MinItems { .. } | ValidationErrorKind::MinProperties { .. } => {
                format!("expected {}, found none", self.expected(&path))
            }
            ValidationErrorKind::MinLength { .. } => "expected a text that is not empty".to_owned(),
            ValidationErrorKind::Minimum { limit } => {
                format!("expected a number of at least {limit}, found {}", quote(found))
            }
            ValidationErrorKind::Maximum { limit } => {
                format!("expected a number of at most {limit}, found {}", quote(found))
            }
            _ => error.to_string(),
        };
        let problem = Problem { position: self.positions.value(&path), path: pointer(&path), message };
        problems.push((problem, about));
    }

    fn unknown(&self, path: &[String], key: &str) -> (Problem, About) {
        let known = self.schema_at(path).map(keys).unwrap_or_default();
        let nearest = known
            .iter()
            .map(|name| (strsim::damerau_levenshtein(name, key), name))
            .filter(|(distance, name)| *distance <= (name.len() / 3).max(2))
            .min();
        let below = |key: &str| {
            let mut whole = path.to_vec();
            whole.push(key.to_owned());
            pointer(&whole)
        };
        let (message, about) = match nearest {
            Some((_, name)) => {
                (format!("unknown key, did you mean \"{name}\"?"), About::Misspelt(below(name)))
            }
            None => (format!("unknown key, expected one of: {}", known.join(", ")), About::Nothing),
        };
        let problem = Problem { position: self.positions.key(path, key), path: below(key), message };
        (problem, about)
    }

    /// The schema of the value at `path`.
    fn schema_at(&self, path: &[String]) -> Option<&Value> {
        let mut node = self.schema;
        for step in path {
            node = branches(node).find_map(|node| {
                let property = node.get("properties").and_then(|p| p.get(step));
                let other = node.get("additionalProperties").filter(|value| value.is_object());
                let item = node.get("items").filter(|_| step.parse::<usize>().is_ok());
                property.or(other).or(item)
            })?;
        }
        Some(node)
    }

    fn may_be_absent(&self, path: &[String]) -> bool {
        let Some((key, parent)) = path.split_last() else { return false };
        let required = |node: &Value| {
            let names = node.get("required").and_then(Value::as_array);
            names.is_some_and(|names| names.iter().any(|name| name == key))
        };
        self.schema_at(parent).is_some_and(|parent| {
            let named =
                branches(parent).any(|node| node.get("properties").is_some_and(|p| p.get(key).is_some()));
            named && !branches(parent).any(required)
        })
    }

    /// What should stand at `path`, in words.
    fn expected(&self, path: &[String]) -> String {
        self.schema_at(path).map_or_else(|| "nothing".to_owned(), words)
    }
}

/// The node and, where it is a choice, its alternatives.
fn branches(node: &Value) -> impl Iterator<Item = &Value> {
    let choice = node.get("anyOf").or_else(|| node.get("oneOf")).and_then(Value::as_array);
    std::iter::once(node).chain(choice.into_iter().flatten())
}

fn keys(node: &Value) -> Vec<&str> {
    let mut names: Vec<&str> = branches(node)
        .filter_map(|node| node.get("properties").and_then(Value::as_object))
        .flat_map(|properties| properties.keys().map(String::as_str))
        .collect();
    names.sort_unstable();
    names
}

/// What a value of this schema is, in words.
fn words(node: &Value) -> String {
    if let Some(format) = node.get("format").and_then(Value::as_str)
        && let Some(format) = FORMATS.iter().find(|known| known.name == format)
    {
        return format.expected.to_owned();
    }
    if let Some(choice) = node.get("anyOf").and_then(Value::as_array) {
        return choice.iter().map(words).collect::<Vec<_>>().join(" or ");
    }
    match node.get("type").and_then(Value::as_str) {
        Some("string") => "a text".to_owned(),
        Some("integer" | "number") => "a number".to_owned(),
        Some("boolean") => "true or false".to_owned(),
        Some("array") => match node.get("items").map(words) {
            Some(item) => format!("a list, each item {item}"),
            None => "a list".to_owned(),
        },
        Some("object") => {
            let names = keys(node);
            match node.get("additionalProperties").filter(|value| value.is_object()) {
                Some(value) => format!("entries NAME: {}", words(value)),
                None => format!("keys ({})", names.join(", ")),
            }
        }
        _ => "something else".to_owned(),
    }
}

fn type_words(kind: &TypeKind) -> String {
    let word = |kind: JsonType| match kind {
        JsonType::Array => "a list",
        JsonType::Boolean => "true or false",
        JsonType::Integer | JsonType::Number => "a number",
        JsonType::Null => "nothing",
        JsonType::Object => "keys",
        JsonType::String => "a text",
    };
    match kind {
        TypeKind::Single(one) => word(*one).to_owned(),
        TypeKind::Multiple(set) => set.iter().map(word).collect::<Vec<_>>().join(" or "),
    }
}

/// A value of the document as a message repeats it.
fn quote(value: &Value) -> String {
    match value {
        Value::Null => "nothing".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "keys".to_owned(),
        Value::String(text) if text.chars().count() > MAX_QUOTE => {
            format!("{:?}…", text.chars().take(MAX_QUOTE).collect::<String>())
        }
        Value::String(text) => format!("{text:?}"),
        other => other.to_string(),
    }
}
