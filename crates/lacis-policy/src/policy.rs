//! A policy: text that was read and checked.

use std::fmt;
use std::sync::Arc;

use crate::check::check;
use crate::document::{Document, Format};
use crate::language::{self, Body};
use crate::problem::{Invalid, Problem};
use crate::program::Program;

/// A policy that can be used. Cheap to clone. Two are equal when they say the same, however it is written.
#[derive(Clone)]
pub struct Policy(Arc<Inner>);

struct Inner {
    text: String,
    format: Format,
    body: Body,
    program: Program,
    warnings: Vec<Problem>,
}

impl fmt::Debug for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Policy").field("text", &self.0.text).finish_non_exhaustive()
    }
}

impl PartialEq for Policy {
    fn eq(&self, other: &Self) -> bool {
        self.0.body == other.0.body
    }
}

impl Policy {
    /// Reads and checks a policy: syntax, structure, and names that nothing in it defines. What depends on users and
    /// nodes (its own tests among it) is for [`crate::Network::test`].
    ///
    /// # Errors
    /// All problems, in the order of the text, each with its place.
    pub fn parse(text: &str, format: Format) -> Result<Self, Invalid> {
        let document = Document::parse(text, format)?;
        let mut reading = language::read::read(&document);
        let (problems, warnings) = check(&reading.body);
        reading.problems.extend(problems);
        reading.warnings.extend(warnings);
        if !reading.problems.is_empty() {
            reading.problems.sort_by_key(|problem| problem.at);
            reading.problems.dedup();
            return Err(Invalid { problems: reading.problems });
        }
        reading.warnings.sort_by_key(|warning| warning.at);
        Ok(Self::of(text.to_owned(), format, reading.body, reading.warnings))
    }

    /// What a network without a policy has: everybody reaches everything.
    pub fn allow_all() -> Self {
        Self::of("{}".to_owned(), Format::HuJson, Body::default(), Vec::new())
    }

    fn of(text: String, format: Format, body: Body, warnings: Vec<Problem>) -> Self {
        let program = Program::of(&body);
        Self(Arc::new(Inner { text, format, body, program, warnings }))
    }

    /// What is accepted and not honoured, by name.
    pub fn warnings(&self) -> &[Problem] {
        &self.0.warnings
    }

    /// As it was given, comments and all.
    pub fn text(&self) -> &str {
        &self.0.text
    }

    /// How [`Self::text`] is written.
    pub fn format(&self) -> Format {
        self.0.format
    }

    /// The same policy as plain JSON, in one spelling; reads back as an equal policy.
    pub fn to_json(&self) -> serde_json::Value {
        language::print::print(&self.0.body)
    }

    pub(crate) fn body(&self) -> &Body {
        &self.0.body
    }

    pub(crate) fn program(&self) -> &Program {
        &self.0.program
    }

    /// Is it not only an equal one, but this one?
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}
