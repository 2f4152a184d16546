//! What is wrong with a text, and where: for whoever reads a policy or a population.

use std::fmt::{self, Write as _};

/// A place in a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// From 1.
    pub line: usize,
    /// In characters, from 1.
    pub column: usize,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// One thing that is wrong, or worth a warning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where in the text.
    pub at: Option<Position>,
    /// Where in the document: `acls[0].dst[1]`; empty for the whole.
    pub place: String,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.place.is_empty() {
            write!(f, "{}: ", self.place)?;
        }
        f.write_str(&self.message)?;
        match &self.help {
            Some(help) => write!(f, " ({help})"),
            None => Ok(()),
        }
    }
}

/// A text that cannot be used, with everything that is wrong with it, in its order.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", lines(problems, None))]
pub struct Invalid {
    /// At least one.
    pub problems: Vec<Problem>,
}

impl Invalid {
    /// A line for each problem, with the file's name before it: `FILE:LINE:COLUMN: PLACE: MESSAGE`.
    pub fn for_file(&self, name: &str) -> String {
        lines(&self.problems, Some(name))
    }
}

fn lines(problems: &[Problem], name: Option<&str>) -> String {
    let mut text = String::new();
    for problem in problems {
        if !text.is_empty() {
            text.push('\n');
        }
        if let Some(name) = name {
            text.push_str(name);
            text.push_str(if problem.at.is_some() { ":" } else { ": " });
        }
        // Writing to a String cannot fail.
        let _ = match problem.at {
            Some(at) => write!(text, "{at}: {problem}"),
            None => write!(text, "{problem}"),
        };
    }
    text
}

impl From<Problem> for Invalid {
    fn from(problem: Problem) -> Self {
        Self { problems: vec![problem] }
    }
}
