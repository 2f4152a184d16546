//! Everything that is printed. It does not fail when the pipe is closed, and nothing that others have named or
//! written (nodes, users, servers) is more than text to the terminal ([`lacis_wire::text`]).

use std::borrow::Cow;
use std::fmt::{Display, Write as _};
use std::io::{IsTerminal as _, Write as _};

use lacis_wire::text;
use serde::Serialize;

/// Prints lines.
pub fn line(text: impl Display) {
    // A closed pipe is no error of ours: `lacis status | head` has all it wanted.
    let _ = writeln!(std::io::stdout(), "{}", text::plain_lines(&text.to_string()));
}

/// Prints lines beside the output proper: warnings, hints, errors.
pub fn note(text: impl Display) {
    let _ = writeln!(std::io::stderr(), "{}", text::plain_lines(&text.to_string()));
}

/// Prints a document of the user's own, character for character where it goes into a file.
pub(crate) fn document(document: &str) {
    if std::io::stdout().is_terminal() {
        line(document);
    } else {
        let _ = writeln!(std::io::stdout(), "{document}");
    }
}

/// Prints JSON, indented.
pub(crate) fn json(value: &impl Serialize) -> Result<(), serde_json::Error> {
    line(escaped(&serde_json::to_string_pretty(value)?));
    Ok(())
}

/// The same JSON with every character escaped that is not plain, so that programs read what was there.
fn escaped(json: &str) -> String {
    json.chars().fold(String::with_capacity(json.len()), |mut out, c| {
        if c == '\n' || text::is_plain(c) {
            out.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(out, "\\u{unit:04x}");
            }
        }
        out
    })
}

/// Prints rows with their columns under one another, two spaces apart.
pub(crate) fn columns(rows: &[Vec<String>]) {
    for row in aligned(rows) {
        line(row);
    }
}

/// Cells are one line each, whatever is in them.
pub(crate) fn aligned(rows: &[Vec<String>]) -> Vec<String> {
    let rows: Vec<Vec<_>> =
        rows.iter().map(|row| row.iter().map(|cell| text::plain(cell)).collect()).collect();
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |at: usize| rows.iter().filter_map(|row| row.get(at)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..count).map(|at| width(at).unwrap_or(0)).collect();
    let text = |row: &Vec<Cow<'_, str>>| {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        cells.join("  ").trim_end().to_owned()
    };
    rows.iter().map(text).collect()
}

/// A table with titles.
pub(crate) fn table(titles: &[&str], rows: Vec<Vec<String>>) {
    let titles = titles.iter().map(ToString::to_string).collect();
    columns(&[vec![titles], rows].concat());
}

/// A word as a shell takes it for one.
pub(crate) fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+.,:/@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let row = |cells: &[&str]| cells.iter().map(ToString::to_string).collect::<Vec<_>>();
        let rows = [row(&["100.64.0.1", "a", "-"]), row(&["100.64.0.10", "bobby", "idle"])];
        assert_eq!(aligned(&rows), ["100.64.0.1   a      -", "100.64.0.10  bobby  idle"]);
    }

    #[test]
    fn a_cell_is_one_line_of_text() {
        let row = |cells: &[&str]| cells.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(aligned(&[row(&["a\nb\u{1b}[2J", "c\u{202e}"])]), ["a b\u{fffd}[2J  c\u{fffd}"]);
    }

    #[test]
    fn json_says_the_same_without_characters_that_drive_a_terminal() {
        let value = ["a\u{9b}b\u{1b}\u{202e}\u{e0041}é\n"];
        let printed = escaped(&serde_json::to_string_pretty(&value).unwrap());
        assert!(printed.chars().all(|c| c == '\n' || text::is_plain(c)), "{printed}");
        assert_eq!(serde_json::from_str::<Vec<String>>(&printed).unwrap(), value);
    }
}
