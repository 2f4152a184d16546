//! Conditions on what a machine says of itself: `node:os == 'linux'`, `node:tsVersion >= '1.60'`.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt;

use super::selector::{Wrong, nearest};

/// What a coordinator knows of its nodes.
const KNOWN: [&str; 3] = ["node:os", "node:osVersion", "node:tsVersion"];

/// One condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Condition {
    attribute: String,
    test: Comparison,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Comparison {
    Is(Relation, String),
    In(Vec<String>),
    NotIn(Vec<String>),
    Set,
    NotSet,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Relation {
    Equal,
    Unequal,
    Less,
    AtMost,
    Greater,
    AtLeast,
}

/// Longer ones first: one may begin another.
const RELATIONS: [(&str, Relation); 6] = [
    ("==", Relation::Equal),
    ("!=", Relation::Unequal),
    ("<=", Relation::AtMost),
    (">=", Relation::AtLeast),
    ("<", Relation::Less),
    (">", Relation::Greater),
];

fn unquoted(text: &str) -> String {
    let text = text.trim();
    let inside = |quote: char| text.strip_prefix(quote).and_then(|rest| rest.strip_suffix(quote));
    inside('\'').or_else(|| inside('"')).unwrap_or(text).to_owned()
}

impl Condition {
    pub(crate) fn parse(text: &str) -> Result<Self, Wrong> {
        let shape = || {
            let help =
                "such as node:os == 'linux', node:tsVersion >= '1.60' or node:os IN ['linux', 'macos']"
                    .to_owned();
            (format!("{text:?} is no condition"), Some(help))
        };
        let trimmed = text.trim();
        let end = trimmed.find(|c: char| c.is_whitespace() || "=!<>".contains(c)).ok_or_else(shape)?;
        let (attribute, rest) = trimmed.split_at(end);
        if !KNOWN.contains(&attribute) {
            let near = nearest(attribute, KNOWN).map(|near| format!("did you mean {near}?"));
            let known = || format!("what is known of a node is {}", KNOWN.join(", "));
            return Err((
                format!("the posture attribute {attribute:?} is not known here"),
                Some(near.unwrap_or_else(known)),
            ));
        }
        let rest = rest.trim();
        let list = |text: &str| -> Result<Vec<String>, Wrong> {
            let inner =
                text.trim().strip_prefix('[').and_then(|text| text.strip_suffix(']')).ok_or_else(shape)?;
            Ok(inner.split(',').map(unquoted).filter(|value| !value.is_empty()).collect())
        };
        let test = match rest {
            "IS SET" => Comparison::Set,
            "NOT SET" | "IS NOT SET" => Comparison::NotSet,
            _ => {
                if let Some(values) = rest.strip_prefix("IN ") {
                    Comparison::In(list(values)?)
                } else if let Some(values) = rest.strip_prefix("NOT IN ") {
                    Comparison::NotIn(list(values)?)
                } else {
                    let (sign, relation) =
                        RELATIONS.iter().find(|(sign, _)| rest.starts_with(sign)).ok_or_else(shape)?;
                    let value = unquoted(&rest[sign.len()..]);
                    if value.is_empty() {
                        return Err(shape());
                    }
                    Comparison::Is(*relation, value)
                }
            }
        };
        Ok(Self { attribute: attribute.to_owned(), test })
    }

    /// Does a node with these facts fulfil it? What is not known fulfils nothing but that it is not set.
    pub(crate) fn holds(&self, facts: &BTreeMap<String, String>) -> bool {
        let Some(value) = facts.get(&self.attribute) else { return self.test == Comparison::NotSet };
        match &self.test {
            Comparison::Set => true,
            Comparison::NotSet => false,
            Comparison::In(values) => values.contains(value),
            Comparison::NotIn(values) => !values.contains(value),
            Comparison::Is(relation, wanted) => {
                let order = versions(value, wanted);
                match relation {
                    Relation::Equal => order == Ordering::Equal,
                    Relation::Unequal => order != Ordering::Equal,
                    Relation::Less => order == Ordering::Less,
                    Relation::AtMost => order != Ordering::Greater,
                    Relation::Greater => order == Ordering::Greater,
                    Relation::AtLeast => order != Ordering::Less,
                }
            }
        }
    }
}

/// Compares part by part, numbers as numbers; missing parts are zero, so `1.60` equals `1.60.0`.
fn versions(a: &str, b: &str) -> Ordering {
    let parts = |text: &str| -> Vec<String> { text.split(['.', '-', '+']).map(str::to_owned).collect() };
    let (a, b) = (parts(a), parts(b));
    for at in 0..a.len().max(b.len()) {
        let part = |list: &[String]| list.get(at).cloned().unwrap_or_else(|| "0".to_owned());
        let (a, b) = (part(&a), part(&b));
        let order = match (a.parse::<u64>(), b.parse::<u64>()) {
            (Ok(a), Ok(b)) => a.cmp(&b),
            _ => a.cmp(&b),
        };
        if order != Ordering::Equal {
            return order;
        }
    }
    Ordering::Equal
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |values: &[String]| {
            let quoted: Vec<String> = values.iter().map(|value| format!("'{value}'")).collect();
            format!("[{}]", quoted.join(", "))
        };
        let attribute = &self.attribute;
        match &self.test {
            Comparison::Set => write!(f, "{attribute} IS SET"),
            Comparison::NotSet => write!(f, "{attribute} NOT SET"),
            Comparison::In(values) => write!(f, "{attribute} IN {}", list(values)),
            Comparison::NotIn(values) => write!(f, "{attribute} NOT IN {}", list(values)),
            Comparison::Is(relation, value) => {
                let sign =
                    RELATIONS.iter().find(|(_, known)| known == relation).map_or("==", |(sign, _)| sign);
                write!(f, "{attribute} {sign} '{value}'")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_are_read_printed_and_held_against_facts() {
        let facts = BTreeMap::from([
            ("node:os".to_owned(), "linux".to_owned()),
            ("node:tsVersion".to_owned(), "1.62.1".to_owned()),
        ]);
        for (text, holds) in [
            ("node:os == 'linux'", true),
            ("node:os != 'linux'", false),
            ("node:os IN ['macos', 'linux']", true),
            ("node:os NOT IN ['linux']", false),
            ("node:tsVersion >= '1.62'", true),
            ("node:tsVersion < '1.7'", false),
            ("node:tsVersion < '1.100'", true),
            ("node:tsVersion == '1.62.1.0'", true),
            ("node:osVersion IS SET", false),
            ("node:osVersion NOT SET", true),
            ("node:osVersion != '1'", false),
        ] {
            let condition = Condition::parse(text).unwrap();
            assert_eq!(condition.holds(&facts), holds, "{text}");
            assert_eq!(Condition::parse(&condition.to_string()), Ok(condition), "{text}");
        }
        for text in ["", "node:os", "node:os ==", "custom:tier == 'x'", "node:os ~ 'x'", "node:os IN 'x'"] {
            assert!(Condition::parse(text).is_err(), "{text}");
        }
    }
}
